"""The text that m2c calibrates on when the user names none: the openings of two novels.

Knows nothing about tokens. Where the text comes from: NOTICE, scripts/make_texts.py.
"""

from importlib.resources import files


def calibration_text() -> str:
    """About 300 KB of English prose, one paragraph per line, paragraphs a blank line apart."""
    return files(__name__).joinpath("calibration.txt").read_text(encoding="utf-8")
