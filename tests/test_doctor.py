"""`m2c doctor`: a page and JSON of what is there, problems with what to type, and an exit code."""

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import m2c, m2c_ok

from m2c import doctor, gpus, scratch
from m2c.cli.doctor_page import verdict_line
from m2c.disk import DEPTHS, REQUESTS, DiskProfile, device_of, remember
from m2c.doctor import Verdict
from m2c.engine import RunOptions
from m2c.model.aliases import ALIASES
from m2c.scratch import DiskFacts, existing_folder, read_disk
from m2c.units import GiB, MiB

FEW = ("llama3.2-1b", "llama3.1-8b", "llama2-7b", "llama2-13b", "llama2-70b")
SECTIONS = ["m2c", "CPU", "Memory", "Disk", "GPUs", "Folders", "Models"]


def facts(*words: object, code: int = 0) -> dict[str, Any]:
    said = m2c("doctor", "--no-disk", "--json", *words)
    assert said.code == code, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def schema(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: schema(each) for key, each in value.items()}
    return type(value).__name__


@pytest.fixture(autouse=True)
def no_gpus_and_few_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """All models take two seconds to predict."""
    monkeypatch.setattr(gpus, "find_gpus", lambda _: [])
    monkeypatch.setattr(doctor, "ALIASES", {name: ALIASES[name] for name in FEW})


@pytest.fixture
def every_model(monkeypatch: pytest.MonkeyPatch, no_gpus_and_few_models: None) -> None:
    monkeypatch.setattr(doctor, "ALIASES", ALIASES)


# -- the report ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("every_model")
def test_the_page_is_readable_in_a_pipe(tmp_path: Path) -> None:
    said = m2c("doctor", "--no-disk", "--ssd", tmp_path, "--dram", "8GiB")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    # a long path stays whole: it is there to be copied
    assert max(len(line) for line in lines if len(line.split()) > 1) <= 80
    titles = [line.split()[0].rstrip(":") for line in lines if line[:1].isalpha()]
    assert titles[: len(SECTIONS)] == SECTIONS
    assert "\x1b" not in said.out
    for alias in ALIASES:
        assert len(re.findall(rf"^  {re.escape(alias)}: ", said.out, re.MULTILINE)) == 1


def test_the_json_keeps_its_shape(tmp_path: Path) -> None:
    found = facts("--ssd", tmp_path, "--dram", "8GiB", "-t", 2)
    shape = schema(found)
    assert set(found) == {
        "versions", "cpu", "kernels", "threads", "memory", "dram", "disk", "ssd", "gpus",
        "folders", "models", "problems", "exit_code",
    }  # fmt: skip
    names = ("m2c", "python", "system", "torch", "torch_error", "other_m2c")
    assert shape["versions"] == dict.fromkeys(names, "str")
    assert shape["kernels"] == {"chosen": "str", "possible": "list", "built": "bool"}
    assert shape["ssd"] == {"bytes_per_s": "float", "source": "str"}
    assert (found["threads"], found["dram"]) == (2, 8 * GiB)
    assert schema(found["disk"]) == {
        "path": "str", "device": "str", "free_nbytes": "int", "total_nbytes": "int",
        "writable": "bool", "direct": "NoneType", "settings": "list", "why": "str",
    }  # fmt: skip
    assert [model["model"] for model in found["models"]] == list(FEW)
    assert {f["what"] for f in found["folders"]} == {"M2C_HOME", "Hugging Face cache", "--ssd"}
    assert found["memory"]["bytes_per_s"] > 0


def test_kernels_are_those_of_a_run() -> None:
    found = facts("--kernel", "torch")["kernels"]
    assert found["chosen"] == "torch"
    assert found["possible"][-1] == "torch"
    if found["built"]:
        assert facts()["kernels"]["chosen"] == found["possible"][0]


# -- what is wrong, and what to type ---------------------------------------------------------------


def problems(*words: object, code: int = 0) -> dict[str, dict[str, Any]]:
    found = facts(*words, code=code)
    assert found["exit_code"] == code
    return {problem["what"]: problem for problem in found["problems"]}


def test_the_unrelated_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.metadata.version
    monkeypatch.setattr(
        doctor.metadata, "version", lambda name: "0.4.7" if name == "m2c" else version(name)
    )
    (found,) = (p for what, p in problems().items() if "unrelated" in what)
    assert found["fix"].startswith("pip uninstall m2c")
    assert found["exit_code"] == 0
    page = m2c_ok("doctor", "--no-disk")
    assert " ! an unrelated package m2c 0.4.7" in page
    assert "   next: pip uninstall m2c" in page


