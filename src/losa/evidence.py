"""What an allocator sees of the model as it stands, gathered in one pass over its blocks."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from losa.adapters import MaskedLinear
from losa.allocators.base import Allocator
from losa.blocks import Block, Subject
from losa.calibration import Stream
from losa.model import choose_device
from losa.pruners.base import Pruner
from losa.pruners.wanda import SquaredInputs
from losa.pruning import observe, of_all, prune_linear, reconstruction_error, sampled_positions
from losa.recipe import Recipe
from losa.run import Run


@dataclass
class Unit:
    """What has a sparsity of its own: a block, or one of its linears."""

    name: str
    block: Block
    linears: list[str]

    @property
    def weights(self) -> int:
        return sum(self.block.linears[name].weight.numel() for name in self.linears)


def units_of(blocks: list[Block], per: Literal["block", "linear"]) -> list[Unit]:
    """The units of `blocks` that have something to prune, in order."""
    if per == "block":
        return [Unit(block.name, block, list(block.linears)) for block in blocks if block.linears]
    return [Unit(name, block, [name]) for block in blocks for name in block.linears]


@torch.no_grad()
def gather(
    subject: Subject,
    recipe: Recipe,
    allocator: Allocator,
    step: int,
    units: list[Unit],
    floors: list[float],
    tokens: Tensor,
    run: Run,
) -> list[Tensor]:
    """What `allocator` needs of each unit, from the calibration `tokens` (int64 [samples, length]); [] if nothing."""
    if not allocator.needs:
        return []
    stream = Stream(subject.model, subject.blocks, tokens, choose_device(recipe.device), spill=subject.spill)
    seen: list[Tensor] = []
    for block in run.track(subject.blocks, f"step {step}/{recipe.steps}: sparsity by {recipe.rates_per}"):
        here = [(unit, floor) for unit, floor in zip(units, floors, strict=True) if unit.block is block]
        with block.present():
            if allocator.needs == "scores":
                seen += _digests(block, [unit for unit, _ in here], allocator, stream)
                continue
            if allocator.needs == "errors":
                seen += _errors(block, here, allocator, step, recipe, stream)
            stream.advance(block)
        if allocator.needs == "grams" and here:
            seen.append(stream.gram(len(tokens)))
    return seen


def _digests(block: Block, units: list[Unit], allocator: Allocator, stream: Stream) -> list[Tensor]:
    """The allocator's digest of Wanda's scores of each unit, whatever pruner is chosen (OWL is defined by them).

    The stream moves on behind the block, so that the scores cost no pass of their own.
    """

    def fresh(name: str) -> SquaredInputs:
        return SquaredInputs(block.linears[name].in_features, stream.device)

    inputs = {name: fresh(name) for name in block.linears}
    inputs, _ = of_all(inputs, stream.observe(block, inputs, advance=True), fresh)
    digests = []
    for unit in units:
        scores = []
        for name in unit.linears:
            # the mean over all sequences, also those of which an expert saw nothing
            norm = (inputs[name].total / stream.samples).sqrt().float()
            weight = block.masked[name].effective_weight(torch.float32).to(stream.device)
            scores.append((weight.abs() * norm).flatten())
        digests.append(allocator.digest(torch.cat(scores)).double().cpu())
    return digests


def _errors(
    block: Block, units: list[tuple[Unit, float]], allocator: Allocator, step: int, recipe: Recipe, stream: Stream
) -> list[Tensor]:
    """Rates tried and the block's error at each, [2, probes] a unit: pruned alone, on the inputs it has now."""
    pruner: Pruner = recipe.build("pruner")
    positions = sampled_positions(recipe.error_tokens, stream.samples * stream.length, recipe.seed)
    statistics, _ = observe(block, pruner, list(block.linears), stream)
    whole = stream.sample_of(block, positions)
    tables = []
    for unit, floor in units:
        target = recipe.sparsity_at(step)
        rates = recipe.kept.trials(allocator.probes(target, floor, recipe.kept.spread), target, floor)
        errors = []
        for rate in rates:
            kept = {name: _copy(block.masked[name]) for name in unit.linears}
            for name in unit.linears:
                prune_linear(
                    name, block.masked[name], pruner, recipe.kept.amount(rate), statistics[name], stream.device
                )
            errors.append(reconstruction_error(block.name, whole, stream.sample_of(block, positions)))
            for name, (weight, bits) in kept.items():
                block.masked[name].weight.copy_(weight)
                block.masked[name].mask_bits.copy_(bits)
        tables.append(torch.tensor([rates, errors], dtype=torch.float64))
    return tables


def _copy(linear: MaskedLinear) -> tuple[Tensor, Tensor]:
    return linear.weight.clone(), linear.mask_bits.clone()
