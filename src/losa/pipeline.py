"""The whole algorithm: for each step, rates -> masks -> errors -> ranks -> recovery; then merge and save (paper, section 2.4)."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losa import calibration, data, evaluate, export, masks, model, ranks, registry
from losa.allocators.base import Evidence
from losa.errors import LosaError
from losa.model import Block, Subject
from losa.progress import Progress
from losa.pruners.base import Pruner
from losa.recipe import Recipe, from_settings
from losa.run import Run, check_output


@dataclass
class Result:
    """A compressed model: plain, merged, in memory, and where it was saved. `history` has rates, errors and ranks of every step."""

    model: Any
    tokenizer: Any
    recipe: Recipe
    measurements: dict[str, Any]
    history: list[dict[str, Any]]
    path: Path | None


@dataclass
class Inputs:
    """Everything a run reads, as tokens."""

    calibration: Tensor  # int64 [samples, length]
    examples: list[data.Example]
    evaluation: Tensor | None  # int64 [tokens]


@dataclass
class Dense:
    """What is remembered of the dense model."""

    features: Tensor  # [blocks, tokens, hidden]: what each block put out, at a seeded sample of tokens
    grams: Tensor  # float64 [blocks, n, n]; n = 0 if no allocator asks for them
    perplexity: float | None


@dataclass
class State:
    """Where a run stands: `done` steps are pruned; the last of them may still be in recovery."""

    done: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def compress(
    source: Any,
    recipe: Recipe | dict[str, Any],
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Prune `source`, win its quality back, merge, save.

    source: a local folder, a name on the hub, `demo`, or a loaded causal language model, which is changed in place and
    needs its `tokenizer`. recipe: a Recipe, or a dict of settings that differ from its defaults. output: a new folder
    that becomes an ordinary Hugging Face model with losa.json and masks.safetensors beside it, and holds the run in
    run/; None saves nothing. resume: go on with the run in `output`.
    Raises LosaError for bad input, before the model loads where it can be known by then.
    """
    output = Path(output) if output is not None else None
    name = source if isinstance(source, str) else type(source).__name__
    recipe = recipe if isinstance(recipe, Recipe) else from_settings(recipe)
    config = check(source, recipe, output, overwrite, resume)
    if tokenizer is None:
        if not isinstance(source, str):
            raise LosaError(f"a loaded model ({name}) needs its tokenizer: pass tokenizer=")
        tokenizer = model.load_tokenizer(source, config)
    run = Run(output, progress or Progress(quiet=True))
    try:
        if resume:
            run.resume(recipe, name)
            if run.finished:
                return finished(run.output, recipe, tokenizer)
        inputs = read(recipe, tokenizer)
        loaded = model.load(source, recipe) if isinstance(source, str) else source
        subject = model.subject_of(loaded, tokenizer, name, recipe, config.dtype)
        if not resume:  # only now: what fails before leaves no trace, and nothing replaced
            run.start(recipe, name, overwrite)
        return _compress(subject, recipe, inputs, run)
    finally:
        run.close()


def _compress(subject: Subject, recipe: Recipe, inputs: Inputs, run: Run) -> Result:
    recovery = registry.get("recovery", recipe.recovery)()
    dense = remember_dense(subject, recipe, inputs, run)
    subject.wrap(recovery.layer, recipe, recipe.max_rank if recovery.trains else 0)
    state = restore(subject, run)

    for step in range(max(1, state.done), recipe.steps + 1):
        began = time.monotonic()
        if step > state.done:
            rates = allocate(subject, recipe, step, inputs, dense, state, run)
            errors = prune(subject, recipe, step, rates, inputs, dense, run)
            chosen = set_ranks(subject, recipe, step, rates, errors) if recovery.trains else []
            state.history.append({"step": step, "rates": rates, "errors": errors, "ranks": chosen})
            state.done = step
            save(subject, state, run)
        rows = recipe.rows_of(step)
        recovery.recover(subject, inputs.examples[rows.start : rows.stop], recipe, step, run)
        tell(run, state.history[-1], recipe, time.monotonic() - began)

    if recovery.merges:
        pairs, bits = None, subject.merge()
        perplexity = measure(subject, recipe, inputs)
    else:  # measured as it will be used: the sparse model with its pairs beside it
        perplexity = measure(subject, recipe, inputs)
        pairs, bits = export.take_pairs(subject), subject.merge()
    measurements = {
        "dense": {"perplexity": dense.perplexity},
        "sparse": {"perplexity": perplexity, **counted(bits, subject)},
    }
    path = export.save(subject, recipe, bits, pairs, measurements, state.history, run)
    return Result(subject.model, subject.tokenizer, recipe, measurements, state.history, path)


# ------------------------------------------------------------------------------------------------- the steps' parts


