"""Where text comes from: the hub, local files or the built-in demo, all read as rows of prompt and answer.

A source is a name in SOURCES, a local file, or `owner/name[:split]` on the hub. Plain text is an answer without a prompt.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from losa import registry
from losa.demo import corpus
from losa.errors import LosaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Purpose = Literal["calibrate", "train", "evaluate"]
NESTED = "its JSON is nested too deeply to be read"
LONG = "its JSON has a number of more digits than can be read"  # no other JSON that is well formed is a ValueError
PIECE = 1_000_000  # characters: the longest piece of a .txt file


class Row(NamedTuple):
    prompt: str
    answer: str


class Hub(NamedTuple):
    """A dataset on the hub: arguments of datasets.load_dataset to learn from and to be measured on."""

    learn: dict[str, Any]
    measure: dict[str, Any] | None
    measured_rows: int | None = None  # None: all
    continuous: bool = False  # rows are text to be packed, not examples of their own


# one file named alone is its dataset's "train" split, whatever it holds
C4 = {"path": "allenai/c4", "split": "train", "streaming": True}
WIKITEXT = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
SOURCES: dict[str, Hub | str] = {
    # the shards and the 1100 documents SparseGPT and Wanda read
    "c4": Hub(
        learn=C4 | {"data_files": "en/c4-train.00000-of-01024.json.gz"},
        measure=C4 | {"data_files": "en/c4-validation.00000-of-00008.json.gz"},
        measured_rows=1100,
        continuous=True,
    ),
    "wikitext2": Hub(
        learn=WIKITEXT | {"split": "train"},
        measure=WIKITEXT | {"split": "test"},
        continuous=True,
    ),
    "alpaca-gpt4": Hub(learn={"path": "vicgalle/alpaca-gpt4", "split": "train"}, measure=None),
    # splits of losa.demo.corpus
    "demo": "train",
    "demo:validation": "validation",
    "demo:test": "test",
}
SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:\w+)?")

# Stanford Alpaca's wording, with the line end before the response that alpaca-lora and Alpaca-GPT4 have
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
FIELDS = "text; instruction and output; instruction and instances; or messages"


def check_source(source: str, purpose: Purpose | None = None) -> None:
    """Raise LosaError for what can be known of a source before a model loads: no such name, no file, nothing in it.

    With `purpose`, for one that cannot serve it, too: to learn from what is held out, to evaluate on what has no test.
    """
    place = place_of(source)
    if purpose:
        _check_purpose(source, purpose)
    if place == "file":
        for where, record in read_records(Path(os.path.expanduser(source)), "calibrate"):
            _format(record, where)
            return
        raise LosaError(f"{source!r} is empty")


def load_rows(source: str, purpose: Purpose, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Iterator[Row]:
    """The rows of a source in its own order, one at a time; blank ones only where they count (evaluation).

    `purpose` decides the split of a named source. `tokenizer` is needed for rows with `messages`, whose chat template
    it has. Raises LosaError for a source that cannot be read, naming the line or row.
    """
    place = place_of(source)
    _check_purpose(source, purpose)
    if place == "demo":
        return (Row("", document.text) for document in corpus.standard_library()[str(SOURCES[source])])
    if place == "file":
        records = read_records(Path(os.path.expanduser(source)), purpose)
    else:
        records = _read_hub(source, purpose)
        if source == "wikitext2" and purpose != "evaluate":
            records = _articles(records)
    rows = (row for where, record in records for row in _rows(record, where, tokenizer))
    return rows if purpose == "evaluate" else (row for row in rows if row.answer.strip())


def _check_purpose(source: str, purpose: Purpose) -> None:
    known = SOURCES.get(source)
    if known in ("validation", "test") and purpose != "evaluate":
        raise LosaError(f"{source!r} is held out for evaluation: {purpose} with 'demo'")
    if isinstance(known, Hub) and known.measure is None and purpose == "evaluate":
        raise LosaError(f"{source!r} has no part to evaluate on: name another source, such as wikitext2")


def place_of(source: str) -> Literal["demo", "named", "file", "hub"]:
    """What kind of source it is. Raises LosaError if it is none, or a file that is not there or not of a known type."""
    if source in SOURCES:
        return "named" if isinstance(SOURCES[source], Hub) else "demo"
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        raise LosaError(f"{source!r} is a folder: expected a file ({', '.join(SUFFIXES)})")
    if path.exists():
        if path.suffix not in SUFFIXES:
            raise registry.unknown(f"file type of {source!r},", path.suffix, SUFFIXES)
        return "file"
    pathlike = source.startswith(("/", ".", "~")) or ("/" in source and path.parent.is_dir())
    if pathlike or path.suffix in SUFFIXES:
        others = [str(p) for p in path.parent.glob("*") if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        near = difflib.get_close_matches(source, others, n=1)
        raise LosaError(f"file {source!r} does not exist" + (f": did you mean {near[0]!r}?" if near else ""))
    if HUB_NAME.fullmatch(source):
        return "hub"
    raise registry.unknown("data source", source, [*SOURCES, "FILE" + "|".join(SUFFIXES), "OWNER/NAME[:SPLIT]"])


def same_text(measured: str, learnt: str) -> bool:
    """Whether evaluation on one source reads what is learnt from the other, as far as their names tell."""
    place = place_of(measured)
    if place != place_of(learnt):
        return False
    if place == "file":
        return os.path.samefile(os.path.expanduser(measured), os.path.expanduser(learnt))
    if place == "hub":
        return _part(measured, "evaluate") == _part(learnt, "train")
    return place == "demo" and measured == learnt  # named ones are measured on a part of their own


def read_records(path: Path, purpose: Purpose) -> Iterator[tuple[str, Any]]:
    """The records of a local file, each with the words for where it stands. Raises LosaError if it cannot be read."""
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif path.suffix == ".jsonl":
            yield from _read_lines(path)
        elif path.suffix == ".json":
            yield from _read_json(path)
        else:
            for piece in _read_text(path, whole=purpose == "evaluate"):
                yield str(path), {"text": piece}
    except UnicodeDecodeError as error:
        raise LosaError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise LosaError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_text(path: Path, whole: bool) -> Iterator[str]:
    """The text of a file; one of many megabytes in pieces that end with a line, unless `whole`."""
    with path.open(encoding="utf-8-sig") as file:
        while piece := file.read() if whole else file.read(PIECE) + file.readline():
            if piece.strip():
                yield piece


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    raise LosaError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
                except ValueError:
                    raise LosaError(f"{where}: {LONG}") from None
                except RecursionError:
                    raise LosaError(f"{where}: {NESTED}") from None


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of records, one record, or, as the hub names many of its files, one record a line."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_lines(path)
            return
        raise LosaError(f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except ValueError:
        raise LosaError(f"{path}: {LONG}") from None
    except RecursionError:
        raise LosaError(f"{path}: {NESTED}") from None
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        yield f"{path}, row {number}", record


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            records = (record for batch in file.iter_batches(1024) for record in batch.to_pylist())
            for number, record in enumerate(records, 1):
                yield f"{path}, row {number}", record
    except pyarrow.ArrowException as error:
        raise LosaError(f"{path}: not a whole parquet file: {_first_line(error)}") from None


def _read_hub(source: str, purpose: Purpose) -> Iterator[tuple[str, Any]]:
    """The records of a dataset on the hub. Named ones are small and stay in the hub's cache; others are streamed."""
    known, rows = SOURCES.get(source), None
    if isinstance(known, Hub):
        arguments = known.measure if purpose == "evaluate" and known.measure else known.learn
        rows = known.measured_rows if purpose == "evaluate" else None
    else:
        name, split = _part(source, purpose)
        arguments = {"path": name, "split": split, "streaming": True}
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise LosaError(f"{source!r} needs the package datasets: pip install datasets, or name a local file") from None
    try:
        for number, record in enumerate(islice(datasets.load_dataset(**arguments), rows), 1):
            yield f"{source}, row {number}", record
    except Exception as error:  # network, hub, cache and formats each have their own; the user's way out is the same
        reason = f"{type(error).__name__}: {_first_line(error)}"
        message = f"cannot read {arguments['path']!r} from the Hugging Face hub ({reason})"
        raise LosaError(f"{message}: check the name and the network, or name a local file") from error


