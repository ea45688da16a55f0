"""The command line: flags made from the recipe, results as a table or one line of JSON. No logic of its own."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

from losa import distributed, recipe, registry, repair_recipe
from losa.errors import LosaError
from losa.experiments import tables
from losa.progress import heeding_interrupts
from losa.units import duration, number, size


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 for what the user can mend, 130 if interrupted.

    Of several processes that torchrun started, rank 0 prints, and one says what went wrong.
    """
    again = "the same command with --resume goes on with a run"
    try:
        if distributed.launched() > 1:
            distributed.say_when_ended()
            if not distributed.leads():
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
        parser = build_parser()
        args, unknown = parser.parse_known_args(arguments)
        if unknown:
            flags = [flag for action in args.parser._actions for flag in action.option_strings]
            raise registry.unknown("argument", unknown[0].partition("=")[0], flags)
        if distributed.launched() > 1 and args.command not in (_compress, _recover):
            raise LosaError(f"{args.parser.prog} runs in one process: torchrun is for losa compress and losa recover")
        if args.command is _experiment:
            again = "the same command goes on"
        with heeding_interrupts():
            summary = args.command(args)
        if args.json:
            print(json.dumps(summary))
        return 0
    except LosaError as error:
        distributed.say_end(" ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        distributed.say_end(f"interrupted; {again}")
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
        sub.add_argument("--quiet", action="store_true", help="no progress")
        sub.set_defaults(command=run, parser=sub)
        return sub

    compress = command("compress", _compress, "prune a model in steps, recover it, merge, save")
    compress.add_argument("model", metavar="MODEL", help="local folder, name on the hub, or demo (the built-in model)")
    _add_run(compress, "settings")
    _add_settings(compress)

    recover = command("recover", _recover, "repair a model that is pruned already, its zeros kept; merge, save")
    recover.add_argument("model", metavar="SPARSE", help="local folder or name on the hub of a model with zeros")
    _add_run(recover, "settings, of which those of recovery count")
    _add_settings(recover, hidden=repair_recipe.PRUNING)

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
    about_texts.add_argument("--max-new-tokens", type=int, default=64, help="tokens to write after each (default: 64)")
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

    bench = command("bench", _bench, "speed: `losa bench kernel` times one packed linear beside dense ones")
    bench.add_argument("subject", metavar="kernel", help="what is timed; the kernel is named, and why it was taken")
    bench.add_argument("--shape", default="11008x4096", help="OUTxIN (default: 11008x4096)")
    bench.add_argument("--sparsity", type=float, default=0.7, help="share that is pruned (default: 0.7)")
    bench.add_argument("--values", default="bfloat16", help="bfloat16, float16, float32 or int8 (default: bfloat16)")
    bench.add_argument("--activations", default="bfloat16", help="bfloat16 or float32 (default: bfloat16)")
    bench.add_argument("--rows", type=int, default=1, help="tokens at once (default: 1, as in decoding)")
    bench.add_argument("--rounds", type=int, default=40, help="how often everyone is timed, in turns (default: 40)")
    bench.add_argument("--threads", type=int, default=0, help="default: what torch takes")
    bench.add_argument("--kernel", help=f"{', '.join(registry.KERNELS)} (default: LOSA_KERNEL, or the first that can)")
    report = command("report", _report, "what one run did, or several compared, as a page with pictures")
    report.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="output of a run, finished or not")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page (default: report.html in the first DIR)")

    about = "the paper's tables on a model of yours: which cells there are, what is kept of them, and whether its claims hold"
    experiment = command("experiment", _experiment, about)
    experiment.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join([*tables.TABLES, tables.ALL])}")
    experiment.add_argument(
        "--model", action="append", required=True, help="local folder, name on the hub, or demo; repeatable"
    )
    experiment.add_argument("--output", type=Path, help="folder in which every cell is kept; what is there is not run")
    experiment.add_argument(
        "--recipe", help="settings below those of the tables, as compress takes them (default: paper; of demo: demo)"
    )
    experiment.add_argument("--seeds", type=int, default=1, help="how many seeds, from --seed on (default: 1)")
    experiment.add_argument("--part", default="1/1", metavar="I/N", help="run every N-th cell only, from the I-th")
    experiment.add_argument("--cached", action="store_true", help="make the tables of what is there; run nothing")
    experiment.add_argument("--dry-run", action="store_true", help="say which cells are there and which would be run")
    experiment.add_argument(
        "--markdown", type=Path, metavar="FILE",
        help="put each table into FILE, between <!-- experiment NAME --> and <!-- end -->; a new file has them all",
    )  # fmt: skip
    _add_settings(experiment)

    demo = command("demo", _demo, "the whole method on the built-in model, without any download")
    demo.add_argument("--output", type=Path, default=Path("losa-demo"), help="new folder (default: losa-demo)")
    demo.add_argument("--overwrite", action="store_true", help="replace the demo in --output")
    demo.add_argument("--sparsity", type=float, help=_settings()["sparsity"].metadata["doc"])
    return parser


