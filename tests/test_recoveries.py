"""What every registered recovery must do: train under its mask, say what it is, merge exactly or refuse to, resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import changed, files, killed_after, tiny, tokenizer
from torch import Tensor

import losa
from losa import masks, pipeline, registry
from losa.blocks import find_blocks
from losa.errors import LosaError
from losa.export import load_masks
from losa.recipe import Recipe
from losa.recovery import adalora, training
from losa.recovery.adalora import AdaLoRA, SVDLinear
from losa.recovery.sora import GatedLinear, Proximal

RECOVERIES = sorted(registry.RECOVERIES)
METHODS = {name: registry.get("recovery", name) for name in RECOVERIES}
TEXT = torch.arange(1, 40).unsqueeze(0)


@pytest.fixture
def once(settings: dict[str, Any]) -> Recipe:
    """One step, uniform, so that any recovery can take it."""
    return Recipe(**settings | {"steps": 1, "allocator": "uniform", "rank_by": "uniform", "mean_rank": 3.0})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=TEXT).logits
    return out


@pytest.mark.parametrize("name", RECOVERIES)
def test_it_says_what_it_trains_and_trains_no_more(
    name: str, once: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    train = training.train

    def spy(subject: Any, parameters: dict[str, Any], *rest: Any, **named: Any) -> None:
        counts.append(sum(p.numel() for p in parameters.values()))
        assert all(p.dtype == torch.float32 for p in parameters.values())
        train(subject, parameters, *rest, **named)
        assert not any(p.requires_grad for p in subject.model.parameters())

    for module in {METHODS[n].__module__ for n in RECOVERIES if METHODS[n].trains}:
        monkeypatch.setattr(f"{module}.train", spy)
    losa.compress(tiny(), changed(once, recovery=name), tmp_path / "out", tokenizer=tokenizer())
    said = sum(
        METHODS[name].parameters(tuple(linear.weight.shape), once)
        for block in find_blocks(tiny())
        for linear in block.linears.values()
    )
    assert METHODS[name].trained.strip() and len(counts) == METHODS[name].trains
    assert sum(counts) <= said <= 1.1 * sum(counts)


@pytest.mark.parametrize("name", RECOVERIES)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own call
def test_it_loses_no_zero_and_merges_exactly_or_is_saved_apart(
    name: str, llama: Path, once: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariants 1, 2, 6; and recovery recovers."""
    before: list[Tensor] = []
    merge = pipeline.Subject.merge

    def spy(subject: Any) -> Any:
        before.append(logits(subject.model))
        return merge(subject)

    monkeypatch.setattr(pipeline.Subject, "merge", spy)
    plain = losa.compress(str(llama), changed(once, recovery="none"), tmp_path / "none")
    recipe = changed(once, recovery=name, train_samples=160, learning_rate=1e-2)
    result = losa.compress(str(llama), recipe, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for linear, bits in load_masks(tmp_path / "out").items():
        weight = loaded.get_submodule(linear).weight
        assert not weight[~masks.unpack(bits, weight.shape[1])].any()
    found = result.measurements["sparse"]["perplexity"]
    if METHODS[name].trains:
        assert found < 0.95 * plain.measurements["sparse"]["perplexity"]
    if METHODS[name].merges:
        assert torch.equal(logits(loaded), logits(result.model))
        assert (logits(result.model) - before[-1]).norm() <= 1e-5 * before[-1].norm()
        return
    import peft

    from losa.data import evaluation_tokens
    from losa.evaluate import perplexity

    tokens = evaluation_tokens(once.eval_data, tokenizer())[: once.eval_tokens]
    whole = peft.PeftModel.from_pretrained(loaded, tmp_path / "out" / "adapter")
    assert perplexity(whole, tokens, 64) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("name", RECOVERIES)
def test_several_steps_or_a_line_why_not(name: str, settings: dict[str, Any]) -> None:
    """Without `steps` it takes as many as it can."""
    given = {key: value for key, value in settings.items() if key != "steps"} | {"recovery": name}
    if not METHODS[name].once:
        assert Recipe(**given).steps == (5 if METHODS[name].trains else 1)
        losa.compress(tiny(), Recipe(**given | {"steps": 2}), tokenizer=tokenizer())
        return
    assert Recipe(**given).steps == 1
    with pytest.raises(LosaError, match=f"recovery '{name}' .*set steps to 1"):
        losa.compress(tiny(), given | {"steps": 2}, tokenizer=tokenizer())


@pytest.mark.parametrize("name", [name for name in RECOVERIES if METHODS[name].trains])
def test_killed_while_it_trains_it_goes_on_to_the_same_bytes(
    name: str, llama: Path, once: Recipe, tmp_path: Path
) -> None:
    recipe = changed(once, recovery=name, checkpoint_minutes=0.0)
    losa.compress(str(llama), recipe, tmp_path / "whole")
    for saves in (4, 6):  # dense, pruned, then one an update and one at the end
        with killed_after(saves):
            losa.compress(str(llama), recipe, tmp_path / str(saves))
        losa.compress(str(llama), recipe, tmp_path / str(saves), resume=True)
        assert files(tmp_path / str(saves)) == files(tmp_path / "whole")
        if not METHODS[name].merges:
            assert files(tmp_path / str(saves) / "adapter") == files(tmp_path / "whole" / "adapter")


@pytest.mark.parametrize("name", RECOVERIES)
def test_options_are_checked(name: str) -> None:
    with pytest.raises(LosaError, match=f"setting of recovery '{name}' 'foo'"):
        Recipe(recovery=name, recovery_options={"foo": 1})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("sora", "shrink", -1.0),
        ("adalora", "kept_ranks", 1.0),
        ("adalora", "beta1", 0.0),
        ("adalora", "warm", 0.8),
        ("adalora", "orthogonality", -1.0),
    ],
)
def test_options_that_cannot_be(name: str, option: str, value: float) -> None:
    with pytest.raises(LosaError, match=f"recovery_options: {option} "):
        Recipe(recovery=name, recovery_options={option: value})


