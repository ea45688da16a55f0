"""The pictures of a report: each a plotly figure, with the numbers behind it as a table.

Of one run, steps are told apart by shade; of several, runs by colour, each as it was at its last step. Colours are given
by name (`meta`), because the page paints them for light or dark.
"""

import itertools
from collections.abc import Callable
from typing import Any

from losa.curves import training
from losa.drawing import Picture, Table, literal, look_of, picture, plotly
from losa.story import Story

PHASES = {  # as they come; what each takes part in
    "reading": "reading data",
    "loading": "loading the model",
    "samples": "writing samples",
    "perplexity": "perplexity",
    "teacher": "the teacher's predictions",
    "fine-tuning": "fine-tuning",
    "dense features": "dense features",
    "rates": "rates by block",
    "pruning": "pruning",
    "learning rate": "trying learning rates",
    "recovery": "recovery",
    "merging": "merging",
    "saving": "saving",
}


def pictures(stories: list[Story]) -> list[list[Picture]]:
    """Every picture that the runs have something to show in, in reading order; those that belong together in a row."""
    rows = ([training], [sparsity, deviation], [rmi, evidence, errors, ranks], [seconds, memory])
    made = [[picture for make in makers if (picture := make(stories)) is not None] for makers in rows]
    return [row for row in made if row]


def sparsity(stories: list[Story]) -> Picture | None:
    note = "Share of each block's weights that is pruned, counted from the masks"
    return _by_block(
        stories, "sparsity", "Sparsity of each block", note, "pruned (%)", lambda record: _percent(record["sparsity"])
    )


def deviation(stories: list[Story]) -> Picture | None:
    def differences(record: dict[str, Any]) -> list[float]:
        return _percent([rate - record["mean_sparsity"] for rate in record["sparsity"]])

    note = "The same, as what each block has more or less than all of them together"
    title = "Sparsity against the mean"
    return _by_block(stories, "deviation", title, note, "difference (percentage points)", differences, zero=True)


def ranks(stories: list[Story]) -> Picture | None:
    note = "Rank of the low-rank pairs that repair a block; a larger error gets a higher rank"
    if any(story.recipe.get("rank_by") != "error" for story in stories):
        note = "Rank of the low-rank pairs that repair a block"
    return _by_block(stories, "ranks", "Rank of each block", note, "rank", lambda record: record["ranks"])


def errors(stories: list[Story]) -> Picture | None:
    note = "How far each block's output is from the dense model's right after pruning, relative to its size"
    title = "Reconstruction error"
    return _by_block(stories, "errors", title, note, "error (relative, squared)", lambda record: record["errors"])


def rmi(stories: list[Story]) -> Picture | None:
    """RMI of every pair of blocks; a slider goes through the steps, or the runs."""
    go, _ = plotly()
    found: list[tuple[str, list[list[float]]]] = []
    for story in stories:
        steps = [(step, seen["rmi"]) for step, seen in sorted(story.evidence.items()) if "rmi" in seen]
        if len(stories) > 1:
            found += [(story.name, matrix) for _, matrix in steps[-1:]]
        else:
            found += [(f"step {step}", matrix) for step, matrix in steps]
    if not found:
        return None
    low = min(value for _, matrix in found for row in matrix for value in row)
    figure = go.Figure()
    for number, (_, matrix) in enumerate(found):
        figure.add_trace(
            go.Heatmap(
                z=matrix,
                zmin=low,
                zmax=1,
                visible=number == len(found) - 1,
                meta={"scale": True},
                colorbar={"thickness": 8, "xpad": 4},
                hovertemplate="blocks %{x} and %{y}: %{z:.3f}<extra></extra>",
            )
        )
    if len(found) > 1:
        steps_ = [
            {
                "label": literal(label),
                "method": "restyle",
                "args": [{"visible": [other == number for other in range(len(found))]}],
            }
            for number, (label, _) in enumerate(found)
        ]
        figure.update_layout(sliders=[{"active": len(found) - 1, "steps": steps_, "pad": {"t": 42}, "len": 1}])
    figure.update_xaxes(title_text="block", dtick=_tick(len(found[-1][1])), constrain="domain", showgrid=False)
    figure.update_yaxes(
        title_text="block", dtick=_tick(len(found[-1][1])), scaleanchor="x", autorange="reversed", showgrid=False
    )
    rows: Table = [
        (label, one, other, value)
        for label, matrix in found
        for one, row in enumerate(matrix)
        for other, value in enumerate(row)
    ]
    note = "How much two blocks' outputs tell the same; a block that repeats the others is pruned more"
    columns = ["run" if len(stories) > 1 else "step", "block", "other block", "RMI"]
    return picture("rmi", "What blocks share (RMI)", note, figure, columns, rows)


