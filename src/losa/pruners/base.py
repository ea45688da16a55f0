"""What pruners are given and must return, and the statistic they may gather from a linear's inputs or gradients."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from losa.errors import LosaError
from losa.patterns import Amount


class Statistic(Protocol):
    """What a pruner knows of the inputs of one linear, or of its weight's gradients; that of two sets is the sum of theirs."""

    def update(self, x: Tensor, sequences: int) -> None:
        """Take in x [tokens, in], any float: the tokens of `sequences` sequences (0 for more tokens of the last).

        Of a pruner that needs gradients: x [out, in], fp32 or wider, the gradient that one sequence's loss has.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Its state, not copied: what a sum over processes adds up, name by name (in fp64, see DESIGN)."""

    def merge(self, other: Mapping[str, Tensor]) -> None:
        """Add the `tensors()` of another; into a fresh statistic, this loads them."""


class InputSum:
    """A statistic that is one sum and the number of sequences; a pruner says what is summed. Its last axis is the inputs."""

    of: ClassVar[str] = "calibration inputs"

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> None:
        self.total = torch.zeros(shape, dtype=dtype, device=device)
        self.sequences = 0

    def tensors(self) -> dict[str, Tensor]:
        return {"total": self.total, "sequences": torch.tensor(self.sequences, device=self.total.device)}

    def merge(self, other: Mapping[str, Tensor]) -> None:
        self.total += other["total"].to(self.total)
        self.sequences += round(float(other["sequences"]))

    @classmethod
    def require(cls, statistic: Statistic | None, in_features: int) -> Self:
        """`statistic` if it is one of these, for `in_features` columns, and has seen something; else LosaError."""
        if not isinstance(statistic, cls):
            raise LosaError(f"this pruner needs {cls.of} ({cls.__name__}), not {type(statistic).__name__}")
        if statistic.total.shape[-1] != in_features:
            raise LosaError(f"the statistic has {statistic.total.shape[-1]} input features, the weight {in_features}")
        if statistic.sequences < 1:
            raise LosaError("no calibration sequence reached this linear: check the calibration data, or ignore it")
        return statistic


class Pruner(ABC):
    """Weight + statistic + amount -> weight and mask. Subclasses are dataclasses whose fields are their options.

    amount is a share of the weights, or N:M kept. Of a share, `unit` is where `masks.count_pruned` weights are pruned, exactly: "row", "matrix", or "N columns" (all rows of N
    adjacent columns; the last such block may be narrower). `copies`: how many fp32 tensors of the weight's size, and
    how many [in, in], `prune` has at its peak beside its arguments; or at each of several moments, the largest counting.
    """

    name: str
    unit: str
    needs_inputs: bool
    needs_gradients: bool = False
    sums: ClassVar[bool] = True  # whether the sum of two statistics is that of both: else it is for one process
    changes_weights: bool
    copies: ClassVar[tuple[tuple[float, float], ...]]

    def statistic(self, in_features: int, device: torch.device | str) -> Statistic | None:
        """An empty statistic for a linear of so many inputs; None if the pruner needs none."""
        return None

    def gradient_statistic(self, shape: tuple[int, ...], device: torch.device | str) -> Statistic:
        """An empty statistic for the gradients of a weight of `shape` [out, in], of a pruner that needs them."""
        raise NotImplementedError

    @abstractmethod
    def prune(
        self, weight: Tensor, within: Tensor | None, amount: Amount, statistic: Statistic | None
    ) -> tuple[Tensor, Tensor]:
        """(weight, mask) as new tensors: fp32 [out, in], zero where pruned, and the keep-mask, bool [out, in].

        weight fp32 [out, in], zero outside `within`, is left as it is; within is the mask so far (None: nothing is
        pruned) and contains the new one. Raises LosaError for a weight or input that is not a number, and for N:M where
        M does not divide in.
        """


class StructuredPruner(ABC):
    """Scores whole columns of the linears that read heads (o_proj) and channels (down_proj); `losa.structure` sums them.

    Subclasses are dataclasses whose fields are their options. `compensates`: what the pruned columns put out on the mean
    goes into the bias.
    """

    name: str
    needs_inputs: bool = True
    needs_gradients: bool = False
    sums: ClassVar[bool] = True  # as a Pruner's
    compensates: bool = False
    copies: ClassVar[tuple[tuple[float, float], ...]] = ((1.0, 0.0),)

    @abstractmethod
    def statistic(self, in_features: int, device: torch.device | str) -> Statistic | None:
        """An empty statistic for a linear of so many inputs."""

    @abstractmethod
    def columns(self, weight: Tensor, statistic: Statistic | None, heads: bool) -> Tensor:
        """The score of each column of `weight` (fp32 [out, in]): [in], a float. heads: it reads attention's heads.

        Raises LosaError for a statistic that is not its own or has seen nothing.
        """

    def means(self, statistic: Statistic | None, in_features: int) -> Tensor:
        """The mean of each input [in], if `compensates`."""
        raise NotImplementedError
