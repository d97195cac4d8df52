"""Freed memory, given back to the system between the steps of a long task."""

import ctypes

import pyarrow as pa


def give_back() -> None:
    """Returns what Arrow and glibc keep of freed memory; a no-op where the C library has no such call.

    Each step of an ingest leaves tens of megabytes of freed but kept memory behind, on which the next one would pile up its
    own: 30,000 photographs of 40 KB took 537 MB at most without it and 475 MB with it.
    """
    pa.default_memory_pool().release_unused()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
