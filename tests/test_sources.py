"""Sources to rows: files written here, datasets of the hub, chat templates."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from texts import INSTRUCTION, PROMPT, PROMPT_WITHOUT_INPUT, TURNS, WITHOUT_INPUT, make_tokenizer, text_of
from transformers import PreTrainedTokenizerFast

from losa import data, inputs, sources
from losa.data import IGNORED
from losa.errors import LosaError
from losa.recipe import Recipe
from losa.sources import Row

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
CHAT_PROMPT = CHAT + "{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


# --------------------------------------------------------------------------------------------- rows


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
        ("a.jsonl", '{"text": "a"}\n{"text": ' + "9" * 5000 + "}", "line 2: its JSON has a number of more digits than"),
        ("a.json", "[" + "9" * 5000 + "]", "its JSON has a number of more digits than can be read"),
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


@pytest.mark.parametrize(
    ("measured", "learnt", "same"),
    [
        ("demo", "demo", True),
        ("demo:test", "demo", False),
        ("c4", "c4", False),  # its validation text
        ("a/b", "a/b", False),  # its test split
        ("a/b:train", "a/b", True),
        ("a/b:half", "a/b:half", True),
        ("a/b:half", "a/c:half", False),
        ("rows.jsonl", "./rows.jsonl", True),
        ("rows.jsonl", "other.jsonl", False),
        ("rows.jsonl", "demo", False),
    ],
)
def test_text_that_is_learnt_from_is_not_unseen(
    measured: str, learnt: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "other.jsonl"):
        Path(name).write_text('{"text": "a"}')
    recipe = Recipe(calibration=learnt, train_data="wikitext2", eval_data=measured)
    told = "eval_data is the text of calibration: its perplexity is not that of unseen text" if same else ""
    assert inputs.not_held_out(recipe) == told
    assert inputs.not_held_out(recipe.at(eval_data="")) == ""
    recipe = Recipe(calibration=learnt, train_data=learnt, eval_data=measured)
    assert inputs.not_held_out(recipe) == told.replace("calibration", "calibration and train_data")
    assert inputs.not_held_out(recipe.at(recovery="none")) == told  # which reads no train_data


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