def _add_run(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--output", type=Path, help="new folder for the result and the run")
    parser.add_argument(
        "--recipe",
        help=f"{what}: {', '.join(recipe.RECIPES)}, or JSON files, several with commas between; flags go on top",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output, with its own settings")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would happen, and what it would take; do nothing"
    )


def _settings() -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(recipe.Recipe)}


def _add_settings(parser: argparse.ArgumentParser, hidden: Sequence[str] = ()) -> None:
    """A flag a setting. `hidden`: not in the help, but known, so that the error can say why it means nothing here."""
    group = parser.add_argument_group("settings")
    for name, field in _settings().items():
        kind = get_origin(field.type) or field.type
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        options: dict[str, Any] = {"help": field.metadata["doc"].replace("%", "%%"), "dest": f"set_{name}"}
        if default not in ("", [], {}, None):
            options["help"] += f" (default: {default})"
        if name in hidden:
            options["help"] = argparse.SUPPRESS
        if kind is Literal:
            options["metavar"] = "|".join(get_args(field.type))
        elif kind is UnionType:
            options |= {"type": _number_or_word, "metavar": "FLOAT|auto"}
        elif kind is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        elif kind is list:
            options |= {"action": "append", "metavar": "TEXT"}
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
    settings = _chosen(args, recipe.Recipe)
    from losa.inspection import plan
    from losa.pipeline import compress

    return _run(args, settings, compress, plan)


def _recover(args: argparse.Namespace) -> dict[str, Any]:
    settings = _chosen(args, repair_recipe.Repair)
    from losa.repair import plan, recover

    return _run(args, settings, recover, plan)


