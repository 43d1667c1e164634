"""The C kernels of a mixture of experts against what they put together."""

import pytest
import torch
from running import inputs
from test_native import KINDS, make_rows

from m2c.kernels.dispatch import add_experts, gather_ffn
from m2c.kernels.native import LIBRARY
from m2c.kernels.operands import Norm
from m2c.kernels.workers import Workers

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the native kernels were not built")


def norm_for(length: int) -> Norm:
    return Norm(1 + 0.1 * inputs(1, length, seed=9)[0], 1e-5)


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
