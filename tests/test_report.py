"""The page about a run: true, whole, safe, and drawn in a real browser; also of a run that has not finished."""

import html
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest
import torch
from conftest import changed, killed_after, tiny, tokenizer, two_steps

import losa
from losa import story
from losa.blocks import find_blocks
from losa.cli import main
from losa.data import calibration_tokens
from losa.errors import LosaError
from losa.pictures import pictures
from losa.recipe import Recipe
from losa.report import render, report
from losa.run import is_report

needs_browser = pytest.mark.skipif(chromium.where() is None, reason="no chromium here: apt-get install chromium")
DRAWN = "document.body?.dataset.drawn"


@pytest.fixture(scope="module")
def run(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nobody may change."""
    folder = tmp_path_factory.mktemp("report") / "first"
    losa.compress(str(llama), Recipe(**two_steps(text)), folder)
    return folder


@pytest.fixture(scope="module")
def other(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another, whose names are hostile."""
    folder = tmp_path_factory.mktemp("report") / "<b>bold<script>alert(1)<"
    prompts = ["</script><img src=x onerror=alert(2)>", "def {{ 7 * 7 }}"]
    recipe = Recipe(**two_steps(text) | {"steps": 3, "allocator": "owl", "prompts": prompts, "rank_by": "uniform"})
    losa.compress(str(llama), recipe, folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Browser]:
    with chromium.Browser() as opened:
        yield opened


def figures(page: str) -> dict[str, Any]:
    """What the page gives plotly."""
    start = page.index('id="figures">') + len('id="figures">')
    found: dict[str, Any] = json.loads(page[start : page.index("</script>", start)])
    return found


# ------------------------------------------------------------------------------------------------- what it says


def test_the_pictures_show_what_the_run_did(run: Path) -> None:
    made = json.loads((run / "losa.json").read_text())
    drawn = figures(render([story.read(run)]))
    assert list(drawn) == ["training", "sparsity", "deviation", "rmi", "errors", "ranks", "seconds", "memory"]
    for number, record in enumerate(made["history"]):
        assert drawn["ranks"]["data"][number]["y"] == record["ranks"]
        assert drawn["errors"]["data"][number]["y"] == record["errors"]
        assert drawn["sparsity"]["data"][number]["y"] == pytest.approx([100 * rate for rate in record["sparsity"]])
    losses, smooth, perplexities, *_ = drawn["training"]["data"]
    assert len(losses["y"]) == len(smooth["y"]) == 6 and losses["x"] == [1, 2, 2, 3, 4, 5]  # a gap between steps
    first, second = (record["perplexity"] for record in made["history"])
    dense = made["measurements"]["dense"]["sample_perplexity"]
    walk = [dense, first["pruned"], first["recovered"], second["pruned"], second["recovered"]]
    assert perplexities["y"] == walk and perplexities["x"] == [0, 0, 2, 2, 5]


def test_the_rmi_matrix_is_the_dense_models(run: Path, text: Path) -> None:
    """Equation 6 in float64 from whole forward passes, each sequence's outputs one vector."""
    outputs: list[torch.Tensor] = []
    model = tiny().double()
    for block in find_blocks(model):
        block.module.register_forward_hook(lambda _m, _i, out: outputs.append(out.flatten(1)))
    with torch.no_grad():
        model(input_ids=calibration_tokens(str(text), tokenizer(), 12, 24, 0)[:8])
    centred = [x - x.mean(dim=0) for x in outputs]
    shown = figures(render([story.read(run)]))["rmi"]["data"][0]["z"]
    for i, x in enumerate(centred):
        for j, y in enumerate(centred):
            expected = (x @ x.T * (y @ y.T)).sum() / ((x @ x.T).norm() * (y @ y.T).norm())
            assert shown[i][j] == pytest.approx(expected.item(), abs=2e-6)


def test_every_number_of_a_picture_is_in_its_table(run: Path) -> None:
    for row in pictures([story.read(run)]):
        for picture in row:
            values = {value for line in picture.rows for value in line}
            for trace in picture.figure["data"]:
                if picture.id == "training" and trace.get("line", {}).get("width") == 2.5:
                    continue  # the running mean of what is there
                numbers = trace["x"] if trace.get("orientation") == "h" else trace.get("z", trace.get("y"))
                for value in (v for part in numbers for v in (part if isinstance(part, list | tuple) else [part])):
                    scale = 1e9 if picture.id == "memory" else 1
                    assert not value or any(
                        isinstance(v, int | float) and v == pytest.approx(value * scale) for v in values
                    )


def test_perplexity_on_the_way_is_the_models(run: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    """The last recovered one is the merged model's on the same tokens; without recovery the pruned one is the result's."""
    made = json.loads((run / "losa.json").read_text())
    sparse = made["measurements"]["sparse"]
    assert made["history"][-1]["perplexity"]["recovered"] == pytest.approx(sparse["sample_perplexity"], rel=1e-5)
    assert sparse["sample_perplexity"] != sparse["perplexity"]
    recipe = Recipe(**two_steps(text) | {"recovery": "none", "eval_step_tokens": 500})
    plain = losa.compress(str(llama), recipe, tmp_path / "plain")
    assert list(plain.history[-1]["perplexity"]) == ["pruned"]
    assert plain.history[-1]["perplexity"]["pruned"] == pytest.approx(plain.measurements["sparse"]["perplexity"])
    assert [row.name for row in story.read(tmp_path / "plain").verdict()] == ["dense", "pruned"]


def test_nothing_is_measured_on_the_way_if_not_asked(llama: Path, small: Recipe, tmp_path: Path) -> None:
    losa.compress(str(llama), changed(small, eval_step_tokens=0, sample_tokens=0), tmp_path / "out")
    told = story.read(tmp_path / "out")
    assert told.history[0]["perplexity"] == {"pruned": None, "recovered": None} and told.samples == {}
    assert sum(phase["phase"] == "perplexity" for phase in told.phases) == 2
    page = render([told])
    assert "What the models write" not in page and "perplexity went from" in page
    losa.compress(str(llama), changed(small, eval_data=""), tmp_path / "blind")
    assert "perplexity was not measured" in render([story.read(tmp_path / "blind")])


def test_runs_are_compared(run: Path, other: Path, tmp_path: Path) -> None:
    page = render([story.read(run), story.read(other)])
    ends = {s.name: s.measurements["sparse"]["perplexity"] for s in (story.read(run), story.read(other))}
    best = min(ends, key=lambda name: ends[name])
    assert html.escape(f"{best} ends lowest: perplexity {ends[best]:.2f}") in page
    differing = page.partition("What differs")[2].partition("All settings")[0]
    assert "<td>allocator</td><td>rmi</td><td>owl</td>" in differing and "<td>seed</td>" not in differing
    drawn = figures(page)
    assert [trace["name"] for trace in drawn["errors"]["data"]] == ["first", html.escape(other.name)]
    copy = shutil.copytree(run, tmp_path / "copy")
    made = json.loads((copy / "losa.json").read_text())
    made["measurements"]["dense"]["perplexity"] += 1
    (copy / "losa.json").write_text(json.dumps(made))
    assert "do not compare" in render([story.read(run), story.read(copy)])
    assert page.index('class="verdict"') < page.index("What differs") < page.index('class="pictures"')
    assert page.count("stored like other weights") == 1 and "first: 50% by wanda" in page
    same = render([story.read(run), story.read(shutil.copytree(run, tmp_path / "second" / "first"))])
    assert same.count("50% by wanda") == 1 and "<p>Both: 50% by wanda" in same
    assert str(run) in same and str(tmp_path / "second" / "first") in same  # told apart by their places


def test_the_learning_rate_that_was_found_is_told(run: Path) -> None:
    named, found = story.read(run), story.read(run)
    found.recipe["learning_rate"] = "auto"
    assert "<td>learning_rate</td><td>auto</td>" in render([found])  # all settings; nothing is found yet
    found.history[0]["learning_rate"] = found.history[1]["learning_rate"] = 0.008
    page = render([found]).partition("<h2>Recipe")[2]
    assert page.count("<td>learning_rate</td><td>auto: 0.008</td>") == 2 and "rate that was found" in page
    assert "<td>learning_rate</td><td>0.002</td><td>auto: 0.008</td>" in render([named, found])


def test_phases_say_where_the_time_went(run: Path) -> None:
    told = story.read(run)
    names = [(phase["phase"], phase.get("step")) for phase in told.phases]
    steps = [("pruning", 1), ("perplexity", 1), ("recovery", 1), ("perplexity", 1), ("rates", 2), ("pruning", 2)]
    assert [name for name in names if name in steps][:6] == steps
    assert told.seconds == sum(phase["seconds"] for phase in told.phases) > 0
    log = [json.loads(line) for line in (run / "run" / "log.jsonl").read_text().splitlines()]
    assert (told.began, told.ended) == (min(line["time"] for line in log), log[-1]["time"])
    assert all(phase["memory"] > 50e6 for phase in told.phases)


def test_what_recovery_won_is_told_of_the_model_that_was_saved(run: Path, tmp_path: Path) -> None:
    """Which bfloat16 may have rounded: one figure in the sentence and in the table."""
    copy = shutil.copytree(run, tmp_path / "copy")
    made = json.loads((copy / "losa.json").read_text())
    made["measurements"]["dense"]["sample_perplexity"] = 100.0
    made["history"][-1]["perplexity"] = {"pruned": 300.0, "recovered": 150.0}
    made["measurements"]["sparse"]["sample_perplexity"] = 151.0
    (copy / "losa.json").write_text(json.dumps(made))
    assert "stood at 300.00; the recovery that followed brought it to 151.00" in render([story.read(copy)])


def test_decoding_speed_is_shown_if_it_was_measured(run: Path, tmp_path: Path) -> None:
    page = render([story.read(run)])
    assert "decoding" not in page and "so that size and speed are the dense model&#39;s" in page
    copy = shutil.copytree(run, tmp_path / "copy")
    made = json.loads((copy / "losa.json").read_text())
    made["measurements"]["dense"]["tokens_per_second"] = 11.1
    made["measurements"]["sparse"]["tokens_per_second"] = 29.4
    (copy / "losa.json").write_text(json.dumps(made))
    page = render([story.read(copy)])
    assert "11 tokens/s" in page and "29 tokens/s" in page and "so that size is the dense model&#39;s" in page


# ------------------------------------------------------------------------------------------- runs that have not finished


@pytest.mark.parametrize("saves", [1, 2, 3, 6])
def test_a_run_cut_short(saves: int, llama: Path, small: Recipe, tmp_path: Path) -> None:
    """Killed after the dense model, a pruning, a checkpoint, ...: what there is is shown, and how to go on."""
    out = tmp_path / "out"
    with killed_after(saves):
        losa.compress(str(llama), changed(small, checkpoint_minutes=0.0), out)
    with (out / "run" / "log.jsonl").open("a") as log:
        log.write('{"time": 1.0, "event": "upd')
    told = story.read(out)
    assert told.status == "cut short" and len(told.history) == (saves > 1) + (saves > 5) and told.unread == 1
    page = report([out]).read_text()
    assert "was cut short" in page and f"It goes on in {Path.cwd()} with" in page
    assert f"--output {out} --resume" in page
    assert ("ranks" in figures(page)) == ("training" in figures(page)) == (saves > 1)
    assert ("the steps before it have repaired" in page) == (saves > 5)
    assert ("recovery, update 1 of 2" in page) == (saves == 3)
    losa.compress(str(llama), changed(small, checkpoint_minutes=0.0), out, resume=True)
    told = story.read(out)
    assert told.status == "finished" and told.unread == 1
    # what was done twice counts once
    assert [(u["step"], u["update"]) for u in told.updates] == [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]
    assert "1 line of the log was broken" in render([told])


def test_a_run_that_is_going_on(llama: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = []
    tell = losa.pipeline.tell

    def watched(*arguments: Any) -> None:
        tell(*arguments)
        pages.append(report([tmp_path / "out"]).read_text())

    monkeypatch.setattr("losa.pipeline.tell", watched)
    losa.compress(str(llama), small, tmp_path / "out")
    assert len(pages) == 2 and all("This run is going on" in page for page in pages)
    assert [len(figures(page)["ranks"]["data"]) for page in pages] == [1, 2]
    assert "recovered, step 1" in pages[0]
    assert story.read(tmp_path / "out").status == "finished"


def test_a_model_without_its_log(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
    page = report([copy]).read_text()
    assert "run/log.jsonl) is not there" in page and "ranks" in figures(page)


# ----------------------------------------------------------------------------------------------------- bad input


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("losa: ")
    return err


def test_a_folder_that_is_no_run(run: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no folder" in refused(capsys, tmp_path / "nowhere")
    assert "is no run of losa: name the output of losa compress" in refused(capsys, llama)
    assert f"it holds runs, name these: {run}" in refused(capsys, run.parent)
    assert "is no run of losa" in refused(capsys, run, llama)  # one of several
    assert not (llama / "report.html").exists() and not (run.parent / "report.html").exists()


@pytest.mark.parametrize("name", ["losa.json", "run/recipe.json"])
def test_a_run_of_another_format(name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    if name != "losa.json":
        (copy / "losa.json").unlink()
    told = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(told | {"format": 99}))
    assert "is of format 99, this losa reads 1" in refused(capsys, copy)
    (copy / name).write_text("{")
    assert "is damaged" in refused(capsys, copy)
    assert not (copy / "report.html").exists()


def test_a_run_of_another_version_is_shown_with_it(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    made = json.loads((copy / "losa.json").read_text())
    made["versions"]["losa"] = "9.9.9"
    made["recipe"]["a_setting_of_later"] = [1]
    (copy / "losa.json").write_text(json.dumps(made))
    page = render([story.read(copy)])
    assert "9.9.9" in page and "a_setting_of_later" in page


def test_something_else_is_not_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "thesis.html"
    mine.write_text("<!doctype html>years of work")
    assert "no report of losa: --output names another file" in refused(capsys, run, "--output", mine)
    assert mine.read_text() == "<!doctype html>years of work"
    (tmp_path / "folder").mkdir()
    assert "no report of losa" in refused(capsys, run, "--output", tmp_path / "folder")
    assert "cannot be written" in refused(capsys, run, "--output", tmp_path / "nowhere" / "page.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "thesis.html"]
    page = report([run], tmp_path / "page.html")
    assert is_report(page) and report([run], page) == page


def test_overwriting_a_run_takes_its_report_and_no_other(llama: Path, small: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    brief = changed(small, steps=1, recovery="none", sample_tokens=0)
    losa.compress(str(llama), brief, out)
    report([out])
    losa.compress(str(llama), brief, out, overwrite=True)
    assert not (out / "report.html").exists()
    (out / "report.html").write_text("mine")
    losa.compress(str(llama), brief, out, overwrite=True)
    assert (out / "report.html").read_text() == "mine"


def test_without_plotly_it_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.graph_objects", None)
    with pytest.raises(LosaError, match=r"pip install plotly"):
        render([story.read(run)])


# --------------------------------------------------------------------------------------------------- in a browser


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--output", str(tmp_path / "p.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(tmp_path / "p.html") and told["bytes"] < 3_000_000
    assert main(["report", str(run), "--output", str(tmp_path / "p.html")]) == 0
    assert "open it in a browser" in capsys.readouterr().out


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_it(
    dark: bool, width: int, run: Path, other: Path, tmp_path: Path, browser: chromium.Browser
) -> None:
    for runs in ([run], [run, other]):
        page = report(runs, tmp_path / "page.html")
        browser.said.clear()
        browser.asked.clear()
        browser.look(width, dark)
        browser.open(page, DRAWN)
        assert browser.said == []
        assert all(url.startswith(("file:", "data:", "blob:")) for url in browser.asked)
        assert browser.value("document.body.dataset.drawn") == ("dark" if dark else "light")
        marks = browser.value(
            "Object.fromEntries(Array.from(document.querySelectorAll('.picture'), (div) => [div.dataset.picture,"
            "[div.querySelectorAll('.point, .hm image, .heatmaplayer image').length, div.clientWidth]]))"
        )
        assert set(marks) == set(figures(page.read_text())) and len(marks) >= 7
        assert all(count > 0 and wide > 200 for count, wide in marks.values()), marks
        assert browser.value("document.documentElement.scrollWidth") <= width
        table = "document.querySelector('.verdict').parentElement"
        assert browser.value(f"{table}.scrollWidth <= {table}.clientWidth")
        sizes = browser.value(
            "[...document.querySelectorAll('.legendtext, .legendtitletext')].map((text) => getComputedStyle(text).fontSize)"
        )
        assert len(set(sizes)) == 1, sizes
        background = browser.value("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(", "))) < 200) == dark


@needs_browser
def test_what_a_run_is_called_is_text(run: Path, other: Path, tmp_path: Path, browser: chromium.Browser) -> None:
    browser.said.clear()
    browser.look(1280, False)
    for runs in ([other], [run, other]):
        browser.open(report(runs, tmp_path / "page.html"), DRAWN)
        assert browser.value("document.querySelectorAll('img, b').length") == 0
        shown = browser.value("document.body.innerText")
        assert "</script><img src=x onerror=alert(2)>" in shown and "def {{ 7 * 7 }}" in shown
    assert "<b>bold<script>alert(1)<" in browser.value("document.querySelector('.verdict').innerText")
    assert "<b>bold<script>alert(1)<" in browser.value("document.querySelector('#ranks .legend').textContent")
    assert browser.said == []


@needs_browser
def test_numbers_are_copied_as_csv(run: Path, tmp_path: Path, browser: chromium.Browser) -> None:
    browser.open(report([run], tmp_path / "page.html"), DRAWN)
    text = browser.value("csv(document.querySelector('#ranks table'))")
    made = json.loads((run / "losa.json").read_text())
    expected = [
        f"{record['step']},{block},{rank}" for record in made["history"] for block, rank in enumerate(record["ranks"])
    ]
    assert text.splitlines() == ["step,block,rank", *expected]
    browser.value("""document.querySelector('#ranks table').rows[1].cells[0].textContent = 'a, "b"'""")
    assert browser.value("csv(document.querySelector('#ranks table'))").splitlines()[1].startswith('"a, ""b""",0,')


@needs_browser
def test_a_picture_can_be_zoomed(run: Path, tmp_path: Path, browser: chromium.Browser) -> None:
    browser.look(1280, False)
    browser.open(report([run], tmp_path / "page.html"), DRAWN)
    place = browser.value(
        "(() => { const e = document.querySelector('#ranks .nsewdrag'); e.scrollIntoView({block: 'center'});"
        "const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; })()"
    )
    x, y, width, height = place
    reach = "document.querySelector('#ranks .picture').layout.xaxis.range"
    before = browser.value(reach)
    for kind, share in (("mousePressed", 0.3), ("mouseMoved", 0.5), ("mouseMoved", 0.7), ("mouseReleased", 0.7)):
        where = {"x": x + share * width, "y": y + share * height}
        browser.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)
    browser.wait(f"{reach}[0] > {before[0]}")
    after = browser.value(reach)
    assert before[0] < after[0] < after[1] < before[1]


@needs_browser
def test_its_colours_follow_the_reader(run: Path, tmp_path: Path, browser: chromium.Browser) -> None:
    browser.look(1280, False)
    browser.open(report([run], tmp_path / "page.html"), "document.body?.dataset.drawn === 'light'")
    color = "document.querySelector('#ranks .picture').data[1].line.color"
    light = browser.value(color)
    browser.look(1280, True)
    browser.wait("document.body.dataset.drawn === 'dark'")
    assert browser.value(color) != light


def test_a_page_says_why_it_has_no_samples(llama: Path, text: Path, run: Path, tmp_path: Path) -> None:
    assert "no samples" not in report([run], tmp_path / "with.html").read_text()
    losa.compress(str(llama), Recipe(**two_steps(text) | {"sample_tokens": 0}), tmp_path / "without")
    assert "no samples of what it writes" in report([tmp_path / "without"]).read_text()
