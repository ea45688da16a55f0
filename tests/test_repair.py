"""losa recover: models that others pruned, their zeros kept to the last one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import changed, files, killed_after, save_tiny, tiny, tokenizer
from safetensors.torch import load_file, save_file
from test_cli import flags, refused
from torch import Tensor

import losa
from losa import inputs, masks, repair
from losa.blocks import find_blocks
from losa.cli import main
from losa.errors import LosaError
from losa.export import load_masks
from losa.inspection import inspect
from losa.recipe import Recipe, load
from losa.repair_recipe import PRUNING, Repair


@pytest.fixture
def repairing(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in PRUNING}


def unstructured(weight: Tensor) -> Tensor:
    return weight.abs() > weight.abs().flatten().kthvalue(weight.numel() // 2).values


def two_of_four(weight: Tensor) -> Tensor:
    groups = weight.abs().view(len(weight), -1, 4)
    return (
        torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(2, dim=2).indices, True).view(weight.shape)
    )


def prune(model: Any, choose: Any = unstructured, only: str = "") -> dict[str, Tensor]:
    """Zero weights as any tool might; returns the masks."""
    chosen = {}
    for block in find_blocks(model):
        for name, linear in block.linears.items():
            if only in name:
                chosen[name] = choose(linear.weight.data)
                linear.weight.data *= chosen[name]
    return chosen


def save_sparse(folder: Path, kind: str = "llama", choose: Any = unstructured, only: str = "") -> dict[str, Tensor]:
    model = tiny(kind)
    chosen = prune(model, choose, only)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return chosen


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=torch.arange(1, 40).unsqueeze(0)).logits
    return out


@pytest.mark.parametrize(
    ("kind", "choose"),
    [("llama", unstructured), ("llama", two_of_four), ("opt", two_of_four), ("mixtral", unstructured)],
)
def test_it_recovers_and_keeps_every_zero(kind: str, choose: Any, tmp_path: Path, repairing: dict[str, Any]) -> None:
    save_sparse(tmp_path / "sparse", kind, choose)
    recipe = repairing | {"train_samples": 120, "learning_rate": 1e-2}
    result = losa.recover(str(tmp_path / "sparse"), recipe, tmp_path / "out")
    pruned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(result.model))
    bits, zeros, moved = load_masks(tmp_path / "out"), 0, 0
    for before, after in zip(find_blocks(pruned), find_blocks(loaded), strict=True):
        for name, linear in before.linears.items():
            gone = linear.weight == 0
            assert torch.equal(masks.unpack(bits[name], gone.shape[1]), ~gone)
            assert not after.linears[name].weight[gone].any()
            zeros += int(gone.sum())
            moved += int((after.linears[name].weight != linear.weight).sum())
    found = result.measurements
    assert moved > 0 and found["sparse"]["perplexity"] < 0.9 * found["before"]["perplexity"]
    assert found["sparse"]["sparsity"] == found["before"]["sparsity"] == zeros / found["sparse"]["weights"]
    assert [record["step"] for record in result.history] == [1] and set(result.history[0]["ranks"]) == {2}


def test_merged_and_adapted_model_agree(tmp_path: Path, repairing: dict[str, Any], monkeypatch: Any) -> None:
    """Invariant 2, in fp32: relative 1e-5."""
    before: list[Tensor] = []
    merge = repair.Subject.merge

    def spy(subject: Any) -> Any:
        before.append(logits(subject.model))
        return merge(subject)

    monkeypatch.setattr(repair.Subject, "merge", spy)
    model = tiny()
    prune(model)
    result = losa.recover(model, repairing, tokenizer=tokenizer())
    assert (logits(result.model) - before[0]).norm() <= 1e-5 * before[0].norm()


def test_linears_without_a_mask_are_named_and_stay_dense(
    tmp_path: Path, repairing: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Less than 1% zeros are an accident; they do not become a mask."""
    chosen = save_sparse(tmp_path / "sparse", only="mlp")
    path = tmp_path / "sparse" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.q_proj.weight"][3, :9] = 0
    save_file(tensors, path, {"format": "pt"})
    arguments = [
        "recover",
        tmp_path / "sparse",
        "--output",
        tmp_path / "out",
        *flags(repairing),
        "--learning-rate=1e-2",
    ]
    assert main([*map(str, arguments)]) == 0
    said = capsys.readouterr().err
    assert "12 of 21 linears have no mask and stay dense: model.layers.0.self_attn.q_proj, " in said
    assert "and 4 more (log.jsonl names all)" in said
    bits = load_masks(tmp_path / "out")
    for name, mask in bits.items():
        columns = chosen[name].shape[1] if name in chosen else 32
        kept = masks.unpack(mask, columns)
        assert torch.equal(kept, chosen.get(name, torch.ones_like(kept)))
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after["model.layers.1.self_attn.q_proj.weight"][3, :9].all()
    assert main(["recover", str(tmp_path / "sparse"), *flags(repairing), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert len(planned["dense"]) == 12 and planned["prunable"] - planned["kept"] == sum(
        int((~mask).sum()) for mask in chosen.values()
    )


def test_a_saved_mask_is_the_truth(llama: Path, tmp_path: Path, small: Recipe, repairing: dict[str, Any]) -> None:
    """A kept weight that happens to be zero stays kept; what the file does not name goes by its zeros."""
    first = changed(small, recovery="none", steps=1, ignore=[r"layers\.2\."])
    losa.compress(str(llama), first, tmp_path / "sparse")
    bits = load_masks(tmp_path / "sparse")
    path, name = tmp_path / "sparse" / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    kept = masks.unpack(bits[name], 32)
    tensors[f"{name}.weight"][kept & (torch.arange(48) < 9)[:, None]] = 0
    other = "model.layers.2.mlp.up_proj"
    tensors[f"{other}.weight"][:5] = 0
    save_file(tensors, path, {"format": "pt"})
    losa.recover(str(tmp_path / "sparse"), repairing | {"learning_rate": 1e-2}, tmp_path / "out")
    after, saved = load_file(tmp_path / "out" / "model.safetensors"), load_masks(tmp_path / "out")
    assert all(torch.equal(saved[n], mask) for n, mask in bits.items())
    assert after[f"{name}.weight"][:9][kept[:9]].any() and not after[f"{name}.weight"][~kept].any()
    assert not after[f"{other}.weight"][:5].any() and masks.sparsity(masks.unpack(saved[other], 32)) == pytest.approx(
        5 / 48
    )


def test_masks_are_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        if repository != "some/model":
            raise EntryNotFoundError("none") if repository == "some/dense" else LocalEntryNotFoundError("out of reach")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert repair.folder_of("some/model") == tmp_path and repair.folder_of("some/dense") is None
    assert asked == [("some/model", "masks.safetensors"), ("some/dense", "masks.safetensors")]
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(
        LosaError, match=r"the hub cannot be asked whether 'some/one' has masks\.safetensors: try again"
    ):
        repair.folder_of("some/one")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: huggingface_hub._CACHED_NO_EXIST)
    assert repair.folder_of("some/one") is None


@pytest.mark.parametrize("saves", range(1, 7))
def test_killed_anywhere_it_goes_on_to_the_same_bytes(saves: int, tmp_path: Path, repairing: dict[str, Any]) -> None:
    """Before, masks, and four times in recovery."""
    save_sparse(tmp_path / "sparse")
    recipe = Repair(**repairing | {"checkpoint_minutes": 0.0})
    whole = losa.recover(str(tmp_path / "sparse"), recipe, tmp_path / "whole")
    with killed_after(saves):
        losa.recover(str(tmp_path / "sparse"), recipe, tmp_path / "killed")
    resumed = losa.recover(str(tmp_path / "sparse"), recipe, tmp_path / "killed", resume=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole") and resumed.history == whole.history
    assert not list((tmp_path / "killed" / "run").glob("*.safetensors"))


def test_the_command_line(tmp_path: Path, repairing: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    save_sparse(tmp_path / "sparse")
    command = ["recover", str(tmp_path / "sparse"), "--output", str(tmp_path / "out")]
    assert main([*command, *flags(repairing), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "low-rank pairs under the mask" in said and "which merge exactly" in said and "pruner" not in said
    assert not (tmp_path / "out").exists()
    assert main([*command, *flags(repairing), "--rank-by", "sparsity", "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(made["measurements"]) == {"before", "sparse"}
    told = json.loads((tmp_path / "out" / "losa.json").read_text())
    assert told["command"] == "recover" and not set(told["recipe"]) & set(PRUNING)
    assert main([*command, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["measurements"] == made["measurements"]
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "pruned already and repaired, recovery losa" in capsys.readouterr().out
    wrong = refused(capsys, "compress", tmp_path / "sparse", "--output", tmp_path / "out", "--resume")
    assert "was started by losa recover: resume it with that" in wrong
    (tmp_path / "out" / "losa.json").unlink()
    assert "losa recover MODEL --output" in refused(capsys, "inspect", tmp_path / "out")
    with pytest.raises(SystemExit):
        main(["recover", "--help"])
    shown = capsys.readouterr().out
    assert "--learning-rate " in shown and "--pruner" not in shown and "--calibration" not in shown


@pytest.mark.parametrize("name", sorted(PRUNING))
def test_settings_of_pruning_are_errors(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sparse(tmp_path / "sparse")
    value = Recipe().to_json()[name]
    with pytest.raises(LosaError, match=f"^{name} means nothing to recover"):
        losa.recover(str(tmp_path / "sparse"), {name: value}, tmp_path / "out")
    flag = f"--{name.replace('_', '-')}"
    given = [flag] if value is False else [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]
    assert f"{name} means nothing" in refused(
        capsys, "recover", tmp_path / "sparse", "--output", tmp_path / "out", *given
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["paper", "demo", "sparse-lora", "sora", "best", "best-adapters"])
def test_of_a_shipped_recipe_the_recovery_counts(name: str) -> None:
    made, whole = load(name, kind=Repair), load(name)
    assert made.learning_rate == whole.learning_rate and made.recovery == whole.recovery and not made.distill
    assert (made.steps, made.rank_by) == (1, "uniform")


def test_a_file_with_settings_of_pruning_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"pruner": "wanda", "learning_rate": 0.001}')
    with pytest.raises(LosaError, match="pruner means nothing to recover"):
        load(str(tmp_path / "mine.json"), kind=Repair)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recovery": "lora"}, "recovery 'lora' does not merge, and recover merges"),
        ({"recovery": "adalora"}, "recovery 'adalora' does not merge, and recover merges"),
        ({"recovery": "none"}, "recovery 'none' trains nothing"),
        ({"rank_by": "error"}, "compares with the dense model"),
        ({"distill": 0.5}, "name it as teacher_model"),
        ({"reconstruct": 1}, "reconstruct means nothing to recover"),
        ({"learning_rat": 1.0}, "did you mean 'learning_rate'"),
        ({"targets": "nothing"}, "match none of the linears"),
        ({"mean_rank": 99.0}, "the mean rank would reach 99"),
        ({"train_length": 99}, "train_length is 99: the model reads at most 64 tokens"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    given: dict[str, Any], message: str, tmp_path: Path, repairing: dict[str, Any]
) -> None:
    save_sparse(tmp_path / "sparse")
    with pytest.raises(LosaError, match=message):
        losa.recover(str(tmp_path / "sparse"), repairing | given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_model_is_refused_in_one_line(
    llama: Path, tmp_path: Path, repairing: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for rest in ([], ["--dry-run"]):
        said = refused(capsys, "recover", llama, "--output", tmp_path / "out", *flags(repairing), *rest)
        assert "the model is dense: no linear has 1% zeros" in said and "losa compress prunes it" in said
    assert not (tmp_path / "out").exists()


def test_recipes_of_the_other_kind_are_refused(small: Recipe, repairing: dict[str, Any]) -> None:
    with pytest.raises(LosaError, match="a Recipe is no recipe: expected a Repair"):
        losa.recover(tiny(), small, tokenizer=tokenizer())
    with pytest.raises(LosaError, match="a Repair to losa"):
        losa.compress(tiny(), Repair(**repairing), tokenizer=tokenizer())


@pytest.mark.parametrize("what", ["shape", "names", "changed", "structured"])
def test_masks_that_do_not_fit_are_refused(what: str, tmp_path: Path, repairing: dict[str, Any]) -> None:
    chosen = save_sparse(tmp_path / "sparse")
    bits = {name: masks.pack(mask) for name, mask in chosen.items()}
    name = "model.layers.1.mlp.up_proj"
    if what == "shape":
        bits[name] = bits[name][:, 1:].contiguous()
    elif what == "names":
        bits = {"x": torch.zeros(1, 1, dtype=torch.uint8)}
    elif what == "changed":
        bits[name] = torch.zeros_like(bits[name])
    else:
        bits = {f"{name}.rows": torch.zeros(1, 1, dtype=torch.uint8)}
    save_file(bits, tmp_path / "sparse" / "masks.safetensors")
    message = {
        "shape": f"{name}: the mask .* does not fit its weight",
        "names": "is of another model: it names x",
        "changed": f"{name}: weights that its mask prunes are not zero",
        "structured": "pruned by whole heads and channels",
    }[what]
    with pytest.raises(LosaError, match=message):
        losa.recover(str(tmp_path / "sparse"), repairing, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_model_or_text_is_not_resumed(tmp_path: Path, repairing: dict[str, Any]) -> None:
    save_sparse(tmp_path / "sparse")
    recipe = Repair(**repairing)
    with killed_after(2):
        losa.recover(str(tmp_path / "sparse"), recipe, tmp_path / "out")
    save_sparse(tmp_path / "sparse", choose=two_of_four)
    with pytest.raises(LosaError, match="not what the run was started with"):
        losa.recover(str(tmp_path / "sparse"), recipe, tmp_path / "out", resume=True)


@pytest.mark.parametrize("recovery", ["full", "sora"])
def test_distilled_from_a_dense_model_that_is_named_at_a_rate_that_is_searched_and_packed(
    recovery: str, llama: Path, tmp_path: Path, repairing: dict[str, Any]
) -> None:
    chosen = save_sparse(tmp_path / "sparse")
    given = {"recovery": recovery, "distill": 0.5, "teacher_model": str(llama), "learning_rate": "auto"}
    recipe = repairing | given | {"format": "packed", "train_samples": 16, "checkpoint_minutes": 0.0}
    result = losa.recover(str(tmp_path / "sparse"), recipe, tmp_path / "out")
    assert result.history[0]["learning_rate"] > 0
    assert result.measurements["sparse"]["perplexity"] < result.measurements["before"]["perplexity"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(result.model), rtol=1e-4, atol=1e-4)
    assert result.measurements["sparse"]["kept"] == sum(int(mask.sum()) for mask in chosen.values())
    with killed_after(6):
        losa.recover(str(tmp_path / "sparse"), recipe, tmp_path / "killed")
    losa.recover(str(tmp_path / "sparse"), recipe, tmp_path / "killed", resume=True)
    assert files(tmp_path / "killed") == files(tmp_path / "out")


def test_too_few_zeros_to_pack(tmp_path: Path, repairing: dict[str, Any]) -> None:
    save_sparse(tmp_path / "sparse", only="layers.1.mlp.up_proj")
    with pytest.raises(LosaError, match=r"at least 0\.1 with format packed"):
        losa.recover(str(tmp_path / "sparse"), repairing | {"format": "packed"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_stored_in_bf16_are_saved_so(tmp_path: Path, repairing: dict[str, Any]) -> None:
    model = tiny()
    prune(model)
    model.to(torch.bfloat16).save_pretrained(save_tiny(tmp_path / "sparse"))
    result = losa.recover(str(tmp_path / "sparse"), repairing, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == result.model.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(result.model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own call
def test_a_model_with_a_lora_is_refused_not_robbed_of_it(
    llama: Path, tmp_path: Path, repairing: dict[str, Any], small: Recipe
) -> None:
    for place in ("adapter", "."):
        folder = shutil.copytree(llama, tmp_path / place / "model")
        (folder / place).mkdir(exist_ok=True)
        (folder / place / "adapter_config.json").write_text("{}")
        with pytest.raises(LosaError, match=r"has a LoRA beside its weights \(.*adapter_config\.json\)"):
            losa.recover(str(folder), repairing, tmp_path / "out")
        with pytest.raises(LosaError, match="has a LoRA beside its weights"):
            losa.compress(str(llama), changed(small, distill=0.5, teacher_model=str(folder)), tmp_path / "out")
    peft = pytest.importorskip("peft")
    live = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(LosaError, match="has adapters of PEFT"):
        losa.compress(live, small, tokenizer=tokenizer())
    assert not (tmp_path / "out").exists()


def test_what_few_rows_repaired_can_be_inspected(tmp_path: Path, repairing: dict[str, Any]) -> None:
    """Fewer than a recipe of compress would need, whose steps are five."""
    save_sparse(tmp_path / "sparse")
    losa.recover(str(tmp_path / "sparse"), repairing | {"train_samples": 3}, tmp_path / "out")
    assert inspect(tmp_path / "out")["command"] == "recover"


def test_processes_need_no_calibration_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs.distributed, "launched", lambda: 100)
    inputs._check_processes(Repair(), resume=False)
