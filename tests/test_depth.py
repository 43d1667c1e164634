"""depth.py in simulated worlds: it comes close to the best fixed depth, and sees things change."""

from dataclasses import dataclass

import numpy as np
import pytest

from m2c.depth import MOST, Depth, Line

FIXED = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class Costs:
    """Seconds: per draft token, per pass, per token of a pass."""

    draft: float
    base: float
    slope: float


EXPENSIVE_PASS = Costs(0.02, 1.0, 0.01)
BALANCED = Costs(0.05, 0.3, 0.02)
CHEAP_PASS = Costs(0.1, 0.12, 0.01)
DEAR_DRAFT = Costs(0.3, 0.2, 0.01)
DEAR_TOKENS = Costs(0.01, 0.1, 0.1)


@dataclass(frozen=True)
class Text:
    """Per position: how sure the draft would be, and whether it would be right."""

    sure: list[float]
    right: list[bool]


def text_of(kind: str, tokens: int = 20_000) -> Text:
    rng = np.random.default_rng(1)
    if kind == "calibrated":
        sure = 1 - rng.beta(1, 15, tokens)
    elif kind == "easy and hard":
        easy = np.cumsum(rng.random(tokens) < 0.05) % 2 == 0
        sure = np.where(easy, 0.99, rng.choice([0.9, 0.4], tokens))
    else:
        sure = rng.random(tokens)
    chance = {"useless": np.zeros(tokens), "too sure": np.full(tokens, 0.6)}.get(kind, sure)
    return Text(sure.tolist(), (rng.random(tokens) < chance).tolist())


def play(
    text: Text, costs: Costs, depth: Depth | int, *, rounds: int, noisy: bool = True
) -> tuple[float, list[int]]:
    """Tokens per second, counted without noise, and the draft tokens of each round.

    A pass is measured 5 % wrong, and one in a hundred takes ten times as long.
    """
    rng = np.random.default_rng(2)
    at, seconds, depths = 0, 0.0, []
    for _ in range(rounds):
        assert at + MOST < len(text.sure)
        count = depth if isinstance(depth, int) else drafted(text, costs, depth, at)
        right = 0
        while right < count and text.right[at + right]:
            right += 1
        passed = costs.base + costs.slope * (count + 1)
        seconds += count * costs.draft + passed
        if isinstance(depth, Depth):
            odd = rng.lognormal(0, 0.05) * (10 if rng.random() < 0.01 else 1) if noisy else 1.0
            depth.passed(count + 1, passed * odd)
            depth.accepted(text.sure[at : at + count], right)
        at += right + 1
        depths.append(count)
    return at / seconds, depths


def drafted(text: Text, costs: Costs, depth: Depth, at: int) -> int:
    """Draft tokens of a round that begins at this position."""
    count = 0
    while depth.again(text.sure[at : at + count]):
        count += 1
        depth.drafted(costs.draft)
    return count


@pytest.mark.parametrize("kind", ["calibrated", "easy and hard", "too sure", "useless"])
@pytest.mark.parametrize("costs", [EXPENSIVE_PASS, BALANCED, CHEAP_PASS, DEAR_DRAFT, DEAR_TOKENS])
def test_it_is_as_fast_as_the_best_fixed_depth(kind: str, costs: Costs) -> None:
    text = text_of(kind)
    best = max(play(text, costs, depth, rounds=600)[0] for depth in FIXED)
    assert play(text, costs, Depth(), rounds=600)[0] > 0.95 * best


def test_it_beats_every_fixed_depth_where_confidence_tells_much() -> None:
    text = text_of("easy and hard")
    best = max(play(text, BALANCED, depth, rounds=600)[0] for depth in FIXED)
    assert play(text, BALANCED, Depth(), rounds=600)[0] > 1.1 * best


def test_a_useless_draft_is_tried_now_and_then_and_no_more() -> None:
    depths = play(text_of("useless"), BALANCED, Depth(), rounds=600)[1]
    later = depths[100:]
    assert max(later) == 1
    # each costs 0.07 s, and 2 % of the time of passes of 0.32 s may go there
    assert sum(later) == pytest.approx(0.02 * 500 * 0.32 / 0.07, rel=0.25)


