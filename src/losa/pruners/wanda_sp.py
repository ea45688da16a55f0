"""Wanda-sp: Wanda's score of whole columns (An et al., arXiv 2312.11983, appendix; the LoSA paper's appendix D)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from losa.pruners.base import Statistic, StructuredPruner
from losa.pruners.wanda import SquaredInputs


@dataclass
class WandaSP(StructuredPruner):
    """Score of column j: the mean over rows of abs(W_ij) * sqrt(mean over sequences of the sum over tokens of x_j^2)."""

    name = "wanda-sp"

    def statistic(self, in_features: int, device: torch.device | str) -> SquaredInputs:
        return SquaredInputs(in_features, device)

    def columns(self, weight: Tensor, statistic: Statistic | None, heads: bool) -> Tensor:
        seen = SquaredInputs.require(statistic, weight.shape[1])
        norm = (seen.total / seen.sequences).sqrt()
        return weight.abs().mean(dim=0, dtype=norm.dtype) * norm
