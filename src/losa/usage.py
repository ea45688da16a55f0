"""What a piece of work takes: its seconds, and its peak of memory."""

import os
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAMPLED = 0.05  # seconds between looks at the memory


class Usage:
    """Measures what is done inside `with`: `found` then has seconds, memory and device_memory (bytes; None: not known).

    memory is what the process held resident, mapped files included; device_memory what torch had given out on the CUDA
    device in use. Where the work sets the process's peak, that is exact; below it, it is the most that was seen at the
    beginning, at the end, and at looks about SAMPLED apart. (Both peaks could be reset for every piece of work, but whoever measures the whole process would then
    be told too little.)
    """

    def __enter__(self) -> "Usage":
        self.found: dict[str, Any] = {}
        self._meters = _meters()
        self._before = {name: peak() for name, (peak, _) in self._meters.items()}
        self._seen = dict.fromkeys(self._meters, 0)
        self._look()
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._watching, name="losa-usage", daemon=True)
        self._watch.start()
        self._began = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        seconds = time.monotonic() - self._began
        self._done.set()
        self._watch.join()
        self._look()  # on a busy machine the thread may have had no turn since long
        self.found = {"seconds": round(seconds, 3)}
        for name, (peak, _) in self._meters.items():
            after = peak()
            self.found[name] = after if after > self._before[name] else self._seen[name] or None

    def _watching(self) -> None:
        while not self._done.wait(SAMPLED):
            self._look()

    def _look(self) -> None:
        for name, (_, present) in self._meters.items():
            self._seen[name] = max(self._seen[name], present())


Meter = Callable[[], int]


def _meters() -> dict[str, tuple[Meter, Meter]]:
    """Peak and present bytes: of the process, and on the CUDA device if a program has torch and has used it."""
    found: dict[str, tuple[Meter, Meter]] = {"memory": (peak_memory, _resident)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["device_memory"] = (torch.cuda.max_memory_allocated, torch.cuda.memory_allocated)
    return found


def peak_memory() -> int:
    """The most bytes this process has held resident so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident() -> int:
    """Bytes this process holds resident now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def machine(device: Any) -> dict[str, Any]:
    """Where it runs: processor, torch's threads, and the accelerator if that computes."""
    import torch

    found = {"system": f"{platform.system()} {platform.machine()}", "processor": processor(), "cores": os.cpu_count()}
    found["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        found["device"] = str(device)
    return found


def processor() -> str:
    """Its name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
