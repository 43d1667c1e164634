"""Traces survive the disk and refuse damage; Belady bounds every policy and is exact."""

import itertools
import struct
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings

from m2c.errors import BadInput, NoSpace, UsageError
from m2c.replay import REPLAY_NAMES, count_hits, replay
from m2c.tiers import trace as trace_module
from m2c.tiers.policies import POLICY_NAMES
from m2c.tiers.trace import MAGIC, MAX_FACTS_NBYTES, Trace, TraceWriter, read_trace

PLANES = ("int4", "int8")


def as_sets(lists: list[list[int]]) -> list[np.ndarray]:
    return [np.array(sorted(ids), dtype=np.int32) for ids in lists]


def write_trace(path: Path, active: np.ndarray, planes: tuple[str, ...] = PLANES) -> None:
    """`active` is bool [tokens, layers, planes, neurons]."""
    _, num_layers, _, num_neurons = active.shape
    with TraceWriter(path, num_layers=num_layers, num_neurons=num_neurons, planes=planes) as writer:
        for token in active:
            for layer, sets in enumerate(token):
                for plane, mask in zip(planes, sets, strict=True):
                    writer.write(layer, plane, np.flatnonzero(mask))


def random_active(*shape: int, seed: int = 0, share: float = 0.2) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < share


