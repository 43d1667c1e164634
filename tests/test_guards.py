"""The list of guards that scripts/mutate.py takes away is that of the code as it is."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from guards import GUARDS, Guard  # noqa: E402


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_a_guard_is_where_the_list_says(guard: Guard) -> None:
    text = (ROOT / "src" / "m2c" / guard.file).read_text()
    assert text.count(guard.old) == 1
    assert guard.old != guard.new


def test_there_are_enough_of_them() -> None:
    assert len({guard.name for guard in GUARDS}) == len(GUARDS) >= 40
