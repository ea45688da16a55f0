"""The learning rate, chosen by short trials: the best on held-out rows of the recovery data, in factors of two."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from losa import data, distributed, sharding
from losa.adapters import MaskedLinear
from losa.blocks import Subject
from losa.errors import Diverged, LosaError
from losa.recipe import Recipe
from losa.recovery.base import Recovery
from losa.recovery.training import next_token_loss
from losa.run import Run

START = 2e-3
LOWEST, HIGHEST = 1e-5, 0.1
TRIAL = 24  # updates of a trial, at most
HELD = 64  # rows that a trial is judged by, at most a fifth of what there is


class Trial(Run):
    """What a trial takes for its run: keeps nothing, and shows only how far it is, as `what`."""

    def __init__(self, run: Run, what: str) -> None:
        super().__init__(None, run.progress)
        self.what = what

    def track(self, items: Sequence[Any], what: str, unit: str = "block", done: int = 0) -> Iterator[Any]:
        return super().track(items, self.what, unit, done)

    def say(self, line: str) -> None:
        pass


def with_rate(
    subject: Subject,
    recovery: Recovery,
    examples: list[data.Example],
    recipe: Recipe,
    step: int,
    history: list[dict[str, Any]],
    run: Run,
) -> Recipe:
    """`recipe` with a number for its learning rate, searched for if it says auto; the step's record is told.

    The first step searches, and so do the last, which has most rows and all of the sparsity, and step 0, the fine-tuning of
    the dense model; those between take the first's.
    """
    if recipe.learning_rate != "auto" or not examples:
        return recipe
    saved = run.load("rate")
    if saved and saved.meta["step"] == step:
        rate = saved.meta["rate"]
    elif step in (0, 1, recipe.steps):
        rate = choose_rate(subject, recovery, examples, recipe, step, run)
        run.save("rate", {}, {"step": step, "rate": rate})
    else:
        rate = history[0]["learning_rate"]
    history[-1]["learning_rate"] = rate
    return recipe.at(learning_rate=rate)


def choose_rate(
    subject: Subject, recovery: Recovery, examples: list[data.Example], recipe: Recipe, step: int, run: Run
) -> float:
    """The learning rate whose trial leaves the lowest next-token loss on rows that no trial has seen.

    A trial is a whole recovery, warm-up and decay included, of few updates; then the model is put back as it was. From
    START on, in the direction that is better as long as it is. What diverges loses, and below it there may be one that does not.
    Raises LosaError if everything does.
    """
    held = examples[-max(1, min(HELD, len(examples) // 5)) :]
    rows = examples[: min(TRIAL * recipe.batch_size, len(examples) - len(held)) or 1]
    linears = [linear for block in subject.blocks for linear in block.masked.values()]
    before = [_trained(linear, recovery) for linear in linears]
    found: dict[float, float] = {}

    def trial(rate: float) -> float:
        if rate not in found and LOWEST <= rate <= HIGHEST:
            brief = recipe.at(learning_rate=rate, epochs=1)
            try:
                recovery.recover(subject, rows, brief, step, Trial(run, f"step {step}/{recipe.steps}: trying {rate:g}"))
                loss = held_out_loss(subject, held, recipe)
                found[rate] = loss if math.isfinite(loss) else math.inf  # NaN is not more than anything
            except Diverged:
                found[rate] = math.inf
            for linear, state in zip(linears, before, strict=True):
                linear.load_state_dict(state, strict=False)  # what is not in it has not moved
            run.log("trial", step=step, rate=rate, loss=found[rate] if math.isfinite(found[rate]) else None)
        return found.get(rate, math.inf)

    best = START
    while trial(2 * best) < trial(best):
        best *= 2
    while best <= START and (trial(best / 2) < trial(best) or (trial(best) == math.inf and best / 2 >= LOWEST)):
        best /= 2
    if trial(best) == math.inf:
        raise LosaError(f"no learning rate from {min(found):g} to {max(found):g} trains: check the recovery data")
    run.say(f"step {step}/{recipe.steps}: learning rate {best:g}, of {len(found)} tried")
    return best


def _trained(linear: MaskedLinear, recovery: Recovery) -> dict[str, torch.Tensor]:
    """A copy of what a trial changes of it: of pairs these and their rank, the weight stays; else the weight."""
    fixed = ("bias", "mask_bits", *(["weight"] if recovery.ranks else []))
    return {name: tensor.clone() for name, tensor in linear.state_dict().items() if name not in fixed}


@torch.no_grad()
def held_out_loss(subject: Subject, examples: list[data.Example], recipe: Recipe) -> float:
    """The mean next-token loss over all labels of `examples`. Several processes share the batches."""
    size = recipe.micro_batch_size
    batches = [
        data.collate(examples[i : i + size], subject.pad_id, recipe.train_length) for i in range(0, len(examples), size)
    ]
    labels = sum(int((batch["labels"][:, 1:] != data.IGNORED).sum()) for batch in batches)
    total = torch.zeros(1, dtype=torch.float64)
    with sharding.spread(subject, recipe) as whole:
        device = next(whole.parameters()).device
        for index, counts in distributed.turns(len(batches)):
            batch = {name: value.to(device) for name, value in batches[index].items()}
            loss = next_token_loss(whole, **batch).item()
            total += loss if counts else 0.0
    distributed.sum_([total])
    return total.item() / labels
