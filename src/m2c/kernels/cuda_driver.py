"""CUDA kernels compiled for the GPU that is there, and launched, with only what torch brings.

NVRTC (in torch's CUDA wheels) compiles the sources of `cuda/` once per GPU architecture; what comes
out is kept on disk. The driver's own library launches. Knows nothing about what kernels compute.
"""

import ctypes
import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from m2c.bundle.files import write_atomic
from m2c.errors import M2CError

FOLDER: Final = Path(__file__).parent / "cuda"
SOURCES: Final = (
    "base.cu",
    "inputs.cu",
    "products.cu",
    "columns.cu",
    "attention.cu",
    "frames.cu",
    "gather.cu",
)
# no contraction: sums must not depend on what the compiler made of a loop
OPTIONS: Final = ("--fmad=false", "--std=c++17", "-default-device")
_DIGEST_NBYTES: Final = 32
_POINTER: Final = ctypes.c_void_p
_MAPPED: Final = 2  # CU_MEMHOSTREGISTER_DEVICEMAP


class NoKernels(M2CError):
    """The kernels cannot be compiled, loaded or launched here."""


def source() -> str:
    """All kernels as one source: NVRTC knows no folders."""
    return "\n".join((FOLDER / name).read_text() for name in SOURCES)


def kernel_names() -> list[str]:
    """As the compiled module has them."""
    text = source()
    plain = re.findall(r'extern "C" __global__ void (m2c_\w+)\(', text)
    tokens = re.findall(r"^    ROW_KERNELS\(KIND, (\d+),", text, re.MULTILINE)
    coded = re.findall(r"^ROW_KERNELS_OF_CODES\((\d+)\)", text, re.MULTILINE)
    rows = [(kind, count) for kind in coded for count in tokens]
    rows += re.findall(r"^ROW_KERNELS\((\d+), (\d+),", text, re.MULTILINE)
    columns = re.findall(r"^    COLUMN_KERNEL\(KIND, (\d+)\)", text, re.MULTILINE)
    kinds = re.findall(r"^COLUMN_KERNELS_OF\((\d+)\)", text, re.MULTILINE)
    made = [f"m2c_{stem}_{k}_{t}" for k, t in rows for stem in ("product", "gate_up")]
    made += [f"m2c_columns_{k}_{t}" for k in kinds for t in columns]
    return [name for name in plain if not name.endswith("_")] + made


class CudaDriver:
    """Launches the kernels on one GPU, in torch's current stream."""

    def __init__(self, device: torch.device, cache: Path) -> None:
        """cache: folder for compiled kernels. Raises NoKernels."""
        self.device = device
        torch.cuda.set_device(device)
        self._index = torch.cuda.current_device()
        torch.zeros(1, device=device)  # torch makes the context that the driver works in
        self._driver = _library("libcuda.so.1")
        capability = "".join(map(str, torch.cuda.get_device_capability(device)))
        self._module = self._load(capability, cache)
        # all of them now: none may be loaded while launches are recorded
        self._functions = {name: self._function(name) for name in kernel_names()}

    def launch(self, kernel: str, grid: int, block: int, arguments: Sequence[Any]) -> None:
        """arguments: ctypes values, as the kernel's parameters."""
        addresses = (_POINTER * len(arguments))(*map(ctypes.addressof, arguments))
        # what torch.cuda.current_stream asks, without the object it makes around the answer
        stream = _POINTER(torch._C._cuda_getCurrentRawStream(self._index))
        self._check(
            self._driver.cuLaunchKernel(
                self._functions[kernel], grid, 1, 1, block, 1, 1, 0, stream, addresses, None
            ),
            kernel,
        )

    def _function(self, kernel: str) -> Any:
        found = _POINTER()
        self._check(
            self._driver.cuModuleGetFunction(ctypes.byref(found), self._module, kernel.encode()),
            kernel,
        )
        return found

    def _load(self, capability: str, cache: Path) -> Any:
        text = source()
        nvrtc = Nvrtc()
        key = hashlib.sha256(f"{nvrtc.version} {capability} {OPTIONS} {text}".encode()).hexdigest()
        path = cache / f"sm_{capability}-{key[:16]}.cubin"
        module = _POINTER()
        code = _kept(path)
        if code is None or self._driver.cuModuleLoadData(ctypes.byref(module), code):
            code = nvrtc.compile(text, capability)
            self._check(self._driver.cuModuleLoadData(ctypes.byref(module), code), "loading")
            _keep(path, code)
        return module

    def _check(self, failed: int, what: str) -> None:
        if failed:
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(failed, ctypes.byref(name))
            word = name.value.decode() if name.value else str(failed)
            hint = "--kernel torch computes without our kernels"
            raise NoKernels(f"CUDA: {what} failed with {word}", hint)


