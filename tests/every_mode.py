"""A small bundle, another of its shape, and every way to run it: what trials of promises run on.

Knows nothing about pytest.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from command_line import Said, m2c
from running import options_for, plan_of, smallest_dram
from tiny_models import job_for, pack_folder, run_pack, write_checkpoint

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.bundle.importance import write_importance
from m2c.engine import RunOptions
from m2c.errors import DoesNotFit
from m2c.model.mix import Mix
from m2c.pack import PackJob

SHAPE = {"hidden_size": 96, "intermediate_size": 700}  # shards of one checksum block and of two
PROMPT = ("-p", "x y", "-n", 6, "-c", 32, "--threads", 1, "-q")
KIB = 1 << 10


@dataclass(frozen=True)
class Subject:
    job: PackJob
    profile: Path  # the job's, as a file
    bundle: Bundle  # what the job makes; do not change it
    donor: Path  # a bundle of the same shape
    modes: dict[str, tuple[object, ...]]  # options of run

    def copied(self, to: Path) -> Path:
        """The bundle, to be damaged."""
        shutil.rmtree(to, ignore_errors=True)
        return shutil.copytree(self.bundle.path, to)


def make_subject(folder: Path) -> Subject:
    job = job_for(write_checkpoint(folder / "source", SHAPE))
    profile = folder / "profile.safetensors"
    write_importance(profile, job.importance)
    run_pack(job, folder / "source.m2c")
    bundle = open_bundle(folder / "source.m2c")
    donor = pack_folder(write_checkpoint(folder / "donor", SHAPE, seed=1), folder / "donor.m2c")
    return Subject(job, profile, bundle, donor.path, modes_of(bundle, donor.path))


def run(path: Path, mode: tuple[object, ...]) -> Said:
    """`m2c run` of a few tokens."""
    return m2c("run", path, *PROMPT, *mode)


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
