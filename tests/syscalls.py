"""A process whose file calls are watched: each can be let go on, failed, cut short or deadly.

Seccomp hands every such call of every thread to us before the kernel does it (Linux 5.5, no root).
Unlike `strace -e inject` the N-th call is that of the whole process, not of each thread, and it
costs 0.1 ms. Calls outside the folder that is watched go on untold. Knows nothing about bundles.
"""

import ctypes
import fcntl
import multiprocessing
import os
import platform
import select
import signal
import struct
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, Final

import pytest

# x86-64: number -> (name, which arguments are paths or descriptors)
CALLS: Final = {
    1: "write", 18: "pwrite64", 20: "writev", 296: "pwritev", 328: "pwritev2", 3: "close",
    74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate", 285: "fallocate", 2: "open",
    85: "creat", 257: "openat", 437: "openat2", 82: "rename", 264: "renameat", 316: "renameat2",
    83: "mkdir", 258: "mkdirat", 84: "rmdir", 87: "unlink", 263: "unlinkat", 86: "link",
    265: "linkat", 88: "symlink", 266: "symlinkat", 40: "sendfile", 326: "copy_file_range",
    90: "chmod", 91: "fchmod", 268: "fchmodat", 26: "msync", 277: "sync_file_range",
}  # fmt: skip
KNOWN: Final = (
    "open", "openat", "write", "close", "fsync", "rename", "mkdir", "rmdir", "unlink", "ftruncate",
)  # fmt: skip
KILL: Final = -1
SHORT: Final = -2
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_NOTIFICATION: Final = struct.Struct("<QIIiIQ6Q")
_ANSWER: Final = struct.Struct("<QqiI")
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_PATH_NBYTES: Final = 4096
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Event:
    """A call below the folder, about to be done. Paths are relative to that folder."""

    call: str
    path: str
    target: str = ""  # of a rename
    offset: int = 0  # of a write
    data: bytes = b""
    flags: int = 0  # of an open

    @property
    def writes(self) -> bool:
        """Whether it changes what is on the disk, or makes it durable."""
        return self.call != "close" and (not self.call.startswith("open") or self.creates)

    @property
    def creates(self) -> bool:
        return self.call in ("open", "openat") and bool(self.flags & os.O_CREAT)


Decide = Callable[[Event], int]  # 0: go on, KILL, SHORT, or the errno it fails with


@dataclass(frozen=True)
class End:
    """How the process ended. `code`: what m2c would have exited with; None if it was killed."""

    code: int | None
    text: str = ""


