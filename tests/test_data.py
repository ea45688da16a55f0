"""Sources to rows to tokens, on files written here and a tokenizer of bytes: one token a character of ASCII text."""

import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from losa import data, sources
from losa.data import IGNORED, Example
from losa.demo import corpus
from losa.errors import LosaError
from losa.sources import Row

BOS, EOS = "<s>", "</s>"
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
CHAT_PROMPT = CHAT + "{% if add_generation_prompt %}[assistant]{% endif %}"


def make_tokenizer(
    bos: bool = False, merges: tuple[tuple[str, str], ...] = (), **options: Any
) -> PreTrainedTokenizerFast:
    tokens = [BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, 0)])
    names = {"bos_token": BOS, "eos_token": EOS} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)  # type: ignore[no-untyped-call]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes text as it is, or records in the format of the file's name; returns the path."""

    def write(name: str, content: Any) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(content), path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        else:
            path.write_text(json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """In place of the hub: `records` are what every dataset holds, `calls` what was asked for, `read` how many rows."""
    state: dict[str, Any] = {"calls": [], "records": [], "read": 0}

    def load_dataset(**arguments: Any) -> Iterator[Any]:
        state["calls"].append(arguments)
        for record in state["records"]:
            state["read"] += 1
            if isinstance(record, Exception):
                raise record
            yield record

    import datasets  # type: ignore[import-untyped]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    yield state


def text_of(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> str:
    return str(tokenizer.decode(ids))


# --------------------------------------------------------------------------------------------- rows

INSTRUCTION = {"instruction": "Add.", "input": "1 2", "output": "3"}
WITHOUT_INPUT = {"instruction": "Greet.", "input": "", "output": "Hello"}
PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response"
    " that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nGreet.\n\n### Response:\n"
)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("record", "rows"),
    [
        ({"text": "abc", "id": 1}, [Row("", "abc")]),
        (INSTRUCTION, [Row(PROMPT, "3")]),
        (WITHOUT_INPUT, [Row(PROMPT_WITHOUT_INPUT, "Hello")]),
        (WITHOUT_INPUT | {"input": None}, [Row(PROMPT_WITHOUT_INPUT, "Hello")]),
        # Alpaca-GPT4 has a text as well, which would not say where the answer begins
        (INSTRUCTION | {"text": "all of it"}, [Row(PROMPT, "3")]),
        (
            {
                "instruction": "Add.",
                "instances": [{"input": "1 2", "output": "3"}, {"input": "1 2", "output": "three"}],
            },
            [Row(PROMPT, "3"), Row(PROMPT, "three")],
        ),
    ],
)
def test_forms_of_rows(write: Callable[..., str], suffix: str, record: dict[str, Any], rows: list[Row]) -> None:
    path = write(f"rows.{suffix}", [record, record])
    assert list(sources.load_rows(path, "train")) == rows + rows
    sources.check_source(path)


def test_text_file_is_one_document(write: Callable[..., str]) -> None:
    assert list(sources.load_rows(write("a.txt", "one\n\ntwo\n"), "train")) == [Row("", "one\n\ntwo\n")]


