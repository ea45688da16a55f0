"""One-shot pruning from disk to disk: the pipeline's one step without recovery, for a model that is never in memory whole.

A first pass over the dense model, then rates, then a second: each block comes, is pruned, rounded and written, and goes.
Weights, masks and measurements are those of the pipeline, bit for bit.
"""

import time
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from losa import evaluate, heap, model, pipeline, registry
from losa.blocks import Block, Subject
from losa.calibration import Stream
from losa.inputs import Inputs, allocation_samples, check_same, fingerprint
from losa.pipeline import Dense
from losa.pruning import prune_block, reconstruction_error, sampled_positions
from losa.recipe import Recipe
from losa.recovery.reconstruction import reconstruct, sequences, target_of
from losa.run import Run
from losa.shards import Shards
from losa.starting import Result, device_of


@heap.returned_at_once()
def compress(subject: Subject, recipe: Recipe, inputs: Inputs, run: Run) -> Result:
    """Prune `subject`, whose weights are on disk, into the run's folder; the result's model is None, it is there.

    What the pipeline does, but that the model continues no prompts.
    """
    assert subject.home is not None
    began = time.monotonic()
    shards = Shards(subject, run)
    dense = remember_dense(subject, recipe, inputs, run)
    subject.wrap(registry.get("recovery", recipe.recovery).layer, recipe, 0)
    rates = allocate(subject, recipe, inputs, dense, run)
    subject.home.written = shards.written
    with run.phase("pruning", 1):
        pruned, sparse = prune(subject, recipe, rates, inputs, dense, shards, run)
        shards.write_rest()

    found = [shards.read(block) for block in subject.blocks]
    counts, kept = [block.weights for block in subject.blocks], [meta["kept"] for meta in found]
    by_block = [1 - k / n if n else 0.0 for k, n in zip(kept, counts, strict=True)]
    record = {
        "step": 1,
        "rates": rates,
        "errors": [meta["error"] for meta in found],
        "ranks": [],
        "unreached": [name for meta in found for name in meta["unreached"]],
        "sparsity": by_block,
        "mean_sparsity": sum(rate * count for rate, count in zip(by_block, counts, strict=True)) / sum(counts),
        "perplexity": {"pruned": pruned["sample_perplexity"]},
    }
    run.log("pruned", **record)
    pipeline.tell(run, record, recipe, time.monotonic() - began)
    sparse |= {"weights": sum(counts), "kept": sum(kept), "sparsity": 1 - sum(kept) / sum(counts), "size": subject.size}
    measurements = {"dense": dense.measured, "sparse": sparse}
    with run.phase("saving"):
        path = shards.finish(recipe, measurements, [record])
    run.log("finished", measurements=measurements)
    return Result(None, subject.tokenizer, recipe, measurements, [record], path)


