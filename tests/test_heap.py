"""How freed memory goes back to the system, by what glibc says of itself."""

import ctypes
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from losa import heap

# In a process of its own: what others have left in its heap would be given out first.
SCRIPT = """
import ctypes, json
import torch
from losa import heap

class Mallinfo2(ctypes.Structure):  # of malloc.h: the fifth is mapped on its own, the ninth free in the heap
    _fields_ = [("counts", ctypes.c_size_t * 10)]

def glibc():
    call = ctypes.CDLL(None).mallinfo2
    call.restype = Mallinfo2
    counts = call().counts
    return counts[4], counts[8]

def mapped_for(count):
    before, _ = glibc()
    tensor = torch.empty(count, dtype=torch.uint8)
    return glibc()[0] - before

def within():
    free, tensors = glibc()[1], [torch.empty(LARGE, dtype=torch.uint8) for _ in range(6)]
    del tensors[::2]
    return glibc()[1] - free

LARGE = heap.LARGEST - heap.MAPPED
mapped_for(LARGE)
with heap.returned_at_once():
    found = {"mapped": mapped_for(LARGE), "small": mapped_for(heap.MAPPED // 4), "holes": within()}
try:
    with heap.returned_at_once():
        raise ValueError
except ValueError:
    pass
print(json.dumps(found | {"after": mapped_for(LARGE), "largest": mapped_for(2 * heap.LARGEST), "left": within()}))
"""


def test_what_is_freed_inside_is_the_systems_again() -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("not glibc 2.33 or later")
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    large = heap.LARGEST - heap.MAPPED
    assert found["mapped"] >= large and found["small"] == 0
    assert found["after"] == 0 and found["largest"] >= 2 * heap.LARGEST  # as glibc has it, also after an error inside
    assert found["left"] > large > found["holes"]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    heap.trim()
    with heap.returned_at_once():
        assert torch.ones(heap.MAPPED).sum() == heap.MAPPED
