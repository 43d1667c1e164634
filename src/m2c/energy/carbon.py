"""From joules to what people compare: J/token, Wh and grams of CO2e per 1000 tokens.

Operational and embodied carbon are told apart, as the Software Carbon Intensity specification does
(ISO/IEC 21031:2024): location-based intensity, no offsets, all of the machine's hardware. Every
default names its source. Knows nothing about counters.
"""

from dataclasses import dataclass
from typing import Final

GRID_G_PER_KWH: Final = 481.0
GRID_SOURCE: Final = "world average of 2023, Ember (July 2024)"
PUE: Final = 1.0  # a desktop: no cooling plant beside it
LIFETIME_YEARS: Final = 5.0
LIFETIME_SOURCE: Final = "as EcoLogits assumes"
YEAR_S: Final = 365.25 * 86400
_KWH_J: Final = 3.6e6
_DRAM: Final = (65.0, "ACT, DDR4 of 10 nm: 65 g/GB")
_SSD: Final = (6.3, "ACT, TLC NAND: 6.3 g/GB")
_GPU: Final = (143e3, "that of an A100 80 GB, Boavizta by EcoLogits: 143 kg a card")
UNCOUNTED: Final = "processor, mainboard, case and power supply: no figure that fits any machine"


@dataclass(frozen=True)
class Part:
    """Making a part of the machine, grams of CO2e: an estimate."""

    name: str
    grams: float
    source: str


def wh_per_1k(joules_per_token: float) -> float:
    return joules_per_token / 3.6


def operational_g(joules: float, grid_g_per_kwh: float) -> float:
    return joules / _KWH_J * PUE * grid_g_per_kwh


def embodied_g(total_g: float, seconds: float) -> float:
    """What `seconds` of use owe of the grams that making all of the hardware took."""
    return total_g * seconds / (LIFETIME_YEARS * YEAR_S)


def parts_of(dram_nbytes: int, ssd_nbytes: int, gpus: int) -> list[Part]:
    """The parts of a machine that have a default figure."""
    found = [
        Part("DRAM", dram_nbytes / 1e9 * _DRAM[0], _DRAM[1]),
        Part("SSD", ssd_nbytes / 1e9 * _SSD[0], _SSD[1]),
    ]
    return found + [Part("GPU", gpus * _GPU[0], _GPU[1])] * (gpus > 0)
