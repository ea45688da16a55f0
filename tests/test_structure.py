"""Structured pruning: scores and choices against float64 oracles, a smaller model that computes the same, and loading it."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import GATED, MODELS, files, killed_after, save_tiny, tiny, tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

import losa
from losa import loading, masks, model, pipeline, registry, shrink, structure
from losa.blocks import Subject, find_blocks
from losa.cli import main
from losa.data import calibration_tokens
from losa.errors import LosaError
from losa.export import load_masks
from losa.inspection import inspect
from losa.progress import Progress
from losa.recipe import Recipe, load
from losa.structure import find

TEXT = torch.arange(1, 40).unsqueeze(0)


@pytest.fixture
def structured(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"pattern": "structured", "allocator": "uniform"}


def grouped() -> Any:
    """A Llama with four key/value heads of two query heads each; heads are wider than hidden size / heads."""
    MODELS["grouped"] = lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**GATED | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6})
    )
    try:
        return tiny("grouped")
    finally:
        del MODELS["grouped"]


def made(kind: str) -> Any:
    return grouped() if kind == "grouped" else tiny(kind)


def logits(of: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = of(input_ids=TEXT).logits
    return out


def widths(of: Any) -> list[tuple[int, int]]:
    """Key/value heads and channels of each block."""
    return [tuple(group.count for group in find(block)) for block in find_blocks(of)]  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("name", sorted(registry.STRUCTURED))
def test_scores_are_the_published_ones(name: str, heads: bool) -> None:
    """In float64 from all inputs at once, though they come in parts and two statistics are merged."""
    torch.manual_seed(1)
    x = torch.randn(4, 9, 12) * torch.linspace(0.01, 3, 12) + torch.linspace(-1000, 1000, 12)
    weight = torch.randn(5, 12)
    pruner = registry.get("pruner", name)()
    parts = [pruner.statistic(12, "cpu") for _ in range(2)]
    for sequence, part in zip(x, (0, 1, 1, 0), strict=True):
        parts[part].update(sequence, 1)
    parts[0].merge(parts[1].tensors())
    flat, wide = x.flatten(0, 1).double(), weight.double()
    if name == "wanda-sp":
        expected = (wide.abs() * flat.square().sum(dim=0).div(4).sqrt()).mean(dim=0)
    else:
        expected = flat.var(dim=0, correction=0) * wide.square().sum(dim=0)
        expected = expected.square() if heads else expected
        torch.testing.assert_close(pruner.means(parts[0], 12), flat.mean(dim=0))
    torch.testing.assert_close(pruner.columns(weight, parts[0], heads).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", sorted(registry.STRUCTURED))
def test_scores_need_inputs_of_their_own(name: str) -> None:
    pruner = registry.get("pruner", name)()
    with pytest.raises(LosaError, match="no calibration sequence"):
        pruner.columns(torch.ones(2, 3), pruner.statistic(3, "cpu"), False)
    with pytest.raises(LosaError, match="needs calibration inputs"):
        pruner.columns(torch.ones(2, 3), None, False)


# --------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("kind", "heads", "rows", "channels"),
    [
        ("llama", 2, (16, 8, 8), 48),
        ("grouped", 4, (12, 6, 6), 48),
        ("qwen3", 2, (16, 8, 8), 48),
        ("opt", 4, (8,) * 3, 48),
    ],
)
def test_groups_are_whole_key_value_heads_and_channels(
    kind: str, heads: int, rows: tuple[int, ...], channels: int
) -> None:
    for block in find_blocks(made(kind)):
        attention, mlp = find(block)
        assert (attention.count, tuple(attention.rows.values()), attention.width) == (heads, rows, rows[0])
        assert mlp.count == channels and set(mlp.rows.values()) == {mlp.width} == {1}
        assert {*attention.rows, attention.reader, *mlp.rows, mlp.reader} == set(block.linears)


SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, intermediate_size=48, pad_token_id=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.Phi3Config(**SMALL, num_attention_heads=4), r"self_attn\.qkv_proj belongs to no heads"),
        (transformers.Olmo2Config(**SMALL, num_attention_heads=4), r"self_attn\.q_norm\.weight depends on heads"),
        (
            transformers.MixtralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2),
            "mixture of experts",
        ),
        (transformers.GPTNeoXConfig(**SMALL, num_attention_heads=4), "query_key_value belongs to no heads"),
    ],
)
def test_what_cannot_be_pruned_so_is_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(LosaError, match=message):
        structure.check(find_blocks(model.skeleton(config)))


def test_an_attention_that_insists_on_its_width_is_refused_early(structured: dict[str, Any]) -> None:
    config = transformers.XGLMConfig(vocab_size=64, d_model=32, ffn_dim=48, num_layers=1, attention_heads=4)
    with pytest.raises(LosaError, match="XGLMForCausalLM does not run with fewer heads or channels"):
        shrink.rehearse(config, Recipe(pattern="structured"))


def test_a_kind_is_ignored_as_a_whole(structured: dict[str, Any]) -> None:
    with pytest.raises(LosaError, match=r"ignore leaves .*up_proj out, but not .*gate_proj"):
        losa.compress(tiny(), structured | {"ignore": ["up_proj"]}, tokenizer=tokenizer())
    result = losa.compress(tiny(), structured | {"ignore": [r"mlp\.", r"layers\.0\."]}, tokenizer=tokenizer())
    assert widths(result.model) == [(2, 48), (1, 48), (1, 48)]


# --------------------------------------------------------------------------------------------------------- choices


def one_shot(of: Any, tokens: Tensor, rate: float, pruner: str, true_sequential: bool) -> None:
    """Wanda-sp and FLAP in float64, from their papers: units zeroed one by one, in a model of the same size."""
    for block in find_blocks(of):
        linears = {name.rpartition(".")[2]: linear for name, linear in block.linears.items()}
        kinds = [("o_proj", "out_proj"), ("down_proj", "fc2")]
        for seen_together in [[kind] for kind in kinds] if true_sequential else [kinds]:
            inputs: dict[str, Tensor] = {}

            def keep(_m: Any, x: tuple[Tensor], name: str, inputs: dict[str, Tensor] = inputs) -> None:
                inputs[name] = x[0].flatten(0, -2)

            hooks = [linear.register_forward_pre_hook(partial(keep, name=name)) for name, linear in linears.items()]
            with torch.no_grad():
                of(input_ids=tokens)
            for hook in hooks:
                hook.remove()
            for names in seen_together:
                reader = next(name for name in names if name in linears)
                zero_units(linears, reader, inputs[reader], rate, pruner, of.config)


def zero_units(linears: Any, reader: str, x: Tensor, rate: float, pruner: str, config: Any) -> None:
    heads = reader in ("o_proj", "out_proj")
    size = linears["q_proj"].out_features // config.num_attention_heads if heads else 1
    share = config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = size * share if heads else 1
    weight = linears[reader].weight.data
    scores = []
    for start in range(0, weight.shape[1], width):
        of_unit = 0.0
        for j in range(start, start + width):
            if pruner == "wanda-sp":
                of_unit += (weight[:, j].abs() * x[:, j].norm()).mean().item()
            else:
                score = (x[:, j].var(correction=0) * weight[:, j].square().sum()).item()
                of_unit += score**2 if heads else score
        scores.append(of_unit)
    for unit in sorted(range(len(scores)), key=lambda u: scores[u])[: int(rate * len(scores))]:
        columns = slice(unit * width, (unit + 1) * width)
        if pruner == "flap":
            bias = weight[:, columns] @ x[:, columns].mean(dim=0)
            old = linears[reader].bias
            linears[reader].bias = torch.nn.Parameter(bias if old is None else old.data + bias)
        weight[:, columns] = 0
        for name in ("q_proj", "k_proj", "v_proj") if heads else ("gate_proj", "up_proj", "fc1"):
            if name in linears:
                rows = width if name == "q_proj" else size
                linears[name].weight.data[unit * rows : (unit + 1) * rows] = 0


@pytest.mark.parametrize(
    ("kind", "true_sequential"), [("grouped", False), ("grouped", True), ("qwen3", False), ("opt", False)]
)
@pytest.mark.parametrize("pruner", sorted(registry.STRUCTURED))
def test_one_step_is_the_published_method(
    pruner: str, kind: str, true_sequential: bool, structured: dict[str, Any]
) -> None:
    """And the smaller model computes what the model with zeros does."""
    plain = {"steps": 1, "recovery": "none", "pruner": pruner, "eval_data": "", "true_sequential": true_sequential}
    result = losa.compress(made(kind), structured | plain, tokenizer=tokenizer())
    oracle = made(kind).double()
    tokens = calibration_tokens(structured["calibration"], tokenizer(), 12, 24, 0)
    one_shot(oracle, tokens, 0.5, pruner, true_sequential)
    heads = len(find_blocks(oracle)) * [(4 if kind in ("opt", "grouped") else 2) // 2]
    assert widths(result.model) == [(count, 24) for count in heads]
    expected = logits(oracle)
    assert (logits(result.model).double() - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(("sparsity", "left"), [(0.2, (4, 39)), (0.3, (3, 34)), (0.99, (1, 1))])
def test_counts_are_rounded_down_and_one_always_stays(
    sparsity: float, left: tuple[int, int], structured: dict[str, Any]
) -> None:
    plain = {"steps": 1, "recovery": "none", "sparsity": sparsity}
    result = losa.compress(grouped(), structured | plain, tokenizer=tokenizer())
    assert widths(result.model) == [left] * 3
    counted = result.measurements["sparse"]
    attention, mlp = 3 * 32 * 6 * (8 + 8 + 4 + 4), 3 * 3 * 32 * 48
    assert counted["weights"] == attention + mlp
    assert counted["kept"] == attention * left[0] // 4 + mlp * left[1] // 48


def test_what_whole_heads_leave_undone_is_said(
    structured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fifth of four heads is none of them."""
    plain = {"steps": 1, "recovery": "none", "sparsity": 0.2, "eval_data": "", "sample_tokens": 0}
    losa.compress(grouped(), structured | plain, tmp_path / "out", tokenizer=tokenizer(), progress=Progress())
    assert "step 1/1: sparsity 0.200 (0.200 to 0.200), 0.094 reached" in capsys.readouterr().err
    made = json.loads((tmp_path / "out" / "losa.json").read_text())
    assert made["recipe"]["sparsity"] == 0.2 and made["history"][0]["mean_sparsity"] == pytest.approx(9 / 96)


