"""16-bit rows decoded while they are loaded, a piece at a time."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from m2c.bundle.bundle import Bundle
from m2c.kernels.dispatch import exact_weights
from m2c.kernels.rows import PackedRows, as_exact_tensor
from m2c.tiers.blocks import Block, block_of
from m2c.tiers.loading import load_exact
from m2c.tiers.memory import aligned_buffer
from m2c.tiers.ssd import SsdReader

CPU = torch.device("cpu")


@pytest.fixture
def reader() -> Iterator[SsdReader]:
    reader = SsdReader()
    yield reader
    reader.close()


def expected(reader: SsdReader, block: Block, name: str) -> torch.Tensor:
    """The checkpoint's own weights by the reference, from one read of all of it."""
    raw = aligned_buffer(block.streamed_nbytes)
    block.read(reader, raw).wait()
    rows = block.rows(raw)[name]
    return as_exact_tensor(rows.exact_bits(0, len(rows)), block.exact_type)


@pytest.mark.parametrize("weights", [1, 1 << 13, 1 << 16, 1 << 22])
@pytest.mark.parametrize(
    ("kind", "name", "part"),
    [("neurons", 3, (0, None)), ("neurons", 3, (64, 600)), ("dense", 2, (0, None)),
     ("dense", "head", (0, None))],
)  # fmt: skip
def test_pieces_hold_the_checkpoints_own_weights(
    deep_bundle: Bundle, reader: SsdReader, kind: str, name: int | str,
    part: tuple[int, int | None], weights: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("m2c.tiers.loading._PIECE_WEIGHTS", weights)
    start, end = part
    block = replace(block_of(deep_bundle, kind, name, "fp16"), start=start, end=end)
    for section in block.sections:
        told: list[int] = []
        rows = load_exact(reader, block, section, exact_weights, CPU, told.append)
        assert torch.equal(rows.weights, expected(reader, block, section))
        assert sum(told) >= rows.weights.nbytes // 2


def test_nothing_is_under_way_when_a_piece_cannot_be_decoded(
    deep_bundle: Bundle, reader: SsdReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffers are given back: a read that came later would write where others are."""
    monkeypatch.setattr("m2c.tiers.loading._PIECE_WEIGHTS", 1 << 13)
    block = block_of(deep_bundle, "neurons", 3, "fp16")
    read = reader._read

    def slowly(request: Any) -> None:
        time.sleep(0.02)
        read(request)

    def fails(rows: PackedRows) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(reader, "_read", slowly)
    with pytest.raises(MemoryError):
        load_exact(reader, block, "ffn", fails, CPU)
    before = reader.stats.nbytes
    time.sleep(0.1)
    assert reader.stats.nbytes == before
