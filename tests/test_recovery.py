"""Every recovery method under its contract; the kept weights trained, against plain autograd in float64 and plain AdamW."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import changed, files, killed_after, save_tiny, tiny, tokenizer
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import losa
from losa import masks, registry
from losa.adapters import LowRankLinear, MaskedLinear
from losa.blocks import Subject, find_blocks
from losa.data import collate, training_examples
from losa.errors import LosaError
from losa.export import load_masks
from losa.inspection import inspect, plan
from losa.progress import Progress
from losa.recipe import Recipe
from losa.recovery.full import KeptWeights
from losa.run import Run

TEXT = torch.arange(1, 40).unsqueeze(0)
MERGING = [name for name in registry.RECOVERIES if registry.get("recovery", name).merges]
TRAINING = [name for name in registry.RECOVERIES if registry.get("recovery", name).trains]


def recovering(small: Recipe, name: str, steps: int | None = None, **settings: Any) -> Recipe:
    """`small` with a recovery, in as many steps (2 at most) and with ranks as it knows."""
    method = registry.get("recovery", name)
    steps = steps or (1 if method.once else 2)
    return changed(small, recovery=name, steps=steps, rank_by=method.rank_by[0], **settings)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=TEXT).logits
    return out


# ------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", registry.RECOVERIES)
def test_each_says_what_it_trains_and_costs(name: str, llama: Path, small: Recipe) -> None:
    method = registry.get("recovery", name)
    planned = plan(str(llama), recovering(small, name, steps=1))
    assert planned["trained"] == method.trained and planned["merges"] == method.merges
    assert (planned["parameters_trained"] > 0) == method.trains
    assert method.trains or planned["memory_parts"]["recovery"] == 0


@pytest.mark.parametrize("name", TRAINING)
def test_each_trains_no_more_than_it_says(name: str, llama: Path, small: Recipe, tmp_path: Path) -> None:
    recipe = recovering(small, name, steps=1, checkpoint_minutes=0.0)
    with killed_after(3):  # the dense model, what was pruned, the first update
        losa.compress(str(llama), recipe, tmp_path / "out")
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "run" / "recovery.safetensors", framework="pt") as file:
        trained = sum(file.get_tensor(key).numel() for key in file.keys() if key.endswith(":value"))  # noqa: SIM118
    said = plan(str(llama), recipe)["parameters_trained"]
    assert 0.9 * said <= trained <= 1.03 * said  # counts are rounded down in rows of 32 weights


@pytest.mark.parametrize("name", MERGING)
def test_what_merges_keeps_every_zero_and_the_output(
    name: str, llama: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariants 1, 2 and 6."""
    before: list[Tensor] = []
    merge = Subject.merge

    def spy(subject: Any) -> Any:
        before.append(logits(subject.model))
        return merge(subject)

    monkeypatch.setattr(Subject, "merge", spy)
    result = losa.compress(str(llama), recovering(small, name), tmp_path / "out")
    assert (logits(result.model) - before[0]).norm() <= 1e-5 * before[0].norm()
    bits = load_masks(tmp_path / "out")
    for block in find_blocks(result.model):
        for linear_name, linear in block.linears.items():
            mask = masks.unpack(bits[linear_name], linear.in_features)
            assert (linear.weight[~mask] == 0).all() and not torch.signbit(linear.weight[~mask]).any()
            assert masks.sparsity(mask) > 0.4
    again = losa.compress(str(llama), recovering(small, name)).measurements
    assert again["sparse"]["perplexity"] == result.measurements["sparse"]["perplexity"]


