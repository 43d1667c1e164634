"""The disk: reads on demand go first, settings are measured and chosen, and what is remembered."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import m2c, m2c_ok
from running import MIXES, Run, decode, options_for, same, smallest_dram
from shards import write_int4

import m2c.disk as disk
import m2c.tiers.ssd as ssd
from m2c.bundle.bundle import Bundle
from m2c.bundle.shard import BLOCK, PAGE, ShardIndex, read_index
from m2c.disk import DEFAULT, DEPTHS, REQUESTS, SAMPLE_NBYTES, DiskProfile, Places
from m2c.engine import Engine
from m2c.errors import BadInput, StorageError
from m2c.model.mix import Mix
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import SsdReader
from m2c.units import KiB, MiB

LONG = 20.0  # seconds after which a test that hangs fails


@pytest.fixture
def reader() -> Any:
    reader = SsdReader(2, 1)
    yield reader
    reader.close()


@pytest.fixture
def shards(tmp_path: Path) -> tuple[ShardIndex, ShardIndex]:
    """Two of eight blocks and a piece."""
    found = []
    for name in ("a", "b"):
        write_int4(tmp_path / name, 2500)
        found.append(read_index(tmp_path / name))
    assert len(found[0].block_hashes) == 9
    return found[0], found[1]


def watched(monkeypatch: pytest.MonkeyPatch, before: Callable[[Any, int], None]) -> None:
    """Call `before(descriptor, offset)` ahead of every read of the reader."""
    preadv = os.preadv

    def noted(descriptor: int, views: Any, offset: int) -> int:
        before(descriptor, offset)
        return preadv(descriptor, views, offset)

    monkeypatch.setattr(ssd.os, "preadv", noted)


# -- reads on demand -------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [[(0, 1)], [(1, 3)], [(0, 2), (3, 5)], [(0, 1), (2, 3), (4, 9)]])
def test_reads_on_demand_bring_the_bytes(
    shards: tuple[ShardIndex, ShardIndex], runs: list[tuple[int, int]]
) -> None:
    index = shards[0]
    payload = index.path.read_bytes()[PAGE : PAGE + index.header.payload_nbytes]
    expected = b"".join(payload[first * BLOCK : stop * BLOCK] for first, stop in runs)
    for request_blocks in (1, 2, 8):
        reader, into = SsdReader(2, request_blocks), aligned_buffer(8 * BLOCK)
        reader.read_now(index, runs, into)
        assert into[: len(expected)].tobytes() == expected
        assert reader.stats.nbytes == len(expected)
        reader.close()


def test_a_read_on_demand_overtakes_reads_ahead(
    reader: SsdReader, shards: tuple[ShardIndex, ShardIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, wanted = shards
    reader.read_now(ahead, [(0, 1)], aligned_buffer(BLOCK))
    slow, go_on = reader._descriptors[ahead.path][0], threading.Event()

    def stall(descriptor: int, offset: int) -> None:
        if descriptor == slow:
            assert go_on.wait(LONG)

    watched(monkeypatch, stall)
    pending = reader.read_all(ahead, aligned_buffer(ahead.header.payload_nbytes))
    reader.read_now(wanted, [(0, 3)], aligned_buffer(3 * BLOCK))
    assert not any(future.done() for future in pending._futures)
    go_on.set()
    pending.wait()


def test_reads_ahead_hold_back(
    reader: SsdReader, shards: tuple[ShardIndex, ShardIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd, "_COURTESY_S", LONG)
    ahead, wanted = shards
    reader.read_now(wanted, [(0, 1)], aligned_buffer(BLOCK))
    first, begun, go_on = reader._descriptors[wanted.path][0], threading.Event(), threading.Event()
    order = []

    def note(descriptor: int, offset: int) -> None:
        if descriptor == first:
            begun.set()
            assert go_on.wait(LONG)
        order.append(descriptor)

    watched(monkeypatch, note)
    caller = threading.Thread(
        target=reader.read_now, args=(wanted, [(0, 1)], aligned_buffer(BLOCK))
    )
    caller.start()
    assert begun.wait(LONG)
    pending = reader.read_all(ahead, aligned_buffer(ahead.header.payload_nbytes))
    time.sleep(0.05)  # time enough to start, were it not for the read on demand
    go_on.set()
    pending.wait()
    caller.join(LONG)
    assert order[0] == first
    assert len(order) == 1 + len(pending._futures)


def test_reads_ahead_do_not_hold_back_for_ever(
    reader: SsdReader, shards: tuple[ShardIndex, ShardIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a caller had been interrupted before it could say that it was done."""
    monkeypatch.setattr(ssd, "_COURTESY_S", 0.001)
    reader._on_demand = 1
    reader.read_all(shards[0], aligned_buffer(shards[0].header.payload_nbytes)).wait()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "bad sector"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [0, 3])
