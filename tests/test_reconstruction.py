"""Blocks led back to what the dense ones put out: against plain autograd, in step with the dense model, in every setting."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import changed, files, killed_after, tiny, tokenizer
from torch import Tensor

import losa
from losa import masks, pipeline
from losa.adapters import MaskedLinear
from losa.blocks import Subject, find_blocks
from losa.calibration import Stream
from losa.data import calibration_tokens
from losa.errors import LosaError
from losa.export import load_masks
from losa.inspection import plan
from losa.progress import Progress
from losa.recipe import Recipe
from losa.recovery import reconstruction
from losa.recovery.training import share_of_peak
from losa.run import Run


@pytest.fixture
def alone(small: Recipe) -> Recipe:
    """Reconstruction instead of training."""
    return changed(small, steps=1, recovery="none", eval_data="", reconstruct=6)


def test_a_block_is_trained_as_plain_autograd_would(alone: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block: dense inputs, AdamW, the paper's error; what is pruned set to zero in weights and gradients."""
    monkeypatch.setattr(reconstruction, "BATCH_TOKENS", 4 * 24)
    tokens = calibration_tokens(alone.calibration, tokenizer(), 12, 24, 0)
    model = tiny()
    subject = Subject(model, tokenizer(), find_blocks(model), "tiny", torch.float32)
    subject.wrap(MaskedLinear, alone, 0)
    block, generator = subject.blocks[0], torch.Generator().manual_seed(1)
    stream = Stream(model, subject.blocks, tokens, torch.device("cpu"), reconstruction.sequences(alone))
    target = reconstruction.target_of(subject, alone, tokens, torch.device("cpu"))
    assert target is not None and len(stream.hiddens) == 3
    target.advance(block)
    for linear in block.masked.values():
        linear.set_mask(torch.rand(linear.weight.shape, generator=generator) < 0.5)
    plain = copy.deepcopy(block.module)
    reconstruction.reconstruct(block, stream, target, alone, 1, Run(None, Progress(quiet=True)))

    linears = {n: m for n, m in plain.named_modules() if isinstance(m, MaskedLinear)}
    weights = {n: torch.nn.Parameter(m.weight.data.clone()) for n, m in linears.items()}
    for name, linear in linears.items():
        linear.forward = lambda x, w=weights[name]: torch.nn.functional.linear(x, w)  # type: ignore[method-assign]
    peaks = {n: 0.02 * float(w.detach()[linears[n].mask].square().mean().sqrt()) for n, w in weights.items()}
    optimizer = torch.optim.AdamW([{"params": [w]} for w in weights.values()], weight_decay=0.0)
    order = torch.Generator().manual_seed(1)
    whole = torch.cat(target.stream.hiddens).flatten(0, 1)
    for update in range(18):
        if update % 3 == 0:
            places = torch.randperm(3, generator=order)
        for group, peak in zip(optimizer.param_groups, peaks.values(), strict=True):
            group["lr"] = peak * share_of_peak(update, 18, alone.warmup)
        i = int(places[update % 3])
        rest, named = stream._arguments[block.name, 4]
        out = plain(stream.hiddens[i], *rest, **named)
        error = ((out - target.stream.hiddens[i]) ** 2).flatten(0, 1).mean(0) / (whole**2).mean(0)
        error.mean().backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            weight.grad *= linears[name].mask
        optimizer.step()
        optimizer.zero_grad()
    for name, linear in linears.items():
        got = subject.model.get_submodule(f"{block.name}.{name}").weight
        moved, expected = got - linear.weight, weights[name].detach() - linear.weight
        assert expected.norm() > 0 and (moved - expected).norm() <= 2e-2 * expected.norm(), name


