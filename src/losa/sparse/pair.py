"""The weight of a masked low-rank linear, and the gradients of its pair, in native code on a CPU (csrc/pair.h): each goes once
through the matrix, where torch's operations go through it five times and hold two more of its size.

None is what each gives where it cannot: `losa.adapters` then computes the same with torch.
"""

import ctypes
import functools
import logging

import torch
from torch import Tensor, nn

from losa.sparse import cpu

KINDS = (torch.float32, torch.bfloat16)
PIECE = 64  # rows of a piece of the work
# Partial sums of dA take at most 1/16 of an fp32 matrix, or 16 times dA; beyond that rank torch's products are as fast.
MOST_RANK = 64
log = logging.getLogger("losa.sparse")


class Pair(ctypes.Structure):
    """struct Pair in csrc/losa.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "mask", "a", "b", "effective", "da", "db")),
        *((name, ctypes.c_int64) for name in ("out", "columns", "rank", "b_stride", "piece")),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("type", "effective_type", "threads")),
    )


def effective_weight(
    weight: Tensor, bits: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor | None:
    """M * (W + s B A) as a new tensor of `dtype`: `losa.adapters.effective_weight` says of what. NaN that is masked is zero."""
    symbol = _symbol(weight, bits, a, b)
    if symbol is None or dtype not in KINDS:
        return None
    a = a.contiguous()
    out = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    pair = _pair(weight, bits, a, b, scaling, PIECE)
    pair.effective, pair.effective_type = out.data_ptr(), cpu.TYPES[dtype]
    cpu.function(f"losa_effective_{symbol}")(ctypes.byref(pair))
    return out


def gradients(gradient: Tensor, bits: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor] | None:
    """dA = s B^T (M * G) [r, in] and dB = s (M * G) A^T [out, r], fp32, from the dense gradient G [out, in].

    Sums are taken in one order whatever the number of threads. What is masked of G counts as zero, NaN too.
    """
    symbol = _symbol(gradient, bits, a, b)
    if symbol is None or len(a) > MOST_RANK:
        return None
    a = a.contiguous()
    piece = max(PIECE, min(16 * len(a), len(gradient) // 16))
    pair = _pair(gradient, bits, a, b, scaling, piece)
    parts = torch.empty((-(-len(gradient) // piece), *a.shape), dtype=torch.float32, device="cpu")
    db = torch.empty(b.shape, dtype=torch.float32, device="cpu")
    pair.da, pair.db = parts.data_ptr(), db.data_ptr()
    cpu.function(f"losa_gradients_{symbol}")(ctypes.byref(pair))
    return parts.sum(0), db


def _pair(matrix: Tensor, bits: Tensor, a: Tensor, b: Tensor, scaling: float, piece: int) -> Pair:
    return Pair(
        *(tensor.data_ptr() for tensor in (matrix, bits, a, b)),
        *(None, None, None),
        *(*matrix.shape, len(a), b.stride(0), piece),
        scaling,
        *(cpu.TYPES[matrix.dtype], 0, torch.get_num_threads()),
    )


def _symbol(matrix: Tensor, bits: Tensor, a: Tensor, b: Tensor) -> str | None:
    """Of the functions that compute with these; None if none do: torch then does, or says what is wrong with them."""
    tensors = (matrix, bits, a, b)
    if torch.compiler.is_compiling() or not all(type(t) in (Tensor, nn.Parameter) for t in tensors):
        return None
    out, columns = matrix.shape
    fit = bits.shape == (out, -(-columns // 8)) and a.shape == (len(a), columns) and b.shape == (out, len(a))
    kinds = matrix.dtype in KINDS and bits.dtype == torch.uint8 and a.dtype == b.dtype == torch.float32
    there = all(t.device.type == "cpu" for t in tensors) and matrix.numel() > 0 and len(a) > 0
    if not (fit and kinds and there and matrix.is_contiguous() and bits.is_contiguous() and b.stride(1) == 1):
        return None
    return best()


@functools.cache
def best() -> str | None:
    """The symbol of the best kernels that this machine can run; None if it can run none."""
    reasons = []
    for kernel in (cpu.AVX512(), cpu.AVX2()):  # plain C++ takes up to twice as long as torch
        if (why := kernel.lacking()) is None:
            return kernel.symbol
        reasons.append(why)
    log.info(
        "masked linears are computed by torch alone, several times as slowly: %s", "; ".join(dict.fromkeys(reasons))
    )
    return None
