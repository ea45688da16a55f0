"""Small weights go first, whatever comes in."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from losa import masks, registry
from losa.patterns import Amount
from losa.pruners.base import Pruner, Statistic


@dataclass
class Magnitude(Pruner):
    """Score abs(W). unit: "matrix" compares over the whole matrix, "row" within each output row."""

    unit: Literal["matrix", "row"] = "matrix"
    name = "magnitude"
    needs_inputs = False
    changes_weights = False
    copies = ((3.25, 0.0),)

    def __post_init__(self) -> None:
        if self.unit not in ("matrix", "row"):
            raise registry.unknown("unit", self.unit, ("matrix", "row"))

    def prune(
        self, weight: Tensor, within: Tensor | None, amount: Amount, statistic: Statistic | None
    ) -> tuple[Tensor, Tensor]:
        mask = masks.choose(weight.abs(), within, amount, self.unit)
        return weight.masked_fill(~mask, 0), mask
