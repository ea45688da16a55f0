"""One training step (forward and backward) of the masked low-rank linear, against what one would write or take instead.

  losa    losa.adapters.MaskedLinear
  fused   the same through losa.fused (only with --device cuda)
  naive   F.linear(x, W) + F.linear(x, M * (B A)) * s under torch.utils.checkpoint, which keeps nothing dense either
  dense   the same without checkpointing, which keeps a dense [out, in] a layer (only with --memory)
  peft    peft's LoRA, r = 8, no dropout: no mask at all, so it computes something else and cannot merge into a sparse weight

Rounds are interleaved in one process, and ratios are medians of those within a round. Nothing is timed before its output
and gradients, on the very tensors that are timed, agree with its formula in fp32. The last lines of output are JSON, one a result.

    PYTHONPATH=src python benchmarks/masked_linear.py --shape 5632x2048 --dtype fp32 --rounds 7
    PYTHONPATH=src python benchmarks/masked_linear.py --memory
    PYTHONPATH=src python benchmarks/masked_linear.py --memory --llama 2048x2x5632 --tokens 4096
    PYTHONPATH=src python benchmarks/masked_linear.py --device cuda --shape 4096x4096 11008x4096 4096x11008 --dtype bf16 --rounds 20
"""

import argparse
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from losa import fused
from losa.adapters import MaskedLinear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
RANK, SCALING, SPARSITY = 8, 2.0, 0.5
LAYERS, WIDTH, MEMORY_TOKENS = 16, 2048, 256
VOCABULARY, ROW = 32000, 512  # of the whole model, and its sequences


class Naive(nn.Module):
    """The formula as one would write it; shares the weight and the pair of a MaskedLinear."""

    def __init__(self, layer: MaskedLinear, recompute: bool) -> None:
        super().__init__()
        self.weight, self.lora_A, self.lora_B = layer.weight, layer.lora_A, layer.lora_B
        self.mask, self.recompute = layer.mask, recompute

    def formula(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out]."""
        assert self.lora_A is not None and self.lora_B is not None
        delta = self.mask * (self.lora_B @ self.lora_A)
        return F.linear(x, self.weight) + F.linear(x, delta.to(x.dtype)) * SCALING

    def forward(self, x: Tensor) -> Tensor:
        """The same, computed again in backward if so asked."""
        return checkpoint(self.formula, x, use_reentrant=False) if self.recompute else self.formula(x)


class Fused(nn.Module):
    """A MaskedLinear through the fused kernels, whatever it would choose; shares its weight and its pair."""

    def __init__(self, layer: MaskedLinear) -> None:
        super().__init__()
        self.weight, self.lora_A, self.lora_B, self.bits = layer.weight, layer.lora_A, layer.lora_B, layer.mask_bits

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out]."""
        y: Tensor = fused.Fused.apply(x, self.weight, self.bits, self.lora_A, self.lora_B, None, SCALING)
        return y


def masked(out: int, columns: int, dtype: torch.dtype, device: str) -> MaskedLinear:
    """A layer with half of its weights pruned and a pair that is not zero."""
    generator = torch.Generator().manual_seed(0)
    layer = MaskedLinear(nn.Linear(columns, out, bias=False, dtype=dtype), RANK, SCALING)
    layer.set_mask(torch.rand(out, columns, generator=generator) >= SPARSITY)
    layer.set_rank(RANK, generator)
    assert layer.lora_B is not None
    layer.lora_B.data.normal_(0, 0.05, generator=generator)
    return layer.to(device)


def lora(layer: MaskedLinear) -> nn.Module:
    """peft's layer as get_peft_model makes it (its pair in fp32), with the same weight and pair."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach())
    config = LoraConfig(r=RANK, lora_alpha=int(RANK * SCALING), lora_dropout=0.0, target_modules=["0"])
    model = nn.Sequential(linear)
    get_peft_model(model, config)  # replaces the linear in place
    made = model[0]
    if type(made) is not peft.tuners.lora.Linear:
        sys.exit(f"peft {peft.__version__} made a {type(made)}, not its LoRA linear")
    a: Any = made.lora_A["default"]
    b: Any = made.lora_B["default"]
    assert layer.lora_A is not None and layer.lora_B is not None
    a.weight.data.copy_(layer.lora_A)
    b.weight.data.copy_(layer.lora_B)
    return made


def pair_gradients(module: nn.Module) -> list[Tensor]:
    """dA and dB."""
    return [p.grad for name, p in module.named_parameters() if "lora_" in name and p.grad is not None]


def step(module: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    """Forward and backward; x.grad and the pair's gradients are left set."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    y: Tensor = module(x)
    torch.autograd.backward(y, dy)
    return y.detach()