def _chosen(args: argparse.Namespace, kind: type[recipe.Recipe]) -> recipe.Recipe:
    given = _given(args)
    if args.output is None and not args.dry_run:
        raise LosaError("--output is missing: name a new folder for the result")
    if args.resume and args.recipe is None and args.output is not None:
        from losa.run import read_recipe

        kept = read_recipe(args.output)
        if (kept["command"] == "compress") != kind.prunes:
            raise LosaError(f"{args.output} was started by losa {kept['command']}: resume it with that")
        return recipe.from_settings(kept["recipe"] | given, kind)
    return recipe.load(args.recipe, given, kind)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags give."""
    given = {name: getattr(args, f"set_{name}") for name in _settings()}
    return {name: value for name, value in given.items() if value is not None}


def _run(args: argparse.Namespace, settings: recipe.Recipe, start: Any, plan: Any) -> dict[str, Any]:
    _quiet_libraries()
    from losa.inputs import check

    if args.dry_run:
        check(args.model, settings, args.output, args.overwrite, args.resume)
        planned: dict[str, Any] = plan(args.model, settings)
        if not args.json:
            _print_plan(planned, settings)
        return planned
    result = start(
        args.model, settings, args.output, resume=args.resume, overwrite=args.overwrite, progress=_progress(args)
    )
    if not args.json and distributed.leads():
        _print_result(args.output, result.measurements["sparse"].get("loads"))
    return {"output": str(result.path), "measurements": result.measurements, "history": result.history}


def _print_result(output: Path, loads: str | None) -> None:
    from losa import story
    from losa.report import verdict_table

    told = story.read(output)
    table = verdict_table([("", row, False) for row in told.verdict()], several=False, sampled=told.sampled)
    print_table([table["columns"], *(row["cells"] for row in table["rows"])])
    peak = f", {size(told.peak)} of memory at its peak" if told.peak else ""
    print(f"{duration(told.seconds)}{peak}; losa report {output} shows what happened")
    print(f"saved in {output}" + (f"; loads in {loads}" if loads else ""))


def _report(args: argparse.Namespace) -> dict[str, Any]:
    from losa.report import report

    page = report(args.folders, args.output)
    if not args.json:
        print(f"{page}, {size(page.stat().st_size)}: open it in a browser")
    return {"report": str(page), "bytes": page.stat().st_size, "runs": [str(folder) for folder in args.folders]}


def _experiment(args: argparse.Namespace) -> dict[str, Any]:
    from losa.experiments import command

    names = [field.name for field in dataclasses.fields(command.Asked) if field.name != "models"]
    asked = command.Asked(models=args.model, **{name: getattr(args, name) for name in names})
    _quiet_libraries()
    found = command.experiment(asked, _given(args), _progress(args))
    if not args.json:
        if args.dry_run:
            print(command.say_foretold(found))
        else:
            _print_tables(found)
    return found


def _print_tables(found: dict[str, Any]) -> None:
    for table in found["tables"]:
        print(f"{table['title']}\n{table['model']}. {table['of']}".rstrip())
        print_table([table["header"], *table["rows"]])
        for claim in table["claims"]:
            print(f"paper: {claim['paper']}\nhere: {claim['here']}")
        for note in table["notes"]:
            print(note)
        print()
    cells = found["cells"]
    print(
        f"{cells['there']} of {cells['all']} cells are there, {cells['ran']} of them run now; all in {found['output']}"
    )


def _progress(args: argparse.Namespace) -> Any:
    from losa.progress import Progress

    return Progress(quiet=args.quiet or args.json)


def _print_plan(planned: dict[str, Any], settings: recipe.Recipe) -> None:
    print(f"{planned['model']}: {planned['parameters']:,} parameters in {planned['dtype']} on {planned['device']}")
    print(
        f"{planned['blocks']} blocks, {planned['prunable']:,} prunable weights, about {planned['kept']:,} of them kept"
    )
    before = f"pruner {settings.pruner}, allocator {settings.allocator}, " if settings.prunes else ""
    print(f"{before}recovery {settings.recovery} on {planned['linears_adapted']} linears")
    if planned["parameters_trained"]:
        merging = "which merge exactly" if planned["merges"] else "which do not merge"
        print(f"trained: {planned['trained']}, {planned['parameters_trained']:,} values at most, {merging}")
    if dense := planned.get("dense"):
        print(f"{len(dense)} linears have no mask and stay dense: {', '.join(dense)}")
    names = ("step", "sparsity", "mean_rank", "rows")
    print_table([names, *(tuple(str(step[name]) for name in names) for step in planned["steps"])])
    each = f" of each of {planned['processes']} processes" if planned["processes"] > 1 else ""
    places = [f"{what} on disk" for what in ("model", "activations") if planned[f"{what}_on_disk"]]
    note = f" ({', '.join(places)})" if places else ""
    print(
        f"memory{each} at its peak, about {size(planned['memory'])}{note}; disk, about {size(planned['disk'])}; the "
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
    quiet = args.quiet or args.json or not sys.stderr.isatty()
    found = evaluate.evaluate(args.model, evaluate.Evaluation(**given), settings, quiet, _progress(args))
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

    found = inspect(args.folder, _progress(args))
    if not args.json:
        if "source" in found:
            made = found["recipe"]
            print(f"made by losa {found['versions']['losa']} from {found['source']}")
            if found["command"] == "recover":
                print(f"pruned already and repaired, recovery {made['recovery']}")
            else:
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


def _bench(args: argparse.Namespace) -> dict[str, Any]:
    if args.subject != "kernel":
        raise registry.unknown("subject of a benchmark", args.subject, ["kernel"])
    from losa import bench

    found = bench.kernel(
        args.shape,
        args.sparsity,
        values=args.values,
        activations=args.activations,
        rows=args.rows,
        name=args.kernel,
        rounds=args.rounds,
        threads=args.threads,
    )
    if not args.json:
        for name, why in found["refused"].items():
            print(f"kernel {name} refused: {why}")
        print(f"kernel {found['kernel']}: {found['why']}; {found['threads']} threads, {found['processor']}")
        rows = [("", "ms", "GB/s", "times as long as losa")]
        for who, ms in found["ms"].items():
            over = f"{found['speedups'][who]:.2f}" if who in found["speedups"] else ""
            rows.append((who, f"{ms:.3f}", f"{found['gb_per_s'][who]:.1f}", over))
        print_table(rows)
        print(
            f"{found['share_of_read_bandwidth']:.0%} of the reading speed; over the best dense product "
            f"{found['speedup_over_best_dense']:.2f}, {found['bound']:.2f} if both read at one speed"
        )
    return found


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    _quiet_libraries()
    from losa.demo import run

    found = run.demo(args.output, args.sparsity, args.overwrite, _progress(args))
    if not args.json:
        rows = [("", "perplexity", "sparsity", "weights kept", "on disk")]
        for name, line in found["models"].items():
            kept = f"{line['kept']:,}"
            rows.append((name, number(line["perplexity"]), f"{line['sparsity']:.1%}", kept, size(line["bytes"])))
        print_table(rows)
        for name, text in found["samples"].items():
            print(f"\n{name} continues {found['prompt']!r}:\n{text}")
        print(f"\nthe LoSA model is in {found['output']}: losa report {found['output']} shows how it was made")
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


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they must be, the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(
                c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )
