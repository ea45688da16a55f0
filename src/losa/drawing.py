"""What all pictures of a report share: their form, their colours by name, and plotly, which is imported when one is drawn."""

import html
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from losa.errors import LosaError
from losa.story import Story

Table = list[Sequence[Any]]


@dataclass
class Picture:
    """`rows` under `columns` are what `figure` (plotly's JSON) shows."""

    id: str
    title: str
    note: str
    figure: dict[str, Any]
    columns: list[str]
    rows: Table


def picture(
    id_: str,
    title: str,
    note: str,
    figure: Any,
    columns: list[str],
    rows: Table,
    height: int = 340,
) -> Picture:
    figure.update_layout(height=height, template=None)
    figure.update_traces(selector={"type": "scatter"}, cliponaxis=False)
    note = note if note.endswith(".") else note + "."
    return Picture(id_, title, note, figure.to_plotly_json(), columns, rows)


def extra(stories: list[Story]) -> str:
    """Of several runs, plotly says the name beside a hovering label; a name in the template itself might be taken for one."""
    return "" if len(stories) > 1 else "<extra></extra>"


def look_of(number: int, stories: list[Story]) -> dict[str, Any]:
    return {"color": number % 8} if len(stories) > 1 else {"shade": 1}


def upper(text: str) -> str:
    return text[0].upper() + text[1:]


def literal(text: str) -> str:
    """As plotly shows it letter for letter: it knows some tags."""
    return html.escape(text, quote=False)


def plotly() -> tuple[Any, Any]:
    try:
        return importlib.import_module("plotly.graph_objects"), importlib.import_module("plotly.subplots")
    except ImportError:
        raise LosaError("losa report draws with plotly, which is not installed: pip install plotly") from None
