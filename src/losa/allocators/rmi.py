"""Representation mutual information: blocks that repeat the others are pruned more (paper, section 2.2)."""

from dataclasses import dataclass
from typing import Any

import torch

from losa.allocators.base import ALMOST_ALL, Allocator, Evidence, water_level
from losa.errors import LosaError


def rmi_matrix(grams: list[torch.Tensor]) -> torch.Tensor:
    """RMI of every pair of blocks (equation 6, linear CKA) from their centred [n, n] Gram matrices; [L, L] float64.

    With K = X X^T, ||Y^T X||_F^2 is the inner product of K_X and K_Y, and ||X^T X||_F is ||K_X||_F.
    """
    flat: torch.Tensor = torch.stack([gram.double().flatten() for gram in grams])
    if not bool(flat.isfinite().all()):
        raise LosaError("RMI: the blocks' outputs hold NaN or infinity: check the model and the calibration data")
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return flat @ flat.T


def importance(rmi: torch.Tensor, beta: float) -> torch.Tensor:
    """exp(-beta * share of all RMI that a block has with the others) (equation 4, normalised as the authors' code)."""
    sums = rmi.clone().fill_diagonal_(0).clamp_min(0).sum(dim=1)  # rounding may leave a product of 0 below it
    return torch.exp(-beta * sums / sums.sum().clamp_min(1e-300))


def solve_box(cost: list[float], counts: list[int], target: float, low: list[float], high: list[float]) -> list[float]:
    """The linear programme (5): min sum cost_l theta_l, mean of theta weighted by counts = target, low <= theta <= high.

    It is a fractional knapsack: start at `low` and fill the units that cost least per weight first.
    """
    rates = list(low)
    left = target * sum(counts) - sum(c * r for c, r in zip(counts, rates, strict=True))
    for unit in sorted(range(len(cost)), key=lambda u: (cost[u] / counts[u], u)):
        step = min(high[unit] - low[unit], max(0.0, left) / counts[unit])
        rates[unit] = min(high[unit], low[unit] + step)
        left -= step * counts[unit]
    return rates


@dataclass
class RMI(Allocator):
    """beta: sharpness of the importance (the optimum moves with its order only, if blocks are of one size). delta: half
    the box's width; None takes what the pattern says, or the paper's 0.01 up to a mean of 0.5, 0.02 up to 0.6, then 0.03."""

    beta: float = 1.0
    delta: float | None = None
    needs = "grams"
    per_linear = False

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 700:  # exp(-beta) must not be 0: the order would be lost
            raise LosaError(f"beta must be above 0 and at most 700, not {self.beta!r}")
        if self.delta is not None and not 0 <= self.delta <= 1:
            raise LosaError(f"delta must be between 0 and 1, not {self.delta!r}")

    def rates(self, evidence: Evidence) -> list[float]:
        assert evidence.seen is not None
        target = evidence.target
        cost = importance(rmi_matrix(evidence.seen), self.beta).tolist()
        delta = next(d for d in (self.delta, evidence.spread, default_delta(target)) if d is not None)
        # a block never loses sparsity from one step to the next
        lowest = max(0.0, min(target - delta, water_level(evidence)))
        low = [max(lowest, floor) for floor in evidence.floors]
        high = [max(bound, target, min(ALMOST_ALL, target + delta)) for bound in low]
        return solve_box(cost, evidence.counts, target, low, high)

    def explain(self, evidence: Evidence) -> dict[str, Any]:
        """The RMI of every pair of units, [L, L]."""
        assert evidence.seen is not None
        return {"rmi": [[round(value, 6) for value in row] for row in rmi_matrix(evidence.seen).tolist()]}


def default_delta(target: float) -> float:
    # schedules reach 0.6 as 0.6000000000000001
    return 0.01 if target <= 0.5 + 1e-9 else 0.02 if target <= 0.6 + 1e-9 else 0.03
