"""A sparse matrix as a bit a weight and the kept values: packing, unpacking, checking what a file says.

docs/format.md describes the tensors byte for byte. The mask is the truth: a kept weight may be zero and stays kept.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from losa import masks
from losa.errors import LosaError
from losa.patterns import NM
from losa.units import dtype_name

VERSION = 1
PAD = 64  # zeros behind the last value, so that a vector load that begins at a kept value ends inside the tensor
GROUP = 256  # columns of a row that share an int8 scale
MOST = 2**31  # kept values, which offsets of 32 bits do not reach
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = {dtype_name(dtype): dtype for dtype in (*FLOATS, torch.int8)}
SUFFIXES = ("weight", "weight_mask", "weight_offsets", "weight_scales")


@dataclass(frozen=True)
class Layout:
    """What config.json says of a packed linear; its tensors' shapes and types follow."""

    out_features: int
    in_features: int
    kept: int
    values: torch.dtype
    nm: NM | None = None

    def tensors(self) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shape and type by name, of those of SUFFIXES that there are."""
        rows, columns = self.out_features, self.in_features
        found = {
            "weight": ([self.kept + PAD], self.values),
            "weight_mask": ([rows, -(-columns // 8)], torch.uint8),
        }
        if self.nm is None:
            found["weight_offsets"] = ([rows + 1], torch.int32)
        if self.values == torch.int8:
            found["weight_scales"] = ([rows, -(-columns // GROUP)], torch.bfloat16)
        return found

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.tensors().values())

    def to_json(self) -> dict[str, Any]:
        """An entry of `linears` in config.json; the type of the values is said once, beside them."""
        described = {"shape": [self.out_features, self.in_features], "kept": self.kept}
        return described if self.nm is None else described | {"nm": [self.nm.n, self.nm.m]}


@dataclass(frozen=True)
class Packed:
    """The packed weight [out, in] of a linear, whole and consistent if `pack` made it or `check` has seen it.

    values: [kept + PAD], row after row, columns rising; bfloat16, float16, float32 or int8. mask: uint8
    [out, ceil(in / 8)] as `masks.pack` makes it. offsets: int32 [out + 1], where each row begins in `values`; None if
    `nm`, since all rows then keep as many. scales: bfloat16 [out, ceil(in / GROUP)] if the values are int8.
    """

    values: Tensor
    mask: Tensor
    offsets: Tensor | None
    scales: Tensor | None
    in_features: int
    nm: NM | None = None

    @property
    def out_features(self) -> int:
        return self.mask.shape[0]

    @property
    def kept(self) -> int:
        return len(self.values) - PAD

    @property
    def layout(self) -> Layout:
        return Layout(self.out_features, self.in_features, self.kept, self.values.dtype, self.nm)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as a file holds them, by SUFFIXES."""
        parts = zip(SUFFIXES, (self.values, self.mask, self.offsets, self.scales), strict=True)
        return {name: tensor for name, tensor in parts if tensor is not None}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], in_features: int, nm: NM | None) -> "Packed":
        """Of `tensors`, as `tensors()` gives them."""
        values, mask, offsets, scales = SUFFIXES
        return cls(tensors[values], tensors[mask], tensors.get(offsets), tensors.get(scales), in_features, nm)


@torch.no_grad()
def pack(weight: Tensor, mask: Tensor, values: torch.dtype | None = None) -> Packed:
    """Pack the weights that `mask` keeps, bit for bit, or rounded if `values` is another type than the weight's.

    weight [out, in] of a float type, mask bool [out, in], True keeps. values: one of DTYPES, None for the weight's.
    int8 is q = round(w / scale), one scale a GROUP of columns, the least bfloat16 for which abs(q) <= 127 (0 where all
    weights are). Raises LosaError for other types, for 2^31 kept values, and for int8 of NaN or infinity.
    """
    values = weight.dtype if values is None else values
    if values not in DTYPES.values() or weight.dtype not in FLOATS:
        raise LosaError(f"a weight of {weight.dtype} cannot be packed as {values}: use {', '.join(DTYPES)}")
    bits = masks.pack(mask)
    counts = _counts(bits)
    if (kept := int(counts.sum())) >= MOST:
        raise LosaError(f"a linear keeps {kept} weights: 2^31 and more cannot be packed")
    scales = None
    if values == torch.int8:
        weight, scales = _quantize(weight, mask)
    nm = find_nm(bits, mask.shape[1])
    offsets = None if nm is not None else F.pad(torch.from_numpy(counts.cumsum()), (1, 0)).int().to(bits.device)
    chosen = torch.cat([weight[mask].to(values), weight.new_zeros(PAD, dtype=values)])
    return Packed(chosen, bits, offsets, scales, mask.shape[1], nm)


