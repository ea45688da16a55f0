"""The training loop of every recovery method: AdamW, linear warm-up and decay, clipped gradients, each row once."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losa import data
from losa.errors import LosaError
from losa.model import Subject
from losa.recipe import Recipe

if TYPE_CHECKING:
    from losa.run import Run


def train(
    subject: Subject,
    parameters: dict[str, nn.Parameter],
    examples: list[data.Example],
    recipe: Recipe,
    step: int,
    run: "Run",
    moved: Callable[[], None] = lambda: None,
) -> None:
    """Minimise next-token loss over `parameters` (all others stay frozen), one pass over `examples` in their order.

    The learning rate rises over the first `warmup` share of the updates and falls linearly to zero. Goes on from the
    checkpoint of this step in `run`, if there is one, as if it had never stopped. The model stays in eval mode: no dropout.
    `moved` is called whenever the parameters have changed: after each update, and once they are as the checkpoint has them.
    Raises LosaError if the loss is not finite.
    """
    batches = [examples[i : i + recipe.batch_size] for i in range(0, len(examples), recipe.batch_size)]
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    done = _restore(run, step, parameters, optimizer)
    moved()
    try:
        for update in run.track(range(done, len(batches)), f"step {step}/{recipe.steps}: recovery", done=done):
            rate = recipe.learning_rate * share_of_peak(update, len(batches), recipe.warmup)
            optimizer.param_groups[0]["lr"] = rate
            loss = accumulate(subject, batches[update], recipe.micro_batch_size)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise LosaError(
                    f"step {step}, update {update + 1}: loss {loss}, gradient norm {norm:.3g}: lower learning_rate "
                    f"({recipe.learning_rate:g}) or clip ({recipe.clip:g})"
                )
            optimizer.step()
            moved()
            optimizer.zero_grad()
            run.log("update", step=step, update=update + 1, of=len(batches), loss=loss, norm=float(norm), rate=rate)
            if run.checkpoint_due(recipe.checkpoint_minutes):
                _save(run, step, update + 1, parameters, optimizer)
        _save(run, step, len(batches), parameters, optimizer)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


def share_of_peak(update: int, updates: int, warmup: float) -> float:
    """The learning rate of an update (from 0) over the peak: linear rise over warmup * updates, then linear fall towards 0."""
    rise = math.ceil(warmup * updates)
    return (update + 1) / rise if update < rise else (updates - update) / max(1, updates - rise)


def accumulate(subject: Subject, batch: list[data.Example], size: int) -> float:
    """Add the gradients of the mean loss over all labels of `batch`, `size` rows at a time; returns that loss."""
    device = next(subject.model.parameters()).device
    labels = sum(int((example.labels[1:] != data.IGNORED).sum()) for example in batch)
    total = 0.0
    for start in range(0, len(batch), size):
        inputs = {k: v.to(device) for k, v in data.collate(batch[start : start + size], subject.pad_id).items()}
        loss = next_token_loss(subject.model, **inputs) / labels
        loss.backward()
        total += loss.item()
    return total


def next_token_loss(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over the labels that count, in fp32 whatever the model computes in. All int64 [rows, tokens]."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=data.IGNORED, reduction="sum"
    )


def _save(
    run: "Run", step: int, update: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"{name}:value"] = parameter.data
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{name}:{key}": value for key, value in state.items()}
    run.save("recovery", tensors, {"step": step, "update": update})


def _restore(run: "Run", step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> int:
    """Updates already made in this step; parameters and optimizer are set to how they were then."""
    saved = run.load("recovery")
    if saved is None or saved.meta["step"] != step:
        return 0
    for name, parameter in parameters.items():
        parameter.data.copy_(saved.tensors[f"{name}:value"])
        prefix = f"{name}:"
        state = {key.removeprefix(prefix): v for key, v in saved.tensors.items() if key.startswith(prefix)}
        del state["value"]
        # AdamW keeps its moments on the parameter's device
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    return int(saved.meta["update"])
