"""What glibc's heap keeps of freed memory, and how it goes back to the system. Other C libraries are left alone."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's, in malloc.h
MAPPED = 1 << 20  # bytes
# what glibc's own thresholds have grown to once a program has freed tensors that large (it doubles the other one)
LARGEST = 32 << 20


def trim() -> None:
    """Give back what is free in the heap, whole pages of it: tensors below the threshold leave holes of all sizes."""
    if give := getattr(ctypes.CDLL(None), "malloc_trim", None):
        give(0)


@contextmanager
def returned_at_once() -> Iterator[None]:
    """Inside, memory of MAPPED bytes or more goes back to the system when it is freed, and no hole is ever left.

    glibc maps what is larger than a threshold and takes the rest from its heap, and it raises that threshold to 32 MiB
    as tensors come and go. Of a block whose activations are somewhat smaller, half as much as they take then stays in
    holes that the next tensor does not fit. What the system does for fresh pages is not seen in the time of a forward
    pass (docs/log.md). The thresholds are the process's: at the end they are what glibc itself would have come to.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, MAPPED)
    mallopt(M_TRIM_THRESHOLD, LARGEST)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)
        trim()
