"""Settings of glibc's allocator that training on a CPU needs; with another C library nothing happens.

By default glibc maps large blocks and gives them back when they are freed: the activations of every step
would be faulted in anew, page by page (1,500 faults in a step of 27 ms). Here freed memory stays with the
process, and what is reserved for it is in huge pages, which the TLB holds.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MADV_HUGEPAGE = 14  # linux/mman.h
_LARGEST_BLOCK = (1 << 30, 32 << 20)  # to keep; older versions of glibc take 32 MiB at most
_RESERVED_BLOCK, _RESERVED_BLOCKS = 31 << 20, 8
_HUGE_PAGE = 2 << 20


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, up to 2 GiB, and ask for huge pages for the first 248 MiB of it.

    Address space is reserved, memory is not: pages that are never written take none.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    any(libc.mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST_BLOCK)  # 1: the first that is accepted
    libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    blocks = [block for block in (libc.malloc(_RESERVED_BLOCK) for _ in range(_RESERVED_BLOCKS)) if block]
    end = libc.sbrk(0)
    first = min(blocks, default=end)
    begin = (first + _HUGE_PAGE - 1) // _HUGE_PAGE * _HUGE_PAGE
    if begin < end <= first + 2 * _RESERVED_BLOCKS * _RESERVED_BLOCK:  # the blocks are the heap's end
        libc.madvise(begin, end - begin, _MADV_HUGEPAGE)
    for block in blocks:
        libc.free(block)
