"""Two gloo processes, started by torchrun as a user starts them, against one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from conftest import LONG, files, save_tiny, two_steps
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import losa
from losa import distributed, inputs, masks, pruning
from losa.errors import LosaError
from losa.model import choose_device
from losa.pruners.wanda import Wanda
from losa.recipe import Recipe
from losa.repair_recipe import PRUNING

WORKER = Path(__file__).with_name("worker.py")


def torchrun(*arguments: object, processes: int = 2) -> "subprocess.CompletedProcess[str]":
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LONG, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def lines_of_losa(done: "subprocess.CompletedProcess[str]") -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("losa: ")]


def run_jobs(jobs: list[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """What the jobs came to in rank 0, and in rank 1."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = torchrun(WORKER, "jobs", path)
    assert done.returncode == 0, done.stderr
    return [json.loads(Path(f"{path}.{rank}").read_text()) for rank in (0, 1)]


def updates(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "update"]


# name: (model, settings): one step, so that what is pruned is the model as it was given
ONE_STEP: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude-rmi": ("llama", {"pruner": "magnitude"}),
    "wanda-owl": ("llama", {"allocator": "owl", "rates_per": "linear"}),
    "sparsegpt-rmi": ("llama", {"pruner": "sparsegpt", "true_sequential": True}),
    "sparsegpt-error": ("llama", {"pruner": "sparsegpt", "allocator": "error", "error_tokens": 0}),
    "pruner-zero-owl": ("llama", {"pruner": "pruner-zero", "allocator": "owl"}),
    "experts-wanda-rmi": ("mixtral", {"ignore": [r"layers\.1\."]}),
    "structured-flap-owl": ("llama", {"pattern": "structured", "pruner": "flap", "allocator": "owl"}),
}
# a batch of 3 rows leaves a process with one, and the last of 16 rows leaves one without any
TAUGHT = {"recovery": "full", "distill": 0.5, "teacher": "cached", "teacher_top": 16, "learning_rate": "auto"}
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "taught": ("llama", TAUGHT | {"batch_size": 3, "micro_batch_size": 1}),
    "steps": ("llama", {"batch_size": 3, "micro_batch_size": 1}),
    "experts-steps": ("mixtral", {"batch_size": 3, "micro_batch_size": 1, "pruner": "pruner-zero"}),
}
ROWS = ("wanda", "pruner-zero")  # pruners that compare within a row
SHARDED = {"shard": "blocks", "checkpointing": True}


REPAIRED = "magnitude-rmi"


