"""The parts of one of LoSA's steps in the shape of Llama-2-7B, random weights made on the device: time and peak memory.

features, rates and pruning (with Wanda, and the blocks' errors) at the paper's 128 sequences of 2048 tokens, 64 of them for
RMI; then one update of recovery (8 rows of 512 tokens, 4 at once) with each way to compute the masked linear, as
benchmarks/masked_linear.py has them: losa, fused, naive, peft. One line of JSON a part. In the paper (appendix H, an A100):
rates 48 s, errors 46 s. A few minutes on one GPU of 80 GB:

    PYTHONPATH=src python benchmarks/step.py
    PYTHONPATH=src python benchmarks/step.py --shape 256x2x512 --device cpu --length 64 --rows 64

losa prunes in bf16, and pairs are trained in fp32. Peaks are those of torch's allocator; on a CPU there is none.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from masked_linear import RANK, SCALING, Fused, Naive, lora
from parts import BATCH, Clock, Parts
from torch import nn

from losa.adapters import MaskedLinear
from losa.data import Example
from losa.recovery.training import accumulate

VOCABULARY, HEAD = 32000, 128
UPDATES = 4  # of each way; the first is thrown away


def build(hidden: int, blocks: int, mlp: int, length: int, device: str, dtype: torch.dtype) -> Any:
    """A Llama whose weights never lie anywhere but on the device."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, hidden // HEAD),
        max_position_embeddings=length,
        use_cache=False,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def peak(device: str) -> Callable[[], dict[str, float]]:
    """A function that says how much torch's allocator held at most since this call; nothing of a CPU."""
    if device != "cuda":
        return dict
    torch.cuda.reset_peak_memory_stats()
    return lambda: {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}


def say(part: str, found: dict[str, Any], args: argparse.Namespace) -> None:
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(json.dumps({"benchmark": "step", "part": part, "shape": args.shape, "device": name, **found}), flush=True)


def at_rank(layer: MaskedLinear) -> MaskedLinear:
    """The same weight and mask with a pair of RANK, which the other ways take as it is."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.weight, requires_grad=False)
    made = MaskedLinear(linear, RANK, SCALING)
    made.mask_bits = layer.mask_bits
    made.set_rank(RANK, torch.Generator().manual_seed(0))
    return made


def swap(model: nn.Module, was: type[nn.Module], make: Callable[[Any], nn.Module]) -> list[tuple[str, nn.Module]]:
    """Put what `make` makes of every `was` in its place; returns what was there, by name."""
    found = [(name, module) for name, module in model.named_modules() if type(module) is was]
    for name, module in found:
        model.set_submodule(name, make(module))
    return found


def updates(parts: Parts, examples: list[Example]) -> list[dict[str, float]]:
    """Forward, backward, clipping and AdamW over whatever is trained; the first is thrown away."""
    model = parts.subject.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    took = []
    for _ in range(UPDATES):
        clock = Clock()
        accumulate(parts.subject, model, examples, list(range(len(examples))), parts.recipe)
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        took.append(clock.lap())
    return took[1:]


def recover(parts: Parts, args: argparse.Namespace) -> None:
    """An update with each linear in turn, all on the same masks."""
    model = parts.subject.model
    swap(model, MaskedLinear, at_rank)
    examples = parts.examples(BATCH, args.train_length)
    ways: dict[str, Callable[[Any], nn.Module] | None] = {
        "losa": None,
        "fused": Fused,
        "naive": lambda layer: Naive(layer, True),
        "peft": lora,
    }
    if args.device != "cuda":
        del ways["fused"]
    for name, make in ways.items():
        put_back = swap(model, MaskedLinear, make) if make else []
        since = peak(args.device)
        took = updates(parts, examples)
        seconds = statistics.median(lap["seconds"] for lap in took)
        say(f"update, {name}", {"seconds": seconds, "rows": BATCH, "length": args.train_length, **since()}, args)
        for path, module in put_back:
            model.set_submodule(path, module)


def main() -> None:
    """Parses the flags; prints one line of JSON a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x32x11008", help="HIDDENxBLOCKSxMLP (default: Llama-2-7B's)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a calibration sequence")
    parser.add_argument("--train-length", type=int, default=512, help="tokens of a row of recovery")
    parser.add_argument("--rows", type=int, default=128, help="calibration sequences; half of them are for RMI")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU (torch sees no CUDA device): nothing is timed; --device cpu takes a small --shape")
    os.environ["LOSA_FUSED"] = "never"  # losa is its own way, fused the other one
    hidden, blocks, mlp = (int(n) for n in args.shape.split("x"))
    model = build(hidden, blocks, mlp, max(args.length, args.train_length), args.device, getattr(torch, args.dtype))
    settings = {
        "calibration_samples": args.rows,
        "allocation_samples": args.rows // 2,
        "train_length": args.train_length,
        "dtype": args.dtype,
        "device": args.device,
    }
    parts = Parts(model, args.length, settings)
    since = peak(args.device)
    say("features", parts.features()["features"] | since(), args)
    since = peak(args.device)
    found = parts.pruning()
    say("rates", found["rates"], args)
    say("pruning with errors", found["pruning"] | since(), args)  # of both
    since = peak(args.device)
    say("recovery as losa has it", parts.recovery(BATCH)["recovery"] | {"rows": BATCH} | since(), args)
    recover(parts, args)


if __name__ == "__main__":
    main()
