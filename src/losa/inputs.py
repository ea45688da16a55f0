"""Before a run begins: what can be known to be wrong, and everything it reads, as tokens."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losa import data, distributed, model, registry, sources, structure
from losa.blocks import Subject, prunable, targeted
from losa.errors import LosaError
from losa.loading import PACKED, STRUCTURED
from losa.recipe import Recipe
from losa.recovery import footprint
from losa.run import check_output
from losa.shrink import rehearse
from losa.sparse.linear import layouts_in

PROMPT_TOKENS = 32  # of a prompt cut out of the evaluation text


@dataclass
class Inputs:
    """Everything a run reads, as tokens."""

    calibration: Tensor  # int64 [samples, length]; empty where nothing is pruned
    examples: list[data.Example]
    evaluation: Tensor | None  # int64 [tokens]
    prompts: list[str]


def check(source: Any, recipe: Recipe, output: Path | None, overwrite: bool = False, resume: bool = False) -> Any:
    """Everything that can be known to be wrong before anything large is read; returns the model's configuration."""
    recovery = registry.get("recovery", recipe.recovery)
    if not recovery.merges and recipe.structured:
        raise LosaError(f"recovery {recipe.recovery!r} does not merge: with --pattern structured use losa or none")
    if recipe.prunes:
        sources.check_source(recipe.calibration, "calibrate")
    if recipe.trains:
        sources.check_source(recipe.train_data, "train")
    if recipe.eval_data:
        sources.check_source(recipe.eval_data, "evaluate")
    model.choose_device(recipe.device)
    _check_processes(recipe, resume)
    if recovery.trains:
        footprint.check(recipe)
    if output and not resume:
        check_output(output, overwrite)
    if output and isinstance(source, str) and output.resolve() == Path(os.path.expanduser(source)).resolve():
        raise LosaError(f"output {str(output)!r} is the model itself: name another folder")
    if output and not resume:
        _check_apart(recipe, output.resolve())
    config = model.load_config(source) if isinstance(source, str) else model.config_of(source, recipe)
    name = model.name_of(source)
    for given in (source, *([recipe.teacher_model] if recipe.teacher_model else [])):
        model.refuse_adapters(given)
    _check_range(source, recipe)
    if layouts_in(config) is not None:
        raise LosaError(
            f"{name} is packed: losa export DIR --output NEW --format dense makes it one that can be pruned"
        )
    if method := quantised(config):
        raise LosaError(
            f"{name} is quantised ({method}): name the model it was made from, and quantise what losa makes"
        )
    whole = model.skeleton(config) if isinstance(source, str) else source
    blocks = prunable(whole, recipe)
    if recipe.structured:
        structure.check(blocks)
        rehearse(config, recipe)
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    wanted = targeted(list(linears), recipe) if recipe.trains else set()
    modules = {name for name, _ in whole.named_modules()}
    if not recovery.merges and (inside := sorted(wanted - modules)):
        raise LosaError(
            f"recovery {recipe.recovery!r} keeps its pairs beside the linears, and {inside[0]} is none in the saved "
            "model, which holds all experts as one: choose targets without experts, or losa"
        )
    useful = max((min(linears[name].weight.shape) for name in wanted), default=0)
    largest = recipe.mean_rank_at(recipe.steps if recovery.ranks else 0)
    if (recovery.ranks or recipe.finetune_first) and largest > useful:
        raise LosaError(
            f"the mean rank would reach {largest:g}, the widest linear has {useful}: lower mean_rank or rank_growth"
        )
    limit = model.longest_text(config)
    model.reading_window(config, recipe.eval_window)
    lengths = {"sequence_length": recipe.prunes, "train_length": recipe.trains}
    beyond = {name: getattr(recipe, name) for name in lengths if lengths[name] and getattr(recipe, name) > limit}
    if beyond:
        long = " and ".join(f"{name} is {length}" for name, length in beyond.items())
        raise LosaError(f"{long}: the model reads at most {limit} tokens: lower {'them' if len(beyond) > 1 else 'it'}")
    return config


def _check_apart(recipe: Recipe, output: Path) -> None:
    """Raise LosaError for what is read from the folder that the run replaces."""
    places = {"teacher_model": Path(model.locate(recipe.teacher_model))} if recipe.teacher_model else {}
    data_read = {"calibration": recipe.prunes, "train_data": recipe.trains, "eval_data": bool(recipe.eval_data)}
    for name in (name for name, is_read in data_read.items() if is_read):
        if sources.place_of(getattr(recipe, name)) == "file":
            places[name] = Path(os.path.expanduser(getattr(recipe, name)))
    for name, place in places.items():
        if place.exists() and output in (place.resolve(), *place.resolve().parents):
            raise LosaError(f"{name} {str(place)!r} is in the output, which is replaced: name another folder")


def not_held_out(recipe: Recipe) -> str:
    """What to say where perplexity is measured on what is learnt from; empty where it is not, as far as names tell."""
    read = [name for name, is_read in (("calibration", recipe.prunes), ("train_data", recipe.trains)) if is_read]
    same = [name for name in read if recipe.eval_data and sources.same_text(recipe.eval_data, getattr(recipe, name))]
    what = f"eval_data is the text of {' and '.join(same)}"
    return f"{what}: its perplexity is not that of unseen text" if same else ""


def _check_range(source: Any, recipe: Recipe) -> None:
    """Raise LosaError where gradients would be computed in float16: those of the logits, and what follows, become zero."""
    half = recipe.dtype == "float16" or (isinstance(source, nn.Module) and source.dtype == torch.float16)
    gradients = recipe.prunes and registry.get("pruner", recipe.pruner).needs_gradients
    if half and (recipe.trains or recipe.reconstruct or gradients):
        raise LosaError("dtype float16 has too small a range for gradients: use bfloat16 or float32")


def quantised(config: Any) -> str:
    """How the weights of a model with this configuration are stored, if that is neither as numbers nor a form of losa's."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return ""
    known = stored if isinstance(stored, dict) else stored.to_dict()  # of a loaded model
    method = known.get("quant_method", "in an unknown way")
    method = str(getattr(method, "value", method))
    return "" if method in (STRUCTURED, PACKED) else method


def _check_processes(recipe: Recipe, resume: bool) -> None:
    """Raise LosaError for what so many processes cannot share."""
    processes, recovery = distributed.launched(), registry.get("recovery", recipe.recovery)
    if recipe.prunes and (fewest := allocation_samples(recipe)) < processes:
        raise LosaError(
            f"{fewest} calibration sequences do not divide over {processes} processes: raise calibration_samples and "
            "allocation_samples, or start fewer"
        )
    if recipe.prunes and processes > 1 and not registry.get("pruner", recipe.pruner).sums:
        raise LosaError(f"pruner {recipe.pruner!r} is for one process: start losa without torchrun")
    if recipe.reconstruct and processes > 1:
        raise LosaError(
            "reconstruct leads one block at a time in one process: set it to 0, or start losa without torchrun"
        )
    if recipe.shard == "none":
        return
    if processes == 1 and not resume:  # what several have begun one may end
        raise LosaError("shard blocks spreads a model over processes: torchrun --nproc-per-node N -m losa starts them")
    if recovery.trains and (recipe.distill or not recovery.ranks):
        raise LosaError(
            "shard blocks keeps whole in every process what is trained or teaches: it is for low-rank pairs without distill"
        )


def read(recipe: Recipe, tokenizer: Any, config: Any) -> Inputs:
    """All text as tokens, so that too little of it is known before the model loads."""
    tokens = torch.empty(0, 0, dtype=torch.int64)
    if recipe.prunes:
        tokens = data.calibration_tokens(
            recipe.calibration, tokenizer, recipe.calibration_samples, recipe.sequence_length, recipe.seed
        )
    examples = (
        data.training_examples(
            recipe.train_data, tokenizer, recipe.train_samples, recipe.train_length, recipe.seed, recipe.loss_on
        )
        if recipe.trains
        else []
    )
    evaluation = None
    if recipe.eval_data:
        window = model.reading_window(config, recipe.eval_window)
        evaluation = data.evaluation_tokens(recipe.eval_data, tokenizer, window, recipe.eval_tokens)
    return Inputs(tokens, examples, evaluation, _prompts(recipe, tokenizer, evaluation, model.longest_text(config)))


def _prompts(recipe: Recipe, tokenizer: Any, evaluation: Tensor | None, longest: float) -> list[str]:
    """The recipe's prompts, or two places of the evaluation text; [] if none are to be continued.

    Raises LosaError for a prompt that leaves no room within the `longest` text the model reads.
    """
    if not recipe.sample_tokens:
        return []
    for prompt in recipe.prompts:
        if (count := len(tokenizer(prompt)["input_ids"])) >= longest:
            raise LosaError(f"prompts: {prompt!r:.40} has {count} tokens, the model reads at most {longest}")
    if recipe.prompts or evaluation is None:
        return recipe.prompts
    size = int(min(PROMPT_TOKENS, longest // 2, len(evaluation)))
    starts = {(len(evaluation) - size) * i // 3 for i in (1, 2)}
    texts = [tokenizer.decode(evaluation[s : s + size], skip_special_tokens=True) for s in sorted(starts)]
    return [_whole_words(text) for text in texts if text.strip()]


def _whole_words(text: str) -> str:
    """`text` without the words that its ends may cut in two, from the beginning of a line if one begins in its first half."""
    rest = text.partition("\n" if "\n" in text[: len(text) // 2] else " ")[2]
    whole = rest if text[-1:].isspace() else (rest.rsplit(None, 1) or [""])[0]
    return whole.rstrip() or text


def fingerprint(subject: Subject, inputs: Inputs) -> dict[str, str]:
    """Of all tokens and of some of every weight, so that no run is resumed, and no other process joined, with others."""
    samples = subject.home.samples() if subject.home else _samples(subject.model)
    parts: dict[str, Iterable[tuple[str, Tensor]]] = {
        "the calibration text": [("", inputs.calibration)],
        "the training text": [("", tensor) for example in inputs.examples for tensor in example],
        "the evaluation text": [("", tensor) for tensor in [inputs.evaluation] if tensor is not None],
        "the model": ((f"{name} {shape}", some) for name, shape, some in samples),
    }
    found = {}
    for what, tensors in parts.items():
        digest = hashlib.sha256()
        for name, tensor in tensors:
            digest.update(f"{name} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
        found[what] = digest.hexdigest()
    return found


def check_same(meta: dict[str, Any], seen: dict[str, str]) -> None:
    """Raise LosaError if what a run was started with had another fingerprint."""
    if changed := [name for name, found in seen.items() if meta["seen"].get(name) != found]:
        raise LosaError(f"{changed[0]} is not what the run was started with: start a new run")


def _samples(whole: nn.Module) -> Iterator[tuple[str, list[int], Tensor]]:
    for name, weight in whole.named_parameters():
        some = weight.detach().flatten()[:: max(1, weight.numel() // 1000)].float().cpu()
        yield name, list(weight.shape), some


def allocation_samples(recipe: Recipe) -> int:
    return min(recipe.allocation_samples, recipe.calibration_samples)
