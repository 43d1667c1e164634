"""units.py: sizes as people write them, and as they are shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2c.errors import UsageError
from m2c.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("20GiB", 20 << 30),
        ("512 mib", 512 << 20),
        (" 1.5GB ", 1_500_000_000),
        ("4KB", 4000),
        ("0B", 0),
        ("2tib", 2 << 40),
    ],
)
def test_what_people_write(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("4", "'4' has no unit; did you mean 4GiB?"),
        ("1.5", "'1.5' has no unit; did you mean 1.5GiB?"),
        ("4G", "'4G' has the unknown unit 'G'"),
        ("4EiB", "unknown unit"),
        ("", "'' is not a size"),
        ("GiB", "is not a size"),
        ("-1GiB", "is not a size"),
        ("1e9B", "is not a size"),
        ("1,5GB", "is not a size"),
        ("٣GiB", "is not a size"),
        ("nanGiB", "is not a size"),
        ("9" * 40 + "GiB", "is not a size"),
    ],
)
def test_what_means_nothing(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert reason in str(caught.value)


@given(st.integers(0, 1 << 50))
def test_a_size_survives_being_shown(nbytes: int) -> None:
    # two decimals are shown
    assert parse_size(format_size(nbytes)) == pytest.approx(nbytes, rel=0.006)
