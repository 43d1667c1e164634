"""The shards of a bundle, written in three steps that go on side by side.

While a group of shards is encoded, the matrices of the next are read, and the shards of the one
before are made durable and hashed.
Shards that an earlier attempt finished are kept. Knows nothing about manifests or checkpoints.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from m2c.bundle.bundle import verify_blocks
from m2c.bundle.files import disk_errors
from m2c.bundle.manifest import ShardFact
from m2c.bundle.shard import read_index
from m2c.encode import Aside, Opened, Tools, write_planes
from m2c.errors import BadInput, StorageError
from m2c.kernels.workers import Workers
from m2c.sections import Group


def write_shards(
    groups: Iterable[Group], path: Path, recipe: str, tools: Tools
) -> tuple[dict[str, ShardFact], int]:
    """Write what is not in the bundle `path` yet; all shards, and the weights of those written.

    Raises what reading and writing raise; groups finished by then stay.
    """
    facts: list[Future[dict[str, ShardFact]]] = []
    weights = 0
    with Aside() as reader, Aside() as finisher:
        for group, opened in _opened(groups, path, recipe, tools.workers, reader):
            finish = None
            if opened is None:
                tools.progress(group.weights)
            else:
                paths = {plane: path / name for plane, name in group.files.items()}
                finish = write_planes(paths, recipe, opened, tools)
                weights += group.weights
            facts.append(finisher.give(partial(_finish, finish, path, group)))
    tools.spent.read += reader.busy
    tools.spent.write += finisher.busy
    return {name: fact for group in facts for name, fact in group.result().items()}, weights


def _opened(
    groups: Iterable[Group], path: Path, recipe: str, workers: Workers, reader: Aside
) -> Iterator[tuple[Group, Opened | None]]:
    """Every group, opened by `reader` while the caller works on the one before.

    Groups of neurons, which hold a layer's FFN, alternate with others: never are two in memory.
    """
    waiting: tuple[Group, Future[Opened | None]] | None = None
    for group in groups:
        opening = reader.give(partial(_open, group, path, recipe, workers))
        if waiting is not None:
            yield waiting[0], waiting[1].result()
        waiting = group, opening
    if waiting is not None:
        yield waiting[0], waiting[1].result()


def _open(group: Group, path: Path, recipe: str, workers: Workers) -> Opened | None:
    """None if an earlier attempt has finished the group's shards."""
    if all(_is_finished(path / name, recipe) for name in group.files.values()):
        return None
    return group.open(workers)


def _finish(finish: Callable[[], None] | None, path: Path, group: Group) -> dict[str, ShardFact]:
    """Make shards durable that were just written (finish: how), and read them for the manifest."""
    if finish is not None:
        finish()
    return {name: _shard_fact(path / name) for name in group.files.values()}


def _is_finished(path: Path, recipe: str) -> bool:
    """A shard of an earlier attempt counts only if it is ours and every block can be read."""
    try:
        index = read_index(path)
        if index.header.recipe != recipe:
            return False
        for _ in verify_blocks(index):
            pass
    except (BadInput, StorageError):
        return False
    return True


def _shard_fact(path: Path) -> ShardFact:
    with disk_errors(path), open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardFact(path.stat().st_size, digest, read_index(path).digest)