def prune(
    subject: Subject,
    recipe: Recipe,
    rates: dict[str, float],
    inputs: Inputs,
    dense: Dense,
    shards: Shards,
    run: Run,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each block is pruned on the inputs that the pruned blocks before it make, and written.

    Those that a killed run has written come as they are. Returns what was measured of the pruned model before it was
    merged (on the sample of the text), and after.
    """
    assert subject.home is not None
    pruner, tokens, device = recipe.build("pruner"), inputs.calibration, device_of(recipe)
    stream = Stream(subject.model, subject.blocks, tokens, device, sequences(recipe), subject.spill)
    target = target_of(subject, recipe, tokens, device)
    before, after = Text(subject, recipe, inputs, ("sample_perplexity",)), Text(subject, recipe, inputs)
    positions = sampled_positions(recipe.error_tokens, tokens.numel(), recipe.seed)
    finished = sum(shards.written(block.index) is not None for block in subject.blocks)
    for block in run.track(subject.blocks, "step 1/1: pruning"):
        done = block.index < finished
        if finished == len(subject.blocks) and inputs.evaluation is None:  # nothing is behind them
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
            before.advance(block)
            bits = subject.merge_block(block)
            after.advance(block)
            if not done:
                error = reconstruction_error(block.name, dense.features[block.index], stream.sample(positions).cpu())
                run.note(f"error {error:.3f}")
                shards.write(block, bits, {"error": error, "unreached": pipeline.experts_of(missed, run)})
    return before.measure(), after.measure()


def remember_dense(subject: Subject, recipe: Recipe, inputs: Inputs, run: Run) -> Dense:
    """One pass over the dense model, as the pipeline's; the features stay on disk too."""
    seen = fingerprint(subject, inputs)
    if saved := run.load("dense"):
        check_same(saved.meta, seen)
        return Dense(Features(run, len(subject.blocks)), saved.tensors["grams"], saved.meta["measured"])
    if inputs.prompts:
        run.say("the model stays on disk: it continues no prompts")
    positions = sampled_positions(recipe.error_tokens, inputs.calibration.numel(), recipe.seed)
    grams = []
    with run.phase("dense features"):
        stream = Stream(subject.model, subject.blocks, inputs.calibration, device_of(recipe), spill=subject.spill)
        text = Text(subject, recipe, inputs)
        for block in run.track(subject.blocks, "dense model"):
            with block.present():
                stream.advance(block)
                text.advance(block)
            run.save(f"dense-{block.index:05}", {"features": stream.sample(positions).cpu()}, {})
            needed = pipeline.needs_grams(recipe)
            grams.append(stream.gram(allocation_samples(recipe)) if needed else torch.empty(0, 0))
        measured = text.measure() | {"size": subject.size, "disk": model.disk_of(subject.source)}
    dense = Dense(Features(run, len(subject.blocks)), torch.stack(grams), measured)
    run.log("dense", **measured)
    run.save("dense", {"grams": dense.grams}, {"measured": measured, "seen": seen})
    return dense


class Text:
    """The evaluation text and the sample of it, on their way through the blocks; `names` of those that are wanted.

    What `losa.measuring` does with a model in memory: a model on disk is not read again for it.
    """

    def __init__(
        self,
        subject: Subject,
        recipe: Recipe,
        inputs: Inputs,
        names: Sequence[str] = ("perplexity", "sample_perplexity"),
    ) -> None:
        self._subject, self._streams = subject, {}  # type: Subject, dict[str, Stream]
        self.names, self.tokens, self.window, text = names, 0, None, inputs.evaluation
        if text is None:
            return
        window = self.window = model.reading_window(subject.model.config, recipe.eval_window)
        wanted, self.tokens = recipe.eval_step_tokens, evaluate.whole_windows(text, window).numel()
        texts = {"perplexity": text}
        if wanted and ("perplexity" not in names or wanted < len(text)):  # else it is all of it
            texts["sample_perplexity"] = evaluate.spread(text, window, wanted)
        self._same = wanted >= len(text)
        for name, part in texts.items():
            if name in names:
                windows = evaluate.whole_windows(part, min(window, len(part)) if name != "perplexity" else window)
                place = device_of(recipe)
                self._streams[name] = Stream(subject.model, subject.blocks, windows, place, spill=subject.spill)

    def advance(self, block: Block) -> None:
        """Move on through `block`, as it is."""
        for stream in self._streams.values():
            stream.advance(block)

    def measure(self) -> dict[str, Any]:
        """Behind all blocks: the perplexities, None of what is not wanted or not there, and how many tokens were read, and
        at once."""
        found: dict[str, Any] = dict.fromkeys(("perplexity", "sample_perplexity"))
        found |= {"tokens": self.tokens, "window": self.window}
        for name, stream in self._streams.items():
            found[name] = evaluate.perplexity_behind(stream, self._subject.model, self._subject.blocks)
        if self._streams and "perplexity" in self.names and self._same:
            found["sample_perplexity"] = found["perplexity"]
        return found


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


def allocate(subject: Subject, recipe: Recipe, inputs: Inputs, dense: Dense, run: Run) -> dict[str, float]:
    """Sparsity by unit, once: what is on disk changes from here on."""
    if saved := run.load("rates"):
        rates: dict[str, float] = saved.meta["rates"]
        return rates
    rates = pipeline.allocate(subject, recipe, 1, inputs, dense, pipeline.State(), run)
    run.save("rates", {}, {"rates": rates})
    return rates
