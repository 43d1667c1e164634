"""Whole processes under a memory limit of what the person allowed plus the stated constant.

The limit is a cgroup's: it counts the page cache too, and the kernel ends who exceeds it. Real
weights. tests/test_memory.py looks at the resident set alone, where no cgroup can be had.
"""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from command_line import COMMAND, m2c
from trials import in_campaign, keep_row, trials

from m2c.bundle.bundle import Bundle
from m2c.data import calibration_text
from m2c.hardware import OVERHEAD_NBYTES
from m2c.units import MiB

pytestmark = pytest.mark.slow
TOKENS = 256 if in_campaign() else 64
LONG_PROMPT = 24_500  # characters: about 6,000 tokens
COUNTING = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"  # which a model goes on with, and does not end
MESSAGES = ["Name three rivers of Europe.", "Which is the longest?", "And how long is it?"]
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Way:
    """A command, the memory it gets beyond the smallest that works, and how it is told."""

    name: str
    words: str  # options; --dram and --hbm come from what the plan says is the smallest
    extra: int = 0  # MiB of --dram
    hbm_extra: int | None = None  # MiB of --hbm; None: no such tier
    command: str = "run"
    long: bool = False
    limit: int | None = None  # MiB, where m2c is to find --dram by itself or has none


MIXED = "--mode mixed -c 2048 --mix"
WAYS = [
    Way("INT4", f"{MIXED} 0/0/100"),
    Way("mix 5/15/80", f"{MIXED} 5/15/80"),
    Way("FP16", f"{MIXED} 100/0/0"),
    Way("INT8", f"{MIXED} 0/100/0"),
    Way("mix 0/25/75", f"{MIXED} 0/25/75"),
    Way("mix 50/50/0, half in memory", f"{MIXED} 50/50/0", 100),
    Way("mix 5/15/80, LRU", f"{MIXED} 5/15/80 --policy lru", 60),
    Way("mix 5/15/80, 30 % dropped", f"{MIXED} 5/15/80 --drop 30", 20),
    Way("all of INT8 in memory", f"{MIXED} 0/100/0", 300),
    Way("KV cache in f32, 8 threads", f"{MIXED} 0/25/75 --kv f32 -t 8"),
    Way("reading 20 blocks ahead", f"{MIXED} 0/25/75 --depth 20"),
    Way("exact", "--exact -c 2048"),
    Way("exact, drafts in memory", "--exact -c 2048", 60),
    Way("exact, all in memory", "--exact -c 2048", 340),
    Way("exact at INT8", "--exact --exact-precision int8 -c 2048", 30),
    Way("exact, a model drafts", "--exact --draft BUNDLE -c 2048", 160),
    Way("two tiers emulated, smallest", f"{MIXED} 5/15/80", 0, 0),
    Way("two tiers emulated", f"{MIXED} 5/15/80", 20, 60),
    Way("two tiers emulated, FP16", f"{MIXED} 100/0/0", 0, 100),
    Way("long context", "--mode mixed -c 8192 --mix 0/25/75", long=True),
    Way("long context, exact", "--exact -c 8192", long=True),
    Way("long context, two tiers", "--mode mixed -c 8192 --mix 5/15/80", 0, 0, long=True),
    Way("chat", "--mode mixed -c 2048 --mix 0/25/75", command="chat"),
    Way("chat, exact", "--exact -c 2048", 60, command="chat"),
    Way("auto within 1,100 MiB", "", limit=1100),
    Way("eval", "--mix 0/25/75 --mix 5/15/80 -n 2048", command="eval"),
    Way("eval, two tiers", "--mix 5/15/80 -n 1024", 0, 0, command="eval"),
    Way("profile", "", command="profile", limit=600),
    Way("pack", "", command="pack", limit=450),
    Way("torch kernels", f"{MIXED} 0/25/75 --kernel torch"),
    Way("long context, torch", "--mode mixed -c 8192 --mix 0/25/75 --kernel torch", long=True),
]


