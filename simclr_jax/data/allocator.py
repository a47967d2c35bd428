"""How glibc treats the memory that the input pipeline frees."""

import ctypes
import platform

# Numbers of the parameters in glibc's malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3

MIB = 2**20


def keep_freed_memory() -> bool:
  """Has glibc keep freed memory for the next allocation; returns whether it will, which only glibc does.

  Every image takes a dozen arrays of about a megabyte. By default each of them is asked of the system and returned to
  it, and the system clears it page by page: about half of the time that a pair of crops takes. Kept are at most a few
  dozen megabytes for each thread.
  """
  if platform.libc_ver()[0] != "glibc":
    return False
  mallopt = ctypes.CDLL(None).mallopt
  # Any of them alone would switch off glibc's own adaption of the others.
  settings = {MMAP_THRESHOLD: 32 * MIB, TRIM_THRESHOLD: 512 * MIB, TOP_PAD: 64 * MIB}
  return all(mallopt(parameter, value) for parameter, value in settings.items())
