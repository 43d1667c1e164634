"""Fetches a model into the Hugging Face cache: the files m2c reads, each verified before it counts.

Written here because huggingface_hub checks sizes only, and lays a file where every program trusts
it before anybody could verify it. A file comes in as `<hash>.m2c-part`, is hashed, and only then
gets its place; the snapshot and its reference, which make a model findable, come last. Stopped at
any moment, it goes on where it was. Knows nothing about how the hub is asked (`m2c.remote`).
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

from m2c.bundle.files import disk_errors, sync_directory, write_atomic
from m2c.errors import BadInput, Busy, NoSpace, StorageError, UnsupportedModel
from m2c.hub import repo_folder
from m2c.model.hf_folder import CONFIG, INDEX, SINGLE, small_files, weight_map
from m2c.remote import HubFile, Interrupted, Remote
from m2c.units import format_size

Advance = Callable[[int], Any]
PAUSES_S: Final = (1, 2, 4, 8)  # before asking again, when nothing came since the last time
_INDEX_NBYTES = 64 << 20
_RESERVE_NBYTES = 64 << 20  # left free on the disk
_STEP = 4 << 20


class Download:
    """One model on its way. Call in this order: small, weights, survey, fetch, finish; or config
    and finish, for its config.json alone."""

    def __init__(self, repo: str, revision: str) -> None:
        """Asks the hub what there is. Raises BadInput, StorageError, UnsupportedModel."""
        self._remote = Remote(repo, revision)
        self._listing = self._remote.listing()
        self.repo = repo
        self.folder = repo_folder(repo)
        self._blobs = self.folder / "blobs"
        self._wanted: dict[str, HubFile] = {}
        self._refuse_without_weights()

    def config(self) -> None:
        """Fetches config.json, and nothing else."""
        self._make_folder()
        self._fetch_small(CONFIG, small_files([CONFIG])[CONFIG])

    def small(self) -> dict[str, bytes]:
        """Config, tokenizer and the like, fetched: file name to bytes."""
        self._make_folder()
        limits = small_files(self._listing.files)
        if "tokenizer.json" in limits:  # what it was made from is of no use then
            for name in ("tokenizer.model", "added_tokens.json"):
                limits.pop(name, None)
        if SINGLE not in self._listing.files:
            limits[INDEX] = _INDEX_NBYTES
        found = {}
        for name, limit in limits.items():
            file = self._fetch_small(name, limit)
            with disk_errors(self._blobs / file.etag):
                found[name] = (self._blobs / file.etag).read_bytes()
        return found

    def weights(self, small: dict[str, bytes]) -> list[HubFile]:
        """The safetensors files that belong to the model, without what else lies beside them."""
        if SINGLE in self._listing.files:
            return [self._want(SINGLE)]
        shards = weight_map(small[INDEX], f"{self.repo}/{INDEX}").values()
        return [self._want(name) for name in sorted(set(shards))]

    def survey(self, files: list[HubFile], advance: Advance = lambda _: None) -> list[HubFile]:
        """Which of `files` are still to be fetched: those here already are verified first."""
        return [file for file in files if not self._is_intact(file, advance)]

    def here_nbytes(self, files: list[HubFile]) -> int:
        """Bytes that `survey` has to read."""
        blobs = (self._blobs / file.etag for file in files)
        return sum(blob.stat().st_size for blob in blobs if blob.is_file())

    def left_nbytes(self, files: list[HubFile]) -> int:
        """Bytes that are still to come for `files`."""
        parts = ((file, self._part(file)) for file in files)
        have = (min(part.stat().st_size, file.nbytes) for file, part in parts if part.is_file())
        return sum(file.nbytes for file in files) - sum(have)

    def require_space(self, nbytes: int) -> int:
        """Bytes free where the cache is. Raises NoSpace when `nbytes` more do not fit."""
        with disk_errors(self._blobs):
            free = shutil.disk_usage(self._blobs).free
        if nbytes + _RESERVE_NBYTES > free:
            raise NoSpace(
                f"{self.repo} needs {format_size(nbytes)} more, and {format_size(free)} are free "
                f"in {self.folder.parent}",
                "free some space, or give a folder on a larger disk: export HF_HUB_CACHE=DIR",
            )
        return free

    def fetch(self, file: HubFile, advance: Advance = lambda _: None) -> None:
        """Brings `file` into the cache, going on where an earlier try was stopped.

        Raises BadInput for wrong bytes, which are then gone; StorageError when the connection
        breaks again and again, NoSpace on a full disk: what came is kept then.
        """
        path = self._part(file)
        with disk_errors(path), open(path, "a+b") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"another process fetches {file.name} of {self.repo}") from None
            digest = _digest(file)
            have = _hash_file(part, digest, file.nbytes)
            part.truncate(have)
            self._receive(file, part, digest, have, advance)
            if digest.hexdigest() != file.etag:
                path.unlink()
                raise self._wrong(file)
            os.fsync(part.fileno())
            os.rename(path, self._blobs / file.etag)
            sync_directory(self._blobs)

    def finish(self) -> Path:
        """The snapshot folder, once everything in it is there."""
        commit, revision = self._listing.commit, self._remote.revision
        snapshot = self.folder / "snapshots" / commit
        reference = self.folder / "refs" / revision
        with disk_errors(snapshot):
            snapshot.mkdir(parents=True, exist_ok=True)
            for name, file in self._wanted.items():
                _link(snapshot / name, Path("../../blobs") / file.etag)
            sync_directory(snapshot)
            if revision != commit:
                reference.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(reference, commit.encode())
        return snapshot

    def _fetch_small(self, name: str, limit: int) -> HubFile:
        """A file that may have at most `limit` bytes, here when this returns."""
        file = self._want(name)
        if file.nbytes > limit:
            raise BadInput(f"{self.repo}: {name} takes {file.nbytes} bytes, at most {limit} do")
        if not self._is_intact(file):
            self.fetch(file)
        return file

    def _receive(
        self, file: HubFile, part: BinaryIO, digest: Any, have: int, advance: Advance
    ) -> None:
        """Appends to `part`, which holds `have` bytes, what is missing."""
        failures = 0
        while have < file.nbytes:
            before, reason = have, "the connection ended early"
            try:
                with self._remote.read(self._listing.commit, file, have) as chunks:
                    for chunk in chunks:
                        part.write(chunk)
                        digest.update(chunk)
                        have += len(chunk)
                        advance(len(chunk))
                        if have > file.nbytes:
                            part.truncate(0)
                            raise self._wrong(file)
            except Interrupted as error:
                reason = str(error)
            if have < file.nbytes:
                failures = 1 if have > before else failures + 1
                if failures > len(PAUSES_S):
                    raise self._broken(file, have, reason)
                time.sleep(PAUSES_S[failures - 1])

    def _make_folder(self) -> None:
        """Raises StorageError for a disk the cache cannot be on: now, not after hours."""
        with disk_errors(self._blobs):
            self._blobs.mkdir(parents=True, exist_ok=True)
            probe = self._blobs / f".m2c-tmp-{os.getpid()}"
        try:
            probe.symlink_to("nowhere")
            probe.unlink()
        except OSError as error:
            raise StorageError(
                f"{self._blobs}: {os.strerror(error.errno or 0).lower()}",
                "the cache needs a writable disk with links: export HF_HUB_CACHE=DIR",
            ) from None

    def _want(self, name: str) -> HubFile:
        if name not in self._listing.files:
            raise BadInput(f"{self.repo}: {INDEX} names {name}, which is not there")
        self._wanted[name] = self._listing.files[name]
        return self._wanted[name]

    def _part(self, file: HubFile) -> Path:
        return self._blobs / f"{file.etag}.m2c-part"

    def _is_intact(self, file: HubFile, advance: Advance = lambda _: None) -> bool:
        path = self._blobs / file.etag
        with disk_errors(path):
            if not path.is_file() or path.stat().st_size != file.nbytes:
                return False
            digest = _digest(file)
            with path.open("rb") as opened:
                _hash_file(opened, digest, file.nbytes, advance)
        return bool(digest.hexdigest() == file.etag)

    def _refuse_without_weights(self) -> None:
        names = self._listing.files
        if CONFIG in names and (SINGLE in names or INDEX in names):
            return
        if ggufs := sorted(name for name in names if name.endswith(".gguf")):
            raise BadInput(
                f"{self.repo} holds GGUF files, and a name does not say which",
                f"fetch one: hf download {self.repo} {ggufs[0]}, then give the path it prints",
            )
        if any(name.endswith((".bin", ".pth", ".pt")) for name in names):
            raise UnsupportedModel(
                f"{self.repo} has only pickle files, which can run code when they are opened",
                "find a version with safetensors files; where a pull request on the hub adds them, "
                f"give {self.repo}@refs/pr/NUMBER",
            )
        raise BadInput(
            f"{self.repo} is no model that m2c reads: {CONFIG} or {SINGLE} is not there",
            f"look at it: https://huggingface.co/{self.repo}/tree/main",
        )

    def _wrong(self, file: HubFile) -> BadInput:
        return BadInput(
            f"{file.name} of {self.repo} came with other bytes than the hub promises (its hash "
            "differs); they are deleted",
            "run the same command to fetch that file again",
        )

    def _broken(self, file: HubFile, have: int, reason: str) -> StorageError:
        return StorageError(
            f"{file.name} of {self.repo} broke off at {format_size(have)} of "
            f"{format_size(file.nbytes)}: {reason}",
            "what came is kept: run the same command to go on from there",
        )


def _digest(file: HubFile) -> Any:
    if len(file.etag) == 64:
        return hashlib.sha256()
    # git's name of a file: a hash over a header and the bytes
    return hashlib.sha1(f"blob {file.nbytes}\0".encode(), usedforsecurity=False)


def _hash_file(file: BinaryIO, digest: Any, limit: int, advance: Advance = lambda _: None) -> int:
    """Bytes hashed: those there are, or none of a file longer than `limit`."""
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        return 0
    file.seek(0)
    while data := file.read(_STEP):
        digest.update(data)
        advance(len(data))
    return size


def _link(path: Path, target: Path) -> None:
    temporary = path.with_name(f".m2c-tmp-{os.getpid()}-{path.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.rename(path)
