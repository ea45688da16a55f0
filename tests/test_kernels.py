"""Every kernel against float64, whatever surrounds its inputs; the choice among them; the op."""

import ctypes
import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from losa import registry
from losa.errors import LosaError
from losa.sparse import cpu, gpu, kernels, native
from losa.sparse.packed import DTYPES, GROUP, Packed, pack, unpack

CPU = torch.device("cpu")
TYPES = (torch.float32, torch.bfloat16)
POISON = {torch.int8: 0x55, torch.uint8: 0xFF, torch.int32: 0x7FFFFFF0}


@pytest.fixture(params=list(registry.KERNELS))
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[kernels.Kernel]:
    """Every registered kernel; those whose instructions this processor lacks are emulated."""
    made: kernels.Kernel = registry.get("kernel", request.param)()
    if isinstance(made, cpu.Native):
        try:
            has = cpu.features(native.library())
        except native.Unavailable as error:
            pytest.skip(str(error))
        if not has.issuperset(made.needs):
            if "avx512f" not in made.needs:
                pytest.skip(f"{made.name} is not emulated, and this processor has no {made.needs}")
            library = request.getfixturevalue("emulated")
            monkeypatch.setattr(native, "library", lambda: library)
            monkeypatch.setattr(cpu, "features", lambda _: frozenset(made.needs))
        cpu.function.cache_clear()
    yield made
    cpu.function.cache_clear()


def walled(tensor: Tensor | None) -> Tensor | None:
    """A copy with NaN (or what is wrong in a type without) right before and behind it."""
    if tensor is None:
        return None
    wall = 100
    poison = float("nan") if tensor.is_floating_point() else POISON[tensor.dtype]
    room = torch.full((tensor.numel() + 2 * wall,), poison, dtype=tensor.dtype)
    inside = room[wall : wall + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


def poisoned(packed: Packed) -> Packed:
    """The same with walls around each tensor, and with what pads the values poisoned too: it may be read, not used."""
    values, mask = walled(packed.values), walled(packed.mask)
    assert values is not None and mask is not None
    values[packed.kept :] = float("nan") if values.is_floating_point() else 0x55
    return Packed(values, mask, walled(packed.offsets), walled(packed.scales), packed.in_features, packed.nm)


def made(rows: int, columns: int, sparsity: float, values: torch.dtype, seed: int = 0) -> Packed:
    """Random, with an empty row, a full one and some kept zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) >= sparsity
    weight[torch.rand(rows, columns, generator=generator) < 0.05] = 0
    mask[0], mask[-1] = False, True
    return pack(weight if values == torch.int8 else weight.to(values), mask, values)


def check(kernel: kernels.Kernel, packed: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compare with float64; returns the kernel's result. Skips what the kernel refuses."""
    if why := kernel.refuses(packed, x.dtype, CPU):
        pytest.skip(why)
    got = kernel.multiply(walled(x), poisoned(packed), bias)  # type: ignore[arg-type]
    assert got.dtype == x.dtype and got.shape == (*x.shape[:-1], packed.out_features)
    weight = unpack(packed, torch.float32)[0].double()
    want = x.double() @ weight.T
    scale = x.double().abs() @ weight.abs().T
    if bias is not None:
        want, scale = want + bias.double(), scale + bias.double().abs()
    allowed = 2e-6 * scale + 1e-30
    if isinstance(kernel, cpu.AVX512BF16) and packed.scales is not None:  # activations in 16 bits of a group's largest
        allowed += x.double().abs().amax(dim=-1, keepdim=True) * 2**-16 * weight.abs().sum(dim=1)
    most = {cpu.AVX512BF16: cpu.BF16_ROWS, gpu.Triton: gpu.ROWS}.get(type(kernel))
    if most and x.dtype != torch.float32 and x.numel() // x.shape[-1] > most:  # weights and bias in bf16
        allowed += 2**-8 * scale if packed.scales is not None else 0
        allowed += 2**-8 * bias.double().abs() if bias is not None else 0
    if x.dtype == torch.bfloat16:
        allowed += 2**-8 * want.abs() + 2**-133
    assert ((got.double() - want).abs() <= allowed).all()
    return got


drawn = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.parametrize("values", DTYPES.values(), ids=DTYPES)
@given(data=st.data())
@drawn
def test_agrees_with_float64(kernel: kernels.Kernel, values: torch.dtype, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40))
    columns = data.draw(st.one_of(st.integers(1, 130), st.sampled_from([GROUP, 2 * GROUP + 8])))
    tokens = data.draw(st.sampled_from([1, 2, 3, 4, 7, cpu.BF16_ROWS + 1, cpu.ROWS + 1]))
    sparsity = data.draw(st.sampled_from([0.0, 0.3, 0.7, 0.9, 0.99]))
    x_dtype = data.draw(st.sampled_from(TYPES))
    seed = data.draw(st.integers(0, 2**16))
    packed = made(rows, columns, sparsity, values, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, columns, generator=generator).to(x_dtype)
    bias = torch.randn(rows, generator=generator) if data.draw(st.booleans()) else None
    check(kernel, packed, x, bias)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31, 63, 64, 65, 127, 255, 256, 257, 511, 513, 1000])
