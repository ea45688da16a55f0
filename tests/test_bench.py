"""losa bench kernel: what it says, and that it times nothing that is wrong."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from losa import bench, registry
from losa.cli import main
from losa.errors import LosaError
from losa.sparse import cpu, kernels, native
from losa.sparse.packed import Packed
from losa.sparse.pages import Pages


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few small matrices are four times the cache."""
    monkeypatch.setattr(bench, "last_level_cache", lambda: 2**14)
    monkeypatch.setattr(kernels, "_chosen", {})


class Clock:
    """Every call takes a millisecond; those at the places in `slow` (counted from 0) a second."""

    def __init__(self, slow: Any = ()) -> None:
        self.now, self.looks, self.slow = 0.0, 0, slow

    def perf_counter(self) -> float:
        call, after = divmod(self.looks, 2)
        self.looks += 1
        self.now += after * (1.0 if call in self.slow else 0.001)
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no figure depends on what else the machine does."""
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=Clock().perf_counter))


@pytest.mark.parametrize("values", ["bfloat16", "float16", "float32", "int8"])
@pytest.mark.parametrize("activations", ["bfloat16", "float32"])
def test_says_what_was_timed(values: str, activations: str) -> None:
    found = bench.kernel("48x200", 0.7, values, activations, rounds=3)
    assert found["kernel"] in registry.KERNELS and found["why"] and "reference" not in found["refused"]
    assert abs(found["kept"] - 0.3) < 0.05
    size = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}[values]
    assert found["matrices"]["losa"] * 48 * 200 * (0.3 * size + 1 / 8) > 3.5 * 2**14
    for key in ("torch_bf16", "torch_fp32", "best_dense"):
        low, high = found[f"speedup_over_{key}_quartiles"]
        assert low == found[f"speedup_over_{key}"] == high == 1
    assert set(found["ms"].values()) == {1.0}
    assert 0 < found["share_of_read_bandwidth"] <= 1 and found["fastest_reader"] in found["ms"]
    assert found["best_dense"] in found["ms"] and set(found["ms"]) == set(found["gb_per_s"])


@pytest.mark.parametrize("rounds", [2, 3, 11])
def test_a_slow_opponent_sits_most_rounds_out(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But has two of them at least: one figure has no quartiles."""
    before = bench.kernel("48x200", 0.7, rounds=2)
    clock = Clock({before["matrices"]["losa"]})  # torch_bf16's first
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    found = bench.kernel("48x200", 0.7, rounds=rounds)
    assert found["ms"]["torch_bf16"] == 1.0 and found["ms"].keys() == before["ms"].keys()
    assert found["speedup_over_torch_bf16_quartiles"] == [1, 1]
    clock = Clock({1})
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    times = bench._times({who: bench.Opponent([lambda: None], 8, repeat(0)) for who in ("quick", "slow")}, rounds)
    assert (
        all(times["quick"])
        and [bool(ms) for ms in times["slow"]]
        == {
            2: [True, True],
            3: [True, False, True],
            11: [True, *[False] * 7, True, False, True],
        }[rounds]
    )


@pytest.mark.parametrize("shape", [(48, 200), (48, 256), (300, 200)])
def test_nobody_finds_a_matrix_in_the_cache(shape: tuple[int, int]) -> None:
    """Between two readings of one, whoever reads, more than a last-level cache holds is read."""
    cache = bench.last_level_cache()
    packs = bench._packs(*shape, 0.7, torch.bfloat16, bench.CACHES * cache)
    kernel = cpu.Portable()
    opponents = bench._opponents(packs, torch.randn(1, shape[1]).bfloat16(), kernel, bench.CACHES * cache)
    read: list[tuple[Any, int]] = []

    def place(call: Any) -> Any:
        matrices = [arg.values if isinstance(arg, Packed) else arg for arg in call.args]
        whole = [matrix for matrix in matrices if isinstance(matrix, Tensor) and matrix.numel() > 300]  # beyond x and y
        return whole[0].data_ptr() if whole else call.args[0]

    for opponent in opponents.values():
        opponent.calls = [partial(read.append, (place(call), opponent.bytes)) for call in opponent.calls]
    bench._times(opponents, 20)
    assert len(opponents) == 7 and len(read) == 7 * 20 + sum(len(opponent.calls) for opponent in opponents.values())
    last: dict[Any, int] = {}
    for i, (where, _) in enumerate(read):
        between = {other: size for other, size in read[last.get(where, i) + 1 : i] if other != where}
        assert where not in last or sum(between.values()) > cache
        last[where] = i
    assert len(last) >= 2 * 3


