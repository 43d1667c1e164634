"""Several processes at once: readers, checks and packs, of one bundle and of others, with locks and
without."""

import fcntl
import hashlib
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Final

import pytest
from running import MIXES, Run, decode, options_for, same, smallest_dram
from syscalls import KILL, End, Event
from tiny_models import (
    digest,
    job_for,
    pack_again,
    pack_folder,
    require_sound,
    run_pack,
    write_checkpoint,
)
from trials import trials
from watched_pack import OUT, Names, WatchedPack, spread

from m2c.bundle import claim
from m2c.bundle.bundle import Bundle, open_bundle
from m2c.bundle.claim import MARKER
from m2c.bundle.files import TEMPORARY_PREFIX
from m2c.bundle.manifest import MANIFEST
from m2c.check import check_bundle
from m2c.engine import Engine
from m2c.errors import BadInput, Busy, UsageError
from m2c.model.mix import Mix
from m2c.pack import PackJob

MIX: Final = MIXES["5/15/80"]


# -- two packs of one bundle -----------------------------------------------------------------------


def other_pack(
    watched: WatchedPack, folder: Path, call: str, act: Callable[[], None], *, locks: bool = True
) -> End:
    """Pack, and do `act` right before the call of that name."""
    names, met = Names(), []

    def decide(event: Event) -> int:
        if names(event) == call:
            met.append(call)
            act()
        return 0

    end = watched.run(folder, decide, *(() if locks else (pack_without_locks,)))
    assert met
    return end


def pack_without_locks(checkpoint: Path, profile: Path, out: Path) -> None:
    fcntl.flock = lambda descriptor, how: None  # type: ignore[assignment]
    pack_again(checkpoint, profile, out)


def is_first(call: str) -> bool:
    """Whether the folder, and so its lock, is not there yet."""
    return call == f"mkdir {OUT} 1"


