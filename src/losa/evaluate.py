"""How good a model is: perplexity, zero-shot tasks, and what it writes beside the dense model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from losa import calibration, compare, data, distributed, model, sources
from losa.blocks import Block
from losa.calibration import Stream
from losa.errors import LosaError
from losa.progress import Progress
from losa.recipe import Recipe
from losa.tasks import harness


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, window: int, stride: int = 0, *, progress: Progress | None = None) -> float:
    """Perplexity of `tokens` (int64 [tokens]), read in windows that each start without context.

    stride 0: whole, non-overlapping windows, as published for WikiText-2; what does not fill one is left out. Otherwise a
    window begins every `stride` tokens and only what the one before it has not seen counts in it, so that every token but
    the first counts once, with `window - stride` tokens before it at least: slower, and lower, since less is read without
    context. Losses in fp32, their sum in float64.
    Raises LosaError for less than one window, a stride that skips tokens, and if the model's output is not a number.
    """
    windows = whole_windows(tokens, window)
    if not 0 <= stride < window:
        raise LosaError(
            f"stride is {stride}: must be at least 1 and below the window ({window}), or 0 for windows that do not overlap"
        )
    parts = [(windows, window - 1)]  # and how many of each window's last tokens count
    if stride:
        windows = tokens.unfold(0, window, stride)
        parts = [(windows[:1], window - 1), (windows[1:], stride)]
        if rest := (len(tokens) - window) % stride:
            parts.append((tokens[None, len(windows) * stride :], rest))
    progress = progress or Progress(quiet=True)
    total = sum(_loss(model, part, counted, progress) for part, counted in parts if len(part))
    return _perplexity(total, sum(len(part) * counted for part, counted in parts))


def _loss(model: Any, windows: Tensor, counted: int, progress: Progress) -> float:
    """Sum of the losses of the last `counted` tokens of each window; windows int64 [windows, tokens].

    Several processes share the batches.
    """
    device = next(model.parameters()).device
    batches = windows.split(max(1, calibration.BATCH_TOKENS // windows.shape[1]))
    total = torch.zeros(1, dtype=torch.float64)
    for index, counts in progress.track(list(distributed.turns(len(batches))), "perplexity", "batch"):
        ids = batches[index].to(device)
        loss = _loss_of(model(input_ids=ids, use_cache=False).logits, ids, counted)
        total += loss if counts else 0.0
    distributed.sum_([total])
    return total.item()


def spread(tokens: Tensor, window: int, wanted: int) -> Tensor:
    """About `wanted` of `tokens` (int64 [tokens]): whole windows, evenly spread over them, one at least; all if there are no more."""
    if wanted >= len(tokens):
        return tokens
    window = min(window, wanted)
    there, count = len(tokens) // window, wanted // window
    chosen = [there * i // count for i in range(count)]
    return torch.cat([tokens[i * window : (i + 1) * window] for i in chosen])


def _loss_of(logits: Tensor, ids: Tensor, counted: int) -> float:
    logits = logits[:, -counted - 1 : -1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, -counted:].flatten(), reduction="none")
    return losses.double().sum().item()


def perplexity_behind(stream: Stream, model: Any, blocks: list[Block]) -> float:
    """The perplexity of whole windows (`whole_windows`) that `stream` has carried through all of the model's blocks."""
    total = sum(_loss_of(logits, ids, stream.length - 1) for ids, logits in stream.logits(model, blocks))
    return _perplexity(total, stream.samples * (stream.length - 1))


def whole_windows(tokens: Tensor, window: int) -> Tensor:
    """int64 [tokens] -> [windows, window]; what does not fill one is left out. Raises LosaError for less than one."""
    if not 2 <= window <= len(tokens):
        raise LosaError(
            f"perplexity needs a window of 2 tokens at least and text that fills it: {len(tokens)} tokens, window {window}"
        )
    return tokens.unfold(0, window, window)


