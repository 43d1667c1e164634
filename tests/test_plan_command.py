"""`m2c plan`: what lies where adds up and is drawn, modes are compared, speeds say where they are
from."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest
from command_line import COMMAND, m2c, m2c_ok
from running import MIXES, options_for, smallest_dram

from m2c import disk
from m2c.bundle.bundle import Bundle
from m2c.cli.bars import Tier, bar, lines_of
from m2c.disk import DiskProfile, device_of, remember
from m2c.engine import RunOptions, plan_without_weights
from m2c.errors import DoesNotFit
from m2c.model.aliases import ALIASES
from m2c.modes import exact_options
from m2c.tiers.parts import dram_parts, hbm_parts
from m2c.units import GiB, MiB

PARTS = {"attention": 20, "FFN": 50, "KV cache": 10}


# -- what lies where -------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["smollm2-135m", "llama2-7b", "llama2-70b"])
@pytest.mark.parametrize("hbm", [None, GiB, 12 * GiB])
@pytest.mark.parametrize("dram", [GiB, 4 * GiB, 60 * GiB])
@pytest.mark.parametrize("exact", [False, True])
def test_the_parts_of_a_tier_add_up(alias: str, hbm: int | None, dram: int, exact: bool) -> None:
    options = RunOptions(dram=dram, hbm=hbm, threads=2)
    if exact and hbm:
        return
    try:
        _, plan = plan_without_weights(
            ALIASES[alias].config(), exact_options(options) if exact else options
        )
    except DoesNotFit as error:
        given = hbm if "--hbm" in error.message and hbm else dram
        if error.smallest <= given:
            pytest.fail(f"{given} bytes would do")
        return
    assert sum(dram_parts(plan).values()) == plan.used_dram <= dram
    assert sum(hbm_parts(plan).values()) == plan.used_hbm <= (hbm or 0)


# -- bars ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 20, 80, 100])
def test_a_bar_is_as_wide_as_asked(width: int) -> None:
    assert len(bar(PARTS, 100, width)) == width
    assert len(bar({}, 100, width)) == width
    assert len(bar(PARTS, 10, width)) == width  # more than there is room for


def test_a_bar_shows_shares() -> None:
    assert bar(PARTS, 100, 20) == "AAAAFFFFFFFFFFKK...."
    assert bar(PARTS, 80, 8) == "AAFFFFFK"
    assert bar({}, 0, 4) == "...."


def test_what_is_small_is_still_drawn() -> None:
    assert bar({"attention": 1, "FFN": 10**9, "work": 1}, 10**9 + 2, 10) == "AFFFFFFFFW"


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_tier_is_drawn_within_the_width(width: int) -> None:
    tier = Tier("DRAM", {kind: n * GiB for kind, n in PARTS.items()}, 100 * GiB, "free")
    head, drawn, *legend = lines_of(tier, width)
    assert head == "DRAM  80.00 GiB of 100.00 GiB"
    assert len(drawn) == width
    assert max(map(len, legend)) <= width
    words = "A attention 20.00 GiB, F FFN 50.00 GiB, K KV cache 10.00 GiB, . free 20.00 GiB"
    assert " ".join(legend) == words


def on_a_terminal(*words: str) -> str:
    """What a terminal of 80 columns shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color"}
    child = subprocess.Popen([*COMMAND, *words], stdout=theirs, stdin=subprocess.DEVNULL, env=env)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how the end of a terminal reads
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    assert child.wait(60) == 0
    return shown.decode()


def test_bars_are_for_terminals() -> None:
    words = ("plan", "llama2-7b", "--dram", "16GiB", "--mode", "mixed")
    assert "AAAA" not in m2c_ok(*words)
    plain = re.sub(r"\x1b\[[\d;]*m", "", on_a_terminal(*words))
    assert re.search(r"^A+F+H+U+E+K+W+\.+\r?$", plain, re.MULTILINE)
    assert "not read while decoding" in plain


@pytest.mark.parametrize(("dram", "held"), [("16GiB", "embeddings"), ("80MiB", "nothing")])
def test_embeddings_alone_in_dram_are_not_nothing(dram: str, held: str) -> None:
    size = ["--hbm", "24GiB", "--dram", dram, "--mix", "0/100/0"]
    said = m2c_ok("plan", "llama2-7b", "--device", "cuda", *size)
    (line,) = [line for line in said.splitlines() if line.startswith("DRAM  ")]
    assert line.endswith(f": {held}")


@pytest.mark.parametrize("options", [[], ["--exact"], ["--hbm", "24GiB", "--mix", "5/15/80"]])
def test_a_page_keeps_to_80_columns(options: list[str]) -> None:
    said = m2c_ok("plan", "llama2-70b", "--dram", "64GiB", *options)
    assert max(map(len, said.splitlines())) <= 80


# -- modes and speeds ------------------------------------------------------------------------------


