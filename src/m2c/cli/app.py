"""`m2c`: the commands, and how errors become one line and an exit code.

Imports nothing heavy: `m2c --help` must not wait for torch.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, Final

from m2c import __version__
from m2c.cli.console import end_now, exit_in_time, result, say
from m2c.errors import DoesNotFit, M2CError, UsageError

COMMANDS: Final = (
    "doctor", "profile", "pack", "run", "chat", "plan", "show", "check", "bench", "eval",
)  # fmt: skip
EPILOG: Final = (
    "Exit codes: 0 ok, 1 internal error, 2 usage, 3 unsupported model, 4 bad or damaged input, "
    "5 no space, 6 I/O error, 7 does not fit in the given memory, 8 busy, 130 interrupted, "
    "143 terminated."
)
_INTERRUPTED: Final = 130
_TERMINATED: Final = 143
_PATIENCE_S: Final = 2.0
_AGAIN_S: Final = 0.05


class Terminated(BaseException):
    """SIGTERM: unwinds like Ctrl-C, so that temporary files go."""


def main() -> None:
    """Entry point of the `m2c` command."""
    signal.signal(signal.SIGTERM, _unwind)
    # a shell that starts us in the background may have SIGINT ignored
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _unwind)
    _fill_closed_streams()
    try:
        code = call(sys.argv[1:])
    except BaseException as error:  # a signal just before or after what `call` guards
        code, text = _explain(error)
        say(f"m2c: {text}")
    # reads ahead and worker threads would keep the shell waiting
    end_now(code)


def call(words: list[str]) -> int:
    """Run one command line; its exit code, once the reason for it is on stderr."""
    try:
        code = _dispatch(words)
        sys.stdout.flush()
    except BaseException as error:
        code, text = _explain(error)
        if os.environ.get("M2C_DEBUG"):
            say("".join(traceback.format_exception(error)).rstrip())
        with contextlib.suppress(OSError):
            sys.stdout.flush()
    else:
        # typer swallows Ctrl-C and keeps its code
        text = "interrupted" if code == _INTERRUPTED else ""
    if text:
        say(f"m2c: {' '.join(text.split())}")
    return code


def make_app():  # type: ignore[no-untyped-def]
    """The typer application with all commands."""
    import typer

    app = typer.Typer(
        name="m2c", no_args_is_help=True, add_completion=True, rich_markup_mode=None,
        pretty_exceptions_enable=False, epilog=EPILOG,
        help="Run language models that do not fit in GPU memory and RAM, from SSD.",
    )  # fmt: skip

    @app.callback()
    def options(
        version: bool = typer.Option(False, "--version", help="Print the version and exit."),
        debug: bool = typer.Option(
            False, "--debug", envvar="M2C_DEBUG", help="Show tracebacks of errors."
        ),
    ) -> None:
        if version:
            result(f"m2c {__version__}")
            raise typer.Exit
        if debug:
            os.environ["M2C_DEBUG"] = "1"

    for name in COMMANDS:
        module = importlib.import_module(f"m2c.cli.{name}")
        app.command(name, epilog=module.EXAMPLE)(module.command)
    return app


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        result(f"m2c {__version__}")
        return 0
    code = make_app()(args=words or ["--help"], prog_name="m2c", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _explain(error: BaseException) -> tuple[int, str]:
    """(exit code, one line or nothing) for any way a command can end."""
    # Python wraps what is raised where a class is made, in a RuntimeError
    if isinstance(error, RuntimeError) and isinstance(
        error.__cause__, KeyboardInterrupt | Terminated
    ):
        error = error.__cause__
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        error = error.__context__  # typer and rich turn the one into the other
    if isinstance(error, BrokenPipeError):
        # the reader has what it wanted; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, ""
    if isinstance(error, OSError):
        error = _disk_error(error)
    if isinstance(error, M2CError):
        return error.exit_code, str(error)
    if isinstance(error, MemoryError):
        return DoesNotFit.exit_code, str(error) or "out of memory; give a smaller --dram"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return DoesNotFit.exit_code, "the GPU is out of memory; give a smaller --hbm"
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED, "interrupted"
    if isinstance(error, Terminated):
        return _TERMINATED, "terminated"
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0, ""
    if complain := getattr(error, "format_message", None):  # typer's: the words are wrong
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "m2c"
        usage = UsageError(complain().rstrip("."), f"see {command} --help")
        return usage.exit_code, str(usage)
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return 1, f"internal error, {what}; m2c --debug shows where"


def _disk_error(error: OSError) -> M2CError:
    """An OSError that nothing below foresaw: mostly of the stream that results go to."""
    from m2c.bundle.files import disk_errors

    try:
        with disk_errors(error.filename or "standard output"):
            raise error
    except M2CError as ours:
        return ours


def _fill_closed_streams() -> None:
    """A closed stream means that nobody listens, not that the next file we open is stdout."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "r" if descriptor == 0 else "w"
            # the lowest free number, so the one that was closed
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _unwind(number: int, _: object) -> None:
    code = _INTERRUPTED if number == signal.SIGINT else _TERMINATED
    begun = time.monotonic()

    def again(_number: int, _: object) -> None:
        # an impatient second must not stop the tidying up, but a hang must have an end
        if time.monotonic() - begun > _PATIENCE_S:
            end_now(code)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, again)
    exit_in_time(code, "interrupted" if number == signal.SIGINT else "terminated")
    sys.unraisablehook = _raised_in_vain
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _raised_in_vain(lost: Any) -> None:
    """Where Python was when a signal came, nothing can be raised (a callback of its own, a
    finalizer): raise it a moment later instead of printing that it was ignored."""
    kind = lost.exc_type
    if kind not in (KeyboardInterrupt, Terminated):
        sys.__unraisablehook__(lost)
        return

    def once_more(_number: int, _: object) -> None:
        raise kind

    number = signal.SIGINT if kind is KeyboardInterrupt else signal.SIGTERM
    signal.signal(number, once_more)
    later = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
    later.daemon = True
    later.start()


if __name__ == "__main__":
    main()