@pytest.mark.campaign
def test_the_second_of_two_packs_is_told(
    watched: WatchedPack, calls: list[str], job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    """Trial N: it comes right before call N of the first."""
    told = 0
    for trial in trials("R15-second-pack", ci=4, campaign=len(calls)):
        with trial as seed:
            folder, call = tmp_path / str(seed), calls[spread(seed, len(calls))]
            folder.mkdir()

            def second(folder: Path = folder) -> None:
                nonlocal told
                try:
                    run_pack(job, folder / OUT)
                except Busy:
                    told += 1

            before = told
            assert other_pack(watched, folder, call, second) == End(0)
            # until the folder is locked, the second is the first
            early = is_first(call) or call == "fsync . 1"
            assert told - before == (0 if early else 1), call
            assert digest(folder / OUT) == undisturbed
            shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.campaign
def test_two_packs_where_locks_do_nothing(
    watched: WatchedPack, calls: list[str], job: PackJob, undisturbed: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A whole second pack before call N of the first: either may fail, the bundle is right."""
    monkeypatch.setattr(claim.fcntl, "flock", lambda descriptor, how: None)
    for trial in trials("R15-no-locks", ci=4, campaign=len(calls)):
        with trial as seed:
            folder, call = tmp_path / str(seed), calls[spread(seed, len(calls))]
            folder.mkdir()
            out = folder / OUT

            def second(out: Path = out) -> None:
                run_pack(job, out)
                assert digest_of_bundle(out) == undisturbed

            end = other_pack(watched, folder, call, second, locks=False)
            # its temporary files were taken for those of a pack that was killed
            assert end.code in (0, 4, 6), end
            require_sound(out)
            assert open_bundle(out)
            run_pack(job, out)
            assert digest(out) == undisturbed
            shutil.rmtree(folder)


@pytest.mark.campaign
def test_packs_side_by_side_where_locks_do_nothing(
    watched: WatchedPack, job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    """Three that begin at about the same time; some are killed."""
    for trial in trials("R15-side-by-side", ci=2, campaign=300):
        with trial as seed:
            rng = random.Random(seed)
            out = tmp_path / str(seed) / OUT
            out.parent.mkdir()
            arguments = (watched.checkpoint, watched.profile, out)
            packs = [
                watched.processes.Process(target=pack_without_locks, args=arguments)
                for _ in range(3)
            ]
            for pack in packs:
                pack.start()
                pack.join(rng.random() * 0.05)
            for pack in packs:
                pack.join(rng.random() * 0.3 if rng.random() < 0.3 else None)
                pack.kill()
                pack.join()
                require_sound(out)
            run_pack(job, out)
            assert digest(out) == undisturbed
            shutil.rmtree(out.parent)


def digest_of_bundle(out: Path) -> str:
    """As `digest`, without what a pack that is under way keeps beside the bundle."""
    copy = out.with_name("copy")
    ignore = shutil.ignore_patterns(MARKER, f"{TEMPORARY_PREFIX}*")
    shutil.copytree(out, copy, ignore=ignore)
    try:
        return digest(copy)
    finally:
        shutil.rmtree(copy)


@pytest.mark.campaign
def test_packs_of_two_recipes_where_locks_do_nothing(
    watched: WatchedPack, calls: list[str], job: PackJob, undisturbed: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """They race for an empty folder; shards of both never pass for one bundle."""
    monkeypatch.setattr(claim.fcntl, "flock", lambda descriptor, how: None)
    other = replace(job, exact_type="f16")
    for trial in trials("R15-two-recipes", ci=3, campaign=len(calls)):
        with trial as seed:
            early = [c for c in calls if c.startswith(f"mkdir {OUT} ") or MARKER in c]
            call = early[seed % len(early)] if seed < len(early) else calls[seed]
            folder = tmp_path / str(seed)
            folder.mkdir()
            out = folder / OUT

            def second(out: Path = out) -> None:
                with suppress(UsageError):  # the folder is another recipe's
                    run_pack(other, out)

            end = other_pack(watched, folder, call, second, locks=False)
            assert end.code in (0, 2, 4, 6), end
            require_sound(out)
            shutil.rmtree(folder)


def test_the_folder_is_looked_at_again_under_the_lock(
    job: PackJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another pack, of another recipe, was stopped between our first look and our lock."""

    def lock(descriptor: int, path: Path) -> None:
        (path / MARKER).write_text("another")

    monkeypatch.setattr(claim, "_lock", lock)
    with pytest.raises(UsageError, match="other weights, another profile"):
        run_pack(job, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [MARKER]


# -- readers, checks and packs ---------------------------------------------------------------------


def read(path: Path, mix: Mix, dram: int, answer: Connection) -> None:
    """Decode from the SSD and send what came out."""
    options = options_for(mix, dram=dram)
    with Engine(open_bundle(path), options) as engine:
        ids, logits = decode(engine)
    answer.send((ids, hashlib.sha256(logits.numpy().tobytes()).hexdigest()))


def check(path: Path, answer: Connection) -> None:
    answer.send(list(check_bundle(path, read_data=True)))


def start(processes: ForkServerContext, function: Any, *arguments: Any) -> tuple[Any, Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = processes.Process(target=function, args=(*arguments, theirs))
    process.start()
    theirs.close()
    return process, ours


@pytest.mark.slow
@pytest.mark.campaign
def test_readers_checks_and_a_pack_do_not_meet(
    deep_bundle: Bundle, reference: dict[Mix, Run], watched: WatchedPack, undisturbed: str,
    job: PackJob, tmp_path: Path,
) -> None:  # fmt: skip
    """Each as if alone, whoever is killed meanwhile."""
    dram = smallest_dram(deep_bundle, options_for(MIX))
    ids, logits = reference[MIX]
    expected = ids, hashlib.sha256(logits.numpy().tobytes()).hexdigest()
    processes = watched.processes
    for trial in trials("R15-all-at-once", ci=1, campaign=100):
        with trial as seed:
            rng = random.Random(seed)
            out = tmp_path / str(seed)
            readers = [start(processes, read, deep_bundle.path, MIX, dram) for _ in range(3)]
            checker = start(processes, check, deep_bundle.path)
            packer = processes.Process(
                target=pack_again, args=(watched.checkpoint, watched.profile, out)
            )
            packer.start()
            time.sleep(rng.random() * 0.5)
            victims = [process for process, _ in readers[1:]]
            for process in (*victims, packer):
                if rng.random() < 0.3:
                    process.kill()
            for process, answer in readers:
                process.join()
                if process.exitcode == 0:
                    assert answer.recv() == expected
                else:
                    assert process in victims
                answer.close()
            assert checker[1].recv() == []
            checker[0].join()
            checker[1].close()
            packer.join()
            require_sound(out)
            run_pack(job, out)
            assert digest(out) == undisturbed
            shutil.rmtree(out)


# -- a bundle in use -------------------------------------------------------------------------------


@pytest.mark.campaign
@pytest.mark.parametrize("policy", ["atu", "pinned"])
def test_packing_again_does_not_change_a_run(
    watched: WatchedPack, job: PackJob, undisturbed: str, tmp_path: Path, policy: str
) -> None:
    """A pack that writes every shard anew while they are read from the SSD."""
    out = tmp_path / OUT
    run_pack(job, out)
    options = options_for(MIX, policy=policy)
    options = replace(options, dram=smallest_dram(open_bundle(out), options))
    with Engine(open_bundle(out), options) as engine:
        alone = decode(engine)
        for trial in trials(f"R16-in-use-{policy}", ci=2, campaign=100):
            with trial as seed:
                rng = random.Random(seed)
                (out / MANIFEST).unlink()
                (out / MARKER).write_text(job.recipe)
                for shard in out.rglob("*.int*"):
                    if rng.random() < 0.7:  # these are written anew
                        other = shard.with_name("other")
                        other.write_bytes(b"damaged" + shard.read_bytes()[7:])
                        other.rename(shard)
                call = rng.randrange(1, 120)

                left = iter(range(call, -1, -1))

                def decide(event: Event, left: Iterator[int] = left) -> int:
                    if next(left, None) == 0:
                        assert same(decode(engine), alone)
                    return 0

                assert watched.run(tmp_path, decide) == End(0)
                assert same(decode(engine), alone)
                assert digest(out) == undisturbed


def test_another_model_in_its_place_never_speaks_for_it(tmp_path: Path) -> None:
    """Somebody removes a bundle that runs and packs another under its name."""
    shape = {"num_hidden_layers": 3}
    old, new = (
        job_for(write_checkpoint(tmp_path / f"seed{seed}", shape, seed=seed)) for seed in (0, 1)
    )
    out = tmp_path / "out.m2c"
    run_pack(old, out)
    options = options_for(MIX)
    options = replace(options, dram=smallest_dram(open_bundle(out), options))
    with Engine(open_bundle(out), options) as engine:
        alone = decode(engine)
    with Engine(open_bundle(out), options) as engine:
        shutil.rmtree(out)
        run_pack(new, out)
        with suppress(BadInput):  # a shard that was not open yet is another one now
            assert same(decode(engine), alone)


def test_a_killed_pack_is_no_obstacle(watched: WatchedPack, job: PackJob, tmp_path: Path) -> None:
    end, met = watched.at(tmp_path, f"fsync {OUT}/dense 4", KILL)
    assert (end, met) == (End(None), True)
    descriptor = os.open(tmp_path / OUT, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it
    os.close(descriptor)
    assert run_pack(job, tmp_path / OUT)


def test_bundles_of_two_models_are_packed_at_once(
    watched: WatchedPack, job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    """Another bundle in the same folder is nobody's business."""
    other = pack_folder(write_checkpoint(tmp_path / "checkpoint", seed=1), tmp_path / "one.m2c")
    expected, third = digest(other.path), job_for(tmp_path / "checkpoint")

    def second() -> None:
        run_pack(third, tmp_path / "watched" / "two.m2c")

    (tmp_path / "watched").mkdir()
    assert other_pack(watched, tmp_path / "watched", f"fsync {OUT}/dense 3", second) == End(0)
    assert digest(tmp_path / "watched" / OUT) == undisturbed
    assert digest(tmp_path / "watched" / "two.m2c") == expected