def remember_dense(subject: Subject, recipe: Recipe, inputs: Inputs, run: Run) -> Dense:
    """One pass over the dense model: perplexity, features at a seeded sample of tokens, Gram matrices for the first step."""
    if saved := run.load("dense"):
        return Dense(saved.tensors["features"], saved.tensors["grams"], saved.meta["perplexity"])
    perplexity = measure(subject, recipe, inputs)
    stream = calibration.Stream(subject.model, subject.blocks, inputs.calibration, device_of(subject, recipe))
    positions = sampled_positions(recipe, inputs)
    needs_grams = registry.get("allocator", recipe.allocator).needs_grams
    features, grams = [], []
    for block in run.track(subject.blocks, "dense model"):
        stream.advance(block)
        features.append(stream.sample(positions).cpu())
        grams.append(stream.gram(rmi_samples(recipe)) if needs_grams else torch.empty(0, 0))
    dense = Dense(torch.stack(features), torch.stack(grams), perplexity)
    run.save("dense", {"features": dense.features, "grams": dense.grams}, {"perplexity": perplexity})
    run.log("dense", perplexity=perplexity)
    return dense


def allocate(
    subject: Subject, recipe: Recipe, step: int, inputs: Inputs, dense: Dense, state: State, run: Run
) -> dict[str, float]:
    """Sparsity by unit (here: blocks, by their names), from the merged model as it stands (equations 4, 5, 6, 8)."""
    allocator = registry.get("allocator", recipe.allocator)(**recipe.allocator_options)
    grams = list(dense.grams)
    if allocator.needs_grams and step > 1:
        tokens = inputs.calibration[: rmi_samples(recipe)]
        stream = calibration.Stream(subject.model, subject.blocks, tokens, device_of(subject, recipe))
        for i, block in enumerate(run.track(subject.blocks, f"step {step}/{recipe.steps}: layer-wise sparsity")):
            stream.advance(block)
            grams[i] = stream.gram(len(tokens))
    units = [block for block in subject.blocks if block.linears]
    before = state.history[-1]["rates"] if state.history else {}
    evidence = Evidence(
        target=recipe.sparsity_at(step),
        counts=[unit.weights for unit in units],
        floors=[before.get(unit.name, 0.0) for unit in units],
        grams=[grams[unit.index] for unit in units] if allocator.needs_grams else None,
    )
    return dict(zip([unit.name for unit in units], allocator.rates(evidence), strict=True))


def prune(
    subject: Subject, recipe: Recipe, step: int, rates: dict[str, float], inputs: Inputs, dense: Dense, run: Run
) -> list[float]:
    """New masks, block by block, each seeing the inputs that the pruned blocks before it make; reconstruction errors."""
    pruner: Pruner = registry.get("pruner", recipe.pruner)(**recipe.pruner_options)
    stream = calibration.Stream(subject.model, subject.blocks, inputs.calibration, device_of(subject, recipe))
    positions = sampled_positions(recipe, inputs)
    errors = []
    for block in run.track(subject.blocks, f"step {step}/{recipe.steps}: pruning"):
        prune_block(block, pruner, rates, stream)
        stream.advance(block)
        errors.append(reconstruction_error(dense.features[block.index], stream.sample(positions).cpu()))
    return errors


@torch.no_grad()
def prune_block(block: Block, pruner: Pruner, rates: dict[str, float], stream: calibration.Stream) -> None:
    """Prune every linear of `block` to the rate of its unit: its own, or its block's. Changed values meet the pairs as
    decision 2 of the equations has it: W <- M' (W + (W' - merged)), rounded once; A and B stay."""
    statistics = {name: pruner.statistic(linear.in_features, stream.device) for name, linear in block.linears.items()}
    if pruner.needs_inputs and block.linears:
        stream.observe(block, statistics)
    for name, linear in block.masked.items():
        merged = linear.effective_weight(torch.float32).to(stream.device)
        rate = rates[name] if name in rates else rates[block.name]
        try:
            pruned, mask = pruner.prune(merged, linear.mask.to(stream.device), rate, statistics[name])
        except LosaError as error:
            raise LosaError(f"{name}: {error}") from error
        changed = linear.weight + (pruned - merged).to(linear.weight.device) if pruner.changes_weights else None
        linear.set_mask(mask)
        if changed is not None:
            linear.weight.copy_(changed.mul_(linear.mask))


def reconstruction_error(dense: Tensor, pruned: Tensor) -> float:
    """E_l = sum(((D - P) / ||D_channel||)^2) / channels; both [tokens, hidden], the norm over the tokens."""
    error = (dense.float() - pruned.float()).square().sum(dim=0, dtype=torch.float64)
    norm = dense.float().square().sum(dim=0, dtype=torch.float64)
    return float((error / norm.clamp_min(1e-30)).mean())


def set_ranks(subject: Subject, recipe: Recipe, step: int, rates: dict[str, float], errors: list[float]) -> list[int]:
    """Rank of every block from its error (equation 7), its sparsity, or all alike; the outputs do not move."""
    weights = {
        "error": errors,
        "sparsity": [rates.get(block.name, 0.0) for block in subject.blocks],
        "uniform": [1.0] * len(subject.blocks),
    }[recipe.rank_by]
    chosen = ranks.apportion(weights, recipe.mean_rank_at(step), recipe.max_rank)
    generator = torch.Generator().manual_seed(recipe.seed * 1000 + step)
    for block, rank in zip(subject.blocks, chosen, strict=True):
        for linear in block.masked.values():
            if linear.max_rank:
                linear.set_rank(rank, generator)
    return chosen


