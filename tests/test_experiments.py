"""losa experiment: every table's cells are recipes; cells are run once, kept, resumed and shown."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Killed, for_cells, killed_after
from test_cli import flags, refused

from losa import model, pipeline, speed
from losa.cli import main
from losa.errors import LosaError
from losa.experiments import cells, command, latency, show, tables
from losa.experiments.cells import Cell, Cells, gather
from losa.experiments.tables import TABLES, Claim
from losa.recipe import Recipe
from losa.sparse import decoding

Settings = dict[str, Any]


@pytest.fixture
def tiny(settings: Settings) -> Settings:
    return for_cells(settings)


def run(llama: Path, out: Path, settings: Settings, *names: str) -> Any:
    return main(["experiment", *names, "--model", str(llama), "--output", str(out), *flags(settings)])


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_is_a_recipe(name: str, llama: Path, tiny: Settings) -> None:
    """And its claims are about cells that there are, and what they measure is shown."""
    table = TABLES[name]
    made = gather(str(llama), [table], None, {} if table.kind == "latency" else tiny, 1)
    assert {place for cell in made for _, place in cell.places} == set(table.cells)
    assert all(cell.recipe and not cell.impossible for cell in made)
    assert len({cell.key for cell in made}) == len(made)
    for claim in table.claims:
        assert claim.check or claim.pairs
        assert all(place in table.cells for pair in claim.pairs for place in pair)
    assert all(measure in show.NAMES for measure in table.measures)


def test_what_tables_share_is_one_cell(llama: Path, tiny: Settings) -> None:
    made = gather(str(llama), tables.chosen(["all"]), None, {k: v for k, v in tiny.items()}, 1)
    places = [place for cell in made for place in cell.places]
    assert len(places) == sum(len(table.cells) for table in TABLES.values())
    shared = next(cell for cell in made if ("main", ("Wanda w. LoSA", "70%")) in cell.places)
    also = {("strategies", ("LoSA", "perplexity")), ("steps", ("5", "perplexity")), ("cost", ("Wanda w. LoSA", ""))}
    assert also < set(shared.places)


def test_seeds_come_one_after_the_other(llama: Path, tiny: Settings) -> None:
    made = gather(str(llama), tables.chosen(["rank-by", "schedule"]), None, tiny | {"seed": 5}, 3)
    assert [cell.recipe.seed for cell in made if cell.recipe] == 4 * [5] + 4 * [6] + 4 * [7]


def test_each_cell_finds_its_learning_rate(
    llama: Path, out: Path, tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's 2e-4 for every method is only taken by who names it, or its recipe; the built-in model has its own."""
    del tiny["learning_rate"]
    ran: list[Recipe] = []
    monkeypatch.setattr(Cells, "run", lambda self, cell, progress: ran.append(cell.recipe) or True)

    def rates(source: Path | str, *more: str, flags_: Settings) -> set[float | str]:
        ran.clear()
        given = ["--model", str(source), "--output", str(out), "--quiet", *more, *flags(flags_)]
        assert main(["experiment", "rank-methods", "finetune-first", "latency", *given]) == 0 and len(ran) > 8
        return {made.learning_rate for made in ran if made.format == "dense"}

    assert rates(llama, flags_=tiny) == {"auto"}
    assert rates(llama, flags_=tiny | {"learning_rate": 1e-3}) == {1e-3}
    assert rates(llama, "--recipe", "paper", flags_=tiny) == {2e-4}
    assert rates("demo", flags_={}) == {4e-3}


def test_key_is_of_what_decides(llama: Path, tiny: Settings, text: Path, tmp_path: Path) -> None:
    made = Recipe(**tiny)
    about = cells.fingerprint(str(llama))
    key = cells.key_of(made, "compress", about)
    assert key == cells.key_of(made.at(device="cuda", memory="8GB"), "compress", about)
    assert key != cells.key_of(made.at(learning_rate=1e-3), "compress", about)
    assert key != cells.key_of(made, "compress", {"model": "another"})
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text().replace("def", "let", 1))
    moved = made.at(eval_data=str(other))
    assert cells.key_of(moved, "compress", about) != cells.key_of(made.at(eval_data=str(text)), "compress", about)


