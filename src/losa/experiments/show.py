"""Tables of what was measured: on the terminal, as markdown, JSON and CSV, and as pictures on a page."""

import csv
import html
import importlib
import io
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losa.errors import LosaError
from losa.experiments.cells import Cell
from losa.experiments.tables import Claim, Place, Table, Values, how_sure
from losa.run import write_bytes, write_json, writing
from losa.units import duration, number, size

NAMES = {  # of what is measured, and how it is written
    "perplexity": ("perplexity", number),
    "accuracy": ("accuracy", lambda value: f"{value:.3f}"),
    "by_block": ("sparsity", lambda value: f"{value:.1%}"),
    "trained": ("values trained", lambda value: f"{value:,.0f}"),
    "seconds": ("time", duration),
    "processor": ("processor time", duration),
    "memory": ("memory at its peak", size),
    "rates": ("rates", lambda value: f"{value:.2f} s"),
    "errors": ("errors", lambda value: f"{value:.2f} s"),
    "parameters": ("parameters", lambda value: f"{value:,.0f}"),
    "dense": ("dense", lambda value: f"{value:.1f}"),
    "apart": ("LoRA apart", lambda value: f"{value:.1f}"),
    "merged": ("merged", lambda value: f"{value:.1f}"),
    "apart_speedup": ("LoRA apart over dense", lambda value: f"{value:.2f}"),
    "merged_speedup": ("merged over dense", lambda value: f"{value:.2f}"),
    "native_dense": ("native dense", lambda value: f"{value:.1f}"),
    "native_merged": ("native merged", lambda value: f"{value:.1f}"),
    "native_speedup": ("native merged over native dense", lambda value: f"{value:.2f}"),
    "merged_over_apart": ("merged over LoRA apart", lambda value: f"{value:.2f}"),
}
UNITS = {  # of measures that tables show side by side; others have a unit of their own
    **dict.fromkeys(("seconds", "processor", "rates", "errors"), "seconds"),
    **dict.fromkeys(("dense", "apart", "merged", "native_dense", "native_merged"), "tokens a second"),
    **dict.fromkeys(("apart_speedup", "merged_speedup", "merged_over_apart", "native_speedup"), "times as fast"),
    "memory": "bytes",
}
SAID = (  # settings that the caption names, if all cells have them in common
    *("sparsity", "pruner", "pattern", "steps", "mean_rank", "calibration", "calibration_samples", "sequence_length"),
    *("train_data", "train_samples", "train_length", "learning_rate", "epochs", "distill", "eval_data", "eval_tokens"),
)
END = "<!-- end -->"
BY_SIZE = "cost by size"  # of several models
COLUMNS = ["model", "table", "row", "column", "measure", "block", "mean", "deviation", "seeds"]


@dataclass
class Grid:
    """A table with what was measured. entries: what is in it, one a line, with the names of COLUMNS."""

    table: str
    model: str
    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]
    entries: list[dict[str, Any]]
    verdicts: list[tuple[str, str]]  # what the paper claims, whether it holds here
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "table": self.table,
            "model": self.model,
            "title": self.title,
            "of": self.caption,
            "header": self.header,
            "rows": self.rows,
            "entries": self.entries,
            "claims": [{"paper": claim, "here": found} for claim, found in self.verdicts],
            "notes": self.notes,
        }

    def markdown(self) -> str:
        """The table, what the paper claims, and whether it holds."""
        if not self.entries:
            told = [f"- The paper: {claim}." for claim, _ in self.verdicts] + [f"- {note}" for note in self.notes]
            return "\n".join([f"**{self.title}.** Nothing of it has been run yet.", "", *told]).rstrip() + "\n"
        lines = [f"**{self.title}.** {self.caption}", ""]
        lines += ["| " + " | ".join(line) + " |" for line in (self.header, ["---"] * len(self.header), *self.rows)]
        lines.append("")
        lines += [f"- The paper: {claim}. Here: {found}." for claim, found in self.verdicts]
        lines += [f"- {note}" for note in self.notes]
        return "\n".join(lines).rstrip() + "\n"


