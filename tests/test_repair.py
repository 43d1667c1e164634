"""R4: `check` finds every damage and says where; `pack --repair` rewrites just that."""

import fcntl
import os
import random
import shutil
import signal
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from command_line import m2c, m2c_ok
from damages import Damaged, damage
from every_mode import SHAPE, Subject
from tiny_models import (
    digest,
    job_for,
    mend_again,
    run_pack,
    run_repair,
    write_checkpoint,
)
from trials import trials

from m2c.bundle.bundle import Bundle
from m2c.bundle.claim import MARKER
from m2c.bundle.files import TEMPORARY_PREFIX
from m2c.bundle.manifest import MANIFEST, encode_manifest, read_manifest
from m2c.bundle.shard import BLOCK, PAGE
from m2c.errors import BadInput, Busy, UsageError


@pytest.fixture
def copy(subject: Subject, tmp_path: Path) -> Path:
    return subject.copied(tmp_path / "copy.m2c")


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), at)


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """Of every file: which it is and when it was written."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files
    }


# -- any damage ------------------------------------------------------------------------------------


@pytest.mark.campaign
def test_damage_is_named_and_mended(subject: Subject, tmp_path: Path) -> None:
    """One to three files are damaged; each is named, with the place; they and no others are
    rewritten; what comes out is the undisturbed bundle, bit for bit."""
    whole, copy = digest(subject.bundle.path), tmp_path / "copy.m2c"
    for trial in trials("R4-repair", ci=10, campaign=3000):
        with trial as seed:
            rng = random.Random(seed)
            subject.copied(copy)
            found = damages(copy, subject, rng)
            before = inodes(copy)
            said = m2c("check", copy, "-q")
            assert (said.code, said.out) == (4, "")
            for one in found.values():
                require_named(one, said.err, subject.bundle, manifest=MANIFEST in found)
            if is_of_another(copy):
                # a sound manifest of other weights is not damage: it takes a person to say so
                with pytest.raises(UsageError, match="was made from other weights"):
                    run_repair(subject.job, copy)
                (copy / MANIFEST).unlink()
            mended = run_repair(subject.job, copy)
            assert digest(copy) == whole
            if MANIFEST in found:
                assert mended == [MANIFEST]  # the rest by pack, which keeps or rewrites groups
                continue
            assert mended == sorted(found)
            after = inodes(copy)
            assert {name for name in before if before[name] != after[name]} == set(found)


def is_of_another(copy: Path) -> bool:
    """Whether the manifest is sound; of one that is damaged it can only be the donor's."""
    try:
        return read_manifest(copy).source.name != "source"
    except BadInput:
        return False


def damages(copy: Path, subject: Subject, rng: random.Random) -> dict[str, Damaged]:
    """By name. A file is damaged once: damage drawn twice could undo itself."""
    found: dict[str, Damaged] = {}
    while len(found) < rng.randint(1, 3):
        one = damage(copy, subject.bundle, subject.donor, rng)
        found[one.name] = one
    return found


def require_named(one: Damaged, text: str, bundle: Bundle, *, manifest: bool) -> None:
    """In what `check` says; a damaged manifest is all it can see, and one of another bundle makes
    all else wrong."""
    if manifest:
        assert MANIFEST in text or "not the shard that the manifest names" in text
        return
    lines = [line for line in text.splitlines() if one.name in line]
    assert lines, text
    if not one.local or one.name not in bundle.shards:
        return  # the length is wrong, or it is a side file, hashed as a whole
    index = bundle.shards[one.name]
    end = PAGE + index.header.payload_nbytes
    if one.kind.startswith(("foreign", "stale")) and (one.start < PAGE or one.stop > end):
        return  # a header or an index that is sound in itself is only not the manifest's
    if one.stop <= PAGE:
        assert any(w in lines[0] for w in ("bytes 0 to 4095", "first 8 bytes", "shard format"))
    elif one.start >= end:
        assert f"damaged index, from byte {end}" in lines[0]
    elif one.start >= PAGE and one.stop <= end:
        for at in (one.start, one.stop - 1):
            block = (at - PAGE) // BLOCK
            place = f"damaged at byte {PAGE + block * BLOCK} (block {block})"
            assert any(place in line for line in lines)


