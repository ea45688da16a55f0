"""A model's decoder blocks and their prunable linears, found by structure, not by class name; and what a run carries of it."""

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from losa import experts
from losa.errors import LosaError
from losa.model import check_finite
from losa.recipe import Recipe
from losa.recipe_checks import TARGETS
from losa.sparse.linear import PackedLinear, part_of

if TYPE_CHECKING:
    from losa.adapters import MaskedLinear
    from losa.disk import OnDisk
    from losa.recovery.distillation import Teacher


@dataclass
class Block:
    """A decoder block and its prunable linears (there may be none) by full name; `Subject.wrap` makes these MaskedLinears.

    `home`: where its weights are while it is not `present`, if that is the disk; its module is then on the meta device.
    """

    index: int
    name: str
    module: nn.Module
    linears: dict[str, Any]
    home: "OnDisk | None" = None

    def present(self) -> AbstractContextManager[None]:
        """Its weights are in memory inside; those of a model that lives there always are."""
        return self.home.present(self) if self.home else nullcontext()

    @property
    def masked(self) -> dict[str, "MaskedLinear"]:
        return self.linears

    @property
    def weights(self) -> int:
        return sum(linear.weight.numel() for linear in self.linears.values())


@dataclass
class Subject:
    """What is compressed: the model, its tokenizer, its blocks in order, where it came from, the type it is saved in, and
    what teaches it while it is repaired.

    `home`: if the model stays on disk, what brings its parts. `spill`: the folder for activations, if not in memory.
    """

    model: Any
    tokenizer: Any
    blocks: list[Block]
    source: str
    stored: torch.dtype
    teacher: "Teacher | None" = None
    dense: Any = None  # a frozen copy of the dense model, where something needs it later
    home: "OnDisk | None" = None
    spill: Path | None = None

    @property
    def pad_id(self) -> int:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(pad if pad is not None else end)

    @property
    def size(self) -> int:
        """Bytes of the weights in the type they are saved in: what the model takes in memory, once loaded."""
        tensors = {id(tensor): tensor for tensor in self.model.state_dict(keep_vars=True).values()}  # tied ones once
        wide = self.stored.itemsize
        return sum(
            t.numel() * (min(wide, t.itemsize) if t.is_floating_point() else t.itemsize) for t in tensors.values()
        )

    def wrap(self, make: Callable[[nn.Linear, int, float], "MaskedLinear"], recipe: Recipe, max_rank: int) -> None:
        """Put a masked linear in the place of every prunable one; those the recipe targets can hold ranks up to `max_rank`.

        Experts held as 3-D parameters become linears first; `merge` puts them back.
        """
        names = [name for block in self.blocks for name in block.linears]
        wanted = targeted(names, recipe) if max_rank else set()

        def wrap(block: Block) -> None:
            block.module.requires_grad_(False)
            experts.split(block.module)
            for name in block.linears:
                linear: Any = block.module.get_submodule(inner := name.removeprefix(f"{block.name}."))
                block.linears[name] = make(linear, max_rank if name in wanted else 0, recipe.scaling)
                block.module.set_submodule(inner, block.linears[name])

        if self.home is not None:
            self.home.prepare = wrap
            return
        self.model.requires_grad_(False)
        for block in self.blocks:
            wrap(block)

    def round_block(self, block: Block) -> None:
        """Round the weights of `block` to what is stored: with no recovery to come, later blocks see what will be there."""
        self._round(block.module.named_parameters(block.name))

    def round(self) -> None:
        """Round all weights to what is stored."""
        self._round(self.model.named_parameters())

    def _round(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        for name, parameter in parameters:
            parameter.data = self.narrowed(name, parameter.data).to(parameter.dtype)

    def narrowed(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight`, the model's `name`, in the type it is saved in: what transformers keeps in fp32 (routers) stays as it is."""
        wide = part_of(name, self.model._get_dtype_plan(self.stored))
        return weight if wide else weight.to(self.stored)

    def merge(self) -> dict[str, torch.Tensor]:
        """Put plain linears back, the adaptation merged and rounded to what is stored, every pruned weight zero.

        Returns the keep-masks, packed (`masks.pack`), by the linears' names.
        """
        bits = {name: mask for block in self.blocks for name, mask in self.merge_block(block).items()}
        self.round()
        return bits

    def merge_block(self, block: Block) -> dict[str, torch.Tensor]:
        """The same for one block, which must be present."""
        bits = {}
        for name, linear in block.masked.items():
            bits[name] = linear.mask_bits
            block.linears[name] = linear.merge(in_place=True)
            block.module.set_submodule(name.removeprefix(f"{block.name}."), block.linears[name])
        self.round_block(block)
        experts.join(block.module)
        return bits

    def narrow(self) -> None:
        """Hold the weights in the type they are saved in. Buffers (rotary frequencies) stay, as when a model is loaded."""
        for prefix, module in self.model.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if name.endswith("bias") or not isinstance(module, PackedLinear):  # what is packed is so for good
                    parameter.data = self.narrowed(name, parameter.data)


def targeted(names: list[str], recipe: Recipe) -> set[str]:
    """Those of the linears that get adapters. Raises LosaError if there are none."""
    wanted = {name for name in names if re.search(TARGETS.get(recipe.targets, recipe.targets), name)}
    if not wanted:
        kinds = sorted({re.sub(r".*\.\d+\.", "", name) for name in names})
        raise LosaError(
            f"targets {recipe.targets!r} match none of the linears: {', '.join(kinds)}; all, qv and qkvo stand for some"
        )
    return wanted


def stack_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of modules with linears that holds most of the model, and its name. Raises LosaError if there is none."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_has_linears(child) for child in module)
    ]
    if not lists:
        what = "decoder blocks" if any(isinstance(m, nn.Linear) for m in model.modules()) else "Linear layers"
        raise LosaError(f"{type(model).__name__} has no {what} that losa can find: it is not supported")
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def find_blocks(model: nn.Module, ignore: list[str] | None = None) -> list[Block]:
    """The decoder blocks. Raises LosaError if there are none.

    Every nn.Linear of a block whose full name no pattern of `ignore` matches is prunable, but for routers. Experts held
    as 3-D parameters are listed as the linears that `experts.split` will make of them. Raises LosaError for weights in
    any other form.
    """
    name, stack = stack_of(model)
    blocks = []
    for index, module in enumerate(stack):
        prefix = f"{name}.{index}"
        linears = {f"{prefix}.{n}": linear for n, linear in _linears(module).items()}
        _refuse_others(prefix, module, linears, ignore or [])
        kept = {n: linear for n, linear in linears.items() if not any(re.search(p, n) for p in ignore or [])}
        blocks.append(Block(index, prefix, module, kept))
    if not any(block.linears for block in blocks):
        raise LosaError(f"ignore {ignore} leaves no linear of {type(model).__name__} to prune")
    return blocks


def prunable(model: nn.Module, recipe: Recipe) -> list[Block]:
    """The blocks of `model` with the linears that the recipe prunes. Raises LosaError if its pattern does not fit one."""
    blocks = find_blocks(model, recipe.ignore)
    if m := recipe.kept.m:
        for block in blocks:
            odd = [name for name, linear in block.linears.items() if linear.in_features % m]
            if odd and recipe.undivided == "refuse":
                width = block.linears[odd[0]].in_features
                raise LosaError(
                    f"{odd[0]}: pattern {recipe.pattern} needs an input width that {m} divides, not {width}; "
                    "--undivided dense leaves such linears dense"
                )
            block.linears = {name: linear for name, linear in block.linears.items() if name not in odd}
        if not any(block.linears for block in blocks):
            raise LosaError(f"no linear of {type(model).__name__} has an input width that {m} divides")
    return blocks


def _has_linears(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block, each expert's among them, without the routers."""
    found: dict[str, nn.Linear] = {}
    for name, child in block.named_modules():
        if isinstance(child, nn.Linear):
            found[name] = child
        elif experts.held_by(child):
            found |= {f"{name}.{inner}": linear for inner, linear in _linears(experts.Experts(child)).items()}
    routers = _routers(block)
    return {name: linear for name, linear in found.items() if linear not in routers}


def _routers(block: nn.Module) -> set[nn.Module]:
    """The linears that choose among experts or weigh them: beside experts, as many outputs as there are, or one.

    They stay dense: they are tiny, and a wrong choice costs a whole expert. Most models hold theirs as a plain parameter.
    """
    routers: set[nn.Module] = set()
    for parent in block.modules():
        beside = list(parent.children())
        counts = [len(child) for child in beside if isinstance(child, nn.ModuleList)]
        counts += [len(child.get_parameter("down_proj")) for child in beside if experts.held_by(child)]
        for child in beside if counts else []:
            linears = [module for module in child.modules() if isinstance(module, nn.Linear)]
            if len(linears) == 1 and linears[0].out_features in (1, *counts):
                routers.add(linears[0])
    return routers


def _refuse_others(prefix: str, block: nn.Module, linears: dict[str, nn.Linear], ignore: list[str]) -> None:
    """Raise LosaError naming weights of `block` that no pruner can handle: else a large part of it would stay dense, unsaid.

    They have three dimensions (of more than 1), or two and the size of a linear; a router's have not.
    """
    largest = max((linear.weight.numel() for linear in linears.values()), default=0)
    for owner, module in block.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) or experts.held_by(module):
            continue
        for name, parameter in module.named_parameters(owner, recurse=False):
            sizes = sum(size > 1 for size in parameter.shape)
            if sizes < 2 or (sizes == 2 and parameter.numel() < largest):
                continue
            if not any(re.search(pattern, f"{prefix}.{name}") for pattern in ignore):
                raise LosaError(
                    f"{prefix}.{name} {list(parameter.shape)} is neither an nn.Linear nor experts that losa knows: it "
                    "cannot be pruned; --ignore with its name leaves it dense"
                )


def subject_of(model: Any, tokenizer: Any, source: str, recipe: Recipe, stored: torch.dtype | None = None) -> Subject:
    """A loaded model, ready to be compressed; it will be saved in the type it was stored in, if that is the narrower one."""
    check_finite(model)
    model.eval()
    if stored is None or stored.itemsize >= model.dtype.itemsize:
        stored = model.dtype
    return Subject(model, tokenizer, prunable(model, recipe), source, stored)
