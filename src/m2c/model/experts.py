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
# of experts in rising order; reads begin when it is called
ExpertRows = Callable[[Ids], Iterator[Rows]]
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
    x: Tensor, router: Router, rows_of: ExpertRows, *, norm: Norm, act: str, workers: Workers,
    out_norm: Norm | None = None, shared: Rows | None = None, stay: bool = False,
) -> Tensor:  # fmt: skip
    """x [tokens, hidden] f32 plus the weighted FFN outputs of the experts that norm(x) goes to.

    shared: the shared expert, if there is one. stay: rows are valid after the next were asked for,
    so those of one token need not be computed one by one.
    """
    chosen, weights, share = route(x, router, workers, norm=norm)
    used = chosen[0] if len(x) == 1 else torch.unique(chosen)
    ids = used.to(torch.int32).cpu().numpy()
    experts = rows_of(ids)  # what has to be read comes while the shared expert is computed
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
        tokens, place = (chosen == int(ids[i])).nonzero(as_tuple=True)
        part = torch.zeros((len(tokens), x.shape[1]), device=x.device)
        gather_ffn(x[tokens], rows, act, workers, norm=norm, into=part)
        out.index_add_(0, tokens, part * weights[tokens, place, None])
    return end(x, out, out_norm, workers)
