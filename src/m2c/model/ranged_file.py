"""A file read by ranges with pread: exact or an error, never short, and without mmap.

A mapped file that another process truncates kills the reader with SIGBUS; a short read is an error
that can be explained. Knows nothing about what the bytes mean.
"""

import os
import stat
import weakref
from pathlib import Path

from m2c.errors import BadInput, StorageError


class RangedFile:
    """Opened read-only; the descriptor is closed by `close` or when the object is collected."""

    def __init__(self, path: Path) -> None:
        """Raises BadInput when `path` is missing, unreadable or not a regular file."""
        self.path = path
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}") from None
        self._descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise BadInput(f"{path}: not a regular file")
        self.size = status.st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` (bytes) from `offset`. Raises BadInput if the file ends before that."""
        while buffer:
            try:
                count = os.preadv(self._descriptor, [buffer], offset)
            except OSError as error:
                raise StorageError(f"{self.path}: {error.strerror} at byte {offset}") from None
            if not count:
                raise BadInput(f"{self.path}: ends at byte {offset}", "fetch the file again")
            buffer, offset = buffer[count:], offset + count

    def read(self, offset: int, nbytes: int) -> bytearray:
        """`nbytes` bytes from `offset`. The caller has checked both against `size`."""
        data = bytearray(nbytes)
        self.read_into(memoryview(data), offset)
        return data


def check_rows(name: str, start: int, stop: int | None, rows: int) -> int:
    """`stop`, or `rows` for None. Raises IndexError unless 0 <= start <= stop <= rows."""
    end = rows if stop is None else stop
    if not 0 <= start <= end <= rows:
        raise IndexError(f"{name}: rows {start} to {end} of {rows}")
    return end
