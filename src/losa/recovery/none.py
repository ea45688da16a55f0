"""No recovery: pruning alone."""

from typing import TYPE_CHECKING

from losa.blocks import Subject
from losa.recipe import Recipe
from losa.recovery.base import Recovery

if TYPE_CHECKING:
    from losa.data import Example
    from losa.run import Run


class NoRecovery(Recovery):
    """Leaves the pruned model as it is."""

    trains = ranks = False
    trained = "nothing"

    @classmethod
    def parameters(cls, shape: tuple[int, int], recipe: Recipe) -> int:
        """None."""
        return 0

    def recover(self, subject: Subject, examples: list["Example"], recipe: Recipe, step: int, run: "Run") -> None:
        """Nothing to do."""