def test_every_tail(kernel: kernels.Kernel, columns: int) -> None:
    for tokens in (1, 2):  # one token has its own way through several rows of the weight
        check(kernel, made(5, columns, 0.5, torch.bfloat16), torch.randn(tokens, columns).bfloat16())


@pytest.mark.parametrize("rows", range(1, 10))
def test_every_number_of_rows(kernel: kernels.Kernel, rows: int) -> None:
    for values in (torch.bfloat16, torch.int8):
        for tokens in (1, 3):
            check(kernel, made(rows, 300, 0.6, values), torch.randn(tokens, 300).bfloat16())


@pytest.mark.parametrize("values", DTYPES.values(), ids=DTYPES)
def test_all_kept_and_nothing_kept(kernel: kernels.Kernel, values: torch.dtype) -> None:
    weight = torch.randn(6, 200)
    weight = weight if values == torch.int8 else weight.to(values)
    x = torch.randn(3, 200).bfloat16()
    for keep in (True, False):
        got = check(kernel, pack(weight, torch.full((6, 200), keep), values), x)
        assert keep or not got.any()


@pytest.mark.parametrize("values", DTYPES.values(), ids=DTYPES)
def test_nm_has_no_offsets(kernel: kernels.Kernel, values: torch.dtype) -> None:
    mask = torch.rand(9, 30, 4).argsort(dim=2).lt(2).view(9, 120)
    weight = torch.randn(9, 120)
    packed = pack(weight if values == torch.int8 else weight.to(values), mask, values)
    assert packed.offsets is None
    check(kernel, packed, torch.randn(1, 120).bfloat16())
    check(kernel, packed, torch.randn(cpu.ROWS + 6, 120).bfloat16())


@pytest.mark.parametrize("values", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 8, cpu.BF16_ROWS + 1, cpu.ROWS + 1])
def test_threads_do_not_change_a_bit(kernel: kernels.Kernel, values: torch.dtype, tokens: int) -> None:
    packed, x = made(131, 300, 0.6, values), torch.randn(tokens, 300).bfloat16()
    if isinstance(kernel, cpu.Native) and tokens <= (cpu.BF16_ROWS if kernel.bf16_tiles else cpu.ROWS):
        results = []
        for threads in (1, 2, 11, 2):
            torch.set_num_threads(threads)
            results.append(check(kernel, packed, x))
        torch.set_num_threads(1)
        assert all(torch.equal(results[0], other) for other in results[1:])
    else:  # torch's own product is in it
        assert torch.equal(check(kernel, packed, x), check(kernel, packed, x))


def test_any_shape_and_stride_of_x(kernel: kernels.Kernel) -> None:
    packed = made(20, 96, 0.5, torch.bfloat16)
    if why := kernel.refuses(packed, torch.bfloat16, CPU):
        pytest.skip(why)
    x = torch.randn(2, 3, 96).bfloat16()
    whole = kernel.multiply(x, packed)
    assert whole.shape == (2, 3, 20)
    assert torch.equal(kernel.multiply(x.transpose(0, 1), packed), whole.transpose(0, 1))
    assert torch.equal(kernel.multiply(x.repeat_interleave(2, dim=2)[..., ::2], packed), whole)
    assert kernel.multiply(x[0, 0], packed).shape == (20,)
    assert kernel.multiply(x[:0], packed).shape == (0, 3, 20)


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_of_any_type(kernel: kernels.Kernel, bias: torch.dtype) -> None:
    check(kernel, made(20, 96, 0.5, torch.bfloat16), torch.randn(2, 96).bfloat16(), torch.randn(20).to(bias))


