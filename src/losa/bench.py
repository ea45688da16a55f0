"""Speed of the product with packed weights beside dense ones and beside a plain reading of the same bytes.

Opponents take turns, each time with another matrix, so that none is in a cache, whoever read it last: ratios are of
neighbours in time. What disagrees with the reference is not timed.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from losa import usage
from losa.errors import LosaError
from losa.registry import unknown
from losa.sparse import cpu, kernels, native, reference
from losa.sparse.packed import DTYPES, MOST, PAD, Packed, pack, unpack
from losa.sparse.pages import Pages
from losa.units import dtype_name

DRAWN = 8
CACHES = 4  # times the last-level cache, so much of distinct matrices
SLOW = 0.5  # seconds; what takes longer runs in every SPARE-th round and the last only
SPARE = 8
DENSE = ("avx512_bf16", "avx512", "avx2", "portable")  # dense bf16 products of the native library, the best first
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of y, relative in norm


@dataclass
class Opponent:
    """One of those that are compared: a product (or reading) for each of its matrices, and the bytes that each reads."""

    calls: Sequence[Callable[[], Any]]
    bytes: int
    places: Iterator[int]  # of the matrices, in whose turn; one for all opponents that read the same ones


def kernel(
    shape: str,
    sparsity: float,
    values: str = "bfloat16",
    activations: str = "bfloat16",
    rows: int = 1,
    name: str | None = None,
    rounds: int = 40,
    threads: int = 0,
) -> dict[str, Any]:
    """Time y = x W^T for a random packed W, x [rows, in], against torch and the best dense product.

    shape: OUTxIN. name: a kernel, None for the one that is chosen. threads: 0 for torch's. Raises LosaError for what
    cannot be, and if a product disagrees with the reference.
    """
    out, columns = _shape(shape)
    if not 0 <= sparsity < 1:
        raise LosaError(f"sparsity must be at least 0 and below 1, not {sparsity}")
    if values not in DTYPES:
        raise unknown("type of values", values, DTYPES)
    if activations not in ("float32", "bfloat16"):
        raise unknown("type of activations", activations, ("float32", "bfloat16"))
    if rows < 1 or rounds < 2 or threads < 0:
        raise LosaError("rows must be at least 1, rounds at least 2, threads at least 0")
    dtype = DTYPES[activations]
    tiny = pack(torch.ones(1, 8), torch.ones(1, 8, dtype=torch.bool), DTYPES[values])
    kernels.choose(tiny, dtype, torch.device("cpu"), name)  # a named one that refuses does so before the work
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _compare(out, columns, sparsity, DTYPES[values], dtype, rows, name, rounds)
    finally:
        torch.set_num_threads(before)


def _compare(
    out: int,
    columns: int,
    sparsity: float,
    values: torch.dtype,
    dtype: torch.dtype,
    rows: int,
    name: str | None,
    rounds: int,
) -> dict[str, Any]:
    cache = last_level_cache()
    packs = _packs(out, columns, sparsity, values, CACHES * cache)
    choice = kernels.choose(packs[0], dtype, torch.device("cpu"), name)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    opponents = _opponents(packs, x, choice.kernel, CACHES * cache)
    times = _times(opponents, rounds)
    milliseconds = {who: round(statistics.median(ms for ms in t if ms), 4) for who, t in times.items()}
    speed = {who: opponents[who].bytes / ms / 1e6 for who, ms in milliseconds.items()}
    found: dict[str, Any] = {
        "benchmark": "kernel",
        "kernel": choice.kernel.name,
        "why": choice.why,
        "refused": choice.refused,
        "shape": f"{out}x{columns}",
        "sparsity": sparsity,
        "kept": packs[0].kept / (out * columns),
        "values": dtype_name(values),
        "activations": dtype_name(dtype),
        "rows": rows,
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "matrices": {who: len(o.calls) for who, o in opponents.items()},
        "last_level_cache": cache,
        "rounds": rounds,
        "ms": milliseconds,
        "gb_per_s": {who: round(gb, 2) for who, gb in speed.items()},
        "weights_per_ns": round(out * columns / milliseconds["losa"] / 1e6, 2),
    }
    ratios = {who: _ratios(times[who], times["losa"]) for who in opponents if who != "losa"}
    dense = [who for who in ratios if who.endswith("bf16")]
    best = min(dense, key=lambda who: statistics.median(ratios[who]))
    for who, key in [("torch_bf16", "torch_bf16"), ("torch_fp32", "torch_fp32"), (best, "best_dense")]:
        low, middle, high = (round(q, 3) for q in statistics.quantiles(ratios[who], n=4, method="inclusive"))
        found[f"speedup_over_{key}"], found[f"speedup_over_{key}_quartiles"] = middle, [low, high]
    found["speedups"] = {who: round(statistics.median(r), 3) for who, r in ratios.items() if not who.startswith("read")}
    found["best_dense"] = best
    # of the speedup, were both read at one speed
    found["bound"] = round(opponents[best].bytes / opponents["losa"].bytes, 3)
    # the fastest of what else reads, dense products too: none of them must be a slow reader only
    shares = {who: statistics.median(ratios[who]) * opponents["losa"].bytes / opponents[who].bytes for who in ratios}
    shares["losa"] = 1.0  # if nobody reads faster
    found["fastest_reader"] = min(shares, key=lambda who: shares[who])
    found["share_of_read_bandwidth"] = round(shares[found["fastest_reader"]], 3)
    return found


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or min(out_in := (int(found[1]), int(found[2]))) < 1:
        raise LosaError(f"shape {text!r} is not OUTxIN, as in 11008x4096")
    if math.prod(out_in) >= MOST:
        raise LosaError(f"shape {text!r} has {math.prod(out_in):,} weights: 2^31 and more are not timed")
    return out_in


def _packs(out: int, columns: int, sparsity: float, values: torch.dtype, total: int) -> list[Packed]:
    """Random matrices, pruned at random places, that come to `total` bytes in memory; beyond DRAWN they are copies.

    In huge pages, where decoding has them too: ordinary ones cost whoever reads fast the most.
    """

    def drawn(seed: int) -> Packed:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(out, columns, generator=generator) >= sparsity
        weight = torch.randn(out, columns, generator=generator) * columns**-0.5
        return pack(weight if values == torch.int8 else weight.to(values), mask, values)

    first = drawn(0)
    count = max(2, -(-total // first.layout.bytes))
    some = [first, *map(drawn, range(1, min(count, DRAWN)))]
    packs = [some[i % len(some)] for i in range(count)]
    moved = iter(_paged([tensor for packed in packs for tensor in packed.tensors().values()]))
    return [Packed.of({name: next(moved) for name in p.tensors()}, p.in_features, p.nm) for p in packs]


def _paged(tensors: Sequence[Tensor]) -> list[Tensor]:
    pages = Pages([tensor.nbytes for tensor in tensors])
    return [pages.put(tensor) for tensor in tensors]


def _opponents(packs: list[Packed], x: Tensor, chosen: kernels.Kernel, total: int) -> dict[str, Opponent]:
    """All of them, each found to agree with the reference in its own precision."""
    wanted = [reference.multiply(x.float(), packed) for packed in packs[:DRAWN]]

    def agree(who: str, calls: Sequence[Callable[[], Tensor]], dtype: torch.dtype) -> Sequence[Callable[[], Tensor]]:
        for call, want in zip(calls, wanted, strict=False):
            error = float((call().float() - want).norm() / want.norm())
            if not error < TOLERANCE[dtype]:
                raise LosaError(f"{who} disagrees with the reference: relative error {error:.1e}. Nothing is timed")
        return calls

    out, columns = packs[0].out_features, packs[0].in_features
    calls = _products(chosen, x, packs)
    # int8 in fixed point, and what is rounded to bfloat16, is not exact in floats
    exact = x.dtype == torch.float32 and packs[0].values.dtype != torch.int8
    precision = torch.float32 if exact else torch.bfloat16
    places = cycle(range(len(packs)))
    found = {"losa": Opponent(agree(chosen.name, calls, precision), packs[0].layout.bytes, places)}
    dense = _paged([unpack(p, torch.bfloat16)[0] for p in packs[: max(2, -(-total // (out * columns * 2)))]])
    calls = [partial(F.linear, x.bfloat16(), w) for w in dense]
    dense_places = cycle(range(len(dense)))
    found["torch_bf16"] = Opponent(
        agree("torch's bf16 product", calls, torch.bfloat16), out * columns * 2, dense_places
    )
    single = _paged([unpack(p, torch.float32)[0] for p in packs[: max(2, -(-total // (out * columns * 4)))]])
    calls = [partial(F.linear, x.float(), w) for w in single]
    agreed = agree("torch's fp32 product", calls, torch.float32)
    found["torch_fp32"] = Opponent(agreed, out * columns * 4, cycle(range(len(single))))
    if len(x) == 1 and (symbol := best_dense()):
        padded = _paged([F.pad(w, (0, -columns % 64)) for w in dense]) if columns % 64 else dense
        calls = [dense_product(symbol, x, w) for w in padded]
        agreed = agree("the native dense product", calls, torch.bfloat16)
        found[f"{symbol}_dense_bf16"] = Opponent(agreed, padded[0].numel() * 2, dense_places)
    return found | _reading(packs, places)


def _products(chosen: kernels.Kernel, x: Tensor, packs: list[Packed]) -> Sequence[Callable[[], Tensor]]:
    """Native ones with their arguments made beforehand, as decoding has them; so has the dense opponent."""
    if isinstance(chosen, cpu.Native) and len(x) <= chosen.at_once(x.dtype):
        return [chosen.prepared(x, p) for p in packs]
    return [partial(chosen.multiply, x, p) for p in packs]


def best_dense() -> str | None:
    """The native library's best dense bf16 product that this machine can run; None without a library."""
    try:
        library = native.library()
    except native.Unavailable:
        return None
    has = cpu.features(library)
    needs = {kind.symbol: kind.needs for kind in (cpu.AVX512BF16, cpu.AVX512, cpu.AVX2, cpu.Portable)}
    return next(s for s in DENSE if has.issuperset(needs[s]) and hasattr(library, f"losa_dense_{s}"))


