"""What a run takes at its peak, what there is, and what therefore stays on disk: activations, or the model too.

All in bytes. Mapped files do not count: the system takes their memory back when it needs it.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from losa import calibration, distributed, experts, heap, masks, model, registry
from losa.blocks import Block, prunable, targeted
from losa.errors import LosaError
from losa.recipe import Recipe
from losa.recipe_checks import parse_size
from losa.recovery import distillation, footprint
from losa.recovery.low_rank import MaskedLowRank

# Measured: Python with torch, transformers and datasets; what glibc keeps of memory that recovery has freed; and how much
# its heap takes for what recovery has alive, whose holes the next tensors do not fit: where all activations come from it,
# and where the widest are large enough to be mapped. Of pruning's it keeps `_holes`, and nothing from disk
# (`heap.returned_at_once`).
PROCESS, KEPT, HEAP, MAPPED = 380e6, 150e6, 1.5, 1.15
WIKITEXT = 300_000  # tokens of evaluation text, where nobody knows yet


@dataclass(frozen=True)
class Way:
    """How a run lives in its memory, and what it takes at its peak, by part; `memory` is the whole.

    host: what it takes of the machine's memory, where it computes on another device. `free`, `host_free`: what there is,
    where that is less; `reason`: then, why the model cannot stay on disk.
    """

    from_disk: bool
    spill: bool
    parts: dict[str, float]
    host: float = 0.0
    free: float | None = None
    host_free: float | None = None
    reason: str = ""

    @property
    def memory(self) -> float:
        return PROCESS + self.parts["model"] + max(v for name, v in self.parts.items() if name != "model")

    @property
    def shortage(self) -> str:
        """What to say where there may be too little memory; empty where there is enough."""
        said = []
        if self.free is not None:
            need, free = gigabytes(self.memory), gigabytes(self.free)
            said.append(f"memory may not suffice: about {need} is needed at the peak, {free} is free")
        if self.host_free is not None:
            need, free = gigabytes(self.host), gigabytes(self.host_free)
            said.append(
                f"the machine's memory may not suffice: about {need} is needed to load the model, {free} is free"
            )
        if said and self.reason:
            said.append(f"the model has to be in memory, for {self.reason}")
        return "; ".join(said)

    def __str__(self) -> str:
        where = "on disk, block by block" if self.from_disk else "in memory"
        return f"the model {where}, activations {'on disk' if self.spill else 'in memory'}"


def choose(source: Any, recipe: Recipe, config: Any, saves: bool = True, from_disk: bool | None = None) -> Way:
    """The first way that fits into `recipe.memory`, or into what is free; of the model in memory first, activations too.

    Where none fits into what is free, the one that takes least: it may do, as all this is "about". saves: whether there is
    a folder for what does not fit. from_disk: what a run that is resumed has chosen. Raises LosaError where `recipe.memory` is set and nothing fits, with what would, and where the way that was chosen is closed.
    """
    whole = model.skeleton(config) if isinstance(source, str) else source
    reason = reason_for_memory(source, recipe, config, saves)
    found = [
        way
        for way in ways(whole, config, recipe)
        if (saves or not way.spill)
        and not (way.from_disk and reason)
        and not (way.spill and reads_gradients(recipe))
        and from_disk in (None, way.from_disk)
    ]
    if not found:
        raise LosaError("the run was begun from disk, which is for one process: resume it without torchrun")
    limit = parse_size("memory", recipe.memory) if recipe.memory else None
    judged = [_judged(source, way, recipe, limit) for way in found]
    for way in judged:
        if way.free is way.host_free is None:
            return way
    least = min(judged, key=lambda way: way.memory)
    if limit is None or least.free is None:
        return replace(least, reason=reason)
    what = "one block of the model and what pruning it takes" if least.from_disk else "the model and what the run takes"
    note = f"; it has to be in memory, for {reason}" if reason else ""
    raise LosaError(
        f"memory {recipe.memory} is too small for {what}: about {gigabytes(least.memory, math.ceil)} would do{note}"
    )


def _judged(source: Any, way: Way, recipe: Recipe, limit: float | None) -> Way:
    """The way with what is free, where that is less than it takes."""
    free = _free(source, way, recipe) if limit is None else limit
    # a loaded model has its place already
    host_free = (
        available(torch.device("cpu")) / distributed.neighbours() if way.host and isinstance(source, str) else None
    )
    short = host_free is not None and way.host > host_free
    return replace(way, free=free if way.memory > free else None, host_free=host_free if short else None)


def reason_for_memory(source: Any, recipe: Recipe, config: Any, saves: bool) -> str:
    """Why the model cannot stay on disk; empty if it can."""
    recovery = registry.get("recovery", recipe.recovery)
    gradients = reads_gradients(recipe)
    reasons = {
        "a loaded model is there already": not isinstance(source, str),
        "there is no output folder to write to": not saves,
        f"recovery {recipe.recovery!r} trains all of it (none does not)": recovery.trains,
        "it is fine-tuned first (set finetune_first to 0)": recipe.finetune_first > 0,
        "several processes share the work": distributed.launched() > 1,
        "it continues prompts (leave them out)": bool(recipe.prompts and recipe.sample_tokens),
        "there are several steps (set steps to 1)": recipe.steps > 1,
        f"pruner {recipe.pruner!r} reads gradients of all of it": gradients,
        "pattern structured changes its shape": recipe.structured,
        "format packed is made of all of it (losa export packs a saved model)": recipe.format == "packed",
        "its weights are stored in a form of their own": getattr(config, "quantization_config", None) is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def reads_gradients(recipe: Recipe) -> bool:
    """Whether pruning does, which go through the model from its last block to its first."""
    return recipe.prunes and bool(registry.get("pruner", recipe.pruner).needs_gradients)


def ways(whole: Any, config: Any, recipe: Recipe) -> list[Way]:
    """Every way there is, the one that keeps most in memory first, with what it takes at its peak, about: of one process."""
    blocks = prunable(whole, recipe)
    device = model.choose_device(recipe.device)
    size, vocabulary = model.choose_dtype(recipe.dtype, device).itemsize, config.get_text_config().vocab_size
    parameters = sum(p.numel() for p in whole.parameters())
    in_block = [sum(p.numel() for p in block.module.parameters()) for block in blocks]
    largest = max(block.weights for block in blocks)
    hidden, processes = whole.get_input_embeddings().embedding_dim, distributed.launched()

    tokens = -(-recipe.calibration_samples // processes) * recipe.sequence_length if recipe.prunes else 0
    sampled = min(recipe.error_tokens or tokens * processes, tokens * processes) * hidden
    activations, pruning = _calibration(blocks, recipe, tokens, hidden, size, vocabulary) if tokens else (0.0, 0.0)
    pruning = max(pruning, 16 * sampled)  # the error
    holes = max(_holes(whole, block, _batch(recipe, tokens), size) for block in blocks) if tokens else 0.0
    read = (recipe.eval_tokens or WIKITEXT) if recipe.eval_data else 0
    evaluating = min(calibration.BATCH_TOKENS, read) * vocabulary * (size + 8)

    def in_memory(spill: bool) -> Way:
        held = parameters * size + sum(block.weights for block in blocks) // 8
        if recipe.shard == "blocks" and processes > 1:
            # a slice of all, and two blocks whole; the model itself is on the CPU
            held = held // processes + 2 * max(in_block) * size + (held if device.type == "cpu" else 0)
        if recipe.needs_dense_copy or recipe.teacher_model:
            held += parameters * size
        kept = (0 if spill else activations) + sampled * size * len(blocks)
        pairs, training = _recovery(whole, recipe, blocks, hidden, size, vocabulary, device)
        return Way(
            False,
            spill,
            {
                "model": held + pairs,
                "calibration": kept + pruning + holes,
                "evaluation": evaluating + KEPT if evaluating else 0,
                "recovery": training + KEPT if training else 0,
            },
            host=0.0 if device.type == "cpu" else float(parameters * size),
        )

    def on_disk(spill: bool) -> Way:
        first = parameters - sum(in_block)
        head = whole.get_output_embeddings().weight
        if not recipe.eval_data and head is not whole.get_input_embeddings().weight:
            first -= head.numel()  # it is never used
        watched = read + 2 * min(recipe.eval_step_tokens, read)
        kept = 0 if spill else activations + watched * hidden * size
        block = max(in_block) * size + largest // 8
        parts = {"model": kept, "calibration": block + pruning, "ends": first * size + evaluating}
        return Way(True, spill, parts)

    return [in_memory(False), in_memory(True), on_disk(False), on_disk(True)]


def _calibration(
    blocks: list[Block], recipe: Recipe, tokens: int, hidden: int, size: int, vocabulary: int
) -> tuple[float, float]:
    """The hidden states of `tokens` in front of a block, and what pruning one takes beside them."""
    pruner = recipe.build("pruner")
    linears = [linear for block in blocks for linear in block.linears.values()]
    sets = len(blocks).bit_length() + 1 if pruner.needs_gradients else 2 if recipe.reconstruct else 1
    forward = _batch(recipe, tokens) * 4 * max(linear.out_features for linear in linears) * size
    pruning = max(scratch(pruner, linear.out_features, linear.in_features) for linear in linears)
    pruning = max(pruning, forward) + max(_statistics(block, pruner) for block in blocks)
    if pruner.needs_gradients:
        pruning += recipe.sequence_length * vocabulary * (size + 8)
    if recipe.reconstruct:  # one block's values, gradients, moments and activations
        pruning += 16 * max(block.weights for block in blocks) * (1 - recipe.sparsity_at(1)) + 4 * forward
    return sets * tokens * hidden * size, pruning


def _batch(recipe: Recipe, tokens: int) -> int:
    """Of `tokens`, those that go through a block at once."""
    return min(tokens, max(1, calibration.BATCH_TOKENS // recipe.sequence_length) * recipe.sequence_length)


def _holes(whole: Any, block: Block, tokens: int, size: int) -> float:
    """What glibc keeps of what pruning a block has freed, as far as it is taken from its heap: half as much again as
    the linears' outputs, and three copies of a mask, a byte each weight."""
    outputs: list[float] = [
        tokens * linear.out_features * experts.share_of_tokens(whole, name) * size
        for name, linear in block.linears.items()
    ]
    held = [linear.weight.numel() for linear in block.linears.values()]
    return 1.5 * sum(n for n in outputs if n < heap.LARGEST) + 3 * max((n for n in held if n < heap.LARGEST), default=0)


