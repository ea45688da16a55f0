"""All kept weights trained, the mask held: no pair, nothing to merge."""

from typing import TYPE_CHECKING

from torch import Tensor

from losa.adapters import MaskedLinear
from losa.blocks import Subject, targeted
from losa.recipe import Recipe
from losa.recovery.base import Recovery
from losa.recovery.training import Between, train

if TYPE_CHECKING:
    from losa.data import Example
    from losa.run import Run


class Settling(Between):
    """Puts the trained values into the weights that the model computes with, whenever they have changed."""

    def __init__(self, linears: list[MaskedLinear]) -> None:
        self.linears = linears

    def updated(self, update: int) -> None:
        """After each update."""
        for linear in self.linears:
            linear.write_back()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """As a checkpoint has them."""
        self.updated(0)


class KeptWeights(Recovery):
    """Trains M * W itself, as fp32 values of the kept weights alone; after each update they are rounded into the model."""

    ranks = False
    trained = "all kept weights"

    @classmethod
    def parameters(cls, shape: tuple[int, int], recipe: Recipe) -> int:
        """The kept weights of the first step: later ones keep fewer."""
        return round(shape[0] * shape[1] * (1 - recipe.sparsity_at(1)))

    def recover(self, subject: Subject, examples: list["Example"], recipe: Recipe, step: int, run: "Run") -> None:
        """Train the kept weights of all targeted linears."""
        wanted = targeted([name for block in subject.blocks for name in block.linears], recipe)
        linears = {name: linear for block in subject.blocks for name, linear in block.masked.items() if name in wanted}
        parameters = {f"{name}.kept": linear.open() for name, linear in linears.items()}
        try:
            train(subject, parameters, examples, recipe, step, run, between=Settling(list(linears.values())))
        finally:
            for linear in linears.values():
                linear.close()
