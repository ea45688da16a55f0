"""Keep-masks: which weights stay (True) and which are pruned (False); choosing, nesting, packing, counting."""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from losa.errors import LosaError
from losa.patterns import NM, Amount

# Scores are gone through so many at a time, so that what a selection takes (three to six times as much) does not grow
# with the matrix.
CHUNK = 2 << 20


def count_pruned(sparsity: float, n: int) -> int:
    """How many of a unit of `n` weights are pruned: floor(sparsity * n). Raises LosaError outside [0, 1]."""
    if not 0 <= sparsity <= 1:
        raise LosaError(f"sparsity must be within 0 and 1, not {sparsity}")
    # 0.29 * 100 is 28.999999999999996: what is whole but for rounding stays whole
    return min(n, math.floor(sparsity * n + 1e-9))


def choose(scores: Tensor, within: Tensor | None, amount: Amount, unit: Literal["row", "matrix"]) -> Tensor:
    """The keep-mask that prunes the lowest scores: bool [out, in], contiguous.

    scores [out, in], any float; within bool [out, in], the mask so far, or None. amount: a share, of which each unit (a
    row, or the whole matrix) loses exactly count_pruned; or an NM, where the unit is every m columns of a row. Those
    pruned before count first and never come back, so where they are already more than that, nothing changes. Equal
    scores go in the order of their index. Scores outside `within` are not read. Raises LosaError for a NaN elsewhere,
    and where m does not divide the columns.
    """
    if unit not in ("row", "matrix"):
        raise LosaError(f"counting unit must be row or matrix, not {unit!r}")
    if within is not None and (within.dtype != torch.bool or within.shape != scores.shape):
        raise LosaError(f"mask must be bool {list(scores.shape)}, not {within.dtype} {list(within.shape)}")
    if isinstance(amount, NM):
        amount.check(scores.shape[1])
        size, count = amount.m, amount.m - amount.n
    else:
        size = scores.numel() if unit == "matrix" else scores.shape[1]
        count = count_pruned(amount, size)
    units = scores.contiguous().view(-1, size)
    inside = None if within is None else within.contiguous().view(-1, size)
    step = max(1, CHUNK // size)
    if len(units) <= step:
        return _lowest_go(units, inside, count).view(scores.shape)
    keep = torch.empty(units.shape, dtype=torch.bool, device=scores.device)
    for start in range(0, len(units), step):
        some = slice(start, start + step)
        keep[some] = _lowest_go(units[some], None if inside is None else inside[some], count)
    return keep.view(scores.shape)


def _lowest_go(units: Tensor, within: Tensor | None, count: int) -> Tensor:
    """The `count` lowest of each unit (row) go, those outside `within` first; bool like `units`."""
    if within is not None:
        # strictly below whatever is alive, so that they are counted first
        units = units.detach().clamp(min=torch.finfo(units.dtype).min).masked_fill_(~within, -math.inf)
    if bool(units.amax().isnan()):
        raise LosaError("pruning scores are not a number: the weights or the calibration inputs hold NaN or infinity")
    if count == 0:
        keep = torch.ones_like(units, dtype=torch.bool)
    else:
        threshold = _smallest(units, count)
        keep = units > threshold
        if int(keep.count_nonzero()) < keep.numel() - count * len(units):  # some are tied with the threshold and stay
            tied = units == threshold
            # how many of the tied must go; int32, as beside int64 the running count would be copied
            short = count - (units < threshold).sum(dim=1, keepdim=True, dtype=torch.int32)
            keep |= tied & (tied.cumsum(dim=1, dtype=torch.int32) > short)
    return keep if within is None else keep.logical_and_(within)


def _smallest(rows: Tensor, k: int) -> Tensor:
    """The k-th smallest of each row, [rows, 1]."""
    if rows.device.type == "cpu":  # a selection: five times as fast as a sort
        if len(rows) == 1 and rows.dtype == torch.float32:  # numpy's is twice as fast again, but knows no threads
            return torch.from_numpy(np.partition(rows.detach().numpy(), k - 1)[:, k - 1 : k].copy())
        return rows.kthvalue(k, dim=1, keepdim=True).values
    # elsewhere kthvalue is refused under torch.use_deterministic_algorithms, and a sort is fast
    return rows.sort(dim=1, stable=True).values[:, k - 1 : k]


def pack(mask: Tensor) -> Tensor:
    """bool [out, in] -> uint8 [out, ceil(in / 8)]: column 8 j + i is bit i of byte j; spare bits are 0."""
    rows, columns = mask.shape
    padded = F.pad(mask.to(torch.uint8), (0, -columns % 8)).view(rows, -(-columns // 8), 8)
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded * bits).sum(dim=2, dtype=torch.uint8)


def unpack(bits: Tensor, in_features: int) -> Tensor:
    """uint8 [out, ceil(in / 8)] -> bool [out, in_features], contiguous.

    Part of every training forward: eight columns are looked up at once, which on one core takes a tenth of the time of
    shifting them out (5632 x 2048: 0.95 against 9.6 ms), and a fifth of indexing's.
    """
    rows, width = bits.shape
    if width != -(-in_features // 8):
        raise LosaError(f"a packed mask of {width} bytes a row does not hold {in_features} columns")
    eights = _table(bits.device).index_select(0, bits.reshape(-1).int())
    return eights.view(torch.bool).view(rows, 8 * width)[:, :in_features].contiguous()


@functools.cache
def _table(device: torch.device) -> Tensor:
    """int64 [256]: entry b has, as its eight bytes in memory, the eight bits of b, lowest first."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        shifts = torch.arange(8)
        bits = (torch.arange(256).unsqueeze(1) >> shifts) & 1
        return bits.to(torch.bool).view(torch.int64).squeeze(1).to(device)


def of_weight(name: str, shape: Sequence[int], bits: Tensor, folder: object) -> Tensor:
    """The mask, bool, of a weight of that shape [out, in]. Raises LosaError if `bits`, uint8 and 2-D out of `folder`, is not its."""
    rows, columns = shape
    if list(bits.shape) != [rows, -(-columns // 8)]:
        raise LosaError(f"{name}: the mask in {str(folder)!r} does not fit its weight {[rows, columns]}")
    if columns % 8 and bool((bits[:, -1] >> columns % 8).any()):
        raise LosaError(f"{name}: spare bits of the mask in {str(folder)!r} are set: it is damaged")
    return unpack(bits, columns)


def check_held(name: str, weight: Tensor, mask: Tensor, folder: object) -> None:
    """Raise LosaError if a weight [out, in] that `mask` prunes is not zero; `folder` has both."""
    if bool((weight[~mask] != 0).any()):
        raise LosaError(f"{name}: weights that its mask prunes are not zero: {str(folder)!r} was changed")


def sparsity(mask: Tensor) -> float:
    """The share of a keep-mask that is pruned."""
    return 1 - int(mask.count_nonzero()) / mask.numel()
