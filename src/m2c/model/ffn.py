"""The FFN of a layer with a precision per neuron: score, assign, fetch what is missing, add up.

All neurons are read at the floor precision and scored with it. The best by rank are recomputed at
a higher precision; their floor contribution is masked out. Sums run in neuron order, so the result
does not depend on which tier a neuron came from. Knows nothing about tiers: `fetch` does.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.kernels.dispatch import down, gate_up, gather_ffn
from m2c.kernels.rows import Rows
from m2c.kernels.workers import Workers
from m2c.model.mix import LEVELS, Mix, assign, scores_of

FETCH: Final = 512  # neurons gathered at a time: bounds the memory of a fetch

Ids = npt.NDArray[np.int32]
Fetch = Callable[[str, Ids], Rows]


def mixed_ffn(
    x: Tensor, floor: Rows, down_norm: Tensor, *, act: str, mix: Mix, fetch: Fetch,
    workers: Workers, record: Callable[[str, Ids], None] | None = None,
) -> Tensor:  # fmt: skip
    """x [tokens, hidden] f32, already normed, to the FFN's output, same shape.

    floor: every neuron of the layer. down_norm: [neurons] f32. `fetch(plane, ids)` returns the
    neurons `ids` (ascending) at `plane`; with one token it is called once per plane. `record` is
    told the ids of each plane (traces).
    """
    if mix.is_uniform:
        return gather_ffn(x, floor, act, workers)
    activations = gate_up(x, floor, act, workers)
    levels = assign(scores_of(activations, down_norm), mix)
    at_floor = levels == LEVELS[mix.floor]
    y = down(activations * at_floor, floor, workers)
    for plane in mix.upgrades:
        chosen = levels == LEVELS[plane]
        ids = chosen.any(dim=0).nonzero()[:, 0].to(torch.int32).cpu().numpy()
        if record is not None:
            record(plane, ids)
        # one token's set is fetched whole, so that the neuron cache sees it whole
        step = len(ids) if x.shape[0] == 1 else FETCH
        for start in range(0, len(ids), max(1, step)):
            part = ids[start : start + step]
            index = torch.from_numpy(part.astype(np.int64)).to(x.device)
            mask = chosen[:, index].to(x.dtype)
            y = y + gather_ffn(x, fetch(plane, part), act, workers, mask=mask)
    return y
