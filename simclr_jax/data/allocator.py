"""Settings of glibc's memory allocator for the input pipeline."""

import ctypes
import platform

MIB = 2**20
# M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD of glibc's malloc.h; setting one stops it from adapting the others.
SETTINGS = {-1: 512 * MIB, -2: 64 * MIB, -3: 32 * MIB}


def keep_freed_memory() -> None:
  """Makes glibc reuse freed memory instead of returning it to the system; does nothing where there is another libc.

  Each image needs a dozen arrays of about a megabyte. By default each is requested from the system and returned to it,
  and the system clears it page by page, which takes about half of the time for a pair of crops. With these settings a
  thread keeps a few dozen megabytes at most.
  """
  if platform.libc_ver()[0] == "glibc":
    for parameter, value in SETTINGS.items():
      ctypes.CDLL(None).mallopt(parameter, value)
