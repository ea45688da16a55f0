"""What every allocator is given and must return."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

# A unit pruned to exactly 1 would have no weights: the most any rate may be, unless the mean itself is above.
ALMOST_ALL = 0.999


@dataclass
class Evidence:
    """What a step knows when it sets rates; lists run over the units (blocks, or linears), in order.

    counts: prunable weights of a unit. floors: its sparsity so far, below which it cannot go (masks are nested).
    seen: a float64 tensor a unit, what the allocator `needs`; None if that is nothing. spread: how far a rate may lie
    from the target, where the pattern says it; None leaves it to the allocator.
    """

    target: float
    counts: list[int]
    floors: list[float]
    seen: list[torch.Tensor] | None = None
    spread: float | None = None


class Allocator(ABC):
    """Evidence -> sparsity per unit: in [0, 1), at or above its floor, and the mean weighted by counts is the target.

    Floors whose own mean is above the target are returned as they are. `needs` says what is gathered of each unit:
    "grams", its centred [n, n] Gram matrix over sequences; "scores", what `digest` makes of Wanda's scores; "errors",
    the rates of `probes` and the reconstruction error at each, [2, probes].
    """

    needs: ClassVar[Literal["", "grams", "scores", "errors"]] = ""
    per_linear: ClassVar[bool] = True

    @abstractmethod
    def rates(self, evidence: Evidence) -> list[float]: ...

    def explain(self, evidence: Evidence) -> dict[str, Any]:
        """What the rates were made from, for people: small, as JSON has it, by a name that the report knows."""
        return {}

    def digest(self, scores: torch.Tensor) -> torch.Tensor:
        """What is kept of a unit's scores, a flat fp32 tensor."""
        raise NotImplementedError

    def probes(self, target: float, floor: float, spread: float | None) -> list[float]:
        """Rates at which a unit's error is measured, rising."""
        raise NotImplementedError


def water_level(evidence: Evidence) -> float:
    """The rate of all units that are not above it already, if the weighted mean is to be the target: no more than it."""
    target, counts, floors = evidence.target, evidence.counts, evidence.floors
    if max(floors, default=0.0) <= target:
        return target
    weights = sum(counts)
    left = target * weights
    for floor, count in sorted(zip(floors, counts, strict=True), reverse=True):
        if floor * weights <= left:
            return left / weights
        left, weights = left - floor * count, weights - count
    return 0.0  # the floors alone are above the target


def balanced(wanted: list[float], evidence: Evidence) -> list[float]:
    """`wanted`, all shifted by the same and held within floor and ALMOST_ALL, so that the weighted mean is the target."""
    total = evidence.target * sum(evidence.counts)
    high = [max(floor, ALMOST_ALL, evidence.target) for floor in evidence.floors]

    def at(shift: float) -> list[float]:
        return [max(f, min(h, w + shift)) for w, f, h in zip(wanted, evidence.floors, high, strict=True)]

    def weight(rates: list[float]) -> float:
        return sum(r * c for r, c in zip(rates, evidence.counts, strict=True))

    low, up = -max(wanted), 1 - min(wanted)
    if weight(at(low)) >= total:  # the floors take it all
        return at(low)
    while low < (middle := low + (up - low) / 2) < up:
        low, up = (middle, up) if weight(at(middle)) < total else (low, middle)
    rates = at(low)
    # what rounding left goes to the first that can take it
    for unit, count in enumerate(evidence.counts):
        rates[unit] = min(high[unit], rates[unit] + max(0.0, total - weight(rates)) / count)
    return rates
