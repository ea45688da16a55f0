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


class Allocator(ABC):
    """Evidence -> sparsity per unit; the mean weighted by counts equals the target, every rate is in [0, 1)."""

    needs_grams = False

    @abstractmethod
    def rates(self, evidence: Evidence) -> list[float]: ...