def trained(recipe: Recipe, linears: dict[str, Any]) -> int:
    """The most values that are trained at a time, of the `linears` that are."""
    shapes = [(linear.out_features, linear.in_features) for linear in linears.values()]
    recoveries = [registry.get("recovery", recipe.recovery), *([MaskedLowRank] if recipe.finetune_first else [])]
    most: int = max(sum(recovery.parameters(shape, recipe) for shape in shapes) for recovery in recoveries)
    return most


def _recovery(
    whole: Any, recipe: Recipe, blocks: list[Block], hidden: int, size: int, vocabulary: int, device: torch.device
) -> tuple[float, float]:
    """What it keeps all the time, and what it takes while it trains."""
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    wanted = targeted(list(linears), recipe) if recipe.trains else set()
    if not wanted:
        return 0, 0
    values = trained(recipe, {name: linears[name] for name in wanted})
    recovery = registry.get("recovery", recipe.recovery)
    pairs = 4 * values if recovery.ranks else 0
    seen = [
        sum((x.in_features + 2 * x.out_features) * experts.share_of_tokens(whole, n) for n, x in block.linears.items())
        for block in blocks
    ]
    rows = footprint.rows_at_once(recipe) * recipe.train_length
    training = footprint.estimate(recipe, values, seen, hidden, size) - pairs + rows * vocabulary * (size + 8)
    if recipe.learning_rate == "auto":  # what the trials change, as it was before them
        weights = recovery.trains and not recovery.ranks
        training += size * sum(block.weights for block in blocks) if weights else 4 * values
    if recipe.distill:
        live = recipe.teacher == "live"  # which is one more model, and its logarithms in fp32
        chunk = min(rows * vocabulary, distillation.CHUNK)
        training += rows * vocabulary * (2 * size + 4 * live - 8) + 16 * chunk
    widest = rows * size * max(linear.out_features for linear in linears.values())
    holes = device.type == "cpu" and widest < heap.LARGEST
    return pairs, training * (HEAP if holes else MAPPED)