def pin(address: int, nbytes: int) -> bool:
    """Tell the driver that host memory stays where it is; whether it agrees. Not by the runtime: it
    would remember a refusal, and torch would take it for an error of its next kernel."""
    driver = _library("libcuda.so.1")
    return not driver.cuMemHostRegister_v2(_POINTER(address), ctypes.c_size_t(nbytes), _MAPPED)


def seen_at(address: int) -> int | None:
    """Where kernels find pinned memory of the host; None: they do not."""
    found = _POINTER()
    driver = _library("libcuda.so.1")
    if driver.cuMemHostGetDevicePointer_v2(ctypes.byref(found), _POINTER(address), 0):
        return None
    return found.value


def unpin(address: int) -> None:
    _library("libcuda.so.1").cuMemHostUnregister(_POINTER(address))


def _kept(path: Path) -> bytes | None:
    """What `_keep` wrote, whole: the driver does not look where what it is given ends."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST_NBYTES], data[_DIGEST_NBYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(path: Path, code: bytes) -> None:
    # a cache: without it, the kernels are compiled each time
    with suppress(OSError, M2CError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, hashlib.sha256(code).digest() + code)


class Nvrtc:
    """NVIDIA's compiler as a library. Needs no GPU."""

    def __init__(self) -> None:
        """Raises NoKernels where there is none."""
        self._library = _first_library(_candidates())
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def compile(self, text: str, capability: str) -> bytes:
        """Machine code for a GPU of compute capability `capability` ("86"). Raises NoKernels."""
        nvrtc, program = self._library, _POINTER()
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), b"m2c.cu", 0, None, None
        )  # fmt: skip
        options = [f"--gpu-architecture=sm_{capability}", *OPTIONS]
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            if nvrtc.nvrtcCompileProgram(program, len(options), given):
                log = self._text(program, "ProgramLog").decode(errors="replace")
                lines = [line for line in log.splitlines() if "error" in line] or [log.strip()]
                raise NoKernels(f"NVRTC {self.version}, sm_{capability}: {lines[0][:200]}")
            return self._text(program, "CUBIN")
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: Any, what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self._library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw


def _candidates() -> list[str]:
    """Where NVRTC may be: beside torch, in NVIDIA's own wheels, on the loader's path."""
    packages = Path(torch.__file__).parents[1]
    major = (torch.version.cuda or "").split(".")[0]
    patterns = ("nvidia/*/lib/libnvrtc.so.*", "torch/lib/libnvrtc*.so*")
    found = [path for pattern in patterns for path in sorted(packages.glob(pattern))]
    own = [str(path) for path in found if "builtins" not in path.name and "alt" not in path.name]
    # that of torch's own CUDA first: the driver that runs torch can load what it makes
    own.sort(key=lambda name: not name.endswith(f".so.{major}"))
    return [*own, f"libnvrtc.so.{major}", "libnvrtc.so"]


def _first_library(names: Sequence[str]) -> ctypes.CDLL:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise NoKernels("NVRTC, which compiles the CUDA kernels, is not there")


def _library(name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError:
        raise NoKernels(f"{name} is not there") from None
