"""SparseGPT: prune a column at a time and let later columns make up for it (Frantar, Alistarh, arXiv 2301.00774)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from losa import masks
from losa.errors import LosaError
from losa.masks import NM, Amount
from losa.pruners.base import InputSum, Pruner, Statistic

# Columns that are pruned one after the other before their errors reach the rest of the block in one product.
STRIDE = 16
# Damping grows tenfold at each failed factorisation: from 0.01 to 100 times the mean diagonal, where nothing but a
# broken Hessian fails.
ATTEMPTS = 5


class Gram(InputSum):
    """total [in, in] fp32: sum over tokens of x x^T."""

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        super().__init__((in_features, in_features), torch.float32, device)

    def update(self, x: Tensor, sequences: int) -> None:
        x = x.detach().to(self.total.dtype)
        self.total.addmm_(x.t(), x)
        self.sequences += sequences


@dataclass
class SparseGPT(Pruner):
    """Score w^2 / d^2, d the diagonal of the upper Cholesky factor of the inverse Hessian, within `block` columns.

    damp: share of the mean of the Hessian's diagonal that is added to it. block: columns that share one count, and
    whose errors reach the columns behind them in one product.
    """

    damp: float = 0.01
    block: int = 128
    name = "sparsegpt"
    unit = "128 columns"
    needs_inputs = True
    changes_weights = True

    def __post_init__(self) -> None:
        if not isinstance(self.damp, float | int) or not self.damp > 0:
            raise LosaError(f"damp must be a number above 0, not {self.damp!r}")
        if not isinstance(self.block, int) or self.block < 1:
            raise LosaError(f"block must be a whole number above 0, not {self.block!r}")
        self.unit = f"{self.block} columns"

    def statistic(self, in_features: int, device: torch.device | str) -> Gram:
        return Gram(in_features, device)

    def prune(
        self, weight: Tensor, within: Tensor | None, amount: Amount, statistic: Statistic | None
    ) -> tuple[Tensor, Tensor]:
        """A weight pruned before is pruned again when its column comes, with what compensation had made of it.

        Column by column, the columns still to come are the least-squares optimum given those already fixed; a column
        can be fixed at zero only by handing its present value, zero no more, on to the columns behind it. To hold it
        at zero and drop that value would leave the rest optimal for a weight that is not there.
        """
        gram = Gram.require(statistic, weight.shape[1])
        if isinstance(amount, NM) and self.block % amount.m:
            raise LosaError(f"SparseGPT's block of {self.block} columns must be a multiple of {amount.m} for {amount}")
        if not bool(weight.isfinite().all()):
            raise LosaError("SparseGPT was given weights that hold NaN or infinity")
        upper, dead = self._factor(gram)
        # Transposed, a column is contiguous and a block of columns is a view: everything below is in place.
        columns = weight.float().t().clone(memory_format=torch.contiguous_format)
        columns[dead] = 0
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        errors = torch.empty_like(columns[: self.block])
        for span in _spans(0, weight.shape[1], self.block):
            for part in [span] if not isinstance(amount, NM) else _spans(span.start, span.stop, amount.m):
                scores = (columns[part] / upper.diagonal()[part].unsqueeze(1)).square()
                mask[:, part] = masks.choose(scores.t(), None if within is None else within[:, part], amount, "matrix")
                for step in _spans(part.start, part.stop, STRIDE):
                    here = slice(step.start - span.start, step.stop - span.start)
                    _prune_columns(columns[step], ~mask[:, step].t(), upper[step, step], errors[here])
                    rest = slice(step.stop, span.stop)
                    columns[rest].addmm_(upper[step, rest].t(), errors[here], alpha=-1)
            behind = slice(span.stop, None)
            columns[behind].addmm_(upper[span, behind].t(), errors[: span.stop - span.start], alpha=-1)
        pruned = columns.t().contiguous()
        if not bool(pruned.isfinite().all()):
            raise LosaError("SparseGPT made weights that are not finite: the weights or the inputs are too large")
        return pruned, mask

    def _factor(self, gram: Gram) -> tuple[Tensor, Tensor]:
        """U [in, in] fp32, upper, with U^T U the inverse of the damped Hessian; and the dead columns, bool [in]."""
        hessian = gram.total * (2 / gram.sequences)
        if not bool(hessian.isfinite().all()):
            raise LosaError("SparseGPT's calibration inputs hold NaN or infinity, or overflow in their squares")
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1
        mean = diagonal.mean().item()
        added = 0.0
        for attempt in range(ATTEMPTS):
            target = self.damp * mean * 10**attempt
            diagonal += target - added
            added = target
            # H = R R^T with R upper is the Cholesky factorisation read from the other end; then U = R^-1. It is the
            # same U as the factor of an explicit inverse, from one factorisation, and with no inverse to round.
            lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
            if not int(failed):
                identity = torch.eye(len(dead), dtype=hessian.dtype, device=hessian.device)
                upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
                if bool(upper.isfinite().all()):
                    return upper, dead
        raise LosaError(
            f"SparseGPT's Hessian does not factorise, even damped by {added:.3g}: take more calibration data or damp"
        )


def _spans(start: int, stop: int, width: int) -> list[slice]:
    return [slice(at, min(at + width, stop)) for at in range(start, stop, width)]


def _prune_columns(columns: Tensor, gone: Tensor, factor: Tensor, errors: Tensor) -> None:
    """Zero `gone` in `columns` (both [n, out]) in place, compensating in the columns behind; fills errors [n, out].

    factor [n, n] is U's part. The error of a column is the part of it that goes, over its d.
    """
    gone = gone.contiguous()
    scale = (1 / factor.diagonal()).tolist()
    for j, column in enumerate(columns):
        torch.mul(column, gone[j], out=errors[j]).mul_(scale[j])
        column.masked_fill_(gone[j], 0)
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