def _quantize(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """q as float32 [out, in], and the scales."""
    exact = weight.float().masked_fill(~mask, 0)
    rows, columns = exact.shape
    grouped = F.pad(exact, (0, -columns % GROUP)).view(rows, -1, GROUP)
    least = grouped.abs().amax(dim=2) / 127
    scales = least.bfloat16()
    up = scales.float() < least  # rounded up, lest a value reach 128
    scales = (scales.view(torch.int16) + up.to(torch.int16)).view(torch.bfloat16)
    if not _bounded(scales):
        raise LosaError("weights that are NaN, infinity or beyond 3e38 have no int8 values")
    divided = grouped / scales.float().unsqueeze(2)
    q = torch.where(scales.unsqueeze(2) > 0, divided.round().clamp(-127, 127), 0)
    return q.view(rows, -1)[:, :columns], scales


def _bounded(scales: Tensor) -> bool:
    """Whether every product of a scale with an int8 is a number in float32."""
    return bool(((scales >= 0) & (scales.float() * 128).isfinite()).all())


def _counts(bits: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How many weights each row of a packed mask keeps."""
    counts: np.ndarray[Any, np.dtype[np.int64]] = np.bitwise_count(bits.cpu().numpy()).sum(axis=1, dtype=np.int64)
    return counts


def find_nm(bits: Tensor, columns: int) -> NM | None:
    """The smallest m of at most 64, and half a row, of which every m adjacent columns of every row keep as many: N:M."""
    counts = _counts(bits)
    first = int(counts[0])
    if not first or (counts != first).any():
        return None
    for m in range(1, min(columns // 2, 64) + 1):
        nm = NM(first * m // columns, m)
        if columns % m == 0 and nm.n and _keeps(bits[:1], columns, nm) and _keeps(bits, columns, nm):
            return nm
    return None


def _keeps(bits: Tensor, columns: int, nm: NM) -> bool:
    """Whether a packed mask of so many columns, which m divides, keeps `nm`."""
    if 8 % nm.m == 0 and columns % 8 == 0:  # whole groups in every byte: one look at each
        groups = (np.arange(256)[:, None] >> np.arange(0, 8, nm.m)) % 2**nm.m
        return bool((np.bitwise_count(groups) == nm.n).all(axis=1)[bits.cpu().numpy()].all())
    return bool((masks.unpack(bits, columns).view(-1, nm.m).sum(dim=1) == nm.n).all())


@torch.no_grad()
def unpack(packed: Packed, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The weight [out, in], +0.0 where nothing is kept, in `dtype`, and its mask, bool [out, in].

    dtype: None for the values' own, which is bit for bit what was packed; int8 values become float32 (exactly q times
    scale) unless it says otherwise.
    """
    own = torch.float32 if packed.scales is not None else packed.values.dtype
    mask = masks.unpack(packed.mask, packed.in_features)
    weight = torch.zeros(mask.shape, dtype=own, device=mask.device)
    weight.masked_scatter_(mask, packed.values[: packed.kept].to(own))
    if packed.scales is not None:
        weight *= packed.scales.float().repeat_interleave(GROUP, dim=1)[:, : packed.in_features]
    return weight if dtype is None else weight.to(dtype), mask


def check(packed: Packed, name: str, layout: Layout | None = None) -> None:
    """Raise LosaError naming the linear if its tensors do not belong together; what passes is safe to multiply by.

    It is contiguous, too, and on one device. layout: what config.json says of it. Reads the masks once, of the values
    only what pads them.
    """

    def damaged(what: str) -> LosaError:
        return LosaError(f"{name}: {what}: the packed model is damaged")

    for suffix, (shape, dtype) in (layout or packed.layout).tensors().items():
        tensor = packed.tensors().get(suffix)
        if tensor is None:
            raise damaged(f"there is no {suffix}")
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            raise damaged(f"{suffix} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {shape}")
        if tensor.device != packed.values.device:
            where = f"{suffix} is on {tensor.device}, the values on {packed.values.device}"
            raise LosaError(f"{name}: {where}: a packed linear lies on one device")
        if not tensor.is_contiguous():  # kernels read through pointers
            raise LosaError(f"{name}: {suffix} is a view with strides {list(tensor.stride())}: copy it, .contiguous()")
    if packed.values.dtype not in DTYPES.values():
        raise damaged(f"values of {packed.values.dtype} are not known")
    if packed.kept < 0 or packed.kept >= MOST:
        raise damaged(f"{packed.kept} values are kept")
    if bool(packed.values[packed.kept :].contiguous().view(torch.uint8).any()):
        raise damaged("what follows the last value is not zero")
    bits = packed.mask.cpu().numpy()
    if packed.in_features % 8 and bool((bits[:, -1] >> packed.in_features % 8).any()):
        raise damaged("spare bits of its mask are set")
    counts = _counts(packed.mask)
    if packed.offsets is not None:
        offsets = packed.offsets.cpu().numpy().astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != packed.kept or (np.diff(offsets) != counts).any():
            raise damaged("its offsets do not agree with its mask and values")
    elif packed.nm is None:
        raise damaged("it has neither offsets nor N:M")
    elif packed.in_features % packed.nm.m or not _keeps(packed.mask, packed.in_features, packed.nm):
        raise damaged(f"its mask does not keep {packed.nm}")
    elif counts.sum() != packed.kept:
        raise damaged(f"its mask keeps {counts.sum()} weights and there are {packed.kept}")
    if packed.scales is not None and not _bounded(packed.scales):
        raise damaged("a scale is negative, too large or no number")
