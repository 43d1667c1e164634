"""Damaged, vanished and foreign shards while a model runs, and passes that are broken off."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from running import MIXES, PROMPT, GiB, Run, decode, options_for, same, smallest_dram

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.bundle.manifest import write_manifest
from m2c.bundle.shard import BLOCK, PAGE
from m2c.engine import Engine
from m2c.errors import BadInput, StorageError
from m2c.model.mix import Mix
from m2c.tiers.ssd import Pending


@pytest.fixture
def copy(deep_bundle: Bundle, tmp_path: Path) -> Path:
    folder: Path = tmp_path / "copy.m2c"
    shutil.copytree(deep_bundle.path, folder)
    return folder


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 16]))


@pytest.mark.parametrize("name", ["dense/00003.int8", "neurons/00005.int4", "dense/head.int4"])
def test_a_flipped_bit_in_a_streamed_shard_ends_the_pass(
    copy: Path, deep_bundle: Bundle, name: str
) -> None:
    mix = MIXES["0/25/75"]
    flip(copy / name, PAGE + 1000)
    dram = smallest_dram(deep_bundle, options_for(mix))
    with pytest.raises(BadInput, match=rf"{name}: damaged at byte {PAGE} \(block 0\)"), Engine(
        open_bundle(copy), options_for(mix, dram=dram)
    ) as engine:  # fmt: skip
        engine.model.forward(PROMPT)


@pytest.mark.parametrize("plane", ["int8", "fp16"])
def test_a_flipped_bit_in_an_upgrade_ends_the_pass(
    copy: Path, deep_bundle: Bundle, plane: str
) -> None:
    """Read on demand by one token, long after opening."""
    mix = MIXES["5/15/80"]
    dram = smallest_dram(deep_bundle, options_for(mix))
    with Engine(open_bundle(copy), options_for(mix, dram=dram)) as engine:
        engine.model.forward(PROMPT)
        for block in range(2):
            flip(copy / f"neurons/00007.{plane}", PAGE + block * BLOCK + 5)
        with pytest.raises(BadInput, match=rf"neurons/00007\.{plane}: damaged at byte"):
            engine.model.forward(PROMPT[:1])


def test_a_flipped_bit_in_a_resident_shard_is_found_at_opening(copy: Path) -> None:
    flip(copy / "neurons/00005.int4", PAGE + BLOCK + 1)
    with pytest.raises(BadInput, match=r"neurons/00005\.int4: damaged at byte"):
        Engine(open_bundle(copy), options_for(MIXES["0/25/75"]))


def test_a_shard_that_ends_early(copy: Path, deep_bundle: Bundle) -> None:
    mix = MIXES["0/0/100"]
    dram = smallest_dram(deep_bundle, options_for(mix))
    bundle = open_bundle(copy)
    os.truncate(copy / "neurons/00006.int4", PAGE + BLOCK + PAGE)
    with pytest.raises(StorageError, match=r"neurons/00006\.int4: ended at byte"), Engine(
        bundle, options_for(mix, dram=dram)
    ) as engine:  # fmt: skip
        engine.model.forward(PROMPT)
    with pytest.raises(BadInput, match="wrong length"):
        open_bundle(copy)


def test_a_shard_that_vanished(copy: Path, deep_bundle: Bundle) -> None:
    mix = MIXES["0/0/100"]
    bundle = open_bundle(copy)
    (copy / "neurons/00006.int4").unlink()
    for dram in (smallest_dram(deep_bundle, options_for(mix)), GiB):
        with pytest.raises(BadInput, match=r"neurons/00006\.int4"):
            Engine(bundle, options_for(mix, dram=dram)).model.forward(PROMPT)


def test_a_pass_that_was_broken_off_can_be_repeated(
    deep_bundle: Bundle, reference: dict[Mix, Run]
) -> None:
    """Ctrl-C in the middle of a pass: the next one begins at the first layer again."""
    mix = MIXES["5/15/80"]
    dram = smallest_dram(deep_bundle, options_for(mix))
    with Engine(deep_bundle, options_for(mix, dram=dram)) as engine:
        decode(engine)
        for layer in (0, 3, 7):

            def interrupt(at: int, plane: str, ids: Any, layer: int = layer) -> None:
                if at == layer:
                    raise KeyboardInterrupt

            engine.model.record = interrupt
            with pytest.raises(KeyboardInterrupt):
                engine.model.forward(PROMPT[:1])
            engine.model.record = None
            assert same(decode(engine), reference[mix])


@pytest.mark.parametrize("policy", ["atu", "pinned"])
def test_a_fetch_that_was_broken_off_leaves_no_trace(
    deep_bundle: Bundle, reference: dict[Mix, Run], policy: str
) -> None:
    """The cache must not believe that a neuron is in a slot it was never copied to."""
    mix = MIXES["5/15/80"]
    for failing in (1, 2, 9, 16, 17):
        with Engine(deep_bundle, options_for(mix, policy=policy)) as engine:
            if failing > 16:
                decode(engine)  # warm: fetches fill the slots of others
            countdown = iter(range(failing - 1, -1, -1))
            for upgrade in engine.store._upgrades.values():
                upgrade._load_piece = break_off(upgrade._load_piece, countdown)  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                decode(engine)
            assert same(decode(engine), reference[mix])


def break_off(load: Callable[..., Any], countdown: Iterator[int]) -> Callable[..., Any]:
    """`load`, but the call that meets the end of `countdown` is interrupted."""

    def wrapped(*arguments: Any) -> Any:
        if next(countdown, None) == 0:
            raise KeyboardInterrupt
        return load(*arguments)

    return wrapped


@pytest.mark.parametrize("fault", ["layers", "neurons", "vocabulary", "shard", "kind", "plane"])
def test_a_bundle_of_another_model_is_refused(copy: Path, fault: str) -> None:
    """Every checksum is right, yet the shards are not those of the architecture."""
    manifest = open_bundle(copy).manifest
    architecture, shards = dict(manifest.architecture), dict(manifest.shards)
    victim = "neurons/00004.int8"
    if fault == "layers":
        architecture["num_hidden_layers"] = 9
    elif fault == "neurons":
        architecture["intermediate_size"] = 650
    elif fault == "vocabulary":
        architecture["vocab_size"] = 299
    elif fault == "shard":
        del shards[victim]
    else:
        other = {"kind": "dense/00004.int8", "plane": "neurons/00004.int4"}[fault]
        shards[victim] = shards[other]
        shutil.copy(copy / other, copy / victim)
    write_manifest(copy, replace(manifest, architecture=architecture, shards=shards))
    with pytest.raises(BadInput, match="another model"):
        Engine(open_bundle(copy), options_for(MIXES["5/15/80"]))


def test_no_read_is_under_way_once_another_has_failed() -> None:
    """Whoever waited may use the buffer at once."""
    under_way, may_end = threading.Event(), threading.Event()

    def slow() -> None:
        under_way.set()
        may_end.wait(10)

    def fail() -> None:
        raise StorageError("a sector")

    with ThreadPoolExecutor(2) as pool:
        other, failed = pool.submit(slow), pool.submit(fail)
        under_way.wait(10)
        threading.Timer(0.1, may_end.set).start()
        with pytest.raises(StorageError):
            Pending([failed, other]).wait()
        assert other.done()
