"""The GPU's kernels: Triton's in its interpreter and through its compiler, the choice among them, and all on a GPU if there is one.

Triton must be told to interpret before it is first imported, and other libraries import it: hence the subprocesses.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from losa import registry
from losa.errors import LosaError
from losa.sparse import gpu, kernels, semi_structured
from losa.sparse.packed import DTYPES, Packed, pack, unpack
from losa.sparse.reference import Reference

HERE = Path(__file__).parent
CUDA = torch.device("cuda")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def made(out: int, columns: int, values: torch.dtype, nm: tuple[int, int] | None = None) -> Packed:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, columns, generator=generator)
    if nm is None:
        mask = torch.rand(out, columns, generator=generator) < 0.4
    else:
        mask = torch.rand(out, columns // nm[1], nm[1], generator=generator).argsort(dim=2).lt(nm[0]).view(out, columns)
    return pack(weight if values == torch.int8 else weight.to(values), mask, values)


def on_gpu(packed: Packed) -> Packed:
    moved = [None if t is None else t.cuda() for t in (packed.values, packed.mask, packed.offsets, packed.scales)]
    assert moved[0] is not None and moved[1] is not None
    return Packed(moved[0], moved[1], moved[2], moved[3], packed.in_features, packed.nm)


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=os.environ | environment, cwd=HERE.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------------ without a GPU


@needs_triton
def test_the_contract_in_the_interpreter() -> None:
    """tests/test_kernels.py for this kernel, with NVIDIA's instructions; what multiplies infinity by zero warns there, on a
    GPU nothing does."""
    told = run(__file__, "contract", TRITON_INTERPRET="1")
    assert "passed" in told and "skipped" not in told, told


def contract() -> None:
    warns, bare = "ignore:invalid value encountered:RuntimeWarning", ("-p", "no:cacheprovider")
    with nvidia():
        status = pytest.main(["tests/test_kernels.py", "-k", "triton", "-W", warns, *bare])
    assert status == 0 and emulations == {"popc", "prmt"}


@needs_triton
def test_any_tile_gives_the_same() -> None:
    """What the interpreter chooses for its own sake, what a GPU is given, and what benchmarks/gpu.py may try; with NVIDIA's
    instructions, and without."""
    run(__file__, "tiles", TRITON_INTERPRET="1")


def tiles() -> None:
    for values in DTYPES.values():
        packed, x = made(5, 1100, values), torch.randn(3, 1100, generator=torch.Generator().manual_seed(1))
        want = x @ unpack(packed, torch.float32)[0].T
        for chosen in ({}, {"MANY": 1}, {"MANY": 2}):
            got = gpu.Triton()._few(x, 3, packed, None, **chosen)
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-5), (values, chosen)
        assert not emulations
        with nvidia():
            got = gpu.Triton()._few(x, 3, packed, None, MANY=4)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5), values
        assert emulations == ({"popc"} if values == torch.float32 else {"popc", "prmt"})
        emulations.clear()


emulations: set[str] = set()  # NVIDIA's instructions that were run


@contextmanager
def nvidia() -> Iterator[None]:
    """The interpreter makes what a GPU of NVIDIA's is given."""
    from triton.runtime.interpreter import InterpreterBuilder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_inline_asm", emulated)
        patch.setattr(gpu, "has_ptx", lambda: True)
        yield


def emulated(_self: Any, text: str, _registers: str, values: list[Any], *_: Any) -> Any:
    """What decode.py asks of NVIDIA's GPUs, as the PTX manual has it."""
    import numpy
    from triton.runtime.interpreter import TensorHandle

    name, *given = text.split(".")[0], *(value.data.astype(numpy.uint64) for value in values)
    emulations.add(name)
    if name == "popc":
        made = numpy.bitwise_count(given[0])
    else:
        assert name == "prmt" and not (given[2] & 0x8888).any()  # which would ask for signs
        both, made = given[0] | (given[1] << numpy.uint64(32)), numpy.uint64(0)
        for i in range(4):
            byte = both >> (8 * ((given[2] >> numpy.uint64(4 * i)) & numpy.uint64(7)))
            made = made | ((byte & numpy.uint64(255)) << numpy.uint64(8 * i))
    handle = TensorHandle(numpy.asarray(made).astype(numpy.uint32), values[0].dtype.scalar)
    return SimpleNamespace(get_result=lambda _: handle)