def _perplexity(total: float, count: int) -> float:
    """Raises LosaError if the sum of the losses is not a number."""
    if not math.isfinite(total):
        raise LosaError("the model's output is not a number: the weights are damaged or overflow in this dtype")
    return math.exp(min(700.0, total / count))


@dataclass(frozen=True)
class Evaluation:
    """What is to be found out about a model; whatever is empty is not asked."""

    data: str = ""  # text for perplexity: of it `tokens` (0: all), in windows of `window` (0: the model's) by `stride`
    tokens: int = 0
    window: int = 0
    stride: int = 0
    tasks: Sequence[str] = ()  # as `harness.expand` takes them
    task_data: dict[str, str] = field(default_factory=dict)
    limit: int = 0  # questions of each task; 0: all
    batch_size: int = 8
    against: str = ""  # the dense model that writes on from the same prompts, `max_new_tokens` at most
    prompts: str = ""
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        """Raise LosaError for what cannot be asked together."""
        if bool(self.against) != bool(self.prompts):
            raise LosaError(
                "--against names the dense model and --prompts the file of what both write on from: give both"
            )
        if not (self.data or self.tasks or self.prompts):
            raise LosaError("nothing to evaluate: name --data for perplexity, --tasks, or --against and --prompts")
        if self.task_data and not self.tasks:
            raise LosaError("--task-data is for --tasks: name the tasks, too")
        if (self.tokens or self.window or self.stride) and not self.data:
            raise LosaError("--tokens, --window and --stride are about perplexity: name its text with --data")
        if min(self.tokens, self.window) < 0 or 1 in (self.tokens, self.window):
            raise LosaError("--tokens and --window are counts of tokens: at least 2, or 0 for the default")
        if min(self.batch_size, self.max_new_tokens) < 1 or min(self.limit, self.stride) < 0:
            raise LosaError("--batch-size and --max-new-tokens are at least 1, --limit and --stride at least 0")


def evaluate(
    source: str, asked: Evaluation, recipe: Recipe, quiet: bool = True, progress: Progress | None = None
) -> dict[str, Any]:
    """What was asked of the model `source`: "perplexity"; "tasks" and "mean" as `harness.run` has them; "comparison" as `compare` has it.

    recipe: device and dtype are read. quiet: no bars of the harness's. Everything that can be known to be wrong is, before a model loads.
    """
    if asked.data:
        sources.check_source(asked.data, "evaluate")
    names = harness.expand(asked.tasks, asked.task_data)
    config = model.load_config(source)
    tokenizer = model.load_tokenizer(source, config)
    found: dict[str, Any] = {"model": source}
    if asked.data:
        window = model.reading_window(config, asked.window)
        if asked.stride >= window:
            raise LosaError(f"--stride is {asked.stride}: must be below the window of {window} tokens")
        tokens = data.evaluation_tokens(asked.data, tokenizer, window, asked.tokens)
    if asked.prompts:
        prompts = compare.read_prompts(asked.prompts, tokenizer, model.longest_text(config), asked.max_new_tokens)
        compare.check_tokenizers(source, tokenizer, asked.against)
    prepared = harness.prepare(names, asked.task_data)
    progress = progress or Progress(quiet=True)
    with progress.working("loading"):
        subject = model.load_whole(source, recipe)
        model.check_finite(subject)
    if asked.data:
        count = len(tokens) if asked.stride else whole_windows(tokens, window).numel()
        found |= {"data": asked.data, "tokens": count, "window": window, "stride": asked.stride}
        found["perplexity"] = perplexity(subject, tokens, window, asked.stride, progress=progress)
    if prepared:
        found |= harness.run(subject, tokenizer, prepared, asked.limit, asked.batch_size, quiet)
    if asked.prompts:
        dense = model.load_whole(asked.against, recipe)
        model.check_finite(dense)
        found["comparison"] = {"against": asked.against} | compare.compare(
            subject, dense, tokenizer, prompts, asked.max_new_tokens
        )
    return found
