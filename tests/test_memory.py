"""What is foretold of memory, and which way of keeping a model and its activations follows from it."""

import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import changed, tiny
from torch import nn
from torch.profiler import ProfilerActivity, profile

from losa import memory, model, registry
from losa.adapters import MaskedLinear
from losa.errors import LosaError
from losa.inspection import plan
from losa.memory import Way
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
def test_what_a_pruner_takes_is_what_it_says(name: str, rows: int, columns: int, tmp_path: Path) -> None:
    pruner = registry.get("pruner", name)()
    torch.manual_seed(0)
    linear = MaskedLinear(nn.Linear(columns, rows, bias=False), 0, 1.0)
    if pruner.needs_gradients:
        statistic = pruner.gradient_statistic((rows, columns), "cpu")
        statistic.update(torch.randn(rows, columns), 1)
    elif statistic := pruner.statistic(columns, "cpu"):
        statistic.update(torch.randn(2 * columns, columns), 1)
    took = peak(lambda: prune_linear(name, linear, pruner, 0.5, statistic, CPU), tmp_path / "trace.json")
    assert 0.85 < memory.scratch(pruner, rows, columns) / took < 1.15
