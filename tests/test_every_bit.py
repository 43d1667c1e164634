"""R3 for readers: whichever bit of whichever file is flipped, whoever reads it first refuses.

One trial is one flip, and a campaign flips every bit of the bundle once. A bit of
- the manifest goes through `read_manifest`,
- a side file through `Bundle.file`, which hashes it before anybody parses it,
- a shard's header or index through `open_shards`, told of that shard alone,
- a shard's payload through `SsdReader.read_now` of the block that it lies in, from the file.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from trials import trials

from m2c.bundle.bundle import Bundle, open_shards
from m2c.bundle.manifest import MANIFEST, read_manifest
from m2c.bundle.shard import BLOCK, PAGE
from m2c.errors import BadInput
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import SsdReader

_STRIDE = 7_368_787  # a prime: seeds in order visit all bits, here and there


@pytest.fixture
def copy(tiny_bundle: Bundle, tmp_path: Path) -> Iterator[Bundle]:
    """In memory where there is a file system for that: a campaign writes millions of times."""
    shm = Path("/dev/shm")
    folder = shm / f"m2c-every-bit-{os.getpid()}" if os.access(shm, os.W_OK) else tmp_path / "copy"
    shutil.copytree(tiny_bundle.path, folder)
    try:
        yield Bundle(folder, read_manifest(folder), open_shards(folder, read_manifest(folder)))
    finally:
        shutil.rmtree(folder)


@pytest.mark.campaign
def test_every_bit_of_every_file(copy: Bundle) -> None:
    manifest, buffer = copy.manifest, aligned_buffer(BLOCK)
    names = [MANIFEST, *sorted(manifest.files), *sorted(manifest.shards)]
    sizes = [(copy.path / name).stat().st_size for name in names]
    bits = 8 * sum(sizes)
    files = {name: os.open(copy.path / name, os.O_RDWR) for name in names}
    with closing(SsdReader(1)) as reader:

        def read(name: str, at: int) -> None:
            """What is the first to read byte `at` of the file."""
            if name == MANIFEST:
                read_manifest(copy.path)
            elif name in manifest.files:
                copy.file(name)
            elif PAGE <= at < PAGE + copy.shards[name].header.payload_nbytes:
                block = (at - PAGE) // BLOCK
                reader.read_now(copy.shards[name], [(block, block + 1)], buffer)
            else:
                open_shards(copy.path, replace(manifest, shards={name: manifest.shards[name]}))

        for trial in trials("R3-every-bit", ci=3000, campaign=bits):
            with trial as seed:
                at, bit = divmod(seed * _STRIDE % bits, 8)
                place = 0
                while at >= sizes[place]:
                    at -= sizes[place]
                    place += 1
                name, file = names[place], files[names[place]]
                byte = os.pread(file, 1, at)
                os.pwrite(file, bytes([byte[0] ^ 1 << bit]), at)
                with pytest.raises(BadInput, match=name):
                    read(name, at)
                os.pwrite(file, byte, at)
        for name, size in zip(names, sizes, strict=True):  # and without a flip all is well
            for at in (0, size // 2, size - 1):
                read(name, at)
    for file in files.values():
        os.close(file)
