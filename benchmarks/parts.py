"""The parts of one of LoSA's steps, each by itself and timed: what benchmarks/authors.py and benchmarks/step.py share.

They are the pipeline's own functions, on a model with random weights and tokens drawn at random.
"""

import time
import types
from typing import Any

import torch

# of the paper: sequences that calibrate, and those of them that RMI reads; rows in an update, and of those at once
SAMPLES, RMI_SAMPLES, BATCH, MICRO = 128, 64, 8, 4
SPARSITY = 0.6
PAPER: dict[str, Any] = {
    "sparsity": SPARSITY,
    "calibration_samples": SAMPLES,
    "allocation_samples": RMI_SAMPLES,
    "batch_size": BATCH,
    "micro_batch_size": MICRO,
    "pruner": "wanda",
    "allocator": "rmi",
    "learning_rate": 2e-4,
    "weight_decay": 0.001,
    "clip": 0.3,
    "warmup": 0.3,
    "sample_tokens": 0,
}


def tokens(samples: int, length: int, seed: int, vocabulary: int = 512) -> torch.Tensor:
    """int64 [samples, length], drawn at random."""
    return torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


class Clock:
    """Wall and processor seconds from its making, or the last `lap`."""

    def __init__(self) -> None:
        self._began = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def lap(self) -> dict[str, float]:
        now = self._now()
        wall, processor = (after - before for after, before in zip(now, self._began, strict=True))
        self._began = now
        return {"seconds": round(wall, 2), "processor": round(processor, 2)}


class Parts:
    """`model`, pruned and recovered part by part; `settings` are the recipe's that differ from PAPER's."""

    def __init__(self, model: Any, length: int, settings: dict[str, Any]) -> None:
        from losa import pipeline
        from losa.blocks import subject_of
        from losa.inputs import Inputs
        from losa.progress import Progress
        from losa.recipe import from_settings
        from losa.run import Run

        self._pipeline, self._run = pipeline, Run(None, Progress(quiet=True))
        self.recipe = from_settings(PAPER | {"sequence_length": length, "train_length": length} | settings)
        self._vocabulary = model.config.vocab_size
        self._inputs = Inputs(tokens(self.recipe.calibration_samples, length, 1, self._vocabulary), [], None, [])
        self.subject = subject_of(model, types.SimpleNamespace(pad_token_id=0, eos_token_id=0), "random", self.recipe)
        self._length, self._dense, self._wrapped = length, None, False  # type: int, Any, bool

    def features(self) -> dict[str, Any]:
        """A pass over the dense model: its features, and the Gram matrices that RMI needs."""
        clock = Clock()
        self._dense = self._pipeline.remember_dense(self.subject, self.recipe, self._inputs, self._run)
        return {"features": clock.lap()}

    def wrap(self) -> None:
        """Masked linears in the place of the model's."""
        if not self._wrapped:
            self.subject.wrap(self.recipe.build("recovery").layer, self.recipe, self.recipe.max_rank)
        self._wrapped = True

    def pruning(self, rates: list[float] | None = None) -> dict[str, Any]:
        """RMI in a pass of its own, as from the second step on; then pruning, with the blocks' errors.

        At `rates`, or those that RMI gives.
        """
        from losa import evidence
        from losa.allocators.base import Evidence

        self.wrap()
        names = [block.name for block in self.subject.blocks]
        units = evidence.units_of(self.subject.blocks, "block")
        floors, allocator = [0.0] * len(units), self.recipe.build("allocator")
        clock = Clock()
        read = self._inputs.calibration[: self.recipe.allocation_samples]
        seen = evidence.gather(self.subject, self.recipe, allocator, 2, units, floors, read, self._run)
        known = Evidence(self.recipe.sparsity_at(1), [unit.weights for unit in units], floors, seen)
        chosen = allocator.rates(known)
        found: dict[str, Any] = {"rates": clock.lap()}
        by_name = dict(zip(names, rates or chosen, strict=True))
        errors, _ = self._pipeline.prune(self.subject, self.recipe, 1, by_name, self._inputs, self._dense, self._run)
        return found | {"pruning": clock.lap(), "errors": errors}

    def examples(self, sequences: int, length: int) -> list[Any]:
        """So many to train on."""
        from losa.data import Example

        return [Example(row, row.clone()) for row in tokens(sequences, length, 2, self._vocabulary)]

    def recovery(self, sequences: int) -> dict[str, Any]:
        """So many sequences of training, and the loss of the first MICRO before it."""
        from losa.recovery import training

        self.wrap()
        self._pipeline.set_ranks(self.subject, self.recipe, 1, "uniform", [])
        examples = self.examples(sequences, self._length)
        with torch.no_grad():
            first = torch.stack([row for row, _ in examples[:MICRO]]).to(self.subject.model.device)
            loss = training.next_token_loss(self.subject.model, first, torch.ones_like(first), first)
        clock = Clock()
        self.recipe.build("recovery").recover(self.subject, examples, self.recipe, 1, self._run)
        return {"recovery": clock.lap(), "loss": loss.item() / (MICRO * (self._length - 1))}