def collect(chosen: Sequence[Table], cells: Sequence[Cell], found: dict[str, dict[str, Any]]) -> list[Grid]:
    """The tables, of each model in turn. found: what is kept, by the cells' keys."""
    made = []
    sources = list(dict.fromkeys(cell.source for cell in cells))
    for source in sources:
        for table in chosen:
            here = [cell for cell in cells if cell.source == source and any(t == table.name for t, _ in cell.places)]
            made.append(_grid(table, source, here, found))
    if BY_SIZE in names(chosen, sources):
        made.append(_by_size(sources, cells, found))
    return made


def names(chosen: Sequence[Table], sources: Sequence[str]) -> list[str]:
    """Of the tables that `collect` makes."""
    by_size = len(set(sources)) > 1 and any(table.name == "cost" for table in chosen)
    return [table.name for table in chosen] + ([BY_SIZE] if by_size else [])


def _grid(table: Table, source: str, cells: list[Cell], found: dict[str, dict[str, Any]]) -> Grid:
    measured = _values(table, cells, found)
    runs = [cell for cell in cells if cell.kind == "compress" and cell.recipe]
    dense = sorted({r["measured"]["dense"] for cell in runs if (r := found.get(cell.key))})
    vectors = table.measures == ("by_block",)
    many = len(table.measures) > 1
    columns = [(column, measure) for column in table.columns for measure in table.measures]
    titles = [NAMES[measure][0] if many else column for column, measure in columns]
    rows, entries = [], []
    for row in table.rows:
        cells_of = [measured[measure].get((row, column), []) for column, measure in columns]
        if not vectors:
            rows.append([row, *(_text(m, values) for (_, m), values in zip(columns, cells_of, strict=True))])
        for (column, measure), values in zip(columns, cells_of, strict=True):
            entries += [_entry(table, source, row, column, measure, b, v) for b, v in _blocks(vectors, values)]
    if vectors:
        blocks = sorted({entry["block"] for entry in entries})
        at = {(e["block"], e["column"]): e["mean"] for e in entries}
        rows = [[str(b), *(NAMES["by_block"][1](at[b, c]) if (b, c) in at else "" for c, _ in columns)] for b in blocks]
    caption = _caption(runs, [] if table.kind == "zero-shot" else dense)
    if table.kind == "zero-shot":
        answered = [r["measured"] for cell in cells if (r := found.get(cell.key))]
        caption += _asked([measured["tasks"] for measured in answered if "tasks" in measured])
        entries += _by_task(table, source, cells, found)
    if table.kind == "latency":
        caption = _where([r["measured"] for cell in cells if (r := found.get(cell.key))])
    verdicts = [
        (claim.text, _verdict(claim, measured[claim.measure if not vectors else "by_block"])) for claim in table.claims
    ]
    missed = [(cell, f"cannot be, {cell.impossible}") for cell in cells if cell.impossible]
    missed += [
        (c, f"failed, {c.failed}") for c in cells if c.failed and (table.kind == "zero-shot" or c.key not in found)
    ]
    why = {(place, reason) for cell, reason in missed for t, place in cell.places if t == table.name}
    notes = [f"{', '.join(part for part in place if part)}: {reason}" for place, reason in sorted(why)]
    if table.kind == "zero-shot":
        notes += dict.fromkeys(f"cannot be asked: {cell.unasked}" for cell in cells if cell.unasked)
    first = "block" if vectors else ""
    return Grid(table.name, source, table.title, caption, [first, *titles], rows, entries, verdicts, notes)


