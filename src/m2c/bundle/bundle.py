"""An open bundle: manifest and shard indexes, checked against each other. No payload is read.

Knows nothing about tiers or models; `tiers.ssd` fetches the payload blocks.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from m2c.bundle.files import MEND, disk_errors, read_at, read_small
from m2c.bundle.manifest import FileFact, Manifest, read_manifest
from m2c.bundle.shard import BLOCK, PAGE, ShardIndex, read_index
from m2c.errors import BadInput, M2CError

SUFFIX = ".m2c"
MAX_FILE_NBYTES = 1 << 30


@dataclass(frozen=True)
class Bundle:
    path: Path
    manifest: Manifest
    shards: dict[str, ShardIndex]  # "dense/00000.int4" -> index

    def shard(self, kind: str, name: int | str, plane: str) -> ShardIndex:
        """kind: "dense" or "neurons"; name: a layer number, "embed" or "head"."""
        return self.shards[shard_name(kind, name, plane)]

    def file(self, name: str) -> bytes:
        """A side file, verified. Raises BadInput when it is damaged or not of this bundle."""
        if name not in self.manifest.files:
            raise BadInput(f"{self.path}: holds no {name}", "pack the model again")
        return verified_file(self.path / name, self.manifest.files[name])


def shard_name(kind: str, name: int | str, plane: str) -> str:
    return f"{kind}/{name:05d}.{plane}" if isinstance(name, int) else f"{kind}/{name}.{plane}"


def open_bundle(path: Path) -> Bundle:
    """Raises BadInput when the folder is no complete bundle or a shard is not the manifest's."""
    manifest = read_manifest(path)
    return Bundle(path, manifest, open_shards(path, manifest))


def open_shards(path: Path, manifest: Manifest) -> dict[str, ShardIndex]:
    shards = {}
    for name, fact in manifest.shards.items():
        index = read_index(path / name)
        if index.digest != fact.digest:
            raise BadInput(f"{path / name}: not the shard that the manifest names", MEND)
        shards[name] = index
    return shards


def verified_file(path: Path, fact: FileFact) -> bytes:
    data = read_small(path, limit=min(fact.nbytes, MAX_FILE_NBYTES))
    if hashlib.sha256(data).hexdigest() != fact.sha256:
        raise BadInput(f"{path}: damaged", MEND)
    return data


def verify_blocks(index: ShardIndex) -> Iterator[int]:
    """Read a shard's payload, verifying each block; yields the bytes read so far."""
    nbytes = 0
    for damage in block_damage(index):
        if damage is not None:
            raise damage
        nbytes = min(nbytes + BLOCK, index.header.payload_nbytes)
        yield nbytes


def block_damage(index: ShardIndex) -> Iterator[M2CError | None]:
    """For each block of a shard's payload, in order: None, or what is wrong with it."""
    with disk_errors(index.path):
        file = open(index.path, "rb", buffering=0)  # noqa: SIM115
    with file:
        for block in range(len(index.block_hashes)):
            begin = block * BLOCK
            size = min(BLOCK, index.header.payload_nbytes - begin)
            try:
                data = read_at(file.fileno(), size, PAGE + begin, index.path)
                index.verify(block, memoryview(data))
            except M2CError as error:
                yield error
            else:
                yield None
