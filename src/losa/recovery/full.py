"""All kept weights trained, the mask held: no pair, nothing to merge."""

from typing import TYPE_CHECKING

from losa.model import Subject, targeted
from losa.recipe import Recipe
from losa.recovery.base import Recovery
from losa.recovery.training import train

if TYPE_CHECKING:
    from losa.data import Example
    from losa.run import Run


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
        open_now = {name: linear for block in subject.blocks for name, linear in block.masked.items() if name in wanted}
        parameters = {f"{name}.kept": linear.open() for name, linear in open_now.items()}

        def settle() -> None:
            for linear in open_now.values():
                linear.settle()

        train(subject, parameters, examples, recipe, step, run, moved=settle)
        for linear in open_now.values():
            linear.close()
