"""Held-out Python modules stay held out: of what the demo calibrates and recovers on, and of what its model was trained on."""

import hashlib
import random
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from losa.demo import corpus
from losa.demo.corpus import Document

MANIFEST = Path(__file__).parents[1] / "scripts" / "train_demo_manifest.txt"


@cache
def modules(place: str) -> list[Document]:
    return list(corpus.read_documents(Path(sysconfig.get_path(place))))


@cache
def held_out() -> list[Document]:
    """All of the running Python's held-out modules, with those that are left out of validation as copies of a test one."""
    return [document for document in modules("stdlib") if corpus.split_of(document.name) != "train"]


def digest(document: Document) -> str:
    return hashlib.sha256(document.text.encode()).hexdigest()[:16]


def leaks(manifest: Iterable[str], present: list[Document]) -> list[str]:
    """The documents of a manifest (lines of digest and name) that are, or repeat, a held-out module."""
    lines = {line.strip() for line in manifest}
    digests = {line.split()[0] for line in lines}
    shingles = set().union(*(corpus.shingles(document.text) for document in held_out()))
    named = [document.name for document in held_out() if f"{digest(document)} {document.name}" in lines]
    copies = [d.name for d in present if digest(d) in digests and corpus.is_copy(d, shingles)]
    return named + copies


def long_lines(text: str) -> set[str]:
    """Lines that say something, without white space and comments (licences are in many files)."""
    lines = ("".join(line.split()) for line in text.splitlines())
    return {line for line in lines if len(line) >= 30 and not line.startswith("#")}


def test_split_is_fixed() -> None:
    # the built-in model was trained on this split: another one would show it its test
    names = {
        "test": "json importlib decimal _pydecimal dis queue platform xmlrpc zipimport secrets",
        "validation": "ast re dataclasses fractions shlex tarfile tempfile webbrowser zoneinfo gzip",
        "train": "argparse asyncio collections datetime _pydatetime email http logging typing unittest",
    }
    for split, modules_of in names.items():
        assert {corpus.split_of(name) for name in modules_of.split()} == {split}, split
    assert corpus.split_of("json.decoder") == corpus.split_of("_json") == corpus.split_of("json")


def test_split_has_something_of_each() -> None:
    size = {split: sum(len(d.text) for d in documents) for split, documents in corpus.standard_library().items()}
    assert size["train"] > 5_000_000 and size["validation"] > 400_000 and size["test"] > 400_000


def test_no_training_document_repeats_held_out_text() -> None:
    splits = corpus.standard_library()
    test = set().union(*(corpus.shingles(document.text) for document in splits["test"]))
    validation = set().union(*(corpus.shingles(document.text) for document in splits["validation"]))
    assert not [d.name for d in splits["train"] if corpus.is_copy(d, test | validation)]
    assert not [d.name for d in splits["validation"] if corpus.is_copy(d, test)]
    texts = {split: {document.text for document in documents} for split, documents in splits.items()}
    assert not texts["train"] & (texts["validation"] | texts["test"]) and not texts["validation"] & texts["test"]


def repeats(training: list[Document], held: list[Document]) -> list[str]:
    """Training documents that are mostly lines of a held-out one, or hold much of one: by another measure than the one that
    splits, single lines in any order."""
    lines = {document.name: long_lines(document.text) for document in held}
    origins = defaultdict(set)
    for name, those in lines.items():
        for line in those:
            origins[line].add(name)
    found = []
    for document in training:
        own = long_lines(document.text)
        for name, count in Counter(name for line in own for name in origins.get(line, ())).items():
            if (len(own) >= 10 and count >= 0.5 * len(own)) or (
                len(lines[name]) >= 10 and count >= 0.25 * len(lines[name])
            ):
                found.append(f"{document.name} repeats {name}")
    return found


def test_no_training_document_holds_the_lines_of_a_held_out_one() -> None:
    splits = corpus.standard_library()
    assert repeats(splits["train"], splits["test"] + splits["validation"]) == []
    planted = Document("large", "\n".join(d.text for d in splits["train"][:40]) + splits["test"][0].text)
    assert repeats([planted], splits["test"]) != []


