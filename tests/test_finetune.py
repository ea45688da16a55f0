"""Fine-tune first, then sparsify (paper, appendix C.4): the dense model is tuned by LoRA, merged, and only then pruned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import changed, files, killed_after, save_tiny, tiny, tokenizer
from safetensors.torch import load_file
from torch import Tensor

import losa
from losa import pipeline
from losa.blocks import find_blocks
from losa.cli import main
from losa.errors import LosaError
from losa.recipe import Recipe, load
from losa.recovery.low_rank import MaskedLowRank


@pytest.fixture
def first(settings: dict[str, Any]) -> Recipe:
    named = load("finetune-then-sparsify").to_json()
    chosen = {key: named[key] for key in ("finetune_first", "recovery", "steps", "allocator")}
    return Recipe(**settings | chosen | {"pruner": "magnitude", "learning_rate": 1e-2, "train_samples": 40})


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_what_is_pruned_is_the_tuned_model(kind: str, tmp_path: Path, first: Recipe) -> None:
    source = save_tiny(tmp_path / "dense", kind)
    with killed_after(3):  # begun, trained, tuned
        losa.compress(str(source), first, tmp_path / "out")
    tuned = load_file(tmp_path / "out" / "run" / "finetuned.safetensors")
    result = losa.compress(str(source), first, tmp_path / "out", resume=True)
    dense, moved = find_blocks(tiny(kind)), 0
    for before, after in zip(dense, find_blocks(result.model), strict=True):
        for name, linear in after.linears.items():
            moved += not torch.equal(tuned[name], before.linears[name].weight)
            kept = linear.weight != 0
            assert torch.equal(linear.weight[kept], tuned[name][kept])
            assert tuned[name][~kept].abs().max() <= tuned[name][kept].abs().min()
            assert int(kept.sum()) == kept.numel() - kept.numel() // 2
    assert moved == sum(len(block.linears) for block in dense)
    found = {name: measured["perplexity"] for name, measured in result.measurements.items()}
    assert found["finetuned"] < 0.9 * found["dense"] and set(found) == {"dense", "finetuned", "sparse"}


@pytest.mark.parametrize("saves", range(1, 9))
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    saves: int, llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Fine-tuning begun, two updates, trained, tuned, the dense model, pruned, one update; LoSA goes on from there."""
    recipe = Recipe(**settings | {"finetune_first": 0.5, "steps": 1, "checkpoint_minutes": 0.0})
    whole = losa.compress(str(llama), recipe, tmp_path / "whole")
    with killed_after(saves):
        losa.compress(str(llama), recipe, tmp_path / "killed")
    resumed = losa.compress(str(llama), recipe, tmp_path / "killed", resume=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert resumed.measurements == whole.measurements
    assert not list((tmp_path / "killed" / "run").glob("*.safetensors"))


def test_another_model_is_not_resumed(tmp_path: Path, first: Recipe) -> None:
    source = save_tiny(tmp_path / "dense")
    with killed_after(1):
        losa.compress(str(source), first, tmp_path / "out")
    model = tiny()
    model.model.norm.weight.data.mul_(1.01)
    model.save_pretrained(source)
    with pytest.raises(LosaError, match="not what the run was started with"):
        losa.compress(str(source), first, tmp_path / "out", resume=True)


def test_a_model_that_is_stored_narrower_than_its_weights_goes_on(tmp_path: Path, first: Recipe) -> None:
    """Its embeddings and norms are rounded with what was tuned, and are so when it goes on."""
    source = save_tiny(tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    losa.compress(str(source), first, tmp_path / "whole")
    with killed_after(4):  # begun, trained, tuned, the dense model
        losa.compress(str(source), first, tmp_path / "killed")
    losa.compress(str(source), first, tmp_path / "killed", resume=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_its_learning_rate_can_be_searched(tmp_path: Path, llama: Path, first: Recipe) -> None:
    recipe = changed(first, learning_rate="auto", checkpoint_minutes=0.0, train_samples=16)
    losa.compress(str(llama), recipe, tmp_path / "whole")
    log = [json.loads(line) for line in (tmp_path / "whole" / "run" / "log.jsonl").read_text().splitlines()]
    assert {line["step"] for line in log if line["event"] == "trial"} == {0}
    with killed_after(4):
        losa.compress(str(llama), recipe, tmp_path / "killed")
    losa.compress(str(llama), recipe, tmp_path / "killed", resume=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_every_row_is_read_once(share: float, first: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    recover = MaskedLowRank.recover

    def spy(self: Any, subject: Any, examples: Any, *rest: Any) -> None:
        seen.append(torch.stack([example.input_ids for example in examples]))
        recover(self, subject, examples, *rest)

    monkeypatch.setattr(MaskedLowRank, "recover", spy)
    recipe = changed(first, finetune_first=share, recovery="losa", steps=2)
    losa.compress(tiny(), recipe, tokenizer=tokenizer())
    rows = torch.cat(seen)
    assert len(seen[0]) == 40 * share and len(seen) == 3
    assert len(rows) == 40 == len(rows.unique(dim=0))


def test_the_dense_model_is_tuned_with_every_weight_kept(first: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain LoRA: the mask, which is there in name only, prunes nothing."""
    merged: list[bool] = []
    merge = pipeline.Subject.merge

    def spy(subject: Any) -> Any:
        merged.append(all(bool(linear.mask.all()) for block in subject.blocks for linear in block.masked.values()))
        return merge(subject)

    monkeypatch.setattr(pipeline.Subject, "merge", spy)
    losa.compress(tiny(), first, tokenizer=tokenizer())
    assert merged == [True, False]


def test_a_dry_run_tells_of_it(llama: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in settings.items()
        if name not in ("steps", "mean_rank", "allocation_samples")
    ]
    assert main(["compress", str(llama), "--recipe", "finetune-then-sparsify", *flags, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [(s["step"], s["sparsity"], s["mean_rank"], s["rows"]) for s in planned["steps"]] == [
        (0, 0, 8, 16),
        (1, 0.5, 0, 0),
    ]
    assert planned["linears_adapted"] == 21 and planned["parameters_trained"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"finetune_first": 1.5}, "finetune_first is 1.5: must be between 0 and 1"),
        ({"finetune_first": 0.5, "recovery": "none"}, "recovery 'none' reads no rows, so set it to 1 or 0"),
        ({"finetune_first": 1.0, "recovery": "none", "distill": 0.5}, "distill: .* set it to 0"),
        ({"finetune_first": 1.0}, "no rows are left for recovery 'losa'"),
        ({"finetune_first": 0.9, "train_samples": 20}, "train_samples is 20: must be at least one row a step"),
    ],
)
def test_rows_that_cannot_be_shared_so(given: dict[str, Any], message: str) -> None:
    with pytest.raises(LosaError, match=message):
        Recipe(**given)


def test_the_mean_rank_is_checked_and_the_data_too(llama: Path, first: Recipe) -> None:
    with pytest.raises(LosaError, match="the mean rank would reach 99"):
        losa.compress(str(llama), changed(first, mean_rank=99.0))
    with pytest.raises(LosaError, match="nowhere"):
        losa.compress(str(llama), changed(first, train_data="./nowhere.jsonl"))
