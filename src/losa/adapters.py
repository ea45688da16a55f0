"""The masked linear: y = x (M * (W + s B A))^T + b, three GEMMs a training step and nothing dense kept for backward.

What is trained is the pair A, B, or, while the linear is open, the kept weights themselves. `effective_weight` is the one
place where the pair meets the weight; forward, backward and merge all go through it.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from losa import fused, masks
from losa.errors import LosaError
from losa.sparse import pair

# Rows are handled in blocks of at most this many weights, so that temporaries (in fp32: 24 MiB) do not grow with the layer.
# Measured on 5632 x 2048: larger is slower (glibc maps temporaries of 32 MiB and more afresh each time), smaller is no
# faster, and each block costs a few parallel regions: dear when other work shares the cores.
BLOCK = 6 << 20


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover `rows`, each of at most BLOCK weights (or one row)."""
    step = max(1, BLOCK // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def effective_weight(weight: Tensor, bits: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """M * (W + s B A) as a new tensor [out, in] of `dtype`: computed in fp32 or wider, rounded once.

    weight [out, in], bits uint8 [out, ceil(in / 8)] (masks.pack), a [r, in], b [out, r]. Masked entries are zero, of
    either sign. On a CPU by native code, where there is some. Multiplying by the mask is three times as fast as filling by it.
    """
    if (made := pair.effective_weight(weight, bits, a, b, scaling, dtype)) is not None:
        return made
    wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    out = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        a, b = a.to(wide), b.to(wide)
        for rows in row_blocks(*weight.shape):
            block = torch.addmm(
                weight[rows].to(wide), b[rows], a, alpha=scaling, out=out[rows] if dtype == wide else None
            )
            block.mul_(masks.unpack(bits[rows], weight.shape[1]))
            if dtype != wide:
                out[rows] = block
    return out


class _MaskedLowRank(torch.autograd.Function):
    """One GEMM forward, two backward (dx, and G = dy^T x from which dA and dB follow). W is frozen and gets no gradient.

    Saves x, W, the packed mask, A and B; the effective weight is computed again in backward, and G takes its memory.
    GEMMs run in x.dtype. The gradients of A and B are contracted from G in fp32 or wider.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bits: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bits, a, b)
        ctx.scaling = scaling
        with torch.autocast(x.device.type, enabled=False):
            return _product(x, effective_weight(weight, bits, a, b, scaling, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bits, a, b = ctx.saved_tensors
        need_x, _, _, need_a, need_b, need_bias, _ = ctx.needs_input_grad
        dx = da = db = space = None
        dy = dy.reshape(-1, weight.shape[0])
        with torch.autocast(x.device.type, enabled=False):
            if need_x:
                space = effective_weight(weight, bits, a, b, ctx.scaling, x.dtype)
                dx = torch.mm(dy, space).view(x.shape)
            if need_a or need_b:
                space = torch.empty_like(weight, dtype=x.dtype, requires_grad=False) if space is None else space
                gradient = torch.mm(dy.t(), x.reshape(-1, x.shape[-1]), out=space)
                da, db = _contract(gradient, bits, a, b, ctx.scaling)
            dbias = dy.sum(0) if need_bias else None
        return dx, None, None, da, db, dbias, None


def _contract(gradient: Tensor, bits: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """dA = s B^T (M * G) and dB = s (M * G) A^T from the dense gradient G [out, in], which it may overwrite."""
    if (made := pair.gradients(gradient, bits, a, b, scaling)) is not None:
        return made
    wide = torch.promote_types(torch.promote_types(gradient.dtype, a.dtype), torch.float32)
    left, right = b.to(wide).t(), a.to(wide).t()
    da, db = torch.zeros_like(a, dtype=wide), torch.empty(b.shape, dtype=wide, device=b.device)
    for rows in row_blocks(*gradient.shape):
        block = gradient[rows].to(wide).mul_(masks.unpack(bits[rows], gradient.shape[1]))
        da.addmm_(left[:, rows], block, alpha=scaling)
        torch.mm(block, right, out=db[rows])
    return da.to(a.dtype), db.mul_(scaling).to(b.dtype)


class _Kept(torch.autograd.Function):
    """y = x W^T + b whose gradient goes to `kept`, the flat values of W that the mask keeps: one GEMM forward, two backward.

    Saves x, W and the packed mask. GEMMs run in x.dtype; W holds `kept` rounded to its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bits)
        with torch.autocast(x.device.type, enabled=False):
            return _product(x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bits = ctx.saved_tensors
        need_x, need_kept, _, _, need_bias = ctx.needs_input_grad
        dx = dkept = None
        dy = dy.reshape(-1, weight.shape[0])
        with torch.autocast(x.device.type, enabled=False):
            if need_x:
                dx = torch.mm(dy, weight.to(x.dtype)).view(x.shape)
            if need_kept:
                dense = torch.mm(dy.t(), x.reshape(-1, x.shape[-1]))
                dkept = dense[masks.unpack(bits, weight.shape[1])].float()
            dbias = dy.sum(0) if need_bias else None
        return dx, dkept, None, None, dbias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, x [..., in] and weight [out, in] of one dtype."""
    rows = F.linear(x.reshape(-1, x.shape[-1]), weight, None if bias is None else bias.to(x.dtype))
    # With a bias and more dimensions F.linear gives a view, which a model may not add to in place, as Falcon does.
    y: Tensor = torch.ops.aten._unsafe_view(rows, (*x.shape[:-1], len(weight)))
    return y


class MaskedLinear(nn.Module):
    """A pruned linear with a low-rank pair under its mask; takes the place of an nn.Linear and merges back exactly.

    It takes over `linear.weight` [out, in] and `linear.bias` without a copy and freezes both. The pair is allocated once
    at `max_rank` (so optimizers and DDP never see a parameter change) and its first `rank` rows are in use, none at
    first: `set_rank` draws them. Parameters `lora_A` [max_rank, in] and `lora_B` [out, max_rank] are fp32 whatever the
    weight is, and None if max_rank is 0. Buffer `mask_bits`: uint8 [out, ceil(in / 8)], 1 keeps. `rank` is in the
    state dict. An optimizer's state of the rows above `rank` is the trainer's to zero.

    Between `open` and `close` the kept weights are trained instead: `kept`, a flat fp32 parameter (with its gradient
    and AdamW's moments 16 bytes a kept weight), of which `weight` is the rounded image after each `write_back`.
    """

    merges: ClassVar[bool] = True
    pair_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")  # its trainable parameters
    weight: Tensor
    bias: nn.Parameter | None
    mask_bits: Tensor
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    kept: nn.Parameter | None

    def __init__(self, linear: nn.Linear, max_rank: int, scaling: float) -> None:
        super().__init__()
        if max_rank < 0:
            raise LosaError(f"max_rank must be 0 or more, not {max_rank}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.max_rank, self.scaling, self.rank = max_rank, float(scaling), 0
        linear.requires_grad_(False)
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("mask_bits", masks.pack(torch.ones_like(self.weight, dtype=torch.bool)))
        self.lora_A = self.lora_B = None
        if max_rank:
            self.lora_A = nn.Parameter(torch.zeros(max_rank, self.in_features, device=self.weight.device))
            self.lora_B = nn.Parameter(torch.zeros(self.out_features, max_rank, device=self.weight.device))
        self.kept, self._folded = None, 0  # the rank of the pair that `open` has put into the weight
        self.train(linear.training)

    @property
    def mask(self) -> Tensor:
        """The keep-mask, bool [out, in]."""
        return masks.unpack(self.mask_bits, self.in_features)

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Prune to `mask` (bool [out, in], within the present one) and zero the weight there, in place."""
        if mask.dtype != torch.bool or mask.shape != self.weight.shape:
            raise LosaError(f"mask must be bool {list(self.weight.shape)}, not {mask.dtype} {list(mask.shape)}")
        mask = mask.to(self.weight.device)
        if revived := int((mask & ~self.mask).count_nonzero()):
            raise LosaError(f"the new mask revives {revived} pruned weights: masks must be nested")
        self.weight.masked_fill_(~mask, 0)
        self.mask_bits.copy_(masks.pack(mask))

    @torch.no_grad()
    def set_rank(self, rank: int, generator: torch.Generator) -> None:
        """Use the first `rank` rows; the output does not move (in fp32, 1e-6 relative; in bf16, one rounding of W).

        New rows of A are uniform of variance 1 / (3 in), drawn in fp32 on the CPU from `generator`; their columns of B
        are zero. Rows that go are first folded into the weight.
        """
        if not 0 <= rank <= self.max_rank:
            raise LosaError(f"rank must be within 0 and max_rank = {self.max_rank}, not {rank}")
        if self.lora_A is not None and self.lora_B is not None:
            if rank < self.rank:
                a, b = self.pair()
                self._fold(a[rank:], b[:, rank:])
            else:
                bound = self.in_features**-0.5
                fresh = torch.empty(rank - self.rank, self.in_features).uniform_(-bound, bound, generator=generator)
                self.lora_A[self.rank : rank] = fresh.to(self.lora_A)
            # Not only what goes: an optimizer's momentum may have moved rows that were out of use.
            self.lora_A[rank:] = 0
            self.lora_B[:, min(rank, self.rank) :] = 0
        self.rank = rank

    def _fold(self, a: Tensor, b: Tensor) -> None:
        self.weight.copy_(effective_weight(self.weight, self.mask_bits, a, b, self.scaling, self.weight.dtype))

    def pair(self) -> tuple[Tensor, Tensor]:
        """The rows and columns in use: [rank, in] and [out, rank]."""
        assert self.lora_A is not None and self.lora_B is not None, "a rank above 0 needs a pair"
        return self.lora_A[: self.rank], self.lora_B[:, : self.rank]

    @torch.no_grad()
    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W + s M * (B A), a new tensor [out, in] of `dtype` (the weight's if None), rounded once."""
        dtype = dtype or self.weight.dtype
        if self.rank == 0:
            return self.weight.to(dtype, copy=True)
        return effective_weight(self.weight, self.mask_bits, *self.pair(), self.scaling, dtype)

    @torch.no_grad()
    def open(self) -> nn.Parameter:
        """Train the kept weights, with the pair merged into them: the flat fp32 parameter `kept`, in the mask's order by rows.

        The pair is frozen meanwhile; the output does not move, but for the rounding of the weight to its dtype.
        """
        if self.kept is not None:
            raise LosaError("the linear is open already")
        if self.rank and not self.merges:
            raise LosaError("the kept weights cannot be trained beside a pair that does not merge")
        self.kept = nn.Parameter(self.effective_weight(torch.float32)[self.mask])
        self.rank, self._folded = 0, self.rank
        self.write_back()
        return self.kept

    @torch.no_grad()
    def write_back(self) -> None:
        """Put `kept`, which an update has moved, into the weight."""
        assert self.kept is not None, "only an open linear has kept weights of its own"
        self.weight.masked_scatter_(self.mask, self.kept.to(self.weight.dtype))

    @torch.no_grad()
    def close(self) -> None:
        """Freeze the kept weights: W + s M * (B A) is what they have become, rounded once to the weight's dtype."""
        assert self.kept is not None, "only an open linear can be closed"
        self.rank, self._folded = self._folded, 0
        if self.rank:
            mask, zero = self.mask, torch.zeros_like(self.weight)
            pair = effective_weight(zero, self.mask_bits, *self.pair(), self.scaling, torch.float32)
            self.weight.masked_scatter_(mask, (self.kept - pair[mask]).to(self.weight.dtype))
        else:
            self.write_back()
        self.kept = None

    @torch.no_grad()
    def merge(self, in_place: bool = False) -> nn.Linear:
        """A plain linear, frozen, with the effective weight in the weight's dtype: +0.0 wherever masked. Leaves self as it is.

        in_place: in the memory of the weight, for a self that goes. Weights as transformers loads them are of one mapped
        file, which holds all of them until the last one goes: with new ones beside them a model would be there twice.
        """
        weight = self.effective_weight().masked_fill_(~self.mask, 0)  # -0.0 to 0.0
        if in_place:
            weight = self.weight.detach().copy_(weight)
        merged = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(weight, requires_grad=False)
        merged.register_parameter("bias", self.bias)
        return merged.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] of the weight's dtype (any, under autocast) -> [..., out]."""
        if self.rank == 0 and self.kept is None:
            return F.linear(x, self.weight, self.bias)
        if self.weight.requires_grad:
            raise LosaError("the base weight must stay frozen: requires_grad was set on it")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif x.dtype != self.weight.dtype:
            raise LosaError(f"input is {x.dtype}, weight is {self.weight.dtype}: convert one or use autocast")
        if self.kept is not None:
            trained: Tensor = _Kept.apply(x, self.kept, self.weight, self.mask_bits, self.bias)
            return trained
        a, b = self.pair()
        operands = (x, self.weight, self.mask_bits, a, b, self.bias, self.scaling)
        y: Tensor = fused.choose(_MaskedLowRank.apply, *operands)(*operands)
        return y

    def get_extra_state(self) -> Tensor:
        """The rank, as a tensor so that safetensors can hold it."""
        return torch.tensor(self.rank)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the rank from a state dict."""
        self.rank = int(state)

    def extra_repr(self) -> str:
        """What print(model) says of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}/{self.max_rank}"


class LowRankLinear(MaskedLinear):
    """LoRA kept apart, for comparison: y = x (M * W)^T + b + s (x A^T) B^T. Its pair cannot merge without losing zeros."""

    merges: ClassVar[bool] = False

    def _fold(self, a: Tensor, b: Tensor) -> None:
        raise LosaError(
            "the rank of an unmasked pair cannot shrink: what is dropped cannot be folded into a sparse weight"
        )

    @torch.no_grad()
    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W + s B A, dense: what the layer computes, not what can be stored."""
        if self.rank == 0:
            return super().effective_weight(dtype)
        a, b = self.pair()
        return torch.addmm(self.weight.to(a.dtype), b, a, alpha=self.scaling).to(dtype or self.weight.dtype)

    def merge(self, in_place: bool = False) -> nn.Linear:
        """Raises LosaError, unless no pair is in use."""
        if self.rank == 0:
            return super().merge(in_place)
        raise LosaError(
            "a LoRA kept apart does not merge: the product would fill the zeros; keep the pair, or use losa"
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; the low-rank path runs in the pair's dtype, as in PEFT."""
        if self.rank == 0:
            return super().forward(x)
        y = F.linear(x, self.weight, self.bias)
        a, b = self.pair()
        low = F.linear(x.to(a.dtype), a) * self.scaling
        return y + F.linear(low, b).to(y.dtype)