def test_nothing_is_under_way_after_a_failure(
    reader: SsdReader, shards: tuple[ShardIndex, ShardIndex], monkeypatch: pytest.MonkeyPatch,
    error: BaseException, failing: int,
) -> None:  # fmt: skip
    bad = PAGE + failing * BLOCK

    def fail(descriptor: int, offset: int) -> None:
        if offset == bad:
            raise error
        time.sleep(0.02)  # so that others are at work when it fails

    watched(monkeypatch, fail)
    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        reader.read_now(shards[0], [(0, 4)], aligned_buffer(4 * BLOCK))
    assert reader._under_way == reader._on_demand == 0
    reader.read_now(shards[0], [(failing + 1, failing + 2)], aligned_buffer(BLOCK))


# -- what to measure -------------------------------------------------------------------------------


def settings_for(total: int, payloads: list[int] | None = None) -> list[DiskProfile]:
    places = Places([(0, nbytes) for nbytes in payloads or [total]])
    return disk.affordable(total, places)


def test_no_bundle_is_read_more_than_twice() -> None:
    for mebibytes in (1, 63, 64, 100, 128, 300, 500, 703, 704, 5000):
        count = len(settings_for(mebibytes * MiB))
        assert (count > 0) == (mebibytes >= 64)
        reads = count + min(2, count)
        assert reads * SAMPLE_NBYTES <= 2 * mebibytes * MiB
    assert len(settings_for(704 * MiB)) == len(REQUESTS) * len(DEPTHS)


def test_small_bundles_get_the_settings_next_to_the_default() -> None:
    near = {(s.request_nbytes, s.depth) for s in settings_for(230 * MiB)}
    assert near == {(512 * KiB, 8), (256 * KiB, 8), (512 * KiB, 4), (512 * KiB, 16), (MiB, 8)}


def test_requests_larger_than_the_shards_are_not_tried() -> None:
    found = {s.request_nbytes for s in settings_for(9000 * MiB, [600 * KiB] * 15000)}
    assert found == {256 * KiB, 512 * KiB}
    assert settings_for(64 * MiB, [100 * KiB] * 1000) == []


