"""The cells of the tables: each a recipe on a model, run once and kept by what decides its result.

OUTPUT/cells/KEY.json  a finished cell; KEY is a hash of its recipe, the model and its teacher, the texts it reads and losa's
                       version; what it answered to zero-shot tasks is in it, too, by what was asked
OUTPUT/cells/KEY.lock  held while a process works on it; the system frees it however the process ends
OUTPUT/runs/KEY/       its run, until it is finished: what goes on where it was killed
"""

import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from losa import __version__, inputs, model, patterns, pipeline, recipe, registry, sources, story
from losa.blocks import prunable, targeted
from losa.errors import LosaError
from losa.experiments import latency
from losa.experiments.questions import Questions
from losa.experiments.tables import DENSE, Place, Settings, Table
from losa.progress import Progress
from losa.recipe import Recipe, default_of
from losa.run import read_recipe, versions, write_json, writing
from losa.units import dtype_name

# Where a cell runs, and how carefully, does not change what comes out.
ELSEWHERE = ("device", "memory", "checkpoint_minutes")
LATENCY = ("device", "dtype", "seed", "ignore", "targets", "alpha", "base_rank", "values")  # flags that count there
QUIET: Settings = {"sample_tokens": 0, "eval_step_tokens": 0}  # what nobody looks at
FORMAT = 1
THERE, TO_RUN = "there", "to run"  # of a cell
DECIDING = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")  # of a model, tokenizer and chat template too
PIECE = 2**20  # bytes of a file that are read at once


@dataclass
class Cell:
    """A recipe on a model. `places`: where it stands, as (table, place). `impossible`: why it cannot be, if it cannot.

    kind: a run of `losa compress`, the dense model as it is, or a timing of decoding. wanted: whether a table wants what
    the run itself measures. questions: what its model is asked; unasked: why it cannot be here, if it cannot. failed: what
    ended it in this command, if anything did.
    """

    key: str
    kind: str
    source: str
    recipe: Recipe | None
    places: list[tuple[str, Place]] = field(default_factory=list)
    impossible: str = ""
    wanted: bool = False
    questions: Questions | None = None
    unasked: str = ""
    failed: str = ""

    @property
    def name(self) -> str:
        table, (row, column) = self.places[0]
        if self.kind == "dense":
            return f"{table}: {row}"
        where = ", ".join(part for part in (row, column) if part and part != "perplexity")
        return f"{table}: {where}, seed {self.recipe.seed}" if self.recipe else f"{table}: {where}"


def gather(
    source: str,
    tables: Sequence[Table],
    base: str | None,
    flags: Settings,
    seeds: int,
    questions: Questions | None = None,
    below: Settings | None = None,
) -> list[Cell]:
    """The cells of `tables` on the model `source`, each once, one seed of everything first.

    base: the recipe below everything; flags: settings that go on top of it and of the tables' defaults, below what a cell
    is about. questions: for the cells of zero-shot tables, if not the usual ones. below: settings below the flags that a cell
    need not take. Raises LosaError for a flag that no cell takes, and if no cell is possible.
    """
    _check_flags(tables, flags)
    flags = (below or {}) | flags
    about = fingerprint(source)
    questions = questions or Questions(source)
    found: dict[str, Cell] = {}
    refused: list[Cell] = []
    checked: dict[str, str] = {}
    contents = functools.cache(_contents)  # files are read whole: once for all cells
    for seed in range(seeds):
        for table in tables:
            for place, settings in table.cells.items():
                kind = "dense" if place[0] == DENSE else "latency" if table.kind == "latency" else "compress"
                try:
                    made = _recipe(kind, table, settings, base, flags, seed)
                except LosaError as error:
                    refused.append(Cell("", kind, source, None, [(table.name, place)], str(error)))
                    continue
                key = key_of(made, kind, about, contents)
                if key not in found:
                    plain = key_of(made.at(seed=0), kind, about, contents)
                    if plain not in checked:
                        checked[plain] = _why_not(source, made, kind)
                    found[key] = Cell(key, kind, source, made, [], checked[plain])
                cell = found[key]
                if table.kind == "zero-shot":
                    cell.questions = questions
                else:
                    cell.wanted = True
                if (table.name, place) not in cell.places:  # of a cell that has no seed
                    cell.places.append((table.name, place))
    cells = [*found.values(), *refused]
    if all(cell.impossible for cell in cells):
        raise LosaError(cells[0].impossible)
    return cells


