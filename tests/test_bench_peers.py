"""scripts/bench_peers.py: its arithmetic, what it reads and prints, and one run of everything."""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from m2c.bundle.bundle import Bundle

SCRIPTS = Path(__file__).parents[1] / "scripts"
MiB = 1 << 20
FAKE = """#!{python}
import json, sys
words = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + chr(10))
value = dict(zip(words[::2], words[1::2]))
tokens = int(value["-n"]) or int(value["-p"])
print(json.dumps([dict(samples_ts=[tokens * 2.0], samples_ns=[500000000])]))
"""


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The script; its helpers are `bench.peers` and `bench.limits`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("bench_peers")


@pytest.fixture(scope="module")
def peers(bench: ModuleType) -> ModuleType:
    return sys.modules["peers"]


@pytest.fixture(scope="module")
def limits(bench: ModuleType) -> ModuleType:
    return sys.modules["limits"]


def test_a_limit_is_a_share_of_the_weights_and_all_of_the_rest(peers: ModuleType) -> None:
    needs = peers.Needs(weights=1000, fixed=30)
    assert [needs.total(fraction) for fraction in (None, 1.0, 0.5, 0.25)] == [1030, 1030, 530, 280]
    assert [needs.missing(total) for total in (2000, 1030, 530, 280, 10)] == [0, 0, 500, 750, 1000]


def test_what_m2c_needs_comes_from_its_plan(peers: ModuleType) -> None:
    plan = {"compute_nbytes_per_token": 700, "dram_used": 1000, "kv_nbytes": 50}
    assert peers.m2c_needs(plan) == peers.Needs(700, 300 + 400 * MiB)


def test_fractions_are_read(bench: ModuleType) -> None:
    assert bench.parse_fractions("fits,0.5,1") == [None, 0.5, 1.0]


