"""What a training takes of the machine: the accelerator, threads, freed memory, repeatable operations; given back after."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

M_TRIM_THRESHOLD: Final = -1  # of malloc.h
M_MMAP_MAX: Final = -4


def accelerator() -> torch.device:
    """The GPU where there is one (in a process of several: the one it was given), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads set for a while: a worker's other runs keep theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def memory_kept() -> Iterator[None]:
    """glibc told to keep freed memory for a while instead of returning it to the system after every large tensor.

    Without it each activation map is new memory that the kernel has to zero: 4.4 million page faults and 7.6 s of system
    time where it takes 0.3 million and 0.7 s with it (EfficientNet-Lite0, 160 px, 1,500 photographs, 2 cores).
    """
    libc = ctypes.CDLL(None)
    known = hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    if known:
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)
    try:
        yield
    finally:
        if known:
            libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)  # glibc's defaults
            libc.mallopt(M_MMAP_MAX, 65536)
            libc.malloc_trim(0)


@contextmanager
def repeatable(strictly: bool) -> Iterator[None]:
    """cuDNN without its choice by timing; strictly: torch refuses every operation that may give other bits the next time."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if strictly:
        torch.use_deterministic_algorithms(True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
