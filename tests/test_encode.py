"""What packing encodes: the C encoder gives the bytes of the numpy reference, in any thread."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import digest, job_for, run_pack, write_checkpoint

from m2c import pack
from m2c.bundle.exact import EXACT_TYPES, round_to, widen
from m2c.bundle.planes import GROUP, RecordLayout
from m2c.encode import Aside, Encoded, Matrix, Piece, encode_piece
from m2c.errors import BadInput, UsageError
from m2c.kernels.encoder import Encoder
from m2c.kernels.native import LIBRARY
from m2c.kernels.workers import Workers
from m2c.model.checkpoint import open_checkpoint
from m2c.model.weights import neuron_records
from m2c.pack import Figures, PackJob
from m2c.sections import shard_groups
from m2c.steer import Steering

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]
TORCH_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
KINDS = ("gaussian", "any bits", "zeros", "halves", "ties", "tiny", "large", "wide", "outliers")
built = pytest.mark.skipif(not LIBRARY.exists(), reason="the native kernels were not built")


def encoders() -> dict[str, Encoder]:
    """Those that this machine can run."""
    found = {}
    for choice in ("scalar", "avx2", "avx512"):
        try:
            found[choice] = Encoder(choice)
        except (UsageError, OSError):
            continue
    return found


def draw(kind: str, shape: tuple[int, ...], exact_type: str, seed: int) -> U16:
    """Bits of finite weights of many characters."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if kind == "zeros":
        x = x * rng.choice([0.0, -0.0, 1.0], shape)
    elif kind == "halves":  # of both signs and one size: the extreme value is not alone
        x = rng.choice([-0.5, 0.5, 0.25], shape)
    elif kind == "ties":  # quotients on the borders between two codes
        x = rng.integers(-17, 18, shape) / 2
    elif kind == "tiny":
        x = x * 10.0 ** rng.uniform(-42, -5, shape)
    elif kind == "large":
        x = x * (6e4 if exact_type == "f16" else 10.0 ** rng.uniform(3, 38)) / 8
    elif kind == "wide":
        x = np.sign(x) * 10.0 ** rng.uniform(-9, 4.7, shape)
    elif kind == "outliers":
        x = np.where(rng.random(shape) < 0.02, 50 * x, 0.02 * x)
    bits = round_to(x.astype(np.float32), exact_type)
    if kind == "any bits":
        bits = rng.integers(0, 1 << 16, shape).astype(np.uint16)
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(widen(bits, exact_type)), bits, 0).astype(np.uint16)


def matrix_of(layout: RecordLayout, records: int, importance: F32 | None = None) -> Matrix:
    def unread(workers: Workers) -> Any:
        raise NotImplementedError

    return Matrix("m", layout, records, unread, lambda rows: None, importance)


def tensor_of(bits: U16, exact_type: str) -> torch.Tensor:
    """Records [n, weights] of `bits` [n, vectors, length] in the checkpoint's type."""
    flat = torch.from_numpy(bits.reshape(len(bits), -1).view(np.int16))
    return flat.view(TORCH_TYPES[exact_type])


def same(a: Encoded, b: Encoded) -> bool:
    arrays = zip(
        (a.int4, a.int8, a.frames.nbytes, a.frames.escapes),
        (b.int4, b.int8, b.frames.nbytes, b.frames.escapes), strict=True,
    )  # fmt: skip
    return a.frames.data == b.frames.data and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in arrays
    )


# -- the C encoder and its reference ---------------------------------------------------------------


