"""A mixture of experts: the router chooses, the chosen experts' neurons are added up.

Every token's experts are added in rising order, each by itself, so the result depends neither on
where an expert lay nor on which other tokens share the call. The shared expert of some families is
used by every token. Knows nothing about tiers: where rows come from is the caller's business.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.bundle.planes import RecordLayout
from m2c.kernels.dispatch import add_experts, gather_ffn, route
from m2c.kernels.operands import Norm, Router
from m2c.kernels.rows import ExactRows, Rows
from m2c.kernels.workers import Workers
from m2c.model.config import ModelConfig
from m2c.model.ffn import begin, end
from m2c.model.tensors import router_name, shared_gate_name

Ids = npt.NDArray[np.int32]
# of experts in rising order, each at its so many lowest planes; reads begin when it is called
ExpertRows = Callable[[Ids, Ids], Iterator[Rows]]
SHARED: Final = "shared"  # section of the shards of attention: the shared expert's neurons


def router_of(config: ModelConfig, tensors: Mapping[str, Tensor], layer: int) -> Router:
    """tensors: f32, under their Hugging Face names."""
    weights, gate = tensors[router_name(layer)], tensors.get(shared_gate_name(layer))
    return Router(
        exact_rows(weights if gate is None else torch.cat((weights, gate))),
        config.num_experts, config.num_experts_per_tok, config.norm_topk_prob,
        shared=gate is not None,
    )  # fmt: skip


def exact_rows(weights: Tensor) -> ExactRows:
    """An f32 matrix [rows, n] as BF16 rows that add up to it: the first `rows`, then what is left
    of each, and once more, as far as anything is left. The kernels take 16-bit rows only, and give
    the same bits however many tokens share a call."""
    parts, left = list[Tensor](), weights
    for _ in range(3):
        parts.append(left.to(torch.bfloat16))
        left = left - parts[-1].float()
        if not bool(left.any()):
            break
    return ExactRows(RecordLayout(1, weights.shape[1]), torch.cat(parts).contiguous())


def expert_ffn(
    x: Tensor, router: Router, rows_of: ExpertRows, *, levels: tuple[int, ...], norm: Norm,
    act: str, workers: Workers, out_norm: Norm | None = None, shared: Rows | None = None,
    stay: bool = False,
) -> Tensor:  # fmt: skip
    """x [tokens, hidden] f32 plus the weighted FFN outputs of the experts that norm(x) goes to.

    levels: planes that a token's experts are computed with, that of the largest weight first.
    shared: the shared expert, if there is one. stay: rows are valid after the next were asked for,
    so those of one token need not be computed one by one.
    """
    chosen, weights, share = route(x, router, workers, norm=norm)
    planes = planes_by_rank(weights, levels)
    ids, most = _wanted(chosen, planes)
    experts = rows_of(ids, most)  # what is read comes while the shared expert is computed
    out = begin(x, out_norm)
    if shared is not None and share is not None:
        part = torch.zeros_like(x)
        gather_ffn(x, shared, act, workers, norm=norm, into=part)
        out += part * share
    if len(x) == 1:
        groups = [list(experts)] if stay else ([rows] for rows in experts)
        own = weights.split(len(ids) if stay else 1, dim=1)
        for group, some in zip(groups, own, strict=True):
            add_experts(x, group, some, act, workers, norm=norm, into=out)
        return end(x, out, out_norm, workers)
    for i, rows in enumerate(experts):
        mine = chosen == int(ids[i])
        for level in sorted(set(levels)):  # two tokens may want it at different precisions
            tokens, place = (mine & (planes == level)).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            own = rows if isinstance(rows, ExactRows) else rows.lowest(level)
            part = torch.zeros((len(tokens), x.shape[1]), device=x.device)
            gather_ffn(x[tokens], own, act, workers, norm=norm, into=part)
            out.index_add_(0, tokens, part * weights[tokens, place, None])
    return end(x, out, out_norm, workers)


def planes_by_rank(weights: Tensor, levels: tuple[int, ...]) -> Tensor:
    """i64 [tokens, active]: of each token's experts the one with the largest of its `weights` gets
    the first of `levels`, and so on; of equals the lower expert. A token's own weights alone
    decide, so that it does not matter which tokens share the call."""
    if levels[0] == levels[-1]:
        return torch.full(weights.shape, levels[0], device=weights.device)
    order = weights.argsort(dim=1, descending=True, stable=True)
    ranked = torch.tensor(levels, device=weights.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranked)


def _wanted(chosen: Tensor, planes: Tensor) -> tuple[Ids, Ids]:
    """The experts that any token uses, rising, and the most planes that any wants of each."""
    if len(chosen) == 1:
        found = torch.stack((chosen[0], planes[0]))
    else:
        ids, place = torch.unique(chosen, return_inverse=True)
        most = torch.zeros_like(ids).scatter_reduce_(0, place.ravel(), planes.ravel(), "amax")
        found = torch.stack((ids, most))
    ids_of, planes_of = found.to(torch.int32).cpu().numpy()
    return ids_of, planes_of
