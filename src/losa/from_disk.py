"""One-shot pruning from disk to disk: the pipeline's one step without recovery, for a model that is never in memory whole.

A first pass over the dense model, then rates, then a second: each block comes, is pruned, rounded and written, and goes.
Weights, masks and measurements are those of the pipeline, bit for bit.
"""

import time
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from losa import evaluate, model, pipeline, registry
from losa.calibration import Stream
from losa.inputs import Inputs, allocation_samples, fingerprint
from losa.model import Subject
from losa.pruning import prune_block, reconstruction_error, sampled_positions
from losa.recipe import Recipe
from losa.recovery.reconstruction import reconstruct, sequences, target_of
from losa.run import Run
from losa.shards import Shards


def compress(subject: Subject, recipe: Recipe, inputs: Inputs, run: Run) -> pipeline.Result:
    """Prune `subject`, whose weights are on disk, into the run's folder. What `pipeline.compress` does, with model None."""
    assert subject.home is not None
    began = time.monotonic()
    shards = Shards(subject, run)
    dense = remember_dense(subject, recipe, inputs, run)
    subject.wrap(registry.get("recovery", recipe.recovery).layer, recipe, 0)
    rates = allocate(subject, recipe, inputs, dense, run)
    subject.home.written = shards.written

    pruner = recipe.build("pruner")
    tokens, device = inputs.calibration, pipeline.device_of(recipe)
    stream = Stream(subject.model, subject.blocks, tokens, device, sequences(recipe), subject.spill)
    target = target_of(subject, recipe, tokens, device)
    evaluation = evaluation_stream(subject, recipe, inputs)
    positions = sampled_positions(recipe.error_tokens, tokens.numel(), recipe.seed)
    finished = sum(shards.written(block.index) is not None for block in subject.blocks)
    for block in run.track(subject.blocks, "pruning"):
        done = block.index < finished  # in a run that was killed: it comes as it was written
        if done and finished == len(subject.blocks) and evaluation is None:
            continue
        if target and done:
            with subject.home.dense(block):
                target.advance(block)
        with block.present():
            missed: list[str] = []
            if not done:
                if target:
                    target.advance(block)
                amounts = recipe.amounts(block, rates)
                missed = prune_block(block, pruner, amounts, stream, true_sequential=recipe.true_sequential)
                if target:
                    reconstruct(block, stream, target, recipe, 1, run)
                subject.round_block(block)
            stream.advance(block)
            bits = subject.merge_block(block)
            if evaluation is not None:
                evaluation.advance(block)
            if not done:
                error = reconstruction_error(dense.features[block.index], stream.sample(positions).cpu())
                shards.write(block, bits, {"error": error, "unreached": pipeline.experts_of(missed, run)})
    perplexity = None if evaluation is None else evaluate.perplexity_behind(evaluation, subject.model, subject.blocks)
    del stream, target, evaluation
    shards.write_rest()

    found = [shards.read(block) for block in subject.blocks]
    weights = sum(block.weights for block in subject.blocks)
    kept = sum(meta["kept"] for meta in found)
    measurements = {
        "dense": {"perplexity": dense.perplexity},
        "sparse": {"perplexity": perplexity, "weights": weights, "kept": kept, "sparsity": 1 - kept / weights},
    }
    record = {
        "step": 1,
        "rates": rates,
        "errors": [meta["error"] for meta in found],
        "ranks": [],
        "unreached": [name for meta in found for name in meta["unreached"]],
    }
    pipeline.tell(run, record, recipe, time.monotonic() - began)
    path = shards.finish(recipe, measurements, [record])
    return pipeline.Result(None, subject.tokenizer, recipe, measurements, [record], path)


def remember_dense(subject: Subject, recipe: Recipe, inputs: Inputs, run: Run) -> pipeline.Dense:
    """One pass over the dense model, as the pipeline's; the features stay on disk too."""
    seen = fingerprint(subject, inputs)
    if saved := run.load("dense"):
        pipeline.check_seen(saved.meta["seen"], seen)
        return pipeline.Dense(Features(run, len(subject.blocks)), saved.tensors["grams"], saved.meta["perplexity"])
    stream = Stream(subject.model, subject.blocks, inputs.calibration, pipeline.device_of(recipe), spill=subject.spill)
    evaluation = evaluation_stream(subject, recipe, inputs)
    positions = sampled_positions(recipe.error_tokens, inputs.calibration.numel(), recipe.seed)
    needs_grams = pipeline.needs_grams(recipe)
    grams = []
    for block in run.track(subject.blocks, "dense model"):
        with block.present():
            stream.advance(block)
            if evaluation is not None:
                evaluation.advance(block)
        run.save(f"dense-{block.index:05}", {"features": stream.sample(positions).cpu()}, {})
        grams.append(stream.gram(allocation_samples(recipe)) if needs_grams else torch.empty(0, 0))
    perplexity = None if evaluation is None else evaluate.perplexity_behind(evaluation, subject.model, subject.blocks)
    dense = pipeline.Dense(Features(run, len(subject.blocks)), torch.stack(grams), perplexity)
    run.save("dense", {"grams": dense.grams}, {"perplexity": perplexity, "seen": seen})
    run.log("dense", perplexity=perplexity)
    return dense


class Features(Sequence[Tensor]):
    """What each block of the dense model put out, read when asked for."""

    def __init__(self, run: Run, blocks: int) -> None:
        self._run, self._blocks = run, blocks

    def __len__(self) -> int:
        return self._blocks

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(self._blocks)[index]]
        saved = self._run.load(f"dense-{index:05}")
        assert saved is not None, "the first pass has saved every block"
        features: Tensor = saved.tensors["features"]
        return features


def allocate(subject: Subject, recipe: Recipe, inputs: Inputs, dense: pipeline.Dense, run: Run) -> dict[str, float]:
    """Sparsity by unit, once: what is on disk changes from here on."""
    if saved := run.load("rates"):
        rates: dict[str, float] = saved.meta["rates"]
        return rates
    rates = pipeline.allocate(subject, recipe, 1, inputs, dense, pipeline.State(), run)
    run.save("rates", {}, {"rates": rates})
    return rates


def evaluation_stream(subject: Subject, recipe: Recipe, inputs: Inputs) -> Stream | None:
    """The evaluation text in front of the first block, None without one."""
    if inputs.evaluation is None:
        return None
    window = model.reading_window(subject.model.config, recipe.eval_window)
    windows = evaluate.whole_windows(inputs.evaluation, window)
    return Stream(subject.model, subject.blocks, windows, pipeline.device_of(recipe), spill=subject.spill)