def _recipe(kind: str, table: Table, settings: Settings, base: str | None, flags: Settings, seed: int) -> Recipe:
    if kind == "dense":
        return recipe.from_settings({name: flags[name] for name in ("device", "dtype") if name in flags})
    if kind == "latency":
        mine = {name: value for name, value in flags.items() if name in LATENCY}
        fixed = {"pruner": "magnitude", "allocator": "uniform", "recovery": "none", "steps": 1, "format": "packed"}
        return recipe.from_settings(fixed | {"mean_rank": 8.0} | mine | settings)
    given = QUIET | table.default | flags | settings
    if patterns.parse(given.get("pattern", "unstructured")).sparsity is not None:
        given.pop("sparsity", None)
    given["seed"] = flags.get("seed", 0) + seed
    return recipe.load(base, given)


def _check_flags(tables: Sequence[Table], flags: Settings) -> None:
    """Raise LosaError for the first flag that means nothing to all of the tables' cells."""
    for name in flags:
        if all(
            name in settings or (table.kind == "latency" and name not in LATENCY)
            for table in tables
            for (row, _), settings in table.cells.items()
            if row != DENSE
        ):
            names = ", ".join(table.name for table in tables)
            raise LosaError(f"--{name.replace('_', '-')} changes no cell of {names}: leave it out")


def _why_not(source: str, made: Recipe, kind: str) -> str:
    """Why this recipe cannot be on this model; empty if it can."""
    try:
        if kind == "latency":
            latency.check(source, made)
        elif kind == "compress":
            inputs.check(source, made, None)
        return ""
    except LosaError as error:
        return str(error)


# --------------------------------------------------------------------------------------------- what decides a result


def _contents(name: str, source: str) -> str:
    """A hash of what is in what the setting `name` names: a text, or the teacher."""
    return fingerprint(source)["model"] if name == "teacher_model" else _text(source)


def key_of(made: Recipe, kind: str, about: dict[str, str], contents: Callable[[str, str], str] = _contents) -> str:
    """A short hash of what decides the result of a cell."""
    settings = decisive(made.to_json())
    what: dict[str, Any] = {"format": FORMAT, "kind": kind, "losa": __version__, "recipe": settings, **about}
    if kind == "latency":
        what["machine"] = _machine(made)
    elif kind == "compress":
        texts = ("calibration", "train_data", "eval_data")
        what["texts"] = {name: contents(name, getattr(made, name)) for name in texts}
        if made.teacher_model:
            what["teacher"] = contents("teacher_model", made.teacher_model)
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def decisive(settings: Settings) -> Settings:
    """What counts of a recipe's settings: those with another value than the default, so that a new setting of a later
    losa changes no key. A default that has changed is found out by what is kept beside the result (`Cells.read`)."""
    defaults = {f.name: default_of(f) for f in fields(Recipe)}
    return {n: v for n, v in settings.items() if n not in ELSEWHERE and (n not in defaults or v != defaults[n])}


def fingerprint(source: str) -> dict[str, str]:
    """Of a model's folder: a hash of its files and their names. Of a model on the hub, the name."""
    folder = Path(model.locate(source))
    if not folder.is_dir():
        return {"model": source}
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in DECIDING:
            digest.update(path.name.encode())
            _read_into(digest, path)
    return {"model": digest.hexdigest()}


def _text(source: str) -> str:
    """Of a text: a hash of a local file, or the name; the built-in one is the standard library of this Python."""
    if source and sources.place_of(source) == "file":
        digest = hashlib.sha256()
        _read_into(digest, Path(os.path.expanduser(source)))
        return digest.hexdigest()
    return f"{source} of Python {platform.python_version()}" if source.startswith("demo") else source


