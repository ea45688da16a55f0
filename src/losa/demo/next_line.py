"""A multiple-choice task for the built-in model: which of four lines follows in a module it has not seen?"""

import random
from typing import Any

from losa.demo import corpus

CONTEXT = 12  # lines before the one asked for
SHORTEST = 12  # characters of a line that says enough to be told apart
CHOICES = 4


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """`count` questions from the held-out modules of the running Python, seeded, spread over all of their lines.

    Each has `context`, lines of source; `choices`, the line that follows and others of the same module, indentation and
    about the same length, none of which stands in the context; `target`, which of them is right. No line is asked twice.
    Fewer if there are not so many.
    """
    rng = random.Random(seed)
    modules = [[line.rstrip() for line in document.text.splitlines()] for document in corpus.standard_library()["test"]]
    places = [(lines, at) for lines in modules for at in range(CONTEXT, len(lines))]
    rng.shuffle(places)
    asked: set[str] = set()
    found: list[dict[str, Any]] = []
    for lines, at in places:
        if len(found) == count:
            break
        right, context = lines[at], lines[at - CONTEXT : at]
        if len(right.strip()) < SHORTEST or right.strip().startswith("#") or right.strip() in asked:
            continue
        alike = {line for line in lines if _alike(line, right)} - {right, *context}
        if len(alike) < CHOICES - 1:
            continue
        choices = [right, *rng.sample(sorted(alike), CHOICES - 1)]
        rng.shuffle(choices)
        asked.add(right.strip())
        found.append({"context": "\n".join(context), "choices": choices, "target": choices.index(right)})
    return found


def _alike(line: str, right: str) -> bool:
    """Whether nothing but what it says tells `line` from `right`: indentation, and length within a fifth."""
    text, other = line.strip(), right.strip()
    same_indentation = len(line) - len(text) == len(right) - len(other)
    return same_indentation and abs(len(text) - len(other)) <= len(other) / 5 and not text.startswith("#")
