"""OWL: a unit with more outliers among its scores is pruned less (Yin et al., arXiv 2310.05175)."""

from dataclasses import dataclass
from typing import Any

import torch

from losa.allocators.base import Allocator, Evidence, balanced
from losa.errors import LosaError


@dataclass
class OWL(Allocator):
    """outlier: a score above this many times its unit's mean is one. half_range: half of what lies between the rates of
    the units with most and fewest outliers (the authors' lambda); None takes what the pattern says, or their 0.08."""

    outlier: float = 5.0
    half_range: float | None = None
    needs = "scores"

    def __post_init__(self) -> None:
        if not self.outlier > 0:
            raise LosaError(f"outlier must be above 0, not {self.outlier!r}")
        if self.half_range is not None and not 0 <= self.half_range <= 0.5:
            raise LosaError(f"half_range must be between 0 and 0.5, not {self.half_range!r}")

    def digest(self, scores: torch.Tensor) -> torch.Tensor:
        """The share of a unit's scores that are outliers, a scalar."""
        return (scores > self.outlier * scores.mean(dtype=torch.float64)).double().mean()

    def rates(self, evidence: Evidence) -> list[float]:
        assert evidence.seen is not None
        shares = [float(share) for share in evidence.seen]
        half = next(h for h in (self.half_range, evidence.spread, 0.08) if h is not None)
        low, width = min(shares), max(max(shares) - min(shares), 1e-300)
        return balanced([evidence.target - 2 * half * (share - low) / width for share in shares], evidence)

    def explain(self, evidence: Evidence) -> dict[str, Any]:
        """The share of outliers of every unit."""
        assert evidence.seen is not None
        return {"outliers": [float(share) for share in evidence.seen]}
