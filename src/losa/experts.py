"""Experts held as 3-D parameters, as one linear per expert and projection while a model is compressed.

transformers holds all experts of a block in one module: gate_up_proj [experts, 2 * inner, hidden], down_proj
[experts, hidden, inner], and a forward(hidden_states, top_k_index, top_k_weights). `split` puts `Experts` in its place:
model.layers.0.mlp.experts.3.gate_up_proj is then a linear like any other. `join` puts the module back with its new
weights, so that what is saved is an ordinary model. Gate and up stay one linear, as in the MLP of Phi-3.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = ("gate_up_proj", "down_proj")


def held_by(module: nn.Module) -> bool:
    """Whether `module` is experts of the kind that this file knows; by its structure, whatever its class."""
    held = dict(module.named_parameters())  # nothing else: biases, or a norm behind each expert, would be lost
    if set(held) != set(PROJECTIONS) or any(p.ndim != 3 for p in held.values()) or not hasattr(module, "_apply_gate"):
        return False
    (count, wide, hidden), down = held["gate_up_proj"].shape, held["down_proj"].shape
    takes = list(inspect.signature(module.forward).parameters)
    return down == (count, hidden, wide // 2) and takes == ["hidden_states", "top_k_index", "top_k_weights"]


class Experts(nn.ModuleList):
    """One nn.ModuleDict of two linears per expert, and the routing of the module whose weights they are.

    The linears' weights are views of the 3-D parameters: nothing is copied.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple: its parameters are not this module's
        for index in range(len(module.get_parameter(PROJECTIONS[0]))):
            linears = {name: _linear(module.get_parameter(name).detach()[index]) for name in PROJECTIONS}
            self.append(nn.ModuleDict(linears))
        self.train(module.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index int64 and top_k_weights [tokens, k] -> [tokens, hidden].

        Every expert's linears are called once, on the tokens that reach it; not at all if there are none.
        """
        apply_gate: Any = self._module[0]._apply_gate
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self)).tolist()
        # Every token k times, then a permutation: to pick tokens more than once would add up gradients in any order.
        repeated = hidden_states.unsqueeze(1).expand(-1, top_k_index.shape[1], -1).flatten(0, 1)
        parts = []
        for expert, x in zip(self, repeated[order].split(counts), strict=True):
            if len(x):
                gate_up, down = (expert[name] for name in PROJECTIONS)  # type: ignore[index]
                parts.append(down(apply_gate(gate_up(x))))
        weighted = torch.cat(parts)[order.argsort()] * top_k_weights.reshape(-1, 1)
        return weighted.view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)

    def joined(self) -> nn.Module:
        """The module this stands for, its parameters made of the linears as they are now; these keep their shapes only.

        What is held twice at a time is one projection of one block.
        """
        (module,) = self._module
        for name in PROJECTIONS:
            linears: list[Any] = [expert[name] for expert in self]  # type: ignore[index]
            parameter = module.get_parameter(name).requires_grad_(False)
            parameter.data = torch.stack([linear.weight.detach() for linear in linears])
            for linear in linears:
                linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
        return module


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def split(model: nn.Module) -> None:
    """Put `Experts` in the place of every module that holds experts, in place; the linears are then all there is.

    The 3-D parameters are emptied. Were they kept, whatever rebinds a linear's weight (a visit to another device, a
    merge) would leave all experts in memory twice.
    """
    for name, module in list(model.named_modules()):
        if held_by(module):
            model.set_submodule(name, Experts(module))
            for parameter in module.parameters():
                parameter.data = parameter.data.new_empty(0)


def join(model: nn.Module) -> None:
    """Undo `split`: the modules that were there, with the weights that the linears have come to."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            model.set_submodule(name, module.joined())


def share_of_tokens(model: Any, name: str) -> float:
    """The share of all tokens that reaches the linear `name` of a model that is not split: below 1 if it is an expert's."""
    module = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    if not held_by(module):
        return 1.0
    count = len(module.get_parameter(PROJECTIONS[0]))
    return float(getattr(model.config.get_text_config(), "num_experts_per_tok", count) / count)


def stored(model: Any) -> dict[str, list[tuple[str, int | None]]]:
    """Where files hold the weights of the experts' linears: the keys to concatenate, and which index of each if it is 3-D.

    By transformers' own conversion, which is given numbered rows in the place of weights; a skeleton will do.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names = [f"{name}.{p}" for name, module in model.named_modules() if held_by(module) for p in PROJECTIONS]
    if not names:
        return {}
    shapes = [model.get_parameter(name).shape for name in names]
    numbered = {
        name: torch.arange(count * rows).view(count, rows, 1) + (owner << 32)
        for owner, (name, (count, rows, _)) in enumerate(zip(names, shapes, strict=True))
    }
    places: dict[str, list[tuple[int, str, int | None]]] = {}
    for key, part in revert_weight_conversion(model, numbered).items():
        for index, piece in enumerate(part) if part.ndim == 3 else [(None, part)]:
            owner, row = divmod(int(piece.flatten()[0]), 1 << 32)
            prefix, _, projection = names[owner].rpartition(".")
            linear = f"{prefix}.{row // shapes[owner][1]}.{projection}.weight"
            places.setdefault(linear, []).append((row, key, index))
    return {linear: [(key, index) for _, key, index in sorted(parts)] for linear, parts in places.items()}
