"""sampling.py: what each filter keeps, how often each id is drawn, why drafts change nothing."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2c.errors import BadInput, UsageError
from m2c.sampling import Sampler, SamplingParams, exponentials

PROBABILITIES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
LOGITS = PROBABILITIES.log()

# 99.9 % of fair draws stay below, by degrees of freedom; the seeds are fixed
CHI_SQUARE = {3: 16.27, 4: 18.47, 5: 20.52, 9: 27.88, 15: 37.70}


def chi_square(ids: Sequence[int], expected: torch.Tensor) -> float:
    """How far draws are from a distribution: [n] f64, sums to 1."""
    counts = torch.bincount(torch.tensor(ids), minlength=len(expected)).double()
    assert len(counts) == len(expected)
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    mean = len(ids) * expected[some]
    return float(((counts[some] - mean) ** 2 / mean).sum())


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
    draws = [sampler(LOGITS, range(at)) for at in range(4000)]
    assert chi_square(draws, sampler.probabilities(LOGITS, [])) < CHI_SQUARE[3]
    # and so do those of one position with many seeds
    samplers = [Sampler(SamplingParams(temperature=1.0, seed=seed)) for seed in range(4000)]
    draws = [sampler(LOGITS, [1, 2, 3]) for sampler in samplers]
    assert chi_square(draws, PROBABILITIES.double()) < CHI_SQUARE[4]


@pytest.mark.parametrize("apart", [1, 2, 64])
def test_positions_do_not_know_of_each_other(apart: int) -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=11))
    chances = torch.softmax(LOGITS[:4].double(), dim=0)
    draws = [sampler(LOGITS[:4], range(at)) for at in range(4000 + apart)]
    pairs = [4 * one + other for one, other in zip(draws, draws[apart:], strict=False)]
    assert chi_square(pairs, torch.outer(chances, chances).flatten()) < CHI_SQUARE[15]


def test_seeds_do_not_know_of_each_other() -> None:
    chances = torch.softmax(LOGITS[:4].double(), dim=0)
    # one bit apart, and where a sum of seed and position would give the same noise
    for other_seed, shift in ((5, 0), (1 << 62, 0), (5, 1)):
        one = Sampler(SamplingParams(temperature=1.0, seed=4))
        other = Sampler(SamplingParams(temperature=1.0, seed=other_seed))
        pairs = [
            4 * one(LOGITS[:4], range(at + shift)) + other(LOGITS[:4], range(at))
            for at in range(4000)
        ]
        assert chi_square(pairs, torch.outer(chances, chances).flatten()) < CHI_SQUARE[15]


def test_noise_is_exponential_and_belongs_to_its_id() -> None:
    noise = exponentials(3, 17, np.arange(100_000))
    bins = np.floor(10 * np.exp(-noise)).astype(int)
    assert chi_square(bins.tolist(), torch.full((10,), 0.1).double()) < CHI_SQUARE[9]
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.01
    assert np.array_equal(exponentials(3, 17, np.array([70_000, 5])), noise[[70_000, 5]])
    assert len(np.unique(noise)) == len(noise)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.integers(0, 2**31))
def test_noise_is_never_zero_or_infinite(seed: int, position: int, token: int) -> None:
    (noise,) = exponentials(seed, position, np.array([token]))
    assert 1e-17 < noise < 40


def test_logits_history_and_seed_decide_everything() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler(LOGITS, range(at)) for at in range(50)]

    torch.manual_seed(1)
    first = draws(3)
    torch.manual_seed(2)
    assert draws(3) == first
    assert draws(4) != first
    # in any order, and however often
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3))
    assert [sampler(LOGITS, range(at)) for at in reversed(range(50))] == first[::-1]
    assert {sampler(LOGITS, range(8)) for _ in range(5)} == {first[8]}


def test_a_drawn_seed_is_reported_and_repeats() -> None:
    one = Sampler(SamplingParams(temperature=1.0))
    other = Sampler(SamplingParams(temperature=1.0, seed=one.seed))
    positions = [range(at) for at in range(20)]
    assert [one(LOGITS, p) for p in positions] == [other(LOGITS, p) for p in positions]
    assert Sampler(SamplingParams()).seed != Sampler(SamplingParams()).seed


def test_only_what_the_filters_leave_is_drawn() -> None:
    for params in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.4}):
        sampler = Sampler(SamplingParams(temperature=50.0, seed=1, **params))  # type: ignore[arg-type]
        assert {sampler(LOGITS, range(at)) for at in range(200)} == {0, 1}
    impossible = torch.tensor([-2000.0, 0.0, 0.0, -2000.0])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1))
    assert {sampler(impossible, range(at)) for at in range(200)} == {1, 2}


def test_the_probability_goes_with_the_token() -> None:
    sampler = Sampler(SamplingParams(temperature=1.3, top_k=4, repeat_penalty=1.5, seed=7))
    for at in range(1, 30):
        history = list(range(at % 5)) * 4
        token, probability = sampler.with_probability(LOGITS, history)
        assert token == sampler(LOGITS, history)
        assert probability == sampler.probabilities(LOGITS, history)[token]


def test_at_temperature_0_the_probability_is_that_of_the_model() -> None:
    token, probability = Sampler(SamplingParams(top_k=1)).with_probability(LOGITS, [])
    assert token == 0
    assert probability == pytest.approx(0.5)


# -- drafts ----------------------------------------------------------------------------------------

EXACT = torch.tensor([0.1, 0.4, 0.05, 0.15, 0.1, 0.2]).double()
DRAFT = torch.tensor([0.3, 0.3, 0.1, 0.0, 0.1, 0.2]).double()
DRAFT_LOGITS = DRAFT.log().nan_to_num(neginf=-1e4)

# what a round of one draft token gives, from the draft's and the exact token of this noise, and the
# same two of other noise
Rule = Callable[[int, int, int, int], int]


def distance_of(rule: Rule) -> float:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=5))
    logits = (DRAFT_LOGITS, EXACT.log())
    rounds = [
        rule(*(sampler(of, range(noise)) for noise in (at, at + 100_000) for of in logits))
        for at in range(4000)
    ]
    return chi_square(rounds, EXACT)


def test_a_verified_draft_has_the_exact_distribution() -> None:
    assert distance_of(lambda d, e, d2, e2: d if d == e else e) < CHI_SQUARE[5]


def test_wrong_rules_have_another_distribution() -> None:
    enough = 2 * CHI_SQUARE[5]
    assert distance_of(lambda d, e, d2, e2: d) > enough  # accept always
    assert distance_of(lambda d, e, d2, e2: d if d == e else d2) > enough
    # a second right draw is wrong too: whether it happens depends on the first
    assert distance_of(lambda d, e, d2, e2: d if d == e else e2) > enough


def test_shared_noise_makes_drafts_agree() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=6))
    rounds = 4000
    agreed = sum(
        sampler(DRAFT_LOGITS, range(at)) == sampler(EXACT.log(), range(at)) for at in range(rounds)
    )
    distance = float((EXACT - DRAFT).abs().sum()) / 2
    # four standard deviations of the count are allowed
    assert agreed / rounds > (1 - distance) / (1 + distance) - 2 / math.sqrt(rounds)
    # and is far more than independent draws would agree
    assert agreed / rounds > 2 * float(EXACT @ DRAFT)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("depth", [1, 4])
def test_text_with_drafts_is_the_text_without(temperature: float, depth: int) -> None:
    table = torch.randn((16, 16), generator=torch.Generator().manual_seed(1)) * 3
    rough = table + torch.randn((16, 16), generator=torch.Generator().manual_seed(2))
    sampler = Sampler(SamplingParams(temperature=temperature, repeat_penalty=1.2, seed=9))
    plain = [3]
    while len(plain) < 200:
        plain.append(sampler(table[plain[-1]], plain))
    text, accepted = [3], 0
    while len(text) < 200:
        draft = list(text)
        for _ in range(depth):
            draft.append(sampler(rough[draft[-1]], draft))
        for at in range(len(text), len(draft) + 1):
            text.append(sampler(table[text[-1]], text))
            if at == len(draft) or text[at] != draft[at]:
                break
            accepted += 1
    assert text[:200] == plain
    assert accepted > 50


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0))
    with pytest.raises(BadInput, match="logits are not finite"):
        sampler(torch.tensor([0.0, bad, 1.0]), [])


WRONG = {
    "temperature": (-0.1, math.nan, math.inf),
    "top_k": (-1,),
    "top_p": (0.0, 1.01, math.nan),
    "min_p": (-0.01, 1.5),
    "repeat_penalty": (0.0, math.inf),
    "repeat_last_n": (-1,),
    "seed": (-1, 2**63),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in WRONG for v in WRONG[n]])
def test_params_out_of_range_name_the_option(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