def test_without_torch_there_is_still_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError(f"lib{name}_cpu.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "import_module", broken)
    found = problems(code=4)
    (torch,) = (p for what, p in found.items() if "libtorch_cpu.so" in what)
    assert "pip install" in torch["fix"]
    said = m2c("doctor", "--no-disk")
    assert said.code == 4
    assert "!! torch cannot be imported" in said.out
    assert said.out.splitlines()[-1].endswith("of them (!!) stop m2c.")


def test_without_the_c_library_torch_computes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from m2c.kernels import native

    monkeypatch.setattr(native, "LIBRARY", tmp_path / "missing.so")
    found = facts()
    assert found["kernels"] == {"chosen": "torch", "possible": ["torch"], "built": False}
    assert any("C compiler" in problem["fix"] for problem in found["problems"])
    said = problems("--kernel", "avx2", code=2)
    assert any("were not built" in what for what in said)


def test_a_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from m2c.kernels import native

    (tmp_path / "broken.so").write_bytes(b"no library")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "broken.so")
    assert any("cannot be loaded" in what for what in problems(code=4))


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = gpus.Gpu("Tesla P40", 24 * GiB, (6, 1), False, "no code for 6.1", gpus.OLD_WHEEL)
    new = replace(gpu, name="New", usable=True, compiler="13.0")
    bare = replace(new, name="Bare", compiler="")
    monkeypatch.setattr(gpus, "find_gpus", lambda _: [gpu, new, bare])
    page = " ".join(m2c_ok("doctor", "--no-disk").split())
    assert "Tesla P40, 24.00 GiB, compute capability 6.1, torch cannot use it" in page
    assert "New, 24.00 GiB, compute capability 6.1, torch can use it" in page
    assert f"! Tesla P40: no code for 6.1 next: {gpus.OLD_WHEEL}" in page
    assert "kernels compiled by NVRTC 13.0" in page
    assert "! Bare: NVRTC, which compiles the CUDA kernels, is not there" in page


def test_folders_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("M2C_HOME", str(blocked))
    assert problems()[f"M2C_HOME is not writable: {blocked}"]["fix"] == "export M2C_HOME=DIR"
    found = problems("--ssd", blocked, code=6)
    assert f"--ssd is not writable: {blocked}" in found


def test_a_folder_for_bundles_that_is_not_there(tmp_path: Path) -> None:
    """pack would refuse it, so it is no "no problems"."""
    missing = tmp_path / "a" / "b"
    found = problems("--ssd", missing)
    assert found[f"--ssd: no such folder: {missing}"]["fix"] == f"mkdir -p {missing}"
    missing.mkdir(parents=True)
    assert not any("no such folder" in what for what in problems("--ssd", missing))


def test_too_little_memory_for_anything() -> None:
    assert any("not enough memory" in what for what in problems("--dram", "1MiB", code=7))


def test_as_nobody_in_particular(tmp_path: Path) -> None:
    """No home folder, no right to write, closed folders on the way."""
    if os.getuid():
        pytest.skip("needs root to become somebody else")
    closed = tmp_path / "closed"
    closed.mkdir(mode=stat.S_IRWXU)
    report = (
        "import os; from pathlib import Path; from m2c.doctor import read_folders;"
        "from m2c.scratch import read_disk; os.setgid(65534); os.setuid(65534);"
        f"ssd = Path({str(closed / 'a' / 'b')!r});"
        "print([f.writable for f in read_folders(ssd)][-1], read_disk(ssd, probe=True).why)"
    )
    command = [sys.executable, "-c", report]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False /")
    assert "is not writable" in done.stdout


# -- the disk --------------------------------------------------------------------------------------