def test_half_precision_activations(kernel: kernels.Kernel) -> None:
    packed, x = made(20, 96, 0.5, torch.float16), torch.randn(2, 96).half()
    if why := kernel.refuses(packed, x.dtype, CPU):
        pytest.skip(why)
    want = x.float() @ unpack(packed, torch.float32)[0].T
    assert torch.allclose(kernel.multiply(x, packed).float(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("values", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_comes_through(kernel: kernels.Kernel, values: torch.dtype, wrong: float) -> None:
    packed, x = made(10, 300, 0.5, values), torch.randn(2, 300).bfloat16()
    if why := kernel.refuses(packed, x.dtype, CPU):
        pytest.skip(why)
    x[1, 290] = wrong
    got = kernel.multiply(x, packed)
    assert got[0].isfinite().all() and not got[1, -1].isfinite()


def test_a_weight_that_is_no_number_stays_in_its_row(kernel: kernels.Kernel) -> None:
    weight, mask = torch.randn(7, 150).bfloat16(), torch.rand(7, 150) < 0.5
    weight[3, 20], mask[3, 20] = float("nan"), True
    packed = pack(weight, mask)
    if why := kernel.refuses(packed, torch.bfloat16, CPU):
        pytest.skip(why)
    assert kernel.multiply(torch.randn(1, 150).bfloat16(), packed)[0].isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float16])
def test_every_16_bit_value(kernel: kernels.Kernel, values: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(values).view(-1, 64)
    packed, x = pack(every, torch.ones(every.shape, dtype=torch.bool)), torch.zeros(64, 64, dtype=torch.bfloat16)
    if why := kernel.refuses(packed, x.dtype, CPU):
        pytest.skip(why)
    finite = torch.where(every.isfinite(), every, 0)
    if isinstance(kernel, gpu.Triton):  # Triton's interpreter misreads bf16 subnormals
        finite = torch.where(finite.abs().float() < 2**-126, 0, finite)
    packed = pack(finite, torch.ones(every.shape, dtype=torch.bool))
    rows = torch.eye(64, dtype=torch.bfloat16).split(cpu.BF16_ROWS)  # more would be torch's product
    got = torch.cat([kernel.multiply(some, packed) for some in rows]).T
    assert torch.equal(got, finite.bfloat16())


def test_the_oracle_sees_a_wrong_result() -> None:
    class Wrong:
        name = "wrong"

        def refuses(self, *_: Any) -> None:
            return None

        def multiply(self, x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
            return (x.float() @ unpack(packed, torch.float32)[0].T * (1 + 1e-4)).to(x.dtype)

    with pytest.raises(AssertionError):
        check(Wrong(), made(5, 64, 0.5, torch.float32), torch.randn(2, 64))


# ---------------------------------------------------------------------------------------------------------- the choice


@pytest.fixture
def built() -> None:
    try:
        native.library()
    except native.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOSA_KERNEL", raising=False)
    monkeypatch.setattr(kernels, "_chosen", {})
    monkeypatch.setattr(kernels, "_told", set())


PACKED = made(8, 64, 0.5, torch.bfloat16)


def test_the_first_that_does_not_refuse(built: None, fresh: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "losa.sparse")
    packed = made(8, 64, 0.5, torch.float32)
    for _ in range(2):
        choice = kernels.choose(packed, torch.float32, CPU)
    before = list(registry.KERNELS)[: list(registry.KERNELS).index(choice.kernel.name)]
    assert list(choice.refused) == before and "avx512-bf16" in before
    logged = [record.message for record in caplog.records if "refused" in record.message]
    assert logged == [f"kernel {name} refused: {why}" for name, why in choice.refused.items()]


def test_a_named_kernel(built: None, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.choose(PACKED, torch.float32, CPU, "portable").kernel.name == "portable"
    monkeypatch.setenv("LOSA_KERNEL", "reference")
    assert kernels.choose(PACKED, torch.float32, CPU).kernel.name == "reference"
    assert kernels.choose(PACKED, torch.float32, CPU, "auto").kernel.name != "reference"


def test_a_named_kernel_that_refuses_is_an_error(built: None, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "features", lambda _: frozenset({"avx2"}))
    with pytest.raises(LosaError, match=r"'avx512' cannot be used: this processor has no avx512f, .*LOSA_KERNEL=auto"):
        kernels.choose(PACKED, torch.float32, CPU, "avx512")
    monkeypatch.setattr(cpu, "features", lambda _: frozenset(cpu.AVX512BF16.needs))
    monkeypatch.setenv("LOSA_KERNEL", "avx512-bf16")
    with pytest.raises(LosaError, match=r"has no values of torch\.float32"):
        kernels.multiply(torch.randn(1, 64), made(2, 64, 0.5, torch.float32))


def test_an_unknown_kernel(fresh: None) -> None:
    with pytest.raises(LosaError, match="unknown kernel 'avx521': did you mean 'avx512'"):
        kernels.choose(PACKED, torch.float32, CPU, "avx521")


def test_the_reference_takes_what_is_left_and_says_so_once(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone() -> ctypes.CDLL:
        raise native.Unavailable("there is no C++ compiler")

    monkeypatch.setattr(native, "library", gone)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 64).to(dtype)
        want = x.float() @ unpack(PACKED, torch.float32)[0].T
        assert torch.allclose(kernels.multiply(x, PACKED).float(), want, rtol=1e-2, atol=1e-2)
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and "slow reference" in warned[0] and "there is no C++ compiler" in warned[0]


def test_other_devices_and_types_are_refused() -> None:
    for name in registry.KERNELS:
        kernel: kernels.Kernel = registry.get("kernel", name)()
        assert kernel.refuses(PACKED, torch.int64, CPU)
        if isinstance(kernel, cpu.Native):
            assert kernel.refuses(PACKED, torch.float64, CPU)
            assert "not on cuda" in str(kernel.refuses(PACKED, torch.float32, torch.device("cuda")))
    with pytest.raises(LosaError, match=r"no kernel multiplies torch\.int64"):
        kernels.choose(PACKED, torch.int64, CPU)


# -------------------------------------------------------------------------------------------------------------- the op


def test_the_op_is_a_good_citizen() -> None:
    packed = made(8, 64, 0.5, torch.int8)
    tensors = (packed.values, packed.mask, packed.offsets, packed.scales)
    x, bias = torch.randn(3, 64, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.losa.packed_linear.default, (x, bias, *tensors, 64, 0, 0))
    weight = (packed.values, packed.mask, packed.scales)
    torch.library.opcheck(torch.ops.losa.packed_linear_backward.default, (torch.randn(3, 8), *weight, 64))


def test_compiled_graphs_stay_whole() -> None:
    def double(x: Tensor) -> Tensor:
        return kernels.multiply(x, PACKED) * 2

    x = torch.randn(2, 3, 64)
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), double(x))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64)])
@pytest.mark.parametrize("of", ["x", "bias", "both"])
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.int8, "2:4"])
def test_gradients_are_those_of_the_unpacked_weight(values: Any, of: str, shape: tuple[int, ...]) -> None:
    two_of_four = torch.tensor([1, 0, 0, 1]).bool().repeat(8, 16)
    packed = pack(torch.randn(8, 64), two_of_four) if values == "2:4" else made(8, 64, 0.5, values)
    assert (packed.nm is None) == (values != "2:4")
    x, bias = torch.randn(shape, requires_grad=of != "bias"), torch.randn(8, requires_grad=of != "x")
    wanted = [tensor for tensor in (x, bias) if tensor.requires_grad]
    heads = torch.randn(*shape[:-1], 8)
    found = torch.autograd.grad(kernels.multiply(x, packed, bias), wanted, heads)
    dense = torch.nn.functional.linear(x, unpack(packed, torch.float32)[0], bias)
    for one, exact in zip(found, torch.autograd.grad(dense, wanted, heads), strict=True):
        torch.testing.assert_close(one, exact)
    with torch.no_grad():
        assert not kernels.multiply(x, packed, bias).requires_grad


