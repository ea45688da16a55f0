"""The native weight of the masked linear, and the gradients of its pair, against float64, whatever surrounds their inputs."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from losa import adapters, masks
from losa.adapters import MaskedLinear
from losa.sparse import cpu, native, pair

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(params=["avx512", "avx2"])
def symbol(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each set of kernels, emulated where this processor lacks the instructions (AVX2 is not)."""
    made = {"avx512": cpu.AVX512, "avx2": cpu.AVX2}[request.param]()
    if why := made.lacking():
        if request.param == "avx2" or "processor" not in why:
            pytest.skip(why)
        library = request.getfixturevalue("emulated")
        monkeypatch.setattr(native, "library", lambda: library)
    monkeypatch.setattr(pair, "best", lambda: made.symbol)
    cpu.function.cache_clear()
    yield made.symbol
    cpu.function.cache_clear()


def walled(tensor: Tensor) -> Tensor:
    """A copy in the midst of NaN, or of ones."""
    room = torch.full((tensor.numel() + 200,), float("nan") if tensor.is_floating_point() else 255, dtype=tensor.dtype)
    return room[100:-100].view(tensor.shape).copy_(tensor)


def drawn(
    out: int, columns: int, rank: int, density: float, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, bits, A, and a B that is the first columns of a wider one, whose others are NaN."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator).to(dtype)
    bits = masks.pack(torch.rand(out, columns, generator=generator) < density)
    wide = torch.full((out, rank + seed % 3), float("nan"))
    wide[:, :rank] = torch.randn(out, rank, generator=generator)
    return walled(weight), walled(bits), walled(torch.randn(rank, columns, generator=generator)), wide[:, :rank]


@given(
    out=st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 200])),  # more than one piece, too
    columns=st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 1100])),
    rank=st.integers(1, 9),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    stored=st.sampled_from(list(KINDS)),
    made=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_against_float64(
    symbol: str, out: int, columns: int, rank: int, density: float, stored: str, made: str, seed: int
) -> None:
    weight, bits, a, b = drawn(out, columns, rank, density, KINDS[stored], seed)
    mask, whole, left, right = masks.unpack(bits, columns), weight.double(), b.double(), a.double()
    got = pair.effective_weight(weight, bits, a, b, -1.5, KINDS[made])
    assert got is not None and got.dtype == KINDS[made]
    want, size = whole - 1.5 * left @ right, whole.abs() + 1.5 * left.abs() @ right.abs()
    allowed = 1e-6 * size + (2**-8 * want.abs() if made == "bfloat16" else 0)
    assert ((got.double() - want * mask).abs() <= allowed).all() and (got[~mask] == 0).all()

    found = pair.gradients(weight, bits, a, b, -1.5)
    assert found is not None
    gradient = whole * mask
    for got, want, size in zip(
        found,
        (-1.5 * left.T @ gradient, -1.5 * gradient @ right.T),
        (1.5 * left.T.abs() @ gradient.abs(), 1.5 * gradient.abs() @ right.T.abs()),
        strict=True,
    ):
        assert got.dtype == torch.float32 and got.shape == want.shape
        assert ((got.double() - want).abs() <= 2e-6 * size).all()


def test_it_rounds_as_torch_does(symbol: str) -> None:
    ties = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    ties = (ties.view(torch.int32) + torch.tensor([[0], [1], [0x7FFF], [0x8000], [0x8001]])).view(torch.float32)
    weight = ties.view(-1, 64).contiguous()
    every = masks.pack(torch.ones(weight.shape, dtype=torch.bool))
    a, b = torch.zeros(1, 64), torch.zeros(len(weight), 1)
    got, want = pair.effective_weight(weight, every, a, b, 1.0, torch.bfloat16), weight.bfloat16()
    assert got is not None
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(3), want.nan_to_num(3))


@pytest.mark.parametrize("what", ["weight", "pair"])
def test_not_a_number_is_seen_where_it_is_kept(symbol: str, what: str) -> None:
    weight, bits, a, b = drawn(9, 50, 3, 0.5, torch.bfloat16, 0)
    (weight if what == "weight" else a)[2 if what == "weight" else slice(None), 7] = float("nan")
    got = pair.effective_weight(weight, bits, a, b, 1.0, torch.bfloat16)
    assert got is not None
    kept = masks.unpack(bits, 50)
    where = torch.zeros(9, 50, dtype=torch.bool)
    where[2 if what == "weight" else slice(None), 7] = True
    assert torch.equal(got.isnan(), where & kept) and (where & kept).any()


def test_threads_change_nothing(symbol: str) -> None:
    weight, bits, a, b = drawn(700, 90, 5, 0.4, torch.bfloat16, 0)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            merged = pair.effective_weight(weight, bits, a, b, 2.0, torch.bfloat16)
            gradients = pair.gradients(weight, bits, a, b, 2.0)
            assert merged is not None and gradients is not None
            found.append((merged, *gradients))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for some in found[1:] for one, other in zip(found[0], some, strict=True))