def formula(layer: MaskedLinear, x: Tensor, dy: Tensor, pruned: bool) -> list[Tensor]:
    """y, dx, dA, dB of x (M * (W + s B A))^T in fp32 by autograd; of x (M * W + s B A)^T, as peft has it, if not `pruned`."""
    assert layer.lora_A is not None and layer.lora_B is not None
    x, a, b = (t.detach().float().requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    delta = b @ a * SCALING
    y = F.linear(x, layer.weight.float() + (delta * layer.mask if pruned else delta))
    torch.autograd.backward(y, dy.float())
    return [y.detach(), *(t.grad for t in (x, a, b) if t.grad is not None)]


def verify(name: str, module: nn.Module, x: Tensor, dy: Tensor, want: list[Tensor], tolerance: float) -> float:
    """The largest relative error of y, dx, dA, dB; exits if it is above the tolerance."""
    y = step(module, x, dy)
    assert x.grad is not None
    got = [y, x.grad, *pair_gradients(module)]
    errors = [(g.float() - w).norm() / w.norm() for g, w in zip(got, want, strict=True)]
    worst = float(torch.stack(errors).max())  # NaN if one is NaN, unlike Python's max
    if not worst < tolerance:
        sys.exit(
            f"{name} disagrees with the formula: relative error {worst:.1e}, allowed {tolerance:.0e}. Nothing is timed."
        )
    return worst


def timed(function: Callable[[], object]) -> float:
    """Milliseconds of one call, until a GPU has done its part."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return (time.perf_counter() - start) * 1e3


def compare(out: int, columns: int, tokens: int, dtype: str, rounds: int, device: str) -> dict[str, object]:
    """One result: medians of the times, and of the ratios within a round with their quartiles."""
    layer = masked(out, columns, DTYPES[dtype], device)
    names = ("losa", "naive", "peft", *(["fused"] if device == "cuda" else []))
    modules = {name: MADE[name](layer) for name in names}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, columns, generator=generator).to(device, DTYPES[dtype]).requires_grad_()
    dy = torch.randn(tokens, out, generator=generator).to(device, DTYPES[dtype])
    wanted = {pruned: formula(layer, x, dy, pruned) for pruned in (True, False)}
    errors = {n: verify(n, module, x, dy, wanted[n != "peft"], TOLERANCE[dtype]) for n, module in modules.items()}
    del wanted
    times: dict[str, list[float]] = {name: [] for name in modules}
    order = list(modules)
    for turn in range(-1, rounds):  # the first round warms up and is thrown away
        for name in order:
            took = timed(lambda module=modules[name]: step(module, x, dy))  # type: ignore[misc]
            if turn >= 0:
                times[name].append(took)
        order = order[1:] + order[:1]

    def quartiles(above: str, below: str) -> list[float]:
        ratios = [a / b for a, b in zip(times[above], times[below], strict=True)]
        return [round(q, 3) for q in statistics.quantiles(ratios, n=4)]

    faster, cost = quartiles("naive", "losa"), quartiles("losa", "peft")
    found: dict[str, object] = {
        "benchmark": "masked_linear",
        "out": out,
        "in": columns,
        "tokens": tokens,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "ms": {name: round(statistics.median(values), 1) for name, values in times.items()},
        "naive_over_losa": faster[1],
        "naive_over_losa_quartiles": faster[::2],
        "losa_over_peft": cost[1],
        "losa_over_peft_quartiles": cost[::2],
        "relative_error": {name: float(f"{error:.1e}") for name, error in errors.items()},
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }
    if device == "cuda":
        gain = quartiles("losa", "fused")
        found |= {"losa_over_fused": gain[1], "losa_over_fused_quartiles": gain[::2]}
    return found


MADE: dict[str, Callable[[MaskedLinear], nn.Module]] = {
    "losa": lambda layer: layer,
    "naive": lambda layer: Naive(layer, True),
    "dense": lambda layer: Naive(layer, False),
    "peft": lora,
    "fused": Fused,
}


def stack(name: str, args: argparse.Namespace) -> tuple[nn.Module, Callable[[], Tensor]]:
    """LAYERS square layers with an activation behind each; and what runs them."""
    dtype, layers = DTYPES[args.dtype[0]], list[nn.Module]()
    for _ in range(LAYERS):
        layers += [MADE[name](masked(WIDTH, WIDTH, dtype, args.device)), nn.SiLU()]
    model = nn.Sequential(*layers)
    x = nn.Parameter(torch.randn(MEMORY_TOKENS, WIDTH).to(args.device, dtype))
    model.register_parameter("x", x)  # so that its gradient goes with the others
    return model, lambda: model(x)


def llama(name: str, args: argparse.Namespace) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A whole model, the linears of its blocks such layers; and what runs it on rows of ROW tokens."""
    hidden, blocks, mlp = (int(n) for n in args.llama.split("x"))
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=blocks, intermediate_size=mlp,
        num_attention_heads=hidden // 64, max_position_embeddings=ROW, use_cache=False,
    )  # fmt: skip
    dtype = DTYPES[args.dtype[0]]
    model: Any = transformers.LlamaForCausalLM(config).to(device=args.device, dtype=dtype)  # type: ignore[call-arg]
    model.requires_grad_(False)
    for key, linear in [(k, m) for k, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]:
        layer = masked(linear.out_features, linear.in_features, dtype, args.device)
        model.model.layers.set_submodule(key, MADE[name](layer))
    tokens = torch.randint(VOCABULARY, (args.tokens // ROW, ROW), device=args.device)
    return model, lambda: model(input_ids=tokens).logits


def peak_memory(name: str, args: argparse.Namespace) -> dict[str, int]:
    """MiB that a step of a stack of layers, or of a whole model, adds at its peak: in tensors (exact), and in the process
    (Linux, glibc; CPU only).

    The second is larger: glibc keeps freed temporaries, and holes between them that what comes next does not fit.
    """
    model, run = (llama if args.llama else stack)(name, args)

    def whole_step() -> None:
        model.zero_grad(set_to_none=True)
        run().float().square().mean().backward()

    whole_step()
    if args.device == "cuda":
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        whole_step()
        return {"tensors": round((torch.cuda.max_memory_allocated() - before) / 2**20)}
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    peak = high_water()
    whole_step()
    resident = high_water() - peak
    model.zero_grad(set_to_none=True)
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            whole_step()
        profiler.export_chrome_trace(trace.name)
        events = [e for e in json.loads(Path(trace.name).read_text())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: float(event["ts"]))
    tensors = max(itertools.accumulate(event["args"]["Bytes"] for event in events)) / 2**20
    return {"tensors": round(tensors), "resident": round(resident)}


def high_water() -> float:
    """The largest resident size of this process since the last reset, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Parses the flags; prints one line of JSON a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--shape", nargs="+", default=["5632x2048", "2048x5632"], help="OUTxIN, one or more")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="peak memory of a step of a stack of layers, not time")
    parser.add_argument("--llama", default="", help="HIDDENxBLOCKSxMLP: of a whole model, on --tokens (with --memory)")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the subprocess of --memory
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["LOSA_FUSED"] = "never"  # losa is its own way, fused the other one
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU (torch sees no CUDA device): nothing is timed")
    if args.only:
        print(json.dumps(peak_memory(args.only, args)))
        return
    if args.rounds < 2:
        parser.error("--rounds must be 2 or more: quartiles are reported")
    for dtype in args.dtype:
        if args.memory:
            command = [sys.executable, __file__, "--threads", str(args.threads), "--device", args.device]
            command += ["--dtype", dtype, "--llama", args.llama, "--tokens", str(args.tokens), "--only"]
            peaks = {}
            for name in ("losa", "naive", "dense", "peft", *(["fused"] if args.device == "cuda" else [])):
                done = subprocess.run([*command, name], check=True, capture_output=True, text=True)
                peaks[name] = json.loads(done.stdout.splitlines()[-1])
            shape = {"layers": LAYERS, "width": WIDTH, "tokens": MEMORY_TOKENS, "dtype": dtype}
            if args.llama:
                shape = {"llama": args.llama, "tokens": args.tokens, "dtype": dtype}
            print(json.dumps({"benchmark": "masked_linear_memory", **shape, "peak_mib": peaks}), flush=True)
            continue
        for shape_text in args.shape:
            out, columns = (int(n) for n in shape_text.split("x"))
            print(json.dumps(compare(out, columns, args.tokens, dtype, args.rounds, args.device)), flush=True)


if __name__ == "__main__":
    main()
