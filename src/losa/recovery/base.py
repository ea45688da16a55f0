"""What every recovery method is and does."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from losa.adapters import MaskedLinear
from losa.blocks import Subject
from losa.recipe import Recipe

if TYPE_CHECKING:
    from losa.data import Example
    from losa.run import Run


@dataclass
class Recovery(ABC):
    """Wins back what pruning lost. `merges`: whether what it trains goes into the sparse weights exactly. `layer`: what takes the place of a prunable linear. `trains`: whether it needs data.
    `ranks`: whether that is low-rank pairs, whose ranks are set at each step. `trained`: what it trains, in words.
    `rank_by`: what may decide the ranks, its default first. `once`: it takes a single step only, since its mask and
    ranks are set once; so does what does not merge.
    Subclasses are dataclasses whose fields are their options; __post_init__ raises LosaError."""

    merges: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    ranks: ClassVar[bool] = True
    trained: ClassVar[str]
    rank_by: ClassVar[tuple[str, ...]] = ("error", "sparsity", "uniform")
    once: ClassVar[bool] = False
    layer: ClassVar[type[MaskedLinear]] = MaskedLinear

    def __init_subclass__(cls) -> None:
        cls.once = cls.once or not cls.merges

    @classmethod
    @abstractmethod
    def parameters(cls, shape: tuple[int, int], recipe: Recipe) -> int:
        """The most values it trains of a linear of `shape` (out, in): 16 bytes each, with gradient and AdamW's moments."""

    @abstractmethod
    def recover(self, subject: Subject, examples: list["Example"], recipe: Recipe, step: int, run: "Run") -> None:
        """Train `subject` on `examples` in place, from the checkpoint of this step in `run` if it holds one."""
