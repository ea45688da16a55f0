"""What always holds, whatever the model: DESIGN's invariants over the whole algorithm."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import MODELS, changed, files, killed_after, save_tiny, tiny, tokenizer
from safetensors import safe_open
from safetensors.torch import save_file
from test_pruners import surgeon
from torch import Tensor

import losa
from losa import masks, pipeline
from losa.blocks import find_blocks
from losa.cli import main
from losa.data import calibration_tokens, training_examples
from losa.errors import LosaError
from losa.export import load_masks
from losa.progress import Progress
from losa.pruning import reconstruction_error
from losa.recipe import Recipe
from losa.recovery.low_rank import MaskedLowRank

TEXT = torch.arange(1, 40).unsqueeze(0)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=TEXT).logits
    return out


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt", "alps", "magnitude"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_loads_and_is_as_sparse_as_its_masks(
    kind: str, pruner: str, tmp_path: Path, small: Recipe
) -> None:
    """Invariants 1, 6: zeros where the masks say, masks as sparse as asked, the same logits from disk."""
    source = save_tiny(tmp_path / "dense", kind)
    result = losa.compress(str(source), changed(small, pruner=pruner), tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(result.model))
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("def")["input_ids"]
        == tokenizer()("def")["input_ids"]
    )
    bits = load_masks(tmp_path / "out")
    named = dict(loaded.named_modules())
    blocks = find_blocks(loaded)
    assert set(bits) == {name for block in blocks for name in block.linears}
    for block in blocks:
        rate = result.history[-1]["rates"][block.name]
        for name in block.linears:
            weight = named[name].weight
            mask = masks.unpack(bits[name], weight.shape[1])
            assert (weight[~mask] == 0).all()
            assert 0 <= rate - masks.sparsity(mask) <= 1 / 32  # one weight of a row of 32
    dense = transformers.AutoModelForCausalLM.from_pretrained(source)
    for name, parameter in dense.named_parameters():
        if not any(name.startswith(linear) for linear in bits):
            assert torch.equal(parameter, loaded.get_parameter(name)), f"{name} is no business of ours"
    assert not (tmp_path / "out" / "run" / "pruned.safetensors").exists()


@pytest.mark.parametrize(
    ("kind", "pruner"),
    [("llama", "wanda"), ("llama", "sparsegpt"), ("llama", "alps"), ("falcon", "wanda"), ("mixtral", "sparsegpt")],
)
def test_merged_and_adapted_model_agree(kind: str, pruner: str, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 2, in fp32: relative 1e-5."""
    before: list[Tensor] = []
    merge = pipeline.Subject.merge

    def spy(subject: Any) -> Any:
        assert any(bool(linear.lora_B.any()) for block in subject.blocks for linear in block.masked.values())
        before.append(logits(subject.model))
        return merge(subject)

    monkeypatch.setattr(pipeline.Subject, "merge", spy)
    result = losa.compress(tiny(kind), changed(small, pruner=pruner), tokenizer=tokenizer())
    assert (logits(result.model) - before[0]).norm() <= 1e-5 * before[0].norm()


def one_shot(model: Any, tokens: Tensor, pruned: Callable[[str, Tensor, Tensor], Tensor]) -> None:
    """Block by block, each linear's weight becomes what `pruned` makes of it and of its inputs ([samples, length, in]), which come
    from the pruned blocks before."""
    for block in find_blocks(model):
        inputs: dict[str, Tensor] = {}

        def keep(_m: Any, x: tuple[Tensor], name: str, inputs: dict[str, Tensor] = inputs) -> None:
            inputs[name] = x[0].view(len(tokens), -1, x[0].shape[-1])  # OPT's MLP flattens

        hooks = [linear.register_forward_pre_hook(partial(keep, name=name)) for name, linear in block.linears.items()]
        with torch.no_grad():
            model(input_ids=tokens)
        for hook in hooks:
            hook.remove()
        for name, linear in block.linears.items():
            linear.weight.data.copy_(pruned(name, linear.weight.data, inputs[name]))