def _values(table: Table, cells: list[Cell], found: dict[str, dict[str, Any]]) -> dict[str, Values]:
    """By measure and place, a value a seed."""
    made: dict[str, Values] = {measure: {} for measure in table.measures}
    for cell in cells:
        result = found.get(cell.key)
        for name, place in cell.places:
            if name == table.name and result is not None:
                for measure in table.measures:
                    if measure == "rates" and result["recipe"]["allocator"] == "uniform":
                        continue  # there was nothing to look at
                    if (value := result["measured"].get(measure)) is not None:
                        made[measure].setdefault(place, []).append(value)
    return made


def _blocks(vectors: bool, values: list[Any]) -> list[tuple[int | None, list[float]]]:
    if not vectors:
        return [(None, values)] if values else []
    return [(block, list(each)) for block, each in enumerate(zip(*values, strict=True))]


def _entry(
    table: Table, source: str, row: str, column: str, measure: str, block: int | None, values: list[float]
) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    line = (source, table.name, row, column, measure, block, statistics.mean(values), deviation, len(values))
    return dict(zip(COLUMNS, line, strict=True))


def _text(measure: str, values: list[float]) -> str:
    if not values:
        return ""
    write = NAMES[measure][1]
    text = str(write(statistics.mean(values)))
    if len(values) > 1 and measure in ("perplexity", "accuracy"):
        text += f" ± {write(statistics.stdev(values))} ({len(values)})"
    return text


def _caption(cells: list[Cell], dense: list[float]) -> str:
    """What all cells have in common."""
    said = []
    if dense:
        said.append(
            f"Dense {number(dense[0])}" if len(dense) == 1 else f"Dense {number(dense[0])} to {number(dense[-1])}"
        )
    if cells:
        recipes = [cell.recipe.to_json() for cell in cells if cell.recipe]
        for name in SAID:
            values = {json.dumps(recipe[name]) for recipe in recipes}
            if len(values) == 1 and (value := recipes[0][name]) not in ("", 0, 0.0, None, "unstructured"):
                said.append(
                    f"{name.replace('_', ' ')} {value:g}"
                    if isinstance(value, float)
                    else f"{name.replace('_', ' ')} {value}"
                )
    return ", ".join(said) + ("." if said else "")


def _asked(scores: list[dict[str, Any]]) -> str:
    """Which tasks, how many questions of each, and how far chance can move their mean."""
    if not scores:
        return ""
    counts = ", ".join(f"{name} {of['rows']:,}" for name, of in scores[0].items())
    # of a single question the harness knows no error, nor is there one of the mean then
    known = [each for each in scores if all("acc_stderr" in of for of in each.values())]
    errors = [math.hypot(*(of["acc_stderr"] for of in each.values())) / len(each) for each in known]
    said = f" Questions: {counts}" + (f"; standard error {max(errors):.3f} at most" if errors else "")
    cut = max(sum(of["cut"] for of in each.values()) for each in scores)
    return said + (f"; {cut} cut at the front." if cut else ".")


