"""The reference kernels: dense rows and FFN neurons times activations, in torch, f32.

Every faster kernel is tested against these. A call is cut into chunks of CHUNK rows and partial
sums are added in chunk order, so the result depends neither on the threads nor on the tier the rows
lie in. Knows nothing about layers, caches or files.
"""

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from m2c.kernels.operands import AttentionCall, Norm, Router, activation_of
from m2c.kernels.rows import Rows
from m2c.kernels.workers import Workers

CHUNK: Final = 256


def activation(act: str) -> Callable[[Tensor], Tensor]:
    """The function that `act` names."""
    name, threshold = activation_of(act)
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
        "fatrelu": partial(F.threshold, threshold=threshold, value=0.0),
    }
    return known[name]


def matmul_rows(x: Tensor, rows: Rows, workers: Workers, *, into: Tensor | None = None) -> Tensor:
    """x [tokens, length] f32 times every row of a dense matrix: [tokens, rows] f32.

    into: where to put it, columns of a larger tensor for example.
    """
    out = torch.empty(len(x), len(rows), device=x.device) if into is None else into

    def piece(i: int) -> None:
        start, stop = _bounds(i, rows)
        values = rows.values(start, stop).to(x.device)
        out[:, start:stop] = F.linear(x, values[:, 0])

    workers.map(piece, _chunks(rows))
    return out


def gate_up(
    x: Tensor, rows: Rows, act: str, workers: Workers, *, bias: Tensor | None = None
) -> Tensor:
    """act(x . gate) * (x . up) of every neuron: x [tokens, hidden] f32 to [tokens, rows] f32.

    Neurons of two vectors have no gate: act(x . up + bias), bias [rows] f32.
    """
    function, last = activation(act), rows.layout.vectors - 1

    def piece(i: int) -> Tensor:
        start, stop = _bounds(i, rows)
        values = rows.values(start, stop, first=0, last=last).to(x.device)
        return _activations(x, values, function, _part(bias, start, stop))

    return torch.cat(workers.map(piece, _chunks(rows)), dim=1)


def _activations(
    x: Tensor, values: Tensor, function: Callable[[Tensor], Tensor], bias: Tensor | None
) -> Tensor:
    """values: gate and up rows, or up rows alone, [rows, vectors, hidden]."""
    first = F.linear(x, values[:, 0], bias)
    return function(first) * F.linear(x, values[:, 1]) if values.shape[1] == 2 else function(first)


