"""The masked low-rank linear against a naive oracle in float64, written as the paper's formula and left to autograd."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from losa import adapters
from losa.adapters import LowRankLinear, MaskedLinear
from losa.errors import LosaError
from losa.sparse import pair

SCALING = 2.0


def make(
    out: int = 24,
    columns: int = 19,
    rank: int = 3,
    max_rank: int = 6,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    kind: type[MaskedLinear] = MaskedLinear,
    seed: int = 0,
) -> MaskedLinear:
    """A half-pruned layer whose pair is trained, so to say: neither A nor B is zero in the rows in use."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, out, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer = kind(linear.to(dtype), max_rank, SCALING)
    layer.set_mask(torch.rand(out, columns, generator=generator) < 0.5)
    layer.set_rank(rank, generator)
    if layer.lora_B is not None:
        layer.lora_B.data[:, :rank] = torch.randn(out, rank, generator=generator)
    return layer


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(
    layer: MaskedLinear, x: Tensor, dy: Tensor, masked: bool = True, magnitudes: bool = False
) -> tuple[Tensor, ...]:
    """Output, dx, dA and dB of y = x (M * (W + s B A))^T + b, in float64, by autograd.

    With `magnitudes`, of the absolute values of all operands: no rounding error can exceed a few eps of these, whatever
    cancels in the sums.
    """
    assert layer.lora_A is not None and layer.lora_B is not None
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
    operands = [t.detach().double() for t in (x, layer.lora_A, layer.lora_B, layer.weight, bias, dy)]
    x, a, b, weight, bias, dy = (t.abs() for t in operands) if magnitudes else operands
    for leaf in (x, a, b):
        leaf.requires_grad_()
    low = SCALING * b[:, : layer.rank] @ a[: layer.rank]
    y = x @ ((weight + low) * layer.mask if masked else weight * layer.mask + low).T + bias
    torch.autograd.backward(y, dy)
    assert x.grad is not None and a.grad is not None and b.grad is not None
    return y.detach(), x.grad, a.grad, b.grad


def step(layer: MaskedLinear, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """The same four tensors from the layer."""
    assert layer.lora_A is not None and layer.lora_B is not None
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None and layer.lora_A.grad is not None and layer.lora_B.grad is not None
    return y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad


def assert_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...], relative: float, scale: tuple[Tensor, ...]) -> None:
    """|got - want| <= relative * |scale| in norm, for each of the four."""
    for name, g, w, s in zip(("y", "dx", "dA", "dB"), got, want, scale, strict=True):
        error, size = float((g.double() - w).norm()), float(s.norm())
        assert error <= relative * size, f"{name}: off by {error:.2e}, of {size:.2e}"


@given(
    out=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 6),
    lead=st.sampled_from([(1,), (7,), (2, 5), (2, 1, 3)]),
    bias=st.booleans(),
    block=st.sampled_from([1, 64, 1 << 22]),
    masked=st.booleans(),
    native=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_outputs_and_gradients_are_those_of_the_formula(
    out: int,
    columns: int,
    rank: int,
    lead: tuple[int, ...],
    bias: bool,
    block: int,
    masked: bool,
    native: bool,
    seed: int,
) -> None:
    layer = make(out, columns, rank, bias=bias, kind=MaskedLinear if masked else LowRankLinear, seed=seed)
    x, dy = draw(*lead, columns, seed=seed + 1), draw(*lead, out, seed=seed + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "BLOCK", block)
        if not native:
            patch.setattr(pair, "best", lambda: None)
        got = step(layer, x, dy)
    assert_near(got, oracle(layer, x, dy, masked), 1e-6, oracle(layer, x, dy, masked, magnitudes=True))


