"""`m2c`: the commands, and how errors become one line and an exit code.

Imports nothing heavy: `m2c --help` must not wait for torch.
"""

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Final

from m2c import __version__
from m2c.errors import DoesNotFit, M2CError, UsageError

COMMANDS: Final = ("profile", "pack", "run", "plan", "show", "check", "bench")
EPILOG: Final = (
    "Exit codes: 0 ok, 1 internal error, 2 usage, 3 unsupported model, 4 bad or damaged input, "
    "5 no space, 6 I/O error, 7 does not fit in the given memory, 8 busy, 130 interrupted."
)
_INTERRUPTED: Final = 130


def main() -> None:
    """Entry point of the `m2c` command."""
    if sys.argv[1:] == ["--version"]:
        print(f"m2c {__version__}")
        return
    try:
        outcome = make_app()(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except Exception as error:
        _fail_usage(error)
    else:
        sys.exit(outcome if isinstance(outcome, int) else 0)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, with every way it can end turned into one line and an exit code."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except M2CError as error:
            _fail(error, error.exit_code)
        except KeyboardInterrupt:
            _leave(_INTERRUPTED, "interrupted")
        except BrokenPipeError:
            # the reader has what it wanted; give Python's own last flush somewhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _leave(0)
        except MemoryError as error:
            _fail(error, DoesNotFit.exit_code)
        except Exception as error:
            if type(error).__module__.startswith("typer"):
                raise
            _fail(error, 1)
        # reads ahead and worker threads would keep the shell waiting
        _leave(0)

    return run


def make_app():  # type: ignore[no-untyped-def]
    """The typer application with the command named in argv, or with all of them for help."""
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
            print(f"m2c {__version__}")
            raise typer.Exit
        if debug:
            os.environ["M2C_DEBUG"] = "1"

    for name in COMMANDS:
        module = importlib.import_module(f"m2c.cli.{name}")
        app.command(name, epilog=module.EXAMPLE)(guarded(module.command))
    return app


def _fail_usage(error: Exception) -> None:
    """typer's own complaints about the command line."""
    import typer

    if isinstance(error, typer.Abort):
        _leave(_INTERRUPTED, "interrupted")
    explain = getattr(error, "format_message", None)
    if explain is None:
        _fail(error, 1)
    else:
        _fail(UsageError(explain().rstrip("."), "see m2c --help"), UsageError.exit_code)


def _fail(error: BaseException, code: int) -> None:
    if os.environ.get("M2C_DEBUG"):
        raise error
    text = str(error) or type(error).__name__
    if code == 1:
        text = f"internal error, {type(error).__name__}: {text}; m2c --debug shows where"
    _leave(code, text)


def _leave(code: int, text: str = "") -> None:
    """Say why, on one line, and exit at once."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if text:
        print(f"m2c: {' '.join(text.split())}", file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    main()
