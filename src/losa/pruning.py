"""One block: statistics of its linears' inputs, new masks and weights, and how far its output has come from the dense one's."""

from typing import Any

import torch
from torch import Tensor

from losa.calibration import Stream
from losa.errors import LosaError
from losa.model import Block
from losa.patterns import Amount
from losa.pruners.base import Pruner, Statistic, StructuredPruner


@torch.no_grad()
def prune_block(
    block: Block,
    pruner: Pruner,
    amounts: dict[str, Amount],
    stream: Stream,
    statistics: dict[str, Any] | None = None,
    true_sequential: bool = False,
) -> list[str]:
    """Prune every linear of `block` to its amount. `statistics`: if they were gathered elsewhere, as gradients are.

    The linears of a block see its inputs as they are before the block is pruned; true_sequential: each sees those
    before it pruned, at the cost of one pass over the block for each group that runs at once. Returns the names of the
    experts' linears that no token reached.
    """
    groups = stream.order(block) if true_sequential and pruner.needs_inputs else [list(block.linears)]
    unreached: list[str] = []
    for names in groups:
        seen, missed = (statistics, []) if statistics else observe(block, pruner, names, stream)
        unreached += missed
        for name in names:
            prune_linear(name, block.masked[name], pruner, amounts[name], seen[name], stream.device)
    return unreached


def observe(
    block: Block, pruner: Pruner | StructuredPruner, names: list[str], stream: Stream
) -> tuple[dict[str, Any], list[str]]:
    """The pruner's statistic of the inputs of each of `names` (None if it needs none), and which of them no token reached.

    These are experts. Theirs is the statistic of inputs that are all alike, on which a pruner goes by the weights alone.
    """
    statistics: dict[str, Any] = {
        name: pruner.statistic(block.linears[name].in_features, stream.device) for name in names
    }
    unreached = stream.observe(block, statistics) if pruner.needs_inputs and names else []
    for name in unreached:
        width = block.linears[name].in_features
        for start in range(0, width, 256):  # the rows of the identity, a few at a time
            rows = torch.eye(min(256, width - start), width, device=stream.device).roll(start, dims=1)
            statistics[name].update(rows, sequences=1)
    return statistics, unreached


@torch.no_grad()
def prune_linear(
    name: str, linear: Any, pruner: Pruner, amount: Amount, statistic: Statistic | None, device: torch.device
) -> None:
    """New mask, and values if the pruner changes them, for one masked linear; its pair stays.

    Changed values meet the pair as decision 2 of the equations has it: W <- M' (W + (W' - merged)), rounded once.
    """
    merged = linear.effective_weight(torch.float32).to(device)
    try:
        pruned, mask = pruner.prune(merged, linear.mask.to(device), amount, statistic)
    except LosaError as error:
        raise LosaError(f"{name}: {error}") from error
    changed = linear.weight + pruned.sub_(merged).to(linear.weight.device) if pruner.changes_weights else None
    del merged, pruned  # as large as the weight; what follows takes its share too
    linear.set_mask(mask)
    if changed is not None:
        linear.weight.copy_(changed.mul_(linear.mask))


def reconstruction_error(dense: Tensor, pruned: Tensor) -> float:
    """E_l = sum(((D - P) / ||D_channel||)^2) / channels; both [tokens, hidden], the norm over the tokens."""
    error = (dense.float() - pruned.float()).square().sum(dim=0, dtype=torch.float64)
    norm = dense.float().square().sum(dim=0, dtype=torch.float64)
    return float((error / norm.clamp_min(1e-30)).mean())


def sampled_positions(wanted: int, tokens: int, seed: int) -> Tensor | None:
    """A seeded sample of `wanted` positions among `tokens`, int64, rising; None: all (also for 0 wanted)."""
    if not wanted or wanted >= tokens:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(tokens, generator=generator)[:wanted].sort().values
