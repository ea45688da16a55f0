"""losa experiment zero-shot: what the cells' models are asked, and where the answers are kept and shown."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Killed, for_cells
from test_cli import flags, refused
from test_experiments import told

from losa import model, pipeline
from losa.cli import main
from losa.errors import LosaError
from losa.experiments import cells, command, show, tables
from losa.experiments.cells import Cell, Cells, gather
from losa.experiments.questions import Questions
from losa.experiments.tables import TABLES
from losa.recipe import Recipe
from losa.tasks import harness

Settings = dict[str, Any]


@pytest.fixture
def tiny(settings: Settings) -> Settings:
    return for_cells(settings)


@pytest.fixture
def piqa(tmp_path: Path) -> Path:
    rows = [{"goal": f"number {i}", "sol1": "one" * i, "sol2": "two", "label": i % 2} for i in range(1, 6)]
    path = tmp_path / "piqa.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def asked(llama: Path, tiny: Settings, piqa: Path, names: str = "main zero-shot", limit: int = 4) -> list[Cell]:
    questions = Questions(str(llama), "piqa", {"piqa": str(piqa)}, limit)
    return gather(str(llama), tables.chosen(names.split()), None, tiny, 1, questions)


def at(made: list[Cell], *place: str) -> Cell:
    return next(cell for cell in made if ("zero-shot", place) in cell.places)


def answers(source: Path, piqa: Path, limit: int = 4) -> dict[str, Any]:
    whole = model.load_whole(str(source), Recipe(device="cpu", dtype="float32"))
    tokenizer = model.load_tokenizer(str(source), whole.config)
    found: dict[str, Any] = harness.zero_shot(whole, tokenizer, ["piqa"], {"piqa": str(piqa)}, limit)["tasks"]
    return found


@pytest.mark.parametrize("row", ["dense", "Wanda", "Wanda w. LoRA"])
def test_what_a_cell_makes_is_asked(
    row: str, llama: Path, out: Path, tiny: Settings, piqa: Path, tmp_path: Path
) -> None:
    """And the main table shows the same run."""
    made, kept, quiet = asked(llama, tiny, piqa), Cells(out), cells.Progress(quiet=True)
    cell = at(made, row, "70%")
    assert kept.state(cell) == cells.TO_RUN and kept.run(cell, quiet) and kept.state(cell) == cells.THERE
    assert not kept.run(cell, quiet) and not list((out / "runs").glob("*"))
    assert cell.recipe
    source = llama
    if row != "dense":
        source = tmp_path / "again"
        pipeline.compress(str(llama), cell.recipe, source)
        assert ("main", (row, "70%")) in cell.places
    found = kept.read(cell)
    assert found and found["measured"]["tasks"] == answers(source, piqa)
    assert found["measured"]["tasks"]["piqa"]["rows"] == 4
    grids = show.collect(tables.chosen(["zero-shot", "main"]), made, {cell.key: found})
    accuracy = found["measured"]["accuracy"]
    assert next(r for r in grids[0].rows if r[0] == row)[3] == f"{accuracy:.3f}"
    assert "Questions: piqa 4; standard error 0." in grids[0].caption
    assert [e["mean"] for e in grids[0].entries if e["measure"] == "piqa"][:1] == [accuracy]
    assert len(grids[1].entries) == (row != "dense")


def test_one_question_has_no_error(llama: Path, out: Path, tiny: Settings, piqa: Path) -> None:
    """The harness says N/A then; with more questions it is shown again."""
    made, kept = asked(llama, tiny, piqa, "zero-shot", limit=1), Cells(out)
    dense = at(made, "dense", "50%")
    assert kept.run(dense, cells.Progress(quiet=True))
    (grid,) = show.collect(tables.chosen(["zero-shot"]), made, {dense.key: kept.read(dense) or {}})
    assert grid.caption.endswith("Questions: piqa 1.") and grid.rows[0][1] in ("0.000", "1.000")


def test_dense_has_no_seed_and_no_recipe(llama: Path, tiny: Settings) -> None:
    made = gather(str(llama), tables.chosen(["zero-shot"]), None, tiny, 3)
    other = gather(str(llama), tables.chosen(["zero-shot"]), None, tiny | {"pattern": "2:4", "seed": 7}, 1)
    (dense,) = (cell for cell in made if cell.kind == "dense")
    assert [place for _, place in dense.places] == [("dense", column) for column in ("50%", "60%", "70%")]
    assert dense.key == at(other, "dense", "60%").key and dense.name == "zero-shot: dense"


def test_what_was_measured_stays_when_it_is_asked_later(
    llama: Path, out: Path, tiny: Settings, piqa: Path, monkeypatch: Any
) -> None:
    """Other questions too, each beside what is there; a model that is still there is not made again."""
    kept, quiet = Cells(out), cells.Progress(quiet=True)
    (plain,) = (c for c in asked(llama, tiny, piqa, "main") if ("main", ("Wanda", "70%")) in c.places)
    assert kept.run(plain, quiet)
    before = json.loads(kept.path(plain).read_text())
    later = at(asked(llama, tiny, piqa), "Wanda", "70%")
    assert later.key == plain.key and kept.state(plain) == cells.THERE and kept.state(later) == cells.TO_RUN
    ask = Questions.ask

    def killed(*_: Any) -> Any:
        raise Killed

    monkeypatch.setattr(Questions, "ask", killed)
    with pytest.raises(Killed):
        kept.run(later, quiet)
    monkeypatch.setattr(Questions, "ask", ask)
    monkeypatch.setattr(pipeline, "compress", None)  # whoever calls it fails: the run is there
    assert kept.run(later, quiet) and not list((out / "runs").glob("*"))
    after = json.loads(kept.path(plain).read_text())
    assert len(after.pop("answers")) == 1 and after == before


def test_answers_are_known_by_what_is_asked(llama: Path, piqa: Path, tmp_path: Path) -> None:
    def key(tasks: str, limit: int = 0, given: Path | None = piqa) -> str:
        return Questions(str(llama), tasks, {"piqa": str(given)} if given else {}, limit).key

    assert key("piqa") == Questions("another", "piqa", {"piqa": str(piqa)}).key
    keys = [key("piqa"), key("piqa", 4), key("piqa,boolq"), key("piqa", given=None), Questions(str(llama)).key]
    piqa.with_name("piqa-labels.lst").write_text("0 0 0 0 0")
    piqa.write_text(piqa.read_text().replace('"label"', '"was"'))
    keys.append(key("piqa"))
    definition = tmp_path / "mine.yaml"
    definition.write_text("task: mine")
    keys.append(key(str(definition), given=None))
    definition.write_text("task: mine  # changed")
    assert len({*keys, key(str(definition), given=None)}) == 8


def test_zero_shot_claims_want_more(llama: Path, tiny: Settings) -> None:
    table = TABLES["zero-shot"]
    made = gather(str(llama), [table], None, tiny, 1)

    def result(cell: Cell) -> dict[str, Any]:
        right = 0.6 if cell.recipe and cell.kind == "compress" and cell.recipe.recovery == "losa" else 0.5
        boolq = {"rows": 1200, "cut": 2, "acc": right, "acc_stderr": 0.012}
        return {"measured": {"accuracy": right, "dense": 9.0, "tasks": {"boolq": boolq}}}

    (grid,) = show.collect([table], made, {cell.key: result(cell) for cell in made})
    assert [verdict for _, verdict in grid.verdicts] == ["holds, 6 of 6; one seed"] * 2
    assert grid.rows[0][0] == "dense" and grid.rows[3] == ["SparseGPT w. LoSA", "0.600", "0.600", "0.600"]
    assert grid.caption.endswith("Questions: boolq 1,200; standard error 0.012 at most; 2 cut at the front.")
    assert not grid.caption.startswith("Dense")
    assert show.picture([grid]) is not None


def out_of_reach(*_: Any) -> Any:
    raise LosaError("task 'piqa' cannot be read: check the network")


def test_tasks_that_are_out_of_reach(
    llama: Path, out: Path, tiny: Settings, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything runs; other tables run all the same."""
    monkeypatch.setattr(harness, "prepare", out_of_reach)
    arguments = ["--model", llama, "--output", out, "--tasks", "piqa", *flags(tiny)]
    assert "check the network" in refused(capsys, "experiment", "zero-shot", *arguments) and not out.exists()
    assert main(["experiment", "zero-shot", "main", *map(str, arguments), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "18 cells to run" in shown.out and "zero-shot: dense: cannot be: task 'piqa' cannot be read" in shown.out
    assert shown.err.count("zero-shot: task 'piqa' cannot be read: check the network") == 1


def test_answers_are_shown_whatever_can_be_asked_now(
    llama: Path, out: Path, tiny: Settings, piqa: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made, kept = asked(llama, tiny, piqa, "zero-shot", 0), Cells(out)
    dense = at(made, "dense", "50%")
    assert kept.run(dense, cells.Progress(quiet=True))
    monkeypatch.setattr(harness, "prepare", out_of_reach)
    given = ["--tasks", "piqa", "--task-data", f"piqa={piqa}", *flags(tiny)]
    command = ["experiment", "zero-shot", "--model", str(llama), "--output", str(out), *map(str, given), "--json"]
    accuracy = f"{(kept.read(dense) or {})['measured']['accuracy']:.3f}"
    for more in ([], ["--cached"]):
        assert main([*command, *more]) == 0
        (table,) = told(capsys)["tables"]
        assert table["rows"][0] == ["dense", *[accuracy] * 3] and table["rows"][1] == ["SparseGPT", "", "", ""]
        assert ("cannot be asked: task 'piqa' cannot be read: check the network" in table["notes"]) == (not more)


def test_what_cannot_be_asked(monkeypatch: Any, llama: Path, tiny: Settings, out: Path) -> None:
    """A task without an accuracy, and a LoRA kept apart where PEFT is not installed."""
    scored: Any = type("Task", (), {"aggregation": lambda self: {"bleu": None}})
    monkeypatch.setattr(harness, "prepare", lambda *_: {"mine.yaml": scored()})
    assert "'mine.yaml' has no accuracy" in Questions("model", "piqa").refusal
    made = gather(str(llama), tables.chosen(["zero-shot"]), None, tiny, 1)
    monkeypatch.setattr(Questions, "refusal", "")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    command._ask_whether(made, Cells(out), cells.Progress(quiet=True))
    assert {row for cell in made if cell.unasked for _, (row, _) in cell.places} == {
        "SparseGPT w. LoRA",
        "Wanda w. LoRA",
    }
