"""Settings of glibc's memory allocator for the input pipeline."""

import ctypes
import platform

# The numbers of these parameters in glibc's malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
MIB = 2**20


def keep_freed_memory() -> bool:
  """Makes glibc reuse freed memory instead of returning it to the system; returns whether that worked (glibc only).

  Each image needs a dozen arrays of about a megabyte. By default each is requested from the system and returned to it,
  and the system clears it page by page, which takes about half of the time for a pair of crops. With these settings a
  thread keeps a few dozen megabytes at most.
  """
  if platform.libc_ver()[0] != "glibc":
    return False
  mallopt = ctypes.CDLL(None).mallopt
  # All three, because setting one of them stops glibc from adapting the others.
  settings = {MMAP_THRESHOLD: 32 * MIB, TRIM_THRESHOLD: 512 * MIB, TOP_PAD: 64 * MIB}
  return all(mallopt(parameter, value) for parameter, value in settings.items())