@pytest.mark.parametrize("block", [100, 1 << 22, None])
def test_bf16_is_near_fp32(block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if block:  # by torch
        monkeypatch.setattr(adapters, "BLOCK", block)
        monkeypatch.setattr(pair, "best", lambda: None)
    layer = make(64, 77, dtype=torch.bfloat16)
    assert layer.lora_A is not None and layer.lora_A.dtype == torch.float32
    x, dy = draw(50, 77, dtype=torch.bfloat16), draw(50, 64, seed=2, dtype=torch.bfloat16)
    got = step(layer, x, dy)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    want = oracle(layer, x, dy)
    assert_near(got, want, 6e-3, want)


def test_autocast_rounds_the_operands_only() -> None:
    layer, x, dy = make(64, 77), draw(50, 77), draw(50, 64, seed=2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(layer, x, dy)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    want = oracle(layer, x, dy)
    assert_near(got, want, 6e-3, want)
    plain = nn.Linear(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(MaskedLinear(plain, 0, 1.0)(x[:, :3]), plain(x[:, :3]))


def test_gradcheck() -> None:
    layer = make(6, 11, rank=2, max_rank=4).double()
    assert layer.lora_A is not None and layer.lora_B is not None
    x = draw(5, 11, dtype=torch.float64).requires_grad_()

    def function(x: Tensor, a: Tensor, b: Tensor) -> Any:
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_dense_is_kept_for_backward(dtype: torch.dtype) -> None:
    layer = make(24, 40, dtype=dtype)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(draw(7, 40, dtype=dtype).requires_grad_())
    dense = [t for t in saved if t.numel() >= layer.weight.numel() and t.data_ptr() != layer.weight.data_ptr()]
    assert saved and not dense
    assert any(t.data_ptr() == layer.weight.data_ptr() for t in saved)


def test_only_the_rows_in_use_and_the_input_get_gradients() -> None:
    layer, x, dy = make(rank=2), draw(7, 19), draw(7, 24, seed=2)
    da, db = (gradient.clone() for gradient in step(layer, x, dy)[2:])
    assert layer.weight.grad is None and layer.bias is not None and layer.bias.grad is None
    assert (da[:2] != 0).any() and (db[:, :2] != 0).any()
    assert not da[2:].any() and not db[:, 2:].any()
    layer(x).backward(dy)  # an input without gradient: dx is not asked for
    assert layer.lora_A is not None and layer.lora_A.grad is not None
    torch.testing.assert_close(layer.lora_A.grad, 2 * da)


def test_a_pair_that_is_not_trained_still_passes_the_gradient_on_and_a_bias_may_be() -> None:
    layer, dy = make(), draw(7, 24, seed=2)
    layer.requires_grad_(False)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    x = draw(7, 19).requires_grad_()
    layer(x).backward(dy)
    assert x.grad is not None and layer.lora_A is not None and layer.lora_A.grad is None and layer.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, dy.sum(0))
    torch.testing.assert_close(x.grad, oracle(layer, x, dy)[1].float())


def test_weights_that_were_masked_stay_out_of_both_directions() -> None:
    """Poison: whatever stands in the weight where the mask is off, nothing of it may be seen."""
    layer, x, dy = make(), draw(7, 19), draw(7, 24, seed=2)
    want = step(layer, x, dy)
    layer.weight.data[~layer.mask] = 1e4
    for got, expected in zip(step(layer, x, dy), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("ranks", [(0, 6, 2, 0), (3, 1, 5, 4, 6), (6, 6, 3, 3)])
def test_changing_the_rank_does_not_move_the_output(ranks: tuple[int, ...]) -> None:
    layer, x, generator = make(rank=3), draw(50, 19), torch.Generator().manual_seed(5)
    for rank in ranks:
        before = layer(x).detach()
        layer.set_rank(rank, generator)
        after = layer(x).detach()
        assert layer.rank == rank
        assert (after - before).norm() < 1e-6 * before.norm()
        assert not layer.weight[~layer.mask].any()
        assert layer.lora_A is not None and layer.lora_B is not None
        assert not layer.lora_A[rank:].any() and not layer.lora_B[:, rank:].any()
        layer.lora_B.data[:, :rank] += 0.1  # trained a little, so that the next shrinking has something to fold
        layer.lora_A.data[rank:] += 0.3  # moved by an optimizer's momentum while out of use
        layer.lora_B.data[:, rank:] += 0.3


def test_folding_in_bf16_is_one_rounding() -> None:
    layer = make(rank=4, dtype=torch.bfloat16)
    want = layer.effective_weight(torch.float32)
    layer.set_rank(0, torch.Generator())
    assert torch.equal(layer.weight, want.bfloat16())


def test_forward_backward_and_merge_see_one_weight_rounded_once() -> None:
    layer = make(64, 77, dtype=torch.bfloat16)
    assert layer.lora_A is not None and layer.lora_B is not None
    low = SCALING * layer.lora_B.double()[:, :3] @ layer.lora_A.double()[:3]
    want = (layer.weight.double() + low) * layer.mask
    wide, narrow = layer.effective_weight(torch.float32), layer.effective_weight()
    assert (wide - want).norm() < 1e-6 * want.norm() and torch.equal(narrow, wide.bfloat16())
    x, dy = draw(50, 77, dtype=torch.bfloat16), draw(50, 64, seed=2, dtype=torch.bfloat16)
    y, dx = step(layer, x, dy)[:2]
    assert torch.equal(y, F.linear(x, narrow, layer.bias)) and torch.equal(dx, dy @ narrow)
    assert torch.equal(layer.merge().weight, narrow)


def test_new_rows_are_drawn_from_the_generator_with_kaiming_variance() -> None:
    def drawn(seed: int) -> Tensor:
        layer = MaskedLinear(nn.Linear(300, 4), 64, SCALING)
        layer.set_rank(64, torch.Generator().manual_seed(seed))
        assert layer.lora_A is not None and layer.lora_B is not None and not layer.lora_B.any()
        return layer.lora_A.detach()

    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))
    assert abs(float(drawn(3).var()) * 3 * 300 - 1) < 0.03 and float(drawn(3).abs().max()) <= 300**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_merging_keeps_every_zero_and_the_output(dtype: torch.dtype, bias: bool) -> None:
    layer, x = make(48, 77, dtype=dtype, bias=bias), draw(50, 77, dtype=dtype)
    merged = layer.merge()
    masked = merged.weight[~layer.mask]
    assert type(merged) is nn.Linear and merged.weight.dtype == dtype and (merged.bias is None) != bias
    assert not masked.any() and not masked.signbit().any()
    assert torch.equal(merged.weight, layer.effective_weight())
    want = layer(x)
    assert (merged(x) - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_in_place_it_takes_no_memory_of_its_own(dtype: torch.dtype) -> None:
    layer = make(dtype=dtype)
    before, apart = layer.weight, layer.merge().weight
    assert apart.data_ptr() != before.data_ptr()
    merged = layer.merge(in_place=True)
    assert torch.equal(merged.weight, apart) and not merged.weight.requires_grad
    assert merged.weight.data_ptr() == before.data_ptr()


def test_masks_nest_and_zero_the_weight() -> None:
    layer = make()
    old = layer.mask
    new = old.clone()
    new[:, :5] = False
    kept = layer.weight[new].clone()
    layer.set_mask(new)
    assert torch.equal(layer.mask, new) and not layer.weight[~new].any() and torch.equal(layer.weight[new], kept)
    with pytest.raises(LosaError, match="revives"):
        layer.set_mask(old)
    with pytest.raises(LosaError, match="must be bool"):
        layer.set_mask(new.float())
    assert torch.equal(layer.mask, new)


def test_it_takes_the_linear_over_without_a_copy() -> None:
    linear = nn.Linear(9, 5)
    layer = MaskedLinear(linear.eval(), 0, SCALING)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    x = draw(3, 9)
    assert layer.mask.all() and torch.equal(layer(x), linear(x)) and torch.equal(layer.merge()(x), linear(x))


def test_rank_and_mask_survive_the_state_dict_and_a_copy() -> None:
    layer, other, x = make(rank=4), make(rank=2, seed=9), draw(7, 19)
    other.load_state_dict(layer.state_dict())
    assert other.rank == 4 and torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x, dy = make(), draw(7, 19), draw(7, 24, seed=2)
    want = step(layer, x, dy)[1:]
    layer.zero_grad()
    x = x.requires_grad_()
    checkpoint(layer, x, use_reentrant=False).backward(dy)
    assert layer.lora_A is not None and layer.lora_B is not None
    for got, expected in zip((x.grad, layer.lora_A.grad, layer.lora_B.grad), want, strict=True):
        assert got is not None and torch.equal(got, expected)


def test_a_model_may_add_to_the_output_in_place() -> None:
    """Falcon does, to what its MLP gives; with a bias and three dimensions this is where autograd objects to a view."""
    layer, x = make(), draw(2, 3, 19)
    y = layer(x)
    expected = y.detach() + 1
    y += 1
    y.sum().backward()
    assert torch.equal(y, expected)
    want = make()
    (want(x) + 1).sum().backward()
    assert layer.lora_A is not None and want.lora_A is not None
    assert torch.equal(layer.lora_A.grad, want.lora_A.grad)


def test_lora_kept_apart_says_that_it_does_not_merge() -> None:
    layer, x = make(kind=LowRankLinear), draw(7, 19)
    assert not layer.merges and MaskedLinear.merges
    torch.testing.assert_close(F.linear(x, layer.effective_weight(), layer.bias), layer(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(LosaError, match="does not merge"):
        layer.merge()
    before = layer(x)
    with pytest.raises(LosaError, match="cannot shrink"):
        layer.set_rank(1, torch.Generator())
    assert layer.rank == 3 and torch.equal(layer(x), before)
    assert not make(rank=0, kind=LowRankLinear).merge().weight.requires_grad


def test_what_is_wrong_is_said() -> None:
    layer = make()
    with pytest.raises(LosaError, match="within 0 and max_rank = 6, not 7"):
        layer.set_rank(7, torch.Generator())
    with pytest.raises(LosaError, match="max_rank must be"):
        MaskedLinear(nn.Linear(2, 2), -1, SCALING)
    with pytest.raises(LosaError, match="use autocast"):
        layer(draw(3, 19, dtype=torch.bfloat16))
    layer.weight.requires_grad_()
    with pytest.raises(LosaError, match="frozen"):
        layer(draw(3, 19))
