"""`m2c doctor`: what this machine is, what it will do with which model, and what stands in the way.

Works where m2c itself does not: without torch, C library, GPU, home folder or room on the disk.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m2c.cli import options
from m2c.cli.console import progress, result, result_page

if TYPE_CHECKING:
    from m2c.doctor import Kernels, Problem, Report
    from m2c.scratch import DiskFacts

EXAMPLE = "Example: m2c doctor --ssd /mnt/nvme"


def command(
    ssd: options.Ssd = None,
    dram: options.Dram = None,
    threads: options.Threads = None,
    kernel: options.Kernel = "auto",
    no_disk: Annotated[
        bool, typer.Option("--no-disk", help="Do not measure the disk: write no temporary file.")
    ] = False,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Say what this machine can do, and what stands in the way.

    Looks at processor, memory, container limits, disk, GPUs, installation and folders, and predicts
    each known model's speed on the CPU. The disk is measured with a temporary file of up to 512
    MiB, in the folder of --ssd, else in m2c's home. Every problem comes with what to type next.

    The exit code is 0 while m2c can run. Else it is that of the first obstacle: 2 kernels that
    cannot be had, 4 a broken torch or C library, 6 an --ssd that cannot be written, 7 too little
    memory for any model.
    """
    from m2c.bundle.strict import dump_json
    from m2c.cli.doctor_page import facts_of, page_of
    from m2c.cli.names import parse_budget

    budget = parse_budget(dram)
    report = _examined(ssd, budget, threads, kernel, probe=not no_disk, quiet=quiet)
    if json_output:
        result(dump_json(facts_of(report)).decode())
    else:
        result_page(page_of(report))
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _examined(
    ssd: Path | None, dram: int | None, threads: int | None, kernel: str, *, probe: bool,
    quiet: bool,
) -> "Report":  # fmt: skip
    from m2c import doctor
    from m2c.gpus import find_gpus
    from m2c.hardware import auto_dram, auto_threads, read_cpu

    versions, torch = doctor.read_versions()
    kernels, obstacle = _kernels(kernel, torch is not None)
    threads = threads or auto_threads()
    memory = doctor.read_memory(threads)
    budget = auto_dram() if dram is None else dram
    disk = _disk(ssd, probe, quiet)
    report = doctor.Report(
        versions=versions, cpu=read_cpu(), kernels=kernels, threads=threads, memory=memory,
        dram=budget, disk=disk, ssd=doctor.ssd_speed(disk), gpus=find_gpus(torch),
        folders=doctor.read_folders(ssd),
    )  # fmt: skip
    if kernels.chosen:
        _predict(report, ssd, kernel, quiet)
    found = doctor.problems_of(report, asked_for_probe=probe)
    report.problems = [*([obstacle] if obstacle else []), *found]
    return report


def _kernels(choice: str, has_torch: bool) -> "tuple[Kernels, Problem | None]":
    from m2c.doctor import Kernels, read_kernels

    if not has_torch:  # which the code that asks the library needs
        return Kernels("", (), False), None
    return read_kernels(choice)


def _disk(ssd: Path | None, probe: bool, quiet: bool) -> "DiskFacts":
    from m2c.home import home
    from m2c.scratch import STEPS, read_disk

    try:
        place = ssd or home()
    except RuntimeError:  # nobody's home
        place = Path("/tmp")
    with progress("disk", STEPS, unit="step", quiet=quiet or not probe) as advance:
        return read_disk(place, probe=probe, progress=advance)


def _predict(report: "Report", ssd: Path | None, kernel: str, quiet: bool) -> None:
    from m2c.doctor import packed_under, verdicts
    from m2c.engine import RunOptions
    from m2c.model.aliases import ALIASES

    chosen = RunOptions(dram=report.dram, threads=report.threads, kernel=kernel)
    with progress("models", len(ALIASES), unit="model", quiet=quiet) as advance:
        report.models = verdicts(
            chosen, report.memory.bytes_per_s, report.ssd.bytes_per_s, report.disk.free_nbytes,
            packed_under(ssd), advance,
        )  # fmt: skip
