"""A model that someone else pruned: its masks are taken as they are, and the pipeline goes on from there (`losa recover`)."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losa import experts, inspection, masks, model, pipeline
from losa.blocks import Block, Subject, prunable
from losa.checkpoint import MASKS, Checkpoint
from losa.errors import LosaError
from losa.export import read_masks
from losa.inputs import Inputs, check_same, fingerprint
from losa.measuring import measure_step
from losa.pipeline import State
from losa.progress import Progress
from losa.recipe import Recipe, recipe_of
from losa.repair_recipe import Repair
from losa.run import Run
from losa.starting import Result, start

# Below this share of zeros a linear is dense: they are there by accident (weights that underflowed, unused channels).
ACCIDENTAL = 0.01


def folder_of(source: Any) -> Path | None:
    """Where masks.safetensors lies beside the model `source` (a folder, a name on the hub, or loaded), None if nowhere.

    Raises LosaError where the hub does not say.
    """
    if not isinstance(source, str | os.PathLike) or source == "demo":
        return None
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder if (folder / MASKS).is_file() else None
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), MASKS)).parent
    except LocalEntryNotFoundError:  # the hub is out of reach, and the file not in the cache
        if try_to_load_from_cache(str(source), MASKS) is _CACHED_NO_EXIST:  # it was asked before
            return None
        raise LosaError(
            f"the hub cannot be asked whether {str(source)!r} has {MASKS}: try again, or download it to a folder and "
            "name that"
        ) from None
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise LosaError(f"cannot ask the hub whether {source!r} has {MASKS}: {error}") from error


@dataclass
class Found:
    """The masks that a model came with, by linear: packed keep-masks (`masks.pack`), and how many weights each has and prunes."""

    bits: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    pruned: dict[str, int] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        return sum(self.pruned.values()) / sum(self.weights.values())

    @property
    def dense(self) -> list[str]:
        """The linears whose masks keep everything."""
        return [name for name, count in self.pruned.items() if not count]


def weights_of(blocks: list[Block]) -> Iterator[tuple[str, Tensor]]:
    """Every prunable linear's name and weight [out, in]."""
    return ((name, linear.weight.detach()) for block in blocks for name, linear in block.linears.items())


def find_masks(weights: Iterable[tuple[str, Tensor]], folder: Path | None) -> Found:
    """The keep-mask of every weight [out, in]: what `folder` has saved of it, else its zeros, if they are no accident.

    Raises LosaError for saved masks that do not fit the model.
    """
    saved = read_masks(folder) if folder else {}
    if any(name.endswith(".rows") for name in saved):
        raise LosaError(
            f"{str(folder)!r} was pruned by whole heads and channels: it is smaller, and dense: nothing to repair"
        )
    found = Found()
    for name, weight in weights:
        kept = weight != 0
        if name in saved:
            kept = masks.of_weight(name, weight.shape, saved[name].to(weight.device), folder)
            masks.check_held(name, weight, kept, folder)
        elif masks.sparsity(kept) < ACCIDENTAL:
            kept = torch.ones_like(kept)
        found.bits[name] = masks.pack(kept)
        found.weights[name], found.pruned[name] = kept.numel(), kept.numel() - int(kept.sum())
    if saved and not set(saved) & set(found.bits):
        raise LosaError(f"{str(folder)!r}: {MASKS} is of another model: it names {next(iter(saved))}")
    return found


def refuse_dense(found: Found) -> None:
    """Raise LosaError if no mask prunes anything."""
    if not found.sparsity:
        raise LosaError(
            f"the model is dense: no linear has {ACCIDENTAL:.0%} zeros, so there is nothing to repair; losa compress prunes it"
        )


def say_dense(found: Found, run: Run) -> None:
    """Name the linears that stay dense."""
    if names := found.dense:
        run.log("dense linears", names=names)
        more = f" and {len(names) - 8} more (log.jsonl names all)" if len(names) > 8 else ""
        run.say(f"{len(names)} of {len(found.bits)} linears have no mask and stay dense: {', '.join(names[:8])}{more}")


# ---------------------------------------------------------------------------------------------------------- the run


