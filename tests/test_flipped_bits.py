"""R3 end to end: no damage of a bundle ever becomes a token.

One trial damages one file in one of twelve ways and runs the command line in one of ten modes. The
run must end with 4, having said nothing but the beginning of what the undisturbed bundle says; or,
if it read no block that is damaged, say exactly what the undisturbed bundle says.
"""

import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from command_line import Said, m2c
from damages import Damaged, copy_back, damage
from running import options_for, plan_of, smallest_dram
from tiny_models import pack_folder, write_checkpoint
from trials import trials

from m2c.bundle.bundle import Bundle
from m2c.bundle.shard import PAGE
from m2c.engine import RunOptions
from m2c.errors import DoesNotFit
from m2c.model.mix import Mix
from m2c.tiers import ssd

SHAPE = {"hidden_size": 96, "intermediate_size": 700}
PROMPT = ("-p", "x y", "-n", 6, "-c", 32, "--threads", 1, "-q")
KIB = 1 << 10


@dataclass(frozen=True)
class Subject:
    bundle: Bundle
    copy: Path  # of the bundle, to be damaged
    donor: Path  # of the same shape
    modes: dict[str, tuple[object, ...]]  # options of run


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("flipped")
    sources = [write_checkpoint(folder / f"source{i}", SHAPE, seed=i) for i in range(2)]
    bundle, donor = (pack_folder(s, folder / f"{s.name}.m2c") for s in sources)
    copy = shutil.copytree(bundle.path, folder / "copy.m2c")
    return Subject(bundle, copy, donor.path, modes_of(bundle, donor.path))


def modes_of(bundle: Bundle, donor: Path) -> dict[str, tuple[object, ...]]:
    """Everything resident, and as little as can be, of each way to compute."""
    mixed = options_for(Mix(5, 15, 80))
    return {
        "mixed": ("--mix", "5/15/80"),
        "mixed, streamed": ("--mix", "5/15/80", *dram_of(bundle, mixed)),
        "mixed, dropping": ("--mix", "5/15/80", "--drop", 30, *dram_of(bundle, mixed, 64 * KIB)),
        "int4, streamed": ("--mix", "0/0/100", *dram_of(bundle, options_for(Mix(0, 0, 100)))),
        "hbm": ("--mix", "5/15/80", "--hbm", "1GiB"),
        "hbm, streamed": ("--mix", "5/15/80", *hbm_of(bundle, mixed)),
        "exact": ("--exact",),
        "exact, as stored": ("--exact", *dram_of(bundle, speculating(), 160 * KIB)),
        "exact, streamed": ("--exact", *dram_of(bundle, speculating())),
        "exact, drafts of another": ("--exact", "--draft", donor),
    }


def speculating() -> RunOptions:
    return options_for(Mix(100, 0, 0), speculate=True)


def dram_of(bundle: Bundle, options: RunOptions, more: int = 0) -> tuple[str, str]:
    return "--dram", f"{-(-(smallest_dram(bundle, options) + more) // KIB)}KiB"


def hbm_of(bundle: Bundle, options: RunOptions) -> tuple[str, ...]:
    """The least HBM, and then the least DRAM beside it, in KiB."""

    def fits(dram: int, hbm: int) -> bool:
        try:
            plan_of(bundle, replace(options, dram=dram * KIB, hbm=hbm * KIB))
        except DoesNotFit:
            return False
        return True

    def least(fit) -> int:  # type: ignore[no-untyped-def]
        low, high = 0, 1 << 20
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fit(middle) else (middle, high)
        return high

    hbm = least(lambda size: fits(1 << 20, size))
    return "--hbm", f"{hbm}KiB", "--dram", f"{least(lambda size: fits(size, hbm))}KiB"


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


def run(path: Path, mode: tuple[object, ...]) -> Said:
    return m2c("run", path, *PROMPT, *mode)


def test_the_modes_are_what_they_are_called(subject: Subject) -> None:
    """Else most of the trials below would do the same."""
    for mode, words in subject.modes.items():
        said = m2c("run", subject.bundle.path, *PROMPT, *words, "--plan")
        assert said.code == 0
        assert ("SSD   streams" in said.out) == ("streamed" in mode)
        assert ("exact mode" in said.out) == ("exact" in mode)
        assert ("HBM" in said.out) == ("hbm" in mode)


@pytest.mark.campaign
def test_damage_never_becomes_a_token(subject: Subject, reads: Reads) -> None:
    undisturbed: dict[str, Said] = {}
    for trial in trials("R3-end-to-end", ci=30, campaign=10_000):
        with trial as seed:
            rng = random.Random(seed)
            mode = list(subject.modes)[seed % len(subject.modes)]
            if mode not in undisturbed:
                undisturbed[mode] = run(subject.copy, subject.modes[mode])
                assert undisturbed[mode].code == 0, undisturbed[mode].err
            found = damage(subject.copy, subject.bundle, subject.donor, rng)
            reads._parts.clear()
            said = run(subject.copy, subject.modes[mode])
            copy_back(subject.copy, subject.bundle, found)
            require_sound(said, undisturbed[mode], subject, found, reads)


def require_sound(
    said: Said, undisturbed: Said, subject: Subject, found: Damaged, reads: Reads
) -> None:
    if said.code == 0:
        # only what the run never read can have stayed unseen: a part of a payload
        assert said.out == undisturbed.out
        assert found.local
        index = subject.bundle.shards[found.name]
        assert PAGE <= found.start < found.stop <= PAGE + index.header.payload_nbytes
        assert not reads.touch(subject.copy / found.name, found)
        return
    assert said.code == 4, said.err
    assert found.name in said.reason
    assert "Traceback" not in said.err
    # of tokens computed before the damage was met, all are right
    assert undisturbed.out.startswith(said.out.removesuffix("\n"))
