"""`m2c pack --repair`: rewrite the files of a bundle that are damaged, and no others.

The manifest says what every file must be. A file is made again from the checkpoint and its profile,
and takes the damaged one's place by a rename once its sha256 is the manifest's: so at every moment
each file is what it was or what it should be, and a damaged bundle is refused until the last is.
Where the manifest itself is damaged it is removed first, and `pack` finishes the folder as it
finishes one that was stopped. Knows nothing about printing.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from m2c.bundle.bundle import Bundle
from m2c.bundle.claim import claim_folder
from m2c.bundle.files import disk_errors, put_in_place, temporary_name, write_atomic
from m2c.bundle.manifest import MANIFEST, FileFact, Manifest, MixChoice, ShardFact, read_manifest
from m2c.bundle.shard import read_index
from m2c.check import find_damage
from m2c.encode import Spent, Tools, write_planes
from m2c.errors import BadInput, M2CError, UsageError
from m2c.kernels.encoder import load_encoder
from m2c.kernels.workers import Workers
from m2c.pack import PackJob, pack, require_matching, side_files
from m2c.sections import Group, shard_groups
from m2c.steer import Steering

_OTHERS: Final = "give the model, the --profile and the m2c it was packed with"


def repair(
    job: PackJob, path: Path, *, workers: Workers,
    choose_mix: Callable[[Bundle], tuple[MixChoice, dict[str, float]]],
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[str]:  # fmt: skip
    """Names of the files that were rewritten, of those that the manifest names or itself.

    `progress` is told the bytes of shards that were looked at. choose_mix: as for `pack`, asked
    only where the manifest had to be made again. Raises UsageError where the bundle is of another
    model or profile, and what `pack` raises; what was mended by then stays.
    """
    require_matching(job)
    try:
        manifest = read_manifest(path)
    except BadInput:
        _require_ours(job, path)
        pack(job, path, workers=workers, choose_mix=choose_mix, reclaim=True)
        return [MANIFEST]
    if manifest.source.fingerprint != job.checkpoint.fingerprint():
        raise UsageError(f"{path} was made from other weights than {job.checkpoint.path}", _OTHERS)
    job = replace(job, exact_type=manifest.exact_type)
    with claim_folder(path, manifest.recipe):
        damaged = {d.name for d in find_damage(path, manifest, read_data=True, progress=progress)}
        _require_same_recipe(job, path, sorted(set(manifest.shards) - damaged))
        _mend_files(job, path, manifest, damaged)
        _mend_shards(job, path, manifest, damaged, workers)
    return sorted(damaged)


def _mend_files(job: PackJob, path: Path, manifest: Manifest, damaged: set[str]) -> None:
    if not damaged & set(manifest.files):
        return
    contents = side_files(job)
    for name in sorted(damaged & set(manifest.files)):
        data = contents.get(name, b"")
        _require_same(path / name, hashlib.sha256(data).hexdigest(), manifest.files[name])
        write_atomic(path / name, data)


def _mend_shards(
    job: PackJob, path: Path, manifest: Manifest, damaged: set[str], workers: Workers
) -> None:
    """A group of shards is encoded together; only those that are damaged are put in place."""
    tools = Tools(job.exact_type, workers, load_encoder(), lambda weights: None, Spent())
    recipe, steering = job.shard_recipe, Steering(job.exact_type, tools.encoder)
    for group in shard_groups(job.checkpoint, job.importance, steering):
        names = damaged & set(group.files.values())
        if names:
            with _made_again(group, path, recipe, tools) as made:
                for name in sorted(names):
                    with disk_errors(made[name]), open(made[name], "rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                    _require_same(path / name, digest, manifest.shards[name])
                for name in sorted(names):
                    _put(made[name], path / name)


@contextmanager
def _made_again(group: Group, path: Path, recipe: str, tools: Tools) -> Iterator[dict[str, Path]]:
    """The group's shards, complete and durable, under names that readers ignore: name to file."""
    made = {name: temporary_name(path / name) for name in group.files.values()}
    try:
        paths = {plane: made[name] for plane, name in group.files.items()}
        write_planes(paths, recipe, group.open(tools.workers), tools)()
        yield made
    finally:
        for file in made.values():
            file.unlink(missing_ok=True)


def _put(made: Path, path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{path} is not a regular file", "remove it yourself")
    with disk_errors(path):
        put_in_place(made, path)


def _require_same(path: Path, sha256: str, fact: FileFact | ShardFact) -> None:
    if sha256 != fact.sha256:
        raise UsageError(f"{path}: what was made again is not what the manifest names", _OTHERS)


def _require_same_recipe(job: PackJob, path: Path, intact: list[str]) -> None:
    """Said before anything is encoded; what the manifest names is compared again after it."""
    if intact and read_index(path / intact[0]).header.recipe != job.shard_recipe:
        raise UsageError(f"{path} was packed with another profile", _OTHERS)


def _require_ours(job: PackJob, path: Path) -> None:
    """Without a manifest the shards say whose folder it is. Raises UsageError if none is this
    job's, BadInput if there is no such folder."""
    if path.is_symlink() or not path.is_dir():
        raise BadInput(f"{path}: no such bundle", "m2c pack without --repair makes it")
    recipe = job.shard_recipe
    for file in sorted(
        p for kind in ("dense", "neurons") for p in path.glob(f"{kind}/[0-9a-z]*.*")
    ):
        try:
            if read_index(file).header.recipe == recipe:
                return
        except M2CError:
            continue
    raise UsageError(f"{path} holds no shard of this model and profile", _OTHERS)
