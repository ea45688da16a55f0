"""Pruner-Zero: the score that a genetic search over formulas found best (Dong et al., arXiv 2406.02924)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from losa import masks
from losa.errors import LosaError
from losa.patterns import Amount
from losa.pruners.base import InputSum, Pruner, Statistic


class SquaredGradients(InputSum):
    """total [out, in] fp32: sum over sequences of the square of the gradient of each."""

    of = "gradients"

    def __init__(self, shape: tuple[int, ...], device: torch.device | str) -> None:
        super().__init__(shape, torch.float32, device)

    def update(self, x: Tensor, sequences: int) -> None:
        x = x.detach().to(self.total.dtype)
        self.total.addcmul_(x, x)
        self.sequences += sequences


@dataclass
class PrunerZero(Pruner):
    """Score abs(W)^2 * minmax(G), compared within each output row; G the root of the sum of squared gradients.

    minmax takes the whole matrix, weights pruned before included, to [0, 1]. The scale of the loss is therefore of no
    account. Where all gradients are equal they tell nothing, and the score is abs(W)^2.
    """

    name = "pruner-zero"
    unit = "row"
    needs_inputs = False
    needs_gradients = True
    changes_weights = False
    copies = ((3.0, 0.0),)

    def gradient_statistic(self, shape: tuple[int, ...], device: torch.device | str) -> SquaredGradients:
        return SquaredGradients(shape, device)

    def prune(
        self, weight: Tensor, within: Tensor | None, amount: Amount, statistic: Statistic | None
    ) -> tuple[Tensor, Tensor]:
        seen = SquaredGradients.require(statistic, weight.shape[1])
        if seen.total.shape != weight.shape:
            raise LosaError(f"the gradients are of a weight {list(seen.total.shape)}, not {list(weight.shape)}")
        gradient = seen.total.sqrt()
        low, high = gradient.aminmax()
        if not bool(high.isfinite()):  # a NaN is its matrix's minimum and maximum
            raise LosaError("the gradients hold NaN or infinity, or overflow in their squares")
        if bool(low < high):
            gradient.sub_(low).div_(high - low)
        else:
            gradient.fill_(1)
        mask = masks.choose(weight.square() * gradient, within, amount, "row")
        return weight.masked_fill(~mask, 0), mask
