"""FLAP: what hardly varies can be replaced by its mean, which goes into the bias (An et al., arXiv 2312.11983)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from losa.pruners.base import InputSum, Statistic, StructuredPruner


class Moments(InputSum):
    """total [3, in]: tokens, sum of x_j and sum of x_j^2 over them, fp64 (fp32 on Apple's GPUs, which have none)."""

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        super().__init__((3, in_features), dtype, device)

    def update(self, x: Tensor, sequences: int) -> None:
        # summed in fp32 around this batch's mean, so that nothing cancels, and moved back to zero in fp64
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        center = x.mean(dim=0)
        away = x - center
        first, second = away.sum(dim=0).to(self.total), away.square_().sum(dim=0).to(self.total)
        center = center.to(self.total)
        self.total[0] += len(x)
        self.total[1] += first + len(x) * center
        self.total[2] += second + 2 * center * first + len(x) * center.square()
        self.sequences += sequences

    @property
    def mean(self) -> Tensor:
        """[in], of the type of `total`."""
        return self.total[1] / self.total[0]

    @property
    def variance(self) -> Tensor:
        """[in], over all tokens, of the type of `total`."""
        return (self.total[2] / self.total[0] - self.mean.square()).clamp_min(0)


@dataclass
class FLAP(StructuredPruner):
    """Score of column j: variance of x_j times the squared norm of W_:j; squared once more for heads, as its authors do.

    Theirs standardises the scores of each layer and cuts at one threshold over the whole model; here the allocator says
    how much of a block goes, and within a block the order is the same.
    """

    name = "flap"
    compensates = True

    def statistic(self, in_features: int, device: torch.device | str) -> Moments:
        return Moments(in_features, device)

    def columns(self, weight: Tensor, statistic: Statistic | None, heads: bool) -> Tensor:
        seen = Moments.require(statistic, weight.shape[1])
        scores = seen.variance * weight.square().sum(dim=0, dtype=seen.total.dtype)
        return scores.square() if heads else scores

    def means(self, statistic: Statistic | None, in_features: int) -> Tensor:
        return Moments.require(statistic, in_features).mean