def _part(bias: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if bias is None else bias[start:stop]


def down(
    activations: Tensor, rows: Rows, workers: Workers, *, into: Tensor | None = None
) -> Tensor:
    """Sum over neurons of activation * down column: [tokens, rows] f32 to [tokens, hidden].

    into: what the sum is added to, chunk after chunk; how rows are cut into calls of whole chunks
    then does not change a bit.
    """

    def piece(i: int) -> Tensor:
        start, stop = _bounds(i, rows)
        values = rows.values(start, stop, first=rows.layout.vectors - 1).to(activations.device)
        return activations[:, start:stop] @ values[:, 0]

    return _sum(workers.map(piece, _chunks(rows)), into)


def gather_ffn(
    x: Tensor, rows: Rows, act: str, workers: Workers, *, mask: Tensor | None = None,
    into: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The FFN output of gathered neurons: x [tokens, hidden] f32 to [tokens, hidden] f32.

    into: as in `down`. bias: as in `gate_up`.

    mask: [tokens, rows] f32 or None, multiplies each neuron's activation: with several tokens in
    one pass, a neuron may be active for some of them only.
    """
    function = activation(act)

    def piece(i: int) -> Tensor:
        start, stop = _bounds(i, rows)
        values = rows.values(start, stop).to(x.device)
        hidden = _activations(x, values[:, :-1], function, _part(bias, start, stop))
        if mask is not None:
            hidden = hidden * mask[:, start:stop]
        return hidden @ values[:, -1]

    if not len(rows):
        return torch.zeros_like(x) if into is None else into
    return _sum(workers.map(piece, _chunks(rows)), into)


def rank(activations: Tensor, norms: Tensor, best: list[tuple[int, int]]) -> Tensor:
    """Levels i8 [tokens, neurons]: for each (count, level) in turn, the `count` neurons with the
    largest |activation| * norm get `level`; 0 elsewhere. norms: [neurons] f32.
    """
    scores = activations.abs() * norms
    levels = torch.zeros(scores.shape, dtype=torch.int8, device=scores.device)
    for count, level in best:
        levels.scatter_(1, scores.topk(count, dim=1).indices, level)
    return levels


def route(logits: Tensor, router: Router) -> tuple[Tensor, Tensor, Tensor | None]:
    """Experts i64, rising, and their weights, both [tokens, active], and the weight of the shared
    expert [tokens, 1], if there is one. Of equals the lower expert is chosen.

    logits: products of tokens and the router's rows [tokens, rows].
    """
    parts = logits.split(router.experts + router.shared, dim=1)
    whole, gate = sum(parts[1:], start=parts[0]).split((router.experts, int(router.shared)), 1)
    best, chosen = whole.softmax(-1).sort(dim=-1, descending=True, stable=True)
    best, chosen = best[:, : router.active], chosen[:, : router.active]
    if router.sums_to_one:
        best = best / best.sum(-1, keepdim=True)
    chosen, order = chosen.sort(dim=-1)
    if not router.shared:
        return chosen, best.gather(1, order), None
    # torch's own sigmoid may round a number differently when others share the call
    gate = torch.cat((gate, torch.zeros_like(gate)), dim=1).softmax(-1)[:, :1]
    return chosen, best.gather(1, order), gate


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def apply_norm(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    if norm.bias is None:
        return rms_norm(x, norm.weight, norm.eps)
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def soft_capped(x: Tensor, cap: float) -> Tensor:
    return (x / cap).tanh() * cap


def rotate(x: Tensor, call: AttentionCall, start: int) -> Tensor:
    """x [tokens, heads, dim] turned by the angles of its tokens, if positions turn anything."""
    if call.cosines is None or call.sines is None:
        return x
    own = slice(start, start + len(x))
    cosines, sines = call.cosines[own, None], call.sines[own, None]
    turned, rest = x[..., : call.rotary], x[..., call.rotary :]
    low, high = turned.chunk(2, dim=-1)
    return torch.cat((low * cosines - high * sines, high * cosines + low * sines, rest), dim=-1)


def attention(
    x: Tensor, call: AttentionCall, start: int, workers: Workers, *, norm: Norm,
    matmul: Callable[[Tensor, Rows, Workers], Tensor] = matmul_rows,
    inputs: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """x [tokens, hidden] f32, the first at position `start`, plus the attention of norm(x).

    Stores keys and values. inputs: receives the inputs of q, k, v and that of o (calibration).
    """
    normed = apply_norm(x, norm)
    tokens, stop, dim = len(x), start + len(x), call.keys.shape[2]
    made = [
        _biased(matmul(normed, rows, workers), bias).view(tokens, -1, dim)
        for rows, bias in zip(call.projections[:3], call.biases[:3], strict=True)
    ]
    q, k = (rotate(apply_norm(made[i], call.qk_norms[i]), call, start) for i in range(2))
    call.keys[:, start:stop] = k.transpose(0, 1)
    call.values[:, start:stop] = made[2].transpose(0, 1)
    mixed = _softmax_attention(q, call, start)
    if inputs is not None:
        inputs += [normed, mixed]
    out = _biased(matmul(mixed, call.projections[3], workers), call.biases[3])
    return x + apply_norm(out, call.out_norm)


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def _softmax_attention(q: Tensor, call: AttentionCall, start: int) -> Tensor:
    """q [tokens, heads, dim] over the keys and values of a call: [tokens, heads * dim].

    Causal: the token at position start + t sees positions up to its own, as many as its window.
    """
    tokens, heads, dim = q.shape
    stop = start + tokens
    window = call.window or stop
    first = max(0, start + 1 - window)  # what the first token sees
    keys, values = call.keys[:, first:stop].float(), call.values[:, first:stop].float()
    groups = keys.shape[0]
    # heads that share keys become rows of one product: broadcasting would copy the keys
    grouped = q.view(tokens, groups, -1, dim).permute(1, 2, 0, 3).reshape(groups, -1, dim)
    scores = grouped @ keys.transpose(-1, -2) * call.scale  # [kv, shared * tokens, positions]
    if call.softcap is not None:
        # and NaN of an infinite score, of which the cap would make a number
        scores = soft_capped(scores, call.softcap) + (scores - scores)
    if tokens > 1:
        positions = torch.arange(first, stop, device=q.device)
        own = torch.arange(start, stop, device=q.device)[:, None]
        hidden = ((positions > own) | (positions <= own - window)).repeat(heads // groups, 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    mixed = (scores.softmax(dim=-1) @ values).view(groups, -1, tokens, dim)
    return mixed.permute(2, 0, 1, 3).reshape(tokens, heads * dim)


def _chunks(rows: Rows) -> int:
    return -(-len(rows) // CHUNK)


def _bounds(i: int, rows: Rows) -> tuple[int, int]:
    return i * CHUNK, min((i + 1) * CHUNK, len(rows))


def _sum(parts: list[Tensor], into: Tensor | None) -> Tensor:
    if into is None:
        into = torch.zeros_like(parts[0])
    for part in parts:
        into += part
    return into