@pytest.fixture(scope="module")
def limits() -> Iterator[ModuleType]:
    """scripts/limits.py. Skips where no limit can be had."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "scripts")
        found = importlib.import_module("limits")
        if not found.can_limit():
            pytest.skip("needs root and a memory cgroup, version 1 or 2")
        yield found


def smallest(words: list[object], tier: str) -> int:
    """MiB of `tier` that m2c itself names."""
    said = m2c(*words, tier, "1MiB")
    found = re.search(rf"the smallest that works is {tier} (\d+)MiB", said.err)
    assert said.code == 7, said.err
    assert found is not None, said.err
    return int(found[1])


def command_line(way: Way, bundle: Bundle, folder: Path) -> tuple[list[object], int]:
    """What is run, and the bytes that it may take without the constant."""
    own = bundle.path.parent
    options = way.words.replace("BUNDLE", str(bundle.path)).split()
    text = folder / "text.txt"
    prose = calibration_text()
    text.write_text((prose * 2)[:LONG_PROMPT] if way.long else prose)
    known = (way.limit or 0) * MiB - OVERHEAD_NBYTES
    if way.command == "profile":
        return ["profile", "smollm2-135m", "-o", folder / "profile.safetensors", "-q"], known
    if way.command == "pack":
        profile = own / "profile.safetensors"
        return ["pack", "smollm2-135m", "--ssd", folder, "--profile", profile, "-q"], known
    words: list[object] = [way.command, bundle.path, *options]
    if way.command == "run":
        prompt = f"{text.read_text()}\n\n{COUNTING}" if way.long else COUNTING
        words += ["--raw", "-n", TOKENS, "-p", prompt, "--stats", folder / "stats.json"]
    elif way.command == "eval":
        words += ["--text", text]
    if way.limit is not None:
        return words, known
    budget = 0
    planned = words if way.command != "chat" else ["run", *words[1:], "-p", "a", "--plan"]
    for tier, extra in (("--hbm", way.hbm_extra), ("--dram", way.extra)):
        if extra is not None:
            more = ["--dram", "1GiB"] if tier == "--hbm" else []
            size = smallest([*planned, *more], tier) + extra
            words += [tier, f"{size}MiB"]
            planned = [*planned, tier, f"{size}MiB"]
            budget += size * MiB
    return words, budget


@pytest.mark.campaign
def test_no_process_exceeds_what_was_allowed(
    limits: ModuleType, smollm2: Bundle, tmp_path: Path
) -> None:
    for trial in trials("R8-memory", ci=1, campaign=len(WAYS)):
        with trial as number:
            way = WAYS[number]
            folder = tmp_path / str(number)
            folder.mkdir()
            words, budget = command_line(way, smollm2, folder)
            limit = budget + OVERHEAD_NBYTES
            said = folder / "said.txt"
            said.write_text("".join(f"{line}\n" for line in MESSAGES))
            line = ["/bin/sh", "-c", 'exec "$@" < "$0"', said, *COMMAND, *words]
            outcome = limits.run([*map(str, line)], limit=limit, timeout_s=TIMEOUT_S)
            keep_row("R8-memory", row(way, folder, limit, budget, outcome))
            assert outcome.status == "", f"{way.name}: {outcome.status}\n{outcome.errors}"
            # a resident set counts the files it maps, so this holds where others paid for those
            assert outcome.peak_nbytes <= limit, way.name
            require_full_length(way, folder, outcome.output)


def row(way: Way, folder: Path, limit: int, budget: int, outcome) -> dict[str, object]:  # type: ignore[no-untyped-def]
    stats = folder / "stats.json"
    figures = json.loads(stats.read_text()) if stats.exists() else {}
    return {
        "command": way.command, "way": way.name, "options": way.words,
        "budget_mib": budget // MiB, "limit_mib": limit // MiB,
        "charged_peak_mib": outcome.charged_nbytes // MiB,
        "resident_peak_mib": outcome.peak_nbytes // MiB,
        "prompt_tokens": figures.get("prompt_tokens"),
        "generated_tokens": figures.get("generated_tokens"),
        "tokens_per_second": round(figures.get("decode_tps", 0), 1) or None,
        "seconds": round(outcome.seconds, 1), "result": outcome.status or "ok",
    }  # fmt: skip


def require_full_length(way: Way, folder: Path, output: str) -> None:
    """It did what it was for: the context filled, the tokens said, every message answered."""
    assert output.strip()
    if way.command == "run":
        figures = json.loads((folder / "stats.json").read_text())
        assert figures["generated_tokens"] == TOKENS
        assert figures["prompt_tokens"] > (5000 if way.long else 5)
    elif way.command == "chat":
        assert len(output.splitlines()) >= len(MESSAGES)


def test_the_limit_would_have_ended_it(limits: ModuleType) -> None:
    """The kernel's end of a process is seen, and pages of files do not bring it about."""
    grab = "import sys; data = bytearray(int(sys.argv[1]) << 20); print(len(data))"
    assert limits.run([sys.executable, "-c", grab, "100"], limit=60 * MiB).status == "out of memory"
    fits = limits.run([sys.executable, "-c", grab, "20"], limit=60 * MiB)
    assert fits.status == ""
    assert 20 * MiB < fits.charged_nbytes <= 60 * MiB


def test_pages_of_files_are_counted_and_given_back(limits: ModuleType, tmp_path: Path) -> None:
    copy = "import sys; open(sys.argv[1], 'wb').writelines(bytes(1 << 20) for _ in range(150))"
    outcome = limits.run([sys.executable, "-c", copy, str(tmp_path / "file")], limit=60 * MiB)
    assert outcome.status == ""
    assert outcome.charged_nbytes > 50 * MiB
