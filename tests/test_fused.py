"""The fused masked linear: against float64 autograd of the formula in Triton's interpreter, through its compiler, and the choice."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losa import fused, masks
from losa.adapters import MaskedLinear, _MaskedLowRank
from losa.errors import LosaError
from losa.sparse import gpu

HERE = Path(__file__).parent
SCALING = 2.0
INTERPRETED = gpu.interpreted()
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, in Triton's interpreter")
outside = pytest.mark.skipif(INTERPRETED, reason="runs without Triton's interpreter")


def made(tokens: int, out: int, columns: int, rank: int, dtype: torch.dtype, bias: bool = True) -> list[Any]:
    """Operands of a layer half pruned, whose pair has been trained; B is part of a wider matrix, as in MaskedLinear."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(of)

    mask = torch.rand(out, columns, generator=generator) < 0.5
    weight = drawn(out, columns) * mask
    a, b = drawn(rank, columns, of=torch.float32), drawn(out, rank + 2, of=torch.float32)[:, :rank]
    x, added = drawn(2, tokens, columns), drawn(out) if bias else None
    return [
        x.requires_grad_(),
        weight,
        masks.pack(mask),
        a.requires_grad_(),
        b.detach().requires_grad_(),
        added if added is None else added.requires_grad_(),
        SCALING,
    ]


