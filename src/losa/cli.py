"""The command line: flags made from the recipe. What the commands do is in commands.py."""

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

from losa import commands, distributed, recipe, registry, repair_recipe
from losa.errors import LosaError
from losa.experiments import tables
from losa.progress import heeding_interrupts

LESS = (
    "; less is taken with --micro-batch-size 1, --checkpointing, --dtype bfloat16 and shorter sequences, and --dry-run "
    "says how much"
)
# how what was interrupted goes on
RESUMES = "; the same command with --resume goes on with a run"
AGAIN = {commands.compress: RESUMES, commands.recover: RESUMES, commands.demo: RESUMES}
AGAIN[commands.experiment] = "; the same command goes on"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 for what the user can mend, 130 if interrupted.

    Of several processes that torchrun started, rank 0 prints, and one says what went wrong.
    """
    command: Any = None
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
        command = args.command
        if distributed.launched() > 1 and command not in (commands.compress, commands.recover):
            raise LosaError(f"{args.parser.prog} runs in one process: torchrun is for losa compress and losa recover")
        with heeding_interrupts():
            summary = command(args)
        if args.json:
            print(json.dumps(summary))
        return 0
    except LosaError as error:
        distributed.say_end(" ".join(str(error).split()))
        return 2
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        runs = command in (commands.compress, commands.recover, commands.experiment)
        distributed.say_end(
            f"out of memory ({str(error).splitlines()[0]}){LESS if runs else ''}{AGAIN.get(command, '')}"
        )
        return 2
    except KeyboardInterrupt:
        distributed.say_end(f"interrupted{AGAIN.get(command, '')}")
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:  # of a path that someone named; what else the system refuses is losa's to mend
        if error.filename is None or error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            raise
        distributed.say_end(f"{str(error.filename)!r} cannot be used ({error.strerror}): name another path")
        return 2


def _out_of_memory(error: RuntimeError) -> bool:
    """A GPU's, or the machine's, as torch tells it."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