def repair(base: dict[str, Any]) -> dict[str, Any]:
    """The part of `base` that is not about pruning, in batches that do not divide."""
    return {name: value for name, value in base.items() if name not in PRUNING} | {
        "batch_size": 3,
        "micro_batch_size": 1,
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: str(save_tiny(folder / kind, kind)) for kind in ("llama", "mixtral")}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str], text: Path) -> Path:
    """What two processes make of everything in this file, in one job: a folder a run, found.json what each rank told."""
    base = two_steps(text)
    folder = tmp_path_factory.mktemp("two")
    jobs: list[dict[str, Any]] = []
    for name, (kind, given) in ONE_STEP.items():
        jobs.append({"name": name, "source": models[kind], "settings": base | {"steps": 1} | given})
    for name, (kind, given) in STEPS.items():
        jobs.append({"name": name, "source": models[kind], "settings": base | given})
        if name != "taught":
            jobs.append({"name": f"{name}-sharded", "source": models[kind], "settings": base | given | SHARDED})
    jobs.append({"name": "repaired", "source": str(folder / REPAIRED), "repair": True, "settings": repair(base)})
    for name, here, there in (
        ("recipe", {}, {"settings": {"sparsity": 0.6}}),
        ("code", {}, {"code": "another"}),
        ("model", {"scale": 1.0}, {"scale": 1.01}),
        ("few", {"settings": base | {"calibration_samples": 1, "allocator": "uniform"}}, {}),
    ):
        jobs.append({"name": name, "source": models["llama"], "settings": base, "rank1": there} | here)
    for job in jobs:
        job["output"] = str(folder / job["name"])
    ranks = run_jobs(jobs, folder)
    found = {job["name"]: [rank[i] for rank in ranks] for i, job in enumerate(jobs)}
    (folder / "found.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def by_one(models: dict[str, str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compresses as `by_two` did, in this process; returns the result, and the scores of every linear that was pruned."""
    scores: dict[str, Tensor] = {}
    prune_linear, choose = pruning.prune_linear, masks.choose
    current = ""

    def named(name: str, *rest: Any) -> None:
        nonlocal current
        current = name
        prune_linear(name, *rest)
        current = ""

    def spy(found: Tensor, *rest: Any) -> Tensor:
        if current:
            assert current not in scores, "a linear's scores are compared at once"
            scores[current] = found.clone()
        return choose(found, *rest)

    def compress(kind: str, settings: dict[str, Any]) -> tuple[losa.Result, dict[str, Tensor]]:
        if settings.get("steps") == 1:
            monkeypatch.setattr(pruning, "prune_linear", named)
            monkeypatch.setattr(masks, "choose", spy)
        recipe = Recipe(**two_steps(text) | settings)
        return losa.compress(models[kind], recipe, tmp_path / "one"), scores

    return compress


def differing(one: Path, two: Path) -> dict[str, Tensor]:
    """Where the masks of two runs differ, by linear."""
    first, second = (load_file(folder / "masks.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    bits = {name: first[name] ^ second[name] for name in first if first[name].dtype == torch.uint8}
    assert all(torch.equal(first[name], second[name]) for name in first.keys() - bits.keys())
    return {name: masks.unpack(b, 8 * b.shape[1]) for name, b in bits.items()}


def check_told(one: dict[str, Any], two: dict[str, Any], tolerance: float) -> None:
    """Two runs' losa.json: rates, errors, ranks and perplexities."""
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["rates"] == pytest.approx(b["rates"], rel=tolerance)
        assert a["errors"] == pytest.approx(b["errors"], rel=tolerance)
        assert a["ranks"] == b["ranks"] and a["unreached"] == b["unreached"]
    for which in ("dense", "sparse"):
        assert one["measurements"][which].pop("loads", None) == two["measurements"][which].pop("loads", None)
        assert one["measurements"][which] == pytest.approx(two["measurements"][which], rel=tolerance)


@pytest.mark.parametrize("name", ONE_STEP)
def test_two_processes_prune_as_one(name: str, by_two: Path, by_one: Any) -> None:
    """Equations.md, decision 9: masks differ only where scores tie within 1e-6; losses agree within float tolerance."""
    assert json.loads((by_two / "found.json").read_text())[name] == [{"held": []}] * 2
    kind, given = ONE_STEP[name]
    result, scores = by_one(kind, {"steps": 1} | given)
    assert result.path is not None
    found = differing(result.path, by_two / name)
    assert not any(bool(there.any()) for linear, there in found.items() if linear not in scores)
    for linear in scores:
        if bool((there := found[linear]).any()):
            there, score = there[:, : scores[linear].shape[1]], scores[linear]
            kept = masks.unpack(load_file(result.path / "masks.safetensors")[linear], score.shape[1])
            border = score.masked_fill(kept, 0)
            border = border.amax(dim=1, keepdim=True) if given.get("pruner", "wanda") in ROWS else border.amax()
            assert bool(((score - border).abs() <= 1e-6 * border)[there].all()), linear
    told = [json.loads((folder / "losa.json").read_text()) for folder in (result.path, by_two / name)]
    check_told(*told, 1e-4)
    assert updates(by_two / name) == pytest.approx(updates(result.path), rel=1e-4)


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_recover_as_one(name: str, by_two: Path, by_one: Any) -> None:
    """Over two steps: the losses of every update, and what came of them."""
    kind, given = STEPS[name]
    result, _ = by_one(kind, given)
    assert result.path is not None
    different = torch.cat([there.flatten() for there in differing(result.path, by_two / name).values()])
    assert different.float().mean() < 1e-3
    told = [json.loads((folder / "losa.json").read_text()) for folder in (result.path, by_two / name)]
    check_told(*told, 1e-3)
    losses = updates(result.path)
    assert updates(by_two / name) == pytest.approx(losses, rel=1e-4) and len(losses) == len(set(losses)) == 6


def test_two_processes_repair_as_one(by_two: Path, text: Path, tmp_path: Path) -> None:
    losa.recover(str(by_two / REPAIRED), repair(two_steps(text)), tmp_path / "one")
    assert not any(bool(there.any()) for there in differing(tmp_path / "one", by_two / "repaired").values())
    assert updates(by_two / "repaired") == pytest.approx(updates(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize("name", sorted({*STEPS} - {"taught"}))
def test_a_sharded_model_recovers_as_a_whole_one(name: str, by_two: Path) -> None:
    """fully_shard, and blocks that run twice: the very same bits, with half of the frozen weights in each process."""
    made = [json.loads((by_two / run / "losa.json").read_text()) for run in (name, f"{name}-sharded")]
    assert made[0]["history"] == made[1]["history"] and made[0]["measurements"] == made[1]["measurements"]
    assert updates(by_two / name) == updates(by_two / f"{name}-sharded")
    for file in ("model.safetensors", "masks.safetensors"):
        assert (by_two / name / file).read_bytes() == (by_two / f"{name}-sharded" / file).read_bytes()
    found = json.loads((by_two / "found.json").read_text())[f"{name}-sharded"]
    for rank in found:  # dense perplexity, two steps, perplexity, and what is measured on the way
        assert len(rank["held"]) >= 4 and all(0.45 < share < 0.55 for share in rank["held"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("recipe", "the processes differ in sparsity: 0.5 in rank 0, 0.6 in rank 1: start all with the same command"),
        ("code", "the processes differ in the code of losa: "),
        ("model", "the processes differ in the model: "),
        ("few", "1 calibration sequences do not divide over 2 processes: raise calibration_samples"),
    ],
)
def test_processes_that_differ_are_refused(name: str, said: str, by_two: Path) -> None:
    found = json.loads((by_two / "found.json").read_text())[name]
    assert found[0] == found[1] and said in found[0]["error"]
    assert not (by_two / name).exists()


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def test_a_process_that_dies_ends_the_job_with_one_line_and_any_number_resumes(
    llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    recipe = settings | {"train_samples": 32, "checkpoint_minutes": 0}
    out, whole = tmp_path / "out", tmp_path / "whole"
    done = torchrun(WORKER, "die", 6, "compress", llama, "--output", out, *flags(recipe))
    assert done.returncode != 0 and len(lines_of_losa(done)) == 1, done.stderr
    assert "--resume goes on with the run, also with another number of processes" in lines_of_losa(done)[0]
    assert not (out / "losa.json").exists() and (out / "run" / "recovery.safetensors").is_file()
    shutil.copytree(out, tmp_path / "one")
    resumed = losa.compress(str(llama), Recipe(**recipe), tmp_path / "one", resume=True)
    jobs = [{"source": str(llama), "settings": recipe, "output": str(folder)} for folder in (out, whole)]
    assert run_jobs([jobs[0] | {"resume": True}, jobs[1]], tmp_path) == [[{"held": []}] * 2] * 2
    assert files(out) == files(whole), "killed and resumed is never killed"
    assert resumed.measurements["sparse"] == pytest.approx(
        json.loads((whole / "losa.json").read_text())["measurements"]["sparse"], rel=1e-3
    )


def test_what_is_wrong_in_all_processes_is_said_once(tmp_path: Path) -> None:
    done = torchrun("-m", "losa", "compress", "demo", "--output", tmp_path / "out", "--sparsity", "1.5")
    assert lines_of_losa(done) == ["losa: sparsity is 1.5: must be at least 0 and below 1"], done.stderr
    assert done.returncode != 0 and not (tmp_path / "out").exists()


def test_other_commands_run_in_one_process() -> None:
    several = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", "losa", "inspect", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | several)
    assert done.returncode == 2
    assert lines_of_losa(done) == [
        "losa: losa inspect runs in one process: torchrun is for losa compress and losa recover"
    ]


def test_a_pruner_whose_statistics_are_no_sums_is_for_one_process(
    llama: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "launched", lambda: 2)
    inputs.check(str(llama), small, None)
    monkeypatch.setattr(Wanda, "sums", False)
    with pytest.raises(LosaError, match="pruner 'wanda' is for one process: start losa without torchrun"):
        inputs.check(str(llama), small, None)


@hypothesis.given(count=st.integers(0, 1000), processes=st.integers(1, 64))
def test_shares_follow_each_other_and_are_alike(count: int, processes: int) -> None:
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world", lambda: processes)
        for rank in range(processes):
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts.append(distributed.own_range(count))
    assert [i for part in parts for i in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) == sizes[0] <= min(sizes) + 1


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "launched", lambda: 2)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(LosaError, match="device 'cuda:1' cannot be that of 2 processes: use cuda, one each"):
        choose_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(LosaError, match="process 1 of this machine has no device: torch sees 1"):
        choose_device("cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda") == torch.device("cuda:1")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(LosaError, match="LOCAL_RANK is not set, and every process would take the first device"):
        choose_device("cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert choose_device("cuda") == torch.device("cuda:0")  # each sees its own


def test_leaving_does_what_is_to_be_done_at_exit() -> None:
    code = "import atexit, losa.distributed as d; atexit.register(print, 'gone'); print('here'); d.leave(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG)
    assert (done.returncode, done.stdout.split()) == (3, ["here", "gone"])


def test_processes_with_settings_of_another_command_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for first, other in ({"sparsity": 0.5}, {"source": "x"}), ({"source": "x"}, {"sparsity": 0.5}):
        monkeypatch.setattr(distributed, "gather", lambda _, pair=(first, other): list(pair))
        with pytest.raises(LosaError, match=r"the processes differ in (sparsity|source): .*'nothing' in rank"):
            distributed.check_alike({})
