"""Units pruned where it costs least: each is pruned to a few rates for trial and its reconstruction error measured."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from losa.allocators.base import ALMOST_ALL, Allocator, Evidence, balanced, water_level
from losa.errors import LosaError


@dataclass
class MeasuredError(Allocator):
    """Minimises the sum of the units' errors at the mean asked. delta: how far a rate may lie from the mean; None takes
    what the pattern says, or 0.05. points: rates that are tried between the ends, both included; of mixed N:M, no more
    than it has N there."""

    delta: float | None = None
    points: int = 3
    needs = "errors"

    def __post_init__(self) -> None:
        if self.delta is not None and not 0 <= self.delta <= 1:
            raise LosaError(f"delta must be between 0 and 1, not {self.delta!r}")
        if self.points < 2:
            raise LosaError(f"points must be at least 2, not {self.points!r}")

    def probes(self, target: float, floor: float, spread: float | None) -> list[float]:
        delta = next(d for d in (self.delta, spread, 0.05) if d is not None)
        low = max(floor, 0.0, target - delta)
        high = max(low, target, min(ALMOST_ALL, target + delta))
        return [low + (high - low) * point / (self.points - 1) for point in range(self.points)]

    def rates(self, evidence: Evidence) -> list[float]:
        """Errors are joined by lines and made convex; then the cheapest piece is taken first, which is the optimum."""
        assert evidence.seen is not None
        curves = [lower_hull(list(zip(*table.tolist(), strict=True))) for table in evidence.seen]
        # where others are above the mean already, a unit may have to go below what was tried
        level = water_level(evidence)
        rates = [max(floor, min(curve[0][0], level)) for curve, floor in zip(curves, evidence.floors, strict=True)]
        pieces = []
        for unit, curve in enumerate(curves):
            for (x, y), (to, upper) in pairwise(curve):
                if to > x:
                    pieces.append(((upper - y) / (to - x) / evidence.counts[unit], unit, x, to))
        left = evidence.target * sum(evidence.counts)
        left -= sum(rate * count for rate, count in zip(rates, evidence.counts, strict=True))
        for _, unit, _, to in sorted(pieces):
            step = min(max(0.0, to - rates[unit]), max(0.0, left) / evidence.counts[unit])
            rates[unit] = min(to, rates[unit] + step)
            left -= step * evidence.counts[unit]
        return balanced(rates, evidence)

    def explain(self, evidence: Evidence) -> dict[str, Any]:
        """Of every unit, the rates that were tried and its error at each."""
        assert evidence.seen is not None
        return {"probes": [table.tolist() for table in evidence.seen]}


def lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The convex curve below `points` (x rising), from the first to the last."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull
