"""The C kernels of a mixture of experts against what they put together."""

from itertools import product

import pytest
import torch
from running import inputs
from test_native import KINDS, make_rows

from m2c.kernels import reference
from m2c.kernels.dispatch import add_experts, gather_ffn, route
from m2c.kernels.native import LIBRARY
from m2c.kernels.operands import Norm, Router
from m2c.kernels.workers import Workers
from m2c.model.experts import exact_rows

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the native kernels were not built")


def norm_for(length: int) -> Norm:
    return Norm(1 + 0.1 * inputs(1, length, seed=9)[0], 1e-5)


@pytest.mark.parametrize("kernel", ["scalar", "auto", "torch"])
@pytest.mark.parametrize(("experts", "active"), [(2, 1), (60, 4), (128, 8), (5, 5)])
def test_routes_are_those_of_float64(kernel: str, experts: int, active: int) -> None:
    x, weights = 3 * inputs(67, 96), inputs(experts, 96, seed=1) / 8
    gate, workers = inputs(1, 96, seed=2) / 8, Workers(2, kernel=kernel)
    shares = (x.double() @ weights.double().T).softmax(-1)
    best, expected = shares.topk(active)
    for sums_to_one, shared in product((True, False), (True, False)):
        rows = exact_rows(torch.cat((weights, gate)) if shared else weights)
        router = Router(rows, experts, active, sums_to_one, shared)
        chosen, own, share = route(x, router, workers, norm=None)
        assert torch.equal(chosen, expected.sort(-1).values)
        true = shares.gather(1, chosen) / (best.sum(-1, keepdim=True) if sums_to_one else 1)
        assert (own - true).abs().max() < 2e-6
        assert (share is not None) == shared
        if share is not None:
            assert (share - (x.double() @ gate.double().T).sigmoid()).abs().max() < 2e-6
    workers.close()


@pytest.mark.parametrize("kernel", ["scalar", "auto"])
def test_a_route_is_the_same_whatever_shares_the_call(kernel: str) -> None:
    x, norm = 3 * inputs(67, 96), norm_for(96)
    router = Router(exact_rows(inputs(61, 96, seed=1) / 8), 60, 4, True, shared=True)
    workers = Workers(1, kernel=kernel)
    together = route(x, router, workers, norm=norm)
    workers.close()
    workers = Workers(3, kernel=kernel)
    alone = [route(one[None], router, workers, norm=norm) for one in x]
    workers.close()
    for i, whole in enumerate(together):
        assert whole is not None
        assert torch.equal(torch.cat([one[i] for one in alone]), whole)


def test_the_reference_routes_a_token_alike_whatever_shares_the_call() -> None:
    """Of the same logits: torch's sums of products depend on how many tokens there are."""
    logits = 3 * inputs(1003, 9)
    router = Router(exact_rows(inputs(9, 32)), 8, 2, False, shared=True)
    together = reference.route(logits, router)
    for i, one in enumerate(logits):
        for whole, alone in zip(together, reference.route(one[None], router), strict=True):
            assert whole is not None
            assert alone is not None
            assert torch.equal(whole[i], alone[0])


@pytest.mark.parametrize("kernel", ["scalar", "auto", "torch"])
def test_of_equal_experts_the_lower_are_chosen(kernel: str) -> None:
    x, workers = torch.eye(8)[:2], Workers(1, kernel=kernel)
    weights = torch.tensor([[0.0, 2.0], [1.0, 2.0], [1.0, 0.0], [1.0, 3.0]]).repeat(1, 4)
    chosen, _, share = route(x, Router(exact_rows(weights), 4, 2, True), workers, norm=None)
    workers.close()
    assert chosen.tolist() == [[1, 2], [0, 3]]
    assert share is None


@pytest.mark.parametrize("kernel", ["scalar", "auto", "torch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_route_of_what_is_not_finite_is_not_finite(kernel: str, bad: float) -> None:
    """And goes to experts that there are."""
    x, workers = inputs(3, 96), Workers(1, kernel=kernel)
    x[1, 5] = bad
    router = Router(exact_rows(inputs(61, 96, seed=1)), 60, 4, True, shared=True)
    chosen, weights, share = route(x, router, workers, norm=None)
    workers.close()
    assert share is not None
    assert ((chosen >= 0) & (chosen < 60)).all()
    assert not weights[1].isfinite().any()
    assert weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["scalar", "auto", "torch"])
@pytest.mark.parametrize("threads", [1, 3])
def test_experts_in_one_call_give_the_bits_of_one_by_one(
    kind: str, kernel: str, threads: int
) -> None:
    """And of as many calls with one expert each, in the same order."""
    x, weights = inputs(1, 96), torch.tensor([[0.3, 1e-3, 0.61, 0.0]])
    experts = [make_rows(kind, count, 3, 96, scale=0.2) for count in (300, 7, 256, 513)]
    workers, norm = Workers(threads, kernel=kernel), norm_for(96)
    together, apart = inputs(1, 96, seed=2), inputs(1, 96, seed=2)
    expected = together.clone()
    add_experts(x, experts, weights, "silu", workers, norm=norm, into=together)
    for i, rows in enumerate(experts):
        add_experts(x, [rows], weights[:, i : i + 1], "silu", workers, norm=norm, into=apart)
        part = torch.zeros_like(x)
        gather_ffn(x, rows, "silu", workers, norm=norm, into=part)
        expected += part * weights[:, i, None]
    workers.close()
    assert torch.equal(together, expected)
    assert torch.equal(apart, expected)
