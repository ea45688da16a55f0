"""How good a model is: perplexity."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from losa.errors import LosaError

BATCH_TOKENS = 4096


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, window: int) -> float:
    """Perplexity over whole, non-overlapping windows of `tokens` (int64 [tokens]), as published for WikiText-2.

    Each window starts without context; what does not fill one is left out, unless there is no more than that. Losses
    in fp32, their sum in float64. Raises LosaError below 2 tokens, and if the model's output is not a number.
    """
    if len(tokens) < 2:
        raise LosaError(f"perplexity needs 2 tokens of text at least, not {len(tokens)}")
    window = min(window, len(tokens))
    device = next(model.parameters()).device
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    total = 0.0
    for batch in windows.split(max(1, BATCH_TOKENS // window)):
        ids = batch.to(device)
        logits = model(input_ids=ids, use_cache=False).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        total += losses.double().sum().item()
    if not math.isfinite(total):
        raise LosaError("the model's output is not a number: the weights are damaged or overflow in this dtype")
    return math.exp(min(700.0, total / (len(windows) * (window - 1))))
