"""Comparisons on the built-in model: what is left of the quality after pruning and recovery.

    python benchmarks/methods.py --results benchmarks/results.jsonl [--only methods allocators pruners] [--part 1/2]
    python benchmarks/methods.py --results benchmarks/results.jsonl --table [--markdown README.md docs/log.md]

methods: the paper's comparison, by pruner and sparsity. allocators: which rates win, by sparsity. pruners: the paper's
appendix E, at 70%. All get the same 1500 x 256 tokens. The learning rate of each method is chosen on demo:validation with
seed 0, for each pruner and sparsity; the held-out test is then read once a seed. Every result is a line of JSON; what the
file holds is not run again. Perplexities do not depend on the number of threads beyond rounding.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WINDOW = 512  # tokens: the built-in model's
RATES = (2e-3, 4e-3, 8e-3)
SEEDS = range(5)
COMPARED = ("wanda", "sparsegpt")  # the pruners of the paper's comparison
FIRST = ("wanda", 0.6)  # where rates are searched among RATES; elsewhere from what was found there
ONE_STEP = {"steps": 1, "mean_rank": 8.0}
PRUNED = {"recovery": "none", "steps": 1}
METHODS: dict[str, dict[str, Any]] = {
    "pruned only": {**PRUNED, "allocator": "uniform"},
    "LoRA, apart": {"recovery": "lora", "allocator": "uniform", "rank_by": "uniform", **ONE_STEP},
    "sparse LoRA": {"allocator": "uniform", "rank_by": "uniform", **ONE_STEP},
    "LoSA": {},
    "LoSA, uniform rates": {"allocator": "uniform"},
    "LoSA, uniform ranks": {"rank_by": "uniform"},
    "LoSA, one step": ONE_STEP,
}
ALLOCATORS: dict[str, dict[str, Any]] = {
    "uniform": {"allocator": "uniform"},
    "rmi": {"allocator": "rmi"},
    "owl": {"allocator": "owl"},
    "error": {"allocator": "error"},
    "error per linear": {"allocator": "error", "rates_per": "linear"},
}
PRECISE = {"dtype": "float32"}  # on every processor: auto takes bfloat16 where it is multiplied fast
AFTER = {"pruned only": PRUNED, "LoSA": {}}  # the two states that allocators and pruners are compared in


def methods(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every result of the paper's comparison: its key and its settings; one seed of everything first."""
    for seeds in (range(1), SEEDS):
        for pruner in COMPARED:
            for sparsity in (0.6, 0.7, 0.5):
                for method in METHODS:
                    for seed in seeds:
                        yield one_method(path, pruner, sparsity, method, seed)


