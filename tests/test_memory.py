"""What is foretold of memory, and which way of keeping a model and its activations follows from it."""

import copy
import itertools
import json
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import changed, tiny, tokenizer
from torch import nn
from torch.profiler import ProfilerActivity, profile

import losa
from losa import heap, inspection, masks, memory, model, registry
from losa.adapters import MaskedLinear
from losa.errors import LosaError
from losa.inspection import plan
from losa.memory import Way
from losa.progress import Progress
from losa.pruning import prune_linear
from losa.recipe import Recipe

CPU = torch.device("cpu")


def peak(work: Callable[[], Any], trace: Path) -> float:
    """The most that torch and numpy allocate at a time."""
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    _, of_numpy = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: float(event["ts"]))
    return float(max(itertools.accumulate(event["args"]["Bytes"] for event in events)) + of_numpy)


@pytest.mark.parametrize(("rows", "columns"), [(1500, 500), (500, 1500)])
@pytest.mark.parametrize("name", registry.PRUNERS)
def test_what_a_pruner_takes_is_what_it_says(
    name: str, rows: int, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a matrix that is much larger than a selection's part of it."""
    monkeypatch.setattr(masks, "CHUNK", 5000)
    pruner = registry.get("pruner", name)()
    torch.manual_seed(0)
    linear = MaskedLinear(nn.Linear(columns, rows, bias=False), 0, 1.0)
    if pruner.needs_gradients:
        statistic = pruner.gradient_statistic((rows, columns), "cpu")
        statistic.update(torch.randn(rows, columns), 1)
    elif statistic := pruner.statistic(columns, "cpu"):
        statistic.update(torch.randn(2 * columns, columns), 1)
    for one in (copy.deepcopy(linear), linear):  # the first time, imports take memory too
        took = peak(lambda one=one: prune_linear(name, one, pruner, 0.5, statistic, CPU), tmp_path / "trace.json")
    assert 0.85 < memory.scratch(pruner, rows, columns) / took < 1.15


def test_the_first_way_that_fits_is_taken(llama: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """More in memory before less; what the recipe or the caller rules out is skipped."""
    config = model.load_config(str(llama))
    parts = {"model": 0.0}
    found = [Way(False, False, parts | {"x": 4e9}), Way(False, True, parts | {"x": 3e9})]
    found += [Way(True, False, parts | {"x": 2e9}), Way(True, True, parts | {"x": 1e9})]
    monkeypatch.setattr(memory, "ways", lambda *_: found)
    one_shot = changed(small, steps=1, recovery="none")

    def choose(text: str, recipe: Recipe = one_shot, **more: Any) -> Way:
        return memory.choose(str(llama), changed(recipe, memory=text), config, **more)

    assert [choose(text) for text in ("5GB", "4GB", "2.5 GB", "1.4GB")] == found
    assert choose("4GB", small) == found[1] and choose("5GB", from_disk=True) == found[2]
    with pytest.raises(LosaError, match=r"memory 3GB is too small for the model .* about 3\.4 GB would do; .* 'losa'"):
        choose("3GB", small)
    with pytest.raises(LosaError, match=r"about 1\.4 GB would do$"):
        choose("1GB")
    with pytest.raises(
        LosaError, match=r"about 4\.4 GB would do; it has to be in memory, for there is no output folder"
    ):
        choose("1GB", saves=False)
    for free, way in ((9e9, 0), (3.9e9, 1), (1.5e9, 3)):
        monkeypatch.setattr(memory, "available", lambda _, free=free: free)
        assert choose("") == found[way]
    monkeypatch.setattr(memory, "available", lambda _: 1e6)
    assert choose("") == replace(found[3], free=1e6)


def test_what_may_not_suffice_is_said(
    llama: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model that is loaded, what it takes is not taken twice."""
    recipe, need = changed(small, steps=1, recovery="none", sample_tokens=0), 1e9
    monkeypatch.setattr(memory, "ways", lambda *_: [Way(False, False, {"model": 0.0, "x": need - memory.PROCESS})])
    for source, room, said in ((str(llama), 7e8, True), (str(llama), need, False), (tiny(), need - 1e5, False)):
        monkeypatch.setattr(memory, "available", lambda _, room=room: room)
        losa.compress(source, recipe, tokenizer=tokenizer(), progress=Progress())
        told = "memory may not suffice: about 1 GB is needed at the peak, 0.7 GB is free"
        assert (told in capsys.readouterr().err) == said
    monkeypatch.setattr(memory, "available", lambda _: 7e8)
    assert inspection.plan(str(llama), recipe)["shortage"] == told
    held = "; the model has to be in memory, for recovery 'losa' trains all of it (none does not)"
    assert inspection.plan(str(llama), small)["shortage"] == told + held


def test_a_run_from_disk_is_for_one_process(llama: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("losa.distributed.launched", lambda: 2)
    with pytest.raises(LosaError, match="begun from disk, which is for one process: resume it without torchrun"):
        memory.choose(
            str(llama), changed(small, steps=1, recovery="none"), model.load_config(str(llama)), from_disk=True
        )


def group(folder: Path, limit: str, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("3000000\n")
    (folder / "memory.stat").write_text(stat)


def test_groups_of_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")
    (tmp_path / "own").write_text("5:cpu,cpuacct:/x\n4:memory:/job\n")
    folder = tmp_path / "memory" / "job"
    folder.mkdir(parents=True)
    for name, text in (("limit_in_bytes", "9000"), ("usage_in_bytes", "5000"), ("stat", "total_inactive_file 100\n")):
        (folder / f"memory.{name}").write_text(text)
    assert list(memory._groups()) == [4100]


def test_a_model_that_does_not_fit_the_machine_is_not_loaded_for_a_gpu(
    llama: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes from disk, block by block, or is warned of."""
    config = model.load_config(str(llama))
    roomy = {"cpu": 1e12, "cuda": 1e12}
    monkeypatch.setattr(memory, "available", lambda device: roomy[device.type])
    monkeypatch.setattr(model, "choose_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(model, "choose_dtype", lambda name, device: torch.bfloat16)
    one_shot = changed(small, steps=1, recovery="none")
    assert not memory.choose(str(llama), one_shot, config).from_disk
    roomy["cpu"] = 1.0
    assert memory.choose(str(llama), one_shot, config).from_disk
    assert "memory may not suffice" in memory.choose(str(llama), one_shot, config).shortage
    told = memory.choose(str(llama), small, config)
    assert not told.from_disk and told.shortage.startswith("the machine's memory may not suffice: about")
    assert memory.choose(tiny(), small, config).shortage == ""


@pytest.mark.parametrize(
    "count, said, enough",
    [
        (2.537e9, "2.5 GB", "2.6 GB"),
        (26.2e9, "26 GB", "27 GB"),
        (561e6, "0.56 GB", "0.57 GB"),
        (9.97e9, "10 GB", "10 GB"),
        (1.2e6, "0.0012 GB", "0.0012 GB"),
    ],
)
def test_gigabytes(count: float, said: str, enough: str) -> None:
    assert memory.gigabytes(count) == said and memory.gigabytes(count, math.ceil) == enough


def test_available_is_the_least_of_what_machine_group_and_process_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert memory.available(CPU) > 1e7
    monkeypatch.setattr(memory, "_machine", lambda: 3e9)
    assert memory.available(CPU) == 3e9
    (tmp_path / "own").write_text("0::/above/own\n")
    group(tmp_path / "above", "max")
    group(tmp_path / "above" / "own", "max")
    assert memory.available(CPU) == 3e9
    group(tmp_path / "above", "50000000")
    assert memory.available(CPU) == 47e6
    group(tmp_path / "above" / "own", "40000000", "inactive_file 2000000\nslab 7\n")
    assert memory.available(CPU) == 39e6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory._free("model", memory.Way(True, True, {"model": 0}), Recipe()) == 39e6
    monkeypatch.setattr("losa.distributed.launched", lambda: 2)
    assert memory._free("model", memory.Way(True, True, {"model": 0}), Recipe()) == 39e6 / 2
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
    assert memory.available(CPU) == 1000


def test_the_plan_says_the_way(llama: Path, small: Recipe) -> None:
    one_shot = changed(small, steps=1, recovery="none")
    roomy = plan(str(llama), one_shot)
    assert not roomy["model_on_disk"] and roomy["memory"] > max(roomy["memory_parts"].values())
    assert "recovery" in roomy["memory_parts"]


def test_what_glibc_keeps_counts_in_memory_only(llama: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of activations and masks that its heap holds, not of those that it maps on their own."""
    recipe, config = changed(small, steps=1, recovery="none"), model.load_config(str(llama))

    def calibrating() -> list[float]:
        return [way.parts["calibration"] for way in memory.ways(model.skeleton(config), config, recipe)]

    held = calibrating()
    monkeypatch.setattr(heap, "LARGEST", 0)
    mapped = calibrating()
    assert held[0] - mapped[0] == held[1] - mapped[1] > 0 and held[2:] == mapped[2:]


@pytest.mark.parametrize("recovery", ["losa", "full"])
def test_what_trials_put_back_counts(recovery: str, llama: Path, small: Recipe) -> None:
    """Pairs, or weights, once more; the plan counts them where the learning rate is searched for."""
    by_trials, given = (
        plan(str(llama), changed(small, recovery=recovery, learning_rate=rate)) for rate in ("auto", 1e-3)
    )
    more = by_trials["memory_parts"]["recovery"] - given["memory_parts"]["recovery"]
    put_back = 4 * (given["parameters_trained"] if recovery == "losa" else given["prunable"])
    assert more == pytest.approx(memory.HEAP * put_back, abs=2)
