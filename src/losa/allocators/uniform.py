"""The same sparsity everywhere."""

from dataclasses import dataclass

from losa.allocators.base import Allocator, Evidence, water_level


@dataclass
class Uniform(Allocator):
    """Every unit gets the mean; less, if some are above it already."""

    def rates(self, evidence: Evidence) -> list[float]:
        level = water_level(evidence)
        return [max(level, floor) for floor in evidence.floors]
