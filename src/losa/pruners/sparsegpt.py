"""SparseGPT: prune a column at a time and let later columns make up for it (Frantar, Alistarh, arXiv 2301.00774)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from losa import masks
from losa.errors import LosaError
from losa.patterns import NM, Amount
from losa.pruners.base import InputSum, Pruner, Statistic

# Columns that are pruned one after the other before their errors reach others of the block in one product; of N:M, M.
STRIDE = 16
# Columns of a triangular matrix that are inverted at once.
LEAF = 128
# Damping grows tenfold at each failed factorisation: from 0.01 to 100 times the mean diagonal, where nothing but a
# broken Hessian fails.
ATTEMPTS = 5
# A Gram matrix is gathered by so many of its rows, from so many tokens, at once.
PANEL, ROWS = 256, 2048


class Gram(InputSum):
    """total [in, in] float64: sum over tokens of x x^T, of which only the upper triangle is gathered.

    In float64 down to the products on a CPU: rounded to float32 they move scores by 2e-5, and then masks depend on how
    tokens were split among processes. That half of them is never made pays for most of it. An accelerator may do float64 at a
    sixty-fourth of its speed: there the products are float32, and their sums over ROWS tokens are added up in float64
    (in float32 on Apple's GPUs, which have no other).
    """

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        kind = torch.device(device).type
        super().__init__((in_features, in_features), torch.float32 if kind == "mps" else torch.float64, device)
        self.products = torch.float64 if kind == "cpu" else torch.float32

    def update(self, x: Tensor, sequences: int) -> None:
        for rows in x.detach().split(ROWS):
            rows = rows.to(self.products)
            for panel in spans(0, len(self.total), PANEL):
                into, left, right = self.total[panel, panel.start :], rows[:, panel].t(), rows[:, panel.start :]
                if self.products == into.dtype:
                    into.addmm_(left, right)
                else:
                    into += left @ right
        self.sequences += sequences

    def symmetric(self) -> Tensor:
        """`total`, what lies below its PANEL-wide diagonal blocks filled from above them."""
        for panel in spans(0, len(self.total), PANEL):
            self.total[panel.stop :, panel] = self.total[panel, panel.stop :].t()
        return self.total


@dataclass
class SparseGPT(Pruner):
    """Score w^2 / d^2, d the diagonal of the upper Cholesky factor of the inverse Hessian, within `block` columns.

    damp: share of the mean of the Hessian's diagonal that is added to it. block: columns that share one count, and
    whose errors reach the columns behind them in one product; of N:M, the multiple of M below it.
    """

    damp: float = 0.01
    block: int = 128
    name = "sparsegpt"
    unit = "128 columns"
    needs_inputs = True
    changes_weights = True
    copies = ((0.1, 3.0), (3.75, 0.7))

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
        width = self.block
        if isinstance(amount, NM):  # a block must not cut a group; otherwise it plays no part then
            amount.check(weight.shape[1])
            width = max(amount.m, width - width % amount.m)
        if not finite(weight):
            raise LosaError("SparseGPT was given weights that hold NaN or infinity")
        upper, dead = self._factor(gram)
        # Transposed, a column is contiguous and a block of columns is a view: everything below is in place.
        columns = weight.float().t().clone(memory_format=torch.contiguous_format)
        columns.index_fill_(0, dead.nonzero().squeeze(1), 0)
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        buffer = torch.empty_like(columns[:width])
        for span in spans(0, weight.shape[1], width):
            errors, inside = buffer[: span.stop - span.start], None if within is None else within[:, span]
            _prune_columns(columns[span], upper[span, span], inside, amount, mask[:, span], errors)
            behind = slice(span.stop, None)
            columns[behind].addmm_(upper[span, behind].t(), errors, alpha=-1)
        # Plus zero, for what is negative times False is minus zero; masked_fill_ takes three times as long.
        pruned = columns.t().contiguous().mul_(mask).add_(0.0)
        if not finite(pruned):
            raise LosaError("SparseGPT made weights that are not finite: the weights or the inputs are too large")
        return pruned, mask

    def _factor(self, gram: Gram) -> tuple[Tensor, Tensor]:
        """U [in, in] fp32, upper, with U^T U the inverse of the damped Hessian; and the dead columns, bool [in].

        In float64 up to there: what float32 rounds in a factorisation, the Hessian's condition multiplies.
        """
        total = gram.symmetric()
        # the scores, which grow with the diagonal, are float32
        if not finite(total) or float(total.diagonal().amax()) > torch.finfo(torch.float32).max:
            raise LosaError("SparseGPT's calibration inputs hold NaN or infinity, or overflow in their squares")
        failed = torch.zeros((), dtype=torch.int32, device=total.device)
        for attempt in range(ATTEMPTS):
            # H = R R^T with R upper is the Cholesky factorisation read from the other end; then U = R^-1. It is the
            # same U as the factor of an explicit inverse, from one factorisation, and with no inverse to round.
            hessian = total.flip(0, 1).mul_(2 / gram.sequences)
            diagonal = hessian.diagonal()
            dead = diagonal == 0
            diagonal[dead] = 1
            damping = self.damp * 10**attempt * diagonal.mean()
            diagonal += damping
            # in place: the library works by columns, so that what it makes is the transpose of what `hessian` holds then
            torch.linalg.cholesky_ex(hessian.mT, out=(hessian.mT, failed))
            if not int(failed):
                invert_upper(hessian)
                upper = hessian.mT.float()
            del hessian, diagonal  # before another is made
            if not int(failed) and finite(upper):
                return upper.flip(0, 1), dead.flip(0)
        raise LosaError(
            f"SparseGPT's Hessian does not factorise, even damped by {damping:.3g}: take more calibration data or damp"
        )


def invert_upper(upper: Tensor) -> None:
    """Inverts an upper triangular matrix in place, by halves: to solve for the identity takes more than twice as long."""
    half = len(upper) // 2
    if len(upper) <= LEAF:
        identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
        return
    first, corner, last = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    invert_upper(first)
    invert_upper(last)
    corner.addmm_(first, corner @ last, beta=0, alpha=-1)


def spans(start: int, stop: int, width: int) -> list[slice]:
    return [slice(at, min(at + width, stop)) for at in range(start, stop, width)]


def _prune_columns(
    columns: Tensor, factor: Tensor, within: Tensor | None, amount: Amount, mask: Tensor, errors: Tensor
) -> None:
    """Prune one block: compensates `columns` [n, out] in place, fills mask [out, n] and errors [n, out].

    factor [n, n] is U's part, within [out, n] the mask so far. What goes keeps its value in `columns`, as compensated
    by those before it; its error is that value over its d.
    """
    width, scale = len(columns), factor.diagonal().unsqueeze(1)
    stride = amount.m if isinstance(amount, NM) else STRIDE
    for done, step in enumerate(spans(0, width, stride), 1):
        unit = step if isinstance(amount, NM) else slice(0, width)
        if step.start == unit.start:
            scores = (columns[unit] / scale[unit]).square_()
            keep = masks.choose(scores.t(), None if within is None else within[:, unit], amount, "matrix")
            mask[:, unit] = keep
            errors[unit].copy_(~keep.t()).div_(scale[unit])
        # Two kernels a column, which draws its compensation from the stride rather than handing its own on.
        for j in range(step.start, step.stop):
            column, before = columns[j], slice(step.start, j)
            if j > step.start:
                column.addmv_(errors[before].t(), factor[before, j], alpha=-1)
            errors[j].mul_(column)
        # After the 1st, 2nd, 3rd, 4th ... stride the last 1, 2, 1, 4 ... (the lowest bit) reach as many behind them:
        # each pair of strides meets once, just in time, in products that are few and large.
        reach = (done & -done) * stride
        if step.stop < width:
            last, behind = slice(step.stop - reach, step.stop), slice(step.stop, step.stop + reach)
            columns[behind].addmm_(factor[last, behind].t(), errors[last], alpha=-1)


def finite(tensor: Tensor) -> bool:
    """Whether all of it is: without the mask that isfinite() makes, which takes twenty times as long."""
    return bool(torch.stack([tensor.amin(), tensor.amax()]).isfinite().all())
