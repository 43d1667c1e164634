"""R3 end to end: no damage of a bundle ever becomes a token.

One trial damages one file in one of twelve ways and runs the command line in one of ten modes. The
run must end with 4, having said nothing but the beginning of what the undisturbed bundle says; or,
if it read no block that is damaged, say exactly what the undisturbed bundle says.
"""

import random
from pathlib import Path

import pytest
from command_line import Said, m2c
from damages import Damaged, copy_back, damage
from every_mode import PROMPT, Subject, run
from trials import trials

from m2c.bundle.manifest import MANIFEST
from m2c.bundle.shard import PAGE
from m2c.tiers import ssd


class Reads:
    """The parts of shards that were read and found right or wrong, by file."""

    def __init__(self) -> None:
        self._parts: list[tuple[Path, int, int]] = []

    def note(self, request: ssd._Request) -> None:
        begin = PAGE + request.block * ssd.BLOCK
        self._parts.append((request.index.path, begin, begin + len(request.view)))

    def touch(self, path: Path, found: Damaged) -> bool:
        return any(
            file == path and begin < found.stop and found.start < end
            for file, begin, end in self._parts
        )


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """What the run under way reads of payloads; cleared by whoever starts one."""
    fill, noted = ssd._fill, Reads()

    def noting(request: ssd._Request) -> None:
        noted.note(request)
        fill(request)

    monkeypatch.setattr(ssd, "_fill", noting)
    return noted


def test_the_modes_are_what_they_are_called(subject: Subject) -> None:
    """Else most of the trials below would do the same."""
    for mode, words in subject.modes.items():
        said = m2c("run", subject.bundle.path, *PROMPT, *words, "--plan")
        assert said.code == 0
        assert ("SSD   streams" in said.out) == ("streamed" in mode)
        assert ("exact mode" in said.out) == ("exact" in mode)
        assert ("HBM" in said.out) == ("hbm" in mode)


@pytest.mark.campaign
def test_damage_never_becomes_a_token(subject: Subject, reads: Reads, tmp_path: Path) -> None:
    copy, undisturbed = subject.copied(tmp_path / "copy.m2c"), dict[str, Said]()
    for trial in trials("R3-end-to-end", ci=30, campaign=10_000):
        with trial as seed:
            rng = random.Random(seed)
            mode = list(subject.modes)[seed % len(subject.modes)]
            if mode not in undisturbed:
                undisturbed[mode] = run(copy, subject.modes[mode])
                assert undisturbed[mode].code == 0, undisturbed[mode].err
            found = damage(copy, subject.bundle, subject.donor, rng)
            reads._parts.clear()
            said = run(copy, subject.modes[mode])
            copy_back(copy, subject.bundle, found)
            require_sound(said, undisturbed[mode], subject, found)
            assert said.code or not reads.touch(copy / found.name, found)


def require_sound(said: Said, undisturbed: Said, subject: Subject, found: Damaged) -> None:
    if said.code == 0:
        # only what the run never read can have stayed unseen: a part of a payload
        assert said.out == undisturbed.out
        assert found.local
        index = subject.bundle.shards[found.name]
        assert PAGE <= found.start < found.stop <= PAGE + index.header.payload_nbytes
        return
    assert said.code == 4, said.err
    # the sound manifest of another bundle finds fault with the rest
    assert found.name in said.reason or found.name == MANIFEST
    assert "Traceback" not in said.err
    # of tokens computed before the damage was met, all are right
    assert undisturbed.out.startswith(said.out.removesuffix("\n"))