def _by_task(table: Table, source: str, cells: list[Cell], found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The accuracy in every single task."""
    scores: dict[tuple[Place, str], list[float]] = {}
    for cell in cells:
        for name, of in found.get(cell.key, {"measured": {}})["measured"].get("tasks", {}).items():
            for place in (place for t, place in cell.places if t == table.name):
                scores.setdefault((place, name), []).append(of["acc"])
    return [_entry(table, source, *place, name, None, values) for (place, name), values in scores.items()]


def _where(timed: list[dict[str, Any]]) -> str:
    """What was timed on what, of everything that was."""
    said = []
    for one in timed:
        machine, clock = one["machine"], " of processor time" if one["clock"] == "processor" else ""
        where = machine.get("device") or f"{machine['processor']}, threads {machine['threads']}"
        said.append(f"{where}, {one['dtype']}, median of {one['rounds']} turns{clock}")
        if one["native"]:
            said.append(f"not decoded natively: {one['native']}")
    return "; ".join(dict.fromkeys(said)) + ("." if said else "")


def _verdict(claim: Claim, values: Values) -> str:
    """Whether a claim holds, and how sure that is."""
    if claim.check:
        return claim.check(values)
    there = [(a, b) for a, b in claim.pairs if values.get(a) and values.get(b)]
    if not there:
        return "nothing has been measured yet"
    holds, fails = 0, []
    for a, b in there:
        less, more = values[a], values[b]
        gap = statistics.mean(more) - statistics.mean(less)
        holds += gap > 0
        if gap <= 0:
            fails.append(f"{_place(a)} {_text(claim.measure, less)}, {_place(b)} {_text(claim.measure, more)}")
    word = "holds" if holds == len(there) else "does not hold" if not holds else "holds in part"
    said = f"{word}, {holds} of {len(there)}"
    if len(there) < len(claim.pairs):
        said += f" measured so far, of {len(claim.pairs)}"
    if fails:
        said += f" (not: {'; '.join(fails)})"
    return f"{said}; {how_sure(there, values)}"


def _place(place: Place) -> str:
    return " ".join(part for part in place if part and part != "perplexity")


def _by_size(sources: list[str], cells: Sequence[Cell], found: dict[str, dict[str, Any]]) -> Grid:
    """Appendix H: what rates and errors take, by the size of the model."""
    rows, entries = [], []
    for source in sources:
        line = [source]
        for measure in ("parameters", "rates", "errors"):
            values = [
                value
                for cell in cells
                if cell.source == source and ("cost", ("Wanda w. LoSA", "")) in cell.places and cell.key in found
                if (value := found[cell.key]["measured"][measure]) is not None
            ]
            line.append(_text(measure, values))
            if values:
                table = Table(BY_SIZE, "", {}, {})
                entries.append(_entry(table, source, "", "", measure, None, values))
        rows.append(line)
    header = ["model", *(NAMES[m][0] for m in ("parameters", "rates", "errors"))]
    title = "Rates and errors by the model's size; table 21"
    return Grid(BY_SIZE, "", title, "LoSA with Wanda.", header, rows, entries, [], [])


# ------------------------------------------------------------------------------------------------------------ files


def write(output: Path, grids: list[Grid], summary: dict[str, Any]) -> None:
    """experiments.json, .csv, .md, and with plotly .html, each whole or not at all."""
    with writing(output, ""):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "experiments.json", summary)
        text = io.StringIO()
        lines = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        lines.writeheader()
        lines.writerows(entry for grid in grids for entry in grid.entries)
        write_bytes(output / "experiments.csv", text.getvalue().encode())
        write_bytes(output / "experiments.md", marked(grids).encode())
        page = picture(grids)
        if page is not None:
            write_bytes(output / "experiments.html", page.encode())


def marked(grids: list[Grid]) -> str:
    """All tables as markdown, each between its markers."""
    return "\n".join(f"{_marker(grid)}\n{grid.markdown()}{END}\n" for grid in grids)


def _marker(grid: Grid) -> str:
    return f"<!-- experiment {grid.table} -->"


def check_markdown(path: Path, names: list[str]) -> None:
    """Raise LosaError for a file that is there and has no place for one of the tables."""
    if path.is_dir():
        raise LosaError(f"--markdown {path}: is a folder")
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    for name in names:
        if not re.search(rf"<!-- experiment {re.escape(name)} -->.*?{END}", text, re.DOTALL):
            raise LosaError(
                f"--markdown {path} has no place for {name!r}: put the lines <!-- experiment {name} --> and {END} into it"
            )


def put_markdown(path: Path, grids: list[Grid]) -> None:
    """Put each table between its markers in the file; a new file has all of them."""
    if not path.exists():
        text = marked(grids)
    else:
        text = path.read_text(encoding="utf-8")
        by_name: dict[str, list[Grid]] = {}
        for grid in grids:
            by_name.setdefault(grid.table, []).append(grid)
        for same in by_name.values():
            start, several = _marker(same[0]), len(same) > 1
            body = "\n".join((f"{grid.model}:\n\n" if several else "") + grid.markdown() for grid in same)
            pattern = re.compile(rf"{re.escape(start)}.*?{END}", re.DOTALL)
            text = pattern.sub(lambda _, new=f"{start}\n{body}{END}": new, text, count=1)  # type: ignore[misc]
    with writing(path, ""):
        write_bytes(path, text.encode())


def picture(grids: list[Grid]) -> str | None:
    """A page with a picture a table and unit, which needs nothing else; None where plotly is not installed."""
    try:
        go = importlib.import_module("plotly.graph_objects")
    except ImportError:
        return None
    parts: list[str] = []
    above: Grid | None = None
    for grid, unit, kinds in _drawn(grids):
        figure = go.Figure()
        lines = _lines(grid, kinds)
        for name, points in lines.items():
            xs, ys, spread = zip(*points, strict=True)
            bars = {"type": "data", "array": [s or 0 for s in spread]} if any(spread) else None
            numeric = all(isinstance(x, float | int) for x in xs) and len(xs) > 2
            kind = (
                go.Scatter(x=xs, y=ys, name=html.escape(name), error_y=bars, mode="lines+markers") if numeric else None
            )
            figure.add_trace(
                kind or go.Bar(x=[html.escape(str(x)) for x in xs], y=ys, name=html.escape(name), error_y=bars)
            )
        heights = [y for points in lines.values() for _, y, _ in points]
        if min(heights) > 0 and max(heights) > 20 * min(heights):
            figure.update_yaxes(type="log")
        figure.update_yaxes(title_text=unit)
        figure.update_layout(height=420, template="plotly_white", barmode="group", margin={"t": 20})
        about = f"<h2>{html.escape(grid.title)}</h2><p>{html.escape(grid.model)}. {html.escape(grid.caption)}</p>"
        parts.append((about if grid is not above else "") + figure.to_html(full_html=False, include_plotlyjs=not parts))
        above = grid
    if not parts:
        return None
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>losa experiment</title>'
    style = "<style>body{font-family:system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}h2{font-size:1.1rem}</style>"
    return head + style + "<h1>losa experiment</h1>" + "".join(parts) + "</html>\n"


def _kinds(grid: Grid) -> list[str]:
    return list(dict.fromkeys(entry["measure"] for entry in grid.entries if entry["measure"] in NAMES))


def _drawn(grids: list[Grid]) -> Iterator[tuple[Grid, str, list[str]]]:
    """The pictures: of each table, and of its measures, those with a unit in common."""
    for grid in grids:
        by_unit: dict[str, list[str]] = {}
        for kind in _kinds(grid):
            by_unit.setdefault(UNITS.get(kind, NAMES[kind][0]), []).append(kind)
        yield from ((grid, unit, kinds) for unit, kinds in by_unit.items())


def _lines(grid: Grid, kinds: list[str]) -> dict[str, list[tuple[Any, float, float | None]]]:
    """What is drawn: a line a row over the columns, or a single one over the rows; blocks along the axis where there are."""
    columns, many = {entry["column"] for entry in grid.entries}, len(_kinds(grid)) > 1
    made: dict[str, list[tuple[Any, float, float | None]]] = {}
    for entry in (entry for entry in grid.entries if entry["measure"] in kinds):
        point = (entry["mean"], entry["deviation"])
        if entry["block"] is not None:
            made.setdefault(entry["column"], []).append((entry["block"], *point))
        elif many:
            made.setdefault(NAMES[entry["measure"]][0], []).append((entry["row"] or entry["model"], *point))
        elif len(columns) > 1:
            made.setdefault(entry["row"], []).append((_number(entry["column"]), *point))
        else:
            made.setdefault(grid.table, []).append((_number(entry["row"]), *point))
    return made


def _number(text: str) -> Any:
    """70% as 70, 3 as 3; other text as it is."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%?", text)
    return float(found[1]) if found else text
