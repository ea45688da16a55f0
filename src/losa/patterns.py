"""What is left of a pruned matrix: any weights, N of every M, a mix of N over the blocks, or whole heads and channels.

N:M always means N KEPT of every M adjacent weights of a row (others count the pruned ones).
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from losa.errors import LosaError

KINDS = ("unstructured", "N:M", "mixed-N:M", "structured")


@dataclass(frozen=True)
class NM:
    """`n` KEPT of every `m` adjacent weights of a row, whatever other libraries call it."""

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def check(self, columns: int) -> None:
        """Raises LosaError where m does not divide `columns`."""
        if columns % self.m:
            raise LosaError(f"{self} needs an input width that {self.m} divides, not {columns}")


# How much of a matrix is pruned: a share in [0, 1] of each counting unit, or a pattern.
Amount = float | NM


@dataclass(frozen=True)
class Pattern:
    """`n` of `m` are kept, on the mean over the units if mixed; both are 0 for patterns without groups."""

    kind: Literal["unstructured", "nm", "mixed", "structured"]
    n: int = 0
    m: int = 0

    @property
    def sparsity(self) -> float | None:
        """The share that goes, where the pattern says it."""
        return 1 - self.n / self.m if self.m else None

    @property
    def spread(self) -> float | None:
        """How far a unit's rate may lie from the mean, where the pattern says it: mixed N are within one of the mean."""
        return 1 / self.m if self.kind == "mixed" else None

    @property
    def allocates(self) -> bool:
        """Whether units may differ."""
        return self.kind != "nm"

    def nearest(self, rates: list[float], counts: list[int], target: float, floors: list[float]) -> list[float]:
        """The rates that the pattern can have, nearest to those an allocator asks for (decision 4 of the equations).

        N:M: N = ceil(M (1 - target)) for all. Mixed: integers within one of M (1 - target) whose mean is that, by
        largest remainder, ties to the earlier unit. No unit's N grows from one step to the next (floors: rates so far).
        """
        if not self.m:
            return rates
        if self.kind == "nm":
            return [1 - math.ceil(self.m * (1 - target) - 1e-9) / self.m] * len(rates)
        mean = self.m * (1 - target)
        bounds = [self.bounds(target, floor) for floor in floors]
        wanted = [self.m * (1 - rate) for rate in rates]
        kept = [max(low, min(high, math.floor(w + 1e-9))) for w, (low, high) in zip(wanted, bounds, strict=True)]
        units = range(len(kept))
        missing = mean * sum(counts) - sum(n * c for n, c in zip(kept, counts, strict=True))
        while missing > 0 and (free := [u for u in units if kept[u] < bounds[u][1]]):
            unit = max(free, key=lambda u: (round(wanted[u] - kept[u], 9), -u))
            if missing < counts[unit] / 2:
                break
            kept[unit] += 1
            missing -= counts[unit]
        while missing < 0 and (free := [u for u in units if kept[u] > bounds[u][0]]):
            unit = min(free, key=lambda u: (round(wanted[u] - kept[u], 9), -u))
            if -missing <= counts[unit] / 2:
                break
            kept[unit] -= 1
            missing += counts[unit]
        return [1 - n / self.m for n in kept]

    def bounds(self, target: float, floor: float) -> tuple[int, int]:
        """The least and the most that a unit of rate `floor` so far may keep of M, if mixed: within one of the mean."""
        mean = self.m * (1 - target)
        most = min(self.m, math.floor(mean + 1 + 1e-9), round(self.m * (1 - floor)))
        return max(1, math.ceil(mean - 1 - 1e-9)), most

    def trials(self, rates: list[float], target: float, floor: float) -> list[float]:
        """Those that a unit can have in the place of `rates` that an allocator wants to try; each once, rising."""
        if self.kind != "mixed":
            return rates
        low, high = self.bounds(target, floor)
        kept = {max(low, min(high, round(self.m * (1 - rate)))) for rate in rates}
        return [1 - n / self.m for n in sorted(kept, reverse=True)]

    def amount(self, rate: float) -> Amount:
        """What a pruner is told for a unit of this rate."""
        return NM(round(self.m * (1 - rate)), self.m) if self.m else rate

    def __str__(self) -> str:
        prefix = "mixed-" if self.kind == "mixed" else ""
        return f"{prefix}{self.n}:{self.m}" if self.m else self.kind


def parse(text: str) -> Pattern:
    """The pattern of that name. Raises LosaError for none, or one that cannot be."""
    if text == "unstructured":
        return Pattern("unstructured")
    if text == "structured":
        return Pattern("structured")
    found = re.fullmatch(r"(mixed-)?(\d+):(\d+)", text)
    if found is None:
        from losa.registry import unknown

        raise unknown("pattern", text, KINDS)
    mixed, n, m = found[1], int(found[2]), int(found[3])
    if not 0 < n < m:
        raise LosaError(f"pattern {text!r}: N:M keeps N of every M, 0 < N < M")
    if mixed and n == 1:
        raise LosaError(
            f"pattern {text!r}: no unit can keep fewer than 1, so that the mean of 1 leaves no mix: use 1:{m}"
        )
    return Pattern("mixed" if mixed else "nm", n, m)