def one_method(
    path: Path, pruner: str, sparsity: float, method: str, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One result of the paper's comparison."""
    key = {"pruner": pruner, "sparsity": sparsity, "method": method, "seed": seed}
    rate = tuned(path, method) if (pruner, sparsity) == FIRST else own_rate(path, method, pruner, sparsity)
    chosen = METHODS[method] | {"pruner": pruner, "sparsity": sparsity, "seed": seed}
    return {"phase": "test", **key, "rate": rate}, chosen | {"learning_rate": rate}


def allocators(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Wanda at the rates of each allocator."""
    for sparsity in (0.5, 0.6, 0.7, 0.8):
        for after, base in AFTER.items():
            for name, settings in ALLOCATORS.items():
                chosen = base | settings | {"sparsity": sparsity, "learning_rate": tuned(path, "LoSA")}
                yield {"phase": "allocators", "sparsity": sparsity, "after": after, "allocator": name}, chosen


def pruners(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The paper's appendix E, one seed of everything first; the others of Wanda and SparseGPT are those of `methods`."""
    for seeds in (range(1), range(1, 3)):
        for after, name, seed in itertools.product(AFTER, ("wanda", "sparsegpt", "pruner-zero", "alps"), seeds):
            if seed and name in COMPARED:
                yield one_method(path, name, 0.7, after, seed)
                continue
            chosen = AFTER[after] | {"pruner": name, "sparsity": 0.7, "seed": seed}
            if after == "pruned only":
                chosen["allocator"] = "uniform"
            key = {"phase": "pruners", "after": after, "pruner": name} | ({"seed": seed} if seed else {})
            yield key, chosen | {"learning_rate": tuned(path, "LoSA")}


COMPARISONS = {"methods": methods, "allocators": allocators, "pruners": pruners}


def tuned(path: Path, method: str) -> float:
    """The learning rate that is best for a method on the validation split: of RATES, and above as long as that is better."""
    if METHODS[method].get("recovery") == "none":
        return RATES[0]
    found: dict[float, float] = {}

    def best() -> float:
        return min(found, key=lambda rate: found[rate])

    rates = list(RATES)
    for rate in rates:
        key = {"phase": "tune", "pruner": "wanda", "method": method, "rate": rate}
        found[rate] = validated(path, key, {"sparsity": 0.6})
        if rate == rates[-1] == best():
            rates.append(2 * rate)
    return best()


def own_rate(path: Path, method: str, pruner: str, sparsity: float) -> float:
    """The same at another pruner and sparsity: from FIRST's on halved, or doubled, as long as that is better.

    LoSA without one of its strategies takes LoSA's: at 60% with Wanda they are the same.
    """
    method = "LoSA" if METHODS[method].keys() <= {"allocator", "rank_by"} else method
    best = tuned(path, method)
    if METHODS[method].get("recovery") == "none":
        return best

    def at(rate: float) -> float:
        key = {"phase": "tune", "pruner": pruner, "sparsity": sparsity, "method": method, "rate": rate}
        return validated(path, key, {"pruner": pruner, "sparsity": sparsity})

    for factor in (0.5, 2.0):
        while at(best * factor) < at(best):
            best *= factor
    return best


def validated(path: Path, key: dict[str, Any], settings: dict[str, Any]) -> float:
    """The perplexity on the validation split that a method and a learning rate, both in `key`, come to."""
    chosen = METHODS[key["method"]] | settings | {"learning_rate": key["rate"], "eval_data": "demo:validation"}
    return float(once(path, key, chosen)["perplexity"])


def once(
    path: Path, key: dict[str, Any], settings: dict[str, Any], names: str = "demo", source: str = "demo"
) -> dict[str, Any]:
    """The result of `key`, from the file or from a run that is added to it."""
    name = json.dumps(key)
    if (found := read(path).get(name)) is None:
        found = {"key": name, **key, **run(settings, names, source)}
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)
    return found


def read(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["key"]: line for line in lines}


def run(settings: dict[str, Any], names: str, source: str) -> dict[str, Any]:
    """What one run on the model `source` leaves, its processor's time without the measuring."""
    import losa
    from losa import evaluate, model, recipe
    from losa.units import dtype_name

    chosen = recipe.load(names, settings | PRECISE)
    text, count = chosen.eval_data, chosen.eval_tokens
    began, busy = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:  # a LoRA kept apart has nowhere else to stay
        # measured here, once: a run would measure dense each time, and on its way
        result = losa.compress(source, dataclasses.replace(chosen, eval_data="", sample_tokens=0), Path(folder) / "run")
        found: dict[str, Any] = {
            "reached": result.measurements["sparse"]["sparsity"],
            "seconds": round(time.monotonic() - began, 1),
            "processor_seconds": round(time.process_time() - busy, 1),
        }
        whole = model.load_whole(str(Path(folder) / "run"), chosen)
    tokens, dense = held_out(source, text, count)
    found["dtype"] = dtype_name(whole.dtype)
    return {"dense": dense, "perplexity": evaluate.perplexity(whole, tokens, WINDOW), **found}


@functools.cache
def held_out(source: str, text: str, count: int) -> tuple[Any, float]:
    """The tokens to measure on, and the dense model's perplexity on them."""
    from losa import data, evaluate, model, recipe

    tokens = data.evaluation_tokens(text, model.load_tokenizer(source, model.load_config(source)), WINDOW, count)
    return tokens, evaluate.perplexity(model.load(source, recipe.load("demo", PRECISE)), tokens, WINDOW)


def tables(path: Path) -> dict[str, str]:
    """What the file holds, a table in Markdown of each comparison: perplexity, with mean, deviation and number of seeds
    where there are several."""
    made = {}
    for name, phase, row, columns in (
        ("methods", "test", "method", ("pruner", "sparsity")),
        ("allocators", "allocators", "allocator", ("after", "sparsity")),
        ("pruners", "pruners", "pruner", ("after",)),
    ):
        found: dict[str, dict[str, dict[int, float]]] = {}
        for line in read(path).values():
            # of the paper's comparison, two methods are the states that pruners are compared in
            shared = line["phase"] == "test" and line["sparsity"] == 0.7 and line["method"] in AFTER
            if line["phase"] == phase or (phase == "pruners" and shared):
                line = {"after": line.get("method")} | line
                column = " ".join(f"{line[c]:.0%}" if isinstance(line[c], float) else line[c] for c in columns)
                found.setdefault(line[row], {}).setdefault(column, {})[line.get("seed", 0)] = line["perplexity"]
        names = sorted({column for cells in found.values() for column in cells})
        lines = [[row, *names], ["---"] * (len(names) + 1)]
        lines += [[key, *(cell([*cells.get(column, {}).values()]) for column in names)] for key, cells in found.items()]
        made[name] = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return made


def with_tables(text: str, made: dict[str, str]) -> str:
    """`text` with each table between its markers, where it has them."""
    for name, table in made.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        if start:
            text = before + start + table + rest[rest.index("<!-- end -->") :]
    return text


def cell(values: list[float]) -> str:
    """Mean, deviation and number of values; of one, the value."""
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--part", default="1/1", help="K/N: every N-th result, from the K-th")
    parser.add_argument("--table", action="store_true", help="print what the file holds")
    parser.add_argument(
        "--markdown", nargs="+", type=Path, default=[], help="put that between the markers of these files"
    )
    args = parser.parse_args()
    if args.table or args.markdown:
        made = tables(args.results)
        for page in args.markdown:
            page.write_text(with_tables(page.read_text(), made))
        return print("\n".join(made.values()) if args.table else "")
    import torch

    torch.set_num_threads(args.threads)
    part, parts = map(int, args.part.split("/"))
    for name in args.only:
        for number, (key, settings) in enumerate(COMPARISONS[name](args.results)):
            if number % parts == part - 1:
                once(args.results, key, settings)
    return None


if __name__ == "__main__":
    main()
