"""Rows of text become what calibration, training and evaluation read: seeded tensors of tokens."""

import os
import random
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from losa.errors import LosaError
from losa.recipe import MOST_ROWS
from losa.sources import SOURCES, Hub, Purpose, Row, load_rows, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label torch's cross entropy leaves out
SHUFFLED_CHARACTERS = 200_000_000  # text held to be shuffled: all of most sources ...
STREAMED_CHARACTERS = 20_000_000  # ... and less of one that is downloaded as it is read
POOL_TOKENS = 8_000_000  # tokens among which windows are drawn at most, if fewer are needed
BATCH_CHARACTERS = 1_000_000  # text tokenized at once
LENGTHS = 16  # batches are as long as a multiple of it, where that is asked for


class Example(NamedTuple):
    input_ids: Tensor  # int64 [tokens]
    labels: Tensor  # int64 [tokens], IGNORED where the loss does not count


class Encoded(NamedTuple):
    ids: list[int]
    prompt: int  # so many of the ids are the prompt's
    has_prompt: bool


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Raise LosaError if the tokenizer can write ids beyond the `vocab_size` rows of the embedding, or has no end."""
    if len(tokenizer) > vocab_size:
        raise LosaError(
            f"the tokenizer does not fit the model: it has {len(tokenizer)} tokens, the embedding {vocab_size} rows"
        )
    _end(tokenizer)


def calibration_tokens(
    source: str, tokenizer: "PreTrainedTokenizerBase", samples: int, length: int, seed: int
) -> Tensor:
    """int64 [samples, length]: one random cut from each of `samples` documents that are long enough.

    A source with too few of those is packed: its documents end to end in seeded order, the end token between them, and
    `samples` different windows drawn from that. Reads no further than it must. Raises LosaError for too little text.
    """
    rng, end = random.Random(seed), _end(tokenizer)
    pool: list[Tensor] = []
    cuts: list[Tensor] = []
    pooled, enough = 0, max(samples * length + 1, POOL_TOKENS)  # + 1: the end token after the last document is cut off
    for encoded in _encode_rows(_shuffled(source, "calibrate", tokenizer, seed), tokenizer, prompts=False):
        tokens = torch.tensor([*encoded.ids, end], dtype=torch.int32)
        if len(encoded.ids) >= length:
            start = rng.randrange(len(encoded.ids) - length + 1)
            cuts.append(tokens[start : start + length])
            if len(cuts) == samples:
                return torch.stack(cuts).long()
        pool.append(tokens)
        pooled += len(tokens)
        if pooled >= enough:
            break
    return _windows(pool, source, samples, length, rng, "calibration_samples or sequence_length")


def training_examples(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    samples: int | None,
    length: int,
    seed: int,
    loss_on: Literal["all", "answer"] = "all",
) -> list[Example]:
    """`samples` examples of at most `length` tokens, in seeded order, none twice; None: all there are, MOST_ROWS at most.

    A row is an example: its text and the end token, or as much as fits; rows without any label within `length`, and for
    a loss over answers those without a prompt, are passed over. Running text (the demo, C4, WikiText-2, .txt, rows of
    `text` of which half or more are longer than `length`) is packed instead, and every example has exactly `length`
    tokens. Raises LosaError if there are too few, and for a loss over answers of text that has none.
    """
    most = samples or MOST_ROWS
    rng, end = random.Random(seed), _end(tokenizer)
    rows = _shuffled(source, "train", tokenizer, seed)
    encoded = _encode_rows(rows, tokenizer, prompts=loss_on == "answer")
    head = list(islice(encoded, 64))
    if head and loss_on == "answer" and not any(text.has_prompt for text in head):
        raise LosaError(
            f"{source!r} has text without answers, as far as {len(head)} rows tell: set loss_on to all, or give rows of "
            "instruction and output or of messages"
        )
    if head and _is_running_text(source, head, length):
        pool: list[Tensor] = []
        pooled, enough = 0, max(most * length + 1, POOL_TOKENS)
        for text in chain(head, encoded):
            pool.append(torch.tensor([*text.ids, end], dtype=torch.int32))
            pooled += len(text.ids) + 1
            if pooled >= enough:
                break
        if samples is None:
            samples = max(1, min(most, (pooled - 1) // length))
        return [
            Example(ids, ids.clone())
            for ids in _windows(pool, source, samples, length, rng, "train_samples or train_length")
        ]

    examples: list[Example] = []
    passed_over = 0
    for text in chain(head, encoded):
        # no end token where the text is cut: it does not end there
        ids = torch.tensor([*text.ids, end][:length])
        labels = ids.clone()
        labels[: text.prompt] = IGNORED
        unanswered = loss_on == "answer" and not text.has_prompt
        if unanswered or (labels[1:] == IGNORED).all():  # the first token is never predicted
            passed_over += 1
            continue
        examples.append(Example(ids, labels))
        if len(examples) == most:
            return examples
    if samples is None and examples:
        return examples
    note = f" ({passed_over} more have no answer within {length} tokens)" if passed_over else ""
    asked = f"train_samples asks for {samples}: lower it, or leave it out" if samples else "one is needed at least"
    raise LosaError(f"{source!r} has {len(examples)} rows to train on{note}, {asked}")


def collate(examples: list[Example], pad_id: int, most: int = 0) -> dict[str, Tensor]:
    """A batch, padded on the right: input_ids, attention_mask (1: a token) and labels, int64 [examples, tokens].

    As long as its longest example; or, up to `most`, as the next multiple of LENGTHS.
    """
    longest = max(len(e.input_ids) for e in examples)
    width = max(longest, min(most, -(-longest // LENGTHS) * LENGTHS))

    def padded(rows: Iterable[Tensor], value: int) -> Tensor:
        return torch.stack([F.pad(row, (0, width - len(row)), value=value) for row in rows])

    return {
        "input_ids": padded((e.input_ids for e in examples), pad_id),
        "attention_mask": padded((torch.ones_like(e.input_ids) for e in examples), 0),
        "labels": padded((e.labels for e in examples), IGNORED),
    }


def evaluation_tokens(source: str, tokenizer: "PreTrainedTokenizerBase", window: int = 2, limit: int = 0) -> Tensor:
    """int64 [tokens]: all text of a source, its rows joined with blank lines as perplexity on WikiText-2 has it.

    Of it only the first `limit` tokens if that is not 0. Documents of the demo are joined with the end token, as its
    model knows them. Raises LosaError if that is less than one window of `window` tokens.
    """
    texts = [row.prompt + row.answer for row in load_rows(source, "evaluate", tokenizer)]
    if place_of(source) == "demo":
        end = _end(tokenizer)
        ids = [token for document in _encode(texts, tokenizer) for token in (*document, end)][:-1]
    else:
        text = "\n\n".join(texts)
        ids = _encode([text], tokenizer)[0] if text.strip() else []
    ids = ids[:limit] if limit else ids
    if len(ids) < window:
        raise LosaError(
            f"{source!r} gives {len(ids)} tokens to evaluate on, less than one window of {window}: "
            "read more text, or lower the window (eval_window of a run, --window of losa evaluate)"
        )
    return torch.tensor(ids)


def _end(tokenizer: "PreTrainedTokenizerBase") -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise LosaError("the tokenizer does not fit the model: it has no end-of-text token (eos_token)")
    return end


def _shuffled(source: str, purpose: Purpose, tokenizer: "PreTrainedTokenizerBase", seed: int) -> Iterator[Row]:
    """The rows in seeded order. Of a source larger than the buffer, the order is random only that far ahead."""
    known = SOURCES.get(source)
    streamed = place_of(source) == "hub" or (isinstance(known, Hub) and known.learn.get("streaming", False))
    room = STREAMED_CHARACTERS if streamed else SHUFFLED_CHARACTERS
    rng = random.Random(seed)
    buffer: list[Row] = []
    for row in load_rows(source, purpose, tokenizer):
        if room > 0:
            room -= len(row.prompt) + len(row.answer)
            buffer.append(row)
        else:
            i = rng.randrange(len(buffer))
            yield buffer[i]
            buffer[i] = row
    rng.shuffle(buffer)
    yield from buffer


def _encode(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids with the first token the tokenizer's model expects, if any, and no end token."""
    if not texts:
        return []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    # verbose=False: that a text is longer than the model's window is no news here
    encoded: list[list[int]] = tokenizer(texts, verbose=False, return_attention_mask=False)["input_ids"]
    for ids in encoded:
        if ids[:2] == [bos, bos]:  # a chat template has written it too
            del ids[0]
        if ids[-1:] == [eos]:
            del ids[-1]
    return encoded