def test_a_wrong_width_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"64 columns was given \[2, 65\]"):
        kernels.multiply(torch.randn(2, 65), PACKED)


@pytest.mark.parametrize("shape", [[3], [9], [8, 1], [1, 8], []])
def test_a_bias_of_another_shape_is_an_error(shape: list[int]) -> None:
    """And not a read beyond its end; through the op too."""
    tensors = (PACKED.values, PACKED.mask, PACKED.offsets, PACKED.scales)
    with pytest.raises(ValueError, match="8 rows was given a bias"):
        kernels.multiply(torch.randn(2, 64), PACKED, torch.randn(shape))
    with pytest.raises(ValueError, match="8 rows was given a bias"):
        torch.ops.losa.packed_linear(torch.randn(2, 64), torch.randn(shape), *tensors, 64, 0, 0)


def test_a_bias_may_be_a_view() -> None:
    x, wide = torch.randn(2, 64), torch.randn(8, 2)
    for bias in (wide[:, 0], torch.randn(1).expand(8)):
        assert torch.equal(kernels.multiply(x, PACKED, bias), kernels.multiply(x, PACKED, bias.clone()))


@pytest.mark.parametrize("name", ["values", "mask", "offsets", "scales", "bias"])
def test_tensors_elsewhere_are_an_error(name: str) -> None:
    """And not a read through a pointer to nothing."""
    packed, bias = made(8, 64, 0.5, torch.int8), torch.randn(8)
    if name == "bias":
        bias = bias.to("meta")
    else:
        packed = dataclasses.replace(packed, **{name: getattr(packed, name).to("meta")})
    with pytest.raises(LosaError, match="a packed linear on meta was given activations on cpu: move one of them"):
        kernels.multiply(torch.randn(1, 64), packed, bias)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_works_after_a_fork(built: None) -> None:
    packed, x = made(300, 512, 0.5, torch.bfloat16), torch.randn(1, 512)
    torch.set_num_threads(2)
    try:
        want = kernels.multiply(x, packed)
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(2)
            os._exit(0 if torch.equal(kernels.multiply(x, packed), want) else 1)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        torch.set_num_threads(1)
