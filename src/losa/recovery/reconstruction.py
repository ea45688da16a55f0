"""Block-wise reconstruction: a pruned block's kept weights are trained towards the dense block's output, one block at a time.

The idea is that of arXiv 2510.14444. The block sees what the pruned blocks before it make of the calibration sequences,
the dense one what dense blocks make of them, so that what went wrong before is made good as well. Beside both streams of
hidden states, the values, gradients and moments of one block are in memory: 16 bytes a kept weight.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losa.blocks import Block, Subject, find_blocks
from losa.calibration import Stream, visiting
from losa.errors import LosaError
from losa.recipe import Recipe
from losa.recovery.training import share_of_peak

if TYPE_CHECKING:
    from losa.run import Run

BATCH_TOKENS = 1024  # of an update: a block learns from few sequences, so small batches


def sequences(recipe: Recipe) -> int | None:
    """How many calibration sequences an update takes; None: nothing is reconstructed."""
    return max(1, BATCH_TOKENS // recipe.sequence_length) if recipe.reconstruct else None


@dataclass
class Target:
    """The dense model's hidden states, in step with those of the pruned one."""

    stream: Stream
    blocks: list[Block]  # a dense copy's, or the subject's own while they are dense

    def advance(self, block: Block) -> None:
        """Move on to what comes out of the dense `block`: before it is pruned, if it is the subject's own."""
        self.stream.advance(self.blocks[block.index])


def target_of(subject: Subject, recipe: Recipe, tokens: Tensor, device: torch.device) -> Target | None:
    """Where the blocks are to be led, None if the recipe reconstructs nothing."""
    if not recipe.reconstruct:
        return None
    model = subject.dense or subject.model
    blocks = find_blocks(model) if subject.dense else subject.blocks
    return Target(Stream(model, blocks, tokens, device, sequences(recipe), subject.spill), blocks)


def reconstruct(block: Block, stream: Stream, target: Target, recipe: Recipe, step: int, run: "Run") -> None:
    """Train the kept weights of `block`, which `stream` is in front of and `target` behind.

    The loss is the mean over channels of the squared error over the dense output's square, the E_l of the paper, by
    AdamW without decay; the rate rises and falls as in end-to-end training. Raises LosaError if it is not finite.
    """
    if not block.linears:
        return
    batches = list(zip(stream.hiddens, target.stream.hiddens, strict=True))
    power = sum(wanted.double().square().sum(dim=(0, 1)) for _, wanted in batches) / (stream.samples * stream.length)
    assert isinstance(power, Tensor)
    weight = (1 / power.clamp_min(1e-30) / len(power)).float().to(stream.device)
    generator = torch.Generator().manual_seed(recipe.seed * 1000 + step)
    updates = recipe.reconstruct * len(batches)
    losses = []
    with visiting(block, stream.device):
        parameters = [linear.open().requires_grad_(True) for linear in block.masked.values()]
        # in relation to the weights' size, so that one rate suits linears and models of any scale
        peaks = [
            recipe.reconstruct_rate * float(p.detach().square().mean().sqrt()) if len(p) else 0 for p in parameters
        ]
        optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters], weight_decay=0.0, fused=True)
        for epoch in range(recipe.reconstruct):
            for place, i in enumerate(torch.randperm(len(batches), generator=generator).tolist()):
                share = share_of_peak(epoch * len(batches) + place, updates, recipe.warmup)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * share
                hidden, wanted = (batch.to(stream.device) for batch in batches[i])
                with torch.enable_grad():
                    error = (stream.run(block, hidden).float() - wanted.float()).square().mean(dim=(0, 1))
                    loss = (error * weight).sum()
                loss.backward()
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise LosaError(
                        f"step {step}: reconstructing {block.name} diverges: lower reconstruct_rate "
                        f"({recipe.reconstruct_rate:g})"
                    )
                optimizer.step()
                optimizer.zero_grad()
                for linear in block.masked.values():
                    linear.write_back()
        for linear in block.masked.values():
            linear.close()
    epoch_mean = [sum(part) / len(batches) for part in (losses[: len(batches)], losses[-len(batches) :])]
    run.log("reconstructed", step=step, block=block.name, first=epoch_mean[0], last=epoch_mean[1])
