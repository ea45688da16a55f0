"""The paper's comparison on the built-in model: what is left of the quality by pruner, sparsity and recovery method.

    python benchmarks/methods.py --results methods.jsonl [--threads 1] [--part 1/2]
    python benchmarks/methods.py --results methods.jsonl --table

All methods get the same 1500 x 256 tokens. The learning rate of each method is chosen on demo:validation at 60% with
Wanda and seed 0; the held-out test is then read once a seed. Every result is a line of JSON; what the file holds is not run again.
Perplexities do not depend on the number of threads beyond rounding.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

RATES = (2e-3, 4e-3, 8e-3)
SEEDS = range(5)
ONE_STEP = {"steps": 1, "mean_rank": 8.0}
METHODS: dict[str, dict[str, Any]] = {
    "pruned only": {"recovery": "none", "allocator": "uniform", "steps": 1},
    "LoRA, apart": {"recovery": "lora", "allocator": "uniform", "rank_by": "uniform", **ONE_STEP},
    "sparse LoRA": {"allocator": "uniform", "rank_by": "uniform", **ONE_STEP},
    "LoSA": {},
    "LoSA, uniform rates": {"allocator": "uniform"},
    "LoSA, uniform ranks": {"rank_by": "uniform"},
    "LoSA, one step": ONE_STEP,
}


def run(settings: dict[str, Any]) -> dict[str, Any]:
    import losa
    from losa import recipe

    began = time.monotonic()
    result = losa.compress("demo", recipe.load("demo", settings))
    found = result.measurements
    return {
        "dense": found["dense"]["perplexity"],
        "perplexity": found["sparse"]["perplexity"],
        "reached": found["sparse"]["sparsity"],
        "seconds": round(time.monotonic() - began, 1),
    }


def read(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["key"]: line for line in lines}


def once(path: Path, key: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The result of `key`, from the file or from a run that is added to it."""
    name = json.dumps(key)
    if (found := read(path).get(name)) is None:
        found = {"key": name, **key, **run(settings)}
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)
    return found


def compare(path: Path, pruner: str, sparsity: float, method: str, seeds: range) -> None:
    base = {"pruner": pruner, **METHODS[method]}
    rate = RATES[0]
    if base.get("recovery") != "none":
        tuned = {}
        for candidate in RATES:
            settings = METHODS[method] | {"sparsity": 0.6, "learning_rate": candidate, "eval_data": "demo:validation"}
            key = {"phase": "tune", "pruner": "wanda", "method": method, "rate": candidate}
            tuned[candidate] = once(path, key, settings)["perplexity"]
        rate = min(tuned, key=lambda r: tuned[r])
    for seed in seeds:
        settings = base | {"sparsity": sparsity, "learning_rate": rate, "seed": seed}
        key = {"phase": "test", "pruner": pruner, "sparsity": sparsity, "method": method, "seed": seed}
        once(path, key | {"rate": rate}, settings)


def table(path: Path) -> None:
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for line in read(path).values():
        if line["phase"] == "test":
            groups.setdefault((line["pruner"], line["sparsity"], line["method"]), []).append(line)
    print(
        "| pruner | sparsity | method | learning rate | seeds | perplexity | deviation |\n|---|---|---|---|---|---|---|"
    )
    for (pruner, sparsity, method), lines in sorted(groups.items()):
        values = [line["perplexity"] for line in lines]
        deviation = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
        rate = lines[0]["rate"] if METHODS[method].get("recovery") != "none" else "-"
        mean = statistics.mean(values)
        print(f"| {pruner} | {sparsity:.0%} | {method} | {rate} | {len(values)} | {mean:.3f} | {deviation} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--part", default="1/1", help="K/N: every N-th method, from the K-th")
    parser.add_argument("--table", action="store_true", help="print what the file holds")
    args = parser.parse_args()
    if args.table:
        return table(args.results)
    import torch

    torch.set_num_threads(args.threads)
    part, parts = map(int, args.part.split("/"))
    # what matters most comes first: one seed of everything, then the others
    for seeds in (range(1), SEEDS):
        for pruner in ("wanda", "sparsegpt"):
            for sparsity in (0.6, 0.7, 0.5):
                for method in list(METHODS)[part - 1 :: parts]:
                    compare(args.results, pruner, sparsity, method, seeds)
    return None


if __name__ == "__main__":
    main()
