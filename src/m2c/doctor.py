"""What `m2c doctor` looks at: this machine, the installation, and what models would do here.

Facts, and problems with what to type next. Knows nothing about printing; imports torch only inside
functions, so that it can tell that torch is broken.
"""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from m2c import __version__
from m2c.disk import remembered
from m2c.errors import BadInput, DoesNotFit, M2CError, StorageError
from m2c.gpus import Gpu
from m2c.hardware import (
    ASSUMED_SSD,
    Cpu,
    Figure,
    MemoryLimit,
    available_memory,
    memory_limit,
    probe_dram,
    total_memory,
)
from m2c.home import home
from m2c.hub import cache_folder
from m2c.model.aliases import ALIASES
from m2c.scratch import DiskFacts, existing_folder

if TYPE_CHECKING:
    from m2c.engine import RunOptions

OTHER_PACKAGE: Final = "m2c"  # on PyPI; ours is m2cache, and both bring a package and a command m2c
_IN_MEMORY: Final = (" tmpfs", " ramfs")
_REBUILD: Final = "install a C compiler (apt install gcc), then install m2c again"


@dataclass(frozen=True)
class Problem:
    """exit_code: 0 where m2c works all the same."""

    section: str  # "m2c", "cpu", "memory", "disk", "gpus", "folders" or "models"
    what: str
    fix: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class Versions:
    m2c: str
    python: str
    system: str
    torch: str  # empty: it cannot be imported
    torch_error: str
    other_m2c: str  # version of the unrelated package; empty: not installed


@dataclass(frozen=True)
class Kernels:
    chosen: str  # empty: the one asked for cannot be had
    possible: tuple[str, ...]
    built: bool


@dataclass(frozen=True)
class Memory:
    total: int
    available: int
    limit: MemoryLimit | None
    bytes_per_s: float


@dataclass(frozen=True)
class Folder:
    what: str
    path: str
    writable: bool
    exists: bool


@dataclass(frozen=True)
class Verdict:
    """What a model would do here. Tokens per second; None: the mode does not fit."""

    model: str
    bundle_nbytes: int
    exact_tps: float | None
    mixed_tps: float | None
    packed: bool  # a bundle of it lies on the disk
    lacks: str = ""  # what is missing to run it


@dataclass
class Report:
    versions: Versions
    cpu: Cpu
    kernels: Kernels
    threads: int
    memory: Memory
    dram: int
    disk: DiskFacts
    ssd: Figure  # what the predictions count with
    gpus: list[Gpu]
    folders: list[Folder]
    models: list[Verdict] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 unless something makes m2c unusable: then the code of the first such error."""
        return next((p.exit_code for p in self.problems if p.exit_code), 0)


def read_versions() -> tuple[Versions, Any | None]:
    """The versions, and the torch module if it can be imported."""
    torch, error = None, ""
    try:
        torch = import_module("torch")
    except Exception as caught:  # a library that is missing raises OSError, others what they like
        error = f"{type(caught).__name__}: {caught}"
    try:
        other = metadata.version(OTHER_PACKAGE)
    except metadata.PackageNotFoundError:
        other = ""
    system = f"{platform.system()} {platform.release()}"
    version = torch.__version__ if torch is not None else ""
    return Versions(__version__, platform.python_version(), system, version, error, other), torch


def read_kernels(choice: str) -> tuple[Kernels, Problem | None]:
    """Needs torch. choice: one of `native.CHOICES`."""
    from contextlib import closing

    from m2c.kernels.native import CHOICES, LIBRARY, NativeKernels
    from m2c.kernels.workers import Workers

    possible = []
    for name in CHOICES:
        if name not in ("auto", "torch") and LIBRARY.exists():
            try:
                NativeKernels(name, 1).close()
                possible.append(name)
            except (M2CError, OSError):
                continue
    kernels = Kernels("", (*reversed(possible), "torch"), LIBRARY.exists())
    try:
        with closing(Workers(1, kernel=choice)) as workers:
            chosen = workers.kernel
    except M2CError as error:
        return kernels, Problem("cpu", error.message, error.hint, error.exit_code)
    except OSError as error:
        code = BadInput.exit_code
        return kernels, Problem("cpu", f"the C library cannot be loaded: {error}", _REBUILD, code)
    problem = None
    if not kernels.built:
        what = "the C kernels were not built: torch computes, many times slower"
        problem = Problem("cpu", what, _REBUILD)
    elif chosen in ("avx2", "scalar"):
        what = f"exact mode decodes about twenty times slower with {chosen} than with avx512"
        problem = Problem("cpu", what)
    return Kernels(chosen, kernels.possible, kernels.built), problem


def read_memory(threads: int) -> Memory:
    limit, available = memory_limit(), available_memory()
    return Memory(total_memory(), available, limit, probe_dram(threads))


def ssd_speed(disk: DiskFacts) -> Figure:
    """A bundle's own reads are nearer the truth than those of a file just written."""
    if known := remembered(disk.device):
        return Figure(known.bytes_per_s, "remembered")
    if disk.settings:
        return Figure(max(setting.bytes_per_s for setting in disk.settings), "measured")
    return Figure(ASSUMED_SSD, "assumed")