def test_large_text_file_comes_in_pieces_of_whole_lines(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE", 25)
    text = "".join(f"line {i}\n" for i in range(40))
    pieces = [row.answer for row in sources.load_rows(write("a.txt", text), "train")]
    assert "".join(pieces) == text and len(pieces) > 5 and all(piece.endswith("\n") for piece in pieces)
    assert [row.answer for row in sources.load_rows(write("a.txt", text), "evaluate")] == [text]


def test_json_may_be_lines_one_record_or_have_a_byte_order_mark(write: Callable[..., str]) -> None:
    lines = '{"text": "a"}\n\n{"text": "b"}\n'
    for name in ("a.json", "a.jsonl"):
        assert list(sources.load_rows(write(name, lines), "train")) == [Row("", "a"), Row("", "b")]
        assert list(sources.load_rows(write(name, b'\xef\xbb\xbf{"text": "a"}'), "train")) == [Row("", "a")]
    assert list(sources.load_rows(write("a.txt", b"\xef\xbb\xbfabc"), "train")) == [Row("", "abc")]


def test_blank_rows_count_for_evaluation_only(write: Callable[..., str]) -> None:
    path = write("a.jsonl", [{"text": "a"}, {"text": " "}, {"text": "b"}])
    assert [row.answer for row in sources.load_rows(path, "evaluate")] == ["a", " ", "b"]
    assert [row.answer for row in sources.load_rows(path, "train")] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            [{"text": "x"}, {"goal": "g", "sol1": "s"}],
            "line 2: has the fields goal, sol1: expected text; inst",
        ),
        (
            "a.json",
            [{"text": "x"}, {"goal": "g", "sol1": "s"}],
            "row 2: has the fields goal, sol1: expected text; inst",
        ),
        ("a.parquet", [{"goal": "g", "sol1": "s"}], "row 1: has the fields goal, sol1: expected text; instruction"),
        ("a.json", [{}], r"row 1: has the fields \(none\)"),
        ("a.json", ["text"], "row 1: expected an object with fields, got str"),
        ("a.json", [{"text": 3}], "row 1: text is not text: 3"),
        ("a.json", [{"instruction": "i", "output": None}], "row 1: output is not text: None"),
        ("a.json", [{"instruction": "i", "instances": {}}], "row 1: instances is not a list"),
        ("a.json", [{"messages": [{"role": "user", "content": "x"}]}], "row 1: has messages, but .* no chat template"),
        ("a.jsonl", '{"text": "a"}\n{"text": }\n', "line 2: not JSON: Expecting value at column 10"),
        ("a.json", '[\n{"text": "a"},\n{"text" "b"}]', "line 3: not JSON"),
        ("a.jsonl", '{"text": "a"}\n{"text": "cut of', "line 2: not JSON: Unterminated string"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000, "line 2: its JSON is nested too deeply"),
        ("a.json", '{"text":' * 100_000, "its JSON is nested too deeply"),
        ("a.txt", b"abc\xff", "not UTF-8 text .* at byte 3"),
        ("a.parquet", b"PAR1 cut off", "not a whole parquet file"),
    ],
)
def test_bad_file_names_the_place(write: Callable[..., str], name: str, content: Any, message: str) -> None:
    path = write(name, content)
    with pytest.raises(LosaError, match=message) as caught:
        list(sources.load_rows(path, "train"))
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_truncated_parquet(write: Callable[..., str]) -> None:
    path = Path(write("a.parquet", [{"text": "abc" * 100}] * 100))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LosaError, match="not a whole parquet file"):
        sources.check_source(str(path))


# --------------------------------------------------------------------------------------------- chat templates

TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4"},
]


@pytest.mark.parametrize(
    ("template", "turns", "row"),
    [
        (CHAT_PROMPT, TURNS, Row("[user]hi</s>\n[assistant]yes?</s>\n[user]2+2</s>\n[assistant]", "4")),
        (CHAT_PROMPT, TURNS[:3], Row("[user]hi</s>\n[assistant]", "yes?")),  # what follows the last answer is left out
        (CHAT_PROMPT, TURNS[1:2], Row("", "[assistant]yes?")),
        # a template that asks for a thought where the data has none
        (
            CHAT + "{% if add_generation_prompt %}[assistant]<think>{% endif %}",
            TURNS[:2],
            Row("[user]hi</s>\n[assistant]", "yes?"),
        ),
    ],
)
def test_messages(write: Callable[..., str], template: str, turns: list[dict[str, str]], row: Row) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    path = write("a.json", [{"messages": turns}])
    sources.check_source(path)  # before there is a tokenizer
    assert list(sources.load_rows(path, "train", tokenizer)) == [row]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (TURNS[:1], "row 1: messages has no turn of the assistant"),
        ("hi", "row 1: messages is not a list of turns"),
        ([{"role": "assistant", "content": "stop"}], "row 1: the chat template refuses it: roles must alternate"),
    ],
)
def test_bad_messages(write: Callable[..., str], messages: Any, message: str) -> None:
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(LosaError, match=message):
        list(sources.load_rows(write("a.json", [{"messages": messages}]), "train", tokenizer))


