"""What each command of the command line does: calls the work, and prints its result as a table. No logic of its own."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from losa import distributed, recipe, registry, repair_recipe
from losa.errors import LosaError
from losa.recipe_checks import refuse_unread
from losa.units import duration, number, size


def settings_by_name() -> dict[str, Any]:
    """The recipe's fields, each with its doc in `metadata`."""
    return {field.name: field for field in dataclasses.fields(recipe.Recipe)}


def compress(args: argparse.Namespace) -> dict[str, Any]:
    settings = _chosen(args, recipe.Recipe)
    from losa.inspection import plan
    from losa.pipeline import compress

    return _run(args, settings, compress, plan)


def recover(args: argparse.Namespace) -> dict[str, Any]:
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
        made = recipe.from_settings(kept["recipe"] | given, kind)
        _check_there(made, kept["folder"])
    else:
        made = recipe.load(args.recipe, given, kind)
    refuse_unread(made, given)
    return made


def _check_there(made: recipe.Recipe, begun_in: str) -> None:
    """Raise LosaError for files of a run that were named from the folder it was begun in, and are not to be seen from here."""
    read = {"calibration": made.prunes, "train_data": made.trains, "eval_data": True, "teacher_model": True}
    for name in (name for name, is_read in read.items() if is_read):
        path = Path(getattr(made, name) or ".")
        if not path.exists() and (Path(begun_in) / path).exists() and str(path) != "demo":
            raise LosaError(f"{name} {str(path)!r} is in {begun_in}, where the run was begun: resume it from there")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags give."""
    given = {name: getattr(args, f"set_{name}") for name in settings_by_name()}
    return {name: value for name, value in given.items() if value is not None}


def _run(args: argparse.Namespace, settings: recipe.Recipe, start: Any, plan: Any) -> dict[str, Any]:
    _quiet_libraries()
    from losa.inputs import check
    from losa.run import short_of_room

    if args.dry_run:
        check(args.model, settings, args.output, args.overwrite, args.resume)
        planned: dict[str, Any] = plan(args.model, settings)
        new = args.output is not None and not args.resume
        planned["disk_shortage"] = short_of_room(args.output, planned["disk"]) if new else ""
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
    from losa.report import peaks, verdict_table

    told = story.read(output)
    table = verdict_table([("", row, False) for row in told.verdict()], several=False, sampled=told.sampled)
    print_table([table["columns"], *(row["cells"] for row in table["rows"])])
    took = ", ".join(filter(None, (duration(told.seconds), peaks(told))))
    print(f"{took}; losa report {output} shows what happened")
    print(f"saved in {output}" + (f"; loads in {loads}" if loads else ""))


def report(args: argparse.Namespace) -> dict[str, Any]:
    from losa.report import report

    page = report(args.folders, args.output)
    if not args.json:
        print(f"{page}, {size(page.stat().st_size)}: open it in a browser")
    return {"report": str(page), "bytes": page.stat().st_size, "runs": [str(folder) for folder in args.folders]}


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    from losa.experiments import command

    names = [field.name for field in dataclasses.fields(command.Asked) if field.name != "models"]
    given = {name: getattr(args, name) for name in names} | {"task_data": dict(map(_pair, args.task_data))}
    asked = command.Asked(models=args.model, **given)
    _quiet_libraries()
    found = command.experiment(asked, _given(args), _progress(args))
    if not args.json:
        if args.dry_run:
            print(command.say_foretold(found))
        else:
            _print_tables(found)
    if failed := command.say_failed(found):
        if args.json:  # what there is is shown all the same
            print(json.dumps(found))
        raise LosaError(failed)
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
    if planned["shortage"]:
        print(planned["shortage"])
    if planned["disk_shortage"]:
        print(planned["disk_shortage"])


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    settings = recipe.load(None, {"device": args.device, "dtype": args.dtype})
    _quiet_libraries()
    from losa import evaluate

    names = [field.name for field in dataclasses.fields(evaluate.Evaluation)]
    given = {name: getattr(args, name) for name in names}
    given["tasks"] = [name for name in args.tasks.split(",") if name]
    given["task_data"] = dict(map(_pair, args.task_data))
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


def inspect(args: argparse.Namespace) -> dict[str, Any]:
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


def export(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("format", "values"):
        known = get_args(settings_by_name()[name].type)
        if getattr(args, name) not in known:
            raise registry.unknown(name, getattr(args, name), known)
    _quiet_libraries()
    from losa.sparse.convert import convert

    found = convert(args.folder, args.output, args.format, args.values, progress=_progress(args))
    if not args.json:
        print(
            f"{found['output']}: {found['packed']} of {found['linears']} linears packed; the model takes "
            f"{size(found['bytes'])}, took {size(found['bytes_before'])}"
        )
    return found


def generate(args: argparse.Namespace) -> dict[str, Any]:
    settings = recipe.load(None, {"seed": args.seed, "device": args.device, "dtype": args.dtype})
    _quiet_libraries()
    from losa.generation import generate

    return generate(
        args.model,
        args.prompt,
        settings,
        args.max_new_tokens,
        args.temperature,
        args.chat,
        stream=not args.json,
        progress=_progress(args),
    )


def bench_kernel(args: argparse.Namespace) -> dict[str, Any]:
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


def bench_decode(args: argparse.Namespace) -> dict[str, Any]:
    settings = recipe.load(None, {"device": args.device, "dtype": args.dtype})
    _quiet_libraries()
    from losa import speed

    found = speed.decode(
        args.model,
        settings,
        args.against,
        tokens=args.tokens,
        rounds=args.rounds,
        threads=args.threads,
        save=args.save,
    )
    if not args.json:
        rows = [("", "tokens/s", "decoded by"), (args.model, f"{found['tokens_per_second']:.1f}", found["runtime"])]
        if args.against:
            other = found["against"]
            rows.append((args.against, f"{other['tokens_per_second']:.1f}", other["runtime"]))
        print_table(rows)
        if args.against:
            low, high = found["speedup_quartiles"]
            print(f"{found['speedup']:.2f} times as fast as {args.against} ({low:.2f} to {high:.2f})")
        print(f"{found['threads']} threads, {found['device']}")
    return found


def demo(args: argparse.Namespace) -> dict[str, Any]:
    _quiet_libraries()
    from losa.demo import run

    chosen = {} if args.sparsity is None else {"sparsity": args.sparsity}
    found = run.demo(args.output, chosen, args.resume, args.overwrite, _progress(args))
    if not args.json:
        rows = [("", "perplexity", "sparsity", "weights kept", "on disk", "packed")]
        for name, line in found["models"].items():
            kept, packed = f"{line['kept']:,}", size(line["bytes_packed"]) if "bytes_packed" in line else ""
            rows.append(
                (name, number(line["perplexity"]), f"{line['sparsity']:.1%}", kept, size(line["bytes"]), packed)
            )
        print_table(rows)
        for name, text in found["samples"].items():
            print(f"\n{name} continues {found['prompt']!r}:\n{text}")
        print(f"\nthe LoSA model is in {found['output']}, and without its zeros in {found['packed']}")
        print(f"losa report {found['output']} shows how it was made")
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