@built
@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(2, 7), st.integers(1, 3), st.integers(1, 600)),
    kind=st.sampled_from(KINDS), exact_type=st.sampled_from(EXACT_TYPES),
    weighted=st.sampled_from(["no", "yes", "sparse"]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_instruction_set_gives_the_bytes_of_numpy(
    shape: tuple[int, int, int], kind: str, exact_type: str, weighted: str, seed: int
) -> None:
    records, vectors, length = shape
    importance = None
    if weighted != "no":
        rng = np.random.default_rng(seed + 1)
        importance = rng.lognormal(0, 3, (vectors, length)).astype(np.float32)
        importance[rng.random(importance.shape) < (weighted == "sparse") * 0.9] = 0
    matrix = matrix_of(RecordLayout(vectors, length), records, importance)
    rows = tensor_of(draw(kind, shape, exact_type, seed), exact_type)
    expected = encode_piece(Piece(rows), matrix, exact_type, encoder=None)
    for choice, encoder in encoders().items():
        got = encode_piece(Piece(rows), matrix, exact_type, encoder=encoder)
        assert same(got, expected), choice


@built
@pytest.mark.parametrize("exact_type", EXACT_TYPES)
def test_every_weight_there_is(exact_type: str) -> None:
    """Each finite bit pattern once, among its like and among all others."""
    every = np.arange(1 << 16, dtype=np.uint16)
    mixed = np.random.default_rng(1).permutation(every)
    bits = np.stack((every, mixed)).reshape(2 * 64, 1, 1024)
    with np.errstate(invalid="ignore"):
        bits[~np.isfinite(widen(bits, exact_type))] = 0
    matrix = matrix_of(RecordLayout(1, 1024), len(bits))
    rows = tensor_of(bits, exact_type)
    expected = encode_piece(Piece(rows), matrix, exact_type, encoder=None)
    for choice, encoder in encoders().items():
        assert same(encode_piece(Piece(rows), matrix, exact_type, encoder=encoder), expected), (
            choice
        )


@built
def test_f32_weights_are_rounded_first() -> None:
    matrix = matrix_of(RecordLayout(1, 70), 9)
    rows = torch.randn((9, 70), generator=torch.Generator().manual_seed(0))
    for exact_type, dtype in TORCH_TYPES.items():
        rounded = encode_piece(Piece(rows.to(dtype)), matrix, exact_type, encoder=None)
        assert same(encode_piece(Piece(rows), matrix, exact_type, encoder=Encoder()), rounded)


@built
def test_threads_share_nothing() -> None:
    """Many calls at once, of different shapes: each as if it were alone."""
    encoder = Encoder()
    jobs = []
    for seed in range(12):
        layout = RecordLayout(1 + seed % 3, 100 + 37 * seed)
        bits = draw("outliers", (40, layout.vectors, layout.length), "bf16", seed)
        jobs.append((tensor_of(bits, "bf16"), matrix_of(layout, 40)))
    alone = [encode_piece(Piece(rows), m, "bf16", encoder=encoder) for rows, m in jobs]
    start = threading.Barrier(len(jobs))

    def work(i: int) -> list[Encoded]:
        start.wait()
        return [
            encode_piece(Piece(jobs[i][0]), jobs[i][1], "bf16", encoder=encoder) for _ in range(3)
        ]

    with ThreadPoolExecutor(len(jobs)) as pool:
        for one, several in zip(alone, pool.map(work, range(len(jobs))), strict=True):
            assert all(same(one, other) for other in several)


@built
@pytest.mark.parametrize("exact_type", EXACT_TYPES)
@pytest.mark.parametrize("at", [(0, 0), (3, 99), (4, 40)])
def test_what_is_no_number_is_found(exact_type: str, at: tuple[int, int]) -> None:
    bits = draw("gaussian", (5, 1, 100), exact_type, 2)
    for value in (np.inf, -np.inf, np.nan):
        rows = tensor_of(bits.copy(), exact_type)
        rows[at] = value
        for encoder in (None, *encoders().values()):
            with pytest.raises(BadInput, match=f"m: a weight does not fit in {exact_type}"):
                encode_piece(
                    Piece(rows), matrix_of(RecordLayout(1, 100), 5), exact_type, encoder=encoder
                )


@built
def test_shapes_that_do_not_belong_together_are_refused() -> None:
    bits, layout = np.zeros((2, 64), np.uint16), RecordLayout(1, 64)
    weights = np.ones((GROUP, 2), np.float32)
    call = partial(Encoder().encode, exact_type="bf16", frame_records=1)
    assert call(bits, weights, layout) is not None
    with pytest.raises(ValueError, match="importance"):
        call(bits, weights[:, :1], layout)
    with pytest.raises(ValueError, match="records"):
        call(bits, weights, RecordLayout(2, 64))


@built
def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot run sse9"):
        Encoder("sse9")


# -- in a pack -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_a_pack_without_the_library_is_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    shape = {"hidden_size": 72, "intermediate_size": 150}
    job = job_for(write_checkpoint(tmp_path / "source", shape, dtype=dtype))
    run_pack(job, tmp_path / "out", threads=2)
    monkeypatch.setattr(pack, "load_encoder", lambda: None)
    run_pack(job, tmp_path / "slow")
    assert digest(tmp_path / "slow") == digest(tmp_path / "out")


def test_neurons_are_read_in_importance_order(job: PackJob) -> None:
    workers = Workers(2)
    steering = Steering("bf16", None)
    groups = shard_groups(job.checkpoint, job.importance, steering)
    (matrix,) = next(g.matrices for g in groups if g.files["int4"] == "neurons/00001.int4")
    rows = matrix.open(workers)(3, 20).rows
    order = torch.from_numpy(job.importance.layers[1].order.astype(np.int64))
    assert torch.equal(rows, neuron_records(job.checkpoint, 1)[order[3:20]])
    workers.close()


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.v_proj.weight"]
)
def test_a_checkpoint_with_nan_is_refused(job: PackJob, tmp_path: Path, name: str) -> None:
    """Also when the bundle's type is not the checkpoint's."""
    source = write_checkpoint(tmp_path / "source")
    for file in source.glob("*.safetensors"):
        if name in (tensors := load_file(file)):
            tensors[name][-1, -1] = torch.nan
            save_file(tensors, file)
    checkpoint = open_checkpoint(source)
    facts = replace(job.importance.calibration, fingerprint=checkpoint.fingerprint())
    known = replace(job.importance, calibration=facts)
    for exact_type in EXACT_TYPES:
        broken = replace(job, checkpoint=checkpoint, importance=known, exact_type=exact_type)
        with pytest.raises(BadInput, match=f"{name} holds NaN or infinity"):
            run_pack(broken, tmp_path / exact_type)