def room_for(free: int) -> Callable[[Any], os.statvfs_result]:
    """Of a file system with so much free."""
    return lambda _: os.statvfs_result((4096, 4096, free, free, free // 4096, 0, 0, 0, 0, 255))


def test_a_disk_is_measured_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "SCRATCH_NBYTES", 128 * MiB)
    steps: list[int] = []
    found = read_disk(tmp_path / "not" / "there", probe=True, progress=steps.append)
    assert found.path == tmp_path
    assert list(tmp_path.iterdir()) == []
    if not found.direct:
        pytest.skip(found.why)
    measured = [(s.request_nbytes, s.depth) for s in found.settings]
    assert measured == [(n, depth) for n in (64 << 10, *REQUESTS) for depth in DEPTHS]
    assert all(s.bytes_per_s > 0 for s in found.settings)
    assert sum(steps) == 8 + len(found.settings)


def test_a_disk_that_cannot_be_measured_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured() -> DiskFacts:
        found = read_disk(tmp_path, probe=True)
        assert not found.settings
        assert list(tmp_path.iterdir()) == []
        return found

    assert read_disk(tmp_path, probe=False).why == "not asked for"
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", room_for(100 * MiB))
        assert "too little free space" in measured().why
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert measured().why == f"{tmp_path} is not writable"
    monkeypatch.setattr(scratch, "SCRATCH_NBYTES", 128 * MiB)
    with monkeypatch.context() as patch:
        patch.setattr(scratch, "_goes_direct", lambda _: False)
        assert (measured().direct, "refused" in measured().why) == (False, True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: os.open("/proc/self/nothing/there", os.O_RDONLY))
        assert "No such file" in measured().why


def test_the_page_shows_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tuple(DiskProfile(n << 10, d, n * d * 1e6) for n in (64, 256) for d in (1, 16))
    disk = DiskFacts(tmp_path, "254:0 ext4", 100 * GiB, 200 * GiB, True, True, settings)
    monkeypatch.setattr(scratch, "read_disk", lambda *_, **__: disk)
    page = m2c_ok("doctor")
    assert "254:0 ext4, 100.00 GiB of 200.00 GiB free, direct reads work" in page
    assert re.search(r"^ +64 KiB +0\.06 +1\.02\n +256 KiB +0\.26 +4\.10$", page, re.MULTILINE)
    assert "predictions count with 4.1 GB/s measured" in page


def test_a_disk_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "device_of", lambda _: "0:27 tmpfs")
    assert f"{tmp_path} lies in memory, not on a disk" in problems("--ssd", tmp_path)


def test_what_is_known_of_a_disk_counts_first(tmp_path: Path) -> None:
    assert facts("--ssd", tmp_path)["ssd"] == {"bytes_per_s": 2e9, "source": "assumed"}
    assert remember(device_of(tmp_path), DiskProfile(1 << 20, 8, 3e9))
    assert facts("--ssd", tmp_path)["ssd"] == {"bytes_per_s": 3e9, "source": "remembered"}


def test_the_folder_that_is_there(tmp_path: Path) -> None:
    assert existing_folder(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "file").write_text("")
    assert existing_folder(tmp_path / "file") == tmp_path


# -- models ----------------------------------------------------------------------------------------


def verdicts(free: int = 1 << 50, packed: frozenset[str] = frozenset(), **changes: Any) -> Any:
    options = RunOptions(**{"dram": 16 * GiB, "threads": 2, **changes})
    return {v.model: v for v in doctor.verdicts(options, 2e10, 2e9, free, packed)}


@pytest.mark.usefixtures("every_model")
def test_a_verdict_is_one_line() -> None:
    line = verdict_line(Verdict("llama2-70b", 125 * GiB, 0.4, 2.1, False))
    assert line == "llama2-70b: exact 0.40 tok/s, mixed 2.10 tok/s, needs 125 GiB of SSD"
    line = verdict_line(Verdict("x", GiB, None, 20.4, True))
    assert line == "x: exact does not fit, mixed 20 tok/s, packed here"
    lines = [verdict_line(v) for v in verdicts().values()]
    assert max(map(len, lines)) <= 78


def test_larger_models_are_slower() -> None:
    found = verdicts()
    for mode in ("exact_tps", "mixed_tps"):
        speeds = [getattr(found[f"llama2-{n}"], mode) for n in ("7b", "13b", "70b")]
        assert speeds == sorted(speeds, reverse=True)
        assert speeds[-1] > 0


def test_what_is_missing_is_named() -> None:
    found = verdicts(free=5 * GiB, packed=frozenset({"llama3.1-8b"}))
    assert re.fullmatch(r"needs 9.* GiB of SSD, 5\.00 GiB are free", found["llama2-7b"].lacks)
    assert not found["llama3.2-1b"].lacks
    assert not found["llama3.1-8b"].lacks
    small = verdicts(dram=2 * GiB)["llama2-70b"]
    needed = re.fullmatch(r"needs --dram (\d+)MiB", small.lacks)
    assert needed
    assert not verdicts(dram=int(needed[1]) * MiB)["llama2-70b"].lacks
    assert verdicts(dram=(int(needed[1]) - 1) * MiB)["llama2-70b"].lacks