@needs_triton
def test_compiles_for_a_gpu(tmp_path: Path) -> None:
    """What the interpreter lets pass need not compile; and the code should be what gpu.py and decode.py say it is."""
    run(__file__, "compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def compile_for_a_gpu() -> None:
    from losa.sparse import decode

    pointers = dict(x="*bf16", mask="*u8", offsets="*i32", scales="*bf16", bias="*bf16", y="*bf16", weight="*bf16")
    for rows, values, without, ptx in (
        (1, "*bf16", "scales", True),
        (8, "*i8", "offsets", True),
        (2, "*fp16", "scales", True),
        (1, "*fp32", "scales", False),
    ):
        types = pointers | {"values": values}
        chosen = {"R": rows, "MANY": gpu.rows_at_once(8192, rows), "TILES": 4, "PTX": ptx}
        made = compiled(decode.multiply, types, chosen | {without: None}, gpu.WARPS)
        assert "popc.b32" in made.asm["ptx"] and ptx == ("prmt.b32" in made.asm["ptx"])
        through_memory = made.metadata.shared > 64 or "bar.sync" in made.asm["ptx"]
        assert not through_memory, "values go from lane to lane through shared memory"
        compiled(decode.expand, types, {"MANY": 1, "COLUMNS": gpu.COLUMNS, without: None}, 4)


def compiled(function: Any, pointers: dict[str, str], fixed: dict[str, Any], warps: int) -> Any:
    """For an H100, as Triton compiles it for shapes that 16 divides; masks count as lying anywhere."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in function.arg_names}
    aligned = (pointers.keys() | {"out", "columns"}) - {"mask"} - fixed.keys()
    divided = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name in aligned}
    source = ASTSource(fn=function, signature=types, constexprs=fixed, attrs=divided)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices as they would fall on an H100 with Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(gpu, "has_triton", lambda: True)
    monkeypatch.setattr(kernels, "_chosen", {})
    monkeypatch.delenv("LOSA_KERNEL", raising=False)


def test_unstructured_weights_take_triton(hopper: None) -> None:
    for values in DTYPES.values():
        choice = kernels.choose(made(32, 64, values), torch.bfloat16, CUDA)
        assert choice.kernel.name == "triton"
        assert choice.refused["2:4"] == "multiplies masks that keep 2:4, not unstructured ones"
        assert choice.refused["portable"] == "runs on the CPU, not on cuda"


@pytest.mark.parametrize("nm", [(2, 4), (1, 2)])
def test_exactly_two_of_four_take_the_hardware(hopper: None, nm: tuple[int, int]) -> None:
    packed = made(32, 64, torch.bfloat16, nm)
    assert packed.nm is not None
    assert kernels.choose(packed, torch.bfloat16, CUDA).kernel.name == "2:4"


@pytest.mark.parametrize(
    ("packed", "x", "why"),
    [
        (made(32, 64, torch.bfloat16, (4, 8)), torch.bfloat16, "keep 2:4, not 4:8"),
        (made(32, 64, torch.bfloat16, (1, 4)), torch.bfloat16, "keep 2:4, not 1:4"),
        (made(32, 64, torch.bfloat16, (2, 4)), torch.float32, "by torch.bfloat16, not by torch.float32"),
        (made(32, 64, torch.float32, (2, 4)), torch.float32, "no values of torch.float32"),
        (made(32, 64, torch.int8, (2, 4)), torch.bfloat16, "no values of torch.int8"),
        (made(24, 64, torch.bfloat16, (2, 4)), torch.bfloat16, "32 and 64 divide, not 24x64"),
        (made(32, 96, torch.bfloat16, (2, 4)), torch.bfloat16, "32 and 64 divide, not 32x96"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_the_hardware_refuses(hopper: None, packed: Packed, x: torch.dtype, why: str) -> None:
    choice = kernels.choose(packed, x, CUDA)
    assert choice.kernel.name == "triton" and why in choice.refused["2:4"]
    with pytest.raises(LosaError, match="kernel '2:4' cannot be used"):
        kernels.choose(packed, x, CUDA, "2:4")


def test_an_old_gpu_is_refused(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    choice = kernels.choose(made(32, 64, torch.bfloat16, (2, 4)), torch.bfloat16, CUDA)
    assert choice.kernel.name == "reference" and "8.0" in choice.refused["2:4"] and "8.0" in choice.refused["triton"]


def test_without_triton(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "has_triton", lambda: False)
    choice = kernels.choose(made(32, 64, torch.bfloat16), torch.bfloat16, CUDA)
    assert choice.kernel.name == "reference" and "pip install" in choice.refused["triton"]


def test_neither_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("2:4", "triton"):
        with pytest.raises(LosaError, match="runs on CUDA, not on cpu"):
            kernels.choose(made(32, 64, torch.bfloat16, (2, 4)), torch.bfloat16, torch.device("cpu"), name)


def test_two_of_four_is_known_behind_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled graph chooses as an uncompiled one does."""
    seen = []
    choose = kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda packed, *rest: seen.append(packed.nm) or choose(packed, *rest))
    for nm in ((2, 4), None):
        packed = made(32, 64, torch.bfloat16, nm)
        compiled = torch.compile(lambda x, p=packed: kernels.multiply(x, p), fullgraph=True, backend="aot_eager")
        assert compiled(torch.randn(2, 64)).shape == (2, 32)
        assert seen.pop() == packed.nm and not seen


