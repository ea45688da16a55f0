"""The model spread over the processes while it is trained or measured: each holds a slice of every frozen weight.

torch's fully_shard brings a block's weights together when it runs, forward and backward, and lets go of them after. What
is trained stays whole in every process, as it is small: its gradients are summed like those of a model that is not
sharded, and its checkpoints are the same.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from losa import distributed
from losa.adapters import MaskedLinear
from losa.blocks import Block, Subject
from losa.model import choose_device
from losa.recipe import Recipe


@contextmanager
def spread(subject: Subject, recipe: Recipe, trained: Iterable[nn.Parameter] = ()) -> Iterator[Any]:
    """The model as it runs: itself, or, if the recipe shards it and there are several processes, its twin."""
    if recipe.shard == "none" or distributed.world() == 1:
        yield subject.model
        return
    with sharded(subject.model, subject.blocks, choose_device(recipe.device), set(trained)) as twin:
        yield twin


@contextmanager
def sharded(model: Any, blocks: list[Block], device: torch.device, trained: set[nn.Parameter]) -> Iterator[Any]:
    """A twin of `model` that computes on `device`, sharded over the processes; `model` stays where it is, as it is.

    They share the `trained` parameters: these are on `device` meanwhile, and back at the end. All processes must run
    the twin equally often.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    homes = {parameter: parameter.device for parameter in trained}
    twin = _twin(model, trained)
    mesh = init_device_mesh(device.type, (distributed.world(),))
    try:
        for parameter in trained:
            parameter.data = parameter.data.to(device)
        for part in [*(twin.get_submodule(block.name) for block in blocks), twin]:
            fully_shard(part, mesh=mesh, ignored_params=trained)
        yield twin
    finally:
        for parameter, home in homes.items():
            parameter.data = parameter.data.to(home)
            parameter.grad = None


def _twin(model: nn.Module, trained: set[nn.Parameter]) -> Any:
    """A copy whose parameters are other objects on the same memory, but for `trained`, which are the same.

    Masks become parameters, which are sharded; a buffer would be whole in every process.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in trained}
    for parameter in model.parameters():
        memo.setdefault(id(parameter), nn.Parameter(parameter.data, requires_grad=False))
    for module in model.modules():
        if isinstance(module, MaskedLinear):
            memo[id(module.mask_bits)] = nn.Parameter(module.mask_bits, requires_grad=False)
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        if isinstance(module, MaskedLinear):
            bits = module.mask_bits
            del module.mask_bits
            module.register_parameter("mask_bits", bits)  # type: ignore[arg-type]
    return twin
