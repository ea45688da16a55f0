"""AdaLoRA (Zhang et al., 2023): pairs in the form of an SVD, P Lambda Q, whose least important triplets go during training."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from losa.adapters import LowRankLinear, MaskedLinear
from losa.blocks import Subject
from losa.errors import LosaError
from losa.recipe import Recipe
from losa.recovery.low_rank import MaskedLowRank
from losa.recovery.sora import GatedLinear
from losa.recovery.training import Between, train, updates_of

if TYPE_CHECKING:
    from losa.data import Example
    from losa.run import Run

ADAPTER = "default"  # what PEFT calls the one adapter there is


class SVDLinear(GatedLinear, LowRankLinear):
    """y = x (M * W)^T + b + s (x A^T) diag(e) B^T, kept apart. As PEFT has it, A and B start normal of deviation 0.02, e at zero."""

    @torch.no_grad()
    def set_rank(self, rank: int, generator: torch.Generator) -> None:
        """Use the first `rank` triplets; the output does not move."""
        before = self.rank
        super().set_rank(rank, generator)
        if self.lora_A is not None and self.lora_B is not None and self.lora_E is not None and rank > before:
            for new in (self.lora_A[before:rank], self.lora_B[:, before:rank]):
                new.copy_(torch.empty(new.shape).normal_(std=0.02, generator=generator))
            self.lora_E[before:rank] = 0

    @torch.no_grad()
    def compact(self) -> None:
        """Move the triplets that are left to the front and give up the others, whose e is zero: the output does not move."""
        assert self.lora_A is not None and self.lora_B is not None and self.lora_E is not None
        left = self.lora_E[: self.rank].nonzero().flatten()
        rank = len(left)
        for tensor in (self.lora_A, self.lora_B.t(), self.lora_E):
            tensor[:rank] = tensor[left]
            tensor[rank:] = 0
        self.rank = rank


class _Triplets:
    """What PEFT's RankAllocator takes for a model: the parameters in use, and their gradients, under PEFT's names."""

    def __init__(self, layers: dict[str, SVDLinear]) -> None:
        self.layers = layers

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, layer in self.layers.items():
            for part in layer.pair_names:
                parameter = getattr(layer, part)
                view, grad = self._in_use(part, layer, parameter.detach()), parameter.grad
                view.grad = None if grad is None else self._in_use(part, layer, grad)
                yield f"{name}.{part}.{ADAPTER}", view

    @staticmethod
    def _in_use(part: str, layer: SVDLinear, tensor: Tensor) -> Tensor:
        if part == "lora_B":
            return tensor[:, : layer.rank]
        return tensor[: layer.rank, None] if part == "lora_E" else tensor[: layer.rank]


class Budget(Between):
    """PEFT's RankAllocator at each update (its AdaLoraModel.update_and_allocate), and the pull towards orthogonality."""

    def __init__(self, layers: dict[str, SVDLinear], updates: int, options: "AdaLoRA") -> None:
        from peft import AdaLoraConfig
        from peft.tuners.adalora.layer import RankAllocator

        self.triplets: Any = _Triplets(layers)
        self.orthogonality = options.orthogonality
        self.last = updates - int(options.final * updates)  # the update that settles which triplets stay
        config = AdaLoraConfig(
            total_step=updates,
            tinit=min(int(options.warm * updates), self.last - 1),
            tfinal=updates - self.last,
            beta1=options.beta1,
            beta2=options.beta2,
        )
        self.allocator: Any = RankAllocator(self.triplets, config, ADAPTER)
        ranks = self.allocator.init_bgt
        if ranks < 2:
            raise LosaError("adalora chooses among ranks, and there is one only: raise mean_rank, or widen targets")
        self.allocator.target_bgt = min(ranks - 1, max(1, round(options.kept_ranks * ranks)))
        self.pattern: dict[str, list[bool]] | None = None

    def penalise(self) -> float:
        """orthogonality times the mean over all A and B of ||A A^T - I||, ||B^T B - I|| (Frobenius)."""
        pairs = [(layer.lora_A, layer.lora_B, layer.rank) for layer in self.triplets.layers.values()]
        total = torch.zeros(())
        for a, b, rank in pairs:
            identity = torch.eye(rank, device=a.device)
            for rows in (a[:rank], b[:, :rank].t()):
                total = total.to(a.device) + torch.linalg.matrix_norm(rows @ rows.t() - identity)
        penalty = self.orthogonality * total / (2 * len(pairs))
        penalty.backward()
        return penalty.item()

    def updated(self, update: int) -> None:
        """Sharpen the importance of all triplets, and zero those beyond the budget of this update."""
        now = update + 1
        if now > self.last:
            self.allocator.mask_using_rank_pattern(self.triplets, self.pattern)
            return
        if not self.allocator.exp_avg_ipt:
            self.allocator.update_ipt(self.triplets)  # else nothing would be known if the first update is the last
        _, pattern = self.allocator.update_and_allocate(self.triplets, now, force_mask=now == self.last)
        self.pattern = pattern or self.pattern

    def tensors(self) -> dict[str, Tensor]:
        """The running means, and the pattern once there is one."""
        found = {f"mean:{name}": value.contiguous() for name, value in self.allocator.exp_avg_ipt.items()}
        found |= {f"spread:{name}": value.contiguous() for name, value in self.allocator.exp_avg_unc.items()}
        return found | {f"kept:{name}": torch.tensor(kept) for name, kept in (self.pattern or {}).items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors`."""
        pattern = {}
        for key, value in tensors.items():
            kind, _, name = key.partition(":")
            if kind == "kept":
                pattern[name] = value.tolist()
                continue
            means = self.allocator.exp_avg_ipt if kind == "mean" else self.allocator.exp_avg_unc
            means[name] = value.to(dict(self.triplets.named_parameters())[name].device)
            self.allocator.ipt[name] = torch.zeros_like(means[name])  # computed afresh before it is read
        self.pattern = pattern or None


@dataclass
class AdaLoRA(MaskedLowRank):
    """AdaLoRA on the pruned model, for comparison (paper, appendix F): kept apart, so it does not merge; once trained it
    is an ordinary LoRA with a rank for each linear, and is saved as that beside the model.

    All linears start at the recipe's mean_rank (12 in the paper's comparison), of which `kept_ranks` are left on the
    mean. No triplet goes in the first `warm` share of the updates, none is exchanged in the `final` share.
    """

    kept_ranks: float = 2 / 3
    warm: float = 0.1
    final: float = 0.3
    orthogonality: float = 0.5
    beta1: float = 0.85
    beta2: float = 0.85

    merges: ClassVar[bool] = False
    trained: ClassVar[str] = "low-rank pairs kept apart, in the form of an SVD"
    rank_by: ClassVar[tuple[str, ...]] = ("uniform",)
    layer: ClassVar[type[MaskedLinear]] = SVDLinear

    def __post_init__(self) -> None:
        for name in ("kept_ranks", "beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise LosaError(f"{name} is {getattr(self, name)}: must be above 0 and below 1")
        if not (self.warm >= 0 and self.final >= 0 and self.warm + self.final < 1):
            raise LosaError(
                f"warm {self.warm} and final {self.final} must leave updates in between: at least 0, below 1 together"
            )
        if not self.orthogonality >= 0:
            raise LosaError(f"orthogonality is {self.orthogonality}: must be at least 0")
        if find_spec("peft") is None:  # importing it takes seconds
            raise LosaError("recovery 'adalora' needs PEFT, which is not installed: pip install peft")

    @classmethod
    def parameters(cls, shape: tuple[int, int], recipe: Recipe) -> int:
        """A pair of the largest rank and its singular values."""
        return recipe.max_rank * (sum(shape) + 1)

    def recover(self, subject: Subject, examples: list["Example"], recipe: Recipe, step: int, run: "Run") -> None:
        """Train the triplets while their number falls to the budget."""
        layers = {
            name: linear
            for block in subject.blocks
            for name, linear in block.masked.items()
            if isinstance(linear, SVDLinear) and linear.rank
        }
        budget = Budget(layers, updates_of(examples, recipe), self)
        train(subject, self.pairs(subject), examples, recipe, step, run, between=budget)
        for layer in layers.values():
            layer.compact()
        left = {name: layer.rank for name, layer in layers.items()}
        run.log("ranks", step=step, left=left)
        run.say(f"ranks {min(left.values())} to {max(left.values())}, {sum(left.values()) / len(left):.3g} on the mean")