def facts(*words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(m2c_ok("plan", *words, "--json"))
    return found


def test_plan_takes_the_mode_that_run_takes(bundle: Path) -> None:
    for words in ([], ["--mode", "mixed"], ["--exact"], ["--mix", "0/0/100"]):
        lines = m2c_ok("run", bundle, "--plan", *words).splitlines()
        planned = m2c_ok("plan", bundle, *words)
        assert lines[0][:40] in planned
    assert facts(bundle)["mode"] == "exact"
    assert facts(bundle, "--mode", "mixed")["mode"] == "mixed"


def test_both_modes_are_predicted(bundle: Path) -> None:
    for subject in (bundle, "llama3.2-1b"):
        assert set(facts(subject, "--dram", "12GiB")["predicted_tps"]) == {"mixed", "exact"}
    assert set(facts(bundle, "--mix", "0/0/100")["predicted_tps"]) == {"mixed"}
    assert facts(bundle, "--hbm", "1GiB")["predicted_tps"] == {}
    words = ("--dram", "6GiB", "--exact", "--dram-speed", "9GB")
    said = " ".join(m2c_ok("plan", "llama2-70b", *words).split())
    assert re.search(r"bound: 0\.02\d* passes/s, by the SSD at 2 GB/s predicted: mixed", said)
    assert "if 30 % of the drafts are right; SSD 2 GB/s assumed, DRAM 9 GB/s given" in said


def test_what_is_dropped_is_planned_without_a_mix_too(bundle: Path) -> None:
    for model in ("llama2-7b", bundle):
        whole, dropped = (
            m2c("plan", model, "--mode", "mixed", *more) for more in ((), ("--drop", 30))
        )
        assert "drop 30" in dropped.out
        assert "drop" not in whole.out
    refused = m2c("plan", "qwen3-30b-a3b", "--drop", 30)
    assert refused.code == 2
    assert "nothing of a mixture of experts can be dropped" in refused.err


def test_what_does_not_fit_is_refused_for_the_mode_asked() -> None:
    said = m2c("plan", "llama2-7b", "--dram", "600MiB", "--exact")
    assert said.code == 7
    assert "the smallest that works is --dram" in said.reason
    mixed = m2c("plan", "llama2-7b", "--dram", "600MiB")
    assert mixed.code == 7


def test_depth_makes_the_ring_larger() -> None:
    few, many = (facts("llama2-70b", "--dram", "4GiB", "--depth", n) for n in (1, 16))
    assert many["ring_nbytes"] > few["ring_nbytes"]


def test_a_gpu_that_is_not_here_can_be_planned_for() -> None:
    planned = facts("llama2-7b", "--device", "cuda", "--hbm", "8GiB", "--dram", "8GiB")
    assert planned["hbm_used"] > 0
    import torch

    if not torch.cuda.is_available():
        said = m2c("plan", "llama2-7b", "--device", "cuda", "--dram", "8GiB")
        assert said.reason == "--device cuda: this torch sees no such GPU; m2c doctor says why"


def test_a_run_on_a_gpu_that_is_not_here_is_refused(bundle: Path) -> None:
    said = m2c("run", bundle, "-p", "x", "-q", "--device", "cuda:99", "--hbm", "1GiB")
    assert said.reason == "--device cuda:99: this torch sees no such GPU; m2c doctor says why"


def test_speeds_say_where_they_are_from(tmp_path: Path) -> None:
    words = ("llama2-70b", "--dram", "4GiB", "--ssd", tmp_path)
    assert facts(*words)["speeds"]["ssd"] == {"bytes_per_s": 2e9, "source": "assumed"}
    assert remember(device_of(tmp_path), DiskProfile(1 << 20, 8, 3e9))
    assert facts(*words)["speeds"]["ssd"] == {"bytes_per_s": 3e9, "source": "remembered"}
    given = facts(*words, "--ssd-speed", "7GB", "--dram-speed", "9GB")["speeds"]
    assert given["ssd"] == {"bytes_per_s": 7e9, "source": "given"}
    assert given["dram"] == {"bytes_per_s": 9e9, "source": "given"}
    assert facts(*words)["speeds"]["dram"]["source"] == "measured"


def test_the_disk_of_a_bundle_is_measured(
    deep_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "probe_disk", lambda _: DiskProfile(1 << 20, 8, 4e9))
    dram = smallest_dram(deep_bundle, options_for(MIXES["0/25/75"], kv_type="f16"))
    dram += 64 * MiB - dram % MiB
    words = ("--mode", "mixed", "-c", 32, "--mix", "0/0/100", "--dram", f"{dram // MiB - 63}MiB")
    found = facts(deep_bundle.path, "-t", 1, *words)
    if found["ssd_nbytes_per_token"]:
        assert found["speeds"]["ssd"] == {"bytes_per_s": 4e9, "source": "measured"}
    assert m2c("plan", "llama2-7b", "--ssd-speed", "0GB").code == 2