# ------------------------------------------------------------------------------------------------- one by one


def test_sparse_lora_is_losa_without_its_three_strategies(once: Recipe) -> None:
    """Table 14 against table 6."""
    results = [losa.compress(tiny(), changed(once, recovery=n), tokenizer=tokenizer()) for n in ("losa", "sparse-lora")]
    a, b = (result.model.state_dict() for result in results)
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(LosaError, match="rank_by error: recovery 'sparse-lora' knows uniform"):
        Recipe(recovery="sparse-lora", rank_by="error")


def gated(rank: int = 3, kind: type[GatedLinear] = GatedLinear) -> GatedLinear:
    layer = kind(torch.nn.Linear(19, 24), 6, 2.0)
    layer.set_mask(torch.rand(24, 19, generator=torch.Generator().manual_seed(0)) < 0.5)
    layer.set_rank(rank, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for part in (layer.lora_B, layer.lora_E):
            part[..., :rank] = torch.randn(part[..., :rank].shape, generator=torch.Generator().manual_seed(2))
    return layer


def test_gates_are_in_outputs_gradients_and_merge() -> None:
    layer, x = gated(), torch.randn(7, 19, generator=torch.Generator().manual_seed(3))
    a, b, e, w = (
        t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, layer.lora_E, layer.weight)
    )
    want = x.double() @ ((w + 2.0 * b[:, :3] @ (e[:3, None] * a[:3])) * layer.mask).T + layer.bias.double()
    got = layer(x)
    want.square().sum().backward()
    got.square().sum().backward()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for mine, theirs in ((layer.lora_A, a), (layer.lora_B, b), (layer.lora_E, e)):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.merge()(x), got, rtol=1e-5, atol=1e-5)
    for rank in (1, 4, 6, 2):
        before = layer(x).detach()
        layer.set_rank(rank, torch.Generator().manual_seed(rank))
        torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
        assert not layer.lora_E[rank:].any() and not layer.weight[~layer.mask].any()


def test_the_proximal_step_is_that_of_the_l1_norm() -> None:
    """argmin over u of (u - g)^2 / 2 + threshold |u|, found by trying them all."""
    layer = gated()
    before = layer.lora_E.detach().clone()
    Proximal([layer], [0.1, 0.3], shrink=2.0).updated(1)
    tried = torch.linspace(-4, 4, 800_001, dtype=torch.float64)
    for old, new in zip(before[:3], layer.lora_E.detach()[:3], strict=True):
        best = tried[((tried - old.double()) ** 2 / 2 + 0.6 * tried.abs()).argmin()]
        assert float(new) == pytest.approx(float(best), abs=2e-5)
    assert torch.equal(layer.lora_E[3:], before[3:])


