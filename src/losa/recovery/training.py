"""The training loop of every recovery method: AdamW, linear warm-up and decay, clipped gradients, rows in their order."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losa import data, distributed
from losa.blocks import Subject
from losa.errors import Diverged
from losa.recipe import Recipe
from losa.recovery import footprint
from losa.recovery.distillation import mixed_loss

if TYPE_CHECKING:
    from losa.run import Run


def train(
    subject: Subject,
    parameters: dict[str, nn.Parameter],
    examples: list[data.Example],
    recipe: Recipe,
    step: int,
    run: "Run",
    between: "Between | None" = None,
) -> None:
    """Minimise the recipe's loss over `parameters` (all others stay frozen), so many times over `examples` as it says.

    The loss is that of the next token, mixed with the divergence from `subject.teacher` if the recipe distils. The learning rate rises over the first `warmup` share of the updates and falls linearly to zero. Goes on from the
    checkpoint of this step in `run`, if there is one, as if it had never stopped. The model stays in eval mode: no dropout.
    `between`: what else happens at each update. Raises Diverged if the loss is not finite.
    """
    between = between or Between()
    order = order_of(len(examples), recipe)
    batches = [order[i : i + recipe.batch_size] for i in range(0, len(order), recipe.batch_size)]
    first = recipe.rows_of(step).start
    with footprint.prepared(subject, recipe, parameters.values()) as (whole, optimizer):
        done = _restore(run, step, parameters, optimizer, between)
        for update in run.track(range(done, len(batches)), f"step {step}/{recipe.steps}: recovery", "update", done):
            rate = recipe.peak_rate * share_of_peak(update, len(batches), recipe.warmup)
            optimizer.param_groups[0]["lr"] = rate
            rows = [first + i for i in batches[update]]
            loss = accumulate(subject, whole, [examples[i] for i in batches[update]], rows, recipe)
            loss = sum_over_processes(loss, parameters.values()) + between.penalise()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(
                    f"step {step}, update {update + 1}: loss {loss}, gradient norm {norm:.3g}: lower learning_rate "
                    f"({recipe.peak_rate:g}) or clip ({recipe.clip:g})"
                )
            optimizer.step()
            between.updated(update)
            optimizer.zero_grad()
            run.note(f"loss {loss:.3f}")
            run.log("update", step=step, update=update + 1, of=len(batches), loss=loss, norm=float(norm), rate=rate)
            if run.checkpoint_due(recipe.checkpoint_minutes):
                _save(run, step, update + 1, parameters, optimizer, between)
        _save(run, step, len(batches), parameters, optimizer, between)


class Between:
    """What a recovery does at each update beside AdamW's own: nothing, unless it is a subclass."""

    def penalise(self) -> float:
        """Add the gradients of a term of its own to those of the loss, and return that term."""
        return 0.0

    def updated(self, update: int) -> None:
        """AdamW has made update `update` (from 0); the gradients are still there."""

    def tensors(self) -> dict[str, Tensor]:
        """Its state, contiguous, for a checkpoint."""
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the state from what `tensors` gave: the parameters are as that checkpoint has them."""


def order_of(rows: int, recipe: Recipe) -> list[int]:
    """The rows in which they are read: in order at first, then once in each further epoch, in a seeded order."""
    order = list(range(rows))
    for epoch in range(1, recipe.epochs):
        generator = torch.Generator().manual_seed(recipe.seed * 1000 + epoch)
        order += torch.randperm(rows, generator=generator).tolist()
    return order


def updates_of(examples: list[data.Example], recipe: Recipe) -> int:
    """How many updates `train` makes of `examples`."""
    return -(-len(examples) * recipe.epochs // recipe.batch_size)


def share_of_peak(update: int, updates: int, warmup: float) -> float:
    """The learning rate of an update (from 0) over the peak: linear rise over warmup * updates, then linear fall towards 0."""
    rise = math.ceil(warmup * updates)
    return (update + 1) / rise if update < rise else (updates - update) / max(1, updates - rise)


def accumulate(subject: Subject, whole: nn.Module, batch: list[data.Example], rows: list[int], recipe: Recipe) -> float:
    """Add the gradients of the mean loss over all labels of `batch`, some rows at a time; returns that loss.

    whole: the subject's model, as it is trained. rows: the numbers of the examples among all recovery rows, by which a
    teacher knows them. Of several processes: this one's part of it, from its share of the rows; the sum over all is it.
    """
    size = recipe.micro_batch_size
    device = next(whole.parameters()).device
    labels = sum(int((example.labels[1:] != data.IGNORED).sum()) for example in batch)
    own = distributed.own_range(len(batch))
    most = -(-len(batch) // distributed.world())
    total = 0.0
    for start in range(0, most, size):
        part = batch[own.start : own.stop][start : start + size]
        counts = bool(part)
        if not counts:  # a sharded model runs in all processes together: one without rows reads one that counts nothing
            part = [data.Example(batch[0].input_ids, torch.full_like(batch[0].labels, data.IGNORED))]
        inputs = {
            k: v.to(device) for k, v in data.collate(part, subject.pad_id, footprint.padded(whole, recipe)).items()
        }
        if subject.teacher is not None and counts:
            said = subject.teacher.predict(rows[own.start : own.stop][start : start + size], inputs)
            total += mixed_loss(whole, inputs, said, recipe, labels)
            continue
        loss = next_token_loss(whole, **inputs) / labels
        loss.backward()
        total += loss.item()
    return total


def sum_over_processes(loss: float, parameters: Iterable[nn.Parameter]) -> float:
    """The gradients in place, in fp32, and the loss, returned, become their sums over all processes."""
    parameters = list(parameters)
    # an expert's pair has no gradient where no token reached it, and keeps none if that is so everywhere
    counts = torch.tensor([loss, *(p.grad is not None for p in parameters)], dtype=torch.float64)
    distributed.sum_([counts])
    reached = [p for p, count in zip(parameters, counts[1:].tolist(), strict=True) if count]
    distributed.sum_([_gradient(p) for p in reached], torch.float32)
    return counts[0].item()


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def next_token_loss(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over the labels that count, in fp32 whatever the model computes in. All int64 [rows, tokens]."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=data.IGNORED, reduction="sum"
    )


def _save(
    run: "Run",
    step: int,
    update: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    between: Between,
) -> None:
    tensors = {f"between:{key}": value for key, value in between.tensors().items()}
    for name, parameter in parameters.items():
        tensors[f"{name}:value"] = parameter.data
        tensors |= {f"{name}:{key}": value for key, value in footprint.state_of(optimizer, parameter).items()}
    run.save("recovery", tensors, {"step": step, "update": update})


def _restore(
    run: "Run", step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, between: Between
) -> int:
    """Updates already made in this step; parameters and optimizer are set to how they were then."""
    saved = run.load("recovery")
    if saved is None or saved.meta["step"] != step:
        return 0
    for name, parameter in parameters.items():
        parameter.data.copy_(saved.tensors[f"{name}:value"])
        prefix = f"{name}:"
        state = {key.removeprefix(prefix): v for key, v in saved.tensors.items() if key.startswith(prefix)}
        del state["value"]
        footprint.put_state(optimizer, parameter, state)
    own = "between:"
    between.load({key.removeprefix(own): value for key, value in saved.tensors.items() if key.startswith(own)})
    return int(saved.meta["update"])