# ---------------------------------------------------------------------------------------------- what is kept and told


def save(subject: Subject, state: State, run: Run) -> None:
    """The state after pruning: base weights, masks, pairs, ranks."""
    tensors: dict[str, Tensor] = {}
    for block in subject.blocks:
        for name, linear in block.masked.items():
            tensors |= {f"{name}:{key}": value for key, value in linear.state_dict().items() if key != "bias"}
    run.save("pruned", tensors, {"done": state.done, "history": state.history})


def restore(subject: Subject, run: Run) -> State:
    """The state that `save` left, put into the model; a fresh one if there is none."""
    saved = run.load("pruned")
    if saved is None:
        return State()
    for block in subject.blocks:
        for name, linear in block.masked.items():
            keys = linear.state_dict()
            linear.load_state_dict({key: saved.tensors.get(f"{name}:{key}", keys[key]) for key in keys})
    return State(saved.meta["done"], saved.meta["history"])


def measure(subject: Subject, recipe: Recipe, inputs: Inputs) -> float | None:
    """Perplexity on the evaluation text, None without one."""
    if inputs.evaluation is None:
        return None
    return evaluate.perplexity(subject.model, inputs.evaluation, subject.window)


def counted(bits: dict[str, Tensor], subject: Subject) -> dict[str, Any]:
    """What the masks say: weights in pruned linears, and the share of them that is gone."""
    total = sum(block.weights for block in subject.blocks)
    kept = sum(
        int(masks.unpack(bits[name], linear.in_features).sum())
        for b in subject.blocks
        for name, linear in b.linears.items()
    )
    return {"weights": total, "kept": kept, "sparsity": 1 - kept / total}


def tell(run: Run, record: dict[str, Any], recipe: Recipe, seconds: float) -> None:
    """One line and one log entry a step."""
    run.log("step", **record, seconds=round(seconds, 3))
    rates, ranks = record["rates"].values(), record["ranks"]
    line = f"step {record['step']}/{recipe.steps}: sparsity {recipe.sparsity_at(record['step']):.3f}"
    line += f" ({min(rates):.3f} to {max(rates):.3f}), error {max(record['errors']):.3f} at worst"
    line += f", ranks {min(ranks)} to {max(ranks)}" if ranks else ""
    run.say(f"{line}, {seconds:.0f} s")


def finished(output: Path | None, recipe: Recipe, tokenizer: Any) -> Result:
    """The result of a run that has nothing left to do."""
    assert output is not None
    made = json.loads((output / "losa.json").read_text())
    return Result(model.load(str(output), recipe), tokenizer, recipe, made["measurements"], made["history"], output)


# ------------------------------------------------------------------------------------------------- before it begins


def check(source: Any, recipe: Recipe, output: Path | None, overwrite: bool = False, resume: bool = False) -> Any:
    """Everything that can be known to be wrong before anything large is read; returns the model's configuration."""
    recovery = registry.get("recovery", recipe.recovery)
    if not recovery.merges and recipe.steps > 1:
        raise LosaError(
            f"recovery {recipe.recovery!r} does not merge, so that only one step is possible: set steps to 1"
        )
    data.check_source(recipe.calibration, "calibrate")
    if recovery.trains:
        data.check_source(recipe.train_data, "train")
    if recipe.eval_data:
        data.check_source(recipe.eval_data, "evaluate")
    model.choose_device(recipe.device)
    if output and not resume:
        check_output(output, overwrite)
    config = model.load_config(source) if isinstance(source, str) else source.config
    blocks = model.find_blocks(model.skeleton(config) if isinstance(source, str) else source, recipe.ignore)
    if recovery.trains:
        model.targeted([name for block in blocks for name in block.linears], recipe)
    limit = model.longest_text(config)
    for name in ("sequence_length", "train_length"):
        if getattr(recipe, name) > limit:
            raise LosaError(f"{name} is {getattr(recipe, name)}: the model reads at most {limit} tokens")
    return config


def read(recipe: Recipe, tokenizer: Any) -> Inputs:
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
    evaluation = data.evaluation_tokens(recipe.eval_data, tokenizer) if recipe.eval_data else None
    if evaluation is not None and recipe.eval_tokens:
        evaluation = evaluation[: recipe.eval_tokens]
    return Inputs(tokens, examples, evaluation)


def sampled_positions(recipe: Recipe, inputs: Inputs) -> Tensor | None:
    """Tokens whose dense features are kept, sorted; None: all."""
    total = inputs.calibration.numel()
    if recipe.error_tokens == 0 or recipe.error_tokens >= total:
        return None
    generator = torch.Generator().manual_seed(recipe.seed)
    return torch.randperm(total, generator=generator)[: recipe.error_tokens].sort().values


def rmi_samples(recipe: Recipe) -> int:
    return min(recipe.rmi_samples, recipe.calibration_samples)


def device_of(subject: Subject, recipe: Recipe) -> torch.device:
    """Where blocks compute: they visit it one at a time if the model lives elsewhere."""
    return model.choose_device(recipe.device)
