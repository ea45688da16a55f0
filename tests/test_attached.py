"""losa.attach: masked adapters in a training loop that is not ours, merged later without losing a zero."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import files, tiny
from safetensors.torch import load_file, save_file
from test_repair import logits, prune
from torch import Tensor

import losa
from losa import masks, registry
from losa.attached import AttachedLinear
from losa.blocks import find_blocks
from losa.errors import LosaError
from losa.export import load_masks

ROWS = torch.randint(2, 2000, (32, 24), generator=torch.Generator().manual_seed(0))
METHODS = {name: registry.get("recovery", name) for name in sorted(registry.RECOVERIES)}


def sparse(kind: str = "llama", only: str = "") -> tuple[Any, dict[str, Tensor]]:
    model = tiny(kind)
    return model, prune(model, only=only)


def train(model: Any, parameters: list[Any], updates: int = 8, rate: float = 1e-2) -> list[float]:
    """A plain loop, as a user writes it."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    losses = []
    for update in range(updates):
        rows = ROWS[4 * update % len(ROWS) :][:4]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", "all"), ("opt", "all"), ("falcon", "all"), ("mixtral", "qkvo")]
)
def test_a_plain_loop(kind: str, targets: str, tmp_path: Path) -> None:
    model, chosen = sparse(kind)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    plain, before = type(model), logits(model)
    adapters = losa.attach(model, rank=4, targets=targets)
    assert torch.equal(logits(model), before)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapters.parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, adapters.parameters(), updates=24)  # three times over the same rows
    assert all(late < early for early, late in zip(losses[:8], losses[-8:], strict=True))
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())
    adapted = logits(model)
    assert losa.merge(model) is model and type(model) is plain
    assert (logits(model) - adapted).norm() <= 1e-5 * adapted.norm()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    moved = 0
    for block in find_blocks(model):
        for name, linear in block.linears.items():
            assert not linear.weight[~chosen[name]].any(), name
            moved += not torch.equal(linear.weight, weights.get(f"{name}.weight", linear.weight))
    assert moved > 0
    model.save_pretrained(tmp_path / "out")
    adapters.save_masks(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert all(torch.equal(bits, masks.pack(chosen[n])) for n, bits in load_masks(tmp_path / "out").items())


def test_a_dense_model_gets_a_plain_lora_and_keeps_accidental_zeros_free() -> None:
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.data[0, :9] = 0
    adapters = losa.attach(model, rank=2, targets="up_proj")
    train(model, adapters.parameters())
    assert adapters.merge().model.layers[0].mlp.up_proj.weight.all()


def test_saved_masks_go_before_zeros(tmp_path: Path) -> None:
    model, chosen = sparse()
    name = "model.layers.0.mlp.up_proj"
    bits = {n: masks.pack(mask) for n, mask in chosen.items()}
    bits[name] = masks.pack(torch.ones(48, 32, dtype=torch.bool))
    save_file(bits, tmp_path / "masks.safetensors")
    adapters = losa.attach(model, rank=2, masks_from=tmp_path)
    train(model, adapters.parameters())
    assert adapters.merge().get_submodule(name).weight.all()


def test_bf16_is_rounded_once() -> None:
    model, chosen = sparse()
    model.to(torch.bfloat16)
    adapters = losa.attach(model, rank=2)
    assert all(p.dtype == torch.float32 for p in adapters.parameters())
    train(model, adapters.parameters())
    linear = model.get_submodule(name := "model.layers.1.mlp.down_proj")
    product = 2.0 * linear.lora_B.double() @ linear.lora_A.double()
    want = ((linear.weight.double() + product) * chosen[name]).to(torch.bfloat16)
    got = adapters.merge().get_submodule(name).weight
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2**-8, atol=0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own call
def test_what_is_saved_on_the_way_is_an_ordinary_model_that_goes_on_exactly(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, chosen = sparse()
    adapters = losa.attach(model, rank=3)
    train(model, adapters.parameters())
    model.save_pretrained(tmp_path / "midway")
    now = logits(model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "midway")
    assert (logits(loaded) - now).norm() <= 1e-5 * now.norm()
    for block in find_blocks(loaded):
        assert not any(linear.weight[~chosen[name]].any() for name, linear in block.linears.items())
    with pytest.raises(ValueError, match="adapter_config"):  # or PEFT would add the product without its mask
        peft.PeftModel.from_pretrained(sparse()[0], tmp_path / "midway")
    again, _ = sparse()
    losa.attach(again, rank=3, seed=9)
    again.load_state_dict(load_file(tmp_path / "midway" / "model.safetensors"), strict=False)
    assert torch.equal(logits(again), now)
    assert torch.equal(logits(losa.merge(again)), logits(losa.merge(model)))


def test_a_state_of_another_base_or_rank_is_refused() -> None:
    model, _ = sparse()
    adapters = losa.attach(model, rank=3)
    train(model, adapters.parameters())
    state = model.state_dict()
    other = tiny()
    other.model.layers[1].mlp.up_proj.weight.data.mul_(1.1)
    prune(other)
    losa.attach(other, rank=3)
    with pytest.raises(
        RuntimeError, match=r"layers\.1\.mlp\.up_proj\.weight is not what this base and the saved pair make"
    ):
        other.load_state_dict(state)
    narrow, _ = sparse()
    losa.attach(narrow, rank=2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        narrow.load_state_dict(state)


def test_a_plain_state_is_a_new_base() -> None:
    model, _ = sparse()
    plain = {key: value.clone() * 2 for key, value in model.state_dict().items()}
    adapters = losa.attach(model, rank=3)
    model.load_state_dict(plain, strict=False)
    weight = adapters.merge().model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, plain["model.layers.0.mlp.up_proj.weight"])


def test_a_copy_merges_itself() -> None:
    model, _ = sparse()
    adapters = losa.attach(model, rank=2)
    train(model, adapters.parameters())
    other = copy.deepcopy(model)
    losa.merge(other)
    assert not any(isinstance(m, AttachedLinear) for m in other.modules())
    assert any(isinstance(m, AttachedLinear) for m in model.modules())


def test_merging_through_a_wrapper() -> None:
    model, _ = sparse()
    losa.attach(model, rank=2)
    wrapped = torch.nn.ModuleDict({"module": model})
    losa.merge(wrapped)
    assert not any(isinstance(m, AttachedLinear) for m in wrapped.modules())


@pytest.mark.parametrize("name", METHODS)
def test_every_recovery_can_be_attached_or_says_why_not(name: str) -> None:
    model, chosen = sparse()
    try:
        adapters = losa.attach(model, rank=2, recovery=name)
    except LosaError as error:
        assert name in str(error) and "\n" not in str(error)
        assert not any(isinstance(m, AttachedLinear) for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())
        assert name not in ("losa", "sparse-lora")
        return
    train(model, adapters.parameters())
    adapters.merge()
    assert not any(model.get_submodule(n).weight[~mask].any() for n, mask in chosen.items())


def with_peft() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"]))


def attached() -> Any:
    model, _ = sparse()
    losa.attach(model, rank=2)
    return model


def quantised() -> Any:
    model = tiny()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return model


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (lambda: "demo", {}, "attach takes a loaded model, not a str"),
        (lambda: torch.nn.Conv1d(1, 1, 1), {}, "has no Linear layers"),
        (tiny, {"rank": 0}, "mean_rank is 0"),
        (tiny, {"rank": 1.5}, "rank must be a whole number"),
        (tiny, {"rank": 33}, "rank is 33, the widest linear has 32"),
        (tiny, {"targets": "nothing"}, "match none of the linears"),
        (tiny, {"recovery": "losaa"}, "did you mean 'losa'"),
        (lambda: tiny("mixtral"), {}, "is an expert, and all experts are one parameter here"),
        (attached, {}, "has adapters of losa already"),
        (with_peft, {}, "has adapters of PEFT"),
        (quantised, {}, "up_proj.weight is torch.int8"),
        (tiny, {"masks_from": "nowhere"}, "has no masks.safetensors"),
    ],
)
def test_what_cannot_be_attached(make: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(LosaError, match=message):
        losa.attach(make(), **given)


def test_what_cannot_be_merged() -> None:
    with pytest.raises(LosaError, match="LlamaForCausalLM has no adapters of losa"):
        losa.merge(tiny())
    model, _ = sparse()
    adapters = losa.attach(model, rank=2)
    adapters.merge()
    with pytest.raises(LosaError, match="merged already"):
        adapters.merge()


# ------------------------------------------------------------------------------------------------- transformers' Trainer


def trainer(model: Any, folder: Path, **settings: Any) -> transformers.Trainer:
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-2,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return transformers.Trainer(model, arguments, train_dataset=rows)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("checkpointing", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)]
)
def test_the_trainer_trains_saves_and_resumes(checkpointing: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Eight updates; killed after the third and resumed they end in the same bytes; every checkpoint is a sparse model."""
    extra = {"gradient_checkpointing": True} if checkpointing else {}
    model, chosen = sparse()
    losa.attach(model.to(dtype), rank=3)
    whole = trainer(model, tmp_path / "whole", **extra)
    loss = whole.train().training_loss
    adapted = logits(model.eval())
    halfway = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-3")
    for block in find_blocks(halfway):
        assert not any(linear.weight[~chosen[name]].any() for name, linear in block.linears.items())
    assert not torch.equal(logits(halfway), logits(sparse()[0].to(dtype)))
    assert not list((tmp_path / "whole").rglob("adapter_config.json"))

    resumed, _ = sparse()
    losa.attach(resumed.to(dtype), rank=3)
    trainer(resumed, tmp_path / "resumed", **extra).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
    )
    assert torch.equal(logits(resumed.eval()), adapted)
    for made, name in ((model, "a"), (resumed, "b")):
        losa.merge(made).save_pretrained(tmp_path / name)
        assert (logits(made) - adapted).norm() <= 1e-5 * adapted.norm()
    assert files(tmp_path / "a") == files(tmp_path / "b")
    with torch.no_grad():
        assert model(input_ids=ROWS, labels=ROWS).loss < loss
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    for block in find_blocks(loaded):
        assert not any(linear.weight[~chosen[name]].any() for name, linear in block.linears.items())