# -- one by one ------------------------------------------------------------------------------------


def test_a_sound_bundle_is_not_touched(subject: Subject, copy: Path) -> None:
    before = inodes(copy)
    assert run_repair(subject.job, copy) == []
    assert inodes(copy) == before


def test_every_damaged_block_is_named(subject: Subject, copy: Path) -> None:
    for block in range(2):
        flip(copy / "neurons/00001.int4", PAGE + block * BLOCK + 9)
    said = m2c("check", copy, "-q")
    for block in range(2):
        assert f"neurons/00001.int4: damaged at byte {PAGE + block * BLOCK} (block" in said.err
    assert said.err.endswith(f"m2c pack MODEL --ssd {copy.parent} --name copy --repair\n")


def test_all_that_is_gone_is_made_again(subject: Subject, copy: Path) -> None:
    for folder in ("dense", "neurons", "model"):
        shutil.rmtree(copy / folder)
    run_repair(subject.job, copy)
    assert digest(copy) == digest(subject.bundle.path)


@pytest.mark.parametrize("left", ["damaged", "empty", "gone"])
def test_a_manifest_is_made_again(subject: Subject, copy: Path, left: str) -> None:
    if left == "gone":
        (copy / MANIFEST).unlink()
    elif left == "empty":
        (copy / MANIFEST).write_bytes(b"")
    else:
        flip(copy / MANIFEST, 99)
    flip(copy / "dense/00001.fp16", PAGE + 1)
    before = inodes(copy)
    assert run_repair(subject.job, copy) == [MANIFEST]
    assert digest(copy) == digest(subject.bundle.path)
    after = inodes(copy)
    kept = [name for name in subject.bundle.shards if not name.startswith("dense/00001.")]
    assert [after[name] for name in kept] == [before[name] for name in kept]


def test_the_manifest_decides_not_the_options(subject: Subject, copy: Path) -> None:
    """Only what goes into shards has to be given again."""
    flip(copy / "dense/00001.fp16", PAGE + 1)
    other = replace(subject.job, mix_request="entropy", budget_bits=7.0, exact_type="f16")
    assert run_repair(other, copy) == ["dense/00001.fp16"]
    assert digest(copy) == digest(subject.bundle.path)


def test_the_command(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    m2c_ok("profile", source, "--tokens", 32, "-q")
    words = ("pack", source, "--ssd", tmp_path, "--name", "mine")
    assert "mine.m2c: no such bundle" in m2c(*words, "--repair").reason
    path = Path(m2c_ok(*words).strip())
    whole = digest(path)
    assert m2c(*words, "--repair").err == f"m2c: {path}: nothing was damaged\n"
    flip(path / "neurons/00001.int8", PAGE)
    (path / "model/config.json").unlink()
    assert m2c("run", path, "-p", "x").code == 4
    said = m2c(*words, "--repair")
    assert (said.code, said.out) == (0, f"{path}\n")
    assert said.err.splitlines() == [
        f"m2c: {path}: {name} was rewritten" for name in ("model/config.json", "neurons/00001.int8")
    ]
    assert digest(path) == whole
    assert "ok (every byte)" in m2c_ok("check", path)
    assert m2c(*words, "--repair", "--plan").code == 2


# -- refused ---------------------------------------------------------------------------------------


def test_another_model_or_profile_mends_nothing(
    subject: Subject, copy: Path, tmp_path: Path
) -> None:
    flip(copy / "neurons/00001.int8", PAGE)
    before = inodes(copy)
    others = {
        "other weights": job_for(write_checkpoint(tmp_path / "other", SHAPE, seed=1)),
        "another profile": replace(
            subject.job, importance=subject.job.importance.without_directions()
        ),
    }
    for reason, job in others.items():
        with pytest.raises(UsageError, match=reason):
            run_repair(job, copy)
    (copy / MANIFEST).unlink()
    for job in others.values():
        with pytest.raises(UsageError, match="holds no shard of this model and profile"):
            run_repair(job, copy)
    del before[MANIFEST]
    assert inodes(copy) == before


def test_what_comes_out_differently_is_not_put_in_place(subject: Subject, copy: Path) -> None:
    """A source or an m2c that makes other bytes: the manifest must not be betrayed."""
    forged = dict(subject.bundle.manifest.shards)
    forged["dense/00000.int8"] = replace(forged["dense/00000.int8"], sha256="0" * 64)
    manifest = replace(subject.bundle.manifest, shards=forged)
    (copy / MANIFEST).write_bytes(encode_manifest(manifest))
    before = inodes(copy)
    with pytest.raises(UsageError, match=r"dense/00000\.int8: what was made again is not"):
        run_repair(subject.job, copy)
    sidecars = {**subject.job.sidecars, "config.json": b"{}"}
    flip(copy / "model/config.json", 1)
    before = inodes(copy)
    with pytest.raises(UsageError, match=r"model/config\.json: what was made again is not"):
        run_repair(replace(subject.job, sidecars=sidecars), copy)
    assert inodes(copy) == before


def test_somebody_elses_folder_is_not_mended(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"dear")
    with pytest.raises(UsageError, match="holds no shard"):
        run_repair(subject.job, tmp_path)
    (tmp_path / "link").symlink_to(subject.bundle.path)
    with pytest.raises((BadInput, UsageError), match="link"):
        run_repair(subject.job, tmp_path / "link")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "photo.jpg"]