def read_folders(ssd: Path | None) -> list[Folder]:
    """The folders that m2c was told to write to, or would."""
    stated: list[tuple[str, Callable[[], Path]]] = [
        ("M2C_HOME" if os.environ.get("M2C_HOME") else "m2c's home", home),
        ("Hugging Face cache", cache_folder),
    ]
    if ssd is not None:
        stated.append(("--ssd", lambda: ssd))
    found = []
    for what, place in stated:
        try:
            path = place()
        except RuntimeError:  # a user without a home folder
            found.append(Folder(what, "", False, False))
            continue
        # a file where a folder should be makes it unwritable, too
        exists = os.path.exists(path)
        blocked = exists and not os.path.isdir(path)
        writable = not blocked and os.access(existing_folder(path), os.W_OK | os.X_OK)
        found.append(Folder(what, str(path), writable, exists))
    return found


def verdicts(
    options: "RunOptions", memory_bytes_per_s: float, ssd_bytes_per_s: float, free_nbytes: int,
    packed: frozenset[str] = frozenset(), done: Callable[[int], None] = lambda models: None,
) -> list[Verdict]:  # fmt: skip
    """Of every alias, on the CPU. packed: names of bundles that are on the disk already."""
    from m2c.engine import ASSUMED_EXACT_TYPE
    from m2c.model.footprint import bundle_nbytes
    from m2c.modes import exact_options, outlooks, planner_of_config
    from m2c.predict import Speeds
    from m2c.units import format_size

    speeds = Speeds(ssd_bytes_per_s, 0.0, memory_bytes_per_s)
    found = []
    for name, alias in ALIASES.items():
        config = alias.config()
        nbytes = bundle_nbytes(config, ASSUMED_EXACT_TYPE)
        tps: dict[str, float] = {}
        lacks = []
        modes = {"mixed": options, "exact": exact_options(options)}
        try:
            planned = outlooks(planner_of_config(config), modes, lambda *_: speeds)
            tps = {mode: outlook.tps for mode, outlook in planned.items()}
        except DoesNotFit as error:
            lacks.append(f"needs --dram {-(-error.smallest >> 20)}MiB")
        if name not in packed and nbytes > free_nbytes:
            lacks.append(f"needs {format_size(nbytes)} of SSD, {format_size(free_nbytes)} are free")
        exact, mixed = tps.get("exact"), tps.get("mixed")
        found.append(Verdict(name, nbytes, exact, mixed, name in packed, "; ".join(lacks)))
        done(1)
    return found


def packed_under(ssd: Path | None) -> frozenset[str]:
    """Names of the bundles there."""
    from m2c.bundle.bundle import SUFFIX

    if ssd is None:
        return frozenset()
    try:
        bundles = [p for p in ssd.glob(f"*{SUFFIX}") if (p / "manifest.json").is_file()]
    except OSError:
        bundles = []
    return frozenset(p.stem for p in bundles)


def problems_of(report: Report, asked_for_probe: bool) -> list[Problem]:
    """In the order of the sections; those of the kernels are known before."""
    found = []
    if report.versions.torch_error:
        what = f"torch cannot be imported: {report.versions.torch_error}"
        fix = "pip install --force-reinstall torch"
        found.append(Problem("m2c", what, fix, BadInput.exit_code))
    if report.versions.other_m2c:
        what = (
            f"an unrelated package m2c {report.versions.other_m2c} is installed too; it brings "
            "a command and a package of the same name"
        )
        fix = "pip uninstall m2c, then install m2cache again"
        found.append(Problem("m2c", what, fix))
    another = "m2c doctor --ssd DIR  (a folder on another disk)"
    if report.disk.device.endswith(_IN_MEMORY):
        what = f"{report.disk.path} lies in memory, not on a disk"
        found.append(Problem("disk", what, another))
    if asked_for_probe and report.disk.why:
        found.append(Problem("disk", f"not measured: {report.disk.why}", another))
    for gpu in report.gpus:
        if not gpu.usable:
            found.append(Problem("gpus", f"{gpu.name}: {gpu.why}", gpu.fix))
        elif gpu.compiler == "":
            what = f"{gpu.name}: NVRTC, which compiles the CUDA kernels, is not there"
            fix = "pip install nvidia-cuda-nvrtc-cu12  (-cu13 for a torch of CUDA 13)"
            found.append(Problem("gpus", what, fix))
    for folder in report.folders:
        if not folder.writable:
            found.append(_closed(folder))
        elif folder.what == "--ssd" and not folder.exists:
            # pack refuses: it might be the mount point of a disk that is not there
            what = f"--ssd: no such folder: {folder.path}"
            found.append(Problem("folders", what, f"mkdir -p {folder.path}"))
    if report.models and all(m.exact_tps is None and m.mixed_tps is None for m in report.models):
        what = "there is not enough memory for the smallest of these models"
        fix = "free some, or raise the container's limit"
        found.append(Problem("models", what, fix, DoesNotFit.exit_code))
    return found


def _closed(folder: Folder) -> Problem:
    """Only where bundles go stops anything: the rest is not remembered, but works."""
    where = f": {folder.path}" if folder.path else ": there is no home folder"
    what = f"{folder.what} is not writable{where}"
    if folder.what == "--ssd":
        return Problem("folders", what, "choose another folder for --ssd", StorageError.exit_code)
    variable = "HF_HOME" if folder.what.startswith("Hugging") else "M2C_HOME"
    return Problem("folders", what, f"export {variable}=DIR")
