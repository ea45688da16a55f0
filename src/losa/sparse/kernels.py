"""The one function through which packed linears multiply, as a torch op, so that compiled graphs stay whole."""

import torch
from torch import Tensor

from losa.sparse import reference
from losa.sparse.packed import Packed


def multiply(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> x W^T + bias, [..., out], of x's type."""
    result: Tensor = packed_linear(
        x, packed.values, packed.mask, packed.offsets, packed.scales, bias, packed.in_features
    )
    return result


@torch.library.custom_op("losa::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    in_features: int,
) -> Tensor:
    """The op: see `multiply`."""
    return reference.multiply(x, Packed(values, mask, offsets, scales, in_features), bias)


@packed_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    in_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], mask.shape[0])
