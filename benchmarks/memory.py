"""Peak memory of one-shot pruning from disk: foretold and measured, by number of layers and by size; and under a hard limit.

    python benchmarks/memory.py growth                   # 4, 8, 16 and 32 layers of one width
    python benchmarks/memory.py foretold                 # widths, pruners, from disk and in memory
    python benchmarks/memory.py exponents                # layers, width and calibration tokens, each doubled twice
    python benchmarks/memory.py exponents --recovery losa --pruner wanda    # the same in memory, tokens those of recovery
    python benchmarks/memory.py large --memory 8GB       # 40 layers of a 13B Llama's shape, 26 GB, RLIMIT_DATA set

Models are random, written shard by shard into --scratch (a temporary folder), and taken away again. Each run is a process
of its own, `losa compress`, whose anonymous memory (RssAnon of /proc: what no file stands behind) is read every 5 ms.
Processor seconds are those of all of it, starting included.
RLIMIT_DATA bounds what it maps, private and writable, anonymous or not: more than it uses. One line of JSON a run.
"""

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from losa import memory, model
from losa.inspection import plan
from losa.recipe import Recipe, from_settings
from losa.recipe_checks import parse_size

IN_MEMORY, SPILLED = 0, 3  # of `memory.ways`: all in memory; model and activations on disk
DEMO = model.locate("demo")
REPEATS = 2
ONE_SHOT = {"steps": 1, "recovery": "none", "calibration": "demo", "calibration-samples": 4, "sequence-length": 128}


def build(folder: Path, hidden: int, mlp: int, layers: int, vocabulary: int, heads: int, dtype: str) -> Path:
    """A random Llama with the tokenizer of the built-in model; no more than one shard of it is ever in memory."""
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
        bos_token_id=0,
        eos_token_id=0,
    )
    config.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    shapes = {name: p.shape for name, p in model.skeleton(config).named_parameters()}
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(s.numel() for s in shards[-1].values()) + shape.numel() > 1 << 30:
            shards.append({})
        shards[-1][name] = shape
    kind, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, shape in names.items():
            drawn = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
            tensors[name] = drawn.to(kind)
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    written = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(written))
    return folder


def run(source: Path, settings: dict[str, Any], limit: float = 0) -> dict[str, Any]:
    """What `losa compress` foretells, and takes: the peak of its anonymous memory in bytes, and seconds."""
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    output = source.parent / "out"
    command = [sys.executable, "-m", "losa", "compress", str(source), "--output", str(output), *flags, "--json"]
    planned = plan(str(source), recipe_of(settings))  # what --dry-run shows

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))

    before: Callable[[], None] | None = bounded if limit else None
    began, used, peak = time.monotonic(), of_children(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=before)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon:")]
        peak = max(peak, *(int(line.split()[1]) * 1024 for line in lines), 0)
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"losa ended with {process.returncode}")
    assert process.stdout is not None
    found = json.loads(process.stdout.read())
    shutil.rmtree(output)
    places = {name: planned[name] for name in ("model_on_disk", "activations_on_disk")}
    return {
        **places,
        "parameters": planned["parameters"],
        "foretold": planned["memory"],
        "peak": peak,
        "ratio": round(planned["memory"] / peak, 3),
        "seconds": round(time.monotonic() - began, 1),
        "processor": round(of_children() - used, 1),
        "sparsity": found["measurements"]["sparse"]["sparsity"],
    }


def recipe_of(settings: dict[str, Any]) -> Recipe:
    return from_settings({name.replace("-", "_"): value for name, value in settings.items()})


def of_children() -> float:
    """Processor seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report(
    scratch: Path, shape: dict[str, Any], settings: dict[str, Any], way: int | None = None, limit: str = ""
) -> dict[str, Any]:
    """Build, run with just the memory that this of `memory.ways` takes, print and return what it took, take away."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    settings = ONE_SHOT | settings
    try:
        source = build(folder / "model", **shape)
        if way is not None:
            config = model.load_config(str(source))
            takes = memory.ways(model.skeleton(config), config, recipe_of(settings))[way].memory
            settings |= {"memory": f"{int(takes) + 1}B"}
        found = run(source, settings, parse_size("limit", limit) if limit else 0)
        print(json.dumps({"benchmark": "memory", **shape, **settings, "limit": limit, **found}), flush=True)
        return found
    finally:
        shutil.rmtree(folder)


