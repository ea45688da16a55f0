"""Recovery that holds less: the same gradients and weights, fewer bytes, and one line where it cannot be had."""

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import GATED, MODELS, changed, files, killed_after, tiny, tokenizer
from torch import Tensor, nn

import losa
from losa import data, inputs, inspection, memory, model
from losa.adapters import MaskedLinear
from losa.blocks import Subject, subject_of
from losa.errors import LosaError
from losa.recipe import Recipe
from losa.recovery import footprint
from losa.recovery.training import accumulate, next_token_loss


def adapted(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Subject, dict[str, nn.Parameter]]:
    """A pruned model with pairs that matter, and these."""
    subject = subject_of(tiny(kind).to(dtype), tokenizer(), kind, Recipe())
    subject.wrap(MaskedLinear, Recipe(), 4)
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for block in subject.blocks:
        for name, linear in block.masked.items():
            linear.set_mask(torch.rand(linear.weight.shape, generator=generator) > 0.5)
            linear.set_rank(4, generator)
            assert linear.lora_A is not None and linear.lora_B is not None
            linear.lora_B.data = 0.1 * torch.randn(linear.lora_B.shape, generator=generator)
            pairs |= {f"{name}.A": linear.lora_A, f"{name}.B": linear.lora_B}
    return subject, pairs


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_batches_are_padded_further_in_bf16_and_the_loss_is_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, pairs = adapted(kind, torch.bfloat16)
    recipe = Recipe(train_length=40, micro_batch_size=2, batch_size=4, learning_rate=1e-3)
    examples = [data.Example(ids, ids) for n in (21, 17, 5, 40) for ids in [torch.arange(2, 2 + n)]]
    widths: list[int] = []
    subject.model.register_forward_pre_hook(
        lambda _module, _args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    found = []
    for further in (True, False):
        if not further:
            monkeypatch.setattr(footprint, "padded", lambda *_: 0)
        with footprint.prepared(subject, recipe, pairs.values()) as (whole, _):
            loss = accumulate(subject, whole, examples, [0, 1, 2, 3], recipe)
            found.append((loss, {n: p.grad.clone() for n, p in pairs.items() if p.grad is not None}))
    assert widths == [32, 40, 21, 40]
    (loss, padded), (want, plain) = found
    assert loss == pytest.approx(want, rel=1e-2) and plain and all(n in padded for n in plain)
    whole_of = [torch.cat([of[n].flatten() for n in plain]) for of in (padded, plain)]
    assert (whole_of[0] - whole_of[1]).norm() < 0.05 * whole_of[1].norm()
    assert footprint.padded(tiny(kind), recipe) == 0  # fp32


def gradients(kind: str, recipe: Recipe, dtype: torch.dtype = torch.float32) -> tuple[float, dict[str, Tensor], int]:
    """The loss, the pairs' gradients, and the bytes that are kept between forward and backward."""
    subject, pairs = adapted(kind, dtype)
    ids = torch.arange(2, 62).view(2, 30)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    fixed = {t.untyped_storage().data_ptr() for t in [*subject.model.parameters(), *subject.model.buffers()]}
    with footprint.prepared(subject, recipe, pairs.values()) as (whole, _):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = next_token_loss(whole, ids, torch.ones_like(ids), ids)
        loss.backward()
        found = {name: pair.grad.clone() for name, pair in pairs.items() if pair.grad is not None}
    assert all(pair.grad is None and not pair.requires_grad for pair in pairs.values())
    assert not any("forward" in vars(block.module) for block in subject.blocks)
    return loss.item(), found, sum(kept.values())


@pytest.mark.parametrize("kind", [*MODELS, "gemma3", "falcon", "mixtral"])
def test_checkpointed_blocks_have_the_same_gradients_and_keep_less(kind: str) -> None:
    """Bit for bit."""
    loss, whole, kept = gradients(kind, Recipe(learning_rate=1e-3))
    again, found, fewer = gradients(kind, Recipe(checkpointing=True, learning_rate=1e-3))
    assert loss == again and whole.keys() == found.keys() and whole
    for name, gradient in whole.items():
        assert torch.equal(gradient, found[name]) and bool(gradient.any() or kind == "mixtral"), name
    logits, blocks = 2 * 29 * 2048 * 4, 3 * 60 * 32 * 4  # the blocks' inputs
    assert blocks < fewer - logits < 0.4 * (kept - logits)


def test_a_model_in_bf16_has_pairs_moments_and_gradients_in_fp32() -> None:
    subject, pairs = adapted("llama", torch.bfloat16)
    assert all(linear.weight.dtype == torch.bfloat16 for block in subject.blocks for linear in block.masked.values())
    with footprint.prepared(subject, Recipe(checkpointing=True, learning_rate=1e-3), pairs.values()) as (
        whole,
        optimizer,
    ):
        ids = torch.arange(2, 62).view(2, 30)
        next_token_loss(whole, ids, torch.ones_like(ids), ids).backward()
        optimizer.step()
        for pair in pairs.values():
            assert pair.dtype == torch.float32 and pair.grad is not None and pair.grad.dtype == torch.float32
            assert all(state.dtype == torch.float32 for state in optimizer.state[pair].values())


def test_a_run_with_checkpointing_is_the_same_run(small: Recipe, llama: Path, tmp_path: Path) -> None:
    for name, checkpointing in (("a", False), ("b", True)):
        losa.compress(str(llama), changed(small, checkpointing=checkpointing), tmp_path / name)
    ours, theirs = files(tmp_path / "a"), files(tmp_path / "b")
    assert ours["model.safetensors"] == theirs["model.safetensors"]


def test_8_bit_moments_are_a_quarter_and_resume_exactly(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where bitsandbytes has the same optimizer but cannot page: losa refuses it there otherwise."""
    monkeypatch.setattr(footprint, "check", lambda _: None)
    sizes: dict[str, list[float]] = {"adamw": [], "adamw-8bit": []}
    state_of = footprint.state_of

    def sized(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = state_of(optimizer, parameter)
        if parameter.numel() >= 4096:  # smaller ones keep fp32
            sizes[name].append(sum(t.nbytes for t in state.values()) / parameter.numel())
        return state

    monkeypatch.setattr(footprint, "state_of", sized)
    wide = tmp_path / "wide"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED | {"intermediate_size": 96})).save_pretrained(wide)
    tokenizer().save_pretrained(wide)
    recipe = changed(small, steps=1, mean_rank=32.0, rank_growth=0.0, targets="mlp", checkpoint_minutes=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        for name in ("adamw", "adamw-8bit"):
            losa.compress(str(wide), changed(recipe, optimizer=name), tmp_path / name)
        eight = changed(recipe, optimizer="adamw-8bit")
        with killed_after(4):  # dense, pruned, and two updates
            losa.compress(str(wide), eight, tmp_path / "killed")
        losa.compress(str(wide), eight, tmp_path / "killed", resume=True)
    assert files(tmp_path / "killed") == files(tmp_path / "adamw-8bit")
    assert min(sizes["adamw"]) >= 8 and max(sizes["adamw-8bit"]) < 2.1
    assert files(tmp_path / "adamw")["model.safetensors"] != files(tmp_path / "killed")["model.safetensors"]


def test_what_cannot_be_had_is_refused(small: Recipe, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = changed(small, optimizer="adamw-8bit")
    with pytest.raises(LosaError, match="pages its moments out of a CUDA device, not cpu: use adamw"):
        inputs.check(str(llama), recipe, None)
    inputs.check(str(llama), changed(recipe, recovery="none"), None)  # it is not asked
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(LosaError, match="needs bitsandbytes, which is not installed: pip install"):
        inputs.check(str(llama), recipe, None)
    with pytest.raises(LosaError, match="torchrun --nproc-per-node N -m losa starts them"):
        inputs.check(str(llama), changed(small, shard="blocks"), None)
    monkeypatch.setattr(inputs.distributed, "launched", lambda: 2)
    inputs.check(str(llama), changed(small, shard="blocks"), None)
    for settings in ({"distill": 0.5}, {"recovery": "full"}):
        with pytest.raises(LosaError, match="it is for low-rank pairs without distill"):
            inputs.check(str(llama), changed(small, shard="blocks", **settings), None)
    with pytest.raises(LosaError, match="one block at a time in one process: set it to 0"):
        inputs.check(str(llama), changed(small, reconstruct=1), None)
    with pytest.raises(LosaError, match="did you mean 'adamw-8bit'"):
        changed(small, optimizer="adamw-8bits")


def seven_billion(monkeypatch: pytest.MonkeyPatch, processes: int = 1, **settings: Any) -> dict[str, Any]:
    """What is foretold for a Llama 2 7B in bf16 and the paper's recipe."""
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    monkeypatch.setattr(model, "load_config", lambda _: config)
    monkeypatch.setattr(inspection.distributed, "launched", lambda: processes)
    return inspection.plan("llama", losa.recipe.load("paper", {"dtype": "bfloat16", "device": "cpu", **settings}))


def test_what_is_foretold_follows_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of docs/processes.md."""
    least = {"checkpointing": True, "micro_batch_size": 1}
    plans = [
        seven_billion(monkeypatch, **settings)
        for settings in ({}, {"checkpointing": True}, least, least | {"optimizer": "adamw-8bit"})
    ]
    page = (Path(__file__).parents[1] / "docs" / "processes.md").read_text()
    peaks = re.findall(r"^\| .* \| 14\.29 \| .* \| ([\d.]+) \|$", page, re.MULTILINE)
    assert peaks == [f"{found['memory'] / 1e9:.1f}" for found in plans]
    parts = [found["memory_parts"] for found in plans]
    assert all(part["model"] == parts[0]["model"] for part in parts)
    recovery = [part["recovery"] for part in parts]
    assert recovery == sorted(recovery, reverse=True) and recovery[0] > 10 * recovery[2]
    pairs = 20 * 32 * (4 * 8192 + 3 * 15104)
    assert recovery[2] - recovery[3] == pytest.approx(memory.HEAP * 6 * pairs, abs=2)
    alone, four = (seven_billion(monkeypatch, n) for n in (1, 4))
    hidden_states = 128 * 2048 * 4096 * 2
    fewer = alone["memory_parts"]["calibration"] - four["memory_parts"]["calibration"]
    assert fewer == hidden_states * 3 // 4
    base = parts[0]["model"] - 4 * pairs
    block = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    monkeypatch.setattr(model, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(memory, "available", lambda _: 80e9)
    sharded = seven_billion(monkeypatch, 4, shard="blocks")["memory_parts"]["model"]
    assert sharded == base // 4 + 2 * block + 4 * pairs