# -- traces ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_neurons", [1, 7, 8, 37])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_round_trip(tmp_path: Path, num_neurons: int, num_tokens: int) -> None:
    active = random_active(num_tokens, 3, 2, num_neurons)
    write_trace(tmp_path / "t", active)
    trace = read_trace(tmp_path / "t")
    assert (trace.num_layers, trace.num_neurons, trace.planes) == (3, num_neurons, PLANES)
    assert trace.num_tokens == num_tokens
    for token, layer, (index, plane) in itertools.product(
        range(num_tokens), range(3), enumerate(PLANES)
    ):
        ids = trace.ids(token, layer, plane)
        assert ids.dtype == np.int32
        assert np.array_equal(ids, np.flatnonzero(active[token, layer, index]))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens per block for the shape [., 3, 2, 37]."""
    monkeypatch.setattr(trace_module, "_FLUSH_NBYTES", 2 * 3 * 2 * 5)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_reach_the_file_as_they_fill(tmp_path: Path) -> None:
    active = random_active(5, 3, 2, 37)
    path = tmp_path / "t"
    sizes = []
    with TraceWriter(path, num_layers=3, num_neurons=37, planes=PLANES) as writer:
        for token in active:
            for layer, plane in itertools.product(range(3), range(2)):
                writer.write(layer, PLANES[plane], np.flatnonzero(token[layer, plane]))
            sizes.append(path.stat().st_size)
    assert sizes[0] < sizes[1] == sizes[2] < sizes[3] == sizes[4] < path.stat().st_size
    whole = read_trace(path)
    assert whole.num_tokens == 5
    for count in (0, 1, 2, 3, 9):
        first = read_trace(path, max_tokens=count)
        assert np.array_equal(first.bitmaps, whole.bitmaps[:count])


def test_an_interrupted_decode_leaves_whole_tokens(tmp_path: Path) -> None:
    def interrupted() -> None:
        with TraceWriter(tmp_path / "t", num_layers=2, num_neurons=9, planes=("int4",)) as writer:
            for layer in (0, 1, 0):
                writer.write(layer, "int4", [layer, 8])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    trace = read_trace(tmp_path / "t")
    assert trace.num_tokens == 1
    assert trace.ids(0, 1, "int4").tolist() == [1, 8]


def test_size_is_close_to_the_entropy(tmp_path: Path) -> None:
    write_trace(tmp_path / "t", random_active(20, 2, 1, 11008), ("int4",))
    bits = -(0.2 * np.log2(0.2) + 0.8 * np.log2(0.8)) * 11008 * 40
    assert bits / 8 < (tmp_path / "t").stat().st_size < 1.05 * bits / 8


def test_writer_refuses_calls_out_of_order(tmp_path: Path) -> None:
    shape = {"num_layers": 2, "num_neurons": 9, "planes": PLANES}
    with pytest.raises(ValueError, match="not open"):
        TraceWriter(tmp_path / "t", **shape).write(0, "int4", [])
    with TraceWriter(tmp_path / "t", **shape) as writer:
        writer.write(0, "int4", [1])
        for layer, plane in [(0, "int4"), (1, "int8"), (0, "fp16"), (-1, "int8")]:
            with pytest.raises(ValueError, match="layer 0 plane 'int8' comes next"):
                writer.write(layer, plane, [1])
        with pytest.raises(ValueError, match="between 0 and 8"):
            writer.write(0, "int8", [9])
        with pytest.raises(ValueError, match="increasing"):
            writer.write(0, "int8", [4, 4])


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 0},
        {"num_layers": True},
        {"num_neurons": 1 << 25},
        {"num_layers": 4096, "num_neurons": 1 << 24},
        {"planes": []},
        {"planes": ["int4", "int4"]},
        {"planes": ["\x1b[2J"]},
        {"planes": ["p" * 33]},
    ],
)
def test_writer_refuses_impossible_shapes(tmp_path: Path, change: dict) -> None:
    with pytest.raises(ValueError, match=r"num_|plane|one token"):
        TraceWriter(
            tmp_path / "t", **{"num_layers": 2, "num_neurons": 9, "planes": PLANES} | change
        )


def test_disk_errors_are_ours(tmp_path: Path) -> None:
    shape = {"num_layers": 1, "num_neurons": 8, "planes": ("int4",)}
    with pytest.raises(BadInput, match="nowhere"), TraceWriter(tmp_path / "nowhere/t", **shape):
        pass
    if Path("/dev/full").exists():
        with pytest.raises(NoSpace), TraceWriter("/dev/full", **shape):
            pass


@pytest.mark.usefixtures("small_blocks")
def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write_trace(tmp_path / "t", random_active(5, 3, 2, 37))
    whole = (tmp_path / "t").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "t").write_bytes(whole[:size])
        with pytest.raises(BadInput):
            read_trace(tmp_path / "t")
    (tmp_path / "t").write_bytes(whole + b"\0")
    with pytest.raises(BadInput, match="end mark"):
        read_trace(tmp_path / "t")


@pytest.mark.usefixtures("small_blocks")
def test_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """A flipped bit is noticed, except in the facts, where it may spell another valid trace."""
    write_trace(tmp_path / "t", random_active(5, 3, 2, 37))
    whole = (tmp_path / "t").read_bytes()
    facts_end = whole.index(b"}") + 1
    for position, bit in itertools.product(range(len(whole)), (0, 3, 7)):
        broken = bytearray(whole)
        broken[position] ^= 1 << bit
        (tmp_path / "t").write_bytes(broken)
        try:
            read_trace(tmp_path / "t")
        except BadInput:
            continue
        assert position < facts_end


FACTS = b'{"num_layers":1,"num_neurons":9,"planes":["int4"]}'


def hostile(facts: bytes = FACTS, blocks: bytes = b"", tokens: int = 0, version: int = 1) -> bytes:
    head = MAGIC + struct.pack("<II", version, len(facts)) + facts
    return head + blocks + struct.pack("<II", 0, tokens)


def block(tokens: int, raw: bytes, **options: bool) -> bytes:
    frame = zstandard.ZstdCompressor(**options).compress(raw)
    return struct.pack("<II", tokens, len(frame)) + frame


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "start like"),
        (b"GGUF" + bytes(60), "start like"),
        (hostile(version=2), "version 2"),
        (MAGIC + struct.pack("<II", 1, MAX_FACTS_NBYTES + 1) + bytes(5000), "facts claim"),
        (hostile(b"\xff{}"), "JSON"),
        (hostile(b"[" * 4000), "JSON"),
        (hostile(b"[1,2,3]"), "not an object"),
        (hostile(b'[["num_layers",1],["num_neurons",9],["planes",["int4"]]]'), "not an object"),
        (hostile(FACTS[:-1] + b',"x":1}'), "missing or unknown"),
        (hostile(FACTS[:-1] + b',"num_layers":1}'), "duplicate key"),
        (hostile(FACTS.replace(b":9", b":9.0")), "num_neurons"),
        (hostile(FACTS.replace(b":9", b":true")), "num_neurons"),
        (hostile(FACTS.replace(b":9", b":-9")), "num_neurons"),
        (hostile(FACTS.replace(b":9", b":" + b"9" * 3000)), "num_neurons"),
        (hostile(FACTS.replace(b'["int4"]', b'{"int4":1}')), "planes"),
        (hostile(FACTS.replace(b'"int4"', b"4")), "name"),
        (hostile(FACTS.replace(b'"int4"', b'"\\ud800"')), "half a character"),
        (hostile(blocks=block(1, b"\x01\x02"), tokens=1), "beyond 8"),
        (hostile(blocks=block(1, b"\x01\x01"), tokens=2), "end mark"),
        (hostile(blocks=block(2, b"\x01\x01"), tokens=2), "wrong size"),
        (hostile(blocks=block(1, bytes(1 << 20)), tokens=1), "wrong size"),
        (hostile(blocks=block(1, b"\1\1", write_content_size=False), tokens=1), "wrong size"),
        (hostile(blocks=struct.pack("<II", 1, 8) + bytes(8), tokens=1), "damaged"),
        (hostile(blocks=struct.pack("<II", 1, 0), tokens=1), "damaged"),
        (hostile(blocks=struct.pack("<II", 1, 1 << 31)), "truncated"),
        (hostile(blocks=struct.pack("<II", 0xFFFFFFFF, 8) + bytes(8)), "claims"),
    ],
)
def test_hostile_traces_are_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(BadInput, match=complaint) as caught:
        read_trace(tmp_path / "t")
    assert str(tmp_path / "t") in caught.value.message
    assert caught.value.hint


def test_two_frames_in_a_block_are_refused(tmp_path: Path) -> None:
    frame = zstandard.compress(b"\1\1")
    blocks = struct.pack("<II", 1, 2 * len(frame)) + frame * 2
    (tmp_path / "t").write_bytes(hostile(blocks=blocks, tokens=1))
    with pytest.raises(BadInput, match="damaged"):
        read_trace(tmp_path / "t")


def test_a_trace_too_large_for_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_trace(tmp_path / "t", random_active(5, 3, 2, 37))
    monkeypatch.setattr(trace_module, "MAX_TRACE_NBYTES", 4 * 30)
    with pytest.raises(BadInput, match="5 tokens, 4 fit"):
        read_trace(tmp_path / "t")
    assert read_trace(tmp_path / "t", max_tokens=4).num_tokens == 4


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_trace(tmp_path / "t")


# -- Belady ----------------------------------------------------------------------------------------


def most_hits(sets: list[list[int]], held: frozenset[int], capacity: int) -> int:
    """The optimum by trying every content after every token."""
    if not sets:
        return 0
    reachable = held | frozenset(sets[0])
    return len(held & frozenset(sets[0])) + max(
        most_hits(sets[1:], frozenset(content), capacity)
        for content in itertools.combinations(sorted(reachable), min(capacity, len(reachable)))
    )


small_sets = st.lists(st.sets(st.integers(0, 4), max_size=4).map(sorted), max_size=5)


@given(sets=small_sets, capacity=st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_belady_is_the_optimum(sets: list[list[int]], capacity: int) -> None:
    hits = count_hits("belady", as_sets(sets), num_neurons=5, capacity=capacity)
    assert hits == most_hits(sets, frozenset(range(capacity)), capacity)


@given(
    sets=st.lists(st.sets(st.integers(0, 19)).map(sorted), max_size=30),
    capacity=st.integers(0, 20),
)
@settings(max_examples=100, deadline=None)
def test_belady_bounds_every_policy(sets: list[list[int]], capacity: int) -> None:
    best, *others = (
        count_hits(name, as_sets(sets), num_neurons=20, capacity=capacity)
        for name in ("belady", *POLICY_NAMES)
    )
    assert max(others) <= best <= sum(map(len, sets))


def zipf_trace(num_tokens: int, num_neurons: int, size: int, *, seed: int) -> Trace:
    """One layer, one plane; neuron i is needed with probability ~ 1 / (i + 3)."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(3, num_neurons + 3)
    active = np.zeros((num_tokens, 1, 1, num_neurons), dtype=np.bool_)
    for token in active:
        token[0, 0, rng.choice(num_neurons, size, replace=False, p=weights / weights.sum())] = True
    bitmaps = np.packbits(active, axis=-1, bitorder="little")
    return Trace(1, num_neurons, ("int8",), bitmaps)