def trained(layer: MaskedLinear, x: Tensor) -> tuple[Tensor, ...]:
    """Output and the gradients of a layer, of a copy that nothing else sees."""
    layer, x = copy.deepcopy(layer), x.detach().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert layer.lora_A is not None and layer.lora_B is not None
    return tuple(t for t in (y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad) if t is not None)


def layer_of(dtype: torch.dtype) -> MaskedLinear:
    generator = torch.Generator().manual_seed(0)
    layer = MaskedLinear(torch.nn.Linear(70, 40).to(dtype), 6, 2.0)
    layer.set_mask(torch.rand(40, 70, generator=generator) < 0.5)
    layer.set_rank(4, generator)
    assert layer.lora_B is not None
    layer.lora_B.data[:, :4] = 1
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_trained_by_it_and_without_it_alike(
    symbol: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, calls = layer_of(dtype), torch.randn(30, 70, generator=torch.Generator().manual_seed(1)).to(dtype), []
    for name in ("effective_weight", "gradients"):
        own = getattr(pair, name)
        monkeypatch.setattr(pair, name, lambda *given, own=own, name=name: calls.append(name) or own(*given))
    with_it = trained(layer, x)
    assert calls == ["effective_weight", "effective_weight", "gradients"]
    monkeypatch.setattr(pair, "best", lambda: None)
    without = trained(layer, x)
    assert len(with_it) == len(without) == 4
    for one, other in zip(with_it, without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_nothing_to_it(symbol: str, dtype: torch.dtype) -> None:
    operands = drawn(30, 40, 3, 0.5, torch.float32, 0)
    want = pair.gradients(*operands, 2.0)
    torch.set_default_dtype(dtype)
    try:
        got = pair.gradients(*operands, 2.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert want is not None and got is not None and all(map(torch.equal, want, got))


def test_what_is_masked_of_a_gradient_is_not_read(symbol: str) -> None:
    weight, bits, a, b = drawn(70, 50, 3, 0.5, torch.float32, 0)
    want = pair.gradients(weight, bits, a, b, 1.0)
    weight[~masks.unpack(bits, 50)] = float("nan")
    got = pair.gradients(weight, bits, a, b, 1.0)
    assert want is not None and got is not None and all(map(torch.equal, want, got))
    weight[masks.unpack(bits, 50)] = float("nan")
    got = pair.gradients(weight, bits, a, b, 1.0)
    assert got is not None and all(found.isnan().any() for found in got)


def test_a_high_rank_is_left_to_torch(symbol: str) -> None:
    operands = drawn(20, 30, pair.MOST_RANK + 1, 0.5, torch.float32, 0)
    assert pair.gradients(*operands, 1.0) is None
    assert pair.effective_weight(*operands, 1.0, torch.float32) is not None


def test_what_it_leaves_to_torch(symbol: str) -> None:
    weight, bits, a, b = drawn(6, 20, 2, 0.5, torch.float32, 0)
    refused: list[tuple[Any, ...]] = [
        (weight.double(), bits, a, b),
        (weight.half(), bits, a, b),
        (weight, bits, a.double(), b.double()),
        (weight.t().contiguous().t(), bits, a, b),
        (weight, bits, a, b.t().contiguous().t()),
        (weight[:0], bits[:0], a, b[:0]),
        (weight, bits, a[:0], b[:, :0]),
        (weight.to("meta"), bits, a, b),
        (weight, bits, a.to("meta"), b),
        (weight, bits[:, :-1].contiguous(), a, b),
        (weight, bits.int(), a, b),
        (weight, bits, a[:, :-1].contiguous(), b),
        (weight, bits, a, b[:-1]),
        (weight, bits, a[:1], b),
    ]
    for operands in refused:
        assert pair.effective_weight(*operands, 1.0, torch.float32) is None and pair.gradients(*operands, 1.0) is None
    assert pair.effective_weight(weight, bits, a, b, 1.0, torch.float16) is None
    for operands in refused[:5]:
        made = adapters.effective_weight(*operands, 1.0, operands[0].dtype)
        want = masks.unpack(bits, 20) * (weight.double() + b.double() @ a.double())
        torch.testing.assert_close(made.double(), want, rtol=1e-2, atol=1e-2)


def test_without_a_native_library(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing() -> None:
        raise native.Unavailable("there is no C++ compiler: install g++")

    monkeypatch.setattr(native, "library", missing)
    pair.best.cache_clear()
    try:
        with caplog.at_level("INFO", "losa.sparse"):
            assert pair.best() is None and pair.best() is None
        assert [record.getMessage() for record in caplog.records] == [
            "masked linears are computed by torch alone, several times as slowly: there is no C++ compiler: install g++"
        ]
    finally:
        pair.best.cache_clear()
