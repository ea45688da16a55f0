"""The product every kernel is compared with: unpack, then multiply."""

import torch
from torch import Tensor
from torch.nn import functional as F

from losa.sparse.packed import Packed, unpack


def multiply(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., in] of any float type -> x W^T + bias [..., out] of x's type, computed in float32.

    Just what a dense linear of these weights gives in float32. Holds the whole dense weight in float32 for a moment.
    """
    weight, _ = unpack(packed, torch.float32)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


class Reference:
    """The reference as a kernel: any type, any device, slow."""

    name = "reference"

    def refuses(self, packed: Packed, x_dtype: torch.dtype, device: torch.device) -> str | None:
        """It never does, but for what is no float."""
        return None if x_dtype.is_floating_point else f"multiplies floats, not {x_dtype}"

    def multiply(self, x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
        """See above."""
        return multiply(x, packed, bias)