def evidence(stories: list[Story]) -> Picture | None:
    """What allocators other than RMI saw: shares of outliers, or the error at each rate tried."""
    kinds = {
        kind for story in stories for seen in story.evidence.values() for kind in ("outliers", "probes") if kind in seen
    }
    if len(kinds) != 1 or (kinds == {"probes"} and len(stories) > 1):
        return None
    if kinds == {"outliers"}:
        note = "Share of a unit's scores that stand far above its mean; a unit with more outliers is pruned less"
        return _lines(
            stories,
            "outliers",
            "Outliers",
            note,
            ("block or linear, in order", "outliers (%)"),
            lambda story: {
                step: _percent(seen["outliers"]) for step, seen in story.evidence.items() if "outliers" in seen
            },
        )
    go, _ = plotly()
    story, figure = stories[0], go.Figure()
    rows: Table = []
    step = max(story.evidence)
    units = list(story.history[step - 1]["rates"]) if len(story.history) >= step else []
    probes = story.evidence[step]["probes"]
    for number, (rates, found) in enumerate(probes):
        name = units[number] if units else f"unit {number}"
        shade = {"shade": number / max(1, len(probes) - 1)}
        hover = "%{x}% pruned: %{y:.4g}"
        figure.add_trace(
            go.Scatter(
                x=_percent(rates), y=found, name=literal(name), meta=shade, mode="lines+markers", hovertemplate=hover
            )
        )
        rows += [(name, rate, error) for rate, error in zip(rates, found, strict=True)]
    figure.update_layout(showlegend=len(probes) <= 12)
    figure.update_xaxes(title_text="pruned (%)")
    figure.update_yaxes(title_text="error (relative, squared)")
    note = f"Error of each unit at the rates tried in step {step}; where it costs least, more is pruned"
    return picture("probes", "What pruning costs", note, figure, ["unit", "rate", "error"], rows)


def seconds(stories: list[Story]) -> Picture | None:
    """Where the time went: bars by phase, of one run split by step."""
    go, _ = plotly()
    figure = go.Figure()
    rows: Table = []
    order = _phases(stories)
    for number, story in enumerate(stories):
        steps = sorted({phase.get("step", 0) for phase in story.phases}) if len(stories) == 1 else [None]
        for step in steps:
            spent = {
                name: sum(
                    phase["seconds"]
                    for phase in story.phases
                    if phase["phase"] == name and step in (None, phase.get("step", 0))
                )
                for name in order
            }
            named = story.name if step is None else str(step) if step else "once"
            look = look_of(number, stories) if step is None else {"shade": step / max(1, *steps), "fill": True}
            figure.add_trace(
                go.Bar(
                    y=[PHASES.get(name, name) for name in order],
                    x=list(spent.values()),
                    name=literal(named),
                    orientation="h",
                    meta=look | {"fill": True},
                    hovertemplate="%{y}: %{x:.1f} s" + (f"<extra>step {step}</extra>" if step else ""),
                )
            )
            rows += [(named, PHASES.get(name, name), value) for name, value in spent.items() if value]
    if not rows:
        return None
    single = len(stories) == 1
    figure.update_layout(
        barmode="stack" if single else "group", bargap=0.3, legend_title_text="step" if single else None
    )
    figure.update_xaxes(title_text="seconds")
    figure.update_yaxes(autorange="reversed")
    columns = ["step" if single else "run", "phase", "seconds"]
    return picture("seconds", "Where the time went", "Seconds of each phase", figure, columns, rows)