def test_tokenizer_without_chat_template(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(LosaError, match="row 1: has messages, but the tokenizer has no chat template"):
        data.training_examples(write("a.json", [{"messages": TURNS}]), tokenizer, 1, 8, 0)


def test_first_token_written_by_template_and_tokenizer_stands_once(write: Callable[..., str]) -> None:
    tokenizer = make_tokenizer(bos=True, chat_template="{{ bos_token }}" + CHAT_PROMPT)
    path = write("a.json", [{"messages": TURNS[:2]}])
    (example,) = data.training_examples(path, tokenizer, 1, 100, 0, "answer")
    assert text_of(tokenizer, example.input_ids) == "<s>[user]hi</s>\n[assistant]yes?</s>"
    assert text_of(tokenizer, example.labels[example.labels != IGNORED]) == "yes?</s>"


# --------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikitext-2", "unknown data source 'wikitext-2': did you mean 'wikitext2'"),
        ("demo:tset", "did you mean 'demo:test'"),
        ("zzz", "unknown data source 'zzz': known: .*c4"),
        ("corpus.jsonl", "file 'corpus.jsonl' does not exist"),
        ("./nowhere", "file './nowhere' does not exist"),
        ("/nowhere/a.txt", "file '/nowhere/a.txt' does not exist"),
        ("", "unknown data source ''|is a folder"),
    ],
)
def test_unknown_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LosaError, match=message):
        sources.check_source(source)
    with pytest.raises(LosaError, match=message):
        sources.load_rows(source, "train")


def test_wrong_paths(write: Callable[..., str], tmp_path: Path) -> None:
    path = write("train.jsonl", [{"text": "a"}])
    cases = {
        path.replace("train", "trian"): f"did you mean '{path}'",
        write("rows.jsn", "[]"): "unknown file type of .*'.jsn': did you mean '.json'",
        str(tmp_path): "is a folder",
        write("empty.txt", ""): "is empty",
        write("blank.txt", " \n\n"): "is empty",
        write("empty.json", ""): "is empty",
        write("none.json", []): "is empty",
        write("empty.jsonl", "\n"): "is empty",
    }
    for source, message in cases.items():
        with pytest.raises(LosaError, match=message):
            sources.check_source(source)


def test_good_sources_pass() -> None:
    for source in [*sources.SOURCES, "someone/data", "someone/data-v1.5:validation"]:
        sources.check_source(source)


def test_held_out_text_is_only_evaluated_on(tokenizer: PreTrainedTokenizerFast) -> None:
    for source, purpose in itertools.product(["demo:validation", "demo:test"], ["calibrate", "train"]):
        with pytest.raises(LosaError, match="held out for evaluation"):
            sources.check_source(source, purpose)  # type: ignore[arg-type]
    with pytest.raises(LosaError, match="held out for evaluation"):
        data.training_examples("demo:test", tokenizer, 1, 8, 0)
    with pytest.raises(LosaError, match="'alpaca-gpt4' has no part to evaluate on"):
        data.evaluation_tokens("alpaca-gpt4", tokenizer)


WIKITEXT = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}


@pytest.mark.parametrize(
    ("source", "purpose", "arguments"),
    [
        ("c4", "calibrate", sources.C4 | {"data_files": "en/c4-train.00000-of-01024.json.gz"}),
        ("c4", "evaluate", sources.C4 | {"data_files": "en/c4-validation.00000-of-00008.json.gz"}),
        ("wikitext2", "calibrate", WIKITEXT | {"split": "train"}),
        ("wikitext2", "train", WIKITEXT | {"split": "train"}),
        ("wikitext2", "evaluate", WIKITEXT | {"split": "test"}),
        ("alpaca-gpt4", "train", {"path": "vicgalle/alpaca-gpt4", "split": "train"}),
        ("a/b", "train", {"path": "a/b", "split": "train", "streaming": True}),
        ("a/b", "evaluate", {"path": "a/b", "split": "test", "streaming": True}),
        ("a/b:half", "evaluate", {"path": "a/b", "split": "half", "streaming": True}),
    ],
)
def test_what_is_asked_of_the_hub(hub: dict[str, Any], source: str, purpose: Any, arguments: dict[str, Any]) -> None:
    hub["records"] = [{"text": "abc"}] * 2000
    rows = list(sources.load_rows(source, purpose))
    assert hub["calls"] == [arguments] and rows[0].answer.startswith("abc")
    assert len(rows) == {("c4", "evaluate"): 1100}.get((source, purpose), len(rows))


