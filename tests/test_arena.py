"""Memory for weights: aligned for direct reads, in huge pages where the system grants them."""

import re
from pathlib import Path

import numpy as np
import pytest

from m2c.tiers.memory import aligned_buffer
from m2c.units import MiB

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def granted(address: int) -> int:
    """KiB of huge pages in the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    return 0


def test_a_buffer_is_zeroed_and_page_aligned() -> None:
    buffer = aligned_buffer(5000)
    assert buffer.ctypes.data % 4096 == 0
    assert len(buffer) == 8192
    assert not buffer.any()


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="no huge pages here"
)
def test_a_large_buffer_lies_in_huge_pages() -> None:
    buffer = aligned_buffer(64 * MiB)
    buffer[:] = 1
    assert granted(buffer.ctypes.data + 32 * MiB) >= 16 * 1024
    assert int(buffer.sum(dtype=np.int64)) == 64 * MiB