def exponents(scratch: Path, pruner: str, recovery: str) -> None:
    """What time and memory grow with: each quantity doubled twice, from 2 layers of 1024 (width: of 512) and 2048 tokens.

    Of pruning alone from disk; with a recovery in memory, on 64 rows of 128 tokens, from 4 layers and a width of 1024: what
    sets the peak of fewer is pruning. The least of REPEATS runs each.
    """
    trains = recovery != "none"

    def took(layers: int = 2, hidden: int = 1024, tokens: int = 1) -> dict[str, Any]:
        settings = {"pruner": pruner, "calibration-samples": 16}
        if not trains:
            return report(scratch, shape(hidden, layers), settings | {"calibration-samples": 16 * tokens}, SPILLED)
        rows = {"train-data": "demo", "train-length": 128, "train-samples": 64 * tokens, "learning-rate": 1e-3}
        return report(scratch, shape(hidden, layers), settings | rows | {"recovery": recovery}, IN_MEMORY)

    series: dict[str, Callable[[int], dict[str, Any]]] = {
        "layers": lambda times: took(layers=(4 if trains else 2) * times),
        "width": lambda times: took(hidden=(1024 if trains else 512) * times),
        "tokens": lambda times: took(tokens=times),
    }
    for what, measured in series.items():
        found = [[measured(times) for _ in range(REPEATS)] for times in (1, 2, 4)]
        least = {name: [min(one[name] for one in runs) for runs in found] for name in ("processor", "peak")}
        of = {name: exponent(values) for name, values in least.items()}
        line = {"benchmark": "exponents", "pruner": pruner, "recovery": recovery, "doubled": what, **of}
        print(json.dumps(line), flush=True)


def exponent(values: list[float]) -> float | None:
    """p of c + a x^p, given its values at x, 2 x and 4 x, whatever c is; None if nothing grows, but for 5%."""
    first, second, third = values
    if not first < second < third or third <= 1.05 * first:
        return None
    return round(math.log2((third - second) / (second - first)), 2)


def shape(hidden: int, layers: int, dtype: str = "bfloat16", vocabulary: int = 4096) -> dict[str, Any]:
    """Llama's proportions."""
    mlp = hidden * 27 // 10 // 128 * 128
    return {
        "hidden": hidden,
        "mlp": mlp,
        "layers": layers,
        "heads": hidden // 128,
        "vocabulary": vocabulary,
        "dtype": dtype,
    }


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("growth", "exponents", "foretold", "large"))
    parser.add_argument("--hidden", type=int, nargs="+", help="widths: of growth 2048, of foretold 512 to 3072")
    parser.add_argument("--pruner", nargs="+", default=["wanda", "sparsegpt"], help="of foretold and exponents")
    parser.add_argument("--recovery", default="none", help="of exponents")
    parser.add_argument("--samples", type=int, default=16, help="of foretold: sequences of 128 tokens")
    parser.add_argument("--dtype", default="auto", help="of foretold: what is computed in")
    parser.add_argument("--memory", default="8GB", help="of large: the limit, hard")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    if args.what == "growth":
        for hidden in args.hidden or [2048]:
            for layers in (4, 8, 16, 32):
                report(args.scratch, shape(hidden, layers), {"pruner": "wanda"}, SPILLED)
    if args.what == "exponents":
        for pruner in args.pruner:
            exponents(args.scratch, pruner, args.recovery)
    if args.what == "large":
        large = {"hidden": 5120, "mlp": 13824, "layers": 40, "heads": 40, "vocabulary": 32000, "dtype": "bfloat16"}
        report(args.scratch, large, {"pruner": "wanda", "memory": args.memory}, limit=args.memory)
    if args.what == "foretold":
        for hidden in args.hidden or (512, 1024, 2048, 3072):
            for pruner in args.pruner:
                for way in (SPILLED, IN_MEMORY):
                    settings = {"pruner": pruner, "calibration-samples": args.samples, "dtype": args.dtype}
                    report(args.scratch, shape(hidden, 2), settings, way)


if __name__ == "__main__":
    main()
