"""The whole algorithm: for each step, rates -> masks -> errors -> ranks -> recovery; then merge and save (paper, section 2.4)."""

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losa import (
    calibration,
    data,
    distributed,
    evidence,
    export,
    gradients,
    masks,
    model,
    ranks,
    registry,
    structure,
)
from losa.allocators.base import Evidence
from losa.blocks import Block, Subject, prunable
from losa.errors import LosaError
from losa.inputs import Inputs, allocation_samples, check_same, fingerprint
from losa.measuring import measure, measure_step, sample
from losa.model import ADAPTER
from losa.progress import Progress
from losa.pruners.base import Pruner
from losa.pruning import of_all, prune_block, reconstruction_error, sampled_positions
from losa.recipe import Recipe, recipe_of
from losa.recovery.base import Recovery
from losa.recovery.distillation import Teacher, teacher_of
from losa.recovery.low_rank import MaskedLowRank
from losa.recovery.rate import with_rate
from losa.recovery.reconstruction import reconstruct, sequences, target_of
from losa.run import Run
from losa.shrink import OURS, PLAIN, shrink
from losa.sparse.linear import pack_model
from losa.starting import Result, device_of, start


@dataclass
class Dense:
    """What is remembered of the dense model."""

    features: (
        Sequence[Tensor] | Tensor
    )  # by block [tokens, hidden]: what it put out, at a seeded sample of this process's tokens
    grams: Tensor  # float64 [blocks, n, n]; n = 0 if no allocator asks for them
    measured: dict[str, Any]  # perplexity, size