def _part(source: str, purpose: Purpose) -> tuple[str, str]:
    """Name and split of a dataset on the hub."""
    name, _, split = source.partition(":")
    # never the training split where one is to be measured: a missing test split is the user's to settle
    return name, split or ("test" if purpose == "evaluate" else "train")


def _articles(records: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """WikiText's lines put together to articles, with the blank lines between them that its evaluation has."""
    lines: list[str] = []
    first = ""
    for where, record in records:
        if re.fullmatch(r" = (?!=).+ = \n?", record["text"]) and lines:
            yield first, {"text": "\n\n".join(lines)}
            lines = []
        first = first if lines else where
        lines.append(record["text"])
    yield first, {"text": "\n\n".join(lines)}


# ------------------------------------------------------------------------------------------------- records to rows


def _format(record: Any, where: str) -> Literal["messages", "instances", "instruction", "text"]:
    """Which of the known forms a record has. Raises LosaError naming the fields it has."""
    if not isinstance(record, dict):
        raise LosaError(f"{where}: expected an object with fields, got {type(record).__name__}")
    if "messages" in record:
        return "messages"
    if "instruction" in record and "instances" in record:
        return "instances"
    # before text: Alpaca-GPT4 has both, and text does not say where the answer begins
    if "instruction" in record and "output" in record:
        return "instruction"
    if "text" in record:
        return "text"
    raise LosaError(f"{where}: has the fields {', '.join(map(str, record)) or '(none)'}: expected {FIELDS}")


def _rows(record: Any, where: str, tokenizer: "PreTrainedTokenizerBase | None") -> list[Row]:
    form = _format(record, where)
    if form == "messages":
        return [_chat(record["messages"], where, tokenizer)]
    if form == "text":
        return [Row("", _string(record, "text", where))]
    pairs = record["instances"] if form == "instances" else [record]
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise LosaError(f"{where}: instances is not a list of objects with input and output")
    instruction = _string(record, "instruction", where)
    rows = []
    for pair in pairs:
        given = _string(pair, "input", where) if pair.get("input") else ""
        template = ALPACA_INPUT if given.strip() else ALPACA
        rows.append(Row(template.format(instruction=instruction, input=given), _string(pair, "output", where)))
    return rows


def _string(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise LosaError(f"{where}: {name} is not text: {value!r:.40}")
    return value


def _chat(messages: Any, where: str, tokenizer: "PreTrainedTokenizerBase | None") -> Row:
    """A conversation through the chat template; its last assistant turn is the answer."""
    if tokenizer is None or not tokenizer.chat_template:
        raise LosaError(f"{where}: has messages, but the tokenizer has no chat template")
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise LosaError(f"{where}: messages is not a list of turns with role and content")
    last = max((i for i, turn in enumerate(messages) if turn.get("role") == "assistant"), default=None)
    if last is None:
        raise LosaError(f"{where}: messages has no turn of the assistant")
    import jinja2

    try:
        text = str(tokenizer.apply_chat_template(messages[: last + 1], tokenize=False))
        prompt = ""
        if last:
            prompt = str(tokenizer.apply_chat_template(messages[:last], tokenize=False, add_generation_prompt=True))
    except (jinja2.TemplateError, KeyError, TypeError, ValueError) as error:
        raise LosaError(f"{where}: the chat template refuses it: {_first_line(error)}") from None
    # Some templates open the answer otherwise than the prompt for it (a thought, say): what they share is the prompt
    cut = len(os.path.commonprefix([text, prompt]))
    if tokenizer.eos_token and text.rstrip().endswith(tokenizer.eos_token):
        text = text.rstrip().removesuffix(tokenizer.eos_token)  # training adds it
    return Row(text[:cut], text[cut:])


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "no reason given")
