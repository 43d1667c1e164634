"""What goes to stdout: pages of lines that break between words only."""

import pytest

from m2c.cli.console import result_page


def test_a_page_breaks_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    long = "/" + "very-long/" * 20 + "model.m2c"
    result_page(["short", "", "  a path: " + long, "word " * 30])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["short", "", "  a path:"]
    assert lines[3].strip() == long
    assert [len(line) <= 80 for line in lines] == [True, True, True, False, *[True] * 2]
    assert lines[-1].startswith("  word")
