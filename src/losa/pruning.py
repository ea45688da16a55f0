"""One block: statistics of its linears' inputs, new masks and weights, and how far its output has come from the dense one's."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from losa import distributed
from losa.blocks import Block
from losa.calibration import Stream
from losa.errors import LosaError
from losa.patterns import Amount
from losa.pruners.base import Pruner, Statistic, StructuredPruner
from losa.units import dtype_name


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
    groups = [list(block.linears)]
    if true_sequential and pruner.needs_inputs:  # rank 0's, as another may see other experts first
        groups = distributed.gather(stream.order(block))[0]
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

    def fresh(name: str) -> Any:
        return pruner.statistic(block.linears[name].in_features, stream.device)

    statistics: dict[str, Any] = {name: fresh(name) for name in names}
    unreached: list[str] = []
    if pruner.needs_inputs and names:
        unreached = stream.observe(block, statistics)
        statistics, unreached = of_all(statistics, unreached, fresh)
    for name in unreached:
        width = block.linears[name].in_features
        for start in range(0, width, 256):  # the rows of the identity, a few at a time
            rows = torch.eye(min(256, width - start), width, device=stream.device).roll(start, dims=1)
            statistics[name].update(rows, sequences=1)
    return statistics, unreached


def of_all(
    statistics: dict[str, Any], unreached: list[str], fresh: Callable[[str], Any]
) -> tuple[dict[str, Any], list[str]]:
    """What all processes have gathered: the sums of their statistics, by name, and the names that no token of any reached.

    fresh(name): an empty statistic. Names that share one go on sharing it.
    """
    if distributed.world() == 1:
        return statistics, unreached
    shared: dict[int, str] = {}
    owners = {name: shared.setdefault(id(statistic), name) for name, statistic in statistics.items()}
    seen = distributed.gather([owners, unreached])
    # where an expert was not reached, it is not known what it shares
    owners = {name: next((o[name] for o, _ in seen if o[name] != name), name) for name in owners}
    for owner in sorted({*owners.values()}):
        tensors = statistics[owner].tensors()
        distributed.sum_(tensors.values())
        total = fresh(owner)
        total.merge(tensors)
        statistics |= {name: total for name in owners if owners[name] == owner}
    return statistics, [name for name in unreached if all(name in missed for _, missed in seen)]


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


def reconstruction_error(name: str, dense: Tensor, pruned: Tensor) -> float:
    """E_l = sum(((D - P) / ||D_channel||)^2) / channels; both [tokens, hidden], the norm over the tokens of all processes.

    Channels in which the dense block puts out zeros only have no such norm and do not count. Raises LosaError, naming the
    block (`name`), for an error that is not finite: ranks and rates could not follow it.
    """
    error = (dense.float() - pruned.float()).square().sum(dim=0, dtype=torch.float64)
    norm = dense.float().square().sum(dim=0, dtype=torch.float64)
    distributed.sum_([error, norm])
    alive = norm > 1e-30
    found = float((error[alive] / norm[alive]).mean()) if alive.any() else 0.0
    if not math.isfinite(found):
        raise LosaError(
            f"{name} puts out NaN or infinity in {dtype_name(pruned.dtype)}: use --dtype float32, or another pruner"
        )
    return found


def sampled_positions(wanted: int, tokens: int, seed: int) -> Tensor | None:
    """A seeded sample of `wanted` positions among `tokens`, int64, rising; None: all (also for 0 wanted)."""
    if not wanted or wanted >= tokens:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(tokens, generator=generator)[:wanted].sort().values