def test_every_byte_decides(llama: Path, tiny: Settings, tmp_path: Path) -> None:
    """Of large files too, wherever it is, and of a teacher's."""
    folder, page = tmp_path / "model", tmp_path / "page.txt"
    shutil.copytree(llama, folder)
    merges, weights, template = folder / "merges.txt", folder / "more.safetensors", folder / "chat_template.jinja"
    for path in (merges, weights, template, page):
        path.write_bytes(b"a" * 2_000_000)
    made = Recipe(**tiny | {"distill": 0.5, "teacher_model": str(folder), "eval_data": str(page)})

    def keys() -> list[str]:
        about = cells.fingerprint(str(folder))
        return [about["model"], cells.key_of(made, "compress", {}), cells.key_of(made.at(eval_data=""), "compress", {})]

    for path, changes in ((merges, 3), (weights, 3), (template, 3), (page, 1)):
        before = keys()
        with path.open("r+b") as file:
            file.seek(100_000)
            file.write(b"b")
        assert sum(a != b for a, b in zip(before, keys(), strict=True)) == changes, path.name


def test_files_are_read_once(llama: Path, tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    reading = cells._read_into
    monkeypatch.setattr(cells, "_read_into", lambda digest, path: read.append(path) or reading(digest, path))
    taught = tiny | {"distill": 0.5, "teacher_model": str(llama)}
    gather(str(llama), tables.chosen(["rank-by", "schedule"]), None, taught, 2)
    names = [path.name for path in read]
    assert names.count("model.safetensors") == 2  # the model's, and the teacher's
    assert names.count(Path(tiny["eval_data"]).name) == 3  # to calibrate, to train and to evaluate


def test_tables_run_once(
    llama: Path, out: Path, tiny: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Two tables that share a cell; then everything again from what is kept, with nothing run."""
    tiny = tiny | {"steps": 2, "sparsity": 0.5}
    assert run(llama, out, tiny, "rank-by", "schedule", "--json") == 0
    first = told(capsys)
    assert first["cells"] == {"all": 3, "ran": 3, "there": 3, "impossible": 0}
    by = {table["table"]: table for table in first["tables"]}
    (error, sparsity), (cubic, _) = ([float(row[1]) for row in by[n]["rows"]] for n in ("rank-by", "schedule"))
    assert error == cubic and min(error, sparsity) > 1
    assert not list((out / "runs").iterdir()) and not list((out / "cells").glob("*.lock"))

    monkeypatch.setattr(pipeline, "compress", None)  # whoever calls it fails
    page = tmp_path / "results.md"
    page.write_text(
        "# Results\n<!-- experiment rank-by -->\nold\n<!-- end -->\nmiddle\n<!-- experiment schedule --><!-- end -->\n"
    )
    assert run(llama, out, tiny, "rank-by", "schedule", "--cached", "--markdown", str(page)) == 0
    shown = capsys.readouterr().out
    assert f"{error:.2f}" in shown and "3 of 3 cells are there, 0 of them run now" in shown
    text = page.read_text()
    assert (
        text.startswith("# Results\n<!-- experiment rank-by -->\n**") and "\nold\n" not in text and "middle\n" in text
    )
    assert f"| error | {error:.2f} |" in text and "; one seed." in text and text.count("<!-- end -->") == 2
    assert json.loads((out / "experiments.json").read_text())["tables"] == first["tables"]
    lines = list(csv.DictReader((out / "experiments.csv").read_text().splitlines()))
    assert len(lines) == 4 and {line["measure"] for line in lines} == {"perplexity"}
    assert float(lines[0]["mean"]) == pytest.approx(error, abs=5e-3)
    html = (out / "experiments.html").read_text()
    assert html.startswith("<!doctype html>") and html.count("Plotly.newPlot(") == 2

    assert run(llama, out, tiny, "rank-by", "--dry-run", "--seeds", "2") == 0
    shown = capsys.readouterr().out
    assert shown.count(": there") == 2 and shown.count(": to run") == 2 and "2 cells to run, about" in shown


def test_parts_are_all_of_it(
    llama: Path, out: Path, tiny: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(Cells, "run", lambda self, cell, progress: ran.append(cell.key) or True)
    for part in ("1/2", "2/2"):
        assert run(llama, out, tiny, "main", "--part", part, "--quiet") == 0
    assert len(ran) == len(set(ran)) == len(TABLES["main"].cells)
    capsys.readouterr()


def test_killed_and_resumed(llama: Path, out: Path, tiny: Settings, tmp_path: Path, monkeypatch: Any) -> None:
    """A cell goes on where it was killed, and comes to what it would have."""
    cell, other = gather(str(llama), tables.chosen(["rank-by"]), None, tiny | {"steps": 2}, 1)
    whole = Cells(tmp_path / "whole")
    quiet = cells.Progress(quiet=True)
    assert whole.run(cell, quiet)
    kept = Cells(out)
    with killed_after(3):
        kept.run(cell, quiet)
    assert kept.read(cell) is None and (out / "runs" / cell.key / "run" / "recipe.json").is_file()
    resumed = []
    compress = pipeline.compress
    monkeypatch.setattr(pipeline, "compress", lambda *a, **k: resumed.append(k["resume"]) or compress(*a, **k))
    assert kept.run(cell, quiet) and resumed == [True]
    assert not kept.run(cell, quiet)  # it is there
    again, once = kept.read(cell) or {}, whole.read(cell) or {}
    measured, wanted = again["measured"], once["measured"]
    for name in ("perplexity", "dense", "by_block", "ranks", "trained"):
        assert measured[name] == wanted[name]
    spent = ("seconds", "processor", "memory", "rates", "errors", "phases")  # of which a part is not known
    assert [measured[name] for name in spent] == [None] * 6 and None not in [wanted[name] for name in spent]
    assert again["took"] is None and once["took"] > 0
    foretold = command.foretell(kept, [cell, other])
    assert foretold["missing"] == 1 and foretold["seconds"] is None


def test_tables_bear_what_is_not_known(llama: Path, tiny: Settings) -> None:
    """Of cells that were killed and resumed."""
    table = TABLES["cost"]
    made = gather(str(llama), [table], None, tiny, 1)
    none = dict.fromkeys(["seconds", "processor", "memory", "rates", "errors", "phases"])
    kept = {"measured": {"trained": 5, "parameters": 7000, "dense": 9.0} | none, "recipe": {"allocator": "rmi"}}
    grids = show.collect([table], made, dict.fromkeys([c.key for c in made], kept))
    grids.append(show._by_size([str(llama)], made, dict.fromkeys([c.key for c in made], kept)))
    assert grids[0].rows[0] == ["SparseGPT", "5", "", "", "", "", ""]
    assert grids[0].verdicts[1][1] == "nothing has been measured yet"
    assert grids[1].rows == [[str(llama), "7,000", "", ""]] and show.picture(grids)


def test_a_cell_belongs_to_one_process(llama: Path, out: Path, tiny: Settings, monkeypatch: Any) -> None:
    (cell,) = gather(str(llama), tables.chosen(["rank-by"]), None, tiny, 1)[:1]
    first, quiet = Cells(out), cells.Progress(quiet=True)

    def at_the_same_time(*_: Any, **__: Any) -> Any:
        assert not Cells(out).run(cell, quiet)
        raise Killed

    monkeypatch.setattr(pipeline, "compress", at_the_same_time)
    with pytest.raises(Killed):
        first.run(cell, quiet)


def test_another_default_is_another_result(llama: Path, out: Path, tiny: Settings) -> None:
    (cell,) = gather(str(llama), tables.chosen(["rank-by"]), None, tiny, 1)[:1]
    assert cell.recipe
    path = Cells(out).path(cell)
    path.parent.mkdir(parents=True)
    recipe = cell.recipe.to_json()
    path.write_text(
        json.dumps({"recipe": recipe | {"gone": 1, "device": "cuda"}, "measured": {"perplexity": 2.0}, "took": 1})
    )
    assert Cells(out).read(cell) is not None
    path.write_text(json.dumps({"recipe": recipe | {"clip": 9.0}, "measured": {"perplexity": 2.0}}))
    assert Cells(out).read(cell) is None
    path.write_text(json.dumps({"recipe": recipe, "measured": {}}))
    assert Cells(out).read(cell) is None
    path.write_text(json.dumps({"recipe": recipe}))
    with pytest.raises(LosaError, match="is damaged: remove it"):
        Cells(out).read(cell)
    path.write_text("{")
    with pytest.raises(LosaError, match="is damaged: remove it"):
        Cells(out).read(cell)


def test_a_cell_that_fails_ends_no_other(
    llama: Path, out: Path, tiny: Settings, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tables are written, with the reason; the same command tries it again."""
    tiny = tiny | {"steps": 2, "sparsity": 0.5}
    compress = pipeline.compress

    def failing(source: str, made: Recipe, *rest: Any, **named: Any) -> Any:
        if made.rank_by == "error":
            raise LosaError("step 2: the loss is nan")
        return compress(source, made, *rest, **named)

    monkeypatch.setattr(pipeline, "compress", failing)
    arguments = ["rank-by", "schedule", "--json"]
    assert run(llama, out, tiny, *arguments) == 2
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["cells"] == {"all": 3, "ran": 1, "there": 1, "impossible": 0}
    assert found["tables"][0]["notes"] == ["error, perplexity: failed, step 2: the loss is nan"]
    assert [row[1] == "" for row in found["tables"][0]["rows"]] == [True, False]
    assert found == json.loads((out / "experiments.json").read_text())
    where = f"rank-by: error, seed 0 of {llama} (step 2: the loss is nan); schedule: linear, seed 0 of {llama} (step"
    assert shown.err.startswith("losa: 2 of 3 cells failed; the same command tries them again: " + where)
    assert shown.err.count("\n") == 1 and "failed, step 2" in (out / "experiments.md").read_text()
    assert run(llama, out, tiny, "rank-by") == 2
    shown = capsys.readouterr()
    assert "What decides the ranks" in shown.out and "failed: step 2: the loss is nan" in shown.err
    monkeypatch.setattr(pipeline, "compress", compress)
    assert run(llama, out, tiny, *arguments) == 0 and told(capsys)["failed"] == []


# ------------------------------------------------------------------------------------------------------- what is said


def filled(cells_: list[Cell], perplexity: Any) -> dict[str, Any]:
    """Results as if they had been run."""
    return {
        cell.key: {"measured": {"perplexity": perplexity(cell), "dense": 9.0, "by_block": [0.4, 0.6, 0.3]}}
        for cell in cells_
        if cell.key
    }


def test_means_deviations_and_verdicts(llama: Path, tiny: Settings) -> None:
    table = TABLES["rank-by"]
    made = gather(str(llama), [table], None, tiny, 3)

    def perplexity(cell: Cell) -> float:
        assert cell.recipe
        return 10.0 + cell.recipe.seed + (0.5 if cell.recipe.rank_by == "sparsity" else 0.0)

    (grid,) = show.collect([table], made, filled(made, perplexity))
    assert grid.rows == [["error", "11.00 ± 1.00 (3)"], ["sparsity", "11.50 ± 1.00 (3)"]]
    assert grid.caption.startswith("Dense 9.00, sparsity 0.7, pruner wanda")
    assert grid.verdicts[0][1] == "holds, 1 of 1; 1 of 1 differences within the noise"
    (grid,) = show.collect([table], made, filled(made, lambda cell: 20 - perplexity(cell) / 100))
    assert grid.verdicts[0][1].startswith("does not hold, 0 of 1 (not: error 19.89")
    (grid,) = show.collect([table], made, {})
    assert "Nothing of it has been run yet." in grid.markdown() and "- The paper: Ranks by error" in grid.markdown()


def test_verdict_says_how_much_has_been_measured() -> None:
    places = [("a", "x"), ("b", "x"), ("a", "y"), ("b", "y")]
    claim = Claim("", ((places[0], places[1]), (places[2], places[3])))
    assert show._verdict(claim, {}) == "nothing has been measured yet"
    assert show._verdict(claim, {places[0]: [1.0], places[1]: [2.0]}) == "holds, 1 of 1 measured so far, of 2; one seed"
    values = dict(zip(places, [[1.0, 1.1], [2.0, 2.1], [1.0, 1.1], [0.5, 0.6]], strict=True))
    assert show._verdict(claim, values) == "holds in part, 1 of 2 (not: a y 1.05, b y 0.55); beyond the noise".replace(
        "1.05", "1.05 ± 0.07 (2)"
    ).replace("0.55)", "0.55 ± 0.07 (2))")


def test_rates_by_block_and_their_claim(llama: Path, tiny: Settings) -> None:
    table = TABLES["layer-rates"]
    made = gather(str(llama), [table], None, tiny, 2)
    (grid,) = show.collect([table], made, filled(made, lambda _: 10.0))
    assert grid.rows == [["0", *["40.0%"] * 3], ["1", *["60.0%"] * 3], ["2", *["30.0%"] * 3]]
    assert grid.verdicts[0][1] == "holds at 50%, holds at 60%, holds at 70%"


def test_a_best_number_of_steps(llama: Path, tiny: Settings) -> None:
    table = TABLES["steps"]
    made = gather(str(llama), [table], None, tiny, 1)

    def verdict(of: Any) -> str:
        (grid,) = show.collect([table], made, filled(made, of))
        return grid.verdicts[0][1]

    lowest = "lowest at number of steps 3 (10.00; 12.00 at 1, 17.00 at 10)"
    assert verdict(lambda cell: 10 + abs(cell.recipe.steps - 3)) == f"one seed does not tell: {lowest}"
    made += gather(str(llama), [table], None, tiny | {"seed": 1}, 1)
    assert verdict(lambda cell: 10 + abs(cell.recipe.steps - 3)) == f"holds: {lowest}; beyond the noise"
    found = verdict(lambda cell: 10 + abs(cell.recipe.steps - 3) / 2 + cell.recipe.seed)
    assert found.startswith("holds: lowest") and found.endswith("; 1 of 2 differences within the noise")
    found = verdict(lambda cell: 10 + cell.recipe.steps)
    assert found == "does not hold: lowest at number of steps 1 (11.00; 11.00 at 1, 20.00 at 10); beyond the noise"


def test_what_is_no_folder_of_cells_stays(
    llama: Path, tiny: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiments.csv").write_text("somebody's")
    rest = ["--model", llama, "--output", tmp_path, *flags(tiny)]
    assert "exists and holds no cells of losa: name another folder" in refused(capsys, "experiment", "steps", *rest)
    assert (tmp_path / "experiments.csv").read_text() == "somebody's"


def test_without_plotly_the_picture_is_missed_aloud(
    llama: Path, out: Path, tiny: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert main(["experiment", "cost", "--model", str(llama), "--output", str(out), "--cached", *flags(tiny)]) == 0
    assert "its pictures need plotly (pip install 'losa[report]')" in capsys.readouterr().err


def test_sizes_of_several_models(llama: Path, tiny: Settings) -> None:
    table = TABLES["cost"]
    made = gather(str(llama), [table], None, tiny, 1)
    for cell in list(made):
        made.append(Cell(cell.key + "x", cell.kind, "another", cell.recipe, cell.places))
    measured = {"trained": 5, "seconds": 3.0, "processor": 2.0, "memory": 10**9, "rates": 1.5, "errors": 0.5}
    kept = {"measured": measured | {"parameters": 7000, "dense": 9.0}, "recipe": {"allocator": "rmi"}}
    found = {c.key: kept for c in made}
    grids = show.collect([table], made, found)
    assert [grid.table for grid in grids] == ["cost", "cost", "cost by size"]
    assert grids[2].rows == [[str(llama), "7,000", "1.50 s", "0.50 s"], ["another", "7,000", "1.50 s", "0.50 s"]]
    assert grids[0].rows[0] == ["SparseGPT", "5", "3.0 s", "2.0 s", "1 GB", "1.50 s", "0.50 s"]


def test_a_picture_has_one_unit(llama: Path, tiny: Settings) -> None:
    """Seconds and bytes on one axis say nothing."""
    table = TABLES["cost"]
    made = gather(str(llama), [table], None, tiny, 1)
    measured = {"trained": 5, "seconds": 3.0, "processor": 2.0, "memory": 10**9, "rates": 1.5, "errors": 0.5}
    kept = {"measured": measured | {"parameters": 7000, "dense": 9.0}, "recipe": {"allocator": "rmi"}}
    grids = show.collect([table], made, dict.fromkeys([cell.key for cell in made], kept))
    drawn = [
        (unit, {y for line in show._lines(grid, kinds).values() for _, y, _ in line})
        for grid, unit, kinds in show._drawn(grids)
    ]
    assert drawn == [("values trained", {5}), ("seconds", {3.0, 2.0, 1.5, 0.5}), ("bytes", {10**9})]
    page = show.picture(grids)
    assert page and page.count("Plotly.newPlot(") == 3 and page.count("<h2>") == 1
    assert all(f'"title":{{"text":"{unit}"}}' in page for unit, _ in drawn)


def test_what_is_trained_is_counted(llama: Path, tiny: Settings) -> None:
    shapes = [
        tuple(w.shape)
        for n, w in model.load(str(llama), Recipe(device="cpu")).named_parameters()
        if "layers.0" in n and w.ndim == 2
    ]
    pairs = sum(map(sum, shapes))
    losa = Recipe(**tiny | {"steps": 2})
    assert cells.trained(str(llama), losa, [1, 2, 4]) == 7 * pairs
    assert cells.trained(str(llama), Recipe(**tiny | {"recovery": "none"}), []) == 0
    kept = Recipe(**tiny | {"recovery": "full", "sparsity": 0.5})
    assert cells.trained(str(llama), kept, []) == pytest.approx(3 * sum(a * b for a, b in shapes), rel=0.6)


def test_latency(llama: Path, out: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What is timed computes what it should; times themselves are not looked at."""
    monkeypatch.setattr(latency, "NEW", 2)
    monkeypatch.setattr(latency, "ROUNDS", 2)
    arguments = ["experiment", "latency", "--model", str(llama), "--output", str(out), "--json", "--device", "cpu"]
    assert main([*arguments, "--dtype", "float32"]) == 0
    (table,) = told(capsys)["tables"]
    assert [row[0] for row in table["rows"]] == ["50%", "60%", "70%"] and all(len(row) == 10 for row in table["rows"])
    assert all(float(cell) > 0 for row in table["rows"] for cell in row[1:])
    kept = [json.loads(path.read_text())["measured"] for path in (out / "cells").glob("*.json")]
    assert sorted(round(cell["kept"], 1) for cell in kept) == [0.3, 0.4, 0.5]
    assert all(cell["linears"] == cell["of"] == 21 and cell["native"] == "" for cell in kept)
    assert "threads 1, float32, median of 2 turns of processor time" in table["of"]


def test_whose_seconds(monkeypatch: Any) -> None:
    """With several threads the processor's time is no time to wait; with one, it is what others do not lengthen."""
    monkeypatch.setattr(speed.time, "process_time", lambda: 1.0)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: 2.0)
    assert speed.now(torch.device("cpu")) == 1.0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert speed.now(torch.device("cpu")) == 2.0


def test_pairs_apart_change_the_output_and_share_the_weights(llama: Path, monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(latency, "_compare", lambda models, prompt: seen.update(models, prompt=prompt) or {})
    latency.measure(
        str(llama), cells._recipe("latency", TABLES["latency"], {"sparsity": 0.5}, None, {"device": "cpu"}, 0)
    )
    with torch.no_grad():
        logits = {who: seen[who](input_ids=seen["prompt"]).logits for who in ("apart", "merged")}
    gap = (logits["apart"] - logits["merged"]).norm() / logits["merged"].norm()
    assert 0 < float(gap) < 0.1
    apart, merged = seen["apart"], seen["merged"]
    name = "model.layers.1.mlp.up_proj"
    assert apart.get_submodule(name).base.weight.data_ptr() == merged.get_submodule(name).weight.data_ptr()
    assert apart.get_submodule(name).a.shape == (8, 32)


def test_runtime_is_the_one_that_is_named(llama: Path, monkeypatch: Any) -> None:
    """By the model's own forward where it says so, natively elsewhere; what was set before is set again."""
    monkeypatch.setenv(decoding.SWITCH, "ordinary")
    monkeypatch.setattr(latency, "NEW", 2)
    monkeypatch.setattr(latency, "ROUNDS", 2)
    natively: list[tuple[Any, int]] = []
    decode = speed.one_by_one

    def counted(whole: Any, prompt: Any, tokens: int) -> float:
        before = getattr(whole.forward, "tokens", 0)
        took = decode(whole, prompt, tokens)
        natively.append((os.environ[decoding.SWITCH], getattr(whole.forward, "tokens", 0) - before))
        return took

    monkeypatch.setattr(speed, "one_by_one", counted)
    latency.measure(
        str(llama), cells._recipe("latency", TABLES["latency"], {"sparsity": 0.5}, None, {"device": "cpu"}, 0)
    )
    assert natively.count(("ordinary", 0)) == 9 and natively.count(("native", 2)) == 6 and len(natively) == 15
    assert os.environ[decoding.SWITCH] == "ordinary"


def test_nothing_wrong_is_timed(llama: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(latency, "AGREE", 0.0)
    made = cells._recipe("latency", TABLES["latency"], {"sparsity": 0.5}, None, {"device": "cpu"}, 0)
    with pytest.raises(LosaError, match=r"disagrees with its dense form.*Nothing is timed"):
        latency.measure(str(llama), made)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, what",
    [
        (["mian"], "unknown experiment 'mian': did you mean 'main'?"),
        (["main", "--part", "3/2"], "--part 3/2: expected I/N with I from 1 to N"),
        (["main", "--seeds", "0"], "--seeds is 0"),
        (["main", "--train-samples", "0"], "train_samples is 0: must be above 0"),
        (["rank-by", "--rank-by", "error"], "--rank-by changes no cell of rank-by: leave it out"),
        (["latency", "--clip", "2"], "--clip changes no cell of latency"),
        (["main", "--dry-run", "--cached"], "--dry-run shows what would be run"),
        (["main", "--recipe", "papre"], "did you mean 'paper'?"),
        (["main", "--tasks", "piqa"], "--tasks, --task-data and --limit are for the experiment zero-shot"),
        (["zero-shot", "--tasks", "piqaa"], "unknown task 'piqaa': did you mean 'piqa'?"),
        (["zero-shot", "--limit", "-1"], "--limit is -1: must be at least 0"),
        (["zero-shot", "--tasks", ","], "--tasks ,: names no task"),
    ],
)
def test_bad_input(arguments: list[str], what: str, llama: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "experiment", *arguments, "--model", llama, "--output", out)
    assert what in line and not out.exists()


def test_no_such_model(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "experiment", "main", "--model", "./nowhere", "--output", out, "--recipe", "demo")
    assert "model './nowhere' does not exist" in line and not out.exists()


def test_markdown_without_a_place(llama: Path, out: Path, tiny: Settings, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    arguments = ["--model", llama, "--output", out, "--markdown", page, *flags(tiny)]
    line = refused(capsys, "experiment", "rank-by", *arguments)
    assert "has no place for 'rank-by'" in line and page.read_text() == "nothing here\n" and not out.exists()


def test_what_a_model_cannot_do_is_said(
    llama: Path, out: Path, tiny: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not every cell can be: those that can are shown, the others named with their reason."""
    assert run(llama, out, tiny | {"format": "packed"}, "main", "--cached", "--json") == 0
    found = told(capsys)
    assert found["cells"] == {"all": 18, "ran": 0, "there": 0, "impossible": 6}
    assert len(found["tables"][0]["notes"]) == 6
    assert "Wanda w. LoRA, 70%: cannot be, format packed: recovery 'lora' keeps" in found["tables"][0]["notes"][-1]


def test_results_have_a_place_for_every_table() -> None:
    page = Path(__file__).parents[1] / "docs" / "results.md"
    show.check_markdown(page, list(TABLES))


@pytest.mark.parametrize("name", [name for name, table in TABLES.items() if table.measures == ("perplexity",)])
def test_verdicts_on_the_page_are_of_the_tables_beside_them(name: str) -> None:
    """Of several seeds only whether a claim holds: which differences are noise is not to be had from a page."""
    page = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    part = page.partition(f"<!-- experiment {name} -->")[2].partition(show.END)[0]
    header, _, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in part.splitlines() if line[:1] == "|"]
    cells = {(row[0], c): v for row in rows for c, v in zip(header, row, strict=True) if c}
    # several seeds are twice their mean: with one, a claim about the best of a row is not judged
    means = {cell: [float(v.partition(" ±")[0])] * (1 + ("±" in v)) for cell, v in cells.items()}
    assert means
    if len(means) == len(TABLES[name].cells):
        for claim in TABLES[name].claims:
            verdict, end = show._verdict(claim, means), ".\n"
            if any("±" in v for v in cells.values()):
                verdict, end = verdict.partition(" (not")[0].partition(";")[0], ""
            assert f"- The paper: {claim.text}. Here: {verdict}{end}" in part


def test_interrupted(
    llama: Path, out: Path, tiny: Settings, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "compress", interrupt)
    assert run(llama, out, tiny, "rank-by", "--quiet") == 130
    assert capsys.readouterr().err == "losa: interrupted; the same command goes on\n"


def test_sizes_need_a_place_too(llama: Path, out: Path, tiny: Settings, tmp_path: Path, capsys: Any) -> None:
    """What several models are compared in is never left out in silence."""
    page = tmp_path / "page.md"
    page.write_text("<!-- experiment cost --><!-- end -->")
    both = ["--model", llama, "--model", "demo", "--output", out, "--markdown", page, "--cached"]
    assert "has no place for 'cost by size'" in refused(capsys, "experiment", "cost", *both, *flags(tiny))
