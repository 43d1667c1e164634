"""Build hook: compile the C kernels where there is a compiler; without one m2c runs on torch.

Environment: CC names the compiler; M2C_NO_NATIVE=1 skips it.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src/m2c/kernels/csrc")
SOURCES = (
    "primitives.c", "scalar.c", "avx2.c", "avx512.c", "inputs.c", "rows.c", "ffn.c", "attention.c",
    "rank.c", "exact.c", "exact2.c", "exact512.c", "frames.c", "encode.c", "steer.c", "layers.c",
    "experts.c", "pool.c",
)  # fmt: skip
# no -march=native: the instruction set is chosen at run time; no -ffast-math: sums keep their order
FLAGS = (
    "-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread",
)  # fmt: skip


class NativeKernels(BuildHookInterface):
    """Adds libm2c.so to the wheel, and marks the wheel as this platform's."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / FOLDER
        library = folder / "libm2c.so"
        # never ship what an earlier build left
        library.unlink(missing_ok=True)
        if os.environ.get("M2C_NO_NATIVE") or not compile_library(folder, library):
            self.app.display_warning("m2c: no C compiler used; kernels will run on torch, slowly")
            return
        machine = platform.machine().lower()
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{machine}"
        build_data["artifacts"].append(str(FOLDER / library.name))


def compile_library(folder: Path, library: Path) -> bool:
    """Whether `library` was built from the sources in `folder`."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "cc", "clang")), None)
    if platform.system() != "Linux" or compiler is None:
        return False
    command = [*compiler.split(), *FLAGS, "-o", str(library), *map(str, sources(folder)), "-lm"]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError):
        library.unlink(missing_ok=True)
        return False
    return True


def sources(folder: Path) -> list[Path]:
    return [folder / name for name in SOURCES]
