"""Pictures of runs as they may come, made by hand: without a log, of one step, all alike."""

from pathlib import Path
from typing import Any

from losa.pictures import Picture, pictures
from losa.story import Story


def told(made: tuple[int, ...] = (2, 3), pruned: int = 2, name: str = "run", **fields: Any) -> Story:
    """A run with so many updates made after every pruning, and so many prunings done."""
    history = [
        {
            "step": step,
            "mean_sparsity": 0.525 if step < pruned else 0.5999908,
            "sparsity": [0.5, 0.55],
            "errors": [0.01 * step, 0.02],
            "ranks": [3, 4],
            "perplexity": {"pruned": 20.0 + step, "recovered": 15.0 + step},
        }
        for step in range(1, pruned + 1)
    ]
    updates = [
        {"step": step, "update": update, "of": count, "loss": 10.0 * step - update}
        for step, count in enumerate(made, 1)
        for update in range(1, count + 1)
    ]
    common: dict[str, Any] = dict(
        folder=Path("run"),
        name=name,
        status="finished",
        source="model",
        command="compress",
        recipe={"steps": max(len(made), pruned), "rank_by": "error", "recovery": "losa"},
        versions={},
        measurements={"dense": {"perplexity": 9.0, "sample_perplexity": 10.0}},
        history=history,
        updates=updates,
    )
    return Story(**common | fields)


def drawn(*stories: Story) -> dict[str, Picture]:
    return {picture.id: picture for row in pictures(list(stories)) for picture in row}


def axes(picture: Picture) -> list[str]:
    """What the axes that have a title are called."""
    layout = picture.figure["layout"]
    return [axis["title"]["text"] for name, axis in sorted(layout.items()) if "axis" in name and "title" in axis]


def test_without_updates_perplexity_is_shown_by_the_step() -> None:
    """An export, or a run without recovery: no loss, and no picture in which all points lie at none."""
    (walk,) = [t for t in drawn(told(()))["training"].figure["data"] if "lines" in t["mode"]]
    assert (list(walk["x"]), list(walk["y"])) == ([0, 1, 1, 2, 2], [10, 21, 16, 22, 17])
    picture = drawn(told(()))["training"]
    assert axes(picture) == ["step", "perplexity"] and picture.title == "Perplexity" and "oss" not in picture.note
    assert picture.columns[1] == "step"
    both = drawn(told(name="whole"), told((), name="export"))["training"]
    assert axes(both) == ["updates of recovery", "step", "loss (nats a token)", "perplexity"]
    assert [list(t["x"]) for t in both.figure["data"] if t.get("yaxis") == "y2" and t["y"] != [None]] == 2 * [
        [0, 1, 1, 2, 2]
    ]


def test_no_panel_where_there_is_nothing_to_show() -> None:
    """A run that began, and one without eval_data."""
    assert "training" not in drawn(told((), 0))
    unmeasured = told(measurements={})
    for record in unmeasured.history:
        record["perplexity"] = {"pruned": None, "recovered": None}
    picture = drawn(unmeasured)["training"]
    assert axes(picture) == ["updates of recovery", "loss (nats a token)"] and picture.title == "Loss"


def test_the_mean_of_losses_ends_with_the_step() -> None:
    """It does not rise before the pruning that makes the loss rise; a step of one update is a point."""
    losses, means = drawn(told((3, 1)))["training"].figure["data"][:2]
    assert list(losses["x"]) == list(means["x"]) == [1, 2, 3, 3, 4]
    assert list(losses["y"]) == [9.0, 8.0, 7.0, None, 19.0] and "markers" in losses["mode"]
    assert list(means["y"]) == [8.5, 8.0, 7.5, None, 19.0]


def test_the_share_pruned_is_the_tables() -> None:
    texts = [note["text"] for note in drawn(told())["training"].figure["layout"]["annotations"]]
    assert texts == ["52.5%", "60%"]


def test_what_was_measured_is_told_by_markers_and_named() -> None:
    for stories in ([told()], [told((1, 1)), told((), name="other")]):
        traces = drawn(*stories)["training"].figure["data"]
        named = {t["name"]: t["marker"]["symbol"] for t in traces if t.get("legend") == "legend2"}
        assert list(named) == ["dense", "pruned", "recovered"] and len(set(named.values())) == 3
        walks = [t for t in traces if t.get("text")]
        assert len(walks) == len(stories)
        for walk in walks:
            assert list(walk["marker"]["symbol"]) == [named[text.partition(",")[0]] for text in walk["text"]]


def test_lines_that_coincide_are_all_seen() -> None:
    """The earlier is wider, so that it shows under the later; where none coincide, all are alike."""

    def widths(*stories: Story) -> list[float]:
        return [trace["line"]["width"] for trace in drawn(*stories)["sparsity"].figure["data"]]

    assert widths(told()) == [6, 2] and widths(told(name="a"), told(name="b")) == [6, 2]
    run = told(pruned=3, made=(1, 1, 1))
    run.history[1]["sparsity"] = [0.7, 0.6]
    assert widths(run) == [6, 2, 2]
    assert widths(*(told(name=str(number)) for number in range(9))) == [12 - 1.25 * number for number in range(9)]