def wanted(operands: list[Any], dy: Tensor, magnitudes: bool = False) -> list[Tensor]:
    """y, and the gradients of x, A, B and the bias, in float64 by autograd; of all magnitudes, what roundings are relative to."""
    x, weight, bits, a, b, bias, scaling = operands
    wide = [None if t is None else t.detach().double() for t in (x, weight, a, b, bias, dy)]
    x, weight, a, b, bias, dy = (t if t is None or not magnitudes else t.abs() for t in wide)
    leaves = [t.requires_grad_() for t in (x, a, b, bias) if t is not None]
    effective = masks.unpack(bits, weight.shape[1]) * (weight + scaling * (b @ a))
    y = x @ effective.T + (0 if bias is None else bias)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def step(operands: list[Any], dy: Tensor) -> list[Tensor]:
    y = fused.Fused.apply(*operands)
    leaves = [t for t in operands if isinstance(t, Tensor) and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


# ------------------------------------------------------------------------------------------------------ the interpreter


@inside
@pytest.mark.parametrize("tile", [128, 16])
@pytest.mark.parametrize(
    ("tokens", "out", "columns", "rank", "bias"),
    [(5, 24, 19, 3, True), (17, 40, 35, 17, False), (1, 1, 8, 1, True)],
)
def test_agrees_with_float64(
    tokens: int, out: int, columns: int, rank: int, bias: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "TILES", {"M": tile, "N": tile, "K": min(tile, 32)})
    operands = made(tokens, out, columns, rank, torch.float32, bias)
    dy = torch.randn(2, tokens, out, generator=torch.Generator().manual_seed(1))
    sizes = wanted(operands, dy, magnitudes=True)
    for got, want, size in zip(step(operands, dy), wanted(operands, dy), sizes, strict=True):
        assert got.dtype == torch.float32 and got.shape == want.shape
        assert ((got.double() - want).abs() <= 2e-6 * size + 1e-30).all()


@inside
def test_sixteen_bits() -> None:
    """The pair's gradients stay float32. float16, since the interpreter multiplies no bfloat16 tiles."""
    operands = made(9, 30, 50, 4, torch.float16)
    dy = torch.randn(2, 9, 30, generator=torch.Generator().manual_seed(1)).half()
    results = zip(step(operands, dy), wanted(operands, dy), wanted(operands, dy, magnitudes=True), strict=True)
    for i, (got, want, size) in enumerate(results):
        assert got.dtype == (torch.float32 if i in (2, 3) else torch.float16)
        assert ((got.double() - want).abs() <= (2e-6 if i in (2, 3) else 2**-10) * size).all()


@inside
def test_only_what_is_wanted_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    run = fused._run
    monkeypatch.setattr(fused, "_run", lambda function, *rest: ran.append(function) or run(function, *rest))
    operands = made(4, 8, 16, 2, torch.float32)
    operands[0].requires_grad_(False)
    step(operands, torch.ones(2, 4, 8))
    assert ran == ["forward", "backward_pair"]
    ran.clear()
    with torch.no_grad():
        fused.Fused.apply(*operands)
    assert ran == ["forward"]


@inside
def test_a_layer_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step of a MaskedLinear both ways; its output may be added to in place."""
    ran = []
    run = fused._run
    monkeypatch.setattr(fused, "_run", lambda function, *rest: ran.append(function) or run(function, *rest))
    layer = MaskedLinear(nn.Linear(40, 24), 6, SCALING)
    generator = torch.Generator().manual_seed(0)
    layer.set_mask(torch.rand(24, 40, generator=generator) < 0.5)
    layer.set_rank(3, generator)
    assert layer.lora_A is not None and layer.lora_B is not None
    layer.lora_B.data[:, :3] = torch.randn(24, 3, generator=generator)
    x = torch.randn(2, 5, 40, generator=generator)
    seen = []
    for setting in ("never", "always"):
        monkeypatch.setenv("LOSA_FUSED", setting)
        layer.zero_grad()
        y = layer(x)
        y += 1  # as Falcon does
        y.square().sum().backward()
        assert ran == ([] if setting == "never" else ["forward", "backward_pair"])
        seen.append([y.detach(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
    for one, other in zip(*seen, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4) and one.any()


@needs_triton
@outside
def test_in_the_interpreter() -> None:
    """Those above, where Triton was told to interpret before anything imported it."""
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


# --------------------------------------------------------------------------------------------------------- the compiler


@needs_triton
@outside
def test_compiles_for_a_gpu(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def compile_for_a_gpu() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from losa import fused_kernels

    pointers = dict.fromkeys(("x", "dy", "weight", "bias", "y", "dx"), "*bf16") | {"bits": "*u8"}
    pointers |= dict.fromkeys(("a", "b", "da", "db"), "*fp32")
    fixed = {"RANK": 16, **fused.TILES, "PRECISION": "tf32", "bias": None}
    options = {"num_warps": fused.WARPS, "num_stages": fused.STAGES}
    for name in ("forward", "backward_x", "backward_pair"):
        function = getattr(fused_kernels, name)
        names = function.arg_names
        constants = {key: value for key, value in fixed.items() if key in names}
        kinds = pointers | {"scaling": "fp32"} | dict.fromkeys(constants, "constexpr")
        types = {key: kinds.get(key, "i32") for key in names}
        aligned = {*pointers, "out", "columns", "width"} - {"bias"}
        divided = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(names) if key in aligned}
        source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=divided)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert made.metadata.shared <= 100 * 1024, f"{name} takes {made.metadata.shared} bytes of shared memory"


# ---------------------------------------------------------------------------------------------------------- the choice


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """As on a GPU on which the fused linear takes so long ("fused") and the present one so long ("present")."""
    times = {"fused": 1.0, "present": 2.0, "steps": 0, "wrong": 0}

    def timed(compute: Any, *operands: Any) -> tuple[float, list[Tensor]]:
        times["steps"] += 1
        new = compute == fused.Fused.apply
        return times["fused" if new else "present"], [torch.ones(3) + (times["wrong"] if new else 0)]

    monkeypatch.setattr(fused, "_step", timed)
    monkeypatch.setattr(fused, "_machine", lambda device: "a GPU")
    monkeypatch.setattr(fused, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return times


@needs_triton
@outside
def test_taken_only_where_it_is_faster(measured: dict[str, float]) -> None:
    assert fused.faster(_MaskedLowRank.apply, *made(4, 8, 16, 2, torch.float32))
    measured["present"] = 1.01
    assert not fused.faster(_MaskedLowRank.apply, *made(4, 8, 24, 2, torch.float32))


@needs_triton
@outside
def test_measured_once_and_remembered(
    measured: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    operands = made(4, 8, 16, 2, torch.float32)
    assert fused.faster(_MaskedLowRank.apply, *operands)
    steps = measured["steps"]
    measured["fused"] = 9
    assert fused.faster(_MaskedLowRank.apply, *operands) and measured["steps"] == steps
    assert fused.faster(_MaskedLowRank.apply, *made(3, 8, 16, 2, torch.float32))  # 6 tokens count as 8
    monkeypatch.setattr(fused, "_known", {})  # another process
    assert fused.faster(_MaskedLowRank.apply, *operands) and measured["steps"] == steps
    assert not fused.faster(_MaskedLowRank.apply, *made(4, 8, 16, 3, torch.float32))
    assert list(json.loads((tmp_path / "losa" / "fused.json").read_text()).values()) == [True, False]


@needs_triton
@outside
@pytest.mark.parametrize("left", ["", "{", "[1]", '{"other": 1}'])
def test_a_cache_that_is_damaged_is_made_again(left: str, measured: dict[str, float], tmp_path: Path) -> None:
    (tmp_path / "losa").mkdir()
    path = tmp_path / "losa" / "fused.json"
    path.write_text(left)
    assert fused.faster(_MaskedLowRank.apply, *made(4, 8, 16, 2, torch.float32))
    assert True in json.loads(path.read_text()).values()


@needs_triton
@outside
def test_a_cache_that_cannot_be_written(measured: dict[str, float], tmp_path: Path) -> None:
    (tmp_path / "losa").write_text("a file where the folder should be")
    assert fused.faster(_MaskedLowRank.apply, *made(4, 8, 16, 2, torch.float32))


@needs_triton
@outside
def test_what_is_wrong_is_not_taken(measured: dict[str, float], caplog: pytest.LogCaptureFixture) -> None:
    for wrong in (1, float("nan")):
        measured["wrong"] = wrong
        assert not fused.faster(_MaskedLowRank.apply, *made(4, 8, 16 + 8 * (wrong == 1), 2, torch.float32))
    assert "is wrong here" in caplog.text


@needs_triton
@outside
def test_what_fails_is_not_taken(
    measured: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused, "_step", failing)
    assert not fused.faster(_MaskedLowRank.apply, *made(4, 8, 16, 2, torch.float32))
    assert "cannot be used here: RuntimeError('Failed to find C compiler')" in caplog.text


@outside
def test_asked_once_for_each_kind_of_product(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(fused, "_choices", {})
    monkeypatch.setattr(fused, "refuses", lambda *operands: "no" if operands[0].dtype == torch.float16 else None)
    monkeypatch.setattr(fused, "faster", lambda present, *operands: asked.append(operands[0].shape) or True)
    operands = made(4, 8, 16, 2, torch.float32)
    for _ in range(2):
        assert fused._taken(_MaskedLowRank.apply, *operands)
    assert len(asked) == 1
    assert not fused._taken(_MaskedLowRank.apply, *made(4, 8, 16, 2, torch.float16)) and len(asked) == 1
    operands[0].requires_grad_(False)
    fused._taken(_MaskedLowRank.apply, *operands)
    with torch.no_grad():
        fused._taken(_MaskedLowRank.apply, *operands)
    fused._taken(_MaskedLowRank.apply, *made(9, 8, 16, 2, torch.float32))
    fused._taken(_MaskedLowRank.apply, *made(4, 8, 16, 2, torch.float32, bias=False))
    assert len(asked) == 5


@outside
def test_measured_within_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of a run may be; that the checkpoint then computes its own again is not disturbed."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    operands = made(4, 8, 16, 2, torch.float32)
    dy = torch.ones(2, 4, 8)
    steps = []

    def layer(x: Tensor) -> Tensor:
        if not steps:
            steps.append(fused._step(_MaskedLowRank.apply, x, *operands[1:]))
        y: Tensor = _MaskedLowRank.apply(x, *operands[1:])
        return y.relu()

    checkpoint(layer, operands[0], use_reentrant=False).backward(dy)
    ((took, found),) = steps
    y = wanted(operands, dy)[0].float()
    assert took == 1.0
    for got, want in zip(found, wanted(operands, y), strict=True):
        assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4)
    assert operands[0].grad is not None and operands[0].grad.any()


@outside
def test_on_a_cpu_nothing_changes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "losa.fused")
    monkeypatch.delenv("LOSA_FUSED", raising=False)
    operands = made(4, 8, 16, 2, torch.float32)
    monkeypatch.setattr(fused, "faster", lambda *_: pytest.fail("measured on a CPU"))
    assert fused.choose(_MaskedLowRank.apply, *operands) == _MaskedLowRank.apply
    monkeypatch.setenv("LOSA_FUSED", "always")
    with pytest.raises(LosaError, match=r"LOSA_FUSED=always cannot be: .* runs on CUDA, not on cpu"):
        fused.choose(_MaskedLowRank.apply, *operands)
    monkeypatch.setenv("LOSA_FUSED", "sometimes")
    with pytest.raises(LosaError, match="must be auto, always or never, not 'sometimes'"):
        fused.choose(_MaskedLowRank.apply, *operands)


# ----------------------------------------------------------------------------------------------------------- with a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@needs_triton
@outside
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 3e-6), (torch.float16, 2**-9), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize(
    ("tokens", "out", "columns", "rank"), [(5, 24, 19, 3), (300, 512, 768, 8), (64, 1000, 520, 20)]
)
def test_on_a_gpu(tokens: int, out: int, columns: int, rank: int, dtype: torch.dtype, digits: float) -> None:
    operands = made(tokens, out, columns, rank, dtype)
    dy = torch.randn(2, tokens, out, generator=torch.Generator().manual_seed(1)).to(dtype)
    there = [t.detach().cuda().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in operands]
    results = zip(step(there, dy.cuda()), wanted(operands, dy), wanted(operands, dy, magnitudes=True), strict=True)
    for got, want, size in results:
        assert ((got.cpu().double() - want).abs() <= digits * size).all()


if __name__ == "__main__":  # the subprocess of test_compiles_for_a_gpu
    compile_for_a_gpu()
