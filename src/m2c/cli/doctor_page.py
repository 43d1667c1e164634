"""The report of `m2c doctor` as a page for people and as JSON for programs.

Knows nothing about how the facts were found.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from m2c.cli.words import tps
from m2c.doctor import Problem, Report, Verdict
from m2c.gpus import Gpu
from m2c.scratch import DiskFacts
from m2c.units import format_size

# what the kernels ask for (kernels/csrc/primitives.c)
_SETS: Final = (
    "avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
)  # fmt: skip


def facts_of(report: Report) -> dict[str, Any]:
    """Bytes, bytes per second, tokens per second."""
    return {**_plain(asdict(report)), "exit_code": report.exit_code}


def page_of(report: Report) -> list[str]:
    """Lines, section by section; each section ends with its problems."""
    v = report.versions
    torch = f"torch {v.torch}" if v.torch else "no torch"
    sections = [
        ("m2c", f"m2c {v.m2c}, Python {v.python}, {torch}, {v.system}", []),
        ("cpu", f"CPU: {report.cpu.model}", _cpu(report)),
        ("memory", f"Memory: {format_size(report.memory.total)}", _memory(report)),
        ("disk", f"Disk: {report.disk.path}", _disk(report)),
        ("gpus", f"GPUs: {len(report.gpus) or 'none'}", [_gpu(gpu) for gpu in report.gpus]),
        ("folders", "Folders", _folders(report)),
        ("models", "Models", _models(report)),
    ]
    lines: list[str] = []
    for name, title, body in sections:
        lines += [title, *(f"  {line}" for line in body)]
        for problem in report.problems:
            if problem.section == name:
                lines += _problem(problem)
        lines.append("")
    return [*lines, _sum(report.problems)]


def _cpu(report: Report) -> list[str]:
    cpu, kernels = report.cpu, report.kernels
    cores = f"{cpu.allowed} of {cpu.cores} cores may be used"
    if cpu.quota:
        cores += f", {cpu.quota.cores:g} cores' worth of time by {cpu.quota.file}"
    lines = [f"{cores}; {report.threads} threads"]
    have = [name for name in _SETS if name in cpu.flags]
    lacks = [name for name in _SETS if name not in cpu.flags]
    lines.append(f"instruction sets: {' '.join(have) or 'none that the C kernels use'}")
    if have and lacks:
        lines[-1] += f"; not {' '.join(lacks)}"
    if kernels.possible:
        built = "the C library is built" if kernels.built else "the C library is not built"
        chosen = kernels.chosen or "none"
        lines.append(f"kernels: {chosen} (of {', '.join(kernels.possible)}); {built}")
    return lines


def _memory(report: Report) -> list[str]:
    memory = report.memory
    lines = [f"{format_size(memory.available)} available, {format_size(report.dram)} as --dram"]
    if memory.limit:
        limit = memory.limit
        size = f"{format_size(limit.nbytes)}, {format_size(limit.used)} of it used"
        lines.append(f"cgroup limit {size}: {limit.file}")
    else:
        lines.append("no cgroup limit")
    lines.append(f"{report.threads} threads read {memory.bytes_per_s / 1e9:.1f} GB/s")
    return lines


def _disk(report: Report) -> list[str]:
    disk = report.disk
    free = f"{format_size(disk.free_nbytes)} of {format_size(disk.total_nbytes)} free"
    words = [disk.device, free]
    if disk.direct is not None:
        words.append("direct reads work" if disk.direct else "direct reads are refused")
    lines = [", ".join(words)]
    if disk.settings:
        lines += ["GB/s of a file just written, by request size and requests in flight:"]
        lines += _grid(disk)
    speed = f"{report.ssd.bytes_per_s / 1e9:.3g} GB/s {report.ssd.source}"
    return [*lines, f"predictions count with {speed}"]


def _grid(disk: DiskFacts) -> list[str]:
    depths = sorted({setting.depth for setting in disk.settings})
    lines = ["         " + "".join(f"{depth:7}" for depth in depths)]
    for nbytes in sorted({setting.request_nbytes for setting in disk.settings}):
        row = {s.depth: s.bytes_per_s for s in disk.settings if s.request_nbytes == nbytes}
        cells = "".join(f"{row[depth] / 1e9:7.2f}" for depth in depths)
        lines.append(f"{nbytes >> 10:5} KiB{cells}")
    return lines


def _gpu(gpu: Gpu) -> str:
    parts = [gpu.name]
    if gpu.nbytes:
        parts.append(format_size(gpu.nbytes))
    if gpu.capability:
        parts.append(f"compute capability {gpu.capability[0]}.{gpu.capability[1]}")
    parts.append("torch can use it" if gpu.usable else "torch cannot use it")
    if gpu.compiler:
        parts.append(f"kernels compiled by NVRTC {gpu.compiler}")
    return ", ".join(parts)


def _folders(report: Report) -> list[str]:
    return [f"{f.what}: {f.path}" for f in report.folders if f.writable]


def _models(report: Report) -> list[str]:
    if not report.models:
        return ["not predicted"]
    lines = ["predicted on the CPU with what was measured above:"]
    return lines + [verdict_line(verdict) for verdict in report.models]


def verdict_line(verdict: Verdict) -> str:
    """`llama2-70b: exact 0.02 tok/s, mixed 0.04 tok/s, needs 94 GiB of SSD`."""
    if verdict.lacks:
        return f"{verdict.model}: {verdict.lacks}"
    modes = (("exact", verdict.exact_tps), ("mixed", verdict.mixed_tps))
    parts = [
        f"{mode} does not fit" if speed is None else f"{mode} {tps(speed)} tok/s"
        for mode, speed in modes
    ]
    gib = verdict.bundle_nbytes / (1 << 30)
    size = f"{gib:.0f} GiB" if gib >= 10 else f"{gib:.1f} GiB"
    where = "packed here" if verdict.packed else f"needs {size} of SSD"
    return f"{verdict.model}: {', '.join(parts)}, {where}"


def _problem(problem: Problem) -> list[str]:
    mark = "!!" if problem.exit_code else " !"
    lines = [f"{mark} {problem.what}"]
    if problem.fix:
        lines.append(f"   next: {problem.fix}")
    return lines


def _sum(problems: list[Problem]) -> str:
    fatal = sum(1 for problem in problems if problem.exit_code)
    if not problems:
        return "No problems."
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} (marked with !)"
    stop = f"{fatal} of them (!!) stop m2c." if fatal else "m2c works all the same."
    return f"{count}; {stop}"


def _plain(value: Any) -> Any:
    """What JSON can say: paths as text, sets sorted."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, frozenset):
        return sorted(value)
    return str(value) if isinstance(value, Path) else value
