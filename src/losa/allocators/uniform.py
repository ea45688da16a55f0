"""The same sparsity everywhere."""

from dataclasses import dataclass

from losa.allocators.base import Allocator, Evidence


@dataclass
class Uniform(Allocator):
    """Every unit gets the mean."""

    def rates(self, evidence: Evidence) -> list[float]:
        return [evidence.target] * len(evidence.counts)
