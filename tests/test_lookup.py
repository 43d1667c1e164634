"""lookup.py against a search that reads the whole history for every question."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2c.lookup import LONGEST, SHORTEST, Lookup

# few ids, so that repeats are common
TEXTS = st.lists(st.integers(0, 2), max_size=40)


def naive(history: list[int], count: int) -> list[int]:
    """`propose` of a history, by searching it."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(history) - 1, length - 1, -1):
            if history[end - length : end] == history[-length:]:
                text = list(history)
                for at in range(end, end + count):
                    text.append(text[at])
                return text[len(history) :]
    return []


def lookup_of(history: list[int]) -> Lookup:
    lookup = Lookup()
    lookup.extend(history)
    return lookup


def test_the_longest_end_wins_over_a_more_recent_one() -> None:
    #                  ..longest..  next  recent next  end
    lookup = lookup_of([1, 2, 3, 4, 50, 9, 3, 4, 60, 8, 1, 2, 3, 4])
    assert lookup.propose(3) == [50, 9, 3]


def test_among_equally_long_ends_the_most_recent_wins() -> None:
    assert lookup_of([7, 8, 1, 7, 8, 2, 7, 8]).propose(2) == [2, 7]


def test_a_period_is_repeated_beyond_the_end() -> None:
    assert lookup_of([1, 2, 3, 1, 2]).propose(8) == [3, 1, 2, 3, 1, 2, 3, 1]
    assert lookup_of([5, 5, 5]).propose(4) == [5, 5, 5, 5]


@pytest.mark.parametrize("history", [[], [1], [1, 2, 3], [4, 1, 2, 1, 3]])
def test_nothing_is_proposed_after_a_token_that_is_new(history: list[int]) -> None:
    assert lookup_of(history).propose(4) == []
    assert lookup_of(history).match == 0


@pytest.mark.parametrize(
    ("history", "length"),
    [([1, 1], 1), ([4, 1, 2, 1, 3, 1], 1), ([1, 2, 1, 2], 2), ([*range(9), *range(9)], LONGEST)],
)
def test_the_match_is_as_long_as_the_end_that_is_continued(history: list[int], length: int) -> None:
    assert lookup_of(history).match == length
    assert lookup_of(history).propose(1)


def test_zeros_in_front_do_not_make_runs_equal() -> None:
    # as numbers side by side, 0 7 8 and 7 8 would be the same
    assert lookup_of([0, 7, 8, 1, 7, 8]).propose(1) == [1]
    assert lookup_of([0, 0, 1, 0]).match == 1


def test_ids_that_do_not_fit_are_refused() -> None:
    for token in (-1, 1 << 32):
        with pytest.raises(OverflowError):
            Lookup().extend([token])
    largest = (1 << 32) - 1
    assert lookup_of([largest, 1, 2, largest, 1]).propose(1) == [2]


@given(TEXTS, st.integers(0, 12))
@settings(deadline=None)
def test_it_proposes_what_a_search_finds(history: list[int], count: int) -> None:
    assert lookup_of(history).propose(count) == naive(history, count)


@given(TEXTS, st.lists(st.tuples(st.integers(0, 40), TEXTS), max_size=5))
@settings(deadline=None)
def test_rolled_back_tokens_leave_no_trace(start: list[int], steps: list) -> None:
    history, lookup = list(start), lookup_of(start)
    for length, more in steps:
        length = min(length, len(history))
        lookup.truncate(length)
        assert vars(lookup) == vars(lookup_of(history[:length]))
        lookup.extend(more)
        history = history[:length] + more
        assert len(lookup) == len(history)
        assert lookup.propose(6) == naive(history, 6)


def test_a_wrong_truncation_changes_nothing() -> None:
    lookup = lookup_of([1, 2, 1, 2])
    before = copy.deepcopy(vars(lookup))
    for length in (-1, 5):
        with pytest.raises(ValueError, match="cannot truncate 4 tokens"):
            lookup.truncate(length)
    assert vars(lookup) == before


def test_proposing_leaves_the_history_alone() -> None:
    lookup = lookup_of([1, 2, 1, 2])
    assert lookup.propose(5) == lookup.propose(5)
    assert len(lookup) == 4
    assert lookup.propose(0) == []