@pytest.mark.parametrize("steps", [1, 2])
def test_it_is_led_by_the_dense_model_at_every_step(steps: int, alone: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, tokens = tiny(), calibration_tokens(alone.calibration, tokenizer(), 12, 24, 0)
    with torch.no_grad():
        states = dense(tokens, output_hidden_states=True).hidden_states
    seen: list[tuple[int, Tensor]] = []
    real = reconstruction.reconstruct

    def spy(block: Any, stream: Any, target: Any, *rest: Any) -> None:
        seen.append((block.index, torch.cat(target.stream.hiddens)))
        real(block, stream, target, *rest)

    monkeypatch.setattr(pipeline, "reconstruct", spy)
    losa.compress(tiny(), changed(alone, steps=steps), tokenizer=tokenizer())
    assert [index for index, _ in seen] == [0, 1, 2] * steps
    for index, wanted in seen:
        if index < 2:  # behind the last one stands the model's norm
            torch.testing.assert_close(wanted, states[index + 1], rtol=1e-4, atol=1e-4)


CASES: dict[str, dict[str, Any]] = {
    "alone": {},
    "two steps with pairs": {"steps": 2, "recovery": "losa"},
    "two steps, full": {"steps": 2, "recovery": "full", "distill": 0.5},
    "by gradients": {"pruner": "pruner-zero"},
    "sparsegpt in order": {"pruner": "sparsegpt", "true_sequential": True},
    "2:4": {"pattern": "2:4"},
    "an ignored block": {"ignore": [r"layers\.1\."]},
}


@pytest.mark.parametrize("case", CASES)
def test_errors_fall_and_zeros_stay(case: str, alone: Recipe, llama: Path, tmp_path: Path) -> None:
    recipe = changed(alone, **CASES[case])
    result = losa.compress(str(llama), recipe, tmp_path / "out")
    plain = losa.compress(str(llama), changed(recipe, reconstruct=0))
    for got, without in zip(result.history, plain.history, strict=True):
        pairs = [pair for pair in zip(got["errors"], without["errors"], strict=True) if pair[1] > 1e-9]
        assert pairs and all(mine < theirs for mine, theirs in pairs[:1])
        assert sum(mine for mine, _ in pairs) < 0.9 * sum(theirs for _, theirs in pairs)
    bits = load_masks(tmp_path / "out")
    for block in find_blocks(result.model, recipe.ignore):
        for name, linear in block.linears.items():
            mask = masks.unpack(bits[name], linear.in_features)
            assert (linear.weight[~mask] == 0).all() and masks.sparsity(mask) > 0.4
    events = [json.loads(line) for line in (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] == "reconstructed"]
    assert told and all(event["last"] < event["first"] for event in told)


@pytest.mark.parametrize("kind", ["opt", "mixtral", "gemma3"])
def test_other_architectures(kind: str, alone: Recipe) -> None:
    result = losa.compress(tiny(kind), alone, tokenizer=tokenizer())
    plain = losa.compress(tiny(kind), changed(alone, reconstruct=0), tokenizer=tokenizer())
    assert sum(result.history[0]["errors"]) < 0.9 * sum(plain.history[0]["errors"])


def test_structured_pruning_is_reconstructed_too(alone: Recipe) -> None:
    settings = {n: v for n, v in alone.to_json().items() if n not in ("pruner", "sparsity")}
    settings |= {"pattern": "structured", "sparsity": 0.5, "allocator": "uniform"}
    result = losa.compress(tiny(), settings, tokenizer=tokenizer())
    plain = losa.compress(tiny(), settings | {"reconstruct": 0}, tokenizer=tokenizer())
    assert sum(result.history[0]["errors"]) < 0.9 * sum(plain.history[0]["errors"])
    assert result.model.model.layers[0].mlp.up_proj.out_features == 24


@pytest.mark.parametrize("moment", [2, 4])
def test_a_killed_run_goes_on_to_the_same_bytes(moment: int, alone: Recipe, llama: Path, tmp_path: Path) -> None:
    recipe = changed(alone, steps=2, recovery="losa", checkpoint_minutes=0.0)
    losa.compress(str(llama), recipe, tmp_path / "whole")
    with killed_after(moment):
        losa.compress(str(llama), recipe, tmp_path / "killed")
    losa.compress(str(llama), recipe, tmp_path / "killed", resume=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_diverging_is_said(alone: Recipe) -> None:
    with pytest.raises(LosaError, match="lower reconstruct_rate"):
        losa.compress(tiny(), changed(alone, reconstruct_rate=1e30), tokenizer=tokenizer())
    for name, value in (("reconstruct", -1), ("reconstruct_rate", 0.0)):
        with pytest.raises(LosaError, match=name):
            changed(alone, **{name: value})


def test_a_plan_counts_the_second_stream(alone: Recipe, llama: Path) -> None:
    plain, more = plan(str(llama), changed(alone, reconstruct=0)), plan(str(llama), alone)
    assert more["memory_parts"]["calibration"] > plain["memory_parts"]["calibration"]
    assert more["memory_parts"]["model"] == plain["memory_parts"]["model"]
    twice = plan(str(llama), changed(alone, steps=2))
    assert twice["memory_parts"]["model"] == plain["memory_parts"]["model"] + 4 * plain["parameters"]
