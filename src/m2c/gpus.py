"""The GPUs of this machine, and whether the installed torch can compute on them.

torch's wheels hold code for some compute capabilities only; a GPU that is older, or newer, is seen
but fails at the first kernel. Knows nothing about memory plans.
"""

import re
import shutil
import subprocess
import warnings
from dataclasses import dataclass, replace
from typing import Any, Final

from m2c.units import MiB

_QUERY: Final = ("name", "memory.total", "driver_version", "compute_cap")
_TIMEOUT_S: Final = 20
# the last wheels with code for sm_50 to sm_70: torch 2.14 built with CUDA 12.6
OLD_WHEEL: Final = (
    'pip install --force-reinstall "torch==2.14.*" '
    "--index-url https://download.pytorch.org/whl/cu126"
)
NEW_WHEEL: Final = "pip install --force-reinstall torch"
_OLDEST: Final = (5, 0)
_OLDEST_IN_NEW: Final = (7, 5)

Capability = tuple[int, int]


@dataclass(frozen=True)
class TorchBuild:
    version: str
    cuda: str | None  # that it was built with; None: it computes on the CPU only
    architectures: tuple[str, ...] = ()  # "sm_80", "compute_90", ...


@dataclass(frozen=True)
class Gpu:
    name: str
    nbytes: int
    capability: Capability | None  # None: not known
    usable: bool = True
    why: str = ""  # it is not usable
    fix: str = ""  # what to type next; empty where nothing helps
    compiler: str | None = None  # of the kernels: NVRTC's version, "" where it is not there


def torch_build(torch: Any) -> TorchBuild:
    """torch: the module."""
    cuda = torch.version.cuda
    return TorchBuild(torch.__version__, cuda, tuple(torch.cuda.get_arch_list() if cuda else ()))


def find_gpus(torch: Any | None) -> list[Gpu]:
    """Those that torch sees, else those that the driver sees. torch: the module, if it loads."""
    build = None if torch is None else torch_build(torch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is reported here
        if build is not None and torch is not None and torch.cuda.is_available():
            seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            found = [_judged(Gpu(p.name, p.total_memory, (p.major, p.minor)), build) for p in seen]
            version = _compiler() if build.cuda else None
            return [replace(gpu, compiler=version) if gpu.usable else gpu for gpu in found]
    return [_unseen(gpu, driver, build) for gpu, driver in _by_driver()]


def computes(capability: Capability, architectures: tuple[str, ...]) -> bool:
    """Whether a build with code for these runs on a GPU of that capability.

    Machine code runs on its own major version from its own minor on; compute_ is compiled for
    whatever is newer; a letter at the end binds to one capability.
    """
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name, re.ASCII)
        if match is None:
            continue
        built = int(match[2]), int(match[3])
        if match[4]:
            fits = built == capability
        elif match[1] == "sm":
            fits = built[0] == capability[0] and built <= capability
        else:
            fits = built <= capability
        if fits:
            return True
    return False


def wheel_for(capability: Capability | None) -> str:
    """What to type for a torch that computes on it; empty where there is none."""
    if capability is None or capability >= _OLDEST_IN_NEW:
        return NEW_WHEEL
    return OLD_WHEEL if capability >= _OLDEST else ""


def _compiler() -> str:
    from m2c.kernels.cuda_driver import NoKernels, Nvrtc

    try:
        return Nvrtc().version
    except NoKernels:
        return ""


def _judged(gpu: Gpu, build: TorchBuild) -> Gpu:
    assert gpu.capability is not None
    # builds for other makers' GPUs list no architectures of this kind
    if not build.cuda or computes(gpu.capability, build.architectures):
        return gpu
    major, minor = gpu.capability
    why = f"torch {build.version} has no code for compute capability {major}.{minor}"
    return Gpu(gpu.name, gpu.nbytes, gpu.capability, False, why, wheel_for(gpu.capability))


def _unseen(gpu: Gpu, driver: str, build: TorchBuild | None) -> Gpu:
    fix = wheel_for(gpu.capability)
    if build is None:
        why = "torch cannot be imported"
    elif build.cuda is None:
        why = f"torch {build.version} computes on the CPU only"
    else:
        why = f"torch {build.version} (CUDA {build.cuda}) cannot start CUDA on driver {driver}"
        fix = "nvidia-smi  (says up to which CUDA the driver goes: update it, or take that torch)"
    if gpu.capability is not None and gpu.capability < _OLDEST:
        major, minor = gpu.capability
        why, fix = f"no torch that m2c works with computes on capability {major}.{minor}", ""
    return Gpu(gpu.name, gpu.nbytes, gpu.capability, False, why, fix)


def _by_driver() -> list[tuple[Gpu, str]]:
    """(GPU, driver version) by nvidia-smi; nothing where that is not there or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    # an old driver does not know the last field
    for fields in (_QUERY, _QUERY[:-1]):
        command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            return []
        if said.returncode == 0:
            return [found for line in said.stdout.splitlines() if (found := _row(line))]
    return []


def _row(line: str) -> tuple[Gpu, str] | None:
    words = [word.strip() for word in line.split(",")]
    if len(words) < len(_QUERY) - 1:
        return None
    nbytes = int(words[1]) * MiB if words[1].isdigit() else 0
    match = re.fullmatch(r"(\d+)\.(\d)", words[3], re.ASCII) if len(words) > 3 else None
    capability = (int(match[1]), int(match[2])) if match else None
    return Gpu(words[0], nbytes, capability), words[2]
