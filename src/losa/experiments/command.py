"""What `losa experiment` does: find the cells of the tables that are asked for, run those that are not there, show all."""

import dataclasses
import importlib.util
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from losa import registry
from losa.errors import LosaError
from losa.experiments import show, tables
from losa.experiments.cells import THERE, TO_RUN, Cell, Cells, gather
from losa.experiments.questions import Questions
from losa.progress import Progress
from losa.units import duration


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line asks for. part: I/N, every N-th cell from the I-th. cached: run nothing.

    tasks, task_data, limit: what zero-shot cells are asked, as `losa evaluate` takes them.
    """

    names: Sequence[str]
    models: Sequence[str]
    output: Path | None
    recipe: str | None = None  # the paper's with rates of the cells' own, or on the built-in model the demo's
    seeds: int = 1
    part: str = "1/1"
    cached: bool = False
    dry_run: bool = False
    markdown: Path | None = None
    tasks: str = ""
    task_data: dict[str, str] = dataclasses.field(default_factory=dict)
    limit: int = 0

    def __post_init__(self) -> None:
        """Raise LosaError for what cannot be."""
        if self.seeds < 1:
            raise LosaError(f"--seeds is {self.seeds}: must be at least 1")
        self.share()
        if self.output is None:
            raise LosaError("--output is missing: name the folder in which cells are kept")
        if self.dry_run and (self.cached or self.markdown):
            raise LosaError("--dry-run shows what would be run, and no tables: leave --cached and --markdown out")

    def share(self) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise LosaError(f"--part {self.part}: expected I/N with I from 1 to N")
        return int(found[1]), int(found[2])


def experiment(asked: Asked, flags: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Run what is asked for, and write experiments.json, .csv, .md and .html into the output.

    flags: settings of the recipe, for every cell. Returns what is in experiments.json, or with dry_run the cells. A cell that
    fails is among `failed` there, and the others run all the same.
    """
    chosen = tables.chosen(asked.names)
    asks = any(table.kind == "zero-shot" for table in chosen)
    if (asked.tasks or asked.task_data or asked.limit) and not asks:
        raise LosaError("--tasks, --task-data and --limit are for the experiment zero-shot: name it, too")
    assert asked.output is not None
    kept = Cells(asked.output)
    cells: list[Cell] = []
    for source in asked.models:
        base = asked.recipe or ("demo" if source == "demo" else "paper")
        # the paper's rate is for its models, and one for all methods
        below = {"learning_rate": "auto"} if not asked.recipe and base == "paper" else {}
        questions = Questions(source, asked.tasks, asked.task_data, asked.limit)
        with progress.working(f"reading {source}"):  # all of its files, to know what has been made of it
            cells += gather(source, chosen, base, flags, asked.seeds, questions, below)
    if asked.markdown:
        show.check_markdown(asked.markdown, show.names(chosen, asked.models))
    if not asked.cached:
        _ask_whether(cells, kept, progress)
    if asked.dry_run:
        return foretell(kept, cells)
    ran = 0
    if not asked.cached:
        part, parts = asked.share()
        mine = [cell for number, cell in enumerate(cells) if number % parts == part - 1]
        for number, cell in enumerate(mine, 1):
            if kept.state(cell) == TO_RUN:
                progress.say(f"cell {number}/{len(mine)}, {cell.name}")
                try:
                    if kept.run(cell, progress):
                        ran += 1
                    else:
                        progress.say("another process works on it, or has just finished it")
                except LosaError as error:  # of this cell: those after it may do
                    cell.failed = str(error)
                    progress.say(f"failed: {error}")
    found = {cell.key: result for cell in cells if not cell.impossible and (result := kept.read(cell)) is not None}
    states = [kept.state(cell) for cell in cells]
    shown = show.collect(chosen, cells, found)
    summary = {
        "output": str(asked.output),
        "cells": {
            "all": len(cells),
            "ran": ran,
            "there": states.count(THERE),
            "impossible": sum(state not in (THERE, TO_RUN) for state in states),
        },
        "failed": [{"name": c.name, "model": c.source, "key": c.key, "why": c.failed} for c in cells if c.failed],
        "tables": [grid.to_json() for grid in shown],
    }
    show.write(asked.output, shown, summary)
    if importlib.util.find_spec("plotly") is None:
        progress.say("no experiments.html: its pictures need plotly (pip install 'losa[report]')")
    if asked.markdown:
        show.put_markdown(asked.markdown, shown)
    return summary


def _ask_whether(cells: list[Cell], kept: Cells, progress: Progress) -> None:
    """Find out before anything runs which cells cannot be asked what they have not answered yet: of each it becomes `unasked`.

    Raises LosaError if nothing is left that can be.
    """
    for cell in cells:
        if cell.questions and not cell.impossible and kept.unanswered(cell, kept.read(cell)):
            cell.unasked = cell.questions.refusal or _misses_peft(cell)
    if all(kept.state(cell) not in (THERE, TO_RUN) for cell in cells):
        raise LosaError(kept.state(cells[0]))
    for reason in dict.fromkeys(cell.unasked for cell in cells if cell.unasked):
        progress.say(f"zero-shot: {reason}")


def _misses_peft(cell: Cell) -> str:
    """A model with a LoRA beside it is loaded by PEFT."""
    apart = cell.recipe is not None and cell.recipe.trains and not registry.get("recovery", cell.recipe.recovery).merges
    return "a LoRA kept apart needs PEFT: pip install peft" if apart and not importlib.util.find_spec("peft") else ""


def foretell(kept: Cells, cells: list[Cell]) -> dict[str, Any]:
    """Which cells there are, which of them are there, and about how long the others take, from those that are."""
    took: dict[tuple[str, bool], list[float]] = {}
    listed, missing = [], []
    for cell in cells:
        state = kept.state(cell)
        if state == TO_RUN:
            missing.append(cell)
        if not cell.impossible and (result := kept.read(cell)) is not None and result["took"] is not None:
            took.setdefault(_like(cell), []).append(result["took"])
        why = state if state not in (THERE, TO_RUN) else ""
        listed.append({"name": cell.name, "key": cell.key, "there": state == THERE, "impossible": why})
    known = [statistics.mean(took[_like(cell)]) for cell in missing if _like(cell) in took]
    seconds = round(sum(known) * len(missing) / len(known)) if known else None
    return {"cells": listed, "missing": len(missing), "seconds": seconds if missing else 0}


def _like(cell: Cell) -> tuple[str, bool]:
    """Cells that take about as long."""
    return cell.kind, cell.recipe is not None and cell.recipe.recovery != "none"


def say_failed(found: dict[str, Any]) -> str:
    """Which cells failed, in one line; empty if none did."""
    failed = [f"{cell['name']} of {cell['model']} ({cell['why']})" for cell in found.get("failed", [])]
    if not failed:
        return ""
    count = f"{len(failed)} of {found['cells']['all']} cells failed; the same command tries them again"
    return f"{count}: {'; '.join(failed)}"


def say_foretold(found: dict[str, Any]) -> str:
    """The cells, one a line, and the sum."""
    lines = []
    for line in found["cells"]:
        state = f"cannot be: {line['impossible']}" if line["impossible"] else "there" if line["there"] else "to run"
        lines.append(f"{line['key'] or '-':16}  {line['name']}: {state}")
    if found["missing"] and found["seconds"] is None:
        lines.append(f"{found['missing']} cells to run; how long they take is known once the first is there")
    else:
        lines.append(f"{found['missing']} cells to run, about {duration(found['seconds'])}")
    return "\n".join(lines)
