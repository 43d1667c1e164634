"""sampling.py: what each filter keeps, how often each id is drawn, what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2c.errors import BadInput, UsageError
from m2c.sampling import Sampler, SamplingParams

PROBABILITIES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
LOGITS = PROBABILITIES.log()


def kept(logits: torch.Tensor = LOGITS, **params: float) -> list[int]:
    """Ids that can still be drawn at temperature 1."""
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0, **params))  # type: ignore[arg-type]
    return sampler.probabilities(logits, []).nonzero().flatten().tolist()


def test_greedy_takes_the_lowest_of_equals() -> None:
    sampler = Sampler(SamplingParams())
    assert sampler(torch.tensor([0.0, 3.0, 1.0, 3.0]), []) == 1
    assert sampler(torch.zeros(100_000), []) == 0
    assert sampler.probabilities(torch.tensor([0.0, 3.0, 3.0]), []).tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_may_have_any_float_type_and_stay_unchanged(dtype: torch.dtype) -> None:
    logits = torch.tensor([1.0, 2.0, -1.0], dtype=dtype)
    before = logits.clone()
    assert Sampler(SamplingParams(repeat_penalty=9.0))(logits, [1]) == 0
    assert torch.equal(logits, before)


def test_top_k_keeps_the_lower_id_of_equals() -> None:
    assert kept(top_k=1) == [0]
    assert kept(top_k=4) == [0, 1, 2, 3]
    assert kept(top_k=99) == kept(top_k=0) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert kept(top_p=1e-9) == [0]
    assert kept(top_p=0.49) == [0]
    assert kept(top_p=0.51) == [0, 1]
    assert kept(top_p=0.87) == [0, 1, 2]
    assert kept(top_p=0.88) == [0, 1, 2, 3]
    # of the three that top-k leaves, the first holds 0.57 of the probability
    assert kept(top_k=3, top_p=0.55) == [0]
    assert kept(top_k=3, top_p=0.60) == [0, 1]


def test_min_p_is_relative_to_the_first() -> None:
    assert kept(min_p=0.51) == [0]
    assert kept(min_p=0.49) == [0, 1]
    assert kept(min_p=0.12) == [0, 1, 2, 3, 4]
    assert kept(min_p=1.0) == [0]


def test_temperature_comes_after_the_filters() -> None:
    for temperature in (0.1, 1.0, 10.0):
        params = SamplingParams(temperature=temperature, top_p=0.6, seed=0)
        found = Sampler(params).probabilities(LOGITS, [])
        expected = torch.softmax(LOGITS[:2].double() / temperature, dim=0)
        torch.testing.assert_close(found[:2], expected)
        assert found[2:].sum() == 0


def test_extreme_numbers_stay_finite() -> None:
    for temperature in (5e-324, 1e-30, 1e300):
        params = SamplingParams(temperature=temperature, repeat_penalty=1e30, seed=0)
        logits = torch.tensor([3e38, -3e38, 0.0])
        found = Sampler(params).probabilities(logits, [1])
        assert found.isfinite().all()
        assert found.sum() == pytest.approx(1)


def test_repeat_penalty_lowers_recent_ids_only() -> None:
    logits = torch.tensor([2.0, -2.0, 2.0, 1.0])
    params = SamplingParams(temperature=1.0, repeat_penalty=2.0, repeat_last_n=2, seed=0)
    found = Sampler(params).probabilities(logits, [2, 0, 1, 1, 0])
    expected = torch.softmax(torch.tensor([1.0, -4.0, 2.0, 1.0]).double(), dim=0)
    torch.testing.assert_close(found, expected)
    off = SamplingParams(temperature=1.0, repeat_penalty=2.0, repeat_last_n=0, seed=0)
    untouched = torch.softmax(logits.double(), dim=0)
    torch.testing.assert_close(Sampler(off).probabilities(logits, [0, 1]), untouched)
    torch.testing.assert_close(Sampler(params).probabilities(logits, []), untouched)


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(SamplingParams(temperature=1.3, top_k=4, seed=7))
    expected = sampler.probabilities(LOGITS, [])
    draws = 4000
    counts = torch.bincount(
        torch.tensor([sampler(LOGITS, []) for _ in range(draws)]), minlength=len(LOGITS)
    )
    assert counts[4] == 0
    chi_square = ((counts - draws * expected) ** 2 / (draws * expected))[:4].sum()
    assert chi_square < 16.27  # 99.9 % of the time with 3 degrees of freedom; the seed is fixed


def test_the_seed_decides_everything() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler(LOGITS, []) for _ in range(50)]

    torch.manual_seed(1)
    first = draws(3)
    torch.manual_seed(2)
    assert draws(3) == first
    assert draws(4) != first


def test_a_drawn_seed_is_reported_and_repeats() -> None:
    one = Sampler(SamplingParams(temperature=1.0))
    other = Sampler(SamplingParams(temperature=1.0, seed=one.seed))
    assert [one(LOGITS, []) for _ in range(20)] == [other(LOGITS, []) for _ in range(20)]
    assert Sampler(SamplingParams()).seed != Sampler(SamplingParams()).seed


@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=20).filter(lambda w: sum(w) > 0),
    st.integers(0, 2**63 - 1),
)
@settings(deadline=None)
def test_nothing_of_weight_zero_is_drawn(weights: list[float], seed: int) -> None:
    sampler = Sampler(SamplingParams(seed=seed))
    assert all(weights[sampler.draw(torch.tensor(weights))] > 0 for _ in range(5))


def test_draw_at_the_very_end_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(SamplingParams(seed=0))
    monkeypatch.setattr(sampler, "uniform", lambda: 1.0)
    assert sampler.draw(torch.tensor([1.0, 2.0, 0.0])) == 1
    monkeypatch.setattr(sampler, "uniform", lambda: 0.0)
    assert sampler.draw(torch.tensor([0.0, 1.0, 2.0])) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0))
    with pytest.raises(BadInput, match="logits are not finite"):
        sampler(torch.tensor([0.0, bad, 1.0]), [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.01},
        {"min_p": 1.5},
        {"repeat_penalty": 0.0},
        {"repeat_penalty": math.inf},
        {"repeat_last_n": -1},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_params_out_of_range_name_the_option(wrong: dict[str, float]) -> None:
    option = next(iter(wrong)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--{option} is"):
        SamplingParams(**wrong)  # type: ignore[arg-type]
