"""Rows of the paper's tasks from local files, as their authors or the hub publish them (of BoolQ, SuperGLUE's form only).

Every row comes out with the fields that the dataset has on the hub, since the task definitions read those.
"""

import re
from pathlib import Path
from typing import Any

from losa import sources
from losa.errors import LosaError

Row = dict[str, Any]

# by task: what of a row is read, and the words in a file's name that mark the part of the data that is scored
FIELDS = {
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "boolq": ("passage", "question", "label"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
}
VALIDATION, TEST = ("validation", "valid", "val", "dev"), ("test",)
SPLITS = {name: VALIDATION for name in FIELDS} | {name: TEST for name in ("openbookqa", "arc_easy", "arc_challenge")}


def find(task: str, path: Path) -> Path:
    """The file that holds the rows of `task`: `path`, or the one in the folder `path` named after the split that is scored.

    Raises LosaError if there is none, or several.
    """
    if path.is_file():
        if path.suffix not in sources.SUFFIXES or path.suffix == ".txt":
            raise LosaError(
                f"--task-data {task}={path}: expected rows in {', '.join(sources.SUFFIXES[1:])}, or a folder"
            )
        return path
    if not path.is_dir():
        raise LosaError(f"--task-data {task}={path}: no such file or folder")
    files = sorted(p for p in path.iterdir() if p.suffix in sources.SUFFIXES and p.suffix != ".txt")
    found = [p for p in files if set(re.split(r"[^a-z]+", p.stem.lower())).intersection(SPLITS[task])]
    if len(found) != 1:
        has = ", ".join(p.name for p in found or files) or "none"
        many = f"several files ({has})" if found else f"no file (of {has})"
        raise LosaError(
            f"--task-data {task}={path}: {many} named after {' or '.join(SPLITS[task])}: name the file itself"
        )
    return found[0]


def rows(task: str, path: Path) -> list[Row]:
    """The rows of `task` in the file that `find` gives, labels from FILE-labels.lst beside it where it has none.

    Raises LosaError naming the row that is none of this task.
    """
    file = find(task, path)
    records = list(sources.read_records(file, "evaluate"))
    if not records:
        raise LosaError(f"{file} is empty")
    labels = _labels(file, len(records))
    found = []
    for (where, record), label in zip(records, labels, strict=True):
        if not isinstance(record, dict):
            raise LosaError(f"{where}: expected an object with fields, got {type(record).__name__}")
        row = _as_on_the_hub(task, {FIELDS[task][-1]: label} | record)
        if missing := [name for name in FIELDS[task] if row.get(name) is None]:
            has = ", ".join(map(str, record)) or "none"
            raise LosaError(f"{where}: no row of {task}: {', '.join(missing)} missing among its fields ({has})")
        found.append({name: row[name] for name in FIELDS[task]})
    return found


def _labels(file: Path, count: int) -> list[str | None]:
    """What stands in FILE-labels.lst, one a row, as PIQA, WinoGrande and others are published; None without such a file."""
    path = file.with_name(f"{file.stem}-labels.lst")
    if not path.is_file():
        return [None] * count
    labels: list[str | None] = [*path.read_text().split()]
    if len(labels) != count:
        raise LosaError(f"{path} has {len(labels)} labels for the {count} rows of {file.name}")
    return labels


def _as_on_the_hub(task: str, row: Row) -> Row:
    """AI2's questions hold stem and choices, the hub's have them beside; labels are numbers, or truth values, or digits."""
    if isinstance(row.get("question"), dict):
        question = row["question"]
        choices = [choice for choice in question.get("choices") or [] if isinstance(choice, dict)]
        row = row | {
            FIELDS[task][0]: question.get("stem"),
            "choices": {name: [choice.get(name) for choice in choices] for name in ("text", "label")},
        }
    answer = FIELDS[task][-1]
    if task in ("boolq", "piqa"):
        row[answer] = {"0": 0, "1": 1, "false": 0, "true": 1}.get(str(row.get(answer)).lower(), row.get(answer))
    elif row.get(answer) is not None:
        row[answer] = str(row[answer])
    return row