def test_small_matrices_share_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A huge page for each of thousands would be gigabytes."""
    made: list[Pages] = []

    class Counted(Pages):
        def __init__(self, sizes: Sequence[int]) -> None:
            made.append(self)
            super().__init__(sizes)

    monkeypatch.setattr(bench, "Pages", Counted)
    found = bench.kernel("8x24", 0.5, rounds=2)
    assert min(found["matrices"][who] for who in ("losa", "torch_bf16")) > 100 and len(made) <= 4


@pytest.mark.parametrize("rows", [2, cpu.ROWS + 1])
def test_several_rows(rows: int) -> None:
    found = bench.kernel("48x200", 0.5, rows=rows, rounds=2)
    assert found["best_dense"] == "torch_bf16"  # the native one multiplies one row


def test_ends_with_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "kernel", "--shape", "48x200", "--sparsity", "0.7", "--rounds", "2", "--threads", "2"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"kernel", "why", "refused", "speedup_over_torch_bf16", "speedup_over_best_dense"} < set(found)
    assert found["threads"] == 2 and torch.get_num_threads() == 1
    assert main([*arguments, "--kernel", "reference"]) == 0
    assert "kernel reference: named; 2 threads" in capsys.readouterr().out


def test_prints_each_refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.AVX512BF16, "needs", ("a_thing",))
    assert main(["bench", "kernel", "--shape", "48x200", "--rounds", "2", "--activations", "float32"]) == 0
    assert "kernel avx512-bf16 refused: this processor has no a_thing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernel", "--shape", "11008"], "shape '11008' is not OUTxIN, as in 11008x4096"),
        (["kernel", "--shape", "0x8"], "not OUTxIN"),
        (["kernel", "--shape", f"{10**23}x8"], "2^31 and more are not timed"),
        (["kernel", "--sparsity", "1"], "sparsity must be at least 0 and below 1, not 1.0"),
        (["kernel", "--values", "bf16"], "unknown type of values 'bf16'"),
        (["kernel", "--activations", "int8"], "unknown type of activations 'int8'"),
        (["kernel", "--rows", "0"], "rows must be at least 1"),
        (["kernel", "--kernel", "avx3"], "unknown kernel 'avx3': did you mean 'avx2'"),
        (["kernel", "--against", "x"], "unknown argument '--against'"),
        (["decode", "demo", "--shape", "8x8"], "unknown argument '--shape'"),
        (["kernels"], "invalid choice: 'kernels'"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.Native.prepared

    def wrong(self: cpu.Native, x: Tensor, packed: Packed, bias: Any = None) -> Callable[[], Tensor]:
        return lambda: right(self, x, packed, bias)() * 1.05

    monkeypatch.setattr(cpu.Native, "prepared", wrong)
    with pytest.raises(LosaError, match=r"portable disagrees with the reference: .* Nothing is timed"):
        bench.kernel("48x200", 0.7, name="portable", rounds=2)


def test_every_dense_opponent_is_right() -> None:
    has = cpu.features(native.library())
    x, weight = torch.randn(1, 300).bfloat16(), torch.randn(33, 384).bfloat16()
    weight[:, 300:] = 0
    for kind in (cpu.AVX512BF16, cpu.AVX512, cpu.AVX2, cpu.Portable):
        if has.issuperset(kind.needs):
            got = bench.dense_product(kind.symbol, x, weight)()
            assert torch.allclose(got, x.float() @ weight[:, :300].float().T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_a_reader_reads_all(streams: int) -> None:
    data = torch.zeros(4 * 5000 * 8, dtype=torch.int64)
    read = cpu.function(f"losa_read_{bench.best_dense()}")
    for place in (0, 8 * 5000 + 3, len(data) - 1):
        data[place] = 77
        assert read(data.data_ptr(), len(data) // 8, streams, 2) == 77
        data[place] = 0


def test_works_without_a_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Any:
        raise native.Unavailable("no compiler")

    monkeypatch.setattr(native, "library", gone)
    monkeypatch.setattr(kernels, "_told", {"reference"})
    found = bench.kernel("48x200", 0.7, rounds=2)
    assert found["kernel"] == "reference" and found["refused"]["avx2"] == "no compiler"