class Parser(argparse.ArgumentParser):
    """Its errors are those of losa: one line."""

    def error(self, message: str) -> NoReturn:
        raise LosaError(f"{message} ({self.prog} --help tells more)")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="losa", description="Make large language models sparse, and good again.")
    from losa import __version__

    parser.add_argument("--version", action="version", version=f"losa {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, doc: str, among: Any = subparsers, long: bool = True) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = among.add_parser(name, help=doc, description=doc, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="end with one line of JSON on standard output")
        if long:
            sub.add_argument("--quiet", action="store_true", help="no progress")
        sub.set_defaults(command=run, parser=sub)
        return sub

    compress = command("compress", commands.compress, "prune a model in steps, recover it, merge, save")
    compress.add_argument("model", metavar="MODEL", help="local folder, name on the hub, or demo (the built-in model)")
    _add_run(compress, "settings")
    _add_settings(compress)

    recover = command("recover", commands.recover, "repair a model that is pruned already, its zeros kept; merge, save")
    recover.add_argument("model", metavar="SPARSE", help="local folder or name on the hub of a model with zeros")
    _add_run(recover, "settings, of which those of recovery count")
    _add_settings(recover, hidden=repair_recipe.PRUNING)

    evaluate = command(
        "evaluate", commands.evaluate, "perplexity, zero-shot tasks, and texts of a model, sparse or dense"
    )
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
    about_tasks = _add_tasks(evaluate)
    about_tasks.add_argument("--batch-size", type=int, default=8, help="answers read at once (default: 8)")
    about_texts = evaluate.add_argument_group("texts side by side")
    about_texts.add_argument("--against", metavar="DENSE", default="", help="the model to compare with")
    about_texts.add_argument("--prompts", metavar="FILE", default="", help="a prompt a line (.txt) or a row")
    about_texts.add_argument("--max-new-tokens", type=int, default=64, help="tokens to write after each (default: 64)")
    for name in ("device", "dtype"):
        evaluate.add_argument(f"--{name}", default="auto", help=commands.settings_by_name()[name].metadata["doc"])

    inspect = command("inspect", commands.inspect, "sparsity by block and linear, ranks, origin of a saved model")
    inspect.add_argument("folder", type=Path, metavar="DIR")

    export = command("export", commands.export, "a saved model packed, or dense again: all but its linears is copied")
    export.add_argument("folder", type=Path, metavar="DIR", help="dense with zeros, by losa or not, or packed")
    export.add_argument("--output", type=Path, required=True, help="new folder")
    for name in ("format", "values"):
        setting = commands.settings_by_name()[name]
        choices = "|".join(get_args(setting.type))
        default = {"required": True} if name == "format" else {"default": setting.default}
        export.add_argument(f"--{name}", metavar=choices, help=setting.metadata["doc"], **default)

    generate = command(
        "generate", commands.generate, "continue a text, printed as it is made; any model, sparse or dense"
    )
    generate.add_argument("model", metavar="MODEL")
    generate.add_argument("--prompt", required=True, help="the text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=200, help="stop after so many (default: 200)")
    generate.add_argument("--temperature", type=float, default=0.0, help="above 0 draws tokens; 0 takes the likeliest")
    generate.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    for name in ("seed", "device", "dtype"):
        field = commands.settings_by_name()[name]
        options: dict[str, Any] = {"type": int} if name == "seed" else {}
        generate.add_argument(f"--{name}", default=field.default, help=field.metadata["doc"], **options)

    bench = subparsers.add_parser("bench", help="speed: of decoding, or of one packed linear", allow_abbrev=False)
    subjects = bench.add_subparsers(required=True, metavar="SUBJECT")
    kernel = command(
        "kernel",
        commands.bench_kernel,
        "time one packed linear beside dense ones and a plain reading",
        subjects,
        long=False,
    )
    kernel.add_argument("--shape", default="11008x4096", help="OUTxIN (default: 11008x4096)")
    kernel.add_argument("--sparsity", type=float, default=0.7, help="share that is pruned (default: 0.7)")
    kernel.add_argument("--values", default="bfloat16", help="bfloat16, float16, float32 or int8 (default: bfloat16)")
    kernel.add_argument("--activations", default="bfloat16", help="bfloat16 or float32 (default: bfloat16)")
    kernel.add_argument("--rows", type=int, default=1, help="tokens at once (default: 1, as in decoding)")
    kernel.add_argument("--rounds", type=int, default=40, help="how often everyone is timed, in turns (default: 40)")
    kernel.add_argument("--threads", type=int, default=0, help="default: what torch takes")
    kernel.add_argument("--kernel", help=f"{', '.join(registry.KERNELS)} (default: LOSA_KERNEL, or the first that can)")
    about = "time how fast a model decodes one text, alone or in turns with another"
    decode = command("decode", commands.bench_decode, about, subjects, long=False)  # bars would cost time
    decode.add_argument("model", metavar="MODEL", help="any model, sparse or dense")
    decode.add_argument("--against", metavar="OTHER", default="", help="another model, as the one it was made from")
    decode.add_argument("--tokens", type=int, default=32, help="decoded one by one in each round (default: 32)")
    decode.add_argument("--rounds", type=int, default=5, help="how often each decodes them, in turns (default: 5)")
    decode.add_argument("--threads", type=int, default=0, help="default: what torch takes")
    decode.add_argument("--save", action="store_true", help="put it into MODEL's losa.json, for `losa report`")
    for name in ("device", "dtype"):
        decode.add_argument(f"--{name}", default="auto", help=commands.settings_by_name()[name].metadata["doc"])

    about = "what one run did, or several compared, as a page with pictures"
    report = command("report", commands.report, about, long=False)
    report.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="output of a run, finished or not")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page (default: report.html in the first DIR)")

    about = "the paper's tables on a model of yours: which cells there are, what is kept of them, and whether its claims hold"
    experiment = command("experiment", commands.experiment, about)
    experiment.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join([*tables.TABLES, tables.ALL])}")
    experiment.add_argument(
        "--model", action="append", required=True, help="local folder, name on the hub, or demo; repeatable"
    )
    experiment.add_argument("--output", type=Path, help="folder in which every cell is kept; what is there is not run")
    experiment.add_argument(
        "--recipe",
        help="settings below those of the tables, as compress takes them (default: paper with --learning-rate auto; of demo: demo)",
    )
    experiment.add_argument("--seeds", type=int, default=1, help="how many seeds, from --seed on (default: 1)")
    experiment.add_argument("--part", default="1/1", metavar="I/N", help="run every N-th cell only, from the I-th")
    experiment.add_argument("--cached", action="store_true", help="make the tables of what is there; run nothing")
    experiment.add_argument("--dry-run", action="store_true", help="say which cells are there and which would be run")
    experiment.add_argument(
        "--markdown", type=Path, metavar="FILE",
        help="put each table into FILE, between <!-- experiment NAME --> and <!-- end -->; a new file has them all",
    )  # fmt: skip
    _add_tasks(
        experiment, "of the experiment zero-shot, which needs the extra eval; default: paper, of demo demo-next-line"
    )
    _add_settings(experiment)

    demo = command("demo", commands.demo, "the whole method on the built-in model, without any download")
    demo.add_argument("--output", type=Path, default=Path("losa-demo"), help="new folder (default: losa-demo)")
    demo.add_argument("--resume", action="store_true", help="go on with the demo in --output")
    demo.add_argument("--overwrite", action="store_true", help="replace the demo in --output")
    demo.add_argument("--sparsity", type=float, help=commands.settings_by_name()["sparsity"].metadata["doc"])
    return parser


def _add_tasks(parser: argparse.ArgumentParser, about: str = "") -> Any:
    group = parser.add_argument_group("zero-shot tasks, through lm-evaluation-harness", about)
    group.add_argument(
        "--tasks", metavar="NAME,NAME", default="",
        help="hellaswag, winogrande, boolq, openbookqa, piqa, arc_easy, arc_challenge; paper (these seven); demo-next-line; "
        "or a definition of the harness (FILE.yaml)",
    )  # fmt: skip
    group.add_argument(
        "--task-data", metavar="NAME=PATH", action="append", default=[],
        help="rows of a task: a file, or a folder with them, as the hub or their authors publish them (default: the hub)",
    )  # fmt: skip
    group.add_argument("--limit", type=int, default=0, help="ask only so many questions a task (default: all)")
    return group


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


def _add_settings(parser: argparse.ArgumentParser, hidden: Sequence[str] = ()) -> None:
    """A flag a setting. `hidden`: not in the help, but known, so that the error can say why it means nothing here."""
    group = parser.add_argument_group("settings")
    for name, field in commands.settings_by_name().items():
        kinds = [part for part in get_args(field.type) if part is not NoneType]
        optional = len(kinds) < len(get_args(field.type))
        kind = kinds[0] if optional else get_origin(field.type) or field.type
        default = recipe.default_of(field)
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
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not JSON: {error}") from None
