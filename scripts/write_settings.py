"""Write docs/settings.md: every setting of the recipe, from its own documentation.

python scripts/write_settings.py
"""

import dataclasses
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import losa
from losa.recipe import default_of

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """# All settings

Each is a flag of `losa compress`, a field of [`losa.Recipe`](api.md) with underscores, and a key of a recipe file. `losa recover` takes those that are not about
pruning. Where no default stands, others decide it. Made by `scripts/write_settings.py`.

"""


def kind_of(kind: Any) -> str:
    """The type of a setting, for people."""
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    if get_origin(kind) in (dict, list):
        return {dict: "JSON", list: "texts"}[get_origin(kind)]
    return " or ".join(part.__name__ for part in get_args(kind) or (kind,) if part is not NoneType)


def page() -> str:
    """The page, as it should be."""
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(losa.Recipe):
        default = default_of(field)
        shown = "" if default in (None, "", [], {}) else f"`{default}`"
        meaning = field.metadata["doc"].replace("|", "\\|")
        lines.append(f"| `--{field.name.replace('_', '-')}` | {kind_of(field.type)} | {shown} | {meaning} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
