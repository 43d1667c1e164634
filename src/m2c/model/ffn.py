"""The FFN of a layer with a precision per neuron: score, assign, fetch what is missing, add up.

All neurons are computed at the floor precision and scored with it. The best by rank are computed
again at a higher precision, and what the floor gave for them is taken back. Sums run in neuron
order, so the result does not depend on which tier a neuron came from. Knows nothing about tiers:
`fetch` does.
"""

from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.kernels.dispatch import add_normed, down, gather_ffn, rank, scored_ffn
from m2c.kernels.operands import Norm
from m2c.kernels.rows import Rows
from m2c.kernels.workers import Workers
from m2c.model.mix import LEVELS, Mix

FETCH: Final = 512  # neurons gathered at a time: bounds the memory of a fetch

Ids = npt.NDArray[np.int32]
Fetch = Callable[[str, Ids], Rows]
Chosen = Callable[[str, Tensor], Rows | None]


def uniform_ffn(
    x: Tensor, parts: Iterable[Rows], *, norm: Norm, act: str, workers: Workers,
    out_norm: Norm | None = None, onto: Tensor | None = None, bias: Tensor | None = None,
    out_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [tokens, hidden] f32 plus the FFN's output for norm(x), all neurons as they come.

    out_norm: of the output, before it is added. onto: what it is added to instead of x, and lost.
    bias [neurons], of neurons without a gate; out_bias [hidden], of the output.
    """
    out, start = begin(x, out_norm, onto), 0
    for part in parts:
        own = None if bias is None else bias[start : start + len(part)]
        gather_ffn(x, part, act, workers, norm=norm, into=out, bias=own)
        start += len(part)
    return end(x, out, out_norm, workers, out_bias)


def begin(x: Tensor, out_norm: Norm | None, onto: Tensor | None = None) -> Tensor:
    """What neurons are added to: what comes in, unless their sum is normed first."""
    if out_norm is not None:
        return torch.zeros_like(x)
    return x.clone() if onto is None else onto


def end(
    x: Tensor, out: Tensor, out_norm: Norm | None, workers: Workers, out_bias: Tensor | None = None
) -> Tensor:
    if out_norm is not None:
        return add_normed(x, out, out_norm, workers)
    return out if out_bias is None else out + out_bias


def mixed_ffn(
    x: Tensor, floor: Rows, down_norm: Tensor, *, norm: Norm, act: str, mix: Mix, fetch: Fetch,
    workers: Workers, out_norm: Norm | None = None, onto: Tensor | None = None,
    bias: Tensor | None = None, out_bias: Tensor | None = None,
    record: Callable[[str, Ids], None] | None = None, chosen_rows: Chosen | None = None,
) -> Tensor:  # fmt: skip
    """As `uniform_ffn`, with a precision per neuron.

    floor: every neuron of the layer. down_norm: [neurons] f32. `fetch(plane, ids)` returns the
    neurons `ids` (ascending) at `plane`; with one token it is called once per plane, and `record`
    is told the ids (traces). `chosen_rows(plane, index)` is asked first: where it has them, the
    ids stay on the device, and nothing waits for them.
    """
    out = begin(x, out_norm, onto)
    activations = scored_ffn(x, floor, act, workers, norm=norm, into=out, bias=bias)
    levels = rank(activations, down_norm, mix.ranks(len(floor)), workers)
    # all were added at the floor, in one pass over memory: take back those that do not stay there
    back = torch.where(levels == LEVELS[mix.floor], 0, -activations)
    down(back, floor, workers, into=out)
    counts = mix.counts(len(floor))
    for plane in mix.upgrades:
        chosen = levels == LEVELS[plane]
        if x.shape[0] == 1:
            rows = None
            if chosen_rows is not None:
                index = _first(chosen[0], counts[plane])
                rows = chosen_rows(plane, index)
            if rows is not None:
                own = None if bias is None else bias[index.long()]
                gather_ffn(x, rows, act, workers, norm=norm, into=out, bias=own)
                continue
            # one token's set is fetched whole, so that the neuron cache sees it whole
            ids = _positions(chosen[0])
            if record is not None:
                record(plane, ids)
            own = _chosen(bias, ids)
            gather_ffn(x, fetch(plane, ids), act, workers, norm=norm, into=out, bias=own)
            continue
        ids = _positions(chosen.any(dim=0))
        for start in range(0, len(ids), FETCH):
            part = ids[start : start + FETCH]
            mask, own = chosen[:, _index(part, x)].to(x.dtype), _chosen(bias, part)
            rows = fetch(plane, part)
            gather_ffn(x, rows, act, workers, mask=mask, norm=norm, into=out, bias=own)
    return end(x, out, out_norm, workers, out_bias)


def _first(chosen: Tensor, count: int) -> Tensor:
    """Where `chosen` [neurons] is true, `count` times: int32 [count], ascending, on its device."""
    order = chosen.to(torch.uint8).argsort(descending=True, stable=True)
    return order[:count].to(torch.int32)


def _chosen(bias: Tensor | None, ids: Ids) -> Tensor | None:
    return None if bias is None else bias[_index(ids, bias)]


def _index(ids: Ids, of: Tensor) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64)).to(of.device)


def _positions(chosen: Tensor) -> Ids:
    return chosen.nonzero()[:, 0].to(torch.int32).cpu().numpy()
