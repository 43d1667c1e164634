"""Trials of a promise: how many, with which seeds, and where the count goes.

The default suite runs a few. `make campaign` names a folder, and then the large number is run: each
promise has a file there that says how far it came, so that a campaign that was broken off goes on.
Seeds that failed once are in tests/regressions and run first, always. Knows nothing about promises.
"""

import json
import os
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

# read at import: the tests' clean environment has no M2C_ variables
_FOLDER: Final = os.environ.get("M2C_CAMPAIGN")
_SECONDS: Final = float(os.environ.get("M2C_CAMPAIGN_SECONDS", "inf"))
_REGRESSIONS: Final = Path(__file__).parent / "regressions"
_SAVE_EVERY_S: Final = 2.0


def trials(promise: str, *, ci: int, campaign: int) -> Iterator["Trial"]:
    """Trials 0 .. ci - 1 of `promise` ("R3-reader"), or those of a campaign that are still to do.

    Each is a context that gives its seed; the test's assertions belong inside it.
    """
    known = _REGRESSIONS / f"{promise}.txt"
    if known.exists():
        yield from (Trial(promise, int(seed)) for seed in known.read_text().split())
    if _FOLDER is None:
        yield from (Trial(promise, seed) for seed in range(ci))
        return
    state = _State(Path(_FOLDER), promise, campaign)
    print(f"\n{promise}: trials {state.done} to {campaign}", flush=True)
    begin = time.monotonic()
    try:
        while state.done < campaign and time.monotonic() - begin < _SECONDS:
            yield Trial(promise, state.done, state)
            state.advance()
    finally:
        state.save(time.monotonic() - begin)


def in_campaign() -> bool:
    """Whether the large number is run, where a trial may also take longer."""
    return _FOLDER is not None


def keep_row(promise: str, row: dict[str, Any]) -> None:
    """In a campaign, a line of the table that a promise's figures are quoted from."""
    if _FOLDER is not None:
        Path(_FOLDER).mkdir(parents=True, exist_ok=True)
        with open(Path(_FOLDER) / f"{promise}.rows.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


class Trial:
    """`with trial as seed:`"""

    def __init__(self, promise: str, seed: int, state: "_State | None" = None) -> None:
        self._promise, self._seed, self._state = promise, seed, state

    def __enter__(self) -> int:
        return self._seed

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        if kind is None or issubclass(kind, KeyboardInterrupt | SystemExit | GeneratorExit):
            return False
        print(f"\n{self._promise}: trial {self._seed} failed", flush=True)
        if self._state is not None:
            self._state.failed(self._seed)
        return False


class _State:
    """How far a campaign came with one promise; a failed trial counts as done when it goes on."""

    def __init__(self, folder: Path, promise: str, campaign: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{promise}.json"
        self._facts: dict[str, Any] = {
            "promise": promise, "done": 0, "failed": [], "seconds": 0.0, "of": campaign,
        }  # fmt: skip
        if self._path.exists():
            self._facts.update(json.loads(self._path.read_text()), of=campaign)
        self._spent = float(self._facts["seconds"])
        self._begin = self._saved = time.monotonic()

    @property
    def done(self) -> int:
        return int(self._facts["done"])

    def advance(self) -> None:
        self._facts["done"] += 1
        if time.monotonic() - self._saved > _SAVE_EVERY_S:
            self.save(time.monotonic() - self._begin)

    def failed(self, seed: int) -> None:
        self._facts["failed"].append(seed)
        self.advance()
        self.save(time.monotonic() - self._begin)

    def save(self, seconds: float) -> None:
        self._facts["seconds"] = round(self._spent + seconds, 1)
        self._facts["date"] = datetime.now(UTC).date().isoformat()
        self._facts["machine"] = f"{_processor()}, Linux {platform.release()}"
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self._facts, indent=1) + "\n")
        new.rename(self._path)
        self._saved = time.monotonic()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