def names_of(split: str, count: int) -> list[str]:
    return [name for name in (f"module{i}" for i in range(1000)) if corpus.split_of(name) == split][:count]


def source(seed: int, functions: int = 30) -> str:
    rng = random.Random(seed)
    line = "    value_{0} = argument_{0} + {1}\n"
    heads = (f"def function_{seed}_{i}(argument):\n" for i in range(functions))
    return "\n".join(head + "".join(line.format(j, rng.random()) for j in range(8)) for head in heads)


def test_copies_under_other_names_are_left_out() -> None:
    (test, test_copy), (validation, validation_copy) = names_of("test", 2), names_of("validation", 2)
    fresh, copied, renamed, vendored, partial, echo = names_of("train", 6)
    edited = "# vendored\n" + source(1).replace("(argument)", "(argument: float) -> None").replace("\n", "  \n")
    documents = [
        Document(test, source(1)),
        Document(validation, source(2)),
        Document(validation_copy, source(1)),  # a validation module that repeats a test one
        Document(test_copy, source(1)),  # within the test split nothing is lost
        Document(fresh, source(3)),
        Document(copied, source(1)),
        Document(renamed, source(2).upper().lower()),
        Document(vendored, edited),
        Document(partial, source(4) + source(1, functions=8)),
        Document(echo, source(5)),
    ]
    splits = {split: [d.name for d in group] for split, group in corpus.split_documents(documents).items()}
    assert splits == {"test": [test, test_copy], "validation": [validation], "train": [fresh, echo]}


def test_copies_of_what_was_itself_left_out_of_validation_are_left_out() -> None:
    """A validation module dropped as a copy of a test one has lines of its own: they are not evaluated on, so may be trained on."""
    (test,), (dropped,), (twin,) = names_of("test", 1), names_of("validation", 1), names_of("train", 1)
    documents = [Document(test, source(1)), Document(dropped, source(1) + source(2)), Document(twin, source(2))]
    splits = corpus.split_documents(documents)
    assert [d.name for d in splits["validation"]] == [] and [d.name for d in splits["train"]] == [twin]


def test_what_is_read_and_what_is_not(tmp_path: Path) -> None:
    text = source(1)
    for name in ("a.py", "pack/__init__.py", "pack/b.py", "test/c.py", "pack/tests/d.py", "site-packages/e.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    (tmp_path / "_sysconfigdata_linux.py").write_text(text)
    (tmp_path / "short.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(text.encode() + b"# \xe9\n")
    assert [document.name for document in corpus.read_documents(tmp_path)] == ["a", "pack", "pack.b"]


def test_manifest_check_finds_planted_leaks() -> None:
    module = max(held_out(), key=lambda document: len(document.text))
    vendored = Document("vendor.copy", "# vendored\n" + module.text)
    fresh = Document("fresh", source(7))
    assert leaks([f"{digest(module)} {module.name}\n"], []) == [module.name]
    assert leaks([f"{digest(vendored)} {vendored.name}\n", f"{digest(fresh)} fresh\n"], [vendored, fresh]) == [
        "vendor.copy"
    ]
    assert leaks([f"{digest(fresh)} {module.name}\n"], [vendored, fresh]) == []  # another version of it, under its name


@pytest.mark.skipif(not MANIFEST.exists(), reason="the built-in model is not trained yet")
def test_built_in_model_was_trained_on_nothing_held_out() -> None:
    """Of the documents in the manifest, those that this environment has: all of them where the model was trained, most of
    them wherever what constraints.txt pins is installed."""
    lines = MANIFEST.read_text().splitlines()
    assert lines and all(len(line.split()) == 2 and len(line.split()[0]) == 16 for line in lines)
    present = modules("stdlib") + modules("purelib")
    assert leaks(lines, present) == []
    digests = {line.split()[0] for line in lines}
    trained = {digest(document): document for document in present if digest(document) in digests}
    assert len(trained) > 0.5 * len(digests)
    assert repeats([*trained.values()], held_out()) == []
