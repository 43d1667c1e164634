"""Whole-file writes that are there completely or not at all, and disk errors in our own words.

Knows nothing about what the files hold.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from m2c.errors import BadInput, NoSpace, StorageError, UsageError

TEMPORARY_PREFIX = ".m2c-tmp-"
MEND: Final = "mend it: m2c pack MODEL --ssd DIR --repair"  # what to type where a file is damaged
_unfinished: set[Path] = set()  # temporary files that somebody is writing
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Translate OSError into NoSpace, BadInput or StorageError naming `path`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        if error.errno in _FULL:
            raise NoSpace(f"{path}: {reason}", "free some space and run the same command") from None
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            raise BadInput(f"{path}: {reason}") from None
        if error.errno == errno.ELOOP:  # what O_NOFOLLOW says of any link
            raise BadInput(
                f"{path}: a symbolic link, which is not followed", "put the file itself there"
            ) from None
        raise StorageError(f"{path}: {reason}") from None


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write `path` under a temporary name; rename it into place once it is safely on disk.

    The data are synced before the rename and the folder after it, so a power cut leaves the old
    state or the new one. On any failure the temporary file is removed and `path` is untouched; but
    if only the last sync fails, `path` is gone: its name may not last, so nobody may build on it.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        # a rename would put a file in the place of a device or of a link
        raise UsageError(f"{path} is not a regular file", "give another name")
    temporary = temporary_name(path)
    with disk_errors(path):
        _unfinished.add(temporary)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            put_in_place(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            _unfinished.discard(temporary)


def remove_unfinished() -> None:
    """For a process that ends at once: what its threads were writing goes, as if it had failed."""
    for temporary in list(_unfinished):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that readers ignore, and that nobody else uses: in containers process
    numbers repeat, and two of them may write to one disk."""
    unique = f"{os.getpid()}-{os.urandom(4).hex()}"
    return path.with_name(f"{TEMPORARY_PREFIX}{unique}-{path.name}")


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a file that is safely on disk, and sync its new name; gone if that fails."""
    os.rename(temporary, path)
    try:
        sync_directory(path.parent)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing, as some of networks
            raise
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, for reading; links are not followed, nothing is waited for.

    Raises BadInput for anything else. OSErrors are the caller's to translate.
    """
    # O_NONBLOCK: opening a FIFO must not wait for a writer
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadInput(f"{path}: not a regular file")
    return descriptor


def read_small(path: Path, *, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; links are not followed."""
    with disk_errors(path), open(open_regular(path), "rb") as file:
        # a read of `limit` bytes would set them aside, however short the file
        data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    if len(data) > limit:
        raise BadInput(f"{path}: larger than the {limit} bytes such a file may have")
    return data


def read_at(descriptor: int, nbytes: int, offset: int, path: Path) -> bytes:
    """Bytes of an open file, fewer only where it ends: the system may give less than was asked.

    Raises StorageError naming `path` and the byte.
    """
    data = bytearray()
    while len(data) < nbytes:
        with disk_errors(f"{path} at byte {offset + len(data)}"):
            part = os.pread(descriptor, nbytes - len(data), offset + len(data))
        if not part:
            break
        data += part
    return bytes(data)
