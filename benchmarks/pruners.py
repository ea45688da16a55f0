"""What pruning costs: seconds per million weights of every pruner, side by side, and the operations it spends them on.

    python benchmarks/pruners.py [--shape 2048x2048 512x2048 --sparsity 0.5 0.7 2:4 --threads 1 --rounds 5]

One matrix, with the statistic of inputs that go together as a transformer's do (and of gradients made from them);
gathering it is not timed. Rounds are interleaved; times are medians over them. The ratio, to the first pruner within a
round, is of processor time, so that what else runs matters less. `shares` are of the wall time of one more call under
torch.profiler, an operation's own time without those it calls; numpy's selection is none of torch's. SparseGPT is also
timed against its products, which no order of columns avoids: Cholesky factor, its inverse, updates behind each block.
One line of JSON a pruner; nothing is timed whose count is not exact.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from losa import masks, registry
from losa.patterns import NM, Amount, parse
from losa.pruners.base import Pruner
from losa.pruners.sparsegpt import Gram, SparseGPT

PRODUCTS = "sparsegpt's products"


def inputs(tokens: int, columns: int) -> Tensor:
    """fp32 [tokens, columns]: a few strong directions and noise; unlike loudness, and a few channels far louder."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rank = max(1, columns // 8)
    strength = torch.arange(1, rank + 1).pow(-0.7)
    x = (draw(tokens, rank) * strength) @ draw(rank, columns) + 0.5 * draw(tokens, columns)
    loudness = draw(columns).mul(0.5).exp()
    loudness[torch.randperm(columns, generator=generator)[: columns // 200]] *= 20
    return x * loudness


def amount(text: str) -> Amount:
    """A share that goes, or N:M kept."""
    if ":" not in text:
        return float(text)
    pattern = parse(text)
    return NM(pattern.n, pattern.m)


def check(name: str, pruner: Pruner, mask: Tensor, wanted: Amount) -> None:
    """Exits unless `mask` prunes as many as asked in each of the pruner's units."""
    if isinstance(wanted, NM):
        exact = bool((mask.view(-1, wanted.m).sum(dim=1) == wanted.n).all())
    else:
        width = mask.shape[1]
        units = {"matrix": [mask], "row": mask.unbind()}.get(pruner.unit)
        units = units or list(mask.split(min(width, int(pruner.unit.split()[0])), dim=1))
        exact = all(int((~unit).sum()) == masks.count_pruned(wanted, unit.numel()) for unit in units)
    if not exact:
        sys.exit(f"{name} does not prune {wanted} of each {pruner.unit}. Nothing is timed.")


def shares(work: Callable[[], Any], top: int) -> dict[str, float]:
    """The operations that take most of the wall time of `work`, largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        work()
        wall = time.perf_counter() - began
    own = {event.key: event.self_cpu_time_total / 1e6 / wall for event in profiler.key_averages()}
    own["not torch"] = max(0.0, 1 - sum(own.values()))
    return {name: round(share, 3) for name, share in sorted(own.items(), key=lambda pair: -pair[1])[:top]}


def products(pruner: SparseGPT, gram: Gram, rows: int) -> Callable[[], Any]:
    """What SparseGPT cannot do without, on an inverse factor of its own: [in, in] twice in float64, and `rows` x in
    behind each block, in float32."""
    hessian = gram.symmetric() / gram.sequences
    hessian.diagonal().add_(pruner.damp * hessian.diagonal().mean())
    columns = torch.zeros(len(hessian), rows)

    def work() -> None:
        exact = torch.eye(len(hessian), dtype=hessian.dtype).t()
        torch.linalg.solve_triangular(torch.linalg.cholesky(hessian).mT, exact, upper=True, out=exact)
        upper = exact.float()
        for start in range(0, len(hessian) - pruner.block, pruner.block):
            span, behind = slice(start, start + pruner.block), slice(start + pruner.block, None)
            columns[behind].addmm_(upper[span, behind].t(), columns[span], alpha=-1)

    return work


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


@torch.no_grad()
def compare(names: list[str], out: int, columns: int, wanted: Amount, tokens: int, rounds: int, top: int) -> None:
    """One line of JSON a pruner."""
    weight = 0.02 * torch.randn(out, columns, generator=torch.Generator().manual_seed(1))
    x = inputs(tokens, columns)
    calls: dict[str, Callable[[], Any]] = {}
    for name in names:
        pruner = registry.get("pruner", name)()
        if pruner.needs_gradients:
            statistic = pruner.gradient_statistic((out, columns), "cpu")
            statistic.update(torch.randn(out, len(x), generator=torch.Generator().manual_seed(2)) @ x, 1)
        elif (statistic := pruner.statistic(columns, "cpu")) is not None:
            statistic.update(x, 1)
        calls[name] = partial(pruner.prune, weight, None, wanted, statistic)
        check(name, pruner, calls[name]()[1], wanted)  # and warms up
        if isinstance(pruner, SparseGPT):
            assert isinstance(statistic, Gram)
            calls[PRODUCTS] = products(pruner, statistic, out)
            calls[PRODUCTS]()
    del x
    wall: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            began, used = time.perf_counter(), time.process_time()
            calls[name]()
            wall[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - used)
        order = order[1:] + order[:1]
    for name in names:
        ratios = [t / first for t, first in zip(processor[name], processor[names[0]], strict=True)]
        result = {
            "benchmark": "pruners",
            "pruner": name,
            "out": out,
            "in": columns,
            "amount": str(wanted),
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "seconds_per_million": rounded(statistics.median(wall[name]) / (out * columns) * 1e6),
            "processor_seconds_per_million": rounded(statistics.median(processor[name]) / (out * columns) * 1e6),
            f"ratio_to_{names[0]}": rounded(statistics.median(ratios)),
            "shares": shares(calls[name], top),
        }
        if name == "sparsegpt":
            over = [t / least for t, least in zip(processor[name], processor[PRODUCTS], strict=True)]
            result["ratio_to_its_products"] = rounded(statistics.median(over))
        print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruner", nargs="+", default=list(registry.PRUNERS), choices=list(registry.PRUNERS))
    parser.add_argument("--shape", nargs="+", default=["2048x2048"], help="OUTxIN, one or more")
    parser.add_argument("--sparsity", nargs="+", default=["0.5"], help="a share, or N:M with N kept; one or more")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--top", type=int, default=4, help="operations a pruner that are named")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for shape in args.shape:
        out, columns = (int(n) for n in shape.split("x"))
        for text in args.sparsity:
            compare(args.pruner, out, columns, amount(text), args.tokens, args.rounds, args.top)


if __name__ == "__main__":
    main()
