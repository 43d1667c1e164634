"""Energy: counters that wrap, vanish, lie or are closed; what is measured, estimated or absent.

Fake trees of sysfs and a fake NVML stand in for machines that have counters.
"""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from command_line import m2c
from running import smallest_dram

from m2c.bundle.bundle import Bundle
from m2c.energy import carbon
from m2c.energy.account import Grid, Phase, account, energy_line, is_measured
from m2c.energy.meter import SSD_W, Lap, Meter
from m2c.energy.nvml import GpuCounter, GpuPower, gpu_source
from m2c.energy.rapl import Rapl, rapl_sources
from m2c.energy.sources import Absent, Lost
from m2c.energy.ways import WAYS, options_for
from m2c.engine import Engine, RunOptions
from m2c.generate import token_steps
from m2c.sampling import Sampler, SamplingParams
from m2c.tiers.ssd import LinkStats

RANGE_UJ = 262_143_328_850
Zones = dict[str, tuple[str, int]]  # folder to name and microjoules


def powercap(root: Path, zones: Zones) -> Path:
    for folder, (name, value) in zones.items():
        zone = root / folder
        zone.mkdir(parents=True)
        (zone / "name").write_text(f"{name}\n")
        (zone / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
        set_uj(root, folder, value)
    return root


def set_uj(root: Path, folder: str, value: int) -> None:
    (root / folder / "energy_uj").write_text(f"{value}\n")


def sources(root: Path) -> dict[str, Any]:
    found = rapl_sources(root)
    return {part.component: part for part in found}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# -- RAPL ------------------------------------------------------------------------------------------


def test_packages_and_dram_are_added_and_what_lies_within_them_is_not(tmp_path: Path) -> None:
    root = powercap(tmp_path, {
        "intel-rapl:0": ("package-0", 10), "intel-rapl:0:0": ("core", 20),
        "intel-rapl:0:1": ("dram", 30), "intel-rapl:1": ("package-1", 40),
        "intel-rapl:1:0": ("dram", 50), "intel-rapl:2": ("psys", 60),
        "intel-rapl-mmio:0": ("package-0", 70), "intel-rapl-mmio:0:0": ("dram", 80),
    })  # fmt: skip
    (root / "intel-rapl").mkdir()  # the control type itself
    found = sources(root)
    for folder in ("intel-rapl:0", "intel-rapl:1"):
        set_uj(root, folder, 3_000_040)
    for folder in ("intel-rapl:0:1", "intel-rapl:1:0"):
        set_uj(root, folder, 1_000_050)
    for other in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0", "intel-rapl-mmio:0:0"):
        set_uj(root, other, 9_000_000)
    assert found["cpu"].joules() == pytest.approx(6.00003)
    assert found["dram"].joules() == pytest.approx(2.00002)
    assert found["cpu"].how == "RAPL counters: package-0, package-1"
    assert found["dram"].counters() == {
        "package-0 dram uJ": 1_000_050,
        "package-1 dram uJ": 1_000_050,
    }


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    root = powercap(tmp_path, {"intel-rapl:0": ("package-0", RANGE_UJ - 1_000_000)})
    cpu = sources(root)["cpu"]
    set_uj(root, "intel-rapl:0", 2_000_000)
    assert cpu.joules() == pytest.approx(3.0)
    set_uj(root, "intel-rapl:0", 2_500_000)
    assert cpu.joules() == pytest.approx(3.5)


def test_a_counter_that_was_reset_is_not_taken_for_a_wrap(tmp_path: Path) -> None:
    root = powercap(tmp_path, {"intel-rapl:0": ("package-0", 60_000_000_000)})
    clock = Clock()
    cpu = Rapl("cpu", {"package-0": root / "intel-rapl:0"}, clock)
    set_uj(root, "intel-rapl:0", 1000)
    clock.now += 2
    with pytest.raises(Lost, match="was reset"):
        cpu.joules()


@pytest.mark.parametrize("damage", [
    lambda file: file.unlink(), lambda file: file.write_text("none\n"),
    lambda file: file.write_text(""), lambda file: file.write_text("-5"),
])  # fmt: skip
def test_a_counter_that_vanishes_is_lost(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    root = powercap(tmp_path, {"intel-rapl:0": ("package-0", 5), "intel-rapl:1": ("package-1", 5)})
    cpu = sources(root)["cpu"]
    damage(root / "intel-rapl:1" / "energy_uj")
    with pytest.raises(Lost):
        cpu.joules()


def test_counters_for_root_only_say_how_to_allow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = powercap(tmp_path, {"intel-rapl:0": ("package-0", 5), "intel-rapl:0:0": ("dram", 5)})
    read = Path.read_text

    def refused(path: Path, *args: Any, **options: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", refused)
    for component, zone in (("cpu", "intel-rapl:0"), ("dram", "intel-rapl:0:0")):
        absent = sources(root)[component]
        assert absent == Absent(
            component, f"{root}/{zone}/energy_uj may be read by root only",
            f"allow it until the next boot: sudo chmod a+r {root}/intel-rapl*/energy_uj",
        )  # fmt: skip


def test_machines_without_counters(tmp_path: Path) -> None:
    assert "a virtual machine?" in sources(tmp_path / "none")["cpu"].why
    assert "no RAPL counter of the DRAM" in sources(tmp_path)["dram"].why
    root = powercap(tmp_path / "odd", {"intel-rapl:0": ("package-0", 5)})
    (root / "intel-rapl:0" / "max_energy_range_uj").write_text("0")
    assert "max_energy_range_uj says 0" in sources(root)["cpu"].why


# -- NVML ------------------------------------------------------------------------------------------


class FakeNvml:
    """The module's functions that are used; cards with or without a counter."""

    class NVMLError(Exception):
        pass

    def __init__(self, counter: bool = True, power: bool = True, cards: int = 2) -> None:
        self.cards, self.counter, self.power = cards, counter, power
        self.millijoules, self.milliwatts = [5000, 7000], [40_000, 60_000]

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.cards

    def nvmlDeviceGetHandleByIndex(self, i: int) -> int:  # noqa: N802
        return i

    def nvmlDeviceGetName(self, card: int) -> Any:  # noqa: N802
        return b"Tesla M40" if card else "Tesla V100"

    def nvmlDeviceGetTotalEnergyConsumption(self, card: int) -> int:  # noqa: N802
        if not self.counter:
            raise self.NVMLError("Not Supported")
        return self.millijoules[card]

    def nvmlDeviceGetPowerUsage(self, card: int) -> int:  # noqa: N802
        if not self.power:
            raise self.NVMLError("Not Supported")
        return self.milliwatts[card]


def test_gpus_are_counted_where_they_count() -> None:
    nvml = FakeNvml()
    gpu = gpu_source(nvml)
    assert isinstance(gpu, GpuCounter)
    nvml.millijoules = [6500, 7250]
    assert gpu.joules() == pytest.approx(1.75)
    assert gpu.counters() == {"GPU 0 Tesla V100 mJ": 6500, "GPU 1 Tesla M40 mJ": 7250}
    nvml.millijoules = [1, 7250]
    with pytest.raises(Lost, match="loaded anew"):
        gpu.joules()


def test_cards_without_a_counter_are_sampled() -> None:
    nvml, clock = FakeNvml(counter=False), Clock()
    assert isinstance(gpu_source(nvml), GpuPower)
    gpu = GpuPower(nvml, {"a": 0, "b": 1}, clock)
    clock.now += 2
    nvml.milliwatts = [50_000, 150_000]
    assert gpu.joules() == pytest.approx(2 * (100 + 200) / 2)
    clock.now += 1
    assert gpu.joules() == pytest.approx(300 + 200)
    assert gpu.period_s <= 0.1


def test_gpus_that_cannot_be_read_are_absent(tmp_path: Path) -> None:
    neither = gpu_source(FakeNvml(counter=False, power=False))
    assert isinstance(neither, Absent)
    assert "Not Supported" in neither.why
    assert gpu_source(FakeNvml(cards=0)) == Absent("gpu", "NVML sees no GPU")
    nvml = FakeNvml()
    nvml.nvmlInit = lambda: (_ for _ in ()).throw(nvml.NVMLError("Driver Not Loaded"))  # type: ignore[method-assign]
    assert gpu_source(nvml) == Absent("gpu", "NVML: Driver Not Loaded")
    assert gpu_source(None, tmp_path / "none") == Absent("gpu", "no NVIDIA driver on this system")


# -- the meter -------------------------------------------------------------------------------------


class Steady:
    """Ten joules a reading."""

    period_s = 60.0
    how = "counted by hand"

    def __init__(self, component: str, lost_at: int = 1 << 30) -> None:
        self.component, self.count, self.lost_at = component, 0, lost_at

    def joules(self) -> float:
        self.count += 1
        if self.count >= self.lost_at:
            raise Lost("it went away")
        return 10.0 * self.count

    def counters(self) -> dict[str, int]:
        return {f"{self.component} reads": self.count}


def test_laps_are_differences() -> None:
    with Meter([Steady("cpu"), Absent("gpu", "none here")]) as meter:
        idle = meter.idle(0.0)
        lap = meter.lap("prefill")
    assert idle.name == "idle"
    assert lap.joules == idle.joules == {"cpu": 10.0}
    assert (lap.start, lap.end) == ({"cpu reads": 3}, {"cpu reads": 4})
    assert meter.absent["gpu"].why == "none here"


def test_a_source_that_is_lost_makes_its_component_absent_from_then_on() -> None:
    with Meter([Steady("cpu"), Steady("dram", lost_at=3)]) as meter:
        first, second, third = (meter.lap(name) for name in "abc")
    assert set(first.joules) == {"cpu", "dram"}
    assert set(second.joules) == set(third.joules) == {"cpu"}
    assert meter.absent["dram"].why == "it went away"


def test_a_thread_reads_between_laps(tmp_path: Path) -> None:
    source = Steady("gpu")
    source.period_s = 0.001
    with Meter([source]) as meter:
        while source.count < 5:
            assert not meter._closed.wait(0.001)
    assert not meter._thread.is_alive()


# -- the account -----------------------------------------------------------------------------------


def lap(name: str, seconds: float, **joules: float) -> Lap:
    return Lap(name, seconds, joules, {}, {})


def facts_of(meter: Meter, *laps: Lap, grid: Grid | None = None) -> dict[str, Any]:
    read = LinkStats(2_000_000_000, 1.0)
    phases = [Phase(found, 10 * (i + 1), read) for i, found in enumerate(laps)]
    parts = [carbon.Part("box", 1e6, "a test")]
    return account(meter, lap("idle", 1.0, cpu=12.0), phases, grid or Grid(360.0, "test"), parts)


def test_the_account_of_a_run() -> None:
    meter = Meter([Steady("cpu"), Absent("dram", "closed", "open it"), Absent("gpu", "none")])
    facts = facts_of(meter, lap("prefill", 2.0, cpu=94.5), lap("decode", 4.0, cpu=354.5))
    states = {name: part["state"] for name, part in facts["components"].items()}
    assert states == {"cpu": "measured", "dram": "absent", "gpu": "absent", "ssd": "estimated"}
    prefill, decode = facts["phases"]["prefill"], facts["phases"]["decode"]
    assert prefill["joules"] == {"cpu": 94.5, "ssd": SSD_W}
    assert prefill["j_per_token"] == pytest.approx(10.0)
    assert decode["total_j"] == pytest.approx(360.0)
    assert decode["j_per_token"] == pytest.approx(18.0)
    assert decode["wh_per_1k"] == pytest.approx(5.0)
    assert decode["watts"] == pytest.approx(90.0)
    assert decode["operational_g_per_1k"] == pytest.approx(1.8)
    embodied = 1e6 * 4.0 / (5 * carbon.YEAR_S) / 20 * 1000
    assert decode["embodied_g_per_1k"] == pytest.approx(embodied)
    assert decode["sci_g_per_1k"] == pytest.approx(1.8 + embodied)
    line = energy_line(facts)
    assert "decode 18 J/token (90 W), per 1000 tokens 5 Wh and 1.8 + " in line
    assert "at 360 g/kWh (test)" in line
    assert "measured CPU; estimated SSD; absent DRAM (closed; open it); absent GPU (none)" in line
    assert "\n" not in line
    json.dumps(facts, allow_nan=False)


def test_where_nothing_is_measured_there_is_no_total() -> None:
    meter = Meter([Absent(name, "none") for name in ("cpu", "dram", "gpu")])
    facts = facts_of(meter, lap("prefill", 2.0), lap("decode", 4.0))
    assert not is_measured(facts)
    for phase in facts["phases"].values():
        assert phase["total_j"] is phase["j_per_token"] is phase["operational_g_per_1k"] is None
        assert phase["joules"] == {"ssd": SSD_W}
    line = energy_line(facts)
    assert line.startswith("energy: not measured, SSD about 11 J in all (estimated)")
    assert "J/token" not in line
    assert "absent CPU, DRAM, GPU (none)" in line


def test_a_component_lost_on_the_way_is_absent_in_the_account() -> None:
    with Meter([Steady("cpu"), Steady("dram", lost_at=3)]) as meter:
        laps = [meter.lap("prefill"), meter.lap("decode")]
    facts = facts_of(meter, *laps)
    assert facts["components"]["dram"] == {"state": "absent", "how": "it went away", "hint": ""}
    for phase in facts["phases"].values():
        assert "dram" not in phase["joules"]


def test_formulas() -> None:
    """The SCI specification's own example, a tonne used for an hour, over five years for four."""
    assert carbon.embodied_g(1e6, 3600) == pytest.approx(28.5 * 4 / 5, abs=0.05)
    assert carbon.wh_per_1k(600) == pytest.approx(166.7, abs=0.05)
    assert carbon.operational_g(600 * 1000, 475) == pytest.approx(79.2, abs=0.05)
    assert [part.name for part in carbon.parts_of(64 * 10**9, 10**12, 0)] == ["DRAM", "SSD"]
    dram, ssd, gpu = carbon.parts_of(64 * 10**9, 10**12, 2)
    assert (dram.grams, ssd.grams, gpu.grams) == pytest.approx((4160, 6300, 286e3))


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a counter of its processor."""
    found = [Steady("cpu"), Absent("dram", "none")]
    monkeypatch.setattr("m2c.energy.meter.rapl_sources", lambda: found)
    monkeypatch.setattr("m2c.energy.meter.gpu_source", lambda: Absent("gpu", "none"))
    monkeypatch.setattr("m2c.cli.report.IDLE_S", 0.0)
    monkeypatch.setattr("m2c.cli.bench_energy.IDLE_S", 0.0)


@pytest.mark.usefixtures("counted")
def test_run_says_one_line_and_writes_the_same(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "energy.json"
    said = m2c(
        "run", bundle, "-p", "x", "-n", 4, "--energy", "--grid-intensity", 50, "--report", path
    )
    assert said.code == 0, said.err
    (line,) = [line for line in said.err.splitlines() if line.startswith("m2c: energy:")]
    assert "at 50 g/kWh (as given)" in line
    assert "measured CPU; estimated SSD; absent DRAM, GPU (none)" in line
    facts = json.loads(path.read_bytes())["energy"]
    assert facts["grid"] == {"g_per_kwh": 50.0, "source": "as given"}
    assert facts["phases"]["decode"]["tokens"] == 3
    assert facts["phases"]["decode"]["joules"]["cpu"] == 10.0
    assert [part["name"] for part in facts["embodied"]["parts"]] == ["DRAM", "SSD"]


def test_without_energy_no_counter_is_opened(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2c.energy.meter.rapl_sources", lambda: pytest.fail("opened"))
    path = tmp_path / "run.json"
    assert m2c("run", bundle, "-p", "x", "-n", 2, "--report", path).code == 0
    assert json.loads(path.read_bytes())["energy"] is None
    said = m2c("run", bundle, "-p", "x", "--grid-intensity", 50)
    assert (said.code, said.reason) == (2, "--grid-intensity is for carbon figures; add --energy")


def test_the_tokens_are_the_same_with_and_without(bundle: Path, tmp_path: Path) -> None:
    plain = m2c("run", bundle, "-p", "x", "-n", 8, "--mode", "exact").out
    watched = m2c("run", bundle, "-p", "x", "-n", 8, "--mode", "exact", "--energy", "--report",
                  tmp_path / "r.html")  # fmt: skip
    assert (watched.code, watched.out) == (0, plain)


@pytest.mark.usefixtures("counted")
def test_bench_compares_three_ways(bundle: Path) -> None:
    said = m2c("bench", bundle, "-p", 5, "-n", 4, "-r", 2, "--energy", "-o", "json", "-t", 1)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert list(found) == sorted(WAYS)
    for facts in found.values():
        decode = facts["energy"]["phases"]["decode"]
        assert (decode["tokens"], facts["energy"]["phases"]["prefill"]["tokens"]) == (6, 10)
        assert decode["joules"]["cpu"] == 20.0
    assert found["streaming"]["mix"] == found["exact"]["mix"] == "100/0/0"
    assert "measured CPU; estimated SSD; absent DRAM, GPU (none)" in said.err
    assert "idle before" in said.err


@pytest.mark.usefixtures("counted")
def test_the_comparison_is_a_table(bundle: Path) -> None:
    said = m2c("bench", bundle, "-p", 5, "-n", 4, "-r", 1, "--energy", "-q")
    header, rule, *rows = said.out.splitlines()
    assert said.code == 0
    assert said.reason.startswith(
        "energy: measured CPU; estimated SSD; absent DRAM, GPU (none); at"
    )
    assert [row.split("|")[1].strip() for row in rows] == list(WAYS)
    assert len({len(line) for line in (header, rule, *rows)}) == 1


def test_every_way_decodes_as_many_tokens_of_its_own_model(deep_bundle: Bundle) -> None:
    """Streaming keeps nothing, and its tokens are those of exact mode."""
    ids = {}
    for way in ("exact", "streaming"):
        options = options_for(deep_bundle, way, RunOptions(ctx_size=32, threads=1))
        with Engine(deep_bundle, options) as engine:
            steps, _ = token_steps(engine, [5, 17, 99], Sampler(SamplingParams()), 8)
            ids[way] = list(islice(steps, 8))
            if way == "streaming":
                assert not engine.plan.in_dram
                assert engine.plan.ssd_nbytes_per_token > 0
    assert ids["exact"] == ids["streaming"]


def test_streaming_has_the_least_memory_there_is_a_plan_for(deep_bundle: Bundle) -> None:
    options = options_for(deep_bundle, "streaming", RunOptions(ctx_size=32, threads=1))
    assert options.dram == smallest_dram(deep_bundle, options)


@pytest.mark.parametrize("words", [("-p", 0), ("-n", 1), ("-d", 3)])
def test_a_comparison_needs_text(bundle: Path, words: tuple[object, ...]) -> None:
    said = m2c("bench", bundle, "--energy", *words)
    assert said.code == 2
    assert said.reason.startswith("--energy decodes text after a prompt")
