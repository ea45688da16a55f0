"""The kernels for GPUs: Triton's over the packed format, and the hardware's own for 2:4."""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from losa.sparse.packed import Packed

ROWS = 8  # of x, which the decoding kernel takes at most; more of them go through a dense weight
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 1  # a program; with one, x goes to the lanes that need it without shared memory
COLUMNS = 1024  # a step of expansion


class Triton:
    """Decoding over the packed format; see `losa.sparse.kernels.Kernel` and losa.sparse.decode.

    More than ROWS rows of x: the weight is expanded, dense, and goes through torch's product. It is of x's type where
    the values are of that or int8 (then rounded to it), else float32.
    """

    name = "triton"

    def refuses(self, packed: Packed, x_dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot multiply these, None if it can. On a CPU only in Triton's interpreter (TRITON_INTERPRET=1)."""
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            return f"runs on CUDA, not on {device.type}"
        if x_dtype not in FLOATS:
            return f"multiplies float32, bfloat16 and float16, not {x_dtype}"
        if not has_triton():
            return "Triton is not installed: pip install triton"
        if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "needs CUDA compute capability 8.0, for bfloat16"
        return None

    def multiply(self, x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> x W^T + bias [..., out] of x's type, summed in float32."""
        x = x.contiguous()
        rows = x.numel() // packed.in_features
        if rows > ROWS:
            return self._many(x, packed, bias)
        return self._few(x, rows, packed, bias)

    def _few(self, x: Tensor, rows: int, packed: Packed, bias: Tensor | None, **tried: int) -> Tensor:
        """tried: MANY or num_warps in the place of those above; benchmarks/gpu.py looks for better ones."""
        y = x.new_empty((*x.shape[:-1], packed.out_features), dtype=_written(x.dtype))
        if not rows:
            return y.to(x.dtype)
        held = 1 << (rows - 1).bit_length()
        chosen = {
            "MANY": _many_rows(rows_at_once(packed.out_features, held)),
            "TILES": tiles(packed.mask.shape[1]),
            "PTX": has_ptx(),
            "num_warps": WARPS,
        }
        chosen |= tried
        sizes = (rows, packed.out_features, packed.in_features, *_strides(packed))
        _run("multiply", packed.out_features, (x, *_tensors(packed), bias, y, *sizes), R=held, **chosen)
        return y.to(x.dtype)

    def _many(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        exact = packed.values.dtype in (x.dtype, torch.int8)
        weight = self.expand(packed, x.dtype if exact else torch.float32)
        y = F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
        return y.to(x.dtype)

    def expand(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """The dense weight [out, in], rounded to `dtype`."""
        shape = (packed.out_features, packed.in_features)
        weight = packed.values.new_empty(shape, dtype=_written(dtype))
        sizes = (*shape, *_strides(packed))
        _run("expand", shape[0], (*_tensors(packed), weight, *sizes), MANY=_many_rows(1), COLUMNS=COLUMNS)
        return weight.to(dtype)


def _run(function: str, rows: int, arguments: tuple[Any, ...], **chosen: int) -> None:
    """Launch a function of losa.sparse.decode on programs of MANY of so many rows."""
    from losa.sparse import decode

    device = arguments[0].device  # Triton launches on the current one, whatever its tensors are on; -1 is none
    with torch.cuda.device(device if device.type == "cuda" else -1):
        getattr(decode, function)[(-(-rows // chosen["MANY"]),)](*arguments, **chosen)


def _tensors(packed: Packed) -> tuple[Tensor | None, ...]:
    return packed.values, packed.mask, packed.offsets, packed.scales


def _strides(packed: Packed) -> tuple[int, int, int]:
    """Bytes of mask a row, scales a row, kept values a row (of use only where all rows keep as many)."""
    groups = 0 if packed.scales is None else packed.scales.shape[1]
    return packed.mask.shape[1], groups, packed.kept // packed.out_features


def has_triton() -> bool:
    """Whether it is installed; it is imported at the first product."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def rows_at_once(out: int, held: int) -> int:
    """Of `out` rows of the weight, a program's: four share what is done once, two make programs enough of a small matrix
    (2048 of 4096 rows, some 16 to each of a GPU's 132), and fit its registers beside many rows of x."""
    return 4 if out >= 8192 and held < 8 else 2


def tiles(width: int) -> int:
    """Of 32 bytes, that a program takes at once of rows of so many."""
    return min(4, -(-width // 32))


def has_ptx() -> bool:
    """Whether Triton makes code for NVIDIA's GPUs."""
    return torch.version.hip is None and not interpreted()


def _many_rows(many: int) -> int:
    """Rows of the weight a program: the interpreter takes about as long for one as for many."""
    return 64 if interpreted() else many


def _written(dtype: torch.dtype) -> torch.dtype:
    """What a kernel writes: the interpreter cuts bfloat16 off where a GPU rounds, and so leaves it to torch."""
    return torch.float32 if interpreted() else dtype
