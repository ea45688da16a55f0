"""What every allocator is given and must return."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass
class Evidence:
    """What a step knows when it sets rates; lists run over the units (blocks), in order.

    counts: prunable weights of a unit. floors: its sparsity so far, below which it cannot go (masks are nested).
    grams: [n, n] float64 a unit, centred, present if the allocator has `needs_grams`.
    """

    target: float
    counts: list[int]
    floors: list[float]
    grams: list[torch.Tensor] | None = None


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


class Allocator(ABC):
    """Evidence -> sparsity per unit: in [0, 1), at or above its floor, and the mean weighted by counts is the target.

    Floors whose own mean is above the target are returned as they are.
    """

    needs_grams = False

    @abstractmethod
    def rates(self, evidence: Evidence) -> list[float]: ...
