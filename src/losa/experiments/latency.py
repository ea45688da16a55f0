"""Decoding speed on losa's own runtime: dense, sparse with LoRA kept apart, sparse with the adaptation merged (table 9).

All three run once by the model's own forward, on packed kernels where they are sparse, so that what differs is the pairs;
dense and merged also natively (`losa.sparse.decoding`), which knows no linear with a pair beside it.

The speed of a linear depends on how many weights are kept, not on which, nor on the pairs' values: so the weights go by
magnitude and the pairs are random, and nothing is trained.
"""

import copy
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losa import bench, masks, model, speed
from losa.blocks import prunable, targeted
from losa.errors import LosaError
from losa.recipe import Recipe
from losa.sparse import decoding
from losa.sparse.linear import layouts_in, pack_model, unpack_model
from losa.units import dtype_name
from losa.usage import machine

PROMPT, NEW, ROUNDS = 16, 16, 7  # tokens read at once, tokens then decoded one by one, turns
NATIVE = "native_"
RATIOS = {  # how much faster the second is
    "apart_speedup": ("dense", "apart"),
    "merged_speedup": ("dense", "merged"),
    "merged_over_apart": ("apart", "merged"),
    "native_speedup": (f"{NATIVE}dense", f"{NATIVE}merged"),
}
AGREE = 0.02  # relative, of the logits: packed products round differently


class Apart(nn.Module):
    """y = base(x) + s (x A^T) B^T: a linear with its LoRA beside it, as PEFT computes it. A [r, in], B [out, r]."""

    def __init__(self, base: Any, rank: int, scaling: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        generator = torch.Generator().manual_seed(0)
        device = base.weight.device
        shapes = {"a": (rank, int(base.in_features)), "b": (int(base.out_features), rank)}
        drawn = {name: torch.randn(shape, generator=generator) * 1e-3 for name, shape in shapes.items()}
        self.a, self.b = (nn.Parameter(t.to(device, dtype), requires_grad=False) for t in drawn.values())

    def forward(self, x: Tensor) -> Any:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * self.scaling


def check(source: str, recipe: Recipe) -> None:
    """Raise LosaError for a model that cannot be timed, as far as its configuration tells."""
    config = model.load_config(source)
    if layouts_in(config) is not None:
        raise LosaError(f"{source!r} is packed already: decoding is timed from a dense model")
    blocks = prunable(model.skeleton(config), recipe)
    targeted([name for block in blocks for name in block.linears], recipe)
    if (room := model.longest_text(config)) < PROMPT + NEW:
        raise LosaError(f"decoding is timed on {PROMPT + NEW} tokens, the model reads at most {room:g}")


@torch.no_grad()
def measure(source: str, recipe: Recipe) -> dict[str, Any]:
    """Tokens a second of the three, which decode the same prompt in turns, and their ratios turn by turn.

    recipe: sparsity, mean_rank, targets, ignore, scaling, values, device and dtype are read.
    Raises LosaError for a model without linears to pack, and if the packed one disagrees with the dense one with zeros.
    """
    dense = model.load(source, recipe)
    model.check_finite(dense)
    stored = model.load_config(source).dtype or dense.dtype
    stored = stored if stored.itemsize < dense.dtype.itemsize else dense.dtype
    merged = copy.deepcopy(dense)
    blocks = prunable(merged, recipe)
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    bits = {}
    for name, linear in linears.items():
        keep = masks.choose(linear.weight.abs(), None, recipe.sparsity, "row")
        linear.weight.mul_(keep)
        bits[name] = masks.pack(keep)
    packed = pack_model(merged, bits, stored, torch.int8 if recipe.values == "int8" else None)
    if not packed:
        raise LosaError(f"{source!r}: no linear is smaller packed at {recipe.sparsity:.0%}: there is nothing to time")
    prompt = speed.prompt_for(dense, PROMPT)
    _check_agreement(merged, prompt, recipe)
    apart = _with_pairs(merged, targeted(list(packed), recipe), recipe, dense.dtype)
    decoding.attach(dense)
    why = decoding.refusal(dense) or decoding.refusal(merged)
    models = {"dense": dense, "apart": apart, "merged": merged}
    if why is None:
        models |= {f"{NATIVE}dense": dense, f"{NATIVE}merged": merged}
    return _compare(models, prompt) | {
        "native": why or "",
        "linears": len(packed),
        "of": len(linears),
        "kept": sum(p.packed.kept for p in packed.values())
        / sum(p.in_features * p.out_features for p in packed.values()),
        "machine": machine(dense.device) | {"processor": bench.processor()},
        "clock": "processor" if speed.alone(dense.device) else "wall",
        "dtype": dtype_name(dense.dtype),
    }


def _with_pairs(merged: Any, names: set[str], recipe: Recipe, dtype: torch.dtype) -> Any:
    """A copy of the model with a LoRA beside each of the linears; the packed weights are shared."""
    shared = {id(p): p for p in merged.parameters()}
    made = copy.deepcopy(merged, memo=dict(shared))
    for name in names:
        base: Any = made.get_submodule(name)
        made.set_submodule(name, Apart(base, round(recipe.mean_rank), recipe.scaling, dtype))
    return made


def _check_agreement(packed: Any, prompt: Tensor, recipe: Recipe) -> None:
    """Raise LosaError unless the packed model computes what the same weights do, unpacked."""
    plain = copy.deepcopy(packed)
    unpack_model(plain, packed.dtype)
    got, wanted = (m(input_ids=prompt, use_cache=False).logits.float() for m in (packed, plain))
    error = float((got - wanted).norm() / wanted.norm())
    if not error < (AGREE if recipe.values == "auto" else 5 * AGREE):
        raise LosaError(f"the packed model disagrees with its dense form: relative error {error:.1e}. Nothing is timed")


def _compare(models: dict[str, Any], prompt: Tensor) -> dict[str, Any]:
    """Each decodes once a round; ratios are of neighbours in time, and of them the median."""

    def takes(who: str) -> float:
        with _runtime("native" if who.startswith(NATIVE) else "ordinary"):
            return speed.one_by_one(models[who], prompt, NEW)

    seconds = speed.in_turns({who: partial(takes, who) for who in models}, ROUNDS)
    found: dict[str, Any] = {who: round(NEW / statistics.median(each), 2) for who, each in seconds.items()}
    for name, (above, below) in RATIOS.items():
        if above in seconds:
            low, middle, high = speed.ratios_of(seconds[above], seconds[below])
            found |= {name: round(middle, 3), f"{name}_quartiles": [round(low, 3), round(high, 3)]}
    return found | {"rounds": ROUNDS, "tokens": NEW}


@contextmanager
def _runtime(which: str) -> Iterator[None]:
    """Decoding is native inside, or the models' own forward ("ordinary"), whatever was asked for outside."""
    before = os.environ.get(decoding.SWITCH)
    os.environ[decoding.SWITCH] = which
    try:
        yield
    finally:
        if before is None:
            del os.environ[decoding.SWITCH]
        else:
            os.environ[decoding.SWITCH] = before
