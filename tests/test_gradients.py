"""Gradients streamed block by block are those of plain autograd on the whole model, and Pruner-Zero lives on them."""

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, GATED, MODELS, tiny, tokenizer
from torch import Tensor

import losa
from losa import experts, masks, pipeline
from losa.adapters import MaskedLinear
from losa.blocks import find_blocks
from losa.data import calibration_tokens
from losa.errors import LosaError
from losa.export import load_masks
from losa.gradients import Backward
from losa.patterns import NM
from losa.pruners.pruner_zero import PrunerZero, SquaredGradients
from losa.recipe import Recipe

TOKENS = torch.randint(1, 2048, (5, 20), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


def changed(recipe: Recipe, **settings: Any) -> Recipe:
    return Recipe(**{**recipe.to_json(), "pruner": "pruner-zero", **settings})


def streamed(model: Any, tokens: Tensor = TOKENS) -> dict[str, Any]:
    """Every linear's statistic."""
    backward = Backward(model, blocks := find_blocks(model), tokens, CPU)
    return {name: s for block in reversed(blocks) for name, s in backward.gather(block, PrunerZero())[0].items()}


def whole(model: Any, tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    """The sum over sequences of squared gradients, by autograd and the model's own loss, summed instead of averaged."""
    linears = {name: linear for block in find_blocks(model) for name, linear in block.linears.items()}
    totals = {name: torch.zeros_like(linear.weight) for name, linear in linears.items()}
    for ids in tokens.split(1):
        loss = model(input_ids=ids, labels=ids).loss * (tokens.shape[1] - 1)
        weights = [linear.weight for linear in linears.values()]
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)  # zero for experts that are not reached
        for name, gradient in zip(linears, gradients, strict=True):
            totals[name] += gradient.square()
    return totals


def assert_same(got: dict[str, Any], want: dict[str, Tensor], tolerance: float) -> None:
    assert set(got) == set(want)
    for name, statistic in got.items():
        assert statistic.sequences == 5 or ".experts." in name
        assert statistic.total.dtype == torch.float32
        error = (statistic.total.double() - want[name].double()).norm() / want[name].double().norm()
        assert error < tolerance, f"{name}: {error}"


# ------------------------------------------------------------------------------------------------- the gradients


@pytest.mark.parametrize("kind", MODELS | ARCHITECTURES)
def test_they_are_those_of_the_whole_model(kind: str) -> None:
    """In float64; grouped queries, tied embeddings, sliding windows, positions learned or rotary, experts."""
    model = tiny(kind).double()
    experts.split(model)
    model.requires_grad_(True)
    assert_same(streamed(model), whole(model), 1e-6)


def test_what_stands_behind_the_blocks_is_the_model_s_own() -> None:
    """Gemma 2 squashes its attention's scores and its logits; the latter is no module that could be found."""
    torch.manual_seed(0)
    shape = dict(head_dim=8, sliding_window=8, final_logit_softcapping=0.05, attn_logit_softcapping=1.0)
    config = transformers.Gemma2Config(**GATED, **shape, pad_token_id=1, attn_implementation="eager")
    model = transformers.Gemma2ForCausalLM(config).double().eval()
    assert_same(streamed(model), whole(model), 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_they_are_near_in_narrower_types(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny().to(dtype)
    assert_same(streamed(model), whole(copy.deepcopy(model).double()), tolerance)


def adapt(model: Any, rank: int = 2) -> Any:
    """Half of each linear masked, with a pair; returns the same model merged."""
    generator = torch.Generator().manual_seed(2)
    for block in find_blocks(model.requires_grad_(False)):
        for name, linear in block.linears.items():
            masked = MaskedLinear(linear, 4, 2.0)
            masked.set_mask(torch.rand(linear.weight.shape, generator=generator) < 0.5)
            masked.set_rank(rank, generator)
            with torch.no_grad():
                masked.lora_B[:, :rank] = 0.1 * torch.randn(linear.out_features, rank, generator=generator)
            model.set_submodule(name, masked)
    merged = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear):
            merged.set_submodule(name, module.merge().requires_grad_(True))
    return merged


@pytest.mark.parametrize(("kind", "rank"), [("llama", 2), ("falcon", 2), ("falcon", 0)])
def test_they_are_of_the_merged_weight_masked_entries_too(kind: str, rank: int) -> None:
    """Falcon adds to a linear's output in place."""
    model = tiny(kind)
    blocks = find_blocks(model)
    merged = adapt(model, rank)
    for block in blocks:
        block.linears = {name: model.get_submodule(name) for name in block.linears}
    backward = Backward(model, blocks, TOKENS, CPU)
    got: dict[str, Any] = {}
    for block in reversed(blocks):
        got |= backward.gather(block, PrunerZero())[0]
        assert all(p.grad is None for p in model.parameters())
        for linear in block.masked.values():  # what is gathered may be pruned at once
            linear.set_mask(torch.zeros_like(linear.mask))
    want = whole(merged.double())
    assert_same(got, want, 1e-3)
    assert all(got[name].total.count_nonzero() > 0.9 * got[name].total.numel() for name in want)


def test_a_linear_called_twice_is_summed_before_it_is_squared() -> None:
    """And rows that are no [sequence, token] grid, as routed experts have, are taken as they come."""
    model = tiny().double()
    for block in find_blocks(model):
        mlp = block.module.mlp

        def forward(x: Tensor, mlp: Any = mlp) -> Tensor:
            routed = x.reshape(-1, x.shape[-1])[:13]
            once = mlp.down_proj(torch.tanh(mlp.gate_proj(routed))).sum(dim=0)
            return once + mlp.down_proj(mlp.up_proj(mlp.down_proj(mlp.gate_proj(x))))

        mlp.forward = forward
    assert_same(streamed(model), whole(model), 1e-6)


def test_a_linear_that_is_never_called_has_seen_nothing() -> None:
    model = tiny()
    model.model.layers[1].mlp.forward = lambda x: x
    got = streamed(model)
    assert got["model.layers.1.mlp.up_proj"].sequences == 0 and got["model.layers.0.mlp.up_proj"].sequences == 5


@pytest.fixture
def young_objects() -> Iterator[None]:
    """gc.get_objects() lists what is made from here on: all there is takes it a tenth of a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("layers", [1, 2, 8, 11])
def test_few_hidden_states_are_held(layers: int, young_objects: None) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED | {"num_hidden_layers": layers})).eval()
    before = model.model.layers[0].forward
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        held = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (1, 20, 32) and not t.requires_grad]
        most = max(most, len({t.data_ptr() for t in held}))

    class Watched(PrunerZero):
        def gradient_statistic(self, shape: Any, device: Any) -> SquaredGradients:
            made = super().gradient_statistic(shape, device)
            made.update = count  # type: ignore[method-assign, assignment]
            return made

    tokens = torch.cat([TOKENS] * 2)
    backward = Backward(model, blocks := find_blocks(model), tokens, CPU)
    count()
    for block in reversed(blocks):
        backward.gather(block, Watched())
    allowed = layers.bit_length() + 1  # floor(log2(layers)) + 2
    within = 8  # of one sequence: what goes into linears, and the gradients of what comes out
    assert (allowed - 1) * len(tokens) + within < most <= allowed * len(tokens) + within
    assert model.model.layers[0].forward == before, "the model runs as before"


def test_a_loss_that_is_not_a_number_is_an_error() -> None:
    model = tiny()
    model.lm_head.weight.data[5, 5] = torch.nan
    with pytest.raises(LosaError, match="calibration loss is not a number"):
        Backward(model, find_blocks(model), TOKENS, CPU)


# ------------------------------------------------------------------------------------------------- through the pipeline


def scores(weight: Tensor, total: Tensor) -> Tensor:
    """The paper's formula, in float64."""
    root = total.double().sqrt()
    return weight.double().abs() * weight.double().abs() * (root - root.min()) / (root.max() - root.min())


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "opt"])
def test_one_step_without_training_is_the_published_method(kind: str, small: Recipe) -> None:
    """Invariant 3, weight for weight."""
    plain = changed(small, steps=1, allocator="uniform", recovery="none", eval_data="")
    oracle = tiny(kind).double()
    totals = whole(oracle, calibration_tokens(small.calibration, tokenizer(), 12, 24, small.seed))
    result = losa.compress(tiny(kind), plain, tokenizer=tokenizer())
    for name, total in totals.items():
        weight = oracle.get_submodule(name).weight.detach()
        lowest = scores(weight, total).argsort(dim=1, stable=True)[:, : weight.shape[1] // 2]
        expected = weight.scatter(1, lowest, 0)
        assert torch.equal(result.model.get_submodule(name).weight.double(), expected), name


@pytest.mark.parametrize("pattern", ["2:4", "mixed-4:8"])
def test_n_of_m(pattern: str, small: Recipe, tmp_path: Any) -> None:
    result = losa.compress(tiny(), changed(small, pattern=pattern), tmp_path / "out", tokenizer=tokenizer())
    m = int(pattern[-1])
    for name, bits in load_masks(tmp_path / "out").items():
        mask = masks.unpack(bits, result.model.get_submodule(name).in_features)
        kept = round(m * (1 - result.history[-1]["rates"][".".join(name.split(".")[:3])]))
        assert (mask.view(-1, m).sum(dim=1) == kept).all()
    assert result.measurements["sparse"]["sparsity"] == pytest.approx(0.5)


def test_steps_nest_count_exactly_and_renew_the_gradients(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each step autograd reads the merged model; the masks of all blocks are those its gradients ask for.

    No more than one block's statistics are ever alive, and the pairs go through pruning as they were.
    """
    alive: weakref.WeakSet[SquaredGradients] = weakref.WeakSet()
    steps, most = [], 0
    prune, make = pipeline.prune, PrunerZero.gradient_statistic

    def counting(self: PrunerZero, shape: Any, device: Any) -> SquaredGradients:
        nonlocal most
        made = make(self, shape, device)
        alive.add(made)
        most = max(most, len(alive))
        return made

    def spy(subject: Any, recipe: Recipe, step: int, rates: Any, inputs: Any, *rest: Any) -> Any:
        linears = {name: linear for block in subject.blocks for name, linear in block.masked.items()}
        dense = tiny().double()
        before = {}
        for name, linear in linears.items():
            dense.get_submodule(name).weight.data = linear.effective_weight(torch.float64)
            before[name] = linear.mask, [p.clone() for p in (linear.lora_A, linear.lora_B)]
        totals = whole(dense, inputs.calibration)
        errors = prune(subject, recipe, step, rates, inputs, *rest)
        assert not alive
        for name, linear in linears.items():
            (within, pair), weight = before[name], dense.get_submodule(name).weight.detach()
            amount = rates[".".join(name.split(".")[:3])]
            expected = masks.choose(scores(weight, totals[name]), within, amount, "row")
            different = float((linear.mask != expected).double().mean())
            assert different < 2e-3, f"{name}: {different} of the masks differ"  # near ties
            assert not (linear.mask & ~within).any()
            gone = masks.count_pruned(amount, weight.shape[1])
            assert ((~linear.mask).sum(dim=1) == gone).all()
            assert all(map(torch.equal, (linear.lora_A, linear.lora_B), pair))
        steps.append([bool(pair[1].any()) for _, pair in before.values()])
        return errors

    monkeypatch.setattr(PrunerZero, "gradient_statistic", counting)
    monkeypatch.setattr(pipeline, "prune", spy)
    losa.compress(tiny(), changed(small), tokenizer=tokenizer())
    assert most == 7, "statistics of more than one block"
    assert not any(steps[0]) and all(steps[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allocator": "error"}, "allocator 'error' prunes each block for trial"),
        ({"true_sequential": True}, "true_sequential changes inputs, which pruner 'pruner-zero' does not read"),
        ({"true_sequential": True, "pruner": "magnitude"}, "pruner 'magnitude' does not read"),
        ({"sequence_length": 1}, "sequence_length is 1: must be at least 2"),
        ({"pruner_options": {"damp": 0.1}}, "unknown setting of pruner 'pruner-zero'"),
    ],
)
def test_what_means_nothing_to_it_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LosaError, match=message):
        Recipe(**{"pruner": "pruner-zero", **settings})


# ------------------------------------------------------------------------------------------------- the pruner alone


def statistic_of(total: Tensor) -> SquaredGradients:
    made = SquaredGradients(tuple(total.shape), "cpu")
    made.update(total.sqrt(), 1)
    return made


def test_pruner_refuses_what_is_not_its_gradients() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    pruner = PrunerZero()
    for bad in (torch.nan, torch.inf, 1e38):
        gradient = torch.ones(4, 8)
        gradient[1, 2] = bad
        statistic = pruner.gradient_statistic((4, 8), "cpu")
        statistic.update(gradient, 1)
        with pytest.raises(LosaError, match="gradients hold NaN or infinity"):
            pruner.prune(weight, None, 0.5, statistic)
    with pytest.raises(LosaError, match="needs gradients"):
        pruner.prune(weight, None, 0.5, None)
    with pytest.raises(LosaError, match=r"gradients are of a weight \[5, 8\], not \[4, 8\]"):
        pruner.prune(weight, None, 0.5, statistic_of(torch.ones(5, 8)))
    with pytest.raises(LosaError, match="no calibration sequence"):
        pruner.prune(weight, None, 0.5, pruner.gradient_statistic((4, 8), "cpu"))


def test_equal_gradients_leave_the_weights_to_decide() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for same in (0.0, 3.0):
        for amount in (0.5, NM(2, 4)):
            _, mask = PrunerZero().prune(weight, None, amount, statistic_of(torch.full((4, 8), same)))
            assert torch.equal(mask, masks.choose(weight.abs(), None, amount, "row"))