def scratch(pruner: Any, rows: int, columns: int) -> float:
    """What pruning a linear takes beside its weight: that weight merged, its mask, what `prune` makes, a selection."""
    made: float = max(weights * rows * columns + squares * columns**2 for weights, squares in pruner.copies)
    count, _, unit = getattr(pruner, "unit", "").partition(" ")  # those of whole heads and channels have none
    chosen = rows * min(columns, int(count)) if unit == "columns" else rows * columns  # from at once
    return 4 * (1.25 * rows * columns + made) + 28.0 * min(masks.CHUNK, chosen)


def _statistics(block: Block, pruner: Any) -> int:
    """The pruner's statistics of a block, one for each width of input at least."""
    total = 0
    for linear in block.linears.values():
        with torch.device("meta"):
            if pruner.needs_gradients:
                statistic = pruner.gradient_statistic(linear.weight.shape, "meta")
            else:
                statistic = pruner.statistic(linear.in_features, "meta")
        if statistic is not None:
            total += sum(tensor.numel() * tensor.itemsize for tensor in statistic.tensors().values())
    return total


def gigabytes(count: float, rounded: Callable[[float], int] = round) -> str:
    """Two digits, or whole gigabytes from ten on; `rounded` to these."""
    digits = max(0, 1 - math.floor(math.log10(max(count, 1) / 1e9)))
    return f"{rounded(count / 1e9 * 10**digits) / 10**digits:g} GB"


