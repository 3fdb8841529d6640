"""Keep the memory that one step frees for the next.

XLA's CPU client allocates the temporaries of every step anew. glibc takes such large pieces from the kernel and gives
them back each time, so that every step pays for tens of thousands of page faults: 13 % of the step of a small model.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_MADV_HUGEPAGE = 14  # sys/mman.h
_HUGE_PAGE = 2**21
_HEAP = 2**30


def keep_freed_memory() -> bool:
    """Make malloc keep what is freed, in huge pages, for this process; False where that cannot be done.

    For programs that run their steps on CPU, called once before any large allocation.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    # Everything from one growing heap that never shrinks.
    for option, value in ((_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        libc.mallopt(option, value)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.sbrk(0)
    # Address space only: no page exists before it is written to.
    piece = libc.malloc(_HEAP)
    if not piece:
        return False
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(first, (libc.sbrk(0) - first) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
    libc.free(piece)
    return True
