"""Every way m2c can fail on purpose, and the exit code each one carries.

Knows nothing about printing: the command line turns these into one line on stderr.

    M2CError 1
    ├── UsageError 2          the command cannot mean anything
    ├── UnsupportedModel 3    a model this version does not run
    ├── BadInput 4            a file is missing, malformed or damaged
    ├── NoSpace 5             the disk cannot hold what was asked for
    ├── StorageError 6        the disk answered with an error
    ├── DoesNotFit 7          the memory budget is too small
    └── Busy 8                another process is writing this bundle

130 (interrupted) is not an exception of ours: it is KeyboardInterrupt.
"""


class M2CError(Exception):
    """An expected failure. `message` says what and which file, `hint` what to type next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(M2CError):
    exit_code = 2


class UnsupportedModel(M2CError):
    exit_code = 3


class BadInput(M2CError):
    exit_code = 4


class NoSpace(M2CError):
    exit_code = 5


class StorageError(M2CError):
    exit_code = 6


class DoesNotFit(M2CError):
    """`smallest`: bytes of the budget that would do; 0 where none is known."""

    exit_code = 7

    def __init__(self, message: str, hint: str = "", smallest: int = 0) -> None:
        super().__init__(message, hint)
        self.smallest = smallest


class Busy(M2CError):
    exit_code = 8
