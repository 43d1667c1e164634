"""m2c in a process that notes what it opens, runs and imports: `python watched.py CASES FOUND`.

CASES: JSON, a list of command lines. FOUND: one object for each of what happened. The notes come
from Python's audit hooks, which code of a model could not take back.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import m2c

SECONDS = 60
PACKAGE = Path(m2c.__file__).parents[1]
# the interpreter, its packages, m2c, and what the system's libraries look at
SYSTEM = (
    sys.prefix, sys.base_prefix, str(PACKAGE), str(Path(__file__).parent),
    "/proc/", "/sys/", "/usr/", "/lib", "/etc/", "/dev/null", "/dev/urandom",
)  # fmt: skip
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile")
CODE = ("exec", "compile", "pickle.find_class", "ctypes.dlopen", "import", "marshal.loads")
NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request")


def watch(lines: list[list[str]], tmp_path: Path, cwd: Path) -> list[dict[str, Any]]:
    """code, out, err and notes of each command line, run one after another in one process."""
    cases, found = tmp_path / "cases.json", tmp_path / "found.json"
    cases.write_text(json.dumps(lines))
    script = Path(__file__).parent / "watched.py"
    environment = {
        **os.environ, "M2C_HOME": str(tmp_path / "home"), "RUST_BACKTRACE": "0",
        "PYTHONPATH": str(PACKAGE),  # the cases run elsewhere
    }  # fmt: skip
    command = [sys.executable, "-B", str(script), str(cases), str(found)]
    done = subprocess.run(command, cwd=cwd, env=environment, timeout=500, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(found.read_text())


notes: list[tuple[str, str]] = []
armed = False


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if not armed:
        return
    if event == "open":
        path, _mode, flags = arguments
        if not isinstance(path, int):
            writes = bool(flags and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            kind, name = "write" if writes else "read", os.fsdecode(path)
            folder, last = os.path.split(os.path.abspath(name))
            leads = os.path.join(os.path.realpath(folder), last)
            if not flags & os.O_NOFOLLOW:
                leads = os.path.realpath(leads)
            # as it is called, and what it is
            notes.extend({(kind, os.path.abspath(name)), (kind, leads)})
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"):
        notes.extend(("write", os.path.abspath(os.fsdecode(a))) for a in arguments if _is_path(a))
    elif event == "exec":
        notes.append((event, str(getattr(arguments[0], "co_filename", arguments[0]))))
    elif event == "compile":
        notes.append((event, str(arguments[1])))
    elif event in ("import", "ctypes.dlopen", "pickle.find_class"):
        notes.append((event, str(arguments[1] if event == "import" else arguments[0])))
    elif event in PROGRAMS:
        words = arguments[1] if event == "subprocess.Popen" else arguments[0]
        notes.append(("program", json.dumps(words, default=str)))
    elif event in NETWORK:
        notes.append(("network", event))


def _is_path(argument: Any) -> bool:
    return isinstance(argument, str | bytes | os.PathLike)


def main(cases: str, found: str) -> None:
    global armed
    import io
    from contextlib import redirect_stderr, redirect_stdout

    from m2c.cli.app import call, make_app

    make_app()
    with open(cases) as file:
        listed = json.load(file)
    results = []
    sys.addaudithook(note)
    signal.signal(signal.SIGALRM, _hangs)
    for words in listed:
        out, err = io.StringIO(), io.StringIO()
        notes.clear()
        signal.alarm(SECONDS)
        armed = True
        with redirect_stdout(out), redirect_stderr(err):
            code = call(words)
        armed = False
        signal.alarm(0)
        seen = sorted(set(notes))
        results.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "notes": seen})
        with open(found, "w") as file:
            json.dump(results, file)
    os._exit(0)


def _hangs(_number: int, _frame: object) -> None:
    raise TimeoutError(f"still at work after {SECONDS} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
