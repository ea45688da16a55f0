"""2:4 through the hardware: torch's semi-structured tensors, on NVIDIA GPUs from Ampere on.

Torch stores the kept values and two bits each of where they are: as many bytes as the packed form. It is made from that at
the first product and kept beside it as long as the packed tensors live, so that a 2:4 linear takes twice its packed size.
"""

import warnings
import weakref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from losa.patterns import NM
from losa.sparse.packed import Packed, unpack

PATTERNS = (NM(1, 2), NM(2, 4))  # which keep two of every four
MULTIPLES = (32, 64)  # of out and in, for both of the libraries that torch may take

Key = tuple[tuple[StorageWeakRef, int], ...]
_held: dict[Key, tuple[tuple[int, ...], Tensor]] = {}


class SemiStructured:
    """Sparse tensor cores, for masks that keep exactly 2 of every 4; see `losa.sparse.kernels.Kernel`."""

    name = "2:4"

    def refuses(self, packed: Packed, x_dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot multiply these, None if it can."""
        if device.type != "cuda":
            return f"runs on CUDA, not on {device.type}"
        if packed.nm not in PATTERNS:
            return f"multiplies masks that keep 2:4, not {packed.nm or 'unstructured ones'}"
        if packed.values.dtype not in (torch.bfloat16, torch.float16):
            return f"has no values of {packed.values.dtype}"
        if x_dtype != packed.values.dtype:
            return f"multiplies {packed.values.dtype} values by {packed.values.dtype}, not by {x_dtype}"
        rows, columns = MULTIPLES
        if packed.out_features % rows or packed.in_features % columns:
            return f"multiplies shapes that {rows} and {columns} divide, not {packed.out_features}x{packed.in_features}"
        if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
            return "needs an NVIDIA GPU of compute capability 8.0"
        return None

    def multiply(self, x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> x W^T + bias [..., out] of x's type, summed in float32."""
        rows = x.reshape(-1, packed.in_features)
        shape = (*x.shape[:-1], packed.out_features)
        if not len(rows):
            return x.new_empty(shape)
        y = F.linear(rows, _compressed(packed), None if bias is None else bias.to(x.dtype))
        return y.reshape(shape)


def _compressed(packed: Packed) -> Tensor:
    """The weight as torch's hardware wants it, made once; again if a packed tensor was written to since."""
    parts = (packed.values, packed.mask)
    storages = [part.untyped_storage() for part in parts]  # of which the tensors, which come and go, are views
    key = tuple((StorageWeakRef(s), int(part.storage_offset())) for s, part in zip(storages, parts, strict=True))
    version = tuple(0 if part.is_inference() else part._version for part in parts)
    found = _held.get(key)
    if found is None or found[0] != version:
        if found is None:
            for storage in storages:
                weakref.finalize(storage, _held.pop, key, None).atexit = False
        found = _held[key] = (version, _compress(unpack(packed)[0]))
    return found[1]


def _compress(dense: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        made: Tensor = torch.sparse.to_sparse_semi_structured(dense)
    return made