def test_places_are_aligned_apart_and_inside() -> None:
    nbytes = {3: 40 * MiB + BLOCK, 4: 60 * MiB - PAGE, 5: 3 * MiB}
    places = Places(list(nbytes.items()))
    for request in REQUESTS:
        found = places.some(request)
        assert len(set(found)) == len(found) == SAMPLE_NBYTES // request
        assert {descriptor for descriptor, _ in found} <= set(nbytes)
        for descriptor, offset in found:
            assert (offset - PAGE) % request == 0
            assert PAGE <= offset <= PAGE + nbytes[descriptor] - request


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({(512, 8): 1.98, (512, 4): 1.95, (512, 2): 1.5, (2048, 16): 2.01}, (512, 8)),
        ({(256, 1): 0.5, (512, 8): 1.0, (1024, 8): 2.0}, (1024, 8)),
        ({(256, 16): 1.0, (512, 4): 1.0, (1024, 4): 1.0, (2048, 2): 1.0}, (512, 4)),
        ({(512, 1): 0.96, (512, 2): 1.0}, (512, 2)),
        ({(512, 1): 1.0, (512, 2): 0.98}, (512, 2)),
    ],
)
def test_the_default_or_what_is_next_to_it_among_the_fastest(
    speeds: dict[tuple[int, int], float], chosen: tuple[int, int]
) -> None:
    measured = [DiskProfile(kib * KiB, depth, v * 1e9) for (kib, depth), v in speeds.items()]
    found = disk.choose(measured)
    assert (found.request_nbytes // KiB, found.depth) == chosen
    assert found in measured


def test_nothing_measured_is_the_default() -> None:
    assert disk.choose([]) == disk.choose([DiskProfile(MiB, 1, 0.0)]) == DEFAULT
    assert (DEFAULT.request_nbytes, DEFAULT.depth) == (512 * KiB, 8)


# -- measuring -------------------------------------------------------------------------------------


@pytest.fixture
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny bundle is measured."""
    monkeypatch.setattr(disk, "SAMPLE_NBYTES", 256 * KiB)
    monkeypatch.setattr(disk, "REQUESTS", (PAGE, BLOCK))


@pytest.mark.usefixtures("small_samples")
def test_every_setting_is_measured_and_the_best_two_again(
    deep_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter(range(1, 100))
    calls = []

    def measure(pool: Any, places: Any, setting: DiskProfile, buffer: Any) -> DiskProfile:
        calls.append((setting.request_nbytes, setting.depth))
        return DiskProfile(setting.request_nbytes, setting.depth, float(next(speeds)))

    monkeypatch.setattr(disk, "_measure", measure)
    found = disk.measure_settings(deep_bundle)
    assert len(calls) == len(found) + 2 == 12
    assert calls[-2:] == calls[-4:-2]  # the fastest so far
    assert [s.bytes_per_s for s in found][-2:] == [(9 + 11) / 2, (10 + 12) / 2]


@pytest.mark.usefixtures("small_samples")
def test_a_probe_reads_what_it_says(deep_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    total = 0
    lock = threading.Lock()
    preadv = os.preadv

    def counted(descriptor: int, views: Any, offset: int) -> int:
        nonlocal total
        got = preadv(descriptor, views, offset)
        with lock:
            total += got
        return got

    monkeypatch.setattr(disk.os, "preadv", counted)
    found = disk.probe_disk(deep_bundle)
    payloads = sum(index.header.payload_nbytes for index in deep_bundle.shards.values())
    assert 0 < total <= 2 * payloads
    assert found.bytes_per_s > 0
    assert found.request_nbytes in (PAGE, BLOCK)


@pytest.mark.usefixtures("small_samples")
def test_without_direct_reads_nothing_is_measured(
    deep_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return opened(path, flags)

    monkeypatch.setattr(disk.os, "open", refuse)
    assert disk.probe_disk(deep_bundle) == DEFAULT


# -- remembered ------------------------------------------------------------------------------------

FOUND = DiskProfile(MiB, 4, 1.5e9)


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Bundle]:
    """The probes made; each finds FOUND."""
    made: list[Bundle] = []

    def probe(bundle: Bundle) -> DiskProfile:
        made.append(bundle)
        return FOUND

    monkeypatch.setattr(disk, "probe_disk", probe)
    return made


@pytest.fixture
def memory(deep_bundle: Bundle, probes: list[Bundle]) -> Path:
    """disks.json after a probe."""
    assert disk.disk_profile(deep_bundle) == FOUND
    probes.clear()
    return Path(os.environ["M2C_HOME"]) / "disks.json"


def test_a_disk_is_probed_once(memory: Path, deep_bundle: Bundle, probes: list[Bundle]) -> None:
    assert disk.disk_profile(deep_bundle) == FOUND
    assert probes == []
    (entry,) = json.loads(memory.read_bytes())["disks"].values()
    assert entry["request_nbytes"] == MiB


def test_other_disks_are_not_forgotten(
    memory: Path, deep_bundle: Bundle, probes: list[Bundle]
) -> None:
    assert disk.remember("259:7 xfs", DiskProfile(256 * KiB, 2, 3e9))
    assert disk.disk_profile(deep_bundle) == FOUND
    assert probes == []
    assert len(json.loads(memory.read_bytes())["disks"]) == 2


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-20],
    "not UTF-8": lambda data: b"\xff" + data,
    "a list": lambda data: b"[]",
    "duplicate key": lambda data: data.replace(b'{"disks":', b'{"disks":{},"disks":'),
    "unknown key": lambda data: data.replace(b'{"disks":', b'{"more":1,"disks":'),
    "unknown fact": lambda data: data.replace(b'"depth"', b'"more":1,"depth"'),
    "missing fact": lambda data: data.replace(b'"depth":4,', b""),
    "bool": lambda data: data.replace(b'"depth":4', b'"depth":true'),
    "depth": lambda data: data.replace(b'"depth":4', b'"depth":4000000'),
    "request": lambda data: data.replace(b"1048576", b"1048577"),
    "negative": lambda data: data.replace(b"1500000000.0", b"-1.0"),
    "infinite": lambda data: data.replace(b"1500000000.0", b"1e999"),
    "impossible": lambda data: data.replace(b"1500000000.0", b"1e300"),
    "date": lambda data: data.replace(b'"date":"2', b'"date":"x'),
    "huge": lambda data: data + b" " * (1 << 17),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_memory_is_no_memory(
    memory: Path, deep_bundle: Bundle, probes: list[Bundle], damage: str
) -> None:
    whole = memory.read_bytes()
    broken = DAMAGES[damage](whole)
    assert broken != whole
    memory.write_bytes(broken)
    assert disk.disk_profile(deep_bundle) == FOUND
    assert len(probes) == 1
    assert json.loads(memory.read_bytes()) == json.loads(whole)


@pytest.mark.parametrize("fault", ["home is a file", "folder", "link", "read-only", "none"])
def test_a_closed_home_is_no_error(
    deep_bundle: Bundle, probes: list[Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    fault: str,
) -> None:  # fmt: skip
    home = tmp_path / "home"
    monkeypatch.setenv("M2C_HOME", str(home))
    if fault == "home is a file":
        home.write_text("")
    elif fault == "folder":
        (home / "disks.json").mkdir(parents=True)
    elif fault == "link":
        home.mkdir()
        (home / "disks.json").symlink_to(tmp_path / "elsewhere")
    elif fault == "none":

        def nowhere() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(disk, "home", nowhere)
    else:  # root may write anywhere, so the refusal is ours

        def refuse(path: Path, data: bytes) -> None:
            raise PermissionError(errno.EROFS, "read-only file system")

        monkeypatch.setattr(disk, "write_atomic", refuse)
    for _ in range(2):
        assert disk.disk_profile(deep_bundle) == FOUND
    assert len(probes) == 2
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("error", [StorageError("bad sector"), BadInput("gone")])
def test_a_disk_that_cannot_be_probed_is_read_with_the_defaults(
    deep_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(bundle: Bundle) -> DiskProfile:
        raise error

    monkeypatch.setattr(disk, "probe_disk", fail)
    assert disk.disk_profile(deep_bundle) == DEFAULT
    assert not (Path(os.environ["M2C_HOME"]) / "disks.json").exists()


def test_what_was_not_measured_is_not_remembered(deep_bundle: Bundle) -> None:
    assert disk.disk_profile(deep_bundle) == DEFAULT  # a few MiB
    assert not (Path(os.environ["M2C_HOME"]) / "disks.json").exists()


def test_devices_have_names(deep_bundle: Bundle, tmp_path: Path) -> None:
    name = disk.device_of(deep_bundle.path)
    number = os.stat(deep_bundle.path).st_dev
    assert name.split()[0] == f"{os.major(number)}:{os.minor(number)}"
    assert name == disk.device_of(deep_bundle.path / "manifest.json")
    with pytest.raises(BadInput, match="no/where"):
        disk.device_of(Path("no/where"))


# -- who uses it -----------------------------------------------------------------------------------


def test_only_those_who_read_while_decoding_ask(
    deep_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, reference: dict[Mix, Run]
) -> None:
    mix, asked = MIXES["5/15/80"], []

    def profile(bundle: Bundle) -> DiskProfile:
        asked.append(bundle)
        return DiskProfile(256 * KiB, 2, 1e9)

    monkeypatch.setattr("m2c.engine.disk_profile", profile)
    with Engine(deep_bundle, options_for(mix)) as engine:
        assert asked == []
        assert engine.disk == DEFAULT
    dram = smallest_dram(deep_bundle, options_for(mix))
    with Engine(deep_bundle, options_for(mix, dram=dram)) as engine:
        assert len(asked) == 1
        assert engine.store.reader._request_blocks == 4
        assert engine.store.reader._pool._max_workers == 2
        assert same(decode(engine), reference[mix])


@pytest.mark.usefixtures("small_samples")
def test_bench_probe_measures_again_and_remembers(memory: Path, deep_bundle: Bundle) -> None:
    before = memory.read_bytes()
    said = m2c("bench", deep_bundle.path, "--probe")
    assert said.code == 0
    assert said.reason.startswith("remembered for the disk ")
    header, _, *rows = said.out.splitlines()
    assert header.split("|")[1].strip() == "request"
    assert len(rows) == 2 * len(DEPTHS)
    assert sum("chosen" in row for row in rows) == 1
    assert memory.read_bytes() != before
    found = json.loads(m2c_ok("bench", deep_bundle.path, "--probe", "--json"))
    assert sum(setting["chosen"] for setting in found["settings"]) == 1


def test_bench_probe_needs_something_to_read(bundle: Path) -> None:
    said = m2c("bench", bundle, "--probe")
    assert (said.code, said.out) == (4, "")
    assert "too small to measure the disk" in said.reason
