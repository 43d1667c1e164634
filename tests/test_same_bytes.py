"""`profile` and `pack`: the same bytes whatever environment, threads and kernels there are.

One machine, one torch: sums of another processor's torch may differ in the last bit of a profile.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import m2c_ok, shell
from tiny_models import digest, job_for, run_pack, write_checkpoint
from trials import trials

from m2c import pack as packing
from m2c.errors import UsageError
from m2c.kernels.encoder import Encoder, load_encoder
from m2c.kernels.native import LIBRARY

SETTINGS: dict[str, list[str]] = {
    "PYTHONHASHSEED": ["0", "1", "4294967295", "random"],
    "LC_ALL": ["C", "C.UTF-8", "de_DE.UTF-8", "tr_TR.UTF-8", "nonsense"],
    "LANG": ["C", "en_US.UTF-8", "ja_JP.eucJP"],
    "TZ": ["UTC", "Asia/Kolkata", "America/St_Johns", "XYZ+25"],
    "PYTHONUTF8": ["0", "1"],
    "OMP_NUM_THREADS": ["1", "2", "7"],
    "MKL_NUM_THREADS": ["1", "3"],
    "M2C_KERNEL": ["auto", "torch", "scalar"],
    "COLUMNS": ["20", "200"],
    "SOURCE_DATE_EPOCH": ["0", "1700000000"],
}
SHAPE = {"num_hidden_layers": 2, "hidden_size": 104, "intermediate_size": 350}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that are no multiple of a group, of a vector or of a thread's share."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", SHAPE)


def command_lines(source: Path, folder: Path, threads: int) -> tuple[Path, list[tuple[str, ...]]]:
    """The folder that a profile and a bundle are written to, and how."""
    ssd = folder / "ssd"
    ssd.mkdir(parents=True)
    made, common = str(ssd / "profile.safetensors"), ("--threads", str(threads), "-q")
    return ssd, [
        ("profile", str(source), "--tokens", "600", "-o", made, *common),
        ("pack", str(source), "--ssd", str(ssd), "--profile", made, *common),
    ]


def packed_by_processes(source: Path, folder: Path, threads: int, told: dict[str, str]) -> str:
    """Digest of what two processes of their own make, started in `folder`."""
    ssd, lines = command_lines(source, folder, threads)
    given = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(os.path.abspath(part) for part in given.split(os.pathsep) if part)
    environment = {**os.environ, **told, "PYTHONPATH": path, "M2C_HOME": str(folder / "home")}
    for line in lines:
        said = shell('"$@"', *line, env=environment, cwd=folder)
        assert said.code == 0, said.err
    return digest(ssd)


@pytest.fixture
def usual(source: Path, tmp_path: Path) -> str:
    """Digest of what this process makes with one thread."""
    ssd, lines = command_lines(source, tmp_path / "usual", 1)
    for line in lines:
        m2c_ok(*line)
    return digest(ssd)


@pytest.mark.campaign
@pytest.mark.slow
def test_nothing_a_process_is_told_changes_a_byte(source: Path, usual: str, tmp_path: Path) -> None:
    for trial in trials("R24-pack", ci=1, campaign=50):
        with trial as seed:
            rng = np.random.default_rng(seed)
            told = {
                name: str(rng.choice(values))
                for name, values in SETTINGS.items()
                if rng.random() < 0.7 and (name != "M2C_KERNEL" or LIBRARY.exists())
            }
            threads = int(rng.integers(1, 6))
            assert packed_by_processes(source, tmp_path / str(seed), threads, told) == usual, told


@pytest.mark.parametrize("encoder", ["numpy", "scalar", "avx2", "avx512"])
def test_encoders_give_the_same_bundle(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    """Every instruction set that this machine has, and none."""
    job = job_for(source)
    run_pack(job, tmp_path / "auto")
    made: Any = None
    if encoder != "numpy":
        if load_encoder() is None:
            pytest.skip("the native kernels were not built")
        try:
            made = Encoder(encoder)
        except UsageError:
            pytest.skip(f"this machine has no {encoder}")
    monkeypatch.setattr(packing, "load_encoder", lambda: made)
    run_pack(job, tmp_path / encoder, threads=2)
    assert digest(tmp_path / encoder) == digest(tmp_path / "auto")