def memory(stories: list[Story]) -> Picture | None:
    """Peak of memory by phase: of the process, and of the device if there was one."""
    go, _ = plotly()
    figure = go.Figure()
    rows: Table = []
    order = _phases(stories)
    for number, story in enumerate(stories):
        for kind, what in (("memory", "process"), ("device_memory", "device")):
            peaks = {
                name: max((p[kind] for p in story.phases if p["phase"] == name and p.get(kind)), default=None)
                for name in order
            }
            if not any(peaks.values()):
                continue
            look = look_of(number, stories) if len(stories) > 1 else {"color": 0 if kind == "memory" else 1}
            devices = any(phase.get("device_memory") for phase in story.phases)
            named = what if len(stories) == 1 else f"{story.name}, {what}" if devices else story.name
            figure.add_trace(
                go.Bar(
                    y=[PHASES.get(name, name) for name in order],
                    x=[peak and peak / 1e9 for peak in peaks.values()],
                    name=literal(named),
                    orientation="h",
                    meta=look | {"fill": True},
                    hovertemplate="%{y}: %{x:.3f} GB",
                )
            )
            rows += [(named, PHASES.get(name, name), peak) for name, peak in peaks.items() if peak]
    if not rows:
        return None
    figure.update_layout(barmode="group", bargap=0.3)
    figure.update_xaxes(title_text="GB at its peak")
    figure.update_yaxes(autorange="reversed")
    note = "The most memory that was held in each phase, libraries and mapped files included"
    return picture("memory", "Where the memory went", note, figure, ["whose", "phase", "bytes"], rows)


# ------------------------------------------------------------------------------------------------------- the parts


def _by_block(
    stories: list[Story],
    id_: str,
    title: str,
    note: str,
    axis: str,
    values: Callable[[dict[str, Any]], list[Any]],
    zero: bool = False,
) -> Picture | None:
    def of(story: Story) -> dict[int, list[Any]]:
        return {record["step"]: values(record) for record in story.history if values(record)}

    return _lines(stories, id_, title, note, ("block", axis), of, zero)


def _lines(
    stories: list[Story],
    id_: str,
    title: str,
    note: str,
    axes: tuple[str, str],
    of: Callable[[Story], dict[int, list[Any]]],
    zero: bool = False,
) -> Picture | None:
    """A line a step over the blocks; of several runs, a line each, of the last step."""
    go, _ = plotly()
    figure, several = go.Figure(), len(stories) > 1
    lines: list[tuple[str, dict[str, Any], str, list[Any]]] = []
    for number, story in enumerate(stories):
        found = sorted(of(story).items())
        for step, values in found[-1:] if several else found:
            look = look_of(number, stories) if several else {"shade": step / max(1, len(found))}
            where = "block %{x}: %{y:.4g}" + ("" if several else f"<extra>step {step}</extra>")
            lines.append((story.name if several else str(step), look, where, values))
    if not lines:
        return None
    longest = max(len(values) for *_, values in lines)
    wide = _wider([values for *_, values in lines])
    if any(wide):
        note += "; of lines that coincide, the earlier is wider"
    for (named, look, where, values), wider in zip(lines, wide, strict=True):
        figure.add_trace(
            go.Scatter(
                x=list(range(len(values))),
                y=values,
                name=literal(named),
                mode="lines+markers",
                meta=look,
                line={"width": 2 + wider},
                marker={"size": (6 if len(values) <= 48 else 3) + wider},
                hovertemplate=where,
            )
        )
    rows: Table = [(named, block, value) for named, _, _, values in lines for block, value in enumerate(values)]
    figure.update_xaxes(title_text=axes[0], dtick=_tick(longest), range=[-0.4, longest - 0.6])
    figure.update_yaxes(title_text=axes[1], zeroline=zero)
    figure.update_layout(legend_title_text=None if several else "step")
    columns = ["run" if several else "step", "block", axes[1]]
    return picture(id_, title, note + ".", figure, columns, rows)


def _wider(lines: list[list[float]]) -> list[float]:
    """How much wider each line is drawn than the last one, so that it shows under those that later run along it."""
    every = [value for values in lines for value in values]
    near = 0.02 * (max(every) - min(every))

    def along(one: list[float], other: list[float]) -> bool:
        close = [abs(a - b) <= near for a, b in zip(one, other, strict=False)]
        return any(map(all, itertools.pairwise(close))) or close == [True]

    under: list[int] = []  # how many lie on each, one on another
    for number, values in reversed(list(enumerate(lines))):
        over = [count for later, count in zip(lines[number + 1 :], under, strict=True) if along(values, later)]
        under.insert(0, max(over) + 1 if over else 0)
    return [min(4, 10 / max(1, *under)) * count for count in under]


def _phases(stories: list[Story]) -> list[str]:
    there = {phase["phase"] for story in stories for phase in story.phases}
    return [name for name in PHASES if name in there] + sorted(there - PHASES.keys())


def _percent(values: list[float]) -> list[float]:
    return [round(100 * value, 4) for value in values]


def _tick(count: int) -> int:
    return next(step for step in (1, 2, 4, 8, 16, 32, count) if count <= 16 * step)
