"""The command line: flags made from the recipe, results as a table or one line of JSON. No logic of its own."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

from losa import recipe, registry
from losa.errors import LosaError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 for what the user can mend, 130 if interrupted."""
    try:
        parser = build_parser()
        args, unknown = parser.parse_known_args(arguments)
        if unknown:
            flags = [flag for action in args.parser._actions for flag in action.option_strings]
            raise registry.unknown("argument", unknown[0].partition("=")[0], flags)
        summary = args.command(args)
        if args.json:
            print(json.dumps(summary))
        return 0
    except LosaError as error:
        print(f"losa: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("losa: interrupted; losa compress ... --resume goes on with a run", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1


class Parser(argparse.ArgumentParser):
    """Its errors are those of losa: one line."""

    def error(self, message: str) -> NoReturn:
        raise LosaError(f"{message} ({self.prog} --help tells more)")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="losa", description="Make large language models sparse, and good again.")
    from losa import __version__

    parser.add_argument("--version", action="version", version=f"losa {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, doc: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=doc, description=doc, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="end with one line of JSON on standard output")
        sub.set_defaults(command=run, parser=sub)
        return sub

    compress = command("compress", _compress, "prune a model in steps, recover it, merge, save")
    compress.add_argument("model", metavar="MODEL", help="local folder, name on the hub, or demo (the built-in model)")
    compress.add_argument("--output", type=Path, help="new folder for the result and the run")
    compress.add_argument(
        "--recipe",
        help=f"settings: {', '.join(recipe.RECIPES)}, or JSON files, several with commas between; flags go on top",
    )
    compress.add_argument("--resume", action="store_true", help="go on with the run in --output, with its own settings")
    compress.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    compress.add_argument(
        "--dry-run", action="store_true", help="say what would happen, and what it would take; do nothing"
    )
    compress.add_argument("--quiet", action="store_true", help="no progress")
    _add_settings(compress)

    evaluate = command("evaluate", _evaluate, "perplexity, zero-shot tasks, and texts of a model, sparse or dense")
    evaluate.add_argument("model", metavar="MODEL", help="local folder, name on the hub, or demo (the built-in model)")
    about_text = evaluate.add_argument_group("perplexity")
    about_text.add_argument("--data", default="", help="c4, wikitext2, demo:test, a hub name or a local file")
    about_text.add_argument("--tokens", type=int, default=0, help="read only so many tokens (default: all)")
    about_text.add_argument(
        "--window", type=int, default=0, help="tokens read at once (default: the model's, 4096 at most)"
    )
    about_text.add_argument(
        "--stride", type=int, default=0,
        help="begin a window every so many tokens; what an earlier one saw is context only (default: they do not overlap)",
    )  # fmt: skip
    about_tasks = evaluate.add_argument_group("zero-shot tasks, through lm-evaluation-harness")
    about_tasks.add_argument(
        "--tasks", metavar="NAME,NAME", default="",
        help="hellaswag, winogrande, boolq, openbookqa, piqa, arc_easy, arc_challenge; paper (these seven); demo-next-line; "
        "or a definition of the harness (FILE.yaml)",
    )  # fmt: skip
    about_tasks.add_argument(
        "--task-data", metavar="NAME=PATH", action="append", default=[],
        help="rows of a task: a file, or a folder with them, as the hub or their authors publish them (default: the hub)",
    )  # fmt: skip
    about_tasks.add_argument("--limit", type=int, default=0, help="ask only so many questions a task (default: all)")
    about_tasks.add_argument("--batch-size", type=int, default=8, help="answers read at once (default: 8)")
    about_texts = evaluate.add_argument_group("texts side by side")
    about_texts.add_argument("--against", metavar="DENSE", default="", help="the model to compare with")
    about_texts.add_argument("--prompts", metavar="FILE", default="", help="a prompt a line (.txt) or a row")
    about_texts.add_argument("--new-tokens", type=int, default=64, help="tokens to write after each (default: 64)")
    for name in ("device", "dtype"):
        evaluate.add_argument(f"--{name}", default="auto", help=_settings()[name].metadata["doc"])

    inspect = command("inspect", _inspect, "sparsity by block and linear, ranks, origin of a saved model")
    inspect.add_argument("folder", type=Path, metavar="DIR")

    export = command("export", _export, "a saved model packed, or dense again: all but its linears is copied")
    export.add_argument("folder", type=Path, metavar="DIR", help="dense with zeros, by losa or not, or packed")
    export.add_argument("--output", type=Path, required=True, help="new folder")
    for name in ("format", "values"):
        setting = _settings()[name]
        choices = "|".join(get_args(setting.type))
        default = {"required": True} if name == "format" else {"default": setting.default}
        export.add_argument(f"--{name}", metavar=choices, help=setting.metadata["doc"], **default)

    generate = command("generate", _generate, "continue a text, printed as it is made; any model, sparse or dense")
    generate.add_argument("model", metavar="MODEL")
    generate.add_argument("--prompt", required=True, help="the text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=200, help="stop after so many (default: 200)")
    generate.add_argument("--temperature", type=float, default=0.0, help="above 0 draws tokens; 0 takes the likeliest")
    generate.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    for name in ("seed", "device", "dtype"):
        field = _settings()[name]
        options: dict[str, Any] = {"type": int} if name == "seed" else {}
        generate.add_argument(f"--{name}", default=field.default, help=field.metadata["doc"], **options)

    demo = command("demo", _demo, "the whole method on the built-in model, without any download")
    demo.add_argument("--output", type=Path, default=Path("losa-demo"), help="new folder (default: losa-demo)")
    demo.add_argument("--overwrite", action="store_true", help="replace the demo in --output")
    demo.add_argument("--sparsity", type=float, help=_settings()["sparsity"].metadata["doc"])
    demo.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _settings() -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(recipe.Recipe)}


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings")
    for name, field in _settings().items():
        kind = get_origin(field.type) or field.type
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        options: dict[str, Any] = {"help": field.metadata["doc"].replace("%", "%%"), "dest": f"set_{name}"}
        if default not in ("", [], {}, None):
            options["help"] += f" (default: {default})"
        if kind is Literal:
            options["metavar"] = "|".join(get_args(field.type))
        elif kind is UnionType:
            options |= {"type": _number_or_word, "metavar": "FLOAT|auto"}
        elif kind is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        elif kind is list:
            options |= {"action": "append", "metavar": "REGEX"}
        elif kind is dict:
            options |= {"type": _json_object, "metavar": "JSON"}
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        group.add_argument(f"--{name.replace('_', '-')}", **options)


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _json_object(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None


def _compress(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, f"set_{name}") for name in _settings()}
    given = {name: value for name, value in given.items() if value is not None}
    if args.output is None and not args.dry_run:
        raise LosaError("--output is missing: name a new folder for the result")
    if args.resume and args.recipe is None and args.output is not None:
        from losa.run import read_recipe

        settings = recipe.from_settings(read_recipe(args.output)["recipe"] | given)
    else:
        settings = recipe.load(args.recipe, given)
    _quiet_libraries()
    from losa.inputs import check
    from losa.pipeline import compress
    from losa.progress import Progress

    if args.dry_run:
        from losa.inspection import plan

        check(args.model, settings, args.output, args.overwrite, args.resume)
        planned = plan(args.model, settings)
        if not args.json:
            _print_plan(planned, settings)
        return planned
    progress = Progress(quiet=args.quiet or args.json)
    result = compress(
        args.model, settings, args.output, resume=args.resume, overwrite=args.overwrite, progress=progress
    )
    if not args.json:
        _print_result(result.measurements, result.path)
    return {"output": str(result.path), "measurements": result.measurements, "history": result.history}


def _print_result(measurements: dict[str, Any], path: Path | None) -> None:
    rows = [("", "perplexity", "sparsity")]
    for name in ("dense", "sparse"):
        rows.append((name, _number(measurements[name]["perplexity"]), f"{measurements[name].get('sparsity', 0):.1%}"))
    print_table(rows)
    loads = measurements["sparse"].get("loads")
    print(f"saved in {path}" + (f"; loads in {loads}" if loads else ""))


def _print_plan(planned: dict[str, Any], settings: recipe.Recipe) -> None:
    print(f"{planned['model']}: {planned['parameters']:,} parameters in {planned['dtype']} on {planned['device']}")
    print(
        f"{planned['blocks']} blocks, {planned['prunable']:,} prunable weights, about {planned['kept']:,} of them kept"
    )
    print(
        f"pruner {settings.pruner}, allocator {settings.allocator}, recovery {settings.recovery} on {planned['linears_adapted']} linears"
    )
    if planned["parameters_trained"]:
        merging = "which merge exactly" if planned["merges"] else "which do not merge"
        print(f"trained: {planned['trained']}, {planned['parameters_trained']:,} values at most, {merging}")
    names = ("step", "sparsity", "mean_rank", "rows")
    print_table([names, *(tuple(str(step[name]) for name in names) for step in planned["steps"])])
    places = [
        f"{what} on disk"
        for what, there in (("model", planned["from_disk"]), ("activations", planned["spill"]))
        if there
    ]
    note = f" ({', '.join(places)})" if places else ""
    print(
        f"memory at its peak, about {size(planned['memory'])}{note}; disk, about {size(planned['disk'])}; the "
        f"{settings.format} model, about {size(planned['saved'])}"
    )


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    settings = recipe.load(None, {"device": args.device, "dtype": args.dtype})
    _quiet_libraries()
    from losa import evaluate

    names = [field.name for field in dataclasses.fields(evaluate.Evaluation)]
    given = {name: getattr(args, name) for name in names}
    given["tasks"] = [name for name in args.tasks.split(",") if name]
    given["task_data"] = dict(_pair(text) for text in args.task_data)
    found = evaluate.evaluate(args.model, evaluate.Evaluation(**given), settings, args.json or not sys.stderr.isatty())
    if not args.json:
        _print_answers(found)
    return found


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise LosaError(f"--task-data {text}: expected NAME=PATH")
    return name, value


def _print_answers(found: dict[str, Any]) -> None:
    if "perplexity" in found:
        windows = f"windows of {found['window']}" + (f" every {found['stride']}" if found["stride"] else "")
        print(f"perplexity {found['perplexity']:.4f} over {found['tokens']:,} tokens of {found['data']}, {windows}")
    if tasks := found.get("tasks"):
        metrics = list(dict.fromkeys(key for scores in tasks.values() for key in scores if key not in ("rows", "cut")))
        rows = [("", "questions", *(key.replace("acc_norm_stderr", "±").replace("acc_stderr", "±") for key in metrics))]
        for name, scores in tasks.items():
            rows.append((name, f"{scores['rows']:,}", *(_score(scores.get(key)) for key in metrics)))
        if len(tasks) > 1:
            rows.append(("mean", "", *(_score(found["mean"].get(key)) for key in metrics)))
        print_table(rows)
        for name, scores in tasks.items():
            if scores["cut"]:
                print(
                    f"{name}: {scores['cut']} questions with an answer are longer than the model reads: cut at the front"
                )
    if comparison := found.get("comparison"):
        _print_comparison(found["model"], comparison)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _print_comparison(name: str, found: dict[str, Any]) -> None:
    """Two columns as wide as the terminal allows."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(escape(found["against"]), escape(name), show_lines=True, expand=True)
    for line in found["prompts"]:
        same = f"the first {line['same']} tokens are the same, agreement {line['agreement']:.1%}"
        table.add_row(Text(line["prompt"], "bold"), Text(same, "italic"))
        table.add_row(Text(line["dense"]), Text(line["sparse"]))
    Console().print(table)
    of = found["perplexity"]
    print(
        f"agreement {found['agreement']:.1%} of the tokens of {found['against']}; perplexity of the texts under it: "
        f"{of['dense']:.3f} its own, {of['sparse']:.3f} those of {name}"
    )


def _inspect(args: argparse.Namespace) -> dict[str, Any]:
    _quiet_libraries()
    from losa.inspection import inspect

    found = inspect(args.folder)
    if not args.json:
        if "source" in found:
            made = found["recipe"]
            print(f"made by losa {found['versions']['losa']} from {found['source']}")
            print(
                f"pattern {made['pattern']}, sparsity {made['sparsity']}, pruner {made['pruner']}, allocator "
                f"{made['allocator']}, {made['steps']} steps, recovery {made['recovery']}"
            )
        values = f" with {found['values']} values" if "values" in found else ""
        print(f"{found['format']}{values}, {size(found['bytes'])} on disk")
        if "exported" in found:
            print(f"exported from {found['exported']['from']}: what was measured there was measured before")
        rows = [("block", "linear", "weights", "sparsity", "rank")]
        for block in found["blocks"]:
            rank = "" if block["rank"] is None else str(block["rank"])
            rows.append((block["name"], "", f"{block['weights']:,}", _share(block["zeros"], block["weights"]), rank))
            for name, linear in block["linears"].items():
                rows.append(("", name, f"{linear['weights']:,}", _share(linear["zeros"], linear["weights"]), ""))
        print_table([*rows, ("all", "", f"{found['weights']:,}", f"{found['sparsity']:.2%}", "")])
    return found


def _export(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("format", "values"):
        known = get_args(_settings()[name].type)
        if getattr(args, name) not in known:
            raise registry.unknown(name, getattr(args, name), known)
    _quiet_libraries()
    from losa.sparse.convert import convert

    found = convert(args.folder, args.output, args.format, args.values)
    if not args.json:
        print(
            f"{found['output']}: {found['packed']} of {found['linears']} linears packed; the model takes "
            f"{size(found['bytes'])}, took {size(found['bytes_before'])}"
        )
    return found


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    settings = recipe.load(None, {"seed": args.seed, "device": args.device, "dtype": args.dtype})
    _quiet_libraries()
    from losa.generation import generate

    return generate(
        args.model, args.prompt, settings, args.max_new_tokens, args.temperature, args.chat, stream=not args.json
    )


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    _quiet_libraries()
    from losa.demo import run
    from losa.progress import Progress

    found = run.demo(args.output, args.sparsity, args.overwrite, Progress(quiet=args.quiet or args.json))
    if not args.json:
        rows = [("", "perplexity", "sparsity", "weights kept", "on disk")]
        for name, line in found["models"].items():
            kept = f"{line['kept']:,}"
            rows.append((name, _number(line["perplexity"]), f"{line['sparsity']:.1%}", kept, size(line["bytes"])))
        print_table(rows)
        for name, text in found["samples"].items():
            print(f"\n{name} continues {found['prompt']!r}:\n{text}")
        print(f"\nthe LoSA model is in {found['output']}: losa inspect {found['output']}")
    return found


def _quiet_libraries() -> None:
    """Their bars and advice about loading are not ours to show."""
    import logging as standard

    from transformers.utils import logging

    standard.getLogger("huggingface_hub").setLevel(standard.ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def size(count: float) -> str:
    """Bytes for people, decimal."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they must be, the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(
                c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )
