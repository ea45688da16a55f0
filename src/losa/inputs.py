"""Before a run begins: what can be known to be wrong, and everything it reads, as tokens."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from losa import data, model, registry, sources, structure
from losa.errors import LosaError
from losa.model import Subject
from losa.recipe import Recipe
from losa.run import check_output
from losa.shrink import rehearse
from losa.sparse.linear import layouts_in


@dataclass
class Inputs:
    """Everything a run reads, as tokens."""

    calibration: Tensor  # int64 [samples, length]
    examples: list[data.Example]
    evaluation: Tensor | None  # int64 [tokens]


def check(source: Any, recipe: Recipe, output: Path | None, overwrite: bool = False, resume: bool = False) -> Any:
    """Everything that can be known to be wrong before anything large is read; returns the model's configuration."""
    recovery = registry.get("recovery", recipe.recovery)
    if not recovery.merges and recipe.steps > 1:
        raise LosaError(
            f"recovery {recipe.recovery!r} does not merge, so that only one step is possible: set steps to 1"
        )
    if not recovery.merges and recipe.structured:
        raise LosaError(f"recovery {recipe.recovery!r} does not merge: with --pattern structured use losa or none")
    sources.check_source(recipe.calibration, "calibrate")
    if recovery.trains:
        sources.check_source(recipe.train_data, "train")
    if recipe.eval_data:
        sources.check_source(recipe.eval_data, "evaluate")
    model.choose_device(recipe.device)
    if output and not resume:
        check_output(output, overwrite)
    if output and isinstance(source, str) and output.resolve() == Path(source).expanduser().resolve():
        raise LosaError(f"output {str(output)!r} is the model itself: name another folder")
    config = model.load_config(source) if isinstance(source, str) else model.config_of(source, recipe)
    if layouts_in(config) is not None:
        name = source if isinstance(source, str) else type(source).__name__
        raise LosaError(
            f"{name} is packed: losa export DIR --output NEW --format dense makes it one that can be pruned"
        )
    whole = model.skeleton(config) if isinstance(source, str) else source
    blocks = model.prunable(whole, recipe)
    if recipe.structured:
        structure.check(blocks)
        rehearse(config, recipe)
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    wanted = model.targeted(list(linears), recipe) if recovery.trains else set()
    modules = {name for name, _ in whole.named_modules()}
    if not recovery.merges and (inside := sorted(wanted - modules)):
        raise LosaError(
            f"recovery {recipe.recovery!r} keeps its pairs beside the linears, and {inside[0]} is none in the saved "
            "model, which holds all experts as one: choose targets without experts, or losa"
        )
    useful = max((min(linears[name].weight.shape) for name in wanted), default=0)
    if recovery.ranks and recipe.mean_rank_at(recipe.steps) > useful:
        raise LosaError(
            f"the mean rank would reach {recipe.mean_rank_at(recipe.steps):g}, the widest linear has {useful}"
            ": lower mean_rank or rank_growth"
        )
    limit = model.longest_text(config)
    model.reading_window(config, recipe.eval_window)
    for name in ("sequence_length", "train_length"):
        if getattr(recipe, name) > limit:
            raise LosaError(f"{name} is {getattr(recipe, name)}: the model reads at most {limit} tokens: lower it")
    return config


def read(recipe: Recipe, tokenizer: Any, config: Any) -> Inputs:
    """All text as tokens, so that too little of it is known before the model loads."""
    trains = registry.get("recovery", recipe.recovery).trains
    tokens = data.calibration_tokens(
        recipe.calibration, tokenizer, recipe.calibration_samples, recipe.sequence_length, recipe.seed
    )
    examples = (
        data.training_examples(
            recipe.train_data, tokenizer, recipe.train_samples, recipe.train_length, recipe.seed, recipe.loss_on
        )
        if trains
        else []
    )
    evaluation = None
    if recipe.eval_data:
        window = model.reading_window(config, recipe.eval_window)
        evaluation = data.evaluation_tokens(recipe.eval_data, tokenizer, window, recipe.eval_tokens)
    return Inputs(tokens, examples, evaluation)


def fingerprint(subject: Subject, inputs: Inputs) -> str:
    """Of all tokens and of some of every weight, so that a run is not resumed with others."""
    found = hashlib.sha256()
    tokens = [inputs.calibration, *(part for example in inputs.examples for part in example)]
    for tensor in [*tokens, *([] if inputs.evaluation is None else [inputs.evaluation])]:
        found.update(f"{list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    for name, shape, some in subject.home.samples() if subject.home else _samples(subject.model):
        found.update(f"{name} {shape}".encode() + some.numpy().tobytes())
    return found.hexdigest()


def _samples(whole: nn.Module) -> Iterator[tuple[str, list[int], Tensor]]:
    for name, weight in whole.named_parameters():
        some = weight.detach().flatten()[:: max(1, weight.numel() // 1000)].float().cpu()
        yield name, list(weight.shape), some


def allocation_samples(recipe: Recipe) -> int:
    return min(recipe.allocation_samples, recipe.calibration_samples)
