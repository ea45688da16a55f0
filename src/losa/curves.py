"""The picture of how a run went: loss of every update, perplexity after every pruning and every recovery."""

import itertools
from typing import Any

from losa.drawing import Picture, Table, extra, literal, look_of, picture, plotly, upper
from losa.story import NAMES, Story

SYMBOLS = {
    "dense": "diamond",
    "as it came": "diamond",
    "fine-tuned": "square",
    "pruned": "x",
    "recovered": "circle",
}
GREY = 7  # among the page's colours
DOTS = 60  # so many updates and fewer have a dot each: a step may have but one, which makes no line


def training(stories: list[Story]) -> Picture | None:
    """Loss of every update above, perplexity below; a panel alone where the runs have one of them only."""
    go, subplots = plotly()
    by_update = all(story.updates for story in stories)  # else by step: without updates, all would lie at none
    walks = [_walk(story, by_update) for story in stories]
    learned, walked, several = any(story.updates for story in stories), any(walks), len(stories) > 1
    if not learned and not walked:
        return None
    panels = learned + walked
    figure = subplots.make_subplots(
        rows=panels,
        cols=1,
        shared_xaxes=by_update,
        vertical_spacing=0.07 if by_update else 0.2,
        row_heights=[0.55, 0.45] if panels == 2 else [1],
    )
    rows: Table = []
    for number, (story, points) in enumerate(zip(stories, walks, strict=True)):
        look = {"meta": look_of(number, stories)}
        hover = extra(stories)
        if story.updates:
            group = {"legendgroup": f"run {number}", "name": literal(story.name)}
            for line in _losses(story, hover, several):
                figure.add_trace(go.Scatter(**line, **look, **group), row=1, col=1)
        if points:
            named = {"name": literal(story.name), "showlegend": several and not story.updates}
            figure.add_trace(go.Scatter(**_perplexities(points, hover), **look, **named), row=panels, col=1)
        starts, end = _starts(story)
        for update in story.updates:
            place = starts[update["step"]] + update["update"]
            rows.append((story.name, place, f"step {update['step']}", "loss", update["loss"]))
        rows += [(story.name, x, name, "perplexity", value) for x, name, value in points]
        if not several:
            for record in story.history:
                at = starts.get(record["step"], end) if by_update else record["step"]
                _boundary(figure, at, record["mean_sparsity"])
    for kind in dict.fromkeys(_kind(name) for points in walks for _, name, _ in points):
        key: dict[str, Any] = {"mode": "markers", "marker": {"size": 9, "symbol": SYMBOLS[kind]}, "legend": "legend2"}
        look = {"meta": {"color": GREY} if several else look_of(0, stories)}
        figure.add_trace(go.Scatter(x=[None], y=[None], name=kind, **look, **key), row=panels, col=1)
    told = []
    if learned:
        told.append("loss of every update (thick: its mean with its neighbours in the same step)")
        figure.update_yaxes(title_text="loss (nats a token)", row=1, col=1)
        if not (walked and by_update):  # else the axis below is this one's, too
            figure.update_xaxes(title_text="updates of recovery", row=1, col=1)
    if walked:
        told.append("perplexity after every pruning and every recovery")
        figure.update_yaxes(title_text="perplexity", row=panels, col=1)
        axis = {"title_text": "updates of recovery"} if by_update else {"title_text": "step", "dtick": 1}
        figure.update_xaxes(**axis, row=panels, col=1)
    note = "; ".join(told) + "."
    if not several:
        note += " The model was pruned to the share shown at the dotted lines."
    title = " and ".join(["Loss"] * learned + ["perplexity"] * walked)
    columns = ["run", "update" if by_update else "update or step" if learned else "step", "when", "what", "value"]
    height = 510 if panels == 2 else 350
    return picture("training", upper(title), upper(note), figure, columns, rows, height)


def _losses(story: Story, hover: str, several: bool) -> list[dict[str, Any]]:
    """Two lines over the updates, the losses and their running mean, each broken between steps: what is pruned there makes
    the loss jump."""
    starts, _ = _starts(story)
    places: list[int] = []
    losses: list[float | None] = []
    means: list[float | None] = []
    for step, made in itertools.groupby(story.updates, lambda update: update["step"]):
        updates = list(made)
        if losses:
            places, losses, means = [*places, places[-1]], [*losses, None], [*means, None]
        found = [update["loss"] for update in updates]
        places += [starts[step] + update["update"] for update in updates]
        losses += found
        means += _smoothed(found)
    thin = {
        "mode": "lines" if len(losses) > DOTS else "lines+markers",
        "marker": {"size": 4},
        "line": {"width": 1},
        "opacity": 0.4,
        "hovertemplate": "update %{x}: %{y:.3f}" + hover,
        "showlegend": False,
    }
    thick = {
        "mode": "lines",
        "line": {"width": 2.5},
        "hovertemplate": "mean around update %{x}: %{y:.3f}" + hover,
        "showlegend": several,
    }
    return [{"x": places, "y": losses} | thin, {"x": places, "y": means} | thick]


def _perplexities(points: list[tuple[int, str, float]], hover: str) -> dict[str, Any]:
    x, names, y = zip(*points, strict=True)
    return {
        "x": x,
        "y": y,
        "text": names,
        "mode": "lines+markers",
        "hovertemplate": "%{text}: %{y:.2f}" + hover,
        "marker": {"size": 9, "symbol": [SYMBOLS[_kind(name)] for name in names]},
    }


def _walk(story: Story, by_update: bool) -> list[tuple[int, str, float]]:
    """Perplexities as they came: (place, what it is of, value), places by update or by step; none if there is but one."""
    starts, end = _starts(story)
    named = {"dense": 0, "finetuned": starts[1] if by_update else 0, "before": 0}
    points: list[tuple[int, str, Any]] = [
        (named[name], NAMES[name], found.get("sample_perplexity"))
        for name, found in story.measurements.items()
        if name in NAMES
    ]
    for record in story.history:
        step, found = record["step"], record["perplexity"]
        points.append((starts.get(step, end) if by_update else step, f"pruned, step {step}", found.get("pruned")))
        if "recovered" in found:
            done = starts.get(step + 1, end) if by_update else step
            points.append((done, f"recovered, step {step}", found["recovered"]))
    points = [point for point in points if point[2] is not None]
    return points if len(points) > 1 else []


def _kind(name: str) -> str:
    """pruned, of "pruned, step 2"."""
    return name.partition(",")[0]


def _starts(story: Story) -> tuple[dict[int, int], int]:
    """How many updates were made before each step, and in all."""
    starts, made = {}, 0
    for step in range(int(story.recipe.get("steps", 1)) + 1):  # step 0 is fine-tuning, if there is any
        starts[step] = made
        made += max((update["of"] for update in story.updates if update["step"] == step), default=0)
    last = story.updates[-1] if story.updates else None
    return starts, starts[last["step"]] + last["update"] if last else 0


def _boundary(figure: Any, at: int, reached: float) -> None:
    figure.add_vline(x=at, line={"width": 1, "dash": "dot"})
    text = f"{reached:.1%}".replace(".0%", "%")
    figure.add_annotation(
        x=at, xref="x", y=1, yref="paper", yanchor="bottom", xanchor="center", showarrow=False, text=text
    )


def _smoothed(values: list[float]) -> list[float]:
    """The mean of each and its neighbours on both sides, a twentieth of them all."""
    half = max(1, len(values) // 40)
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - half) : i + half + 1])]
