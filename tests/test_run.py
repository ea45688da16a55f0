"""The run directory: what a kill at its edges leaves, what --overwrite may take away, and what cannot be resumed."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import Killed, changed, files, save_tiny, tiny, tokenizer
from safetensors.torch import load_file

import losa
from losa import inspection, model
from losa import run as runs
from losa.cli import main
from losa.errors import LosaError
from losa.inspection import inspect
from losa.progress import Progress
from losa.recipe import Recipe
from losa.repair_recipe import Repair


@pytest.fixture
def brief(small: Recipe) -> Recipe:
    return changed(small, steps=1, train_samples=4)


def killed_at(operation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise Killed before the n-th change (from 0) that is made to the file system by names."""
    count = 0

    def counted(change: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal count
            if count == operation:
                raise Killed
            count += 1
            return change(*args, **named)

        return call

    for owner, name in (
        (Path, "mkdir"),
        (Path, "unlink"),
        (Path, "replace"),
        (Path, "write_bytes"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("operation", range(7))
def test_killed_while_it_begins_it_can_begin_again(
    operation: int, overwrite: bool, llama: Path, tmp_path: Path, brief: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if overwrite:
        losa.compress(str(llama), changed(brief, seed=1, recovery="none"), out)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(operation, patch)
        losa.compress(str(llama), brief, out, overwrite=overwrite)
    losa.compress(str(llama), brief, out, overwrite=(out / "run" / "recipe.json").exists())
    losa.compress(str(llama), brief, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_overwriting_takes_only_what_losa_wrote(llama: Path, tmp_path: Path, brief: Recipe) -> None:
    losa.compress(str(llama), brief, tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    (tmp_path / "out" / "mine").mkdir()
    losa.compress(str(llama), changed(brief, seed=1), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.md").read_text() == "mine" and (tmp_path / "out" / "mine").is_dir()
    assert inspect(tmp_path / "out")["recipe"]["seed"] == 1


@pytest.mark.parametrize("content", ["{", '{"losa.json": 1}', "[3]", f"[{'9' * 5000}]", "[" * 100_000])
def test_overwriting_takes_nothing_where_it_is_not_known_what_is_losas(
    content: str, llama: Path, tmp_path: Path, brief: Recipe
) -> None:
    (tmp_path / "run").mkdir()
    for name in ("run/recipe.json", "losa.json", "run/files.json"):
        (tmp_path / name).write_text(content)
    before = files(tmp_path)
    with pytest.raises(LosaError, match=r"run/files\.json is damaged: name another output"):
        losa.compress(str(llama), brief, tmp_path, overwrite=True)
    with pytest.raises(LosaError, match=r"run/files\.json is damaged"):
        runs._remove(tmp_path)  # damaged since it was looked at
    assert files(tmp_path) == before


def test_no_claim_is_of_the_whole_output(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "files.json").write_text('["", ".", "..", "run", "a/b", "card"]')
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "card").write_text("losa's")
    runs._remove(tmp_path)
    assert (tmp_path / "mine").exists() and not (tmp_path / "card").exists()


def test_a_folder_of_others_is_refused_at_a_glance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a home folder: what lies deeper in it is not looked at."""
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    seen: list[Path] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(Path(path)) or scan(path))
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: seen.append(Path(path)) or listed(path))
    with pytest.raises(LosaError, match="is no run of losa"):
        runs.check_output(tmp_path)
    assert {*seen} == {tmp_path}
    (tmp_path / "notes" / "deep").rmdir()
    (tmp_path / "notes").rmdir()
    (tmp_path / "run" / "lock").touch()
    runs.check_output(tmp_path)  # what a kill at the beginning leaves


def test_a_model_is_not_replaced_by_its_own_result(llama: Path, tmp_path: Path, brief: Recipe) -> None:
    losa.compress(str(llama), brief, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(LosaError, match="is the model itself: name another folder"):
        losa.compress(str(tmp_path / "out"), brief, tmp_path / "." / "out", overwrite=True)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("what", ["model", "text"])
def test_a_run_is_not_resumed_with_other_inputs(
    what: str, text: Path, tmp_path: Path, brief: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "dense")
    own = tmp_path / "own.jsonl"
    shutil.copy(text, own)
    recipe = changed(brief, train_data=str(own))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("losa.pipeline.allocate", lambda *_: (_ for _ in ()).throw(Killed))
        losa.compress(str(source), recipe, tmp_path / "out")
    if what == "text":
        own.write_text("\n".join(reversed(own.read_text().splitlines())))
    else:
        model = tiny()
        model.model.norm.weight.data.mul_(1.01)
        model.save_pretrained(source)
    with pytest.raises(LosaError, match="not what the run was started with"):
        losa.compress(str(source), recipe, tmp_path / "out", resume=True)


@pytest.mark.parametrize("how", ["written otherwise", "moved", "another"])
def test_a_run_is_resumed_wherever_its_model_lies(how: str, llama: Path, tmp_path: Path, brief: Recipe) -> None:
    source = shutil.copytree(llama, tmp_path / "dense")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("losa.pipeline.recover_step", lambda *_: (_ for _ in ()).throw(Killed))
        losa.compress(str(source), brief, tmp_path / "out")
    now = {"written otherwise": tmp_path / "out" / ".." / "dense", "another": llama}.get(how, tmp_path / "moved")
    if how == "moved":
        source.rename(now)
    if how == "another":  # the same model, but as long as both are there losa cannot take one for the other
        with pytest.raises(LosaError, match="was started with source"):
            losa.compress(str(now), brief, tmp_path / "out", resume=True)
    else:
        assert losa.compress(str(now), brief, tmp_path / "out", resume=True).path


def test_a_run_is_resumed_in_the_dtype_it_was_started_in(
    llama: Path, tmp_path: Path, brief: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What auto came to then, whatever it would be on the machine of now; another device is said."""
    auto, fast, out = changed(brief, dtype="auto", device="auto"), torch.float32, tmp_path / "out"
    choose = model.choose_dtype
    monkeypatch.setattr(model, "choose_dtype", lambda name, device: fast if name == "auto" else choose(name, device))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("losa.pipeline.recover_step", lambda *_: (_ for _ in ()).throw(Killed))
        losa.compress(str(llama), auto, out)
    fast = torch.bfloat16
    with pytest.raises(LosaError, match="started in float32, this would be bfloat16: resume it with --dtype float32"):
        losa.compress(str(llama), auto, out, resume=True)
    kept = json.loads((out / "run" / "recipe.json").read_text())
    kept["computed"]["device"] = "tpu"
    (out / "run" / "recipe.json").write_text(json.dumps(kept))
    losa.compress(str(llama), changed(auto, dtype="float32"), out, resume=True, progress=Progress())
    assert "begun on tpu, resumed on " in capsys.readouterr().err
    losa.compress(str(llama), auto, out, resume=True)  # finished: nothing is computed


def test_a_run_out_of_memory_goes_on_with_less(
    llama: Path, tmp_path: Path, brief: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """And so does the plain --resume after that; what comes out is the same but for rounding."""
    source = ["compress", str(llama), "--output"]
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(changed(brief, batch_size=4, micro_batch_size=4).to_json()))
    assert main([*source, str(tmp_path / "whole"), "--recipe", str(path)]) == 0
    out = str(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("losa.pipeline.recover_step", lambda *_: (_ for _ in ()).throw(Killed))
        main([*source, out, "--recipe", str(path)])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("losa.pipeline.recover_step", lambda *_: (_ for _ in ()).throw(Killed))
        main([*source, out, "--resume", "--micro-batch-size", "1", "--checkpointing"])
    assert "begun with micro_batch_size 4, resumed with 1" in capsys.readouterr().err
    assert main([*source, out, "--resume"]) == 0
    said = json.loads((tmp_path / "out" / "losa.json").read_text())["recipe"]
    assert (said["micro_batch_size"], said["checkpointing"]) == (1, True)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    for name in a:
        assert torch.equal(a[name] == 0, b[name] == 0)
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


def test_rows_are_counted_once_the_data_are_read(llama: Path, tmp_path: Path, brief: Recipe) -> None:
    """Where the recipe does not say how many: a killed run goes on, and the result says how many there were."""
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(json.dumps({"instruction": "Count.", "output": str(row)}) for row in range(9)))
    recipe = changed(brief, train_data=str(own), train_samples=None)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("losa.pipeline.recover_step", lambda *_: (_ for _ in ()).throw(Killed))
        losa.compress(str(llama), recipe, tmp_path / "out")
    result = losa.compress(str(llama), recipe, tmp_path / "out", resume=True)
    assert result.recipe.train_samples == 9
    assert json.loads((tmp_path / "out" / "losa.json").read_text())["recipe"]["train_samples"] == 9
    with pytest.raises(LosaError, match="train_samples is 9: must be at least one row a step"):
        losa.compress(str(llama), changed(recipe, steps=10))


def test_a_finished_run_clears_what_a_kill_left(llama: Path, tmp_path: Path, brief: Recipe) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runs.Run, "drop_states", lambda _: (_ for _ in ()).throw(Killed))
        losa.compress(str(llama), brief, tmp_path / "out")
    assert (tmp_path / "out" / "run" / "dense.safetensors").exists()
    losa.compress(str(llama), brief, tmp_path / "out", resume=True)
    assert not [path for path in os.listdir(tmp_path / "out" / "run") if path.endswith(".safetensors")]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_another_type_than_the_stored_one_is_said(
    stored: torch.dtype,
    tmp_path: Path,
    brief: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where auto is bfloat16; and what is said to keep the stored one does."""
    choose = model.choose_dtype
    monkeypatch.setattr(
        model, "choose_dtype", lambda name, device: choose("bfloat16" if name == "auto" else name, device)
    )
    source = save_tiny(tmp_path / "dense", dtype=stored)
    for dtype, saved in (("auto", torch.bfloat16), ("float32", stored)):
        recipe = changed(brief, dtype=dtype, recovery="none")
        losa.compress(str(source), recipe, tmp_path / dtype, progress=Progress())
        kind = str(stored).removeprefix("torch.")
        said = f"stored in {kind}, computed and saved in bfloat16: --dtype float32 keeps what is stored"
        assert (said in capsys.readouterr().err) == (saved != stored)
        assert {t.dtype for t in load_file(tmp_path / dtype / "model.safetensors").values()} == {saved}


def test_the_result_in_memory_is_the_saved_one_whatever_it_computed_in(tmp_path: Path, brief: Recipe) -> None:
    """Invariant 6: weights stored in bf16 and computed in fp32; buffers keep their precision."""
    source = save_tiny(tmp_path / "dense", dtype=torch.bfloat16)
    result = losa.compress(str(source), brief, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert result.model.dtype == loaded.dtype == torch.bfloat16
    tokens = torch.arange(1, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(result.model(tokens).logits, loaded(tokens).logits)
    assert losa.compress(str(source), brief).model.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- ignored blocks


@pytest.mark.parametrize("allocator", ["rmi", "owl", "error", "uniform"])
def test_a_block_that_is_ignored_whole(allocator: str, llama: Path, tmp_path: Path, small: Recipe) -> None:
    recipe = changed(small, ignore=[r"layers\.1\."], allocator=allocator)
    result = losa.compress(str(llama), recipe, tmp_path / "out")
    blocks = len(result.history[0]["ranks"])
    for record in result.history:
        assert record["ranks"][1] == 0
        assert sum(record["ranks"]) == round(recipe.mean_rank_at(record["step"]) * (blocks - 1))
    found = inspect(tmp_path / "out")
    assert found["blocks"][1]["weights"] == 0


def test_ranks_are_the_adapted_blocks(small: Recipe) -> None:
    result = losa.compress(tiny(), changed(small, targets=r"layers\.[12]\..*q_proj"), tokenizer=tokenizer())
    for record in result.history:
        adapted = [rank for rank in record["ranks"] if rank]
        assert len(adapted) == 2 and sum(adapted) == round(2 * small.mean_rank_at(record["step"]))


# ------------------------------------------------------------------------------------------------- what Python is told


def test_what_cannot_be_compressed_is_said(tmp_path: Path, llama: Path, brief: Recipe) -> None:
    with pytest.raises(LosaError, match="Sequential is no causal language model"):
        losa.compress(torch.nn.Sequential(torch.nn.Linear(2, 2)), brief, tokenizer=tokenizer())
    with pytest.raises(LosaError, match="LlamaModel is no causal language model"):
        losa.compress(tiny().model, brief, tokenizer=tokenizer())
    with pytest.raises(LosaError, match="computed in its own type"):
        losa.compress(tiny(), changed(brief, dtype="bfloat16"), tokenizer=tokenizer())
    for given in (brief, changed(brief, recovery="none", reconstruct=1), changed(brief, pruner="pruner-zero")):
        with pytest.raises(LosaError, match="float16 has too small a range for gradients: use bfloat16 or float32"):
            losa.compress(str(llama), changed(given, dtype="float16"), tmp_path / "out")
        with pytest.raises(LosaError, match="float16 has too small a range"):
            losa.compress(tiny().half(), changed(given, dtype="auto"), tokenizer=tokenizer())
    large = tokenizer()
    large.add_tokens([f"<extra {i}>" for i in range(9)])
    with pytest.raises(LosaError, match="tokenizer does not fit"):
        losa.compress(tiny(), brief, tokenizer=large)
    with pytest.raises(LosaError, match="does not merge: name an output"):
        losa.compress(str(llama), changed(brief, recovery="lora"))
    with pytest.raises(LosaError, match="unknown recipe 'papers': did you mean 'paper'"):
        losa.compress(str(llama), "papers")
    with pytest.raises(LosaError, match=r"mean rank would reach 99, the widest linear has \d+"):
        losa.compress(llama, changed(brief, mean_rank=99.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    losa.compress(llama, changed(brief, recovery="none"), tmp_path / "out")  # a Path is a folder


def test_what_is_read_may_not_be_in_the_output(llama: Path, tmp_path: Path, brief: Recipe, text: Path) -> None:
    out = tmp_path / "out"
    losa.compress(str(llama), changed(brief, recovery="none"), out)
    made = files(out)
    shutil.copy(text, out / "rows.jsonl")
    for setting, value in (
        *(("teacher_model", str(place)) for place in (out, tmp_path / "out" / ".." / "out")),
        *((name, str(out / "rows.jsonl")) for name in ("calibration", "train_data", "eval_data")),
    ):
        recipe = changed(brief, distill=0.5, **{setting: value})
        with pytest.raises(LosaError, match=f"{setting} .* is in the output, which is replaced"):
            losa.compress(str(llama), recipe, out, overwrite=True)
    assert made.items() <= files(out).items()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_that_others_quantised_is_refused(loaded: bool, tmp_path: Path, llama: Path, brief: Recipe) -> None:
    source = shutil.copytree(llama, tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    model = tiny()
    model.config.quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    for recipe, work in ((brief, losa.compress), (Repair(), losa.recover)):
        with pytest.raises(LosaError, match=rf"is quantised \({'bitsandbytes' if loaded else 'fp8'}\): name the model"):
            work(model if loaded else source, recipe, tokenizer=tokenizer())


def test_too_little_room_on_the_disk_is_said_before(
    llama: Path, brief: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not refused: what is written is foretold, about, and --resume goes on once there is room."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "import", "output": "this and that"}\n' * 12)
    told = changed(brief, train_data=str(rows), train_samples=None, distill=0.5, teacher="cached")
    needed = inspection.plan(str(llama), told.at(train_samples=12))["disk"]  # what is cached follows from the rows
    for free, said in ((needed, False), (needed - 1, True)):
        out = tmp_path / f"{said}"
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free, total=2**40))
        losa.compress(str(llama), told, out, progress=Progress())
        assert (f"will be written to '{out}'" in capsys.readouterr().err) == said
        # what is overwritten makes room; what goes on has what it needs
        losa.compress(str(llama), told, out, overwrite=True, progress=Progress())
        losa.compress(str(llama), told, out, resume=True, progress=Progress())
        assert "the disk may not suffice" not in capsys.readouterr().err
    (tmp_path / "brief.json").write_text(json.dumps(brief.to_json()))
    plan = ["compress", str(llama), "--dry-run", "--recipe", str(tmp_path / "brief.json"), "--output"]
    for output, said in ((tmp_path / "new", True), (out, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1, total=2**40))
        assert main([*plan, str(output), *([] if said else ["--resume"])]) == 0
        assert (f"will be written to '{output}'" in capsys.readouterr().out) == said
