"""Wanda: a weight matters as much as it is large and as its input is loud (Sun et al., arXiv 2306.11695)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from losa import masks
from losa.patterns import Amount
from losa.pruners.base import InputSum, Pruner, Statistic


class SquaredInputs(InputSum):
    """total [in]: sum over tokens of x_j^2, fp64 (fp32 on Apple's GPUs, which have none)."""

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        super().__init__((in_features,), dtype, device)

    def update(self, x: Tensor, sequences: int) -> None:
        # within one call fp32 is enough (torch sums in a tree); over many calls it would drift
        self.total += x.detach().to(torch.promote_types(x.dtype, torch.float32)).square().sum(dim=0)
        self.sequences += sequences


@dataclass
class Wanda(Pruner):
    """Score abs(W_ij) * sqrt(mean over sequences of the sum over tokens of x_j^2), compared within each output row."""

    name = "wanda"
    unit = "row"
    needs_inputs = True
    changes_weights = False
    copies = ((1.5, 0.0),)

    def statistic(self, in_features: int, device: torch.device | str) -> SquaredInputs:
        return SquaredInputs(in_features, device)

    def prune(
        self, weight: Tensor, within: Tensor | None, amount: Amount, statistic: Statistic | None
    ) -> tuple[Tensor, Tensor]:
        seen = SquaredInputs.require(statistic, weight.shape[1])
        norm = (seen.total / seen.sequences).sqrt().to(weight)
        mask = masks.choose(weight.abs().mul_(norm), within, amount, "row")
        return weight.masked_fill(~mask, 0), mask