# -- half mended -----------------------------------------------------------------------------------


@pytest.mark.campaign
def test_a_repair_that_is_killed(
    subject: Subject, processes: ForkServerContext, tmp_path: Path
) -> None:
    """Killed before any fsync or rename: every file is what it was or what it should be, the
    bundle is refused until the last is mended, and the next repair ends it."""
    whole, copy = digest(subject.bundle.path), tmp_path / "copy.m2c"
    for trial in trials("R4-killed", ci=4, campaign=200):
        with trial as seed:
            rng = random.Random(seed)
            subject.copied(copy)
            found = damages(copy, subject, rng)
            if is_of_another(copy):
                (copy / MANIFEST).unlink()
            torn = {name: (copy / name).read_bytes() for name in found if (copy / name).exists()}
            arguments = (subject.job.checkpoint.path, subject.profile, copy, rng.randint(1, 30))
            process = processes.Process(target=mend_again, args=arguments)
            process.start()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            require_old_or_new(copy, subject, torn)
            run_repair(subject.job, copy)
            assert digest(copy) == whole


def test_a_manifest_goes_behind_a_marker(
    subject: Subject, processes: ForkServerContext, tmp_path: Path
) -> None:
    """Killed at each of its first steps, a repair leaves what a plain pack or a repair ends."""
    for call in range(1, 6):
        copy = subject.copied(tmp_path / "copy.m2c")
        flip(copy / MANIFEST, 99)
        arguments = (subject.job.checkpoint.path, subject.profile, copy, call)
        process = processes.Process(target=mend_again, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        again = run_repair if (copy / MANIFEST).exists() else run_pack
        again(subject.job, copy)
        assert digest(copy) == digest(subject.bundle.path)


def require_old_or_new(copy: Path, subject: Subject, torn: dict[str, bytes]) -> None:
    old = []
    for name in inodes(copy):
        if Path(name).name.startswith(TEMPORARY_PREFIX) or name == MARKER:
            continue
        data = (copy / name).read_bytes()
        if data != (subject.bundle.path / name).read_bytes():
            assert data == torn[name]
            old.append(name)
    gone = [name for name in torn if not (copy / name).exists()]
    assert gone in ([], [MANIFEST])
    if old or gone:
        assert m2c("check", copy, "-q").code == 4


def test_two_at_once(subject: Subject, copy: Path) -> None:
    flip(copy / "neurons/00001.int8", PAGE)
    before = inodes(copy)
    other = os.open(copy, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Busy):
            run_repair(subject.job, copy)
        (copy / MANIFEST).rename(copy.parent / MANIFEST)
        with pytest.raises(Busy):
            run_repair(subject.job, copy)
        (copy.parent / MANIFEST).rename(copy / MANIFEST)
    finally:
        os.close(other)
    assert inodes(copy) == before
