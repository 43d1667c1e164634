"""Figures in words, for whoever cannot import what made them.

Knows nothing about where they are from.
"""


def tps(value: float) -> str:
    """Tokens per second with the digits that mean something."""
    if 0 < value < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
