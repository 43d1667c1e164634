"""Memory, processor time and threads as containers of both versions limit them."""

import os
from pathlib import Path

import numpy as np
import pytest

from m2c import hardware
from m2c.hardware import auto_threads, available_memory, cpu_quota, memory_limit, read_cpu
from m2c.units import GiB, MiB

MEMINFO = f"MemTotal: {16 * MiB} kB\nMemFree: 1 kB\nMemAvailable: {10 * MiB} kB\n"


def write(root: Path, name: str, text: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 16 GiB without limits."""
    write(tmp_path, "proc/meminfo", MEMINFO)
    return tmp_path


def limited_v2(root: Path, folder: str, limit: object, used: int, inactive: int = 0) -> None:
    write(root, "proc/self/cgroup", "0::/pod/box")
    write(root, f"sys/fs/cgroup/{folder}/memory.max", limit)
    write(root, f"sys/fs/cgroup/{folder}/memory.current", used)
    write(root, f"sys/fs/cgroup/{folder}/memory.stat", f"anon 1\ninactive_file {inactive}")


def test_without_a_cgroup_the_machine_decides(root: Path) -> None:
    assert available_memory(root) == 10 * GiB
    assert hardware.total_memory(root) == 16 * GiB
    assert memory_limit(root) is None
    assert cpu_quota(root) is None


def test_version_2_limits_memory(root: Path) -> None:
    limited_v2(root, "pod/box", 4 * GiB, GiB)
    limit = memory_limit(root)
    assert limit is not None
    assert limit.file == root / "sys/fs/cgroup/pod/box/memory.max"
    assert (limit.nbytes, limit.used) == (4 * GiB, GiB)
    assert available_memory(root) == 3 * GiB


def test_a_limit_above_binds_too(root: Path) -> None:
    limited_v2(root, "pod/box", "max", 0)
    limited_v2(root, "pod", 2 * GiB, 0)
    assert available_memory(root) == 2 * GiB
    # seen from inside, the folder that /proc names may not be there
    limited_v2(root, "elsewhere", GiB, 0)
    limited_v2(root, "", 3 * GiB, 0)
    assert available_memory(root) == 2 * GiB


def test_files_that_were_read_do_not_count_as_used(root: Path) -> None:
    limited_v2(root, "pod/box", 4 * GiB, 4 * GiB - MiB, inactive=3 * GiB)
    assert available_memory(root) == 3 * GiB + MiB


def test_version_1_limits_memory(root: Path) -> None:
    write(root, "proc/self/cgroup", "5:cpu,cpuacct:/box\n4:memory:/box\n0::/")
    folder = "sys/fs/cgroup/memory/box"
    write(root, f"{folder}/memory.limit_in_bytes", 4 * GiB)
    write(root, f"{folder}/memory.usage_in_bytes", 2 * GiB)
    write(root, f"{folder}/memory.stat", f"cache 9\ntotal_inactive_file {GiB}")
    limit = memory_limit(root)
    assert limit is not None
    assert limit.file == root / folder / "memory.limit_in_bytes"
    assert available_memory(root) == 3 * GiB
    # what version 1 writes for no limit
    write(root, f"{folder}/memory.limit_in_bytes", 9223372036854771712)
    assert memory_limit(root) is None


def test_a_group_that_took_too_much_leaves_nothing(root: Path) -> None:
    limited_v2(root, "pod/box", GiB, 2 * GiB)
    assert available_memory(root) == 0


@pytest.mark.parametrize(
    ("words", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("", None), ("0 0", None)]
)
def test_version_2_limits_processor_time(root: Path, words: str, cores: float | None) -> None:
    write(root, "proc/self/cgroup", "0::/pod/box")
    write(root, "sys/fs/cgroup/pod/cpu.max", words)
    quota = cpu_quota(root)
    assert (quota and quota.cores) == cores


@pytest.mark.parametrize(("quota", "threads"), [(10_000, 1), (140_000, 1), (260_000, 3), (-1, 4)])
def test_threads_keep_to_the_quota(
    root: Path, monkeypatch: pytest.MonkeyPatch, quota: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    write(root, "proc/self/cgroup", "5:cpu,cpuacct:/box")
    write(root, "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", quota)
    write(root, "sys/fs/cgroup/cpu/box/cpu.cfs_period_us", 100_000)
    assert auto_threads(root) == threads


def test_the_processor_names_itself(root: Path) -> None:
    core = "processor: {}\nmodel name\t: Some CPU @ 2.1GHz\nflags\t\t: fpu avx2 fma\n\n"
    write(root, "proc/cpuinfo", core.format(0) + core.format(1))
    cpu = read_cpu(root)
    assert cpu.model == "Some CPU @ 2.1GHz"
    assert cpu.flags == {"fpu", "avx2", "fma"}
    write(root, "proc/cpuinfo", "processor: 0\nFeatures: fp asimd\n")
    assert read_cpu(root).flags == {"fp", "asimd"}


def test_a_machine_that_tells_nothing_is_still_read(tmp_path: Path) -> None:
    cpu = read_cpu(tmp_path)
    assert cpu.model
    assert not cpu.flags
    assert available_memory(tmp_path) > 0


def test_measuring_bandwidth_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    ones = np.ones
    monkeypatch.setattr(hardware.np, "ones", lambda shape, _: used.append(shape[0]) or ones(1))
    for room in (100 * MiB, 300 * MiB, 1 << 40):
        monkeypatch.setattr(hardware, "available_memory", lambda room=room: room)
        hardware.probe_dram(1000)
    assert used == [1, 2, 8]