def watch(
    processes: ForkServerContext, folder: Path, decide: Decide, function: Callable[..., Any],
    *arguments: Any,
) -> End:  # fmt: skip
    """Run `function` in a process of its own and ask `decide` before every call below `folder`."""
    ours, theirs = multiprocessing.Pipe()
    process = processes.Process(target=_child, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        listener = recv_handle(ours)
        try:
            _serve(listener, os.path.realpath(folder), decide, process.pid)
        finally:
            os.close(listener)
        try:
            return End(*ours.recv())
        except EOFError:
            return End(None)
    finally:
        process.kill()
        process.join()
        ours.close()


@cache
def why_not() -> str:
    """The reason that calls cannot be watched here; empty if they can."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "system calls are watched on x86-64 Linux only"
    child = os.fork()
    if child == 0:
        try:
            _install()
        except BaseException:
            os._exit(1)
        os._exit(0)
    refused = os.waitpid(child, 0)[1] != 0
    return "no seccomp notifications here (Linux 5.5)" if refused else ""


def require_watching() -> None:
    if reason := why_not():
        pytest.skip(reason)


# -- the process that is watched -------------------------------------------------------------------


def _child(
    connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    from m2c.cli.app import _explain

    listener = _install()
    send_handle(connection, listener, None)
    os.close(listener)
    try:
        function(*arguments)
        end = (0, "")
    except BaseException as error:
        end = _explain(error)
    connection.send(end)


def _install() -> int:
    """Put all CALLS of this thread and those it starts under a listener; its descriptor."""
    load, equal, answer = 0x20, 0x15, 0x06
    allow, notify, x86_64 = 0x7FFF0000, 0x7FC00000, 0xC000003E
    numbers = list(CALLS)
    program = [(load, 0, 0, 4), (equal, 1, 0, x86_64), (answer, 0, 0, allow), (load, 0, 0, 0)]
    program += [(equal, len(numbers) - i, 0, n) for i, n in enumerate(numbers)]
    program += [(answer, 0, 0, allow), (answer, 0, 0, notify)]
    code = b"".join(struct.pack("<HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    head = ctypes.create_string_buffer(struct.pack("<H6xQ", len(program), ctypes.addressof(buffer)))
    if _libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "prctl")
    listener = int(_libc.syscall(317, 1, 8, head))  # seccomp, SET_MODE_FILTER, NEW_LISTENER
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


# -- the one who watches ---------------------------------------------------------------------------


def _serve(listener: int, folder: str, decide: Decide, pid: int | None) -> None:
    """Answer until nobody is left to ask."""
    assert pid is not None
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        [(_, ready)] = poll.poll()
        if not ready & select.POLLIN:
            return
        buffer = bytearray(_NOTIFICATION.size)
        with suppress(FileNotFoundError, ProcessLookupError):  # the asker died meanwhile
            fcntl.ioctl(listener, _RECEIVE, buffer)
            asked, thread, _, number, _, _, *words = _NOTIFICATION.unpack(buffer)
            event = _event(thread, CALLS[number], words, folder)
            verdict = decide(event) if event else 0
            if verdict == KILL:
                os.kill(pid, signal.SIGKILL)
                continue
            if verdict == SHORT:
                done = _write_half(pid, words[0], event)
                answer = _ANSWER.pack(asked, done, 0, 0)
            else:
                answer = _ANSWER.pack(asked, 0, -verdict, 0 if verdict else 1)  # 1: do the call
            fcntl.ioctl(listener, _SEND, answer)


def _event(thread: int, call: str, words: list[int], folder: str) -> Event | None:
    """None for what lies elsewhere or does not write."""
    if call in ("write", "close", "fsync", "fdatasync", "ftruncate", "fallocate", "fchmod"):
        return _of_descriptor(thread, call, words, folder)
    if call in ("open", "rename", "mkdir", "rmdir", "unlink", "truncate"):
        path = _path(thread, words[0], folder)
        target = _path(thread, words[1], folder) if call == "rename" else None
        flags = words[1] if call == "open" else 0
    elif call in ("openat", "mkdirat", "unlinkat"):
        path, target = _path(thread, words[1], folder), None
        flags = words[2] if call == "openat" else 0
    else:
        return Event(call, "?")  # nothing of ours does this; a test that meets it should say so
    if path is None or (call in ("open", "openat") and not flags & _WRITING):
        return None
    return Event(call, path, target or "", flags=flags)


def _of_descriptor(thread: int, call: str, words: list[int], folder: str) -> Event | None:
    try:
        path = _below(os.readlink(f"/proc/{thread}/fd/{words[0]}"), folder)
        if path is None:
            return None
        lines = Path(f"/proc/{thread}/fdinfo/{words[0]}").read_text().splitlines()
    except FileNotFoundError:
        return None  # not open: the kernel will say so
    facts = dict(line.split(":", 1) for line in lines)
    flags = int(facts["flags"], 8)
    if call == "close" and not flags & _WRITING:
        return None
    data = _memory(thread, words[1], words[2]) if call == "write" else b""
    offset = int(facts["pos"]) if call == "write" else words[1] if call == "ftruncate" else 0
    return Event(call, path, offset=offset, data=data, flags=flags)


def _path(thread: int, address: int, folder: str) -> str | None:
    name = b""
    while b"\0" not in name and len(name) < _PATH_NBYTES:
        # not past the end of a page: the next may not be there
        name += _memory(thread, address + len(name), 256 - (address + len(name)) % 256)
    path = os.fsdecode(name.partition(b"\0")[0])
    return _below(os.path.join(os.readlink(f"/proc/{thread}/cwd"), path), folder)


def _below(path: str, folder: str) -> str | None:
    if path != folder and not path.startswith(folder + "/"):
        return None
    return os.path.relpath(path, folder)


def _memory(thread: int, address: int, nbytes: int) -> bytes:
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(nbytes)


def _write_half(pid: int, descriptor: int, event: Event | None) -> int:
    """Do half of a write for the process; how many bytes that was."""
    assert event is not None
    with _borrowed(pid, descriptor) as file:
        return os.write(file, event.data[: max(1, len(event.data) // 2)])


@contextmanager
def _borrowed(pid: int, descriptor: int):  # type: ignore[no-untyped-def]
    process = os.pidfd_open(pid)
    file = int(_libc.syscall(438, process, descriptor, 0))  # pidfd_getfd
    os.close(process)
    if file < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    try:
        yield file
    finally:
        os.close(file)