@dataclass
class State:
    """Where a run stands: `done` steps are pruned; the last of them may still be in recovery."""

    done: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def compress(
    source: Any,
    recipe: Recipe | dict[str, Any] | str | Path,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Prune `source`, win its quality back, merge, save.

    source: a local folder, a name on the hub, `demo`, or a loaded causal language model, which is changed in place and
    needs its `tokenizer` unless it was loaded from where that lies, too. recipe: a Recipe, a dict of settings that differ from
    its defaults, or the name or file of one. output: a new folder
    that becomes an ordinary Hugging Face model with losa.json and masks.safetensors beside it, and holds the run in
    run/; None saves nothing. resume: go on with the run in `output`. Several processes that torchrun started do it
    together, each with its share of the sequences and rows; rank 0 writes, and all return the same.
    Raises LosaError for bad input, before the model loads where it can be known by then.
    """
    made = recipe_of(recipe)
    if not made.prunes:
        raise LosaError("compress prunes: give it a Recipe, and a Repair to losa.recover")

    def begin(subject: Subject, recipe: Recipe, inputs: Inputs) -> Callable[[Run], Result]:
        from losa import from_disk

        work = from_disk.compress if subject.home else _compress
        return lambda run: work(subject, recipe, inputs, run)

    return start(source, made, output, begin, tokenizer, resume, overwrite, progress)


def _compress(subject: Subject, recipe: Recipe, inputs: Inputs, run: Run) -> Result:
    recovery = recipe.build("recovery")
    first = finetune(subject, recipe, inputs, run) if recipe.finetune_first else None
    dense = remember_dense(subject, recipe, inputs, run)
    subject.dense = copy.deepcopy(subject.model) if recipe.needs_dense_copy else None
    subject.teacher = teach(subject, recipe, inputs, run)
    subject.wrap(recovery.layer, recipe, recipe.max_rank if recovery.ranks else 0)
    if recipe.structured:
        structure.prepare(subject.blocks, recipe.build("pruner"))
    state = restore(subject, run)

    for step in range(max(1, state.done), recipe.steps + 1):
        began = time.monotonic()
        if step > state.done:
            rates = allocate(subject, recipe, step, inputs, dense, state, run)
            with run.phase("pruning", step):
                errors, unreached = prune(subject, recipe, step, rates, inputs, dense, run)
            left = {"pruned": measure_step(subject, recipe, inputs, step, run)}
            chosen = set_ranks(subject, recipe, step, recipe.rank_by, errors) if recovery.ranks else []
            record = {"step": step, "rates": rates, "errors": errors, "ranks": chosen, "unreached": unreached}
            state.history.append(record | reached(subject) | {"perplexity": left})
            state.done = step
            distributed.check_alike(digests(subject))
            save(subject, state, run)
        rows = recipe.rows_of(step)
        examples = inputs.examples[rows.start : rows.stop]
        recover_step(subject, recovery, examples, recipe, step, state.history, run)
        if recovery.trains:
            state.history[-1]["perplexity"]["recovered"] = measure_step(subject, recipe, inputs, step, run)
        tell(run, state.history[-1], recipe, time.monotonic() - began)

    distributed.check_alike(digests(subject))
    before = {"dense": dense.measured} if first is None else {"dense": first, "finetuned": dense.measured}
    return finish(subject, recipe, recovery, inputs, before, state, run)


def finish(
    subject: Subject,
    recipe: Recipe,
    recovery: Recovery,
    inputs: Inputs,
    before: dict[str, Any],
    state: State,
    run: Run,
) -> Result:
    """Merge, measure, save. `before`: what was measured of the models that this one was made from."""
    if recovery.merges:
        with run.phase("merging"):
            pairs, bits = None, subject.merge()
            found = counted(bits, subject)
            if recipe.structured:
                bits, found["loads"] = shrink(subject, bits)
            elif recipe.format == "packed":
                bits, found["loads"] = pack(subject, bits, recipe, run)
        found |= measure(subject, recipe, inputs, run)
        sample(subject, recipe, inputs, "sparse", run)
    else:  # measured as it will be used: the sparse model with its pairs beside it
        found = measure(subject, recipe, inputs, run)
        sample(subject, recipe, inputs, "sparse", run)
        pairs, bits = export.take_pairs(subject), subject.merge()
        found |= counted(bits, subject) | {"loads": f"transformers, and PEFT for the pairs in {ADAPTER}/"}
        run.say(f"recovery {recipe.recovery!r} does not merge: its pairs stay apart, and what is measured is with them")
    subject.narrow()
    found["size"] = subject.size + sum(a.nbytes + b.nbytes for a, b in (pairs or {}).values())
    measurements = {**before, "sparse": found}
    with run.phase("saving"):
        path = export.save(subject, recipe, bits, pairs, measurements, state.history, run)
    run.log("finished", measurements=measurements)
    return Result(
        subject.model if recovery.merges else None, subject.tokenizer, recipe, measurements, state.history, path
    )


# ------------------------------------------------------------------------------------------------- the steps' parts


def finetune(subject: Subject, recipe: Recipe, inputs: Inputs, run: Run) -> dict[str, Any]:
    """Fine-tune the dense model by LoRA, merged, on its share of the rows: what is pruned then (paper, appendix C.4).

    The mask keeps everything as yet, so that the masked pairs are a plain LoRA. Returns what was measured before.
    """
    seen = fingerprint(subject, inputs)
    saved = run.load("finetuned")
    meta: dict[str, Any] = saved.meta if saved else {"seen": seen, "history": [{}]}
    check_same(meta, seen)
    if not saved:
        meta["measured"] = first_look(subject, recipe, inputs, run)
        run.log("dense", **meta["measured"])
    if saved and saved.tensors:
        for block in subject.blocks:
            for name, linear in block.linears.items():
                linear.weight.data.copy_(saved.tensors[name])
        subject.round()  # as `merge` has left all that it did not train
        return dict(meta["measured"])
    run.save("finetuned", {}, meta)
    recovery, examples = MaskedLowRank(), [inputs.examples[row] for row in recipe.rows_of(0)]
    subject.wrap(recovery.layer, recipe, recipe.max_rank)
    set_ranks(subject, recipe, 0, "uniform", [])
    recover_step(subject, recovery, examples, recipe, 0, meta["history"], run)
    subject.merge()
    subject.blocks = prunable(subject.model, recipe)
    weights = {name: linear.weight for block in subject.blocks for name, linear in block.linears.items()}
    run.save("finetuned", weights, meta)
    return dict(meta["measured"])


def first_look(subject: Subject, recipe: Recipe, inputs: Inputs, run: Run) -> dict[str, Any]:
    """What is measured of the model as it came; and samples of what it writes."""
    sample(subject, recipe, inputs, "dense" if recipe.prunes else "before", run)
    return measure(subject, recipe, inputs, run) | {"size": subject.size, "disk": model.disk_of(subject.source)}


def teach(subject: Subject, recipe: Recipe, inputs: Inputs, run: Run) -> Teacher | None:
    """The teacher that the recipe asks for, if any."""
    if not recipe.distill:
        return None
    with run.phase("teacher"):
        return teacher_of(subject, recipe, inputs, run)


def recover_step(
    subject: Subject,
    recovery: Recovery,
    examples: list[data.Example],
    recipe: Recipe,
    step: int,
    history: list[dict[str, Any]],
    run: Run,
) -> None:
    """Recover on `examples`, at a learning rate that is searched for first if the recipe says so."""
    if not recovery.trains:
        return
    if recipe.learning_rate == "auto":
        with run.phase("learning rate", step):
            recipe = with_rate(subject, recovery, examples, recipe, step, history, run)
    with run.phase("recovery" if step else "fine-tuning", step):
        recovery.recover(subject, examples, recipe, step, run)


def remember_dense(subject: Subject, recipe: Recipe, inputs: Inputs, run: Run) -> Dense:
    """One pass over the dense model: perplexity, features at a seeded sample of tokens, Gram matrices for the first step."""
    seen = fingerprint(subject, inputs)
    positions = sampled_positions(recipe.error_tokens, inputs.calibration.numel(), recipe.seed)
    if saved := run.load("dense"):
        check_same(saved.meta, seen)
        own = calibration.own_rows(positions, *inputs.calibration.shape)
        return Dense(saved.tensors["features"][:, own], saved.tensors["grams"], saved.meta["measured"])
    if recipe.finetune_first:
        measured = measure(subject, recipe, inputs, run) | {"size": subject.size}
    else:
        measured = first_look(subject, recipe, inputs, run)
    features, grams = [], []
    with run.phase("dense features"):
        stream = calibration.Stream(
            subject.model, subject.blocks, inputs.calibration, device_of(recipe), spill=subject.spill
        )
        for block in run.track(subject.blocks, "dense model"):
            stream.advance(block)
            features.append(stream.sample(positions).cpu())
            grams.append(stream.gram(allocation_samples(recipe)) if needs_grams(recipe) else torch.empty(0, 0))
    own_features, own_grams = torch.stack(features), torch.stack(grams)
    whole = distributed.collect(own_features.transpose(0, 1)).transpose(0, 1).contiguous()
    run.log("finetuned" if recipe.finetune_first else "dense", **measured)  # first: what is saved is never done again
    run.save("dense", {"features": whole, "grams": own_grams}, {"measured": measured, "seen": seen})
    return Dense(own_features, own_grams, measured)


def needs_grams(recipe: Recipe) -> bool:
    """Whether the first rates come from the dense model's Gram matrices."""
    return registry.get("allocator", recipe.allocator).needs == "grams" and recipe.kept.allocates


def allocate(
    subject: Subject, recipe: Recipe, step: int, inputs: Inputs, dense: Dense, state: State, run: Run
) -> dict[str, float]:
    """Sparsity by unit (blocks or linears, by their names), from the merged model as it stands (equations 4, 5, 6, 8)."""
    allocator = recipe.build("allocator")
    pattern, target = recipe.kept, recipe.sparsity_at(step)
    units = evidence.units_of(subject.blocks, recipe.rates_per)
    counts = [unit.weights for unit in units]
    before = state.history[-1]["rates"] if state.history else {}
    floors = [before.get(unit.name, 0.0) for unit in units]
    rates = [target] * len(units)
    if pattern.allocates:
        if allocator.needs == "grams" and step == 1:  # they were gathered on the way through the dense model
            seen = [dense.grams[unit.block.index] for unit in units]
        else:
            tokens = inputs.calibration[: allocation_samples(recipe)]
            with run.phase("rates", step):
                seen = evidence.gather(subject, recipe, allocator, step, units, floors, tokens, run)
        known = Evidence(target, counts, floors, seen or None, pattern.spread)
        rates = allocator.rates(known)
        run.log("rates", step=step, **allocator.explain(known))
    return dict(zip([unit.name for unit in units], pattern.nearest(rates, counts, target, floors), strict=True))


def prune(
    subject: Subject, recipe: Recipe, step: int, rates: dict[str, float], inputs: Inputs, dense: Dense, run: Run
) -> tuple[list[float], list[str]]:
    """New masks, block by block, each seeing the inputs that the pruned blocks before it make.

    Returns the blocks' reconstruction errors, and the experts that no calibration token reached.
    """
    pruner = recipe.build("pruner")
    unreached: list[str] = []
    if pruner.needs_gradients:
        unreached = prune_by_gradients(subject, recipe, step, rates, inputs, pruner, run)
    stream = calibration.Stream(
        subject.model, subject.blocks, inputs.calibration, device_of(recipe), sequences(recipe), subject.spill
    )
    target = target_of(subject, recipe, inputs.calibration, device_of(recipe))
    positions = sampled_positions(recipe.error_tokens, inputs.calibration.numel(), recipe.seed)
    errors = []
    for block in run.track(subject.blocks, f"step {step}/{recipe.steps}: pruning"):
        if target:
            target.advance(block)
        if recipe.structured:
            structure.prune_block(block, pruner, rates.get(block.name, 0.0), stream, recipe.true_sequential)
        elif not pruner.needs_gradients:
            amounts = recipe.amounts(block, rates)
            missed = prune_block(block, pruner, amounts, stream, true_sequential=recipe.true_sequential)
            unreached += experts_of(missed, run)
        if target:
            reconstruct(block, stream, target, recipe, step, run)
        if not recipe.trains:
            subject.round_block(block)
        stream.advance(block)
        errors.append(reconstruction_error(block.name, dense.features[block.index], stream.sample(positions).cpu()))
        run.note(f"error {errors[-1]:.3f}")
    return errors, unreached


def prune_by_gradients(
    subject: Subject, recipe: Recipe, step: int, rates: dict[str, float], inputs: Inputs, pruner: Pruner, run: Run
) -> list[str]:
    """New masks from the last block to the first, by gradients of the model as it stood before any of them.

    Returns the experts that no calibration token reached.
    """
    backward = gradients.Backward(subject.model, subject.blocks, inputs.calibration, device_of(recipe))
    unreached: list[str] = []
    for block in run.track(subject.blocks[::-1], f"step {step}/{recipe.steps}: gradients"):
        # what lies before a block does not see it, so that it can be pruned at once and its gradients forgotten
        statistics, missed = of_all(*backward.gather(block, pruner), backward.fresh(block, pruner))
        prune_block(block, pruner, recipe.amounts(block, rates), backward.stream, statistics)
        del statistics  # before the next block's are made
        unreached += experts_of(missed, run)
    return unreached


def experts_of(missed: list[str], run: Run) -> list[str]:
    """The experts whose linears no token reached, said."""
    names = sorted({name.rpartition(".")[0] for name in missed})
    if names:
        run.say(f"no calibration token reached {', '.join(names)}: pruned by the weights alone")
    return names


def digests(subject: Subject) -> dict[str, str]:
    """What every process must agree on after a step: of each block, its masks, its pairs and some of its weights."""
    found = {}
    for block in subject.blocks if distributed.world() > 1 else []:
        digest = hashlib.sha256()
        for linear in block.masked.values():
            some = linear.weight.detach().flatten()[:: max(1, linear.weight.numel() // 1000)].float()
            for tensor in (linear.mask_bits, linear.lora_A, linear.lora_B, some):
                digest.update(b"" if tensor is None else tensor.detach().cpu().numpy().tobytes())
        found[f"the masks or weights of {block.name}"] = digest.hexdigest()
    return found


def set_ranks(subject: Subject, recipe: Recipe, step: int, rank_by: str, errors: list[float]) -> list[int]:
    """Rank of every block by its error (equation 7), its sparsity, or uniform; the outputs do not move.

    The mean is that of the blocks with adapters; others have rank 0.
    """
    adapted = [block for block in subject.blocks if any(linear.max_rank for linear in block.masked.values())]
    weight: dict[str, Callable[[Block], float]] = {
        "error": lambda block: errors[block.index],
        "sparsity": sparsity_of,
        "uniform": lambda _: 1.0,
    }
    weights = [weight[rank_by](block) for block in adapted]
    generator = torch.Generator().manual_seed(recipe.seed * 1000 + step)
    chosen = [0] * len(subject.blocks)
    for block, rank in zip(adapted, ranks.apportion(weights, recipe.mean_rank_at(step), recipe.max_rank), strict=True):
        chosen[block.index] = rank
        for linear in block.masked.values():
            if linear.max_rank:
                linear.set_rank(rank, generator)
    return chosen


def reached(subject: Subject) -> dict[str, Any]:
    """What the masks prune, of every block and of all their weights."""
    rates, counts = [sparsity_of(block) for block in subject.blocks], [block.weights for block in subject.blocks]
    mean = sum(rate * count for rate, count in zip(rates, counts, strict=True)) / sum(counts)
    return {"sparsity": rates, "mean_sparsity": mean}


def sparsity_of(block: Block) -> float:
    """The share of a block's prunable weights that its masks prune."""
    kept = sum(int(linear.mask.count_nonzero()) for linear in block.masked.values())
    return 1 - kept / block.weights if block.weights else 0.0


def pack(subject: Subject, bits: dict[str, Tensor], recipe: Recipe, run: Run) -> tuple[dict[str, Tensor], str]:
    """Pack the merged model's linears, in place. Returns the masks of those that stay dense, and what loads the model."""
    values = torch.int8 if recipe.values == "int8" else None
    packed = pack_model(subject.model, bits, subject.stored, values)
    for block in subject.blocks:
        block.linears |= {name: linear for name, linear in packed.items() if name in block.linears}
    dense = {name: mask for name, mask in bits.items() if name not in packed}
    if dense:
        run.say(f"{len(dense)} of {len(bits)} linears stay dense (experts, or packed no smaller), such as {min(dense)}")
    return dense, OURS if packed else PLAIN


# ---------------------------------------------------------------------------------------------- what is kept and told


def save(subject: Subject, state: State, run: Run) -> None:
    """The state after pruning: base weights, biases, masks, pairs, ranks."""
    tensors: dict[str, Tensor] = {}
    for block in subject.blocks:
        for name, linear in block.masked.items():
            tensors |= {f"{name}:{key}": value for key, value in linear.state_dict().items()}
    run.log("pruned", **state.history[-1])  # first: what is saved is never done again
    run.save("pruned", tensors, {"done": state.done, "history": state.history})


def restore(subject: Subject, run: Run) -> State:
    """The state that `save` left, put into the model; a fresh one if there is none. Raises LosaError if it is not whole."""
    saved = run.load("pruned")
    if saved is None:
        return State()
    for block in subject.blocks:
        for name, linear in block.masked.items():
            try:
                linear.load_state_dict({key: saved.tensors[f"{name}:{key}"] for key in linear.state_dict()})
            except KeyError as error:
                raise LosaError(f"{run.path('pruned')} is damaged (no {error}): start a new run") from None
    return State(saved.meta["done"], saved.meta["history"])


def counted(bits: dict[str, Tensor], subject: Subject) -> dict[str, Any]:
    """What the masks say: weights in pruned linears, and the share of them that is gone."""
    total = sum(block.weights for block in subject.blocks)
    kept = sum(
        int(masks.unpack(bits[name], linear.in_features).count_nonzero())
        for b in subject.blocks
        for name, linear in b.linears.items()
    )
    return {"weights": total, "kept": kept, "sparsity": 1 - kept / total}


def tell(run: Run, record: dict[str, Any], recipe: Recipe, seconds: float) -> None:
    """One line and one log entry a step."""
    run.log("step", **record, seconds=round(seconds, 3))
    rates, ranks = record["rates"].values(), record["ranks"]
    asked, found = (f"{rate:.3f}" for rate in (recipe.sparsity_at(record["step"]), record["mean_sparsity"]))
    line = f"step {record['step']}/{recipe.steps}: sparsity {asked} ({min(rates):.3f} to {max(rates):.3f})"
    line += f", {found} reached" if found != asked else ""  # whole heads, and few of them
    line += f", error {max(record['errors']):.3f} at worst" if record["errors"] else ""
    line += f", ranks {min(ranks)} to {max(ranks)}" if ranks else ""
    run.say(f"{line}, {seconds:.0f} s")