def _encode_rows(rows: Iterator[Row], tokenizer: "PreTrainedTokenizerBase", prompts: bool) -> Iterator[Encoded]:
    """The ids of each row's prompt and answer as one text; how many are the prompt's, if `prompts` (else 0)."""
    for batch in _batches(rows):
        texts = _encode([row.prompt + row.answer for row in batch], tokenizer)
        fronts = _encode([row.prompt for row in batch if row.prompt], tokenizer) if prompts else []
        front = iter(fronts)
        for row, ids in zip(batch, texts, strict=True):
            # Tokens may reach over the border: those are the answer's
            shared = len(os.path.commonprefix([ids, next(front)])) if prompts and row.prompt else 0
            yield Encoded(ids, shared, bool(row.prompt))


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows by the megabyte: tokenizers run over a list in parallel, and lists of ids are large."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.prompt) + len(row.answer)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_running_text(source: str, head: list[Encoded], length: int) -> bool:
    if any(text.has_prompt for text in head):
        return False
    known = SOURCES.get(source)
    continuous = isinstance(known, str) or (isinstance(known, Hub) and known.continuous)
    return continuous or source.endswith(".txt") or 2 * sum(len(text.ids) > length for text in head) >= len(head)


def _windows(pool: list[Tensor], source: str, samples: int, length: int, rng: random.Random, settings: str) -> Tensor:
    """int64 [samples, length]: different windows of the pooled documents (each with its end token), in random order."""
    stream = torch.cat(pool)[:-1] if pool else torch.empty(0, dtype=torch.int32)
    count = len(stream) // length
    if count < samples:
        needed = f"{samples} sequences of {length} need {samples * length}"
        raise LosaError(f"{source!r} has {len(stream)} tokens of text, {needed}: lower {settings}")
    first = rng.randrange(len(stream) - count * length + 1)
    windows = stream[first : first + count * length].view(count, length)
    return windows[torch.tensor(rng.sample(range(count), samples))].long()
