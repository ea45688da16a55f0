"""What torchrun starts in tests/test_processes.py: `jobs FILE`, a list of runs in one go, or `die UPDATE ARGUMENTS...`, the
command line with a rank 1 that is killed in the middle of a recovery."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conftest import tiny, tokenizer

import losa
from losa import cli, distributed, sharding, starting
from losa.errors import LosaError
from losa.recovery import training
from losa.sharding import sharded

RANK = int(os.environ["RANK"])


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One compression; `rank1` holds what is otherwise in rank 1. Returns the error, if there is one, and what was sharded."""
    if RANK == 1:
        job = job | job.get("rank1", {}) | {"settings": job["settings"] | job.get("rank1", {}).get("settings", {})}
    source, named, held = job["source"], {}, []
    starting.code = lambda: job.get("code", "this")
    if "scale" in job:
        source, named = tiny(), {"tokenizer": tokenizer()}
        source.model.norm.weight.data.mul_(job["scale"])

    @contextmanager
    def spy(*arguments: Any) -> Iterator[Any]:
        with sharded(*arguments) as twin:
            frozen = [p for p in twin.parameters() if not p.requires_grad]
            sizes = [(p.to_local().numel() * p.element_size(), p.numel() * p.element_size()) for p in frozen]
            held.append(sum(own for own, _ in sizes) / sum(whole for _, whole in sizes))
            yield twin

    sharding.sharded = spy
    try:
        if job.get("repair"):
            losa.recover(source, job["settings"], job["output"])
            return {"held": held}
        losa.compress(
            source, losa.Recipe(**job["settings"]), job.get("output"), resume=job.get("resume", False), **named
        )
    except LosaError as error:
        return {"error": str(error)}
    return {"held": held}


def die(update: int) -> None:
    accumulate, calls = training.accumulate, 0

    def dying(*arguments: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == update:
            os.kill(os.getpid(), signal.SIGKILL)
        return accumulate(*arguments)

    training.accumulate = dying


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.PIECE = 1000  # so that tensors are cut, and others put together
    if sys.argv[1] == "jobs":
        jobs = json.loads(Path(sys.argv[2]).read_text())
        found = [run(job) for job in jobs]
        Path(f"{sys.argv[2]}.{RANK}").write_text(json.dumps(found))
    else:
        if RANK == 1:
            die(int(sys.argv[2]))
        sys.exit(cli.main(sys.argv[3:]))
