"""What recovery holds in memory, and how to hold less: blocks that run twice, 8-bit moments, weights spread over processes."""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losa import distributed, heap, sharding
from losa.blocks import Subject
from losa.errors import LosaError
from losa.model import choose_device
from losa.recipe import Recipe

MOMENTS = {"adamw": 8, "adamw-8bit": 2}  # bytes of a trained value's two


def estimate(recipe: Recipe, trained: int, seen: list[float], hidden: int, size: int) -> int:
    """Bytes that recovery takes at its peak, about, beside the model and the logits.

    trained: values, each with its gradient and moments, all but these in fp32; seen: values that a block keeps of a token for the way back;
    hidden: those it is given; size: bytes of one.
    """
    kept = max(seen) + hidden * len(seen) if recipe.checkpointing else sum(seen)
    return (8 + MOMENTS[recipe.optimizer]) * trained + round(kept * rows_at_once(recipe) * recipe.train_length) * size


def rows_at_once(recipe: Recipe) -> int:
    """Rows that go through the model of one process at once."""
    return min(recipe.micro_batch_size, -(-recipe.batch_size // distributed.launched()))


def padded(whole: nn.Module, recipe: Recipe) -> int:
    """Up to which length batches are padded to multiples: on a CPU, in bf16.

    There torch keeps the code of a product for each number of rows that it has met, 12 MB for a Llama's block, which lies in
    the way of all that comes later (docs/log.md).
    """
    parameter = next(whole.parameters())
    return recipe.train_length if parameter.device.type == "cpu" and parameter.dtype == torch.bfloat16 else 0


def check(recipe: Recipe) -> None:
    """Raise LosaError for an optimizer that is not there, or does not run on the recipe's device."""
    if recipe.optimizer == "adamw":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LosaError(
            f"optimizer {recipe.optimizer!r} needs bitsandbytes, which is not installed: pip install bitsandbytes, or "
            "use adamw"
        )
    if (device := choose_device(recipe.device)).type != "cuda":
        raise LosaError(
            f"optimizer {recipe.optimizer!r} pages its moments out of a CUDA device, not {device}: use adamw"
        )


@contextmanager
def prepared(
    subject: Subject, recipe: Recipe, parameters: Iterable[nn.Parameter]
) -> Iterator[tuple[Any, torch.optim.Optimizer]]:
    """The model as it is trained, sharded and checkpointed as the recipe says, and the optimizer of `parameters`.

    They need gradients inside, all others none.
    """
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with ExitStack() as stack:
            whole = stack.enter_context(sharding.spread(subject, recipe, parameters))
            if recipe.checkpointing:
                stack.enter_context(checkpointed([whole.get_submodule(block.name) for block in subject.blocks]))
            yield whole, make_optimizer(recipe, parameters)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def checkpointed(modules: list[nn.Module]) -> Iterator[None]:
    """Each module keeps its inputs only, and runs again when its gradients are due: they are the same, bit for bit.

    transformers' own checkpointing would need the model in training mode, where some have dropout.
    """

    def run(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        heap.trim()  # else a process keeps three times what checkpointed blocks need
        return forward(*arguments, **named)

    try:
        for module in modules:
            again = partial(run, module.forward)
            module.forward = partial(checkpoint, again, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def make_optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over `parameters`, or bitsandbytes' with 8-bit moments in memory that can be paged out of the GPU."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.peak_rate, weight_decay=recipe.weight_decay, fused=True)
    import bitsandbytes

    make: Any = getattr(bitsandbytes.optim, "PagedAdamW8bit")  # noqa: B009  (mypy does not see it)
    optimizer: torch.optim.Optimizer = make(parameters, lr=recipe.peak_rate, weight_decay=recipe.weight_decay)
    return optimizer


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer knows of a parameter that is its own: not bitsandbytes' tables, which all parameters share."""
    state = optimizer.state.get(parameter, {})
    return {key: torch.as_tensor(value) for key, value in state.items() if not key.startswith("qmap")}


def put_state(optimizer: Any, parameter: nn.Parameter, saved: dict[str, Tensor]) -> None:
    """Undo `state_of` in a fresh optimizer."""
    if not saved:  # no gradient has reached the parameter yet
        return
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in saved.items()}
        return
    (group,) = optimizer.param_groups
    place = next(i for i, other in enumerate(group["params"]) if other is parameter)
    optimizer.init_state(group, parameter, 0, place)  # makes buffers that can be paged
    state = optimizer.state[parameter]
    for key, value in saved.items():
        state[key] = state[key].copy_(value) if isinstance(state[key], Tensor) else value.item()
