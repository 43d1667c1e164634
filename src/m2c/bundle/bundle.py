"""An open bundle: manifest and shard indexes, checked against each other. No payload is read.

Knows nothing about tiers or models; `tiers.ssd` fetches the payload blocks.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from m2c.bundle.files import disk_errors, read_small
from m2c.bundle.manifest import FileFact, Manifest, read_manifest
from m2c.bundle.shard import BLOCK, PAGE, ShardIndex, read_index
from m2c.errors import BadInput

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
            raise BadInput(
                f"{path / name}: not the shard that the manifest names", "pack the model again"
            )
        shards[name] = index
    return shards


def verified_file(path: Path, fact: FileFact) -> bytes:
    data = read_small(path, limit=min(fact.nbytes, MAX_FILE_NBYTES))
    if hashlib.sha256(data).hexdigest() != fact.sha256:
        raise BadInput(f"{path}: damaged", "pack the model again")
    return data


def verify_blocks(index: ShardIndex) -> Iterator[int]:
    """Read a shard's payload, verifying each block; yields the bytes read so far."""
    with disk_errors(index.path), open(index.path, "rb") as file:
        file.seek(PAGE)
        left = index.header.payload_nbytes
        for block in range(len(index.block_hashes)):
            data = file.read(min(BLOCK, left))
            index.verify(block, memoryview(data))
            left -= len(data)
            yield index.header.payload_nbytes - left