def _read_into(digest: Any, path: Path) -> None:
    """A file's size, which says where it ends, and all of its bytes."""
    digest.update(f"{path.stat().st_size} ".encode())
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)


def _machine(made: Recipe) -> str:
    from losa.starting import device_of
    from losa.usage import machine

    found = machine(device_of(made))
    return json.dumps({name: found.get(name) for name in ("processor", "threads", "device")})


# ---------------------------------------------------------------------------------------------------- run, and kept


class Cells:
    """The folder in which cells are kept."""

    def __init__(self, output: Path) -> None:
        self.output = output
        if output.exists() and not output.is_dir():
            raise LosaError(f"output {str(output)!r} is a file: name a folder")
        ours = (output / "cells").is_dir() or (output / "experiments.json").is_file()
        if output.is_dir() and any(output.iterdir()) and not ours:
            raise LosaError(f"output {str(output)!r} exists and holds no cells of losa: name another folder")

    def path(self, cell: Cell) -> Path:
        return self.output / "cells" / f"{cell.key}.json"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What is kept of a cell, None if nothing is, or what is was made with another default; what it answered to the cell's
        questions is among what was measured. Raises LosaError for a damaged file."""
        path = self.path(cell)
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            asked = cell.recipe.to_json() if cell.recipe else {}
            same = all(asked.get(n) == v for n, v in found["recipe"].items() if n in asked and n not in ELSEWHERE)
            if not same or not (found["measured"] or cell.kind == "dense"):  # of which nothing but answers is kept
                return None
            if cell.questions:
                found["measured"] |= found.get("answers", {}).get(cell.questions.key, {})
            return found
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LosaError(f"{path} is damaged: remove it, and its cell is run again") from None

    def state(self, cell: Cell) -> str:
        """there, to run, or why it cannot be. What can be measured but not asked, and was, is there."""
        if cell.impossible:
            return cell.impossible
        found = self.read(cell)
        if cell.wanted and found is None:
            return TO_RUN
        if not self.unanswered(cell, found):
            return THERE
        return TO_RUN if not cell.unasked else THERE if cell.wanted else cell.unasked

    @staticmethod
    def unanswered(cell: Cell, found: dict[str, Any] | None) -> bool:
        """Whether there are questions for a cell that what was found of it (`read`) does not answer."""
        return cell.questions is not None and (found is None or "accuracy" not in found["measured"])

    def run(self, cell: Cell, progress: Progress) -> bool:
        """Run what is missing of a cell and keep it, unless another process works on it. Returns whether it did.

        What was measured is kept before the model is asked, and stays as it is if the model has to be made again to be asked.
        """
        with self._claimed(cell) as mine:
            if not mine or self.state(cell) != TO_RUN:
                return False
            assert cell.recipe is not None
            kept, folder = self.read(cell), self._run(cell)
            asks = self.unanswered(cell, kept) and not cell.unasked
            made = cell.kind == "dense" or (folder / "losa.json").is_file()
            if kept is None or (asks and not made):
                began, resume = time.monotonic(), self._may_resume(folder, cell)
                measured = self._measure(cell, resume, progress)
                if kept is None:
                    about = {"format": FORMAT, "losa": __version__, "source": cell.source, "kind": cell.kind}
                    took = None if resume else round(time.monotonic() - began, 1)
                    about |= {"took": took, "recipe": cell.recipe.to_json()}
                    self._keep(cell, about | {"measured": measured})
            if asks:
                self._ask(cell, progress)
            shutil.rmtree(folder, ignore_errors=True)
            return True

    def _ask(self, cell: Cell, progress: Progress) -> None:
        """Put the answers of the cell's model beside what was measured."""
        assert cell.recipe is not None and cell.questions is not None
        asked = cell.source if cell.kind == "dense" else str(self._run(cell))
        answers = {cell.questions.key: cell.questions.ask(asked, cell.recipe, progress)}
        kept = json.loads(self.path(cell).read_text())
        self._keep(cell, kept | {"answers": kept.get("answers", {}) | answers})

    def _keep(self, cell: Cell, kept: dict[str, Any]) -> None:
        with writing(self.output, ""):
            write_json(self.path(cell), kept)

    def _measure(self, cell: Cell, resume: bool, progress: Progress) -> dict[str, Any]:
        if cell.kind == "dense":
            return {}
        assert cell.recipe is not None
        if cell.kind == "latency":
            return latency.measure(cell.source, cell.recipe)
        return self._compress(cell, resume, progress)

    def _run(self, cell: Cell) -> Path:
        return self.output / "runs" / cell.key

    @contextmanager
    def _claimed(self, cell: Cell) -> Iterator[bool]:
        path = self.path(cell).with_suffix(".lock")
        with writing(self.output, ""):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
            path.unlink(missing_ok=True)
        finally:
            os.close(lock)

    def _compress(self, cell: Cell, resume: bool, progress: Progress) -> dict[str, Any]:
        """Run the recipe, from where it was killed if it was, and tell what came out, and what it took if that is known."""
        made, folder = cell.recipe, self._run(cell)
        assert made is not None
        busy = time.process_time()
        result = pipeline.compress(
            cell.source, made, folder, resume=resume, overwrite=not resume and folder.exists(), progress=progress
        )
        busy = time.process_time() - busy
        told = story.read(folder)
        sparse, dense, last = result.measurements["sparse"], result.measurements["dense"], result.history[-1]
        spent: dict[str, list[float]] = {}
        for phase in told.phases:
            spent.setdefault(phase["phase"], []).append(phase["seconds"])
        took = {
            "seconds": round(told.seconds, 1),
            "processor": round(busy, 1),
            "memory": told.peak or None,
            "rates": statistics.mean(spent["rates"]) if "rates" in spent else None,
            "errors": sum(spent["dense features"]) if "dense features" in spent else None,
            "phases": {name: round(sum(values), 3) for name, values in spent.items()},
        }
        return {
            "perplexity": sparse["perplexity"],
            "dense": dense["perplexity"],
            "sparsity": sparse["sparsity"],
            "by_block": last["sparsity"],
            "ranks": last["ranks"],
            "errors_by_block": last["errors"],
            "trained": trained(cell.source, made, last["ranks"]),
            "parameters": parameters(cell.source),
            # of a phase that was killed nobody wrote down what it took
            **(dict.fromkeys(took) if resume else took),
        }

    @staticmethod
    def _may_resume(folder: Path, cell: Cell) -> bool:
        """Whether a run that was killed can go on: as the same, with the same versions."""
        if not (folder / "run" / "recipe.json").is_file():
            return False
        assert cell.recipe is not None
        kept, device = read_recipe(folder), model.choose_device(cell.recipe.device)
        dtype = dtype_name(model.choose_dtype(cell.recipe.dtype, device))
        return bool(
            kept["recipe"] == cell.recipe.to_json()
            and kept["versions"] == versions()
            and kept["source"] == cell.source
            and kept["computed"].get("dtype", dtype) == dtype
        )


def trained(source: str, made: Recipe, ranks: list[int]) -> int:
    """Values that the last step trains: of low-rank pairs those of the ranks it had."""
    if not made.trains:
        return 0
    whole: Any = model.skeleton(model.load_config(source))
    blocks = prunable(whole, made)
    wanted = targeted([name for block in blocks for name in block.linears], made)
    recovery = registry.get("recovery", made.recovery)
    total = 0
    for block in blocks:
        for name, linear in block.linears.items():
            shape = (linear.out_features, linear.in_features)
            if name not in wanted:
                continue
            if ranks:
                total += ranks[block.index] * sum(shape)
            elif recovery.trains:
                total += recovery.parameters(shape, made)
            else:  # only the dense model was fine-tuned
                total += round(made.mean_rank) * sum(shape)
    return total


def parameters(source: str) -> int:
    """Of the whole dense model."""
    whole: Any = model.skeleton(model.load_config(source))
    return sum(parameter.numel() for parameter in whole.parameters())
