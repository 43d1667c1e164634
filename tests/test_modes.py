"""Which mode auto takes: by plans and predicted speeds, on the slow kernels too."""

from dataclasses import replace
from typing import Any

import pytest
from running import GiB

from m2c import modes
from m2c.bundle.bundle import Bundle
from m2c.cli.modes import asked_mode
from m2c.engine import RunOptions
from m2c.errors import DoesNotFit, UsageError
from m2c.modes import choose_mode, exact_options
from m2c.predict import predicted_exact_tps

PLAIN = RunOptions(ctx_size=32, threads=1, dram=GiB)


@pytest.mark.parametrize(("exact", "mode"), [(50.0, "exact"), (49.0, "mixed")])
def test_exact_is_worth_half_the_speed(
    deep_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, exact: float, mode: str
) -> None:
    monkeypatch.setattr(modes, "predicted_tps", lambda *_, **__: 100.0)
    monkeypatch.setattr(modes, "predicted_exact_tps", lambda *_, **__: exact)
    choice = choose_mode(deep_bundle, PLAIN)
    assert (choice.mode, choice.options.speculate) == (mode, mode == "exact")
    assert choice.predicted == {"mixed": 100.0, "exact": exact}


def test_neither_fits(deep_bundle: Bundle) -> None:
    with pytest.raises(DoesNotFit):
        choose_mode(deep_bundle, replace(PLAIN, dram=1))


def test_kernels_that_decode_slowly_are_not_promised_to_be_fast(
    deep_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, list[float]] = {}

    def record(*words: Any, kernel: str) -> float:
        said[kernel] = [
            predicted_exact_tps(words[0], replace(words[1], stored=stored), *words[2:],
                                kernel=kernel)
            for stored in (False, True)
        ]  # fmt: skip
        return 1.0

    monkeypatch.setattr(modes, "predicted_exact_tps", record)
    for kernel in ("torch", "scalar"):
        choose_mode(deep_bundle, replace(PLAIN, kernel=kernel))
        decoded, stored = said[kernel]
        assert stored < decoded


def test_what_a_person_asks_for() -> None:
    assert asked_mode(None, False, True) == "auto"
    assert asked_mode(None, False, False) == "mixed"
    assert asked_mode(None, True, True) == "exact"
    assert asked_mode("mixed", False, True) == "mixed"
    for words in (("fast", False, True), ("mixed", True, True), ("exact", False, False)):
        with pytest.raises(UsageError):
            asked_mode(*words)
    assert exact_options(PLAIN, "int8").dense == "int8"