@given(seed=st.integers(0, 1000), capacity=st.integers(1, 60), size=st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_belady_bounds_every_policy_on_zipf(seed: int, capacity: int, size: int) -> None:
    table = replay(
        zipf_trace(40, 60, size, seed=seed), plane="int8", capacity_nbytes=capacity, record_nbytes=1
    )
    rates = {row.policy: row.hit_rate for row in table.rows}
    assert tuple(rates) == REPLAY_NAMES
    assert max(rates.values()) == rates["belady"]


# -- the table -------------------------------------------------------------------------------------


def test_what_each_number_means() -> None:
    """Two layers of 10 neurons; layer 0 always needs {0, 1}, layer 1 alternates {0, 1}, {8, 9}."""
    active = np.zeros((4, 2, 1, 10), dtype=np.bool_)
    active[:, 0, 0, :2] = True
    active[::2, 1, 0, :2] = True
    active[1::2, 1, 0, 8:] = True
    trace = Trace(2, 10, ("int8",), np.packbits(active, axis=-1, bitorder="little"))
    table = replay(
        trace, plane="int8", capacity_nbytes=4199, record_nbytes=1000, policies=("pinned", "atu")
    )
    assert table.slots_per_layer == 2
    assert table.active_share == pytest.approx(0.2)
    assert table.overlap == pytest.approx(0.5)
    pinned, atu = table.rows
    assert pinned.hit_rate == pytest.approx(12 / 16)
    assert pinned.hit_rate_minus_chance == pytest.approx(12 / 16 - 0.2)
    assert pinned.loads_per_token == pytest.approx(1.0)
    assert pinned.nbytes_per_token == pytest.approx(1000.0)
    assert atu.hit_rate == pytest.approx(10 / 16)  # warm start: the first token hits everywhere


def test_random_sets_teach_nothing() -> None:
    active = random_active(200, 2, 1, 200, seed=5, share=0.3)
    trace = Trace(2, 200, ("int8",), np.packbits(active, axis=-1, bitorder="little"))
    table = replay(trace, plane="int8", capacity_nbytes=2 * 80, record_nbytes=1)
    for row in table.rows:
        if row.policy != "belady":
            assert abs(row.hit_rate_minus_chance) < 0.03
    assert table.rows[-1].hit_rate_minus_chance > 0.1


def test_replay_refuses_what_cannot_be() -> None:
    trace = zipf_trace(3, 10, 2, seed=0)
    good = {"plane": "int8", "capacity_nbytes": 5, "record_nbytes": 1}
    for change, message in [
        ({"plane": "int4"}, "no plane 'int4'"),
        ({"record_nbytes": 0}, "makes no sense"),
        ({"capacity_nbytes": -1}, "makes no sense"),
        ({"policies": ("mru",)}, "no cache policy 'mru'"),
    ]:
        with pytest.raises(UsageError, match=message):
            replay(trace, **good | change)
    silent = Trace(1, 10, ("int8",), np.zeros((3, 1, 1, 2), dtype=np.uint8))
    with pytest.raises(BadInput, match="no active neurons"):
        replay(silent, **good)


def test_more_slots_than_neurons_hit_always() -> None:
    table = replay(zipf_trace(5, 10, 3, seed=1), plane="int8", capacity_nbytes=99, record_nbytes=1)
    assert table.slots_per_layer == 10
    assert {row.hit_rate for row in table.rows} == {1.0}