@pytest.mark.parametrize("text", ["half", "0", "1.5", "-0.5", "nan", "", "fits,"])
def test_odd_fractions_are_refused(bench: ModuleType, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        bench.parse_fractions(text)


def test_reads_are_counted_from_the_end(limits: ModuleType) -> None:
    reads = ((0.0, 100), (1.0, 200), (2.0, 700), (3.0, 1000))
    outcome = limits.Outcome("", 3.0, "", "", 0, reads)
    assert outcome.read_in_last(1.0) == 300
    assert outcome.read_in_last(1.5) == 800
    assert outcome.read_in_last(9.0) == 1000
    assert limits.Outcome("", 0.0, "", "", 0, ()).read_in_last(1.0) == 0


def llama_outcome(limits: ModuleType, output: str) -> Any:
    return limits.Outcome("", 5.0, output, "", 7, ((0.0, 0), (1.0, 400), (5.0, 4400)))


def test_llama_bench_is_understood(peers: ModuleType, limits: ModuleType) -> None:
    record = {"n_gen": 8, "samples_ts": [2.0], "samples_ns": [4_000_000_000], "avg_ts": 2.0}
    outcome = llama_outcome(limits, json.dumps([record]))
    assert peers.llama_result(outcome, peers.Workload("decode", 8)) == peers.Result(2.0, 500.0, 7)


@pytest.mark.parametrize(
    "output", ["", "[]", "{}", "[{}]", '[{"samples_ts": [1], "samples_ns": []}]', "[1]"]
)
def test_odd_answers_of_llama_bench_are_failures(
    peers: ModuleType, limits: ModuleType, output: str
) -> None:
    result = peers.llama_result(llama_outcome(limits, output), peers.Workload("decode", 8))
    assert result.failure
    assert not result.value


def test_figures_of_m2c_are_understood(peers: ModuleType) -> None:
    stats = {
        "decode_tps": 3.5, "prefill_tps": 90.0, "ssd_nbytes_per_token": 2e8, "generated_tokens": 9,
    }  # fmt: skip
    decode, prefill = peers.Workload("decode", 8), peers.Workload("prefill", 64)
    assert peers.m2c_result(stats, decode, 7) == peers.Result(3.5, 2e8, 7)
    assert peers.m2c_result(stats, prefill, 7) == peers.Result(90.0, 0.0, 7)
    ended = stats | {"decode_tps": 0.0, "generated_tokens": 1}
    assert "1 token" in peers.m2c_result(ended, decode, 7).failure


class Scripted:
    """A program whose speeds are known: stands for M2C and Llama."""

    def __init__(self, name: str, needs: Any, results: list[Any], order: list[str]) -> None:
        self.name, self.needs, self.files = name, needs, []  # type: ignore[var-annotated]
        self.totals: list[int | None] = []
        self._results, self._order = iter(results), order

    def run(self, work: Any, total: int | None) -> Any:
        self._order.append(self.name)
        self.totals.append(total)
        return next(self._results)


def pair(peers: ModuleType, ours: list[Any], theirs: list[Any], order: list[str]) -> list[Scripted]:
    return [
        Scripted("m2c", peers.Needs(1000 * MiB, 500 * MiB), ours, order),
        Scripted("llama.cpp", peers.Needs(1200 * MiB, 100 * MiB), theirs, order),
    ]


@pytest.fixture
def slow_disk(limits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "disk_bandwidth", lambda files, seed: 1e9)


@pytest.mark.usefixtures("slow_disk")
def test_programs_take_turns_and_rows_have_medians(bench: ModuleType, peers: ModuleType) -> None:
    ours = [peers.Result(v, 5e8) for v in (1.5, 1.0, 2.0)]
    theirs = [peers.Result(v, 1e9) for v in (0.5, 0.6, 0.4)]
    order: list[str] = []
    programs = pair(peers, ours, theirs, order)
    work = peers.Workload("decode", 8)
    rows = list(bench.measure(programs, work, 0.5, repeats=3, same_total=False))
    assert order == ["m2c", "llama.cpp"] * 3
    assert programs[0].totals == [1000 * MiB] * 3
    assert programs[1].totals == [700 * MiB] * 3
    assert rows == [
        # 500 MiB are missing: at 1 GB/s no more than 1.907 tokens per second
        "| decode 8 | 50% | m2c | limit 1000 MiB | 1.5 tok/s (1-2) | 500 MB | 0.75 GB/s | 79% "
        "| 3.00 |",
        "| decode 8 | 50% | llama.cpp | limit 700 MiB | 0.5 tok/s (0.4-0.6) | 1000 MB | 0.50 GB/s "
        "| 31% |  |",
    ]
    columns = bench.HEADER.splitlines()[0].count("|")
    assert [row.count("|") for row in rows] == [columns, columns]


@pytest.mark.usefixtures("slow_disk")
def test_the_roof_is_not_below_what_was_reached(bench: ModuleType, peers: ModuleType) -> None:
    ours = [peers.Result(3.0, 1e9), peers.Result(0.5, 1e9)]
    programs = pair(peers, ours, [peers.Result(1.0)] * 2, [])
    found, _ = bench.take_turns(programs, peers.Workload("decode", 8), [None, None], 2)
    assert [result.disk for result in found] == [3e9, 1e9]
    assert bench.row(found[:1], peers.Workload("decode", 8), 10**9)[-1] == "100%"


@pytest.mark.usefixtures("slow_disk")
def test_the_same_total_is_the_larger_one(bench: ModuleType, peers: ModuleType) -> None:
    one = [peers.Result(1.0)]
    programs = pair(peers, one, one, [])
    work = peers.Workload("prefill", 8)
    rows = list(bench.measure(programs, work, 0.5, repeats=1, same_total=True))
    assert programs[0].totals == programs[1].totals == [1000 * MiB]
    assert all("limit 1000 MiB" in row for row in rows)


@pytest.mark.usefixtures("slow_disk")
def test_a_failure_is_named_and_gives_no_ratio(bench: ModuleType, peers: ModuleType) -> None:
    ours = [peers.Result(1.0, 0.0, 3 * MiB)] * 2
    theirs = [peers.Result(1.0), peers.Result(failure="out of memory")]
    programs = pair(peers, ours, theirs, [])
    work = peers.Workload("decode", 8)
    rows = list(bench.measure(programs, work, None, repeats=2, same_total=False))
    assert programs[0].totals == [None, None]
    assert rows[0].startswith("| decode 8 | all | m2c | peak 3 MiB | 1 tok/s (1-1) |")
    assert rows[0].endswith("|  |")
    assert "| out of memory |" in rows[1]


def test_seconds_are_compared_the_other_way_round(bench: ModuleType, peers: ModuleType) -> None:
    ours, theirs = [peers.Result(4.0)], [peers.Result(2.0)]
    assert bench.speed_ratio(peers.Workload("cold", 1), [ours, theirs]) == "0.50"
    assert bench.speed_ratio(peers.Workload("prefill", 9), [ours, theirs]) == "2.00"
    assert bench.speed_ratio(peers.Workload("prefill", 9), [ours]) == ""


def test_a_command_is_watched(limits: ModuleType, tmp_path: Path) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    outcome = limits.run([sys.executable, "-c", code])
    assert (outcome.status, outcome.output, outcome.errors) == ("exit 3", "out\n", "err\n")
    assert 0 < outcome.peak_nbytes < 1 << 30
    assert limits.run(["sleep", "60"], timeout_s=0.1).status == "timeout"


def test_a_disk_is_probed(limits: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(3 * limits.REQUEST + 5))
    (tmp_path / "small").write_bytes(b"x")
    limits.evict(limits.files_below(tmp_path))
    assert limits.disk_bandwidth(limits.files_below(tmp_path)) > 0
    assert limits.disk_bandwidth([tmp_path / "small"]) == 0


def test_everything_once(
    bench: ModuleType, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fake, log, gguf = (tmp_path / name for name in ("llama-bench", "log", "a.gguf"))
    fake.write_text(FAKE.format(python=sys.executable, log=str(log)))
    fake.chmod(0o755)
    gguf.write_bytes(bytes(5000))
    words = ["--gguf", str(gguf), "--llama-bench", str(fake), "--threads", "1", "--prefill", "16"]
    out = tmp_path / "table.md"
    words += ["--bundle", str(tiny_bundle.path), "--repeats", "1", "--tokens", "4", "--cold"]
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", *words, "--out", str(out)])
    # a root's tests make no memory groups either
    monkeypatch.setattr(sys.modules["limits"], "can_limit", lambda: False)
    bench.main()
    printed = capsys.readouterr()
    assert "need root" in printed.err
    assert out.read_text() == printed.out
    rows = [line.split(" | ") for line in printed.out.splitlines() if line.startswith("| ")][1:]
    tests = [(row[0], row[1], row[2]) for row in rows]
    kinds = ("| decode 4", "| prefill 16", "| cold 1")
    assert tests == [(kind, "all", name) for kind in kinds for name in ("m2c", "llama.cpp")]
    assert rows[1][4] == "8 tok/s (8-8)"
    assert rows[3][4] == "32 tok/s (32-32)"
    assert all(float(row[-1].rstrip(" |")) > 0 for row in rows[::2])
    asked = [json.loads(line)[2:] for line in log.read_text().splitlines()]
    common = ["-t", "1", "-r", "1", "-o", "json"]
    assert asked == [
        [*common, "-p", "0", "-n", "4"],
        [*common, "-p", "16", "-n", "0"],
        [*common, "-p", "0", "-n", "1", "--no-warmup"],
    ]


def test_without_llama_bench_m2c_is_alone(
    bench: ModuleType, peers: ModuleType, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["--bundle", str(tiny_bundle.path), "--llama-bench", "no-such-program"]
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", *words])
    given = bench.parse_arguments()
    found = bench.find_bench(given)
    (alone,) = bench.programs_for(given, peers.Workload("decode", 4), found)
    assert alone.name == "m2c"
    assert "no-such-program was not found: build llama.cpp" in capsys.readouterr().err