@pytest.mark.parametrize("records", [[], [{"text": "a"}]])
def test_hub_out_of_reach(hub: dict[str, Any], records: list[Any]) -> None:
    hub["records"] = [*records, ConnectionError("Couldn't reach it\nat all")]
    with pytest.raises(LosaError) as caught:
        list(sources.load_rows("c4", "train"))
    assert str(caught.value) == (
        "cannot read 'allenai/c4' from the Hugging Face hub (ConnectionError: Couldn't reach it): "
        "check the name and the network, or name a local file"
    )


def test_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LosaError, match="'a/b' needs the package datasets: pip install datasets, or name a local file"):
        list(sources.load_rows("a/b", "train"))


def test_wikitext_lines_are_put_together_to_articles(hub: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    lines = ["", " = One = \n", "", " a \n", " = = Part = = \n", " b \n", " = Two = \n", " c \n"]
    hub["records"] = [{"text": line} for line in lines]
    assert [row.answer for row in sources.load_rows("wikitext2", "train")] == [
        " = One = \n\n\n\n\n a \n\n\n = = Part = = \n\n\n b \n",
        " = Two = \n\n\n c \n",
    ]
    # evaluation: every line, blank ones too, as the published numbers have it
    assert text_of(tokenizer, data.evaluation_tokens("wikitext2", tokenizer)) == "\n\n".join(lines)


# --------------------------------------------------------------------------------------------- calibration


def documents(count: int, length: int) -> list[dict[str, str]]:
    """Texts in which every position is recognised: `<document>:<position>` over and over."""
    return [{"text": "".join(f"{i}:{j};" for j in range(length))[:length]} for i in range(count)]


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_calibration_cuts_long_documents(
    write: Callable[..., str], tokenizer: PreTrainedTokenizerFast, suffix: str
) -> None:
    texts = documents(20, 300) + [{"text": "short"}] * 50
    path = write(f"a.{suffix}", texts)
    tokens = data.calibration_tokens(path, tokenizer, 15, 100, seed=3)
    assert tokens.shape == (15, 100) and tokens.dtype == torch.int64
    origins = []
    for cut in (text_of(tokenizer, row) for row in tokens):
        (origin,) = [(i, t["text"].index(cut)) for i, t in enumerate(texts) if cut in t["text"]]
        origins.append(origin)
    assert len({i for i, _ in origins}) == 15  # fifteen documents ...
    assert len({start for _, start in origins}) > 8  # ... cut all over
    assert torch.equal(tokens, data.calibration_tokens(path, tokenizer, 15, 100, seed=3))
    assert not torch.equal(tokens, data.calibration_tokens(path, tokenizer, 15, 100, seed=4))


def test_document_of_just_the_length_is_long_enough(
    write: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = data.calibration_tokens(write("a.json", documents(3, 50)), tokenizer, 3, 50, seed=0)
    assert sorted(text_of(tokenizer, row) for row in tokens) == sorted(d["text"] for d in documents(3, 50))


def test_calibration_packs_short_documents(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [d["text"] for d in documents(50, 19)]
    path = write("a.json", [{"text": text} for text in texts])
    # 50 documents of 19 tokens and 49 ends between them: 999 tokens, nine windows of 110
    tokens = data.calibration_tokens(path, tokenizer, 9, 110, seed=0)
    windows = [text_of(tokenizer, row) for row in tokens]
    inner = [piece for window in windows for piece in window.split(EOS)[1:-1]]
    assert len(inner) >= 36 and len(set(inner)) == len(inner) and set(inner) <= set(texts)  # whole, none twice
    assert inner != sorted(inner, key=texts.index)  # not in the order of the file
    assert torch.equal(tokens, data.calibration_tokens(path, tokenizer, 9, 110, seed=0))
    assert not torch.equal(tokens, data.calibration_tokens(path, tokenizer, 9, 110, seed=1))


def test_one_long_document_gives_many_windows(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    (document,) = documents(1, 1000)
    tokens = data.calibration_tokens(write("a.txt", document["text"]), tokenizer, 9, 100, seed=0)
    starts = sorted(document["text"].index(text_of(tokenizer, row)) for row in tokens)
    assert all(b - a >= 100 for a, b in itertools.pairwise(starts))


def test_just_enough_and_one_too_few(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.json", documents(10, 9))  # 99 tokens with the ends between them
    assert data.calibration_tokens(path, tokenizer, 9, 11, seed=0).shape == (9, 11)
    with pytest.raises(LosaError, match=r"a.json' has 99 tokens of text, 10 sequences of 10 need 100"):
        data.calibration_tokens(path, tokenizer, 10, 10, seed=0)
    with pytest.raises(LosaError, match="has 0 tokens of text"):
        data.calibration_tokens(write("b.json", []), tokenizer, 1, 10, seed=0)


def test_streams_are_read_no_further_than_needed(
    hub: dict[str, Any], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "STREAMED_CHARACTERS", 5_000)
    monkeypatch.setattr(data, "BATCH_CHARACTERS", 1_000)
    monkeypatch.setattr(data, "POOL_TOKENS", 10_000)

    hub["records"] = documents(2_000, 50)
    assert data.calibration_tokens("c4", tokenizer, 20, 40, seed=0).shape == (20, 40)
    assert hub["read"] <= 200
    hub["read"] = 0
    assert data.calibration_tokens("c4", tokenizer, 20, 60, seed=0).shape == (20, 60)  # too short to cut: packed
    assert 200 <= hub["read"] <= 400
    hub["read"] = 0
    assert len(data.training_examples("c4", tokenizer, 20, 60, seed=0)) == 20
    assert 200 <= hub["read"] <= 400


def test_shuffling_ahead_gives_every_row_once(write: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHUFFLED_CHARACTERS", 100)
    path = write("a.json", documents(200, 10))
    rows = list(data._shuffled(path, "train", make_tokenizer(), seed=0))
    assert sorted(rows) == sorted(sources.load_rows(path, "train")) and rows != list(sources.load_rows(path, "train"))


# --------------------------------------------------------------------------------------------- training


def test_rows_are_examples_of_their_own(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"instruction": f"Say {i}.", "output": f"Number {i}"} for i in range(30)]
    path = write("a.jsonl", records)
    examples = data.training_examples(path, tokenizer, 30, 512, seed=0)
    texts = [text_of(tokenizer, example.input_ids) for example in examples]
    rows = [row.prompt + row.answer + EOS for row in sources.load_rows(path, "train")]
    assert sorted(texts) == sorted(rows) and texts != rows  # each once, in another order
    assert all(torch.equal(e.input_ids, e.labels) and e.labels.dtype == torch.int64 for e in examples)
    again = data.training_examples(path, tokenizer, 10, 512, seed=0)
    assert [text_of(tokenizer, e.input_ids) for e in again] == texts[:10]
    assert [text_of(tokenizer, e.input_ids) for e in data.training_examples(path, tokenizer, 30, 512, seed=1)] != texts


def test_loss_on_the_answer_only(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.json", [INSTRUCTION, WITHOUT_INPUT, {"text": "plain"}])
    examples = data.training_examples(path, tokenizer, 3, 512, seed=0, loss_on="answer")
    answers = {text_of(tokenizer, e.labels[e.labels != IGNORED]) for e in examples}
    assert answers == {"3</s>", "Hello</s>", "plain</s>"}
    for example in examples:
        kept = example.labels != IGNORED
        assert torch.equal(example.labels[kept], example.input_ids[kept])


def test_token_over_the_border_is_the_answers(write: Callable[..., str]) -> None:
    tokenizer = make_tokenizer(merges=(("u", "v"),), chat_template="{{ 'tuv' if messages|length > 1 else 'tu' }}")
    (example,) = data.training_examples(write("a.json", [{"messages": TURNS[:2]}]), tokenizer, 1, 8, 0, "answer")
    assert tokenizer.convert_ids_to_tokens(example.input_ids.tolist()) == ["t", "uv", EOS]
    assert example.labels.tolist() == [IGNORED, *example.input_ids[1:].tolist()]


def test_text_that_is_cut_has_no_end_token(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"instruction": "a", "output": "b" * n} for n in (1, 50)]
    fits = len(next(sources.load_rows(write("a.json", records), "train")).prompt) + 2
    examples = data.training_examples(write("a.json", records), tokenizer, 2, fits, seed=0)
    ends = {text_of(tokenizer, e.input_ids)[-6:] for e in examples}
    assert ends == {"\nb</s>", "nse:\nbb"[-6:]} and {len(e.input_ids) for e in examples} == {fits}


def test_answers_out_of_reach_are_passed_over(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"instruction": "a" * (1 if i % 3 else 500), "output": "yes"} for i in range(30)]
    path = write("a.json", records)
    examples = data.training_examples(path, tokenizer, 20, 400, seed=0, loss_on="answer")
    assert all((e.labels != IGNORED).any() for e in examples)
    message = (
        r"has 20 rows to train on \(10 more have no answer within 400 tokens\), train_samples asks for 21: lower it"
    )
    with pytest.raises(LosaError, match=message):
        data.training_examples(path, tokenizer, 21, 400, seed=0, loss_on="answer")
    assert len(data.training_examples(path, tokenizer, 30, 400, seed=0, loss_on="all")) == 30
    with pytest.raises(
        LosaError, match="has 30 rows to train on, train_samples asks for 31: lower it, or leave it out"
    ):
        data.training_examples(path, tokenizer, 31, 400, seed=0, loss_on="all")


@pytest.mark.parametrize(
    ("name", "length", "packed"), [("a.json", 64, True), ("a.json", 256, False), ("a.txt", 256, True)]
)
def test_running_text_is_packed(
    write: Callable[..., str], tokenizer: PreTrainedTokenizerFast, name: str, length: int, packed: bool
) -> None:
    texts = documents(20, 200)
    content = texts if name == "a.json" else "\n".join(t["text"] for t in texts)
    examples = data.training_examples(write(name, content), tokenizer, 15, length, seed=0, loss_on="answer")
    assert len(examples) == 15 and all(torch.equal(e.input_ids, e.labels) for e in examples)
    assert {len(e.input_ids) for e in examples} == ({length} if packed else {201})
    windows = [text_of(tokenizer, e.input_ids) for e in examples]
    assert len(set(windows)) == 15
    if name == "a.json":
        assert all(any(piece in t["text"] for t in texts) for window in windows for piece in window.split(EOS))


def test_too_little_running_text(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(LosaError, match="has 1000 tokens of text, 16 sequences of 64 need 1024"):
        data.training_examples(write("a.txt", "x" * 1000), tokenizer, 16, 64, seed=0)
    with pytest.raises(LosaError, match="has 50 tokens of text, 1 sequences of 64 need 64"):
        data.training_examples(write("a.txt", "x" * 50), tokenizer, 1, 64, seed=0)
    for asked in (1, None):
        with pytest.raises(LosaError, match="has 0 rows to train on"):
            data.training_examples(write("b.json", []), tokenizer, asked, 64, seed=0)
    with pytest.raises(LosaError, match="lower train_samples or train_length"):
        data.training_examples(write("a.txt", "x" * 50), tokenizer, None, 64, seed=0)


@pytest.mark.parametrize("name", ["a.json", "a.txt"])
def test_rows_that_nobody_counted_are_all_there_are(
    write: Callable[..., str], tokenizer: PreTrainedTokenizerFast, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"instruction": "a", "output": "b" * 20}] * 30
    path = write(name, records if name == "a.json" else "x" * 1000)
    there = 30 if name == "a.json" else 1000 // 64
    assert len(data.training_examples(path, tokenizer, None, 64, seed=0)) == there
    monkeypatch.setattr(data, "MOST_ROWS", 7)
    some = data.training_examples(path, tokenizer, None, 64, seed=0)
    asked = data.training_examples(path, tokenizer, 7, 64, seed=0)
    assert [e.input_ids.tolist() for e in some] == [e.input_ids.tolist() for e in asked]


def test_end_token_stands_once_where_the_tokenizer_adds_it(write: Callable[..., str]) -> None:
    tokenizer = make_tokenizer()
    ends = [(BOS, 0), (EOS, 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A {EOS}", special_tokens=ends)
    (example,) = data.training_examples(write("a.json", [INSTRUCTION]), tokenizer, 1, 512, 0, "answer")
    assert text_of(tokenizer, example.input_ids) == f"{BOS}{PROMPT}3{EOS}"
    assert text_of(tokenizer, example.labels[example.labels != IGNORED]) == f"3{EOS}"
    assert text_of(tokenizer, data.evaluation_tokens(write("a.txt", "text"), tokenizer)) == f"{BOS}text"


def test_packing_refuses_to_lose_the_prompt(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    path = write("a.json", [{"text": "x" * 100}] * 500 + [INSTRUCTION])
    seed = next(s for s in range(99) if not any(r.prompt for r in [*data._shuffled(path, "train", tokenizer, s)][:64]))
    with pytest.raises(LosaError, match="mixes running text and rows with prompts"):
        data.training_examples(path, tokenizer, 10, 50, seed, loss_on="answer")


def test_collate_pads_on_the_right() -> None:
    long = Example(torch.tensor([5, 6, 7]), torch.tensor([IGNORED, 6, 7]))
    short = Example(torch.tensor([8, 9]), torch.tensor([8, 9]))
    batch = data.collate([long, short], pad_id=1)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 1]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[IGNORED, 6, 7], [8, 9, IGNORED]],
    }


# --------------------------------------------------------------------------------------------- evaluation, the demo


def test_evaluation_joins_rows_with_blank_lines(write: Callable[..., str]) -> None:
    tokenizer = make_tokenizer(bos=True)
    tokens = data.evaluation_tokens(write("a.json", [{"text": "a"}, {"text": ""}, {"text": "b"}]), tokenizer)
    assert tokens.dtype == torch.int64 and text_of(tokenizer, tokens) == "<s>a\n\n\n\nb"


def test_too_short_to_evaluate(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(LosaError, match="gives 1 tokens to evaluate on, less than one window of 2"):
        data.evaluation_tokens(write("a.txt", "x"), tokenizer)
    with pytest.raises(LosaError, match="gives 0 tokens to evaluate on"):
        data.evaluation_tokens(write("b.json", [{"text": ""}, {"text": " "}]), tokenizer)
    with pytest.raises(LosaError, match="gives 5 tokens to evaluate on, less than one window of 9"):
        data.evaluation_tokens(write("a.txt", "hello"), tokenizer, window=9)


def test_demo_documents_are_joined_with_the_end_token(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {s: [corpus.Document(f"{s}{i}", f"{s} {i} " * 20) for i in range(4)] for s in corpus.SPLITS}
    monkeypatch.setattr(corpus, "standard_library", lambda: splits)
    for source, split in (("demo", "train"), ("demo:validation", "validation"), ("demo:test", "test")):
        text = text_of(tokenizer, data.evaluation_tokens(source, tokenizer))
        assert text == EOS.join(document.text for document in splits[split])
    cuts = data.calibration_tokens("demo", tokenizer, 4, 30, seed=0)
    examples = data.training_examples("demo", tokenizer, 15, 40, seed=0)
    assert {len(example.input_ids) for example in examples} == {40}
    for ids in [*cuts, *(example.input_ids for example in examples)]:
        assert "train" in text_of(tokenizer, ids)


def test_texts_longer_than_the_models_window_are_no_news(write: Callable[..., str]) -> None:
    records: list[logging.LogRecord] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Listener()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        path = write("a.txt", "x" * 100)
        data.evaluation_tokens(path, make_tokenizer(model_max_length=10))
        data.calibration_tokens(path, make_tokenizer(model_max_length=10), 2, 20, seed=0)
        data.training_examples(path, make_tokenizer(model_max_length=10), 2, 20, seed=0)
        assert not records
        make_tokenizer(model_max_length=10)("x" * 100)
        assert records  # the handler hears it where it is said
    finally:
        logger.removeHandler(handler)


def test_tokenizer_must_fit(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    data.check_tokenizer(tokenizer, 258)
    data.check_tokenizer(tokenizer, 300)  # embeddings are often padded
    with pytest.raises(LosaError, match="does not fit the model: it has 258 tokens, the embedding 257 rows"):
        data.check_tokenizer(tokenizer, 257)
    endless = make_tokenizer(eos_token=None)
    with pytest.raises(LosaError, match="no end-of-text token"):
        data.check_tokenizer(endless, 300)
    with pytest.raises(LosaError, match="no end-of-text token"):
        data.calibration_tokens(write("a.txt", "text"), endless, 1, 1, seed=0)
