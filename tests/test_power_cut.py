"""Power that fails during a pack: the old state or the new one, and packing again finishes it."""

import hashlib
import random
import shutil
from pathlib import Path

import pytest
from powercut import History, cuts, history_of, put, random_cut
from syscalls import KILL, End, Event
from tiny_models import digest, run_pack
from trials import trials
from watched_pack import Names, WatchedPack, spread

from m2c.bundle.bundle import open_bundle
from m2c.bundle.files import TEMPORARY_PREFIX
from m2c.check import check_bundle
from m2c.errors import BadInput
from m2c.pack import PackJob

State = dict[str, bytes | None]
Trace = list[Event]


def traced(watched: WatchedPack, folder: Path, kill_at: str = "") -> tuple[Trace, End]:
    """A pack's writing calls, up to the one of that name, and how it ended."""
    events: Trace = []
    names = Names()

    def decide(event: Event) -> int:
        if names(event) == kill_at:
            return KILL
        events.append(event)
        return 0

    end = watched.run(folder, decide)
    return events, end


@pytest.fixture(scope="module")
def events(watched: WatchedPack, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The calls of a pack that nothing happens to."""
    found, end = traced(watched, tmp_path_factory.mktemp("traced"))
    assert end == End(0)
    return found


def require_old_or_new(state: State, folder: Path, job: PackJob, undisturbed: str) -> bool:
    """Whether the bundle is complete; if it is not, that it is refused and can be finished."""
    put(state, folder)
    out = folder / "out.m2c"
    try:
        open_bundle(out)
        complete = True
    except BadInput:
        complete = False
    if complete:
        assert not list(check_bundle(out, read_data=True))
    run_pack(job, out)
    assert digest(out) == undisturbed
    shutil.rmtree(folder)
    return complete


def identity(state: State) -> str:
    return hashlib.sha256(repr(sorted(state.items())).encode()).hexdigest()


def test_every_write_is_seen(events: Trace, undisturbed: str, tmp_path: Path) -> None:
    """The calls alone give the same files, and no call is of a kind the model does not know."""
    put(history_of(events).state(len(events), lambda i: "keep"), tmp_path / "again")
    assert digest(tmp_path / "again" / "out.m2c") == undisturbed


def test_a_bundle_that_was_announced_stays(
    events: Trace, job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    """Whatever a cut right after the end of the pack undoes, the bundle is not part of it."""
    for i, state in enumerate(cuts(history_of(events), len(events), random.Random(0))):
        assert require_old_or_new(state, tmp_path / str(i), job, undisturbed)


@pytest.mark.slow
@pytest.mark.campaign
def test_a_cut_at_every_call(events: Trace, job: PackJob, undisturbed: str, tmp_path: Path) -> None:
    """Trial N: every state that a cut before call N may leave."""
    history, seen = history_of(events), set()
    for trial in trials("R2-every-call", ci=3, campaign=len(events) + 1):
        with trial as seed:
            step = spread(seed, len(events) + 1)
            for state in cuts(history, step, random.Random(seed)):
                if (name := identity(state)) not in seen:
                    seen.add(name)
                    require_old_or_new(state, tmp_path / "cut", job, undisturbed)


@pytest.mark.parametrize("name", ["out.m2c", "out.m2c/dense", "out.m2c/neurons"])
def test_names_that_a_killed_pack_left_are_made_durable(
    watched: WatchedPack, calls: list[str], job: PackJob, undisturbed: str, tmp_path: Path,
    name: str,
) -> None:  # fmt: skip
    """Killed between the last rename in a folder and its fsync: the next pack has none there."""
    syncs = [call for call in calls if call.startswith(f"fsync {name} ")]
    last = max(syncs, key=lambda call: int(call.split()[2]))
    finish_and_cut(watched, tmp_path, last, random.Random(0), job, undisturbed)


@pytest.mark.slow
@pytest.mark.campaign
def test_killed_finished_and_then_cut(
    watched: WatchedPack, calls: list[str], job: PackJob, undisturbed: str, tmp_path: Path
) -> None:
    """What a killed pack never synced must not be trusted by the one that goes on."""
    for trial in trials("R2-killed-then-cut", ci=2, campaign=len(calls)):
        with trial as seed:
            call = calls[spread(seed, len(calls))]
            finish_and_cut(watched, tmp_path, call, random.Random(seed), job, undisturbed)


def finish_and_cut(
    watched: WatchedPack, folder: Path, kill_at: str, rng: random.Random, job: PackJob,
    undisturbed: str,
) -> None:  # fmt: skip
    """Kill a pack, finish it, cut: at the end the bundle stays; before, it is old or new."""
    place = folder / "traced"
    place.mkdir()
    first, end = traced(watched, place, kill_at)
    assert end.code is None
    second, end = traced(watched, place)
    assert end == End(0)
    shutil.rmtree(place)
    history = history_of(first, second)
    ends = [history.state(history.steps, lambda i: "drop"), *two(history, history.steps, rng)]
    for state in ends:
        assert require_old_or_new(state, folder / "cut", job, undisturbed)
    for state in two(history, rng.randrange(len(first), history.steps), rng):
        require_old_or_new(state, folder / "cut", job, undisturbed)


def two(history: History, step: int, rng: random.Random) -> list[State]:
    return [random_cut(history, step, rng) for _ in range(2)]


def test_the_model_undoes_what_was_not_synced() -> None:
    """An unsynced rename over an old file: bytes and name may each be lost without the other."""
    old = [
        Event("openat", "a", flags=0o101), Event("write", "a", data=b"old"), Event("fsync", "a"),
        Event("fsync", "."),
    ]  # fmt: skip
    new = [
        Event("openat", f"{TEMPORARY_PREFIX}a", flags=0o101),
        Event("write", f"{TEMPORARY_PREFIX}a", data=b"newer"),
        Event("rename", f"{TEMPORARY_PREFIX}a", "a"),
    ]
    found = {s.get("a") for s in cuts(history_of(old, new), 7, random.Random(0))}
    assert found == {b"old", b"newer", b"", bytes(5), b"ne"}
    synced = [*new[:2], Event("fsync", f"{TEMPORARY_PREFIX}a"), new[2], Event("fsync", ".")]
    found = {s["a"] for s in cuts(history_of(old, synced), 9, random.Random(0))}
    assert found == {b"newer"}