def _free(source: Any, way: Way, recipe: Recipe) -> float:
    """What is free where the run lives, with what a loaded model takes of it already."""
    device = torch.device("cpu") if way.from_disk else model.choose_device(recipe.device)
    loaded = [] if isinstance(source, str) else source.parameters()
    shared = distributed.neighbours() if device.type == "cpu" else 1
    return available(device) / shared + float(sum(p.nbytes for p in loaded if p.device.type == device.type))


def available(device: torch.device) -> float:
    """What is free there: of the machine, and of what this process may take."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    room = [_machine(), *_groups()]
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        room.append(float(soft))
    return min(room)


CGROUP, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _groups() -> Iterator[float]:
    """What is left to each control group (version 1 or 2) that this process is in, and those above it, if it is limited.

    Files that were read and may be forgotten count as free.
    """
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    version_2 = ("memory.max", "memory.current", "inactive_file")
    try:
        lines = [line.split(":", 2) for line in OWN.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in lines:
        if controllers not in ("", "memory"):
            continue
        root, (limit, used, cache) = (CGROUP / "memory", version_1) if controllers else (CGROUP, version_2)
        own = Path(path.lstrip("/"))
        for group in (root / own, *(root / above for above in own.parents)):
            try:
                most = (group / limit).read_text().strip()
                if not most.isdigit():
                    continue
                held = int((group / used).read_text())
                kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            yield int(most) - held + int(kept.get(cache, 0))


def _machine() -> float:
    """Memory that is free or can be had at once; all there is where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
