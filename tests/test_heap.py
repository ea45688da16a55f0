"""How freed memory goes back to the system, by what glibc says of itself."""

import ctypes

import pytest
import torch

from losa import heap


class Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2, in malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "top",
        )
    ]


def glibc() -> Mallinfo2:
    """What it has: `hblkhd` bytes mapped on their own, `fordblks` bytes free in its heap."""
    call = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if call is None:
        pytest.skip("not glibc 2.33 or later")
    call.restype = Mallinfo2
    found: Mallinfo2 = call()
    return found


def mapped_for(count: int) -> int:
    """Bytes that are mapped, rather than taken from the heap, for a tensor of `count` bytes."""
    before = glibc().hblkhd
    tensor = torch.empty(count, dtype=torch.uint8)
    after = glibc().hblkhd
    del tensor
    assert glibc().hblkhd == before
    return int(after - before)


def test_inside_what_is_freed_is_the_systems_again() -> None:
    large, small = 4 * heap.MAPPED, heap.MAPPED // 4
    with heap.returned_at_once():
        assert mapped_for(large) >= large and mapped_for(small) == 0
        free = glibc().fordblks
        kept = [torch.ones(large, dtype=torch.uint8) for _ in range(20)]
        del kept[::2]
        assert glibc().fordblks - free < large  # no hole is left of ten
    assert mapped_for(large) == 0 and mapped_for(2 * heap.LARGEST) >= 2 * heap.LARGEST  # as glibc has it


def test_an_error_inside_ends_it_too() -> None:
    with pytest.raises(ValueError, match="inside"), heap.returned_at_once():
        raise ValueError("inside")
    assert mapped_for(4 * heap.MAPPED) == 0


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    heap.trim()
    with heap.returned_at_once():
        assert torch.ones(heap.MAPPED).sum() == heap.MAPPED
