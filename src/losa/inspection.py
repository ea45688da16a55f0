"""Look without running: what a saved model holds, what a run would do and take."""

from pathlib import Path
from typing import Any

from losa import distributed, experts, masks, memory, model, registry
from losa.blocks import find_blocks, prunable, targeted
from losa.checkpoint import Checkpoint, weight_bytes
from losa.errors import LosaError
from losa.export import load_masks
from losa.progress import Progress
from losa.recipe import Recipe, from_settings
from losa.recovery.low_rank import MaskedLowRank
from losa.run import damaged, read_made, read_recipe
from losa.sparse.linear import layouts_in
from losa.units import dtype_name


def inspect(folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Zeros of every prunable linear of a saved model, and what losa.json tells of its making, if losa made it.

    Of a structurally pruned model, the dense model's weights are counted, what is no more as zero. Reads one weight at a
    time. Raises LosaError for a folder without a model, a run that has not finished, or a weight
    that is not zero where the mask says so.
    """
    if str(folder) == "demo" and not folder.exists():
        folder = Path(model.locate("demo"))
    if not folder.is_dir():
        raise LosaError(f"{str(folder)!r} is no folder: inspect looks into a saved model's")
    if (folder / "run" / "recipe.json").is_file() and not (folder / "losa.json").is_file():
        command = read_recipe(folder)["command"]
        raise LosaError(
            f"{str(folder)!r} is a run that has not finished: losa {command} MODEL --output {folder} --resume goes on"
        )
    made: dict[str, Any] | None = None
    if (folder / "losa.json").is_file():
        made = read_made(folder / "losa.json")
    config = model.load_config(str(folder))
    whole, layouts = model.skeleton(config), layouts_in(config)
    blocks = prunable(whole, _pruned_by(made["recipe"])) if made is not None else find_blocks(whole)
    bits = load_masks(folder) if made is not None or layouts is not None else {}
    files = Checkpoint(folder, layouts, experts.stored(whole))
    ranks = made["history"][-1]["ranks"] if made else []
    if ranks and len(ranks) <= blocks[-1].index:
        raise damaged(folder / "losa.json", ValueError(f"{len(ranks)} ranks, {blocks[-1].index + 1} blocks"))
    described: list[dict[str, Any]] = []
    for block in (progress or Progress(quiet=True)).track(blocks, "reading", "block"):
        linears = {}
        for name in block.linears:
            weight = files.weight(name)
            found = {"weights": weight.numel(), "zeros": int((weight == 0).sum())}
            if f"{name}.rows" in bits:  # what was taken out counts as zero
                rows, columns = bits[f"{name}.rows"], bits[f"{name}.columns"]
                if weight.shape != (int(rows.sum()), int(columns.sum())):
                    raise LosaError(f"{name} has not the shape that its masks leave: {str(folder)!r} was changed")
                gone = len(rows) * len(columns) - weight.numel()
                found = {"weights": weight.numel() + gone, "zeros": found["zeros"] + gone, "pruned": gone}
            elif bits and (made is not None or name in bits):
                if name not in bits:
                    raise LosaError(f"{name} has no mask: {str(folder)!r} was changed")
                mask = masks.of_weight(name, weight.shape, bits[name], folder)
                masks.check_held(name, weight, mask, folder)
                found["pruned"] = int((~mask).sum())
            linears[name.removeprefix(f"{block.name}.")] = found
        counts = {key: sum(linear[key] for linear in linears.values()) for key in ("weights", "zeros")}
        rank = ranks[block.index] if ranks else None
        described.append({"name": block.name, "rank": rank, **counts, "linears": linears})
    total = sum(block["weights"] for block in described)
    zeros = sum(block["zeros"] for block in described)
    summary: dict[str, Any] = {"weights": total, "zeros": zeros, "sparsity": zeros / total, "blocks": described}
    summary |= {"format": "dense" if layouts is None else "packed", "bytes": weight_bytes(folder)}
    if layouts is not None:
        summary["values"] = config.quantization_config["values"]
    if made:
        summary |= {key: made[key] for key in ("command", "source", "versions", "recipe", "measurements")}
        summary |= {key: made[key] for key in ("exported",) if key in made}
    return summary


def _pruned_by(stored: dict[str, Any]) -> Recipe:
    """What of a stored recipe says which linears are prunable: the rest may be what no recipe of today's can be."""
    names = ("ignore", "pattern", "undivided")
    return from_settings({name: stored[name] for name in names if name in stored})


def plan(source: str, recipe: Recipe, config: Any = None, way: memory.Way | None = None) -> dict[str, Any]:
    """What a run would do, and about what it would take, from the model's configuration alone: bytes, at their peak.

    `memory` is that of one process, where it computes; `processes` are those that torchrun started. config and way are
    those of `source` where they are known already.
    """
    config = model.load_config(source) if config is None else config
    skeleton = model.skeleton(config)
    blocks = prunable(skeleton, recipe)
    device = model.choose_device(recipe.device)
    dtype = model.choose_dtype(recipe.dtype, device)
    way = memory.choose(source, recipe, config) if way is None else way
    recovery = registry.get("recovery", recipe.recovery)
    parameters = sum(p.numel() for p in skeleton.parameters())
    weights = sum(block.weights for block in blocks)
    linears = [(name, linear) for block in blocks for name, linear in block.linears.items()]
    wanted = targeted([name for name, _ in linears], recipe) if recipe.trains else set()
    trained = memory.trained(recipe, {name: linear for name, linear in linears if name in wanted})
    pairs = 4 * trained if recovery.ranks else 0  # bytes of values that are there all the time
    hidden, size = skeleton.get_input_embeddings().embedding_dim, dtype.itemsize
    processes = distributed.launched()
    tokens = recipe.calibration_samples * recipe.sequence_length if recipe.prunes else 0
    features = min(recipe.error_tokens or tokens, tokens) * hidden * size * len(blocks)
    kept = 0  # bytes of a cached teacher's predictions
    if wanted and recipe.distill and recipe.teacher == "cached":
        kept = 6 * (recipe.rows - len(recipe.rows_of(0))) * recipe.train_length * recipe.teacher_top
    stored = min(size, getattr(config.dtype, "itemsize", size))
    result = parameters * stored
    if recipe.format == "packed":
        value = 1 if recipe.values == "int8" else stored
        result -= weights * stored - round(weights * (1 - recipe.sparsity)) * value - weights // 8
    # each state is replaced by a whole new one beside it; from disk there are masks, and the result
    state = weights // 8 if way.from_disk else parameters * size + 2 * (weights * size + weights // 8 + pairs)
    spilled = tokens * hidden * size if way.spill else 0
    return {
        "model": type(skeleton).__name__,
        "device": str(device),
        "dtype": dtype_name(dtype),
        "parameters": parameters,
        "blocks": len(blocks),
        "prunable": weights,
        "kept": round(weights * (1 - recipe.sparsity)),
        "linears_adapted": len(wanted),
        "trained": MaskedLowRank.trained if recipe.finetune_first and not recovery.trains else recovery.trained,
        "parameters_trained": trained,
        "merges": recovery.merges,
        "steps": [
            {
                "step": step,
                "sparsity": round(recipe.sparsity_at(step), 6),
                "mean_rank": recipe.mean_rank_at(step) if recovery.ranks or step == 0 else 0,
                "rows": len(recipe.rows_of(step)) if recovery.trains or step == 0 else 0,
            }
            for step in range(0 if recipe.finetune_first else 1, recipe.steps + 1)
        ],
        "processes": processes,
        "memory": round(way.memory),
        "shortage": way.shortage,
        "memory_parts": {name: round(part) for name, part in way.parts.items()},
        "model_on_disk": way.from_disk,
        "activations_on_disk": way.spill,
        "saved": result,
        "disk": (result if way.from_disk else 0) + weights // 8 + state + spilled + features + 3 * 4 * trained + kept,
    }
