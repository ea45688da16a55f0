"""What the task definitions call by name where a template does not do."""

import re
from typing import Any

Row = dict[str, Any]


def hellaswag_rows(rows: Any) -> Any:
    """The datasets.Dataset with `query` and `choices`, less the marks that WikiHow left in them."""

    def prepared(row: Row) -> Row:
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
        return {
            "query": _without_marks(f"{row['activity_label']}: {context}"),
            "choices": [_without_marks(ending) for ending in row["endings"]],
        }

    return rows.map(prepared)


def _without_marks(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def winogrande_answer(row: Row) -> int:
    return {"1": 0, "2": 1}[row["answer"]]


def winogrande_beginnings(row: Row) -> list[str]:
    beginning = row["sentence"].partition("_")[0]
    return [beginning + row["option1"], beginning + row["option2"]]


def winogrande_ending(row: Row) -> str:
    return str(row["sentence"].partition("_")[2]).strip()


def next_line_rows(rows: int, seed: int, **_: Any) -> dict[str, Any]:
    from datasets import Dataset  # type: ignore[import-untyped]

    from losa.demo.next_line import questions

    return {"test": Dataset.from_list(questions(rows, seed))}
