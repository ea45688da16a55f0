"""What differs between architectures: fused and parallel projections, layer types, experts held as 3-D parameters."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, changed, files, killed_after, save_tiny, tiny, tokenizer
from test_pipeline import logits
from torch import Tensor, nn

import losa
from losa import calibration, experts, inputs, masks, memory, model
from losa.adapters import MaskedLinear
from losa.blocks import Subject, find_blocks, prunable, targeted
from losa.errors import LosaError
from losa.export import load_masks
from losa.inspection import inspect, plan
from losa.progress import Progress
from losa.pruners.base import Pruner
from losa.pruners.magnitude import Magnitude
from losa.pruners.sparsegpt import SparseGPT
from losa.pruners.wanda import Wanda
from losa.pruning import prune_block
from losa.recipe import Recipe

MIXTURES = ["mixtral", "qwen3_moe"]
# weights of a block of `tiny`: attention, then MLP or experts; routers are left out
WEIGHTS = {
    "gemma2": 3 * (3072 + 3 * 32 * 48),
    "gemma3": 3 * (3072 + 3 * 32 * 48),
    "phi3": 3 * (3072 + 3 * 32 * 48),
    "falcon": 3 * (32 * 48 + 32 * 32 + 8 * 32 * 32),
    "gpt_neox": 3 * (4 * 32 * 32 + 2 * 32 * 48),
    "mixtral": 3 * (3072 + 4 * 3 * 32 * 48),
    "qwen3_moe": 3 * 3072 + 2 * 8 * 3 * 32 * 16 + 3 * 32 * 48,
}


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """By linear, whether its adapter had moved when the model was merged."""
    moved: dict[str, bool] = {}
    merge = Subject.merge

    def spy(subject: Subject) -> Any:
        for block in subject.blocks:
            moved.update({name: bool(linear.lora_B.any()) for name, linear in block.masked.items()})
        return merge(subject)

    monkeypatch.setattr(Subject, "merge", spy)
    return moved


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_two_steps_with_recovery_save_and_load(
    kind: str, tmp_path: Path, small: Recipe, adapted: dict[str, bool]
) -> None:
    """Every linear and expert is pruned, adapted and counted; what is saved is the model that was measured."""
    source = save_tiny(tmp_path / "dense", kind)
    result = losa.compress(str(source), changed(small, allocator="uniform"), tmp_path / "out")
    assert result.measurements["sparse"]["weights"] == WEIGHTS[kind]
    assert set(map(type, result.model.modules())) <= set(map(type, tiny(kind).modules())) | {nn.Linear}

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    exact = kind != "falcon"  # its own kind of linear adds the bias in a rounding of its own
    torch.testing.assert_close(
        logits(loaded), logits(result.model), rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5
    )

    bits = load_masks(tmp_path / "out")
    linears = {name: linear for block in find_blocks(loaded) for name, linear in block.linears.items()}
    assert set(bits) == set(linears) == set(adapted)
    for name, linear in linears.items():
        mask = masks.unpack(bits[name], linear.in_features)
        assert (linear.weight[~mask] == 0).all()
        assert int((~mask).sum()) == linear.out_features * (linear.in_features // 2), name
    reached = [name for name in adapted if not any(name.startswith(e) for e in result.history[-1]["unreached"])]
    assert all(adapted[name] for name in reached) and len(reached) > len(adapted) / 2
    dense = transformers.AutoModelForCausalLM.from_pretrained(source)
    for name, parameter in dense.named_parameters():
        if not any(name.startswith((linear, re.sub(r"\.\d+(\.\w+)$", r"\1", linear))) for linear in linears):
            assert torch.equal(parameter, loaded.get_parameter(name)), f"{name} is no business of ours"

    seen = inspect(tmp_path / "out")
    assert seen["weights"] == WEIGHTS[kind]
    assert seen["zeros"] == sum(int((linear.weight == 0).sum()) for linear in linears.values())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_n_of_m_in_one_step(kind: str, small: Recipe) -> None:
    recipe = changed(small, pattern="2:4", sparsity=0.5, steps=1, recovery="none", eval_data="", pruner="sparsegpt")
    result = losa.compress(tiny(kind), recipe, tokenizer=tokenizer())
    for block in find_blocks(result.model):
        for linear in block.linears.values():
            assert (linear.weight.reshape(-1, 4).count_nonzero(dim=1) <= 2).all()
    assert result.measurements["sparse"]["kept"] == WEIGHTS[kind] / 2


# ------------------------------------------------------------------------------------------------------------ experts


@pytest.mark.parametrize("kind", MIXTURES)
def test_split_experts_compute_the_same_and_join_to_the_same(kind: str) -> None:
    whole, parts = tiny(kind), tiny(kind)
    before = {name: parameter.clone() for name, parameter in parts.named_parameters()}
    storage = parts.model.layers[0].mlp.experts.down_proj.data_ptr()
    experts.split(parts)
    assert parts.model.layers[0].mlp.experts[0]["down_proj"].weight.data_ptr() == storage  # no copy
    assert sum(p.numel() for p in parts.parameters()) == sum(p.numel() for p in whole.parameters())
    torch.testing.assert_close(logits(parts), logits(whole), rtol=1e-5, atol=1e-6)
    for parameter in parts.parameters():  # as a visit to another device does
        parameter.data = parameter.data.clone()
    experts.join(parts)
    after = dict(parts.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_gradients_through_split_experts_are_those_of_the_whole() -> None:
    whole, parts = tiny("mixtral"), tiny("mixtral")
    experts.split(parts)
    parts.requires_grad_(True)
    tokens = torch.arange(1, 40).unsqueeze(0)
    for either in (whole, parts):
        either(input_ids=tokens).logits.square().mean().backward()
    for layer, split in zip(whole.model.layers, parts.model.layers, strict=True):
        torch.testing.assert_close(split.mlp.gate.weight.grad, layer.mlp.gate.weight.grad, rtol=1e-4, atol=1e-6)
        for name in experts.PROJECTIONS:
            for index, expert in enumerate(split.mlp.experts):
                expected = layer.mlp.experts.get_parameter(name).grad[index]
                found = expert[name].weight.grad
                torch.testing.assert_close(torch.zeros_like(expected) if found is None else found, expected)


@pytest.mark.parametrize("kind", MIXTURES)
def test_routers_stay_dense(kind: str) -> None:
    names = [name for block in find_blocks(tiny(kind)) for name in block.linears]
    assert not any(name.endswith("mlp.gate") for name in names)


def test_routers_that_are_linears_stay_dense() -> None:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    sizes = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    config = transformers.Qwen2MoeConfig(**settings, **sizes, num_experts_per_tok=2, num_key_value_heads=2)
    block = find_blocks(transformers.Qwen2MoeForCausalLM(config))[0]
    assert len(block.linears) == 4 + 3 + 2 * 4  # attention, shared expert, experts
    assert not any("shared_expert_gate" in name for name in block.linears)


def shut(whole: Any, expert: int) -> Any:
    """Two of four experts are chosen; this one never is, in any block, whatever the token."""
    for layer in whole.model.layers:
        router = layer.mlp.gate.forward

        def forward(hidden: Tensor, router: Callable[..., Any] = router) -> Any:
            scores, weights, chosen = router(hidden)
            other = torch.where((chosen == 3).any(dim=1, keepdim=True), 2, 3)
            return scores, weights, torch.where(chosen == expert, other, chosen)

        layer.mlp.gate.forward = forward
    return whole


class Said(Progress):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt", "pruner-zero"])
def test_an_expert_that_no_token_reaches_is_said_and_goes_by_its_weights(
    pruner: str, small: Recipe, adapted: dict[str, bool]
) -> None:
    said = Said()
    before = tiny("mixtral").model.layers[1].mlp.experts
    recipe = changed(small, steps=1, allocator="uniform", pruner=pruner)
    result = losa.compress(shut(tiny("mixtral"), 1), recipe, tokenizer=tokenizer(), progress=said)
    names = [f"model.layers.{layer}.mlp.experts.1" for layer in range(3)]
    assert sorted(result.history[0]["unreached"]) == names
    for name in names:
        assert f"no calibration token reached {name}: pruned by the weights alone" in said.lines
    after = result.model.model.layers[1].mlp.experts
    for projection in experts.PROJECTIONS:
        weight, pruned = before.get_parameter(projection)[1].detach(), after.get_parameter(projection)[1]
        expected = masks.choose(weight.abs(), None, 0.5, "matrix" if pruner == "sparsegpt" else "row")
        assert torch.equal(pruned != 0, expected)  # not adapted either: no training token reached it
        assert torch.equal(pruned, weight * expected)
    assert not any(moved for name, moved in adapted.items() if ".experts.1." in name)
    assert all(moved for name, moved in adapted.items() if ".experts.0." in name)


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT(), Magnitude()])
@pytest.mark.parametrize("sequential", [False, True])
def test_experts_are_pruned_with_the_tokens_that_reach_them(
    pruner: Pruner, sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what each expert is given by the whole model's own router; many batches, of which some miss an expert."""
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 10)
    tokens = torch.randint(1, 2048, (12, 10), generator=torch.Generator().manual_seed(0))
    whole, subject = tiny("qwen3_moe"), tiny("qwen3_moe")
    experts.split(subject)
    block = find_blocks(subject)[0]
    for name, linear in block.linears.items():
        block.linears[name] = MaskedLinear(linear, 0, 1.0)
        subject.set_submodule(name, block.linears[name])
    given: list[Any] = []
    whole.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    if sequential:  # what the attention before it has become by then
        stream = calibration.Stream(subject, [block], tokens, torch.device("cpu"))
        prune_block(block, pruner, dict.fromkeys(block.linears, 0.5), stream, true_sequential=True)
        whole.model.layers[0].self_attn = subject.model.layers[0].self_attn
    with torch.no_grad():
        whole(tokens)
    if not sequential:
        stream = calibration.Stream(subject, [block], tokens, torch.device("cpu"))
        prune_block(block, pruner, dict.fromkeys(block.linears, 0.5), stream)
    ((hidden, chosen, _),) = given
    held = whole.model.layers[0].mlp.experts
    for index in range(8):
        x = hidden[(chosen == index).any(dim=1)]
        if not len(x):
            continue
        statistic = pruner.statistic(32, "cpu")
        if statistic is not None:
            statistic.update(x, 1)
        expected, mask = pruner.prune(held.gate_up_proj[index].detach(), None, 0.5, statistic)
        linear = block.masked[f"model.layers.0.mlp.experts.{index}.gate_up_proj"]
        assert (linear.mask == mask).float().mean() > 0.999
        torch.testing.assert_close(linear.weight * mask, expected * linear.mask, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("allocator", ["owl", "error"])
def test_every_expert_can_have_a_rate_of_its_own(allocator: str, small: Recipe) -> None:
    """Also one that no token reaches."""
    recipe = changed(small, steps=1, allocator=allocator, rates_per="linear", recovery="none", eval_data="")
    recipe = changed(recipe, allocation_samples=2, allocator_options={"points": 2} if allocator == "error" else {})
    result = losa.compress(shut(tiny("mixtral"), 1), recipe, tokenizer=tokenizer())
    rates = result.history[0]["rates"]
    assert len(rates) == 3 * (4 + 2 * 4) and len(set(rates.values())) > 3
    for block in find_blocks(result.model):
        for name, linear in block.linears.items():
            assert int((linear.weight == 0).sum()) == linear.out_features * int(rates[name] * linear.in_features + 1e-9)


def test_a_plan_counts_the_experts_a_token_reaches(tmp_path: Path, small: Recipe) -> None:
    """A quarter of eight experts: what is kept for backward is not that of eight."""
    source = str(save_tiny(tmp_path / "m", "qwen3_moe"))
    sparse = plan(source, small)
    config = transformers.AutoConfig.from_pretrained(source)
    config.num_experts_per_tok = 8
    config.save_pretrained(source)
    dense = plan(source, small)
    assert sparse["prunable"] == dense["prunable"] == WEIGHTS["qwen3_moe"]
    # two blocks of experts; 2 rows of 24 tokens; in fp32
    saved = 2 * (8 - 2) * ((32 + 2 * 32) + (16 + 2 * 32)) * 2 * 24 * 4
    more = dense["memory_parts"]["recovery"] - sparse["memory_parts"]["recovery"]
    assert more == pytest.approx(memory.HEAP * saved, abs=2)


def test_a_killed_run_of_experts_goes_on_to_the_same_bytes(tmp_path: Path, small: Recipe) -> None:
    source = str(save_tiny(tmp_path / "dense", "mixtral"))
    recipe = changed(small, checkpoint_minutes=0.0, eval_data="", pruner="sparsegpt")
    whole = losa.compress(source, recipe, tmp_path / "whole")
    for moment in (2, 4, 6):  # pruned, in recovery, pruned again
        output = tmp_path / f"killed-{moment}"
        with killed_after(moment):
            losa.compress(source, recipe, output)
        resumed = losa.compress(source, recipe, output, resume=True)
        assert files(output) == files(tmp_path / "whole")
        assert resumed.history == whole.history


def test_bf16_experts_stay_so_on_disk(tmp_path: Path, small: Recipe) -> None:
    """Computed in fp32, saved as they were stored, and measured so."""
    folder = save_tiny(tmp_path / "m", "mixtral", torch.bfloat16)
    result = losa.compress(str(folder), small, tmp_path / "out")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.dtype == torch.bfloat16
    held = saved.model.layers[0].mlp.experts.down_proj
    assert torch.equal(held, result.model.model.layers[0].mlp.experts.down_proj)


# ------------------------------------------------------------------------------------------------------- what is refused


def refused(config: Any, recipe: Recipe, tmp_path: Path, what: str) -> None:
    """By name before anything runs: from a configuration alone, and for a loaded model, which is left as it was."""
    with pytest.raises(LosaError, match=what):
        prunable(model.skeleton(config), recipe)
    loaded = transformers.AutoModelForCausalLM.from_config(config)
    names = [name for name, _ in loaded.named_parameters()]
    with pytest.raises(LosaError, match=what):
        losa.compress(loaded, recipe, tmp_path / "out", tokenizer=tokenizer())
    assert not (tmp_path / "out").exists()
    assert [name for name, _ in loaded.named_parameters()] == names


def test_experts_in_a_form_that_is_not_known_are_refused(tmp_path: Path, small: Recipe) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 2048}
    experts_of = {"intermediate_size": 16, "num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 8}
    transposed = transformers.GptOssConfig(**sizes, **experts_of, pad_token_id=0)
    what = r"model\.layers\.0\.mlp\.experts\.gate_up_proj \[4, 32, 32\] is neither an nn.Linear nor experts"
    refused(transposed, small, tmp_path, what)
    blocks = prunable(model.skeleton(transposed), changed(small, ignore=["experts"]))
    assert [len(block.linears) for block in blocks] == [4, 4]

    jetmoe = transformers.JetMoeConfig(**sizes, num_local_experts=4, intermediate_size=16, kv_channels=8)
    refused(jetmoe, small, tmp_path, r"layers\.0\.mlp\.input_linear\.weight \[4, 32, 32\] is neither")

    flat = tiny("llama")  # all experts in one matrix
    flat.model.layers[1].mlp.register_parameter("w1", nn.Parameter(torch.zeros(4 * 16, 32)))
    with pytest.raises(LosaError, match=r"layers\.1\.mlp\.w1 \[64, 32\] is neither"):
        find_blocks(flat)


def test_a_width_that_n_of_m_does_not_divide_is_refused_by_the_expert_s_name(tmp_path: Path, small: Recipe) -> None:
    recipe = changed(small, pattern="2:5", sparsity=0.6, ignore=["self_attn"])
    refused(tiny("mixtral").config, recipe, tmp_path, r"layers\.0\.mlp\.experts\.0\.gate_up_proj: pattern 2:5 needs")


def test_a_pair_kept_apart_has_nowhere_to_go_on_experts(tmp_path: Path, small: Recipe) -> None:
    recipe = changed(small, recovery="lora", steps=1)
    with pytest.raises(LosaError, match=r"mlp\.experts\.0\.down_proj is none in the saved model"):
        losa.compress(tiny("mixtral"), recipe, tmp_path / "out", tokenizer=tokenizer())
    inputs.check(tiny("mixtral"), changed(recipe, targets="qkvo"), tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "targets", "count"),
    [("phi3", "qkvo", 2), ("falcon", "qkvo", 2), ("gpt_neox", "qkvo", 2), ("mixtral", "qv", 2)],
)
def test_targets_know_fused_attention(kind: str, targets: str, count: int, small: Recipe) -> None:
    names = list(find_blocks(tiny(kind))[0].linears)
    wanted = targeted(names, changed(small, targets=targets))
    assert len(wanted) == count and all("attn" in name or "attention" in name for name in wanted)


@pytest.mark.parametrize(("kind", "fused"), [("phi3", "qkv_proj"), ("falcon", "query_key_value")])
def test_q_and_v_alone_are_refused_where_they_are_one_linear(kind: str, fused: str, small: Recipe) -> None:
    with pytest.raises(LosaError, match=f"targets 'qv' match none of the linears: .*{fused}"):
        inputs.check(tiny(kind), changed(small, targets="qv"), None)
