"""The counting of trials: a campaign goes on where it was, and a failure is never forgotten."""

import json
from pathlib import Path

import pytest
import trials as module
from trials import trials


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_FOLDER", str(tmp_path))
    monkeypatch.setattr(module, "_REGRESSIONS", tmp_path / "regressions")
    return tmp_path


def seeds(promise: str, campaign: int, *, fail_at: int = -1) -> list[int]:
    found = []
    for trial in trials(promise, ci=1, campaign=campaign):
        with trial as seed:
            assert seed != fail_at
            found.append(seed)
    return found


def test_without_a_campaign_the_few_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FOLDER", None)
    assert seeds("R0-none", 100) == [0]


def test_a_campaign_goes_on_where_it_was(folder: Path) -> None:
    assert seeds("R0", 3) == [0, 1, 2]
    assert seeds("R0", 5) == [3, 4]
    assert json.loads((folder / "R0.json").read_text())["done"] == 5


def test_a_failure_is_kept_and_the_rest_goes_on(folder: Path) -> None:
    with pytest.raises(AssertionError):
        seeds("R0", 4, fail_at=1)
    assert seeds("R0", 4) == [2, 3]
    facts = json.loads((folder / "R0.json").read_text())
    assert facts["failed"] == [1]
    assert facts["done"] == 4


def test_what_failed_once_runs_first(folder: Path) -> None:
    (folder / "regressions").mkdir()
    (folder / "regressions" / "R0.txt").write_text("77\n12\n")
    assert seeds("R0", 1) == [77, 12, 0]