def test_a_draft_that_becomes_useful_is_found_out() -> None:
    depth = Depth()
    play(text_of("useless"), EXPENSIVE_PASS, depth, rounds=300)
    assert depth.acceptance < 0.05
    depths = play(text_of("calibrated"), EXPENSIVE_PASS, depth, rounds=100)[1]
    assert np.mean(depths[50:]) > 10


def test_costs_that_change_are_followed() -> None:
    depth, text = Depth(), text_of("calibrated")
    short = play(text, CHEAP_PASS, depth, rounds=200)[1][100:]
    deep = play(text, EXPENSIVE_PASS, depth, rounds=200)[1][100:]
    assert np.mean(short) < 4
    assert np.mean(deep) > 15
    again = play(text, CHEAP_PASS, depth, rounds=200)[1][100:]
    assert np.mean(again) < 4


def test_it_never_drafts_more_than_the_cap() -> None:
    free = Costs(0.0, 1.0, 0.0)
    depths = play(Text([1.0] * 9000, [True] * 9000), free, Depth(), rounds=200)[1]
    assert max(depths) == depths[-1] == MOST == 32


def test_a_doubtful_token_ends_the_round() -> None:
    depth = Depth()
    play(text_of("easy and hard"), BALANCED, depth, rounds=300)
    assert depth.again([0.99])
    assert depth.again([0.99] * 3)
    assert not depth.again([0.4])
    assert not depth.again([0.99, 0.99, 0.4])


def test_only_tokens_up_to_the_first_rejected_count() -> None:
    depth, same = Depth(), Depth()
    for _ in range(50):
        depth.accepted([0.5, 0.5, 0.5, 0.5], 1)
        same.accepted([0.5, 0.5], 1)
    assert depth.acceptance == same.acceptance == pytest.approx(0.5, abs=0.1)
    depth.accepted([], 0)
    assert depth.acceptance == same.acceptance


@pytest.mark.parametrize("count", [-1, 3])
def test_a_wrong_count_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="of 2 draft tokens"):
        Depth().accepted([0.5, 0.5], count)


def test_the_report_says_what_was_measured() -> None:
    depth = Depth()
    play(text_of("calibrated"), BALANCED, depth, rounds=200, noisy=False)
    assert depth.draft_s == pytest.approx(0.05)
    assert depth.pass_s == pytest.approx(0.32)
    assert depth.pass_token_s == pytest.approx(0.02)
    assert depth.acceptance == pytest.approx(15 / 16, abs=0.06)


def test_a_line_survives_odd_measurements() -> None:
    rng = np.random.default_rng(3)
    line = Line()
    for n in range(200):
        tokens = int(rng.integers(1, 20))
        line.add(tokens, (2 + 0.1 * tokens) * (50 if n % 8 == 0 else 1))
    assert line.at(1) == pytest.approx(2.1, rel=0.02)
    assert line.slope == pytest.approx(0.1, rel=0.05)


def test_a_slope_is_never_negative_and_stays_when_nothing_tells_it() -> None:
    falling = Line()
    for tokens in (1, 5, 3, 9):
        falling.add(tokens, 10 - tokens)
    assert falling.slope == 0
    line = Line()
    for tokens in (1, 5, 3, *[7] * 100):
        line.add(tokens, 1 + 0.5 * tokens)
    assert (line.base, line.slope) == pytest.approx((1, 0.5))
    for _ in range(50):
        line.add(7, 9.0)
    assert line.at(7) == pytest.approx(9)
    assert line.slope == pytest.approx(0.5)


def test_a_draft_that_is_there_already_is_weighed_with_its_own_confidence() -> None:
    depth = Depth()
    for _ in range(200):
        depth.passed(1, 1.0)
        depth.passed(3, 1.2)
        depth.accepted([0.92], 1)
        depth.accepted([0.25], 0)
    assert depth.again([], 0.92)
    assert depth.again([0.92], 0.92)
    assert not depth.again([], 0.25)
    assert not depth.again([0.92], 0.25)
    # 1 + 1 + 1 tokens in 1.2 s; a doubtful one is left out, and those behind it
    assert depth.rate([0.92, 0.92]) == pytest.approx(3 / 1.2, rel=0.05)
    assert depth.rate([0.25, 0.92]) == depth.rate([]) == pytest.approx(1.0)
    assert Depth().rate() == Depth().rate([0.5]) == 0
