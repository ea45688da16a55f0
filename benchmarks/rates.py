"""What layer rates cost: one forward pass of their calibration sequences, with and without what each allocator gathers.

    python benchmarks/rates.py [--hidden 512 --blocks 8 --samples 64 --length 512 --dtype bf16 --rounds 5]

Processor time, so that what else runs matters less; rounds are interleaved, ratios are medians of those within a round.
One line of JSON an allocator: seconds of the bare forward, and how much more of it the allocator takes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from losa import evidence, registry
from losa.adapters import MaskedLinear
from losa.allocators.base import Evidence
from losa.blocks import Subject, find_blocks
from losa.calibration import Stream
from losa.progress import Progress
from losa.recipe import Recipe
from losa.run import Run


def build(args: argparse.Namespace) -> Subject:
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 43 // 16,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.hidden // 64,
        max_position_embeddings=args.length,
    )
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = transformers.LlamaForCausalLM(config).eval()
    model.to(dtype=dtype)
    return Subject(model, None, find_blocks(model), "random", dtype)


def seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("blocks", 8), ("samples", 64), ("length", 512), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    args = parser.parse_args()
    subject = build(args)
    tokens = torch.randint(512, (args.samples, args.length))
    run = Run(None, Progress(quiet=True))

    def forward() -> None:
        stream = Stream(subject.model, subject.blocks, tokens, torch.device("cpu"))
        for block in subject.blocks:
            stream.advance(block)

    def rates(name: str) -> None:
        recipe = Recipe(allocator=name, dtype="float32")
        allocator = registry.get("allocator", name)()
        units = evidence.units_of(subject.blocks, "block")
        floors = [0.0] * len(units)
        seen = evidence.gather(subject, recipe, allocator, 1, units, floors, tokens, run)
        allocator.rates(Evidence(0.6, [unit.weights for unit in units], floors, seen))

    subject.wrap(MaskedLinear, Recipe(), 0)
    names = [name for name in registry.ALLOCATORS if registry.get("allocator", name).needs]
    times: dict[str, list[float]] = {name: [] for name in ["forward", *names]}
    for _ in range(args.rounds):
        times["forward"].append(seconds(forward))
        for name in names:
            times[name].append(seconds(partial(rates, name)))
    for name in names:
        ratios = [t / f for t, f in zip(times[name], times["forward"], strict=True)]
        found = {"forward_seconds": statistics.median(times["forward"]), "more": statistics.median(ratios) - 1}
        print(json.dumps({"allocator": name, "dtype": args.dtype, **{k: round(v, 4) for k, v in found.items()}}))


if __name__ == "__main__":
    main()
