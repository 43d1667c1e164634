"""Which GPU a build of torch can compute on, and which build can."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from m2c import gpus
from m2c.gpus import NEW_WHEEL, OLD_WHEEL, computes, find_gpus, wheel_for

CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@pytest.mark.parametrize(
    ("capability", "old", "new"),
    [
        ((3, 7), False, False), ((5, 2), True, False), ((6, 1), True, False),
        ((7, 0), True, False), ((7, 5), True, True), ((8, 9), True, True),
        ((9, 0), True, True), ((12, 0), False, True), ((12, 1), False, True),
        ((13, 0), False, True),
    ],
)  # fmt: skip
def test_a_build_computes_on_its_own_architectures(
    capability: tuple[int, int], old: bool, new: bool
) -> None:
    assert (computes(capability, CU126), computes(capability, CU130)) == (old, new)


def test_code_for_one_capability_only() -> None:
    assert computes((9, 0), ("sm_90a",))
    assert not computes((9, 1), ("sm_90a",))
    assert not computes((9, 0), ("gfx90a", "sm_", ""))


def test_the_wheel_to_install() -> None:
    assert wheel_for((3, 7)) == ""
    for old in ((5, 0), (6, 1), (7, 0)):
        assert wheel_for(old) == OLD_WHEEL
        assert "2.14" in OLD_WHEEL
        assert "cu126" in OLD_WHEEL
    for new in ((7, 5), (9, 0), None):
        assert wheel_for(new) == NEW_WHEEL


def torch_of(cuda: str | None, devices: list[Any], architectures: tuple[str, ...] = CU130) -> Any:
    """As much of the module as is asked for."""
    return SimpleNamespace(
        __version__="2.15.0", version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: bool(devices), device_count=lambda: len(devices),
            get_arch_list=lambda: list(architectures), get_device_properties=lambda i: devices[i],
        ),
    )  # fmt: skip


@pytest.mark.parametrize("version", ["13.0", ""])
def test_what_torch_sees_is_judged(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(gpus, "_compiler", lambda: version)
    p40 = SimpleNamespace(name="Tesla P40", total_memory=24 << 30, major=6, minor=1)
    h100 = SimpleNamespace(name="H100", total_memory=80 << 30, major=9, minor=0)
    old, new = find_gpus(torch_of("13.2", [p40, h100]))
    assert (new.usable, new.why, new.capability, new.nbytes) == (True, "", (9, 0), 80 << 30)
    assert not old.usable
    assert old.why == "torch 2.15.0 has no code for compute capability 6.1"
    assert old.fix == OLD_WHEEL
    assert (new.compiler, old.compiler) == (version, None)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi that a test fills."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return program


def says(program: Path, body: str) -> None:
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


def test_what_torch_does_not_see(driver: Path) -> None:
    says(driver, "echo 'Tesla P40, 24576, 535.1, 6.1'; echo 'Tesla K80, 11441, 470.2, 3.7'")
    p40, k80 = find_gpus(torch_of(None, []))
    assert (p40.name, p40.nbytes, p40.capability) == ("Tesla P40", 24 << 30, (6, 1))
    assert p40.why == "torch 2.15.0 computes on the CPU only"
    assert p40.fix == OLD_WHEEL
    assert (k80.usable, k80.fix) == (False, "")
    assert "3.7" in k80.why
    starts, _ = find_gpus(torch_of("13.2", []))
    assert starts.why == "torch 2.15.0 (CUDA 13.2) cannot start CUDA on driver 535.1"
    assert find_gpus(None)[0].why == "torch cannot be imported"


def test_an_old_driver_does_not_know_capabilities(driver: Path) -> None:
    says(driver, 'case "$1" in *compute_cap*) exit 2;; esac; echo "Quadro, [N/A], 390.1"')
    (gpu,) = find_gpus(torch_of(None, []))
    assert (gpu.name, gpu.nbytes, gpu.capability) == ("Quadro", 0, None)


@pytest.mark.parametrize("body", ["exit 9", "echo nonsense", "echo 'No devices were found'"])
def test_a_driver_that_says_nothing_useful(driver: Path, body: str) -> None:
    says(driver, body)
    assert find_gpus(torch_of(None, [])) == []
