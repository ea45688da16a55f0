"""Python source as text for the built-in model: the standard library of the Python that runs, split by module name.

A module belongs to `test`, `validation` or `train` by a fixed hash of its name, so the split is the same on every
machine and every Python version. Copies of a held-out module under another name (vendored, renamed or backported)
are found by their lines and left out of `train`; copies of a test module are left out of `validation` too.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "validation", "test")
SALT = "losa300"  # never change: the built-in model was trained on this split. Gives both held-out parts 0.6 to 0.8 MB

# Tests, generated tables and data in the shape of code: text that no one would call Python to learn from.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "_bundled",
}
SKIPPED_FOLDERS |= {"__pycache__", "lib-dynload"}

SHINGLE_LINES = 4  # lines that must follow one another to count as shared text
SHINGLES_SHARED = 8  # a document that shares this many shingles with a held-out one is taken for a copy ...
SHARE_SHARED = 0.05  # ... and so is one that shares this part of its own


class Document(NamedTuple):
    name: str  # dotted module name
    text: str


def split_of(module: str) -> str:
    """The split of a dotted module name; submodules go with their top-level package.

    >>> split_of("json.decoder") == split_of("json")
    True
    """
    # _pydatetime, _datetime and datetime are one module under three names (they moved between Python versions)
    stem = module.split(".")[0].lstrip("_")
    stem = stem[2:] if stem.startswith("py") and module.startswith("_") else stem
    bucket = int(hashlib.sha256(f"{SALT}{stem}".encode()).hexdigest(), 16) % 14
    return {0: "test", 1: "validation"}.get(bucket, "train")


def read_documents(root: Path) -> Iterator[Document]:
    """Every Python module below `root`, in order of its name."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts[:-1]) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a few modules are deliberately in other encodings
            continue
        if len(text) > 200:
            yield Document(".".join(parts).removesuffix(".__init__"), text)


def shingles(text: str) -> set[tuple[str, ...]]:
    """Runs of SHINGLE_LINES lines, white space and trivial lines left out."""
    lines = [line for line in map(str.strip, text.splitlines()) if len(line) >= 8 and not line.startswith("#")]
    return {tuple(lines[i : i + SHINGLE_LINES]) for i in range(len(lines) - SHINGLE_LINES + 1)}


def without_copies(documents: Iterable[Document], held_out: set[tuple[str, ...]]) -> list[Document]:
    """`documents` less those that repeat text whose shingles are in `held_out`."""
    return [document for document in documents if not is_copy(document, held_out)]


def is_copy(document: Document, held_out: set[tuple[str, ...]]) -> bool:
    own = shingles(document.text)
    shared = len(own & held_out)
    return shared >= SHINGLES_SHARED or shared > SHARE_SHARED * len(own)


@cache
def standard_library() -> dict[str, list[Document]]:
    """The running Python's standard library by split, copies left out; about 10 MB of text in all."""
    return split_documents(read_documents(Path(sysconfig.get_path("stdlib"))))


def split_documents(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Documents by split: no validation document repeats a test one, no training document repeats either."""
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        splits[split_of(document.name)].append(document)
    held_out = set().union(*(shingles(document.text) for document in splits["test"]))
    splits["validation"] = without_copies(splits["validation"], held_out)
    held_out = held_out.union(*(shingles(document.text) for document in splits["validation"]))
    splits["train"] = without_copies(splits["train"], held_out)
    return splits