@pytest.mark.parametrize("name", TRAINING)
def test_each_goes_on_from_a_kill_to_the_same_bytes(name: str, llama: Path, tmp_path: Path, small: Recipe) -> None:
    """Invariant 4."""
    recipe = recovering(small, name, checkpoint_minutes=0.0)
    losa.compress(str(llama), recipe, tmp_path / "whole")
    for moment in (3, 6) if recipe.steps == 1 else (3, 4, 6, 9):
        output = tmp_path / f"killed-{moment}"
        with killed_after(moment):
            losa.compress(str(llama), recipe, output)
        losa.compress(str(llama), recipe, output, resume=True)
        assert files(output) == files(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------- the open linear


def make(
    out: int, columns: int, rank: int = 0, dtype: torch.dtype = torch.float32, seed: int = 0, bias: bool = True
) -> MaskedLinear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, out, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer = MaskedLinear(linear.to(dtype), 4, 2.0)
    layer.set_mask(torch.rand(out, columns, generator=generator) < 0.5)
    layer.set_rank(rank, generator)
    if rank:
        assert layer.lora_B is not None
        layer.lora_B.data[:, :rank] = torch.randn(out, rank, generator=generator)
    return layer


@given(
    out=st.integers(1, 30),
    columns=st.integers(1, 30),
    rank=st.integers(0, 4),
    lead=st.sampled_from([(1,), (7,), (2, 5)]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
@bounded(max_examples=40, deadline=None)
def test_kept_weights_get_the_gradients_of_the_formula(
    out: int, columns: int, rank: int, lead: tuple[int, ...], bias: bool, seed: int
) -> None:
    layer = make(out, columns, rank, seed=seed, bias=bias)
    x = torch.randn(*lead, columns, generator=torch.Generator().manual_seed(seed + 1)).requires_grad_()
    dy = torch.randn(*lead, out, generator=torch.Generator().manual_seed(seed + 2))
    kept = layer.open()
    y = layer(x)
    y.backward(dy)
    whole = layer.effective_weight().double().requires_grad_()
    wide = x.detach().double().requires_grad_()
    truth = F.linear(wide, whole * layer.mask, None if layer.bias is None else layer.bias.double())
    truth.backward(dy.double())
    assert whole.grad is not None and kept.grad is not None
    for got, want in ((y, truth), (x.grad, wide.grad), (kept.grad, whole.grad[layer.mask])):
        assert got is not None and want is not None
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 3])
def test_opening_and_closing_moves_nothing(rank: int) -> None:
    layer = make(20, 13, rank)
    before, pair = layer.effective_weight(), [p.detach().clone() for p in (layer.lora_A, layer.lora_B) if p is not None]
    kept = layer.open()
    assert torch.equal(layer.weight, before) and kept.numel() == int(layer.mask.sum())
    kept.data += 1
    layer.write_back()
    layer.close()
    assert layer.rank == rank and layer.kept is None
    torch.testing.assert_close(layer.effective_weight(), before + layer.mask)
    assert (layer.weight[~layer.mask] == 0).all()
    for p, q in zip((layer.lora_A, layer.lora_B), pair, strict=True):
        assert p is not None and torch.equal(p, q)


def test_updates_too_small_for_bf16_add_up() -> None:
    layer = make(8, 8, dtype=torch.bfloat16)
    before = layer.weight.clone()
    kept = layer.open()
    for _ in range(64):
        kept.data *= 1 + 2**-11  # an eighth of what bf16 can tell apart
        layer.write_back()
    layer.close()
    assert layer.weight.dtype == torch.bfloat16
    moved = (layer.weight.float() / before.float())[layer.mask]
    assert ((moved > 1.02) & (moved < 1.045)).all()


def test_what_cannot_be_opened_says_so() -> None:
    layer = make(4, 4)
    layer.open()
    with pytest.raises(LosaError, match="open already"):
        layer.open()
    apart = LowRankLinear(nn.Linear(4, 4), 2, 1.0)
    apart.set_rank(1, torch.Generator())
    with pytest.raises(LosaError, match="does not merge"):
        apart.open()


# ------------------------------------------------------------------------------------------------- kept weights trained


def oracle(model: Any, keep: dict[str, Tensor], recipe: Recipe) -> None:
    """Plain AdamW on the whole weights, what is pruned set to zero in weights and gradients; the published schedule."""
    weights = {name: linear.weight for block in find_blocks(model) for name, linear in block.linears.items()}
    model.requires_grad_(False)
    for name, weight in weights.items():
        weight.data *= keep[name]
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    examples = training_examples(recipe.train_data, tokenizer(), recipe.train_samples, recipe.train_length, recipe.seed)
    updates = recipe.train_samples // recipe.batch_size
    for update in range(updates):
        rise = -(-recipe.warmup * updates // 1)
        share = (update + 1) / rise if update < rise else (updates - update) / (updates - rise)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * share
        batch = collate(examples[update * recipe.batch_size :][: recipe.batch_size], 0)
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        F.cross_entropy(out[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            weight.grad *= keep[name]
        nn.utils.clip_grad_norm_(weights.values(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_training_all_kept_weights_is_masked_adamw(kind: str, small: Recipe, tmp_path: Path) -> None:
    recipe = changed(small, recovery="full", steps=1, eval_data="", micro_batch_size=4, learning_rate=1e-3)
    result = losa.compress(tiny(kind), recipe, tmp_path / "out", tokenizer=tokenizer())
    bits = load_masks(tmp_path / "out")
    want = tiny(kind)
    linears = {name: linear for block in find_blocks(want) for name, linear in block.linears.items()}
    keep = {name: masks.unpack(bits[name], linear.in_features) for name, linear in linears.items()}
    start = {name: linear.weight.detach() * keep[name] for name, linear in linears.items()}
    oracle(want, keep, recipe)
    for block in find_blocks(result.model):
        for name, linear in block.linears.items():
            moved, expected = linear.weight - start[name], linears[name].weight.detach() - start[name]
            assert expected.norm() > 0
            assert (moved - expected).norm() <= 2e-2 * expected.norm(), name  # Adam divides by what may be nearly zero


def test_only_targets_are_trained(small: Recipe, tmp_path: Path) -> None:
    recipe = changed(small, recovery="full", steps=1, targets="qv", eval_data="")
    result = losa.compress(tiny(), recipe, tokenizer=tokenizer())
    plain = losa.compress(tiny(), changed(recipe, recovery="none"), tokenizer=tokenizer())
    for got, base in zip(find_blocks(result.model), find_blocks(plain.model), strict=True):
        for name in got.linears:
            same = torch.equal(got.linears[name].weight, base.linears[name].weight)
            assert same != name.endswith(("q_proj", "v_proj"))


def test_experts_without_a_token_stay_as_they_are(small: Recipe) -> None:
    """And those that have some move; 3-D parameters come back as such."""
    result = losa.compress(tiny("mixtral"), changed(small, recovery="full"), tokenizer=tokenizer())
    plain = losa.compress(tiny("mixtral"), changed(small, recovery="none"), tokenizer=tokenizer())
    assert result.measurements["sparse"]["perplexity"] != plain.measurements["sparse"]["perplexity"]
    assert result.measurements["sparse"]["sparsity"] == plain.measurements["sparse"]["sparsity"]


@pytest.mark.parametrize("pattern", ["2:4", "structured"])
def test_full_recovery_of_other_patterns(pattern: str, small: Recipe, tmp_path: Path) -> None:
    settings = {name: value for name, value in small.to_json().items() if name not in ("sparsity", "pruner")}
    settings |= {"pattern": pattern, "recovery": "full"}
    settings |= {"allocator": "uniform", "sparsity": 0.5} if pattern == "structured" else {}
    result = losa.compress(tiny(), settings, tmp_path / "out", tokenizer=tokenizer())
    none = losa.compress(tiny(), settings | {"recovery": "none"}, tokenizer=tokenizer())
    assert result.measurements["sparse"]["sparsity"] == none.measurements["sparse"]["sparsity"]
    assert result.measurements["sparse"]["perplexity"] < none.measurements["sparse"]["perplexity"]
    assert result.history[-1]["ranks"] == []
    inspect(tmp_path / "out")


def test_bf16_models_are_trained_in_fp32(small: Recipe, tmp_path: Path) -> None:
    """A learning rate of which bf16 weights would see nothing."""
    source = str(save_tiny(tmp_path / "dense", dtype=torch.bfloat16))
    recipe = changed(small, recovery="full", steps=1, dtype="bfloat16", learning_rate=1e-3, eval_data="")
    result = losa.compress(source, recipe)
    base = losa.compress(source, changed(recipe, recovery="none"))
    assert result.model.dtype == torch.bfloat16
    moved = [
        float((a.linears[n].weight.float() - b.linears[n].weight.float()).norm())
        for a, b in zip(find_blocks(result.model), find_blocks(base.model), strict=True)
        for n in a.linears
    ]
    assert min(moved) > 0


def test_full_writes_no_ranks_and_inspect_reads_it(llama: Path, small: Recipe, tmp_path: Path) -> None:
    losa.compress(str(llama), changed(small, recovery="full"), tmp_path / "out")
    assert all(block["rank"] is None for block in inspect(tmp_path / "out")["blocks"])
    made = json.loads((tmp_path / "out" / "losa.json").read_text())
    assert [record["ranks"] for record in made["history"]] == [[], []]
    made["history"][-1]["ranks"] = [4]
    (tmp_path / "out" / "losa.json").write_text(json.dumps(made))
    with pytest.raises(LosaError, match=r"losa\.json is damaged \(ValueError: 1 ranks, 3 blocks\)"):
        inspect(tmp_path / "out")


def test_recovery_stops_at_a_loss_that_is_not_finite(small: Recipe) -> None:
    model = tiny()
    subject = Subject(model, tokenizer(), find_blocks(model), "tiny", torch.float32)
    recipe = changed(small, recovery="full", steps=1, learning_rate=1e30, clip=1e30)
    subject.wrap(MaskedLinear, recipe, 0)
    examples = training_examples(recipe.train_data, tokenizer(), 16, 24, 0)
    with pytest.raises(LosaError, match="lower learning_rate"):
        KeptWeights().recover(subject, examples, recipe, 1, Run(None, Progress(quiet=True)))
