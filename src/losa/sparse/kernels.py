"""What multiplies by packed weights: the contract, the choice, and the torch op through which all of it goes.

A kernel is named by its user (`LOSA_KERNEL`, or the argument) or is the first of registry.KERNELS that does not refuse.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from losa import registry
from losa.errors import LosaError
from losa.patterns import NM
from losa.sparse.packed import Packed, unpack

log = logging.getLogger("losa.sparse")
AUTO = "auto"


class Kernel(Protocol):
    """A way to multiply by packed weights, made without arguments."""

    name: str

    def refuses(self, packed: Packed, x_dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot multiply activations of this type, on this device, by these weights; None if it can.

        Depends on nothing of `packed` but its types, shapes and N:M.
        """

    def multiply(self, x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> x W^T + bias [..., out] of x's type, summed in float32. Of what it does not refuse.

        All on one device, and all but x contiguous.
        """


@dataclass(frozen=True)
class Choice:
    """A kernel, why it was taken, and why those preferred to it were not."""

    kernel: Kernel
    why: str
    refused: dict[str, str]


_chosen: dict[tuple[object, ...], Choice] = {}


def choose(packed: Packed, x_dtype: torch.dtype, device: torch.device, name: str | None = None) -> Choice:
    """The kernel for these types and shapes; remembered, so that each refusal is logged once.

    name: of registry.KERNELS, or auto; None for $LOSA_KERNEL, or auto if that is not set. Raises LosaError for an unknown
    name, and for a named kernel that refuses.
    """
    name = name or os.environ.get("LOSA_KERNEL") or AUTO
    key = (name, packed.values.dtype, packed.mask.shape[0], packed.in_features, packed.nm, x_dtype, device.type)
    if (found := _chosen.get(key)) is None:
        found = _chosen[key] = _choose(packed, x_dtype, device, name)
    return found


def _choose(packed: Packed, x_dtype: torch.dtype, device: torch.device, name: str) -> Choice:
    if name != AUTO:
        kernel: Kernel = registry.get("kernel", name)()
        if why := kernel.refuses(packed, x_dtype, device):
            raise LosaError(f"kernel {name!r} cannot be used: {why}; LOSA_KERNEL={AUTO} takes the first that can")
        return Choice(kernel, "named", {})
    refused: dict[str, str] = {}
    for candidate in registry.KERNELS:
        kernel = registry.get("kernel", candidate)()
        why = kernel.refuses(packed, x_dtype, device)
        if why is None:
            _log(candidate, packed, x_dtype, refused)
            return Choice(kernel, "the first that does not refuse", refused)
        refused[candidate] = why
    raise LosaError(f"no kernel multiplies {x_dtype} on {device.type}: {refused}")


_told: set[str] = set()


def _log(taken: str, packed: Packed, x_dtype: torch.dtype, refused: dict[str, str]) -> None:
    for kernel, why in refused.items():
        line = f"kernel {kernel} refused: {why}"
        if line not in _told:
            _told.add(line)
            log.info(line)
    if taken == "reference" and taken not in _told:
        _told.add(taken)
        reasons = "; ".join(f"{kernel}: {why}" for kernel, why in refused.items())
        log.warning("packed weights are multiplied by the slow reference (%s)", reasons)


def multiply(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> x W^T + bias, [..., out], of x's type.

    Raises LosaError if the kernel that LOSA_KERNEL names is unknown or refuses, and if the tensors are on several devices;
    ValueError if x is not as wide as W, or the bias not as long.
    """
    if _traced(x, bias):
        n, m = (0, 0) if packed.nm is None else (packed.nm.n, packed.nm.m)
        tensors = (packed.values, packed.mask, packed.offsets, packed.scales)
        result: Tensor = packed_linear(x, bias, *tensors, packed.in_features, n, m)
        return result
    return _multiply(x, packed, bias)


def _traced(x: Tensor, bias: Tensor | None) -> bool:
    """Whether torch must see an op of its own: to compile, to trace, to differentiate. It takes 20 us on a CPU."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _multiply(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    if x.shape[-1] != packed.in_features:
        raise ValueError(f"a packed linear of {packed.in_features} columns was given {list(x.shape)}")
    if bias is not None:
        if bias.shape != (packed.out_features,):
            raise ValueError(f"a packed linear of {packed.out_features} rows was given a bias {list(bias.shape)}")
        bias = bias.contiguous()
    device = x.device
    for tensor in (packed.values, packed.mask, packed.offsets, packed.scales, bias):
        if tensor is not None and tensor.device != device:  # kernels read through pointers
            raise LosaError(f"a packed linear on {tensor.device} was given activations on {device}: move one of them")
    return choose(packed, x.dtype, device).kernel.multiply(x, packed, bias)


@torch.library.custom_op("losa::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    in_features: int,
    n: int,
    m: int,
) -> Tensor:
    """The op: see `multiply`. Its weights are those of a Packed that `check` has seen; n and m are 0 if it keeps no N:M.

    Gradients reach x and the bias. The packed weight has none: it is frozen.
    """
    return _multiply(x, Packed(values, mask, offsets, scales, in_features, NM(n, m) if m else None), bias)


@torch.library.custom_op("losa::packed_linear_backward", mutates_args=())
def packed_linear_backward(
    gradient: Tensor, values: Tensor, mask: Tensor, scales: Tensor | None, in_features: int
) -> Tensor:
    """The gradient of the output, [..., out] -> of x, [..., in], by the weight unpacked into its type for as long."""
    return gradient @ unpack(Packed(values, mask, None, scales, in_features), gradient.dtype)[0]


@packed_linear.register_fake
def _(x: Tensor, bias: Tensor | None, values: Tensor, mask: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], mask.shape[0])


@packed_linear_backward.register_fake
def _(gradient: Tensor, values: Tensor, mask: Tensor, scales: Tensor | None, in_features: int) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, values, mask, _, scales, ctx.in_features, _, _ = inputs
    ctx.save_for_backward(values, mask, scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = packed_linear_backward(gradient, *ctx.saved_tensors, ctx.in_features)
    if ctx.needs_input_grad[1]:
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
    return of_x, of_bias, *[None] * 7


packed_linear.register_autograd(_backward, setup_context=_keep)