def test_compressed_once_and_again_when_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    dense: list[Tensor] = []
    monkeypatch.setattr(semi_structured, "_held", {})
    monkeypatch.setattr(semi_structured, "_compress", lambda weight: dense.append(weight) or weight)
    kernel = semi_structured.SemiStructured()
    packed, x = made(32, 64, torch.bfloat16, (2, 4)), torch.randn(2, 3, 64).bfloat16()
    want = x.double() @ unpack(packed)[0].double().T
    for _ in range(2):
        same = Packed(packed.values.detach(), packed.mask, None, None, 64, packed.nm)  # as a linear or an op makes it
        assert torch.allclose(kernel.multiply(x, same).double(), want, rtol=2**-7, atol=2**-7)
    assert len(dense) == 1 and kernel.multiply(x[:0], packed).shape == (0, 3, 32)
    packed.values[0] = 7
    kernel.multiply(x, packed)
    assert len(dense) == 2 and (dense[1] == 7).sum() == 1
    assert len(semi_structured._held) == 1
    detached = packed.values.detach()
    del packed, same
    assert len(semi_structured._held) == 0, "the mask is gone, and the compressed copy is still held"
    del detached
    other = made(32, 64, torch.bfloat16, (2, 4))
    kernel.multiply(x, other)
    values, mask = other.values.detach(), other.mask.detach()
    del other
    assert len(dense) == 3 and len(semi_structured._held) == 1  # by what lies in the same memory
    del values, mask
    assert not semi_structured._held


# ------------------------------------------------------------------------------------------------------ the benchmark


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_gpu", HERE.parent / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="there is no GPU"):
        benchmark().main()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark with a CPU in the GPU's place and calls in that of a graph."""
    module = benchmark()
    monkeypatch.setattr(module, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(module, "captured", lambda calls: lambda: float(len([call() for call in calls])))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(name="none", L2_cache_size=4000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    arguments = ["gpu.py", "--shape", "32x64", "--rounds", "2", "--rows", "1", "9", "--values", "bfloat16", "int8"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--kernel", "reference"])
    yield module
    torch.set_grad_enabled(True)


def test_the_benchmark_says_what_was_timed(on_cpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for pattern, results in (("unstructured", 8), ("2:4", 4)):
        sys.argv += ["--pattern", pattern]
        on_cpu.main()
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(lines) == results and {line["pattern"] for line in lines} == {pattern}
        for line in lines:
            assert line["matrices"]["cublas_bf16"] * 32 * 64 * 2 >= 4 * 4000
            dense, sparse = line["matrices"]["cublas_bf16"], line["matrices"]["reference"]
            assert line["speedup_over_cublas_bf16"] == round(dense / sparse, 3)
            assert line["bound"] > (
                1 if line["values"] == "int8" else 0.8
            )  # the padding weighs much in so small a matrix


def test_the_benchmark_times_nothing_wrong(on_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = Reference.multiply
    monkeypatch.setattr(Reference, "multiply", lambda *args: multiply(*args) * 1.02)
    with pytest.raises(SystemExit, match="reference disagrees with the reference"):
        on_cpu.main()


# --------------------------------------------------------------------------------------------------------- with a GPU


@needs_gpu
@needs_triton
@pytest.mark.skipif(gpu.interpreted(), reason="Triton is told to interpret (TRITON_INTERPRET)")
@pytest.mark.parametrize("name", ["2:4", "triton"])
@pytest.mark.parametrize("nm", [None, (2, 4)], ids=["unstructured", "2:4"])
@pytest.mark.parametrize("values", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(32, 64), (131, 1000), (1024, 4096), (320, 11008)], ids=str)
def test_on_a_gpu(name: str, nm: tuple[int, int] | None, values: torch.dtype, shape: tuple[int, int]) -> None:
    packed, kernel = made(*shape, values, nm), registry.get("kernel", name)()
    dense, there = unpack(packed, torch.float32)[0].double(), on_gpu(packed)
    for x_type in (torch.float32, torch.bfloat16, torch.float16):
        if kernel.refuses(there, x_type, CUDA):
            continue
        for rows in (1, 2, 3, 8, 9, 100):
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(x_type)
            bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2)).to(x_type)
            got = kernel.multiply(x.cuda(), there, bias.cuda()).cpu()
            want = x.double() @ dense.T + bias.double()
            exact = x_type == torch.float32
            # relative in the size of the sums: float32's, one rounding of the result, one of int8 weights
            allowed = (3e-6 if exact else 2**-7) * (x.double().abs() @ dense.abs().T + bias.double().abs())
            assert got.dtype == x_type and ((got.double() - want).abs() <= allowed).all(), (x_type, rows)


@needs_gpu
def test_every_kernel_of_the_gpu_was_tried() -> None:
    packed = on_gpu(made(32, 64, torch.bfloat16, (2, 4)))
    for name in ("2:4", "triton"):
        assert registry.get("kernel", name)().refuses(packed, torch.bfloat16, CUDA) is None


if __name__ == "__main__":  # the subprocesses
    {"contract": contract, "tiles": tiles, "compile": compile_for_a_gpu}[sys.argv[1]]()