def test_figures_count_what_this_attempt_did(job: PackJob, tmp_path: Path) -> None:
    told: list[Figures] = []

    def attempt() -> Figures:
        workers = Workers(1)
        mix = pack.MixChoice((0, 25, 75), "given", 5.5, 0.0)
        pack.pack(
            job, tmp_path / "out", workers=workers, choose_mix=lambda _: (mix, {}),
            report=told.append,
        )  # fmt: skip
        workers.close()
        return told[-1]

    whole = attempt()
    shards = [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".int4", ".int8", ".fp16")]
    assert whole.weights == job.weights
    assert whole.written_nbytes == sum(p.stat().st_size for p in shards)
    assert 2 * whole.weights <= whole.source_nbytes <= 2.1 * whole.weights  # and the norms
    assert min(whole.spent.read, whole.spent.encode, whole.spent.write) > 0
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / ".m2c-unfinished").write_text(job.recipe)
    for plane in ("int4", "int8", "fp16"):
        (tmp_path / "out" / "neurons" / f"00001.{plane}").unlink()
    rest = attempt()
    config = job.checkpoint.config
    assert rest.weights == 3 * config.hidden_size * config.intermediate_size
    assert 0 < rest.written_nbytes < whole.written_nbytes / 2


# -- the thread aside ------------------------------------------------------------------------------


def test_work_aside_is_done_in_order_and_at_most_one_is_open() -> None:
    done: list[int] = []
    go = threading.Event()

    def work(i: int) -> None:
        go.wait()
        done.append(i)

    with Aside() as aside:
        aside.give(partial(work, 0))
        assert done == []
        go.set()
        for i in range(1, 20):
            aside.give(partial(work, i))
            assert done[:i] == list(range(i))
    assert done == list(range(20))


def test_errors_of_work_aside_arrive_and_the_rest_is_done_all_the_same() -> None:
    done: list[str] = []
    failing: Callable[[], object] = {}.popitem
    with Aside() as aside:
        aside.give(failing)
        with pytest.raises(KeyError):
            aside.give(partial(done.append, "clean up"))
    assert done == ["clean up"]
    with pytest.raises(KeyError), Aside() as aside:
        aside.give(failing)