def dense_product(symbol: str, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """What makes float32 [1, out] = x [1, in] W^T in native code; weight bf16 [out, in padded to a multiple of 64], contiguous."""
    out, columns = weight.shape
    factor = F.pad(x, (0, columns - x.shape[1])).float()
    y = torch.empty(1, out)
    addresses = (weight.data_ptr(), factor.data_ptr(), y.data_ptr())
    multiply = partial(cpu.function(f"losa_dense_{symbol}"), *addresses, out, columns, torch.get_num_threads())
    return partial(cpu.product, multiply, y, weight, factor)


def _reading(packs: list[Packed], places: Iterator[int]) -> dict[str, Opponent]:
    """What reads the kept values of each, in 1, 2 and 4 streams; without a native library torch's sum."""
    lines = (packs[0].kept + PAD) * packs[0].values.element_size() // 64
    try:
        native.library()
    except native.Unavailable:
        return {"read": Opponent([p.values.view(torch.uint8).sum for p in packs], lines * 64, places)}
    read, threads = cpu.function(f"losa_read_{best_dense()}"), torch.get_num_threads()
    addresses = [(p.values.data_ptr(), (p.kept + PAD) * p.values.element_size() // 64) for p in packs]
    return {
        f"read_{n}": Opponent([partial(read, *address, n, threads) for address in addresses], lines * 64, places)
        for n in (1, 2, 4)
    }


def _times(opponents: dict[str, Opponent], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each in every round, 0 in those that a slow one sits out, which the first and the last are not.

    Before these everyone but a slow one reads all of its matrices once: what has not been touched for seconds takes a
    virtual machine of ours 1.98 ms instead of 1.19.
    """
    times: dict[str, list[float]] = {who: [] for who in opponents}
    slow: set[str] = set()
    order = list(opponents)
    for who in order:
        first, *others = opponents[who].calls
        start = time.perf_counter()
        first()
        if time.perf_counter() - start > SLOW:
            slow.add(who)
            continue
        for call in others:
            call()
    for turn in range(rounds):
        for who in order:
            if who in slow and turn % SPARE and turn < rounds - 1:
                times[who].append(0.0)
                continue
            call = opponents[who].calls[next(opponents[who].places)]
            start = time.perf_counter()
            call()
            times[who].append((time.perf_counter() - start) * 1e3)
        order = order[1:] + order[:1]
    return times


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True) if a and b]


def last_level_cache() -> int:
    """Bytes, as Linux tells them; 32 MiB where it does not."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=32 * 2**20)


def processor() -> str:
    """Its name, and which of the instructions that kernels ask for it has."""
    name = usage.processor()
    try:
        return f"{name} ({' '.join(sorted(cpu.features(native.library())))})"
    except native.Unavailable:
        return name
