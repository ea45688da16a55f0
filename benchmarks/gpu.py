"""One product with packed weights on a GPU, in the shapes of Llama-2-7B's linears, over cuBLAS's dense bf16 product.

Each opponent goes once over distinct matrices of four times the L2 cache, in one CUDA graph: so each finds its weights in
memory, and no launch is timed. Opponents take turns; ratios are medians of those within a round. What disagrees with the
reference is not timed. One line of JSON a result. A minute or two on one GPU:

    PYTHONPATH=src python benchmarks/gpu.py
    PYTHONPATH=src python benchmarks/gpu.py --pattern 2:4 --kernel 2:4 triton
    PYTHONPATH=src python benchmarks/gpu.py --rows 2 4 8 512
    PYTHONPATH=src python benchmarks/gpu.py --sweep --shape 11008x4096 --sparsity 0.7   # other tiles for Triton's kernel
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from losa import speed
from losa.errors import LosaError
from losa.sparse import gpu, kernels, reference
from losa.sparse.packed import DTYPES, Packed, pack, unpack

CUDA = torch.device("cuda")
CACHES = 4  # times the L2 cache, so much of distinct matrices
DRAWN = 2  # of them; the others are copies
TOLERANCE = 1e-2  # of y, relative in norm: bf16
TILES = [{"MANY": many} for many in (1, 2, 4, 8)]

Calls = Sequence[Callable[[], Tensor]]


def matrices(out: int, columns: int, sparsity: float, nm: bool, values: torch.dtype, total: int) -> list[Packed]:
    """Random packed weights on the GPU that come to `total` bytes, at least two."""
    generator = torch.Generator(CUDA).manual_seed(0)
    made: list[Packed] = []
    for _ in range(DRAWN):
        weight = torch.randn(out, columns, device=CUDA, generator=generator) * columns**-0.5
        scores = torch.rand(out, columns, device=CUDA, generator=generator)
        mask = scores >= sparsity if not nm else (scores.view(out, -1, 4).argsort(dim=2) < 2).view(out, columns)
        made.append(pack(weight if values == torch.int8 else weight.to(values), mask, values))
    while len(made) * made[0].layout.bytes < total:
        old = made[len(made) % DRAWN]
        made.append(copy.deepcopy(old))
    return made


def verify(who: str, got: Tensor, want: Tensor) -> None:
    """Exits if they disagree."""
    error = float((got.float() - want.float()).norm() / want.float().norm())
    if not error < TOLERANCE:
        sys.exit(
            f"{who} disagrees with the reference: relative error {error:.1e}, allowed {TOLERANCE}. Nothing is timed."
        )


def captured(calls: Calls) -> Callable[[], float]:
    """A function that runs all calls as one CUDA graph and says the milliseconds of one."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and makes what is made at the first product
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def timed() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / len(calls)

    return timed


def in_turns(opponents: dict[str, Calls], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one product of each, in every round; the first two rounds are thrown away."""
    return speed.in_turns({who: captured(calls) for who, calls in opponents.items()}, rounds, before=2)


def compare(out: int, columns: int, sparsity: float, args: argparse.Namespace, rows: int, values: str) -> None:
    """Prints a line a kernel, or with --sweep a line a tile, the fastest first."""
    properties = torch.cuda.get_device_properties(CUDA)
    total = CACHES * properties.L2_cache_size
    packs = matrices(out, columns, sparsity, args.pattern == "2:4", DTYPES[values], total)
    x = torch.randn(rows, columns, device=CUDA, generator=torch.Generator(CUDA).manual_seed(1)).bfloat16()
    dense = [unpack(p, torch.bfloat16)[0] for p in packs[: max(2, -(-total // (out * columns * 2)))]]
    opponents: dict[str, Calls] = {"cublas_bf16": [partial(F.linear, x, weight) for weight in dense]}
    refused: dict[str, Any] = {}
    for name in args.kernel or [None]:
        choice = kernels.choose(packs[0], x.dtype, CUDA, name)
        refused[choice.kernel.name] = choice.refused
        if not args.sweep:
            opponents[choice.kernel.name] = [partial(choice.kernel.multiply, x, p) for p in packs]
    if args.sweep:
        for chosen in TILES:
            opponents[json.dumps(chosen)] = [partial(gpu.Triton()._few, x, rows, p, None, **chosen) for p in packs]
    for who, calls in opponents.items():
        for call, packed in zip(calls, packs[:DRAWN], strict=False):
            verify(who, call(), reference.multiply(x.float(), packed))
    times = in_turns(opponents, args.rounds)
    moved = {who: (out * columns * 2 if who == "cublas_bf16" else packs[0].layout.bytes) for who in opponents}
    found = []
    for who in opponents:
        if who == "cublas_bf16":
            continue
        ratios = [a / b for a, b in zip(times["cublas_bf16"], times[who], strict=True)]
        low, middle, high = (round(q, 3) for q in statistics.quantiles(ratios, n=4, method="inclusive"))
        ms = {name: round(statistics.median(times[name]), 5) for name in ("cublas_bf16", who)}
        found.append(
            {
                "benchmark": "gpu",
                "gpu": properties.name,
                "kernel": who if not args.sweep else "triton",
                "tile": json.loads(who) if args.sweep else None,
                "refused": refused.get(who, {}),
                "shape": f"{out}x{columns}",
                "pattern": args.pattern,
                "sparsity": round(1 - packs[0].kept / (out * columns), 4),
                "values": values,
                "rows": rows,
                "matrices": {name: len(opponents[name]) for name in ms},
                "l2_bytes": properties.L2_cache_size,
                "rounds": args.rounds,
                "ms": ms,
                "gb_per_s": {name: round(moved[name] / ms[name] / 1e6, 1) for name in ms},
                "speedup_over_cublas_bf16": middle,
                "speedup_quartiles": [low, high],
                "bound": round(moved["cublas_bf16"] / moved[who], 3),  # of the speedup, were both read at one speed
            }
        )
    for line in sorted(found, key=lambda line: -line["speedup_over_cublas_bf16"]):
        print(json.dumps(line), flush=True)


def main() -> None:
    """Parses the flags; prints one line of JSON a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["4096x4096", "11008x4096", "4096x11008"]
    parser.add_argument("--shape", nargs="+", default=shapes, help="OUTxIN, one or more")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.6, 0.7], help="with --pattern 2:4 it is 0.5")
    parser.add_argument("--pattern", default="unstructured", choices=["unstructured", "2:4"])
    parser.add_argument("--values", nargs="+", default=["bfloat16"], choices=list(DTYPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1], help="tokens at once")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--kernel", nargs="+", help="default: the one that is chosen")
    parser.add_argument("--sweep", action="store_true", help="Triton's kernel with other tiles, the fastest first")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU (torch sees no CUDA device): nothing is timed")
    if args.rounds < 2:
        parser.error("--rounds must be 2 or more: quartiles are reported")
    if args.sweep and (args.kernel or max(args.rows) > gpu.ROWS):
        parser.error(f"--sweep is of Triton's kernel and at most {gpu.ROWS} rows")
    torch.set_grad_enabled(False)
    sparsities = [0.5] if args.pattern == "2:4" else args.sparsity
    try:
        for shape in args.shape:
            out, columns = (int(n) for n in shape.split("x"))
            for values, sparsity, rows in itertools.product(args.values, sparsities, args.rows):
                compare(out, columns, sparsity, args, rows, values)
    except LosaError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