def wanda(_name: str, weight: Tensor, x: Tensor) -> Tensor:
    """Half of every row, written from the paper."""
    score = weight.abs() * x.flatten(0, -2).norm(dim=0)
    order = score.argsort(dim=1, stable=True)[:, : score.shape[1] // 2]
    return weight.scatter(1, order, 0)


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen3"])
def test_one_step_without_training_is_the_published_method(kind: str, small: Recipe) -> None:
    """Invariant 3, weight for weight."""
    plain = changed(small, steps=1, allocator="uniform", recovery="none", eval_data="")
    oracle = tiny(kind).double()
    one_shot(oracle, calibration_tokens(small.calibration, tokenizer(), 12, 24, small.seed), wanda)
    result = losa.compress(tiny(kind), plain, tokenizer=tokenizer())
    for block, expected in zip(find_blocks(result.model), find_blocks(oracle), strict=True):
        for name, linear in block.linears.items():
            assert torch.equal(linear.weight.double(), expected.linears[name].weight), name


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_one_step_of_sparsegpt_is_the_published_method(kind: str, small: Recipe) -> None:
    """Against surgery in float64, which follows the masks and asserts that they are its own but for ties."""
    plain = changed(small, steps=1, allocator="uniform", recovery="none", eval_data="", pruner="sparsegpt")
    result = losa.compress(tiny(kind), plain, tokenizer=tokenizer())
    found = {name: linear.weight for block in find_blocks(result.model) for name, linear in block.linears.items()}

    def surgery(name: str, weight: Tensor, x: Tensor) -> Tensor:
        every = torch.ones_like(weight, dtype=torch.bool)
        return torch.from_numpy(surgeon(weight, every, x, 0.5, found[name] != 0, block=128))

    oracle = tiny(kind).double()
    one_shot(oracle, calibration_tokens(small.calibration, tokenizer(), 12, 24, small.seed), surgery)
    for block in find_blocks(oracle):
        for name, linear in block.linears.items():
            torch.testing.assert_close(found[name].double(), linear.weight.data, rtol=1e-4, atol=1e-5)


def test_errors_are_those_against_the_dense_model(small: Recipe) -> None:
    """E_l over all tokens, by the formula, from two whole models."""
    plain = changed(small, steps=1, recovery="none", error_tokens=0)
    result = losa.compress(tiny(), plain, tokenizer=tokenizer())
    tokens = calibration_tokens(small.calibration, tokenizer(), 12, 24, small.seed)
    outputs = []
    for model in (tiny().double(), result.model.double()):
        features: list[Tensor] = []
        for block in find_blocks(model):
            block.module.register_forward_hook(lambda _m, _i, out, to=features: to.append(out.flatten(0, 1)))
        with torch.no_grad():
            model(input_ids=tokens)
        outputs.append(features)
    for dense, pruned, error in zip(*outputs, result.history[0]["errors"], strict=True):
        expected = (((dense - pruned) / dense.norm(dim=0)) ** 2).sum() / dense.shape[1]
        assert error == pytest.approx(expected.item(), rel=1e-3)


def test_an_error_counts_the_channels_that_have_one() -> None:
    """One that the dense block leaves at zero has no norm to measure against."""
    dense, pruned = torch.tensor([[3.0, 0.0], [4.0, 0.0]]), torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    assert reconstruction_error("block", dense, pruned) == 1 / 25
    assert reconstruction_error("block", dense[:, 1:], pruned[:, 1:]) == 0.0


def test_an_error_that_is_no_number_ends_the_run(small: Recipe) -> None:
    """Here one weight overflows the type of the block's output; before, such a block had the lowest rank."""
    model = tiny()
    model.model.layers[1].mlp.down_proj.weight.data[0] = 1e38
    with pytest.raises(LosaError, match=r"^model.layers.1 puts out NaN or infinity in float32: use"):
        losa.compress(model, changed(small, allocator="uniform"), tokenizer=tokenizer())


def test_same_seed_same_bytes_and_another_seed_others(llama: Path, tmp_path: Path, small: Recipe) -> None:
    """Invariant 4."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        losa.compress(str(llama), changed(small, seed=seed), tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["model.safetensors"] != files(tmp_path / "c")["model.safetensors"]


def test_masks_are_nested_and_ranks_sum_to_the_mean(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over four steps, pruned weights stay pruned (set_mask refuses others) and ranks grow as equation 9 says."""
    recipe = changed(small, steps=4, pruner="sparsegpt", train_samples=32)
    result = losa.compress(tiny(), recipe, tokenizer=tokenizer())
    assert [sum(record["ranks"]) for record in result.history] == [6, 9, 12, 15]
    for earlier, later in zip(result.history, result.history[1:], strict=False):
        assert all(later["rates"][name] >= rate for name, rate in earlier["rates"].items())
    for step, record in enumerate(result.history, 1):
        mean = sum(record["rates"].values()) / 3
        assert mean == pytest.approx(recipe.sparsity_at(step), abs=1e-9)


def test_each_strategy_can_be_switched_off_alone(small: Recipe) -> None:
    full = losa.compress(tiny(), small, tokenizer=tokenizer()).history
    rates = losa.compress(tiny(), changed(small, allocator="uniform"), tokenizer=tokenizer()).history
    same = losa.compress(tiny(), changed(small, rank_by="uniform"), tokenizer=tokenizer()).history
    by_rate = losa.compress(tiny(), changed(small, rank_by="sparsity"), tokenizer=tokenizer()).history
    once = losa.compress(tiny(), changed(small, steps=1), tokenizer=tokenizer()).history
    assert len(set(full[-1]["rates"].values())) > 1 and len(set(full[-1]["ranks"])) > 1
    assert set(rates[-1]["rates"].values()) == {0.5} and len(set(rates[-1]["ranks"])) > 1
    assert len(set(same[-1]["rates"].values())) > 1 and set(same[-1]["ranks"]) == {3}
    assert sum(by_rate[-1]["ranks"]) == 9 and by_rate[-1]["ranks"] != full[-1]["ranks"]
    assert len(once) == 1


@pytest.mark.parametrize(("targets", "count"), [("all", 7), ("qv", 2), ("qkvo", 4), (r"mlp\.", 3)])
def test_targets_are_adapted_and_everything_is_pruned(targets: str, count: int, small: Recipe, tmp_path: Path) -> None:
    seen: list[int] = []

    class Spy(MaskedLowRank):
        def recover(self, subject: Any, *rest: Any) -> None:
            super().recover(subject, *rest)
            seen.append(sum(bool(linear.rank) for linear in subject.blocks[0].masked.values()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("losa.recovery.low_rank.MaskedLowRank", Spy)
        result = losa.compress(tiny(), changed(small, targets=targets), tmp_path / "out", tokenizer=tokenizer())
    assert seen == [count, count]
    assert all(
        masks.sparsity(masks.unpack(b, 48)[:, :32]) > 0.4
        for b in load_masks(tmp_path / "out").values()
        if b.shape[1] == 6
    )
    assert result.measurements["sparse"]["sparsity"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own call
def test_lora_kept_apart_is_saved_as_peft_reads_it(
    llama: Path, tmp_path: Path, small: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    recipe = changed(small, recovery="lora", steps=1, allocator="uniform")
    result = losa.compress(str(llama), recipe, tmp_path / "out", progress=Progress())
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert result.measurements["sparse"]["loads"] == "transformers, and PEFT for the pairs in adapter/"
    assert "'lora' does not merge: its pairs stay apart" in capsys.readouterr().err
    assert result.model is None  # alone it is not what was measured
    assert losa.compress(str(llama), recipe, tmp_path / "out", resume=True).model is None
    whole = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    from losa.data import evaluation_tokens
    from losa.evaluate import perplexity

    tokens = evaluation_tokens(small.eval_data, tokenizer())[: small.eval_tokens]
    assert perplexity(whole, tokens, 64) == pytest.approx(result.measurements["sparse"]["perplexity"], rel=1e-4)


@pytest.mark.parametrize("recovery", ["lora", "adalora"])
def test_a_lora_kept_apart_counts_in_what_is_measured_later(
    recovery: str, llama: Path, tmp_path: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Evaluating and generating load it with the model; without it, both come out otherwise."""
    pytest.importorskip("peft")
    settings = {"recovery": recovery, "rank_by": "uniform", "train_samples": 60, "learning_rate": 3e-2}
    recipe = changed(small, steps=1, allocator="uniform", **settings)
    out = tmp_path / "out"
    expected = losa.compress(str(llama), recipe, out).measurements["sparse"]["perplexity"]
    bare = shutil.copytree(out, tmp_path / "bare", ignore=shutil.ignore_patterns("adapter"))
    on_cpu = ["--device", "cpu", "--dtype", "float32", "--json"]
    perplexities, texts = [], []
    for folder in (out, bare):
        data = ["--data", small.eval_data, "--tokens", str(small.eval_tokens)]
        assert main(["evaluate", str(folder), *data, *on_cpu]) == 0
        perplexities.append(json.loads(capsys.readouterr().out)["perplexity"])
        assert main(["generate", str(folder), "--prompt", "def", "--max-new-tokens", "20", *on_cpu]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert perplexities[0] == pytest.approx(expected, rel=1e-4) != pytest.approx(perplexities[1], rel=1e-2)
    assert texts[0] != texts[1]
    with monkeypatch.context() as patch:
        patch.setattr(losa.model, "find_spec", lambda _: None)
        with pytest.raises(LosaError, match=r"has an adapter beside it, which needs PEFT: pip install peft"):
            losa.model.load_whole(str(out), recipe)
    weights = out / "adapter" / "adapter_model.safetensors"
    weights.rename(out / "adapter" / "adapter_model.bin")
    with pytest.raises(LosaError, match=r"without adapter_model\.safetensors: losa loads no pickles"):
        losa.model.load_whole(str(out), recipe)
    weights.write_bytes(b"damaged")
    with pytest.raises(LosaError, match="cannot load the model"):
        losa.model.load_whole(str(out), recipe)


@pytest.mark.parametrize("key", ["weight", "mask_bits", "lora_B"])
def test_a_state_that_lacks_something_is_not_filled_in(key: str, llama: Path, tmp_path: Path, small: Recipe) -> None:
    out, recipe = tmp_path / "out", changed(small, steps=1, train_samples=4)
    with killed_after(2):  # the dense model's features, and the first masks
        losa.compress(str(llama), recipe, out)
    path = out / "run" / "pruned.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    del tensors[f"model.layers.1.mlp.up_proj:{key}"]
    save_file(tensors, path, meta)
    with pytest.raises(LosaError, match=rf"pruned\.safetensors is damaged \(no 'model.*up_proj:{key}'\)"):
        losa.compress(str(llama), recipe, out, resume=True)


def test_lora_kept_apart_cannot_take_steps(small: Recipe) -> None:
    with pytest.raises(LosaError, match="does not merge"):
        losa.compress(tiny(), changed(small, recovery="lora"), tokenizer=tokenizer())


def test_recovery_lowers_the_loss(small: Recipe, llama: Path, tmp_path: Path) -> None:
    pruned = losa.compress(str(llama), changed(small, recovery="none"), tmp_path / "none").measurements
    better = losa.compress(
        str(llama), changed(small, train_samples=200, learning_rate=1e-2), tmp_path / "losa"
    ).measurements
    assert better["sparse"]["perplexity"] < 0.9 * pruned["sparse"]["perplexity"]


def test_a_loss_that_is_not_finite_ends_the_run(small: Recipe) -> None:
    with pytest.raises(LosaError, match="lower learning_rate"):
        losa.compress(tiny(), changed(small, learning_rate=1e30, clip=1e30, train_samples=60), tokenizer=tokenizer())


@pytest.mark.parametrize(
    ("pruner", "moment"), [*product(["wanda", "sparsegpt"], range(8)), ("pruner-zero", 3), ("alps", 3)]
)
def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(
    moment: int, pruner: str, llama: Path, tmp_path: Path, small: Recipe
) -> None:
    """Invariant 4: killed after its n-th save (dense, pruned, two of each recovery, ...), resumed, the same files."""
    recipe = changed(small, pruner=pruner, checkpoint_minutes=0.0)
    whole = losa.compress(str(llama), recipe, tmp_path / "whole")
    with killed_after(moment + 1):
        losa.compress(str(llama), recipe, tmp_path / "killed")
    assert not (tmp_path / "killed" / "losa.json").exists()
    resumed = losa.compress(str(llama), recipe, tmp_path / "killed", resume=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert resumed.history == whole.history


def test_resuming_a_finished_run_returns_its_result(llama: Path, tmp_path: Path, small: Recipe) -> None:
    first = losa.compress(str(llama), small, tmp_path / "out")
    again = losa.compress(str(llama), small, tmp_path / "out", resume=True)
    assert again.measurements == first.measurements
    assert torch.equal(logits(again.model), logits(first.model))


def test_losa_json_tells_where_the_model_came_from(llama: Path, tmp_path: Path, small: Recipe) -> None:
    result = losa.compress(str(llama), small, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "losa.json").read_text())
    assert made["source"] == str(llama) and made["recipe"] == small.to_json()
    assert made["measurements"] == result.measurements and made["versions"]["losa"] == losa.__version__
    events = [json.loads(line) for line in (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()]
    kinds = ("started", "dense", "step", "finished")
    assert [e["event"] for e in events if e["event"] in kinds] == ["started", "dense", "step", "step", "finished"]
    assert sum(e["event"] == "update" for e in events) == 5  # 6 rows in batches of 4, then 10


def test_training_rows_are_read_once_each(small: Recipe) -> None:
    seen: list[Tensor] = []

    class Spy(MaskedLowRank):
        def recover(self, subject: Any, examples: Any, *rest: Any) -> None:
            seen.extend(example.input_ids for example in examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("losa.recovery.low_rank.MaskedLowRank", Spy)
        losa.compress(tiny(), small, tokenizer=tokenizer())
    expected = training_examples(small.train_data, tokenizer(), 16, 24, small.seed)
    assert len(seen) == 16 and all(torch.equal(a, b.input_ids) for a, b in zip(seen, expected, strict=True))


# ------------------------------------------------------------------------------------------------- units and orders


@pytest.mark.parametrize("allocator", ["owl", "error", "uniform"])
def test_every_linear_can_have_a_rate_of_its_own(allocator: str, small: Recipe) -> None:
    recipe = changed(small, allocator=allocator, rates_per="linear", pruner="magnitude")
    result = losa.compress(tiny(), recipe, tokenizer=tokenizer())
    rates = result.history[-1]["rates"]
    assert len(rates) == 3 * 7 and (len(set(rates.values())) > 1) == (allocator != "uniform")
    for block in find_blocks(result.model):
        for name, linear in block.linears.items():
            pruned = int((linear.weight == 0).sum())
            assert pruned == int(rates[name] * linear.weight.numel() + 1e-9)
    assert result.measurements["sparse"]["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_rmi_knows_blocks_only(small: Recipe) -> None:
    with pytest.raises(LosaError, match="allocator 'rmi' knows blocks only"):
        changed(small, rates_per="linear")


def test_outliers_and_errors_are_those_of_the_model(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the allocators see against what a plain dense model says."""
    from losa.allocators import error, owl

    seen: dict[str, Any] = {}
    for kind in (owl.OWL, error.MeasuredError):

        def spy(self: Any, evidence: Any, rates: Any = kind.rates) -> Any:
            seen[self.needs] = evidence
            return rates(self, evidence)

        monkeypatch.setattr(kind, "rates", spy)
    plain = changed(small, steps=1, recovery="none", eval_data="", error_tokens=0)
    for allocator in ("owl", "error"):
        losa.compress(tiny(), changed(plain, allocator=allocator), tokenizer=tokenizer())
    tokens = calibration_tokens(small.calibration, tokenizer(), 12, 24, small.seed)[:8]
    model = tiny()
    captured: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, x, n=name: captured.__setitem__(n, x[0].flatten(0, 1)))
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    for block, share, table in zip(find_blocks(model), seen["scores"].seen, seen["errors"].seen, strict=True):
        scores = torch.cat(
            [(m.weight.abs() * (captured[n].square().sum(0) / 8).sqrt()).flatten() for n, m in block.linears.items()]
        )
        assert float(share) == pytest.approx(float((scores > 5 * scores.mean()).double().mean()), abs=1e-4)
        rate = float(table[0, -1])
        assert rate == pytest.approx(0.55)
        one_block_pruned = tiny()
        pruned = find_blocks(one_block_pruned)[block.index]
        for name, linear in pruned.linears.items():
            score = linear.weight.abs() * (captured[name].square().sum(0) / 8).sqrt()
            gone = score.argsort(dim=1, stable=True)[:, : int(rate * score.shape[1] + 1e-9)]
            linear.weight.data.scatter_(1, gone, 0)
        if block.index < 2:  # behind the last one stands the model's norm
            with torch.no_grad():
                after = one_block_pruned(tokens, output_hidden_states=True).hidden_states[block.index + 1]
            whole = states[block.index + 1]
            norm = whole.flatten(0, 1).square().sum(0)
            error_there = ((after - whole).flatten(0, 1).square().sum(0) / norm).mean()
            assert float(table[1, -1]) == pytest.approx(float(error_there), rel=1e-3)


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_true_sequential_sees_what_is_pruned_before(pruner: str, small: Recipe) -> None:
    """Against an oracle that prunes q,k,v; then o; then gate, up; then down, each from a fresh forward pass."""
    from losa import registry
    from losa.masks import count_pruned

    plain = changed(
        small, steps=1, allocator="uniform", recovery="none", eval_data="", pruner=pruner, true_sequential=True
    )
    result = losa.compress(tiny(), plain, tokenizer=tokenizer())
    tokens = calibration_tokens(small.calibration, tokenizer(), 12, 24, small.seed)
    oracle = tiny()
    method = registry.get("pruner", pruner)()
    for block in find_blocks(oracle):
        for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            for name in [n for n in block.linears if n.endswith(group)]:
                linear, inputs = block.linears[name], []
                hook = linear.register_forward_pre_hook(lambda _, x, inputs=inputs: inputs.append(x[0]))
                with torch.no_grad():
                    oracle(tokens)
                hook.remove()
                statistic = method.statistic(linear.in_features, "cpu")
                statistic.update(inputs[0].flatten(0, 1), len(tokens))
                linear.new, _ = method.prune(linear.weight.detach(), None, 0.5, statistic)
            for name in [n for n in block.linears if n.endswith(group)]:
                block.linears[name].weight.data = block.linears[name].new
    for block, expected in zip(find_blocks(result.model), find_blocks(oracle), strict=True):
        for name, linear in block.linears.items():
            torch.testing.assert_close(linear.weight, expected.linears[name].weight, rtol=1e-3, atol=1e-4)
            assert int((linear.weight == 0).sum()) >= count_pruned(0.5, linear.weight.numel())
    at_once = losa.compress(tiny(), changed(plain, true_sequential=False), tokenizer=tokenizer())
    assert not torch.equal(
        at_once.model.model.layers[0].mlp.down_proj.weight, oracle.model.layers[0].mlp.down_proj.weight
    )


# ------------------------------------------------------------------------------------------------- how it is called


def test_a_recipe_may_be_a_dict_or_a_file(small: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(small.to_json() | {"steps": 1}))
    assert losa.compress(tiny(), tmp_path / "mine.json", tokenizer=tokenizer()).recipe == changed(small, steps=1)
    with pytest.raises(LosaError, match="a NoneType is no recipe: expected a Recipe, a dict"):
        losa.compress(tiny(), None, tokenizer=tokenizer())  # type: ignore[arg-type]
    assert losa.compress(tiny(), small.to_json() | {"steps": 1}, tokenizer=tokenizer()).recipe == changed(
        small, steps=1
    )
    with pytest.raises(LosaError, match="did you mean 'sparsity'"):
        losa.compress(tiny(), {"sparsty": 0.5}, tokenizer=tokenizer())


def test_a_loaded_model_needs_its_tokenizer(llama: Path, small: Recipe) -> None:
    with pytest.raises(LosaError, match="needs its tokenizer"):
        losa.compress(tiny(), small)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(llama)  # it lies there too
    assert losa.compress(loaded, changed(small, steps=1)).tokenizer.get_vocab() == tokenizer().get_vocab()


def test_what_fails_early_leaves_nothing_and_replaces_nothing(llama: Path, tmp_path: Path, small: Recipe) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    bad = changed(small, calibration=str(empty))
    with pytest.raises(LosaError, match="empty"):
        losa.compress(str(llama), bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    losa.compress(str(llama), small, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(LosaError, match="empty"):
        losa.compress(str(llama), bad, tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == before
