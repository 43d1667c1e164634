"""Ways a bundle's files get damaged, each drawn from a seed, and what a check must then say.

`donor` is another model of the same shape: where stale blocks and foreign shards come from.
Knows nothing about pytest.
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from m2c.bundle.bundle import Bundle
from m2c.bundle.manifest import MANIFEST
from m2c.bundle.shard import BLOCK, PAGE

SECTOR = 4096


@dataclass(frozen=True)
class Damaged:
    """kind of damage; name: of the file in the bundle. [start, stop): the bytes that changed, or
    nothing where the file is not of its length any more."""

    kind: str
    name: str
    start: int = 0
    stop: int = 0

    @property
    def local(self) -> bool:
        return self.stop > self.start


def damage(folder: Path, bundle: Bundle, donor: Path, rng: random.Random) -> Damaged:
    """Damage one file of `folder`, a copy of `bundle`; all bytes of all files are as likely."""
    names = [MANIFEST, *bundle.manifest.files, *bundle.manifest.shards]
    sizes = [(bundle.path / name).stat().st_size for name in names]
    (name,) = rng.choices(names, sizes)
    kind = rng.choice(list(KINDS))
    data = (bundle.path / name).read_bytes()
    changed = KINDS[kind](data, (donor / name).read_bytes(), rng)
    if changed is None or changed == data:
        kind, changed = "bit", _flip(data, rng, 1)
    write(folder / name, changed)
    if len(changed) != len(data):
        return Damaged(kind, name)
    differ = [i for i in range(len(data)) if data[i] != changed[i]]
    return Damaged(kind, name, differ[0], differ[-1] + 1)


def write(path: Path, data: bytes) -> None:
    """Over what is there, as a disk that errs does: same inode."""
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()
        os.fsync(file.fileno())


def copy_back(folder: Path, bundle: Bundle, found: Damaged) -> None:
    write(folder / found.name, (bundle.path / found.name).read_bytes())


Kind = Callable[[bytes, bytes, random.Random], bytes | None]


def _flip(data: bytes, rng: random.Random, bits: int) -> bytes:
    changed = bytearray(data)
    for at in rng.sample(range(8 * len(data)), bits):
        changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def _burst(data: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A run of at most 32 bits that begins and ends with an error."""
    length = rng.randint(2, 32)
    pattern = rng.getrandbits(length) | 1 | 1 << length - 1
    at = rng.randrange(8 * len(data) - length + 1)
    whole = int.from_bytes(data, "little") ^ pattern << at
    return whole.to_bytes(len(data), "little")


def _swapped(size: int) -> Kind:
    """Two pieces of `size` bytes of the payload change places."""

    def swap(data: bytes, donor: bytes, rng: random.Random) -> bytes | None:
        pieces = (len(data) - PAGE) // size
        if pieces < 2:
            return None
        one, two = (PAGE + i * size for i in sorted(rng.sample(range(pieces), 2)))
        middle = data[one + size : two]
        return b"".join(
            (data[:one], data[two : two + size], middle, data[one : one + size], data[two + size :])
        )

    return swap


def _zeroed(data: bytes, donor: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(-(-len(data) // SECTOR)) * SECTOR
    gone = min(SECTOR, len(data) - at)
    return data[:at] + bytes(gone) + data[at + gone :]


def _stale(size: int) -> Kind:
    """A piece as it was in another version of the file."""

    def stale(data: bytes, donor: bytes, rng: random.Random) -> bytes:
        at = rng.randrange(-(-len(data) // size)) * size
        return (data[:at] + donor[at : at + size] + data[at + size :])[: len(data)]

    return stale


def _truncated(data: bytes, donor: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _longer(data: bytes, donor: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((bytes, rng.randbytes))(rng.choice((1, 8, SECTOR, BLOCK)))


KINDS: dict[str, Kind] = {
    "bit": lambda data, donor, rng: _flip(data, rng, 1),
    "two bits": lambda data, donor, rng: _flip(data, rng, 2),
    "three bits": lambda data, donor, rng: _flip(data, rng, 3),
    "burst": _burst,
    "swapped sectors": _swapped(SECTOR),
    "swapped blocks": _swapped(BLOCK),
    "zeroed sector": _zeroed,
    "stale sector": _stale(SECTOR),
    "stale block": _stale(BLOCK),
    "foreign file": lambda data, donor, rng: donor,
    "truncated": _truncated,
    "longer": _longer,
}
