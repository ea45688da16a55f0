"""Rows to tokens, with a tokenizer of bytes: one token a character of ASCII text."""

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from texts import BOS, EOS, INSTRUCTION, PROMPT, TURNS, WITHOUT_INPUT, make_tokenizer, text_of
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from losa import data, sources
from losa.data import IGNORED, Example
from losa.demo import corpus
from losa.errors import LosaError


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


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
    examples = data.training_examples(path, tokenizer, 2, 512, seed=0, loss_on="answer")
    with pytest.raises(LosaError, match="has 2 rows to train on"):
        data.training_examples(path, tokenizer, 3, 512, seed=0, loss_on="answer")
    answers = {text_of(tokenizer, e.labels[e.labels != IGNORED]) for e in examples}
    assert answers == {"3</s>", "Hello</s>"}
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
    examples = data.training_examples(write(name, content), tokenizer, 15, length, seed=0)
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


@pytest.mark.parametrize("name", ["a.txt", "a.json", "mixed.json"])
def test_text_has_no_answers(write: Callable[..., str], tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Running text or rows, and running text with some rows of prompts, which packing would lose."""
    rows = [{"text": "x" * (100 if name == "mixed.json" else 20)}] * 500 + [INSTRUCTION] * (name == "mixed.json")
    path, seed = write(name, "x" * 5000 if name == "a.txt" else rows), 0
    if name == "mixed.json":
        seed = next(
            s for s in range(99) if not any(r.prompt for r in [*data._shuffled(path, "train", tokenizer, s)][:64])
        )
    with pytest.raises(LosaError, match="text without answers, as far as"):
        data.training_examples(path, tokenizer, 10, 50, seed, loss_on="answer")
    assert len(data.training_examples(path, tokenizer, 10, 50, seed)) == 10


@pytest.mark.parametrize(("most", "width"), [(0, 3), (2, 3), (3, 3), (5, 5), (16, 16), (100, 16)])
def test_collate_pads_on_the_right(most: int, width: int) -> None:
    long = Example(torch.tensor([5, 6, 7]), torch.tensor([IGNORED, 6, 7]))
    short = Example(torch.tensor([8, 9]), torch.tensor([8, 9]))
    batch = data.collate([long, short], 1, most)
    more = width - 3
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7] + [1] * more, [8, 9, 1] + [1] * more],
        "attention_mask": [[1, 1, 1] + [0] * more, [1, 1, 0] + [0] * more],
        "labels": [[IGNORED, 6, 7] + [IGNORED] * more, [8, 9, IGNORED] + [IGNORED] * more],
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