def recover(
    source: Any,
    recipe: Repair | dict[str, Any] | str | Path,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Win back the quality of `source`, a model that is pruned already, without losing a zero; merge, save.

    The mask of a linear is what masks.safetensors beside the model says of it, else its zeros, whatever made them. A
    linear with less than 1% zeros, or one whose saved mask keeps everything, is adapted as a dense one. recipe: a Repair,
    a dict of settings that differ from its defaults, or the name or file of a recipe, of which the part that is not about pruning
    counts. All other arguments, and the result, are those of `compress`; `history` has one step without errors, since
    these compare with the dense model. Raises LosaError for bad input and for a model that is not sparse, before
    anything is written.
    """

    def begin(subject: Subject, recipe: Recipe, inputs: Inputs) -> Callable[[Run], Result]:
        assert isinstance(recipe, Repair)
        found = find_masks(weights_of(subject.blocks), folder_of(source))
        refuse_dense(found)
        known = recipe.found(found.sparsity)
        return lambda run: _recover(subject, known, inputs, found, run)

    return start(source, recipe_of(recipe, Repair), output, begin, tokenizer, resume, overwrite, progress)


def _recover(subject: Subject, recipe: Recipe, inputs: Inputs, found: Found, run: Run) -> Result:
    recovery = recipe.build("recovery")
    before = remember_pruned(subject, recipe, inputs, run)
    say_dense(found, run)
    subject.teacher = pipeline.teach(subject, recipe, inputs, run)
    subject.wrap(recovery.layer, recipe, recipe.max_rank if recovery.ranks else 0)
    state = pipeline.restore(subject, run)
    began = time.monotonic()
    if not state.done:
        for block in subject.blocks:
            for name, linear in block.masked.items():
                linear.set_mask(masks.unpack(found.bits[name].to(linear.weight.device), linear.in_features))
        rates = {block.name: pipeline.sparsity_of(block) for block in subject.blocks if block.linears}
        ranks = pipeline.set_ranks(subject, recipe, 1, recipe.rank_by, []) if recovery.ranks else []
        record = {"step": 1, "rates": rates, "errors": [], "ranks": ranks, "unreached": []}
        state = State(1, [record | pipeline.reached(subject) | {"perplexity": {}}])
        pipeline.save(subject, state, run)
    pipeline.recover_step(subject, recovery, inputs.examples, recipe, 1, state.history, run)
    state.history[-1]["perplexity"]["recovered"] = measure_step(subject, recipe, inputs, 1, run)
    pipeline.tell(run, state.history[-1], recipe, time.monotonic() - began)
    return pipeline.finish(subject, recipe, recovery, inputs, {"before": before}, state, run)


def remember_pruned(subject: Subject, recipe: Recipe, inputs: Inputs, run: Run) -> dict[str, Any]:
    """What is measured of the model as it was given."""
    seen = fingerprint(subject, inputs)
    if saved := run.load("before"):
        check_same(saved.meta, seen)
        return {key: value for key, value in saved.meta.items() if key != "seen"}
    measured = pipeline.first_look(subject, recipe, inputs, run) | {"sparsity": recipe.sparsity}
    run.log("before", **measured)
    run.save("before", {}, {**measured, "seen": seen})
    return measured


def plan(source: str, recipe: Repair) -> dict[str, Any]:
    """What `recover` would do, and about what it would take: from the configuration, and the zeros in the model's files.

    Adds `sparsity` and `dense`, the linears without a mask, to what `inspection.plan` says.
    """
    model.locate(source)  # says what is wrong with it
    if (folder := model.folder_of(source)) is None:
        raise LosaError(f"--dry-run counts zeros in the model's files: download {source!r}, and name its folder")
    whole = model.skeleton(model.load_config(source))
    weights = Checkpoint(folder, places=experts.stored(whole))
    names = [name for block in prunable(whole, recipe) for name in block.linears]
    found = find_masks(((name, weights[f"{name}.weight"]) for name in names), folder_of(source))
    refuse_dense(found)
    planned = inspection.plan(source, recipe.found(found.sparsity))
    return planned | {"sparsity": found.sparsity, "dense": found.dense}
