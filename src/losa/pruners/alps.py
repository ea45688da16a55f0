"""ALPS: the support by ADMM, then the least-squares optimum on it (Meng et al., arXiv 2406.07831)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from losa import masks
from losa.errors import LosaError
from losa.patterns import Amount
from losa.pruners.base import Pruner, Statistic
from losa.pruners.sparsegpt import ATTEMPTS, Gram, finite, invert_upper, spans

# Every so many iterations rho follows how much the support moved: (moved weights per kept weight above which, factor).
EVERY = 3
SETTLED = 0.005
GROWTH = ((0.1, 1.3), (SETTLED, 1.2), (0.0, 1.1))
SHRINK = 0.2
RHO_MAX = 1e6
# Beside a unit diagonal, a rho so small leaves B at the dense weights: nothing is left to learn.
RHO_MIN = 1e-4
TINY = torch.finfo(torch.float32).tiny
# Columns that are solved for at once.
BLOCK = 128


@dataclass
class ALPS(Pruner):
    """Minimises ||X (W - W')^T||^2 + damping ||W - W'||^2 over weights W' of which a given number is not zero.

    damp: share of the mean of the Gram matrix's diagonal that is added to it. rho: the first penalty for leaving the
    support; it grows while the support moves. iterations: ADMM's at most; from `settle` on, it ends once less than
    `tolerance` of the kept weights change places. cg_steps: of conjugate gradients on the support; all are taken, as
    the authors' code does (its test reads the residual off the support too, which stays). The defaults are theirs.
    """

    damp: float = 0.01
    rho: float = 0.1
    iterations: int = 300
    settle: int = 30
    tolerance: float = 3e-4
    cg_steps: int = 10
    name = "alps"
    unit = "matrix"
    needs_inputs = True
    changes_weights = True
    copies = ((8.75, 2.0), (5.0, 3.0))

    def __post_init__(self) -> None:
        for option in ("damp", "rho", "tolerance"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, float | int) or not 0 < value < math.inf:
                raise LosaError(f"{option} must be a number above 0, not {value!r}")
        for option, least in (("iterations", 1), ("settle", 0), ("cg_steps", 0)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LosaError(f"{option} must be a whole number from {least}, not {value!r}")

    def statistic(self, in_features: int, device: torch.device | str) -> Gram:
        return Gram(in_features, device)

    def prune(
        self, weight: Tensor, within: Tensor | None, amount: Amount, statistic: Statistic | None
    ) -> tuple[Tensor, Tensor]:
        """Works in the coordinates W diag(X^T X)^1/2, where the Hessian has a unit diagonal and one rho suits every column."""
        gram = Gram.require(statistic, weight.shape[1])
        if not finite(weight):
            raise LosaError("ALPS was given weights that hold NaN or infinity")
        hessian, scale = self._hessian(gram)
        dense = weight.float().contiguous() * scale
        first = masks.choose(dense.abs(), within, amount, "matrix")
        if int(first.sum()) in (0, first.numel() if within is None else int(within.sum())):
            # no choice: nothing stays, or all that did, at its optimum
            return weight.float().masked_fill(~first, 0).contiguous(), first
        found, mask = self._support(dense, hessian, first, within, amount)
        pruned = self._solve(found.masked_fill_(~mask, 0), dense, hessian, mask) / scale
        pruned.masked_fill_(~mask, 0)  # no -0
        if not finite(pruned):
            raise LosaError("ALPS made weights that are not finite: the weights or the inputs are too large")
        return pruned, mask

    def _hessian(self, gram: Gram) -> tuple[Tensor, Tensor]:
        """The damped Gram matrix scaled to a unit diagonal, fp32 [in, in], and the root of that diagonal, [in]."""
        total = gram.symmetric().div(gram.sequences).float()
        diagonal = total.diagonal()
        if not finite(total):
            raise LosaError("ALPS's calibration inputs hold NaN or infinity, or overflow in their squares")
        mean = diagonal.mean().item() or 1.0  # silent inputs: any weights do, and the large ones are kept
        undamped = diagonal.clone()
        for attempt in range(ATTEMPTS):
            damping = self.damp * 10**attempt * mean
            torch.add(undamped, damping, out=diagonal)
            scale = diagonal.sqrt()
            hessian = total / scale / scale.unsqueeze(1)
            # not positive definite, as rounding may leave it, conjugate gradients would run away
            if not int(torch.linalg.cholesky_ex(hessian).info):
                return hessian, scale
        raise LosaError(
            f"ALPS's Hessian does not factorise, even damped by {damping:.3g}: take more calibration data or damp"
        )

    def _support(
        self, dense: Tensor, hessian: Tensor, first: Tensor, within: Tensor | None, amount: Amount
    ) -> tuple[Tensor, Tensor]:
        """ADMM: the weights B where it ends, fp32 [out, in], and the mask of the largest of them.

        It minimises tr (B - W) H (B - W)^T over B, and B = D for a D that is zero where pruned; `drift` is the
        multiplier V over rho. The update B = (W H - V + rho D) (H + rho)^-1 is W + (D - V / rho - W) (H / rho + 1)^-1,
        which multiplies by nothing that is larger than one. D is the largest of B + V / rho, the rest is the new V / rho.
        """
        kept, rho, grown = int(first.sum()), float(self.rho), False
        factor = torch.empty_like(hessian)
        sparse, drift, before = dense * first, torch.zeros_like(dense), first
        for iteration in range(self.iterations):
            if iteration % EVERY == 0:
                _factor(hessian, rho, factor)
            free = sparse.sub_(drift).sub_(dense)
            _solve_by(factor, free)
            moved = free.add_(dense) + drift
            mask = masks.choose(moved.abs(), within, amount, "matrix")
            sparse = moved * mask
            drift = moved.sub_(sparse)
            if (iteration + 1) % EVERY:
                continue
            change = int(torch.count_nonzero(mask ^ before)) / kept
            before, last = mask, rho
            if change and (grown or change > SETTLED):
                rho = min(RHO_MAX, rho * next(growth for above, growth in GROWTH if change > above))
                grown = True
            elif grown:
                break
            else:  # held too tightly to stir
                rho *= SHRINK
                if change:
                    torch.mul(dense, first, out=sparse)
                    drift.zero_()
            if rho < RHO_MIN or (iteration >= self.settle and change < self.tolerance):
                break
            drift *= last / rho  # V stays
        return free, masks.choose(free.abs(), within, amount, "matrix")

    def _solve(self, start: Tensor, dense: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
        """The optimum on the mask, by conjugate gradients from `start` (zero off the mask); each row is its own system."""
        residual = torch.mm(dense - start, hessian).mul_(mask)
        direction, product = residual.clone(), torch.empty_like(residual)
        size = residual.norm(dim=1)
        for _ in range(self.cg_steps):
            torch.mm(direction, hessian, out=product)
            step = size.square() / (direction * product).sum(dim=1).clamp_(min=TINY)
            start.addcmul_(step.unsqueeze(1), direction)
            residual.addcmul_(step.unsqueeze(1), product.mul_(mask), value=-1)
            size, last = residual.norm(dim=1), size
            direction.mul_((size / last.clamp(min=TINY)).square().unsqueeze(1)).add_(residual)
        return start


def _factor(hessian: Tensor, rho: float, factor: Tensor) -> None:
    """Puts the lower Cholesky factor of hessian / rho + 1 into `factor`, but for its blocks on the diagonal, inverted."""
    torch.div(hessian, rho, out=factor)
    factor.diagonal().add_(1)
    factor.copy_(torch.linalg.cholesky(factor))  # whose own rows are columns
    for block in spans(0, len(factor), BLOCK):
        invert_upper(factor[block, block].mT)


def _solve_by(factor: Tensor, rows: Tensor) -> None:
    """rows <- rows (L L^T)^-1, in place, `factor` as `_factor` makes it.

    Block by block, all of it is products. With the library's two triangular solves pruning took a fifth longer: they
    turn rows into columns, and what follows must turn them back.
    """
    blocks = spans(0, len(factor), BLOCK)
    for block in blocks:
        before = slice(block.start)
        rest = torch.addmm(rows[:, block], rows[:, before], factor[block, before].mT, alpha=-1)
        torch.mm(rest, factor[block, block].mT, out=rows[:, block])
    for block in blocks[::-1]:
        behind = slice(block.stop, None)
        rest = torch.addmm(rows[:, block], rows[:, behind], factor[behind, block], alpha=-1)
        torch.mm(rest, factor[block, block], out=rows[:, block])
