"""Low-rank recovery: the paper's, whose pair lies under the mask and merges, and LoRA kept apart, which does not."""

from typing import TYPE_CHECKING

from torch import nn

from losa.adapters import LowRankLinear
from losa.blocks import Subject
from losa.recipe import Recipe
from losa.recovery.base import Recovery
from losa.recovery.training import train

if TYPE_CHECKING:
    from losa.data import Example
    from losa.run import Run


class MaskedLowRank(Recovery):
    """Trains A and B of y = x (M * (W + s B A))^T, nothing else (paper, section 2.3)."""

    trained = "low-rank pairs under the mask"

    @classmethod
    def parameters(cls, shape: tuple[int, int], recipe: Recipe) -> int:
        """A pair of the largest rank: it is allocated once."""
        return recipe.max_rank * sum(shape)

    def recover(self, subject: Subject, examples: list["Example"], recipe: Recipe, step: int, run: "Run") -> None:
        """Train the pairs of all linears that have one."""
        train(subject, self.pairs(subject), examples, recipe, step, run)

    @staticmethod
    def pairs(subject: Subject) -> dict[str, nn.Parameter]:
        """The parameters of all pairs in use, by name."""
        return {
            f"{name}.{part}": getattr(linear, part)
            for block in subject.blocks
            for name, linear in block.masked.items()
            if linear.rank
            for part in linear.pair_names
        }


class SparseLoRA(MaskedLowRank):
    """One step and one rank for all, trained under the mask. With uniform rates, as in the recipe of this name, LoSA with its
    three strategies off (paper, table 14)."""

    once = True
    rank_by = ("uniform",)


class LowRankApart(MaskedLowRank):
    """LoRA on the pruned model, y = x (M * W)^T + s (x A^T) B^T: the comparison. Its pair is saved beside the model."""

    merges = False
    trained = "low-rank pairs kept apart"
    layer = LowRankLinear