# ----------------------------------------------------------------------------------------------------- steps, recovery


@pytest.mark.parametrize("pruner", sorted(registry.STRUCTURED))
@pytest.mark.parametrize("kind", ["grouped", "qwen3", "opt"])
def test_steps_with_recovery_end_in_a_smaller_model(
    kind: str, pruner: str, structured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks shrink step by step, the pairs are trained under them, and what is cut out was zero."""
    counts: list[list[int]] = []
    before: list[Tensor] = []
    merge, prune = pipeline.Subject.merge, pipeline.prune

    def spy_merge(subject: Any) -> Any:
        assert any(bool(linear.lora_B.any()) for block in subject.blocks for linear in block.masked.values())
        before.append(logits(subject.model))
        return merge(subject)

    def spy_prune(subject: Any, *rest: Any) -> Any:
        errors = prune(subject, *rest)
        counts.append([int(linear.mask.sum()) for block in subject.blocks for linear in block.masked.values()])
        return errors

    monkeypatch.setattr(pipeline.Subject, "merge", spy_merge)
    monkeypatch.setattr(pipeline, "prune", spy_prune)
    result = losa.compress(made(kind), structured | {"pruner": pruner}, tmp_path / "out", tokenizer=tokenizer())
    assert (
        len(counts) == 2 and all(x <= y for x, y in zip(counts[1], counts[0], strict=True)) and counts[0] != counts[1]
    )
    assert (logits(result.model) - before[0]).norm() <= 1e-5 * before[0].norm()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(result.model))
    made(kind).save_pretrained(tmp_path / "dense")
    stored, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "dense"))
    kept = load_masks(tmp_path / "out")
    for block in find_blocks(loaded):
        for name in block.linears:
            shape = (int(kept[f"{name}.rows"].sum()), int(kept[f"{name}.columns"].sum()))
            assert stored[f"{name}.weight"].shape == shape
            assert (len(kept[f"{name}.rows"]), len(kept[f"{name}.columns"])) == dense[f"{name}.weight"].shape
    found = inspect(tmp_path / "out")
    assert found["sparsity"] == pytest.approx(result.measurements["sparse"]["sparsity"], abs=1e-3)
    assert found["weights"] == result.measurements["sparse"]["weights"]
    generated = loaded.generate(TEXT[:, :4], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, loaded.generate(TEXT[:, :4], max_new_tokens=4, do_sample=False, use_cache=False))


def test_flap_adds_what_goes_at_each_step_to_the_bias(
    structured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias grows by the mean output of what the step prunes, and of nothing that went before."""
    steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    prune_group = structure.prune_group

    def spy(block: Any, group: Any, pruner: Any, rate: float, statistic: Any, device: Any) -> None:
        linear = block.masked[group.reader]
        bias, mask, weight = linear.bias.clone(), linear.mask, linear.effective_weight()
        prune_group(block, group, pruner, rate, statistic, device)
        gone = mask & ~linear.mask
        steps.append((linear.bias - bias, (weight * gone).double() @ statistic.mean, gone.any(dim=0), mask.all(dim=0)))

    monkeypatch.setattr(structure, "prune_group", spy)
    losa.compress(tiny(), structured | {"pruner": "flap"}, tokenizer=tokenizer())
    assert len(steps) == 2 * 3 * 2
    for added, expected, _, _ in steps:
        torch.testing.assert_close(added.double(), expected, rtol=1e-4, atol=1e-5)
    last = steps[-1]  # channels of the last block at the second step: some go now, some went before
    assert last[2].any() and not last[3].all() and last[0].any()


def test_a_killed_run_goes_on_to_the_same_bytes(llama: Path, structured: dict[str, Any], tmp_path: Path) -> None:
    """FLAP's biases are part of the state."""
    recipe = Recipe(**structured | {"pruner": "flap", "checkpoint_minutes": 0.0})
    losa.compress(str(llama), recipe, tmp_path / "whole")
    for moment in (2, 3, 6):  # after the first pruning, the first checkpoint, the second pruning
        out = tmp_path / f"killed {moment}"
        with killed_after(moment):
            losa.compress(str(llama), recipe, out)
        losa.compress(str(llama), recipe, out, resume=True)
        assert files(out) == files(tmp_path / "whole")


# --------------------------------------------------------------------------------------------------------- loading

PROGRAM = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoModel
found = {}
def load(folder):
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        return type(error).__name__
    with torch.no_grad():
        return loaded(input_ids=torch.arange(1, 40).unsqueeze(0)).logits.double().sum().item()
folders = sys.argv[1:]
without = {folder: load(folder) for folder in folders}
assert "losa" not in sys.modules
import losa
print(json.dumps([without, {folder: load(folder) for folder in folders}]))
"""


def test_who_can_load_what(structured: dict[str, Any], tmp_path: Path) -> None:
    """A process that never imported losa loads what is uniform, and refuses the rest naming losa; with losa, all."""
    layered = {"allocator": "rmi", "allocator_options": {"delta": 0.3}, "sparsity": 0.5}
    recipes: dict[str, tuple[str, dict[str, Any], bool]] = {
        "llama": ("grouped", {}, True),
        "llama flap": ("grouped", {"pruner": "flap"}, True),
        "three quarters": ("grouped", {"sparsity": 0.25}, True),  # 6 heads do not divide 32
        "three quarters flap": ("grouped", {"sparsity": 0.25, "pruner": "flap"}, False),
        "qwen2": ("qwen2", {}, True),
        "qwen3": ("qwen3", {}, True),
        "mistral": ("mistral", {}, True),
        "mistral flap": ("mistral", {"pruner": "flap"}, False),  # its linears have no bias
        "opt": ("opt", {"ignore": ["self_attn"], "pruner": "flap"}, True),
        "opt heads": ("opt", {}, False),  # its head size is hidden size / heads
        "layered": ("grouped", layered, False),
        "untouched": ("mistral", {"sparsity": 0.01, "pruner": "flap"}, True),
    }
    expected = {}
    for name, (kind, settings, plain) in recipes.items():
        short = structured | {"steps": 1, "recovery": "none", "eval_data": ""} | settings
        result = losa.compress(made(kind), short, tmp_path / name, tokenizer=tokenizer())
        assert result.measurements["sparse"]["loads"] == (
            "transformers" if plain else "transformers, after import losa"
        )
        assert json.loads((tmp_path / name / "losa.json").read_text())["measurements"] == result.measurements
        expected[str(tmp_path / name)] = logits(result.model).double().sum().item(), plain
    assert len(set(widths(result.model))) == 1
    assert json.loads((tmp_path / "three quarters" / "config.json").read_text())["architectures"] == [
        "MistralForCausalLM"
    ]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *expected], capture_output=True, text=True, check=True)
    without, after = json.loads(done.stdout.splitlines()[-1])
    assert "Unknown quantization type, got losa-structured (import losa first)" in done.stderr
    for folder, (total, plain) in expected.items():
        assert without[folder] == (pytest.approx(total, rel=1e-9) if plain else "RuntimeError"), folder
        assert after[folder] == pytest.approx(total, rel=1e-9), folder


def layered(structured: dict[str, Any], out: Path) -> Any:
    """A model whose blocks differ."""
    settings = structured | {"allocator": "rmi", "allocator_options": {"delta": 0.3}, "steps": 1, "recovery": "none"}
    return losa.compress(grouped(), settings, out, tokenizer=tokenizer())


def test_blocks_may_differ(structured: dict[str, Any], tmp_path: Path) -> None:
    """What `losa` and transformers do with such a model: measure, save again, base model, half, prune again."""
    result = layered(structured, tmp_path / "out")
    assert len(set(widths(result.model))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and not getattr(loaded, "is_quantized", False)
    loaded.float().save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(loaded))
    base = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(base.layers[1].mlp.up_proj.weight, result.model.model.layers[1].mlp.up_proj.weight)
    smaller = losa.compress(str(tmp_path / "out"), structured | {"steps": 1, "recovery": "none"}, tmp_path / "smaller")
    was = widths(result.model)
    assert widths(smaller.model) == [(heads - heads // 2, channels - channels // 2) for heads, channels in was]
    assert torch.equal(
        logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")), logits(smaller.model)
    )
    assert inspect(tmp_path / "smaller")["weights"] == smaller.measurements["sparse"]["weights"]


def test_the_command_line_reads_such_a_model(
    structured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = layered(structured, tmp_path / "out")
    common = ["--data", structured["eval_data"], "--tokens", "500", "--dtype", "float32", "--device", "cpu", "--json"]
    assert main(["evaluate", str(tmp_path / "out"), *common]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["perplexity"] == pytest.approx(result.measurements["sparse"]["perplexity"], rel=1e-6)
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32)
    save_file(tensors, path, {"format": "pt"})
    assert main(["inspect", str(tmp_path / "out")]) == 2
    assert "model.layers.1.mlp.up_proj has not the shape that its masks leave" in capsys.readouterr().err


def test_what_waits_for_an_import_is_called_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "awaited.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    calls: list[int] = []
    before = list(sys.meta_path)
    loading.after_import("awaited", lambda: calls.append(sys.modules["awaited"].value))
    assert calls == []
    try:
        import awaited  # type: ignore[import-not-found]

        assert awaited.value == 1 and calls == [1] and sys.meta_path == before
        loading.after_import("awaited", lambda: calls.append(2))
        assert calls == [1, 2]
    finally:
        sys.modules.pop("awaited", None)


# ------------------------------------------------------------------------------------------------------- bad input


def test_the_pruner_follows_the_pattern() -> None:
    assert Recipe().pruner == "wanda" and Recipe(pattern="structured").pruner == "wanda-sp"
    assert load("paper", {"pattern": "structured"}).pruner == "wanda-sp"
    assert load("paper", {"pattern": "structured", "pruner": "flap"}).pruner == "flap"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "structured", "pruner": "wanda"}, "'wanda' prunes single weights; .* use flap or wanda-sp"),
        ({"pattern": "structured", "pruner": "sparsegpt"}, "'sparsegpt' prunes single weights"),
        ({"pruner": "wanda-sp"}, "'wanda-sp' prunes whole heads and channels: set pattern to structured"),
        ({"pattern": "2:4", "pruner": "flap"}, "'flap' prunes whole .* with pattern 2:4 use alps or magnitude"),
        ({"pattern": "structured", "pruner": "flop"}, "did you mean 'flap'"),
        ({"pruner": "wanda_sp"}, "did you mean 'wanda-sp'"),
        ({"pattern": "structured", "rates_per": "linear", "allocator": "owl"}, "set it to block"),
        ({"pattern": "structured", "allocator": "error"}, "use owl, rmi or uniform"),
        ({"pattern": "structured", "pruner_options": {"x": 1}}, "setting of pruner 'wanda-sp'"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LosaError, match=message):
        Recipe(**settings)


def test_bad_input_on_the_command_line(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compress", str(llama), "--output", str(tmp_path / "out")]
    assert main([*command, "--pattern", "structured", "--pruner", "wanda"]) == 2
    assert "pruner 'wanda' prunes single weights; with --pattern structured use" in capsys.readouterr().err
    assert main([*command, "--pruner", "flap"]) == 2
    assert "pruner 'flap' prunes whole heads and channels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pair_kept_apart_is_refused(structured: dict[str, Any]) -> None:
    with pytest.raises(LosaError, match="recovery 'lora' does not merge: with --pattern structured"):
        losa.compress(tiny(), structured | {"recovery": "lora", "steps": 1}, tokenizer=tokenizer())


def test_a_dry_run_counts_the_statistics(
    tmp_path: Path, structured: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny(tmp_path / "m")
    read = {name: value for name, value in structured.items() if name != "allocation_samples"}  # no rates are sought
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in read.items()]
    assert main(["compress", str(source), "--dry-run", "--pruner=flap", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] > 0


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("linears", "message"),
    [
        (None, "does not describe linears of other widths"),
        ([UP], "does not describe linears of other widths"),
        ({UP: [48, 32]}, "does not describe linears of other widths"),
        ({UP: "abc"}, "does not describe linears of other widths"),
        ({UP: 7}, "does not describe linears of other widths"),
        ({UP: [-3, 32, False]}, "does not describe linears of other widths"),
        ({UP: [0, 32, False]}, "does not describe linears of other widths"),
        ({UP: [40.0, 32, False]}, "does not describe linears of other widths"),
        ({UP: [40, 32, 1]}, "does not describe linears of other widths"),
        ({UP: [49, 32, False]}, rf"resizes {UP} to \[49, 32\], the model has no more than \[48, 32\]"),
        ({"model.norm": [4, 4, False]}, "resizes 'model.norm', which is no linear of LlamaForCausalLM"),
        ({"up": [4, 4, False]}, "resizes 'up', which is no linear of LlamaForCausalLM"),
    ],
)
def test_a_damaged_account_of_widths(linears: Any, message: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    stored = {"quant_method": loading.STRUCTURED} | ({} if linears is None else {"linears": linears})
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(LosaError, match=message) as caught:
        model.skeleton(model.load_config(str(source)))
    assert "\n" not in str(caught.value)
    with pytest.raises(LosaError, match=message):  # not wrapped, whoever loads it
        transformers.AutoModelForCausalLM.from_pretrained(source)


def test_masks_that_are_not_rows_times_columns_are_refused() -> None:
    whole = tiny()
    subject = Subject(whole, None, find_blocks(whole), "", torch.float32)
    bits = {n: masks.pack(torch.eye(*x.weight.shape) == 0) for b in subject.blocks for n, x in b.linears.items()}
    with pytest.raises(LosaError, match="not made of whole rows and columns"):
        shrink.shrink(subject, bits)