def test_gates_close_as_shrink_says(once: Recipe, tmp_path: Path) -> None:
    found = {}
    for shrink in (0.0, 5.0, 5000.0):
        recipe = changed(once, recovery="sora", recovery_options={"shrink": shrink}, train_samples=60)
        losa.compress(tiny(), recipe, out := tmp_path / str(shrink), tokenizer=tokenizer())
        (line,) = [line for line in (out / "run" / "log.jsonl").read_text().splitlines() if '"gates"' in line]
        found[shrink] = json.loads(line)["open"]
    assert found[0.0] == 3 * 7 * 3 and 0 < found[5.0] < found[0.0] and found[5000.0] == 0


def test_adalora_without_peft_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adalora, "find_spec", lambda _: None)
    with pytest.raises(LosaError, match=r"pip install peft"):
        Recipe(recovery="adalora")


def test_adalora_ends_at_its_budget(llama: Path, once: Recipe, tmp_path: Path) -> None:
    recipe = changed(once, recovery="adalora", recovery_options={"kept_ranks": 0.5}, train_samples=60, mean_rank=4.0)
    losa.compress(str(llama), recipe, tmp_path / "out")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    ranks = [len(tensor) for name, tensor in saved.items() if "lora_A" in name]
    assert sum(ranks) == 3 * 7 * 4 / 2 and len(set(ranks)) > 1


def test_adalora_of_one_update_and_of_one_rank(once: Recipe, tmp_path: Path) -> None:
    short = changed(once, recovery="adalora", train_samples=2)
    losa.compress(tiny(), short, tmp_path / "out", tokenizer=tokenizer())
    alone = changed(short, mean_rank=1.0, targets=r"layers\.0\..*q_proj")
    with pytest.raises(LosaError, match="raise mean_rank, or widen targets"):
        losa.compress(tiny(), alone, tmp_path / "alone", tokenizer=tokenizer())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own call
def test_adalora_is_pefts(once: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Update for update against PEFT's own model: the same triplets stay, with the same product."""
    import peft

    recipe = changed(once, recovery="adalora", train_samples=40, mean_rank=4.0, recovery_options={"kept_ranks": 0.5})
    seen: dict[str, Any] = {}

    class Spy(AdaLoRA):
        def recover(self, subject: Any, examples: Any, *rest: Any) -> None:
            layers = {n: linear for block in subject.blocks for n, linear in block.masked.items()}
            seen["examples"] = examples
            seen["base"] = {n: linear.weight.detach().clone() for n, linear in layers.items()}
            seen["start"] = {
                n: (linear.lora_A[:4].clone(), linear.lora_B[:, :4].clone()) for n, linear in layers.items()
            }
            super().recover(subject, examples, *rest)
            seen["pairs"] = {n: linear.pair() for n, linear in layers.items() if linear.rank}
            seen["subject"] = subject

    monkeypatch.setattr("losa.recovery.adalora.AdaLoRA", Spy)
    losa.compress(tiny(), recipe, tmp_path / "out", tokenizer=tokenizer())
    theirs = tiny()
    for name, weight in seen["base"].items():
        theirs.get_submodule(name).weight.data.copy_(weight)
    updates = 10
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",  # else PEFT leaves its regulariser out
        target_modules=list(seen["base"]),
        init_r=4,
        target_r=2,
        lora_alpha=8,
        total_step=updates,
        tinit=1,
        tfinal=3,
    )
    model = peft.get_peft_model(theirs, config).eval()
    layers = {n: theirs.get_submodule(n) for n in seen["base"]}
    for name, (a, b) in seen["start"].items():
        layers[name].lora_A["default"].data.copy_(a)
        layers[name].lora_B["default"].data.copy_(b)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=recipe.weight_decay)
    for update in range(updates):
        from losa.data import collate

        optimizer.param_groups[0]["lr"] = recipe.learning_rate * training.share_of_peak(update, updates, recipe.warmup)
        batch = collate(seen["examples"][4 * update : 4 * update + 4], 0)
        optimizer.zero_grad()
        model(**batch).loss.backward()  # PEFT adds its regulariser
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        model.base_model.update_and_allocate(update + 1)
    for name, layer in layers.items():
        want = layer.get_delta_weight("default")
        a, b = seen["pairs"].get(name, (torch.zeros(1, want.shape[1]), torch.zeros(want.shape[0], 1)))
        assert len(a) == max(1, int(layer.lora_E["default"].count_nonzero()))
        torch.testing.assert_close(2.0 * b @ a, want, rtol=2e-3, atol=2e-6)


def test_compacting_does_not_move_the_output() -> None:
    layer = gated(4, SVDLinear)
    layer.lora_E.data[1] = 0
    x = torch.randn(5, 19, generator=torch.Generator().manual_seed(4))
    before = layer(x)
    layer.compact()
    assert layer.rank == 3
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-6)
