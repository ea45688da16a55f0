"""Weights in huge pages, where the system has them: a product reads gigabytes a token, and looks up each page it reads."""

import contextlib
import ctypes
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HUGE = 2**21
LINE = 64
PAGEOUT = 21  # MADV_PAGEOUT, from Linux 5.4 on


class Pages:
    """Memory for tensors of known sizes, one behind the other, each at the beginning of a cache line.

    It is given back once the last tensor in it is gone, and taken from the system only as it is written to.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """sizes: bytes of all the tensors that will be put here."""
        total = sum(-(-size // LINE) * LINE for size in sizes)
        self._map = mmap.mmap(-1, total + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # a system without them has ordinary pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._next = -torch.frombuffer(self._map, dtype=torch.uint8).data_ptr() % HUGE

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, with a storage of its own."""
        piece = torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=self._next)
        self._next += -(-piece.nbytes // LINE) * LINE
        return piece.view(tensor.shape).copy_(tensor)


def leave(tensor: Tensor) -> None:
    """Let the system take back memory that a file stands behind, as of weights loaded by mapping it: they have been copied.

    Of what is no file's nothing happens; what is left may still be read, from the file.
    """
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end and _of_a_file(begin, end):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), PAGEOUT)


def _of_a_file(begin: int, end: int) -> bool:
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        place, _, _, _, inode = line.split()[:5]
        first, last = (int(number, 16) for number in place.split("-"))
        if first <= begin and end <= last:
            return inode != "0"
    return False
