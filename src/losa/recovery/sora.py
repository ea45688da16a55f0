"""SoRA (Ding et al., 2023): every rank has a gate, which a proximal step draws to zero unless the loss holds it up."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from losa.adapters import MaskedLinear
from losa.blocks import Subject
from losa.errors import LosaError
from losa.recipe import Recipe
from losa.recovery.low_rank import MaskedLowRank
from losa.recovery.training import Between, share_of_peak, train, updates_of

if TYPE_CHECKING:
    from losa.data import Example
    from losa.run import Run


class GatedLinear(MaskedLinear):
    """y = x (M * (W + s B diag(g) A))^T + b: a masked linear with a gate for each rank, the fp32 parameter `lora_E` [max_rank].

    The gate scales A before the pair meets the weight, so that forward, merge and changing ranks are those of a
    MaskedLinear. New rows get a standard normal gate, as in the authors' code (and a column of B that is zero, as ever).
    """

    pair_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_E")
    lora_E: nn.Parameter | None

    def __init__(self, linear: nn.Linear, max_rank: int, scaling: float) -> None:
        super().__init__(linear, max_rank, scaling)
        self.lora_E = nn.Parameter(torch.zeros(max_rank, device=self.weight.device)) if max_rank else None

    def pair(self) -> tuple[Tensor, Tensor]:
        """diag(g) A [rank, in] and B [out, rank], the rows and columns in use."""
        a, b = super().pair()
        assert self.lora_E is not None
        return a * self.lora_E[: self.rank, None], b

    @torch.no_grad()
    def set_rank(self, rank: int, generator: torch.Generator) -> None:
        """Use the first `rank` rows; the output does not move."""
        before = self.rank
        super().set_rank(rank, generator)
        if self.lora_E is not None:
            self.lora_E[before:rank] = torch.randn(max(0, rank - before), generator=generator).to(self.lora_E)
            self.lora_E[rank:] = 0


class Proximal(Between):
    """After update t, of rate eta_t: g <- sign(g) max(|g| - eta_t shrink, 0), the proximal step of shrink ||g||_1."""

    def __init__(self, layers: list[GatedLinear], rates: list[float], shrink: float) -> None:
        self.layers, self.rates, self.shrink = layers, rates, shrink

    @torch.no_grad()
    def updated(self, update: int) -> None:
        """Draw every gate towards zero."""
        for layer in self.layers:
            assert layer.lora_E is not None
            gates = layer.lora_E[: layer.rank]
            gates.copy_(nn.functional.softshrink(gates, self.rates[update] * self.shrink))


@dataclass
class SoRA(MaskedLowRank):
    """SoRA under the mask: its pair, gates and all, merges exactly. Its paper keeps the pair apart; nothing in the method
    needs that, and what cannot merge costs a product more in every use.

    `shrink` is lambda. The default takes as much from a gate over a whole training as the authors' settings do: 3e-4 an
    update, whose rates fall from 8e-4 to 0. A gate at zero takes part in nothing; it opens again if its gradient is
    strong enough.
    """

    shrink: float = 0.75

    trained: ClassVar[str] = "low-rank pairs under the mask, with gates"
    layer: ClassVar[type[MaskedLinear]] = GatedLinear

    def __post_init__(self) -> None:
        if not self.shrink >= 0:
            raise LosaError(f"shrink is {self.shrink}: must be at least 0")

    @classmethod
    def parameters(cls, shape: tuple[int, int], recipe: Recipe) -> int:
        """A pair of the largest rank and its gates."""
        return recipe.max_rank * (sum(shape) + 1)

    def recover(self, subject: Subject, examples: list["Example"], recipe: Recipe, step: int, run: "Run") -> None:
        """Train pairs and gates, the gates with a proximal step behind each update."""
        layers = [linear for block in subject.blocks for linear in block.masked.values() if linear.rank]
        gated = [layer for layer in layers if isinstance(layer, GatedLinear)]
        updates = updates_of(examples, recipe)
        rates = [recipe.peak_rate * share_of_peak(u, updates, recipe.warmup) for u in range(updates)]
        train(subject, self.pairs(subject), examples, recipe, step, run, between=Proximal(gated, rates, self.shrink))
        used = sum(int(layer.lora_E[: layer.rank].count_nonzero()) for layer in gated if layer.lora_E is not None)
        run.log("gates", step=step, open=used, of=sum(layer.rank for layer in gated))
        run.say(f"step {step}/{recipe.steps}: {used} of {sum(layer.rank for layer in gated)} gates stay open")
