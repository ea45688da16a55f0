"""The native kernels: one class an instruction set, all the same but for what they need of the processor.

Up to ROWS rows of x are multiplied in one pass over the packed weights; on two cores with AVX2 that is faster than
torch's dense product up to 64 rows. More rows (prefill): the weights are expanded tile by tile, and each tile goes
through torch's dense product. In bfloat16 that is as fast from 16 rows on, on two cores with AMX, and twice as fast at 32.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from losa.sparse import native
from losa.sparse.packed import Packed

ROWS, BF16_ROWS = 64, 16
TILE = 2**22  # elements: 16 MiB of floats, which the last-level cache still holds
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # enum Type in csrc/losa.h


class Matrix(ctypes.Structure):
    """struct Matrix in csrc/losa.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "mask", "offsets", "scales", "sums")),
        *((name, ctypes.c_int64) for name in ("out", "columns", "per_row")),
        ("type", ctypes.c_int32),
    )


class Call(ctypes.Structure):
    """struct Call in csrc/losa.h."""

    _fields_ = (
        ("weight", Matrix),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("x_type", "bias_type", "threads")),
    )


class Native:
    """A kernel of the native library; see `losa.sparse.kernels.Kernel`."""

    name: str
    needs: tuple[str, ...] = ()  # of the processor, as losa_features() names it
    values: tuple[torch.dtype, ...] = tuple(TYPES)
    symbol: str  # its functions in csrc are losa_multiply_<symbol>, losa_expand_<expands>
    expands: str
    bf16_tiles = False  # whether the hardware multiplies bfloat16, and expansion makes it
    summed = False  # whether decoding wants the sums of int8 values

    def refuses(self, packed: Packed, x_dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot multiply these, None if it can."""
        if device.type != "cpu":
            return f"runs on the CPU, not on {device.type}"
        if x_dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"multiplies float32, bfloat16 and float16, not {x_dtype}"
        if packed.values.dtype not in self.values:
            return f"has no values of {packed.values.dtype}"
        return self.lacking()

    def lacking(self) -> str | None:
        """What of the machine keeps it from running, None if nothing does."""
        try:
            library = native.library()
        except native.Unavailable as error:
            return str(error)
        has = features(library)
        if lacking := [need for need in self.needs if need not in has]:
            return f"this processor has no {', '.join(lacking)}"
        if not hasattr(library, f"losa_multiply_{self.symbol}"):
            return "the compiler that built the native kernels does not know these instructions"
        return None

    def multiply(self, x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> x W^T + bias [..., out] of x's type, summed in float32."""
        if x.dtype == torch.float16:
            return self.multiply(x.float(), packed, bias).half()
        if bias is not None and bias.dtype not in (torch.float32, torch.bfloat16):
            bias = bias.float()
        x = x.contiguous()
        rows = x.numel() // packed.in_features
        if rows > self.at_once(x.dtype):
            y = self._many(x.view(rows, packed.in_features), packed, bias)
            return y.view(*x.shape[:-1], packed.out_features)
        return self.prepared(x, packed, bias)()

    def at_once(self, dtype: torch.dtype) -> int:
        """Up to how many rows of x are multiplied in one pass over the weights."""
        return BF16_ROWS if self.bf16_tiles and dtype == torch.bfloat16 else ROWS

    def prepared(self, x: Tensor, packed: Packed, bias: Tensor | None = None) -> Callable[[], Tensor]:
        """That product, of rows `at_once`, with its arguments made beforehand, as decoding has them: it writes one y.

        x contiguous, float32 or bfloat16; bias float32 or bfloat16. Right after a large product, whose weights have
        driven all else from the processor's caches, making them takes 75 us.
        """
        y = torch.empty((*x.shape[:-1], packed.out_features), dtype=x.dtype)
        rows = x.numel() // packed.in_features
        if not rows:
            return lambda: y
        call = Call(
            matrix(packed),
            x.data_ptr(),
            _address(bias),
            y.data_ptr(),
            rows,
            TYPES[x.dtype],
            0 if bias is None else TYPES[bias.dtype],
            torch.get_num_threads(),
        )
        multiply = functools.partial(function(f"losa_multiply_{self.symbol}"), ctypes.byref(call))
        return functools.partial(product, multiply, y, x, packed, bias)

    def _many(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        dtype = torch.float32
        if self.bf16_tiles and x.dtype == torch.bfloat16 and packed.values.dtype in (torch.bfloat16, torch.int8):
            dtype = torch.bfloat16  # int8 values times their scale are rounded to it
        factor = x.to(dtype)
        y = torch.empty((len(x), packed.out_features), dtype=dtype)
        stride = -(-packed.in_features // 64) * 64
        height = max(64, TILE // stride // 64 * 64)
        tile = torch.empty((min(height, packed.out_features), stride), dtype=dtype)
        weight = matrix(packed)
        expand = function(f"losa_expand_{self.expands}{'_bf16' if dtype == torch.bfloat16 else ''}")
        added = torch.zeros(1, dtype=dtype) if bias is None else bias.to(dtype)  # with the product: rounded once
        for first in range(0, packed.out_features, height):
            rows = slice(first, min(first + height, packed.out_features))
            count = rows.stop - first
            _done(expand(ctypes.byref(weight), first, count, tile.data_ptr(), stride, torch.get_num_threads()))
            part = added if bias is None else added[rows]
            torch.addmm(
                part, factor, tile[:count, : packed.in_features].t(), out=y[:, rows], beta=int(bias is not None)
            )
        return y.to(x.dtype)


class AVX512BF16(Native):
    """Thirty-two columns of bfloat16 at a time, or 64 of int8, whose activations are then 16-bit fixed point."""

    name, symbol, expands = "avx512-bf16", "avx512_bf16", "avx512"
    needs = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vbmi2", "avx512_vnni", "avx512_bf16")
    values = (torch.bfloat16, torch.int8)
    bf16_tiles = True
    summed = True


class AVX512(Native):
    """Sixteen columns at a time."""

    name, symbol, expands = "avx512", "avx512", "avx512"
    needs = ("avx512f", "avx512bw", "avx512vl", "avx512dq")


class AVX2(Native):
    """Eight columns at a time, through a table of shuffles."""

    name, symbol, expands = "avx2", "avx2", "avx2"
    needs = ("avx2", "fma", "bmi2", "popcnt", "f16c")


class Portable(Native):
    """Plain C++, for any processor."""

    name, symbol, expands = "portable", "portable", "portable"


@functools.cache
def features(library: ctypes.CDLL) -> frozenset[str]:
    """What of the kernels' needs this processor has."""
    library.losa_features.restype = ctypes.c_char_p
    return frozenset(library.losa_features().decode().split())


@functools.cache
def function(name: str) -> Callable[..., int]:
    """A function of the native library, with its signature."""
    found: Any = getattr(native.library(), name)
    kind = name.split("_")[1]
    pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    found.argtypes = {
        "multiply": [pointer],
        "expand": [pointer, number, number, pointer, number, small],
        "dense": [pointer, pointer, pointer, number, number, small],
        "decode": [pointer],
        "sums": [pointer, pointer, small],
        "form": [pointer],
        "read": [pointer, number, small, small],
        "effective": [pointer],
        "gradients": [pointer],
    }[kind]
    found.restype = ctypes.c_uint64 if kind == "read" else ctypes.c_int
    typed: Callable[..., int] = found
    return typed


def matrix(packed: Packed) -> Matrix:
    """The weight for the native library; lives no longer than `packed`."""
    values = packed.values
    out = packed.mask.shape[0]
    return Matrix(
        values.data_ptr(),
        packed.mask.data_ptr(),
        _address(packed.offsets),
        _address(packed.scales),
        None,
        out,
        packed.in_features,
        packed.kept // out,
        TYPES[values.dtype],
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def product(multiply: Callable[[], int], y: Tensor, *_addressed: object) -> Tensor:
    """y, once `multiply` has filled it; of what else it has the addresses is held as long as this can be called."""
    _done(multiply())
    return y


def _done(code: int) -> None:
    if code:
        raise MemoryError("no memory for the activations of a packed linear")
