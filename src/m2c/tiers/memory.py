"""Page-aligned host memory that direct reads can land in.

Knows nothing about what is stored in it.
"""

import mmap

import numpy as np
import numpy.typing as npt

from m2c.bundle.shard import align


def aligned_buffer(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed, page-aligned u8 [nbytes rounded up to a page]; pages are not touched yet.

    An anonymous mapping of our own, so that huge pages can be asked for and the memory goes back
    to the system as soon as the array is dropped.
    """
    # private: shared memory, the default, gets huge pages on few systems
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapping = mmap.mmap(-1, max(align(nbytes), mmap.PAGESIZE), flags=flags)
    if nbytes >= 2 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)
