"""Rotary positions of a config: how many values of a head turn, and how frequencies are stretched.

`rope_of_hf` reads what a config.json says of them in its several spellings, `hf_of_rope` writes it
back. Knows nothing about torch; the frequencies themselves are in `m2c.model.attention`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.fields import Fields

LONGROPE: Final = "longrope"
ROPE_TYPES: Final = ("linear", "llama3")
PARTIAL: Final = "partial_rotary_factor"
ORIGINAL: Final = "original_max_position_embeddings"
_MAX: Final = "max_position_embeddings"
# what phi3 called longrope before it had this name
_OLD_NAMES: Final = ("su", "yarn")
_LIMIT: Final = 2**31 - 1
_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    LONGROPE: (ORIGINAL, "attention_factor", "short_factor", "long_factor"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. Which fields a rope_type has: `_KEYS`."""

    rope_type: str
    factor: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0  # of what is turned, in q and in k
    # by what each frequency is divided, [rotary / 2], in a context that is no longer than the
    # original one, and in a longer one
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = {key: getattr(self, key) for key in _KEYS[self.rope_type]}
        lists = {key: list(value) for key, value in values.items() if isinstance(value, tuple)}
        return {"rope_type": self.rope_type, **values, **lists}

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, file: str, supported: str, long_pairs: int
    ) -> "RopeScaling":
        """long_pairs: how many pairs turn, in a family that may have longrope; 0: it may not.

        Raises UnsupportedModel for another rope_type, BadInput for a wrong number.
        """
        read = Fields(data, file, where="rope_scaling.")
        known = (*ROPE_TYPES, LONGROPE) if long_pairs else ROPE_TYPES
        rope_type = read.choice("rope_type", known, supported)
        if rope_type == LONGROPE:
            return _long(read, long_pairs)
        factor = read.number("factor", 1.0, 1e6)
        if rope_type == "linear":
            return cls(rope_type, factor)
        low = read.number("low_freq_factor", 1e-6, 1e6)
        high = read.number("high_freq_factor", 1e-6, 1e6)
        if low >= high:
            raise BadInput(f"{file}: rope_scaling.low_freq_factor is not below high_freq_factor")
        return cls(rope_type, factor, low, high, read.integer(ORIGINAL, 1, _LIMIT))


def _long(read: Fields, pairs: int) -> RopeScaling:
    return RopeScaling(
        LONGROPE,
        original_max_position_embeddings=read.integer(ORIGINAL, 2, _LIMIT),
        attention_factor=read.number("attention_factor", 1e-3, 1e3),
        short_factor=read.numbers("short_factor", 1e-3, 1e6, pairs),
        long_factor=read.numbers("long_factor", 1e-3, 1e6, pairs),
    )


def attention_factor(longest: int, original: int, factor: float | None = None) -> float:
    """What longrope multiplies cosines and sines with unless a config says so; factor: by how much
    a context was stretched, if not from `original` to `longest`."""
    factor = longest / original if factor is None else factor
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def rotary_of(read: Fields, head_dim: int, *, partial: bool) -> int | None:
    """rotary_dim of a manifest; None: the whole head turns. Raises BadInput."""
    rotary = read.maybe_integer("rotary_dim", 2, head_dim - 2)
    if rotary is not None and (rotary % 2 or not partial):
        why = "rotary embedding needs pairs" if partial else "this model_type turns whole heads"
        raise BadInput(f"{read.file}: rotary_dim is {rotary}, {why}")
    return rotary


def rope_of_hf(
    data: Mapping[str, Any], defaults: Mapping[str, Any], file: str, supported: str, *,
    head_dim: Any,
) -> dict[str, Any]:  # fmt: skip
    """rope_theta, rope_scaling and rotary_dim, from either the old pair of keys or
    `rope_parameters`.

    defaults: of the family, which has partial rotation and longrope if they name their keys; they
    are in data already.

    Raises UnsupportedModel where we would turn wrongly, BadInput for a value of a wrong type.
    """
    read = Fields(data, file)
    new = read.mapping("rope_parameters")
    rope = dict(new if new is not None else read.mapping("rope_scaling") or {})
    theta = rope.pop("rope_theta", None)
    if theta is None:
        theta = data.get("rope_theta")
    partial = rope.pop(PARTIAL, None)
    if partial is None:
        partial = data.get(PARTIAL)
    nested = any(isinstance(value, dict) for value in rope.values())
    if nested or (PARTIAL not in defaults and partial not in (None, 1.0)):
        raise UnsupportedModel(f"{file}: partial or per-layer rope is not supported", supported)
    rope_type = rope.get("rope_type", rope.get("type", "default"))  # "type" until mid 2024
    scaling = None if rope_type == "default" else {**rope, "rope_type": rope_type}
    if scaling and ORIGINAL in defaults and rope_type in (LONGROPE, *_OLD_NAMES):
        scaling = _long_of_hf(read, rope)
    return {
        "rope_theta": 10000.0 if theta is None else theta,
        "rope_scaling": scaling,
        "rotary_dim": _turned(partial, file, head_dim),
    }


def _long_of_hf(read: Fields, rope: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers' phi3 reads it: the original length is the one beside rope_scaling, and no
    short_mscale or long_mscale counts."""
    own = Fields(rope, read.file, "rope_scaling.")
    longest, original = (read.integer(key, 2, _LIMIT) for key in (_MAX, ORIGINAL))
    attention = own.maybe_number("attention_factor", 1e-3, 1e3)
    if attention is None:
        attention = attention_factor(longest, original, own.maybe_number("factor", 1e-6, 1e6))
    return {**rope, "rope_type": LONGROPE, ORIGINAL: original, "attention_factor": attention}


def _turned(partial: Any, file: str, head_dim: Any) -> int | None:
    """How many values of a head turn; None: all."""
    if partial in (None, 1):
        return None
    read = Fields({PARTIAL: partial, "head_dim": head_dim}, file)
    head_dim, factor = read.integer("head_dim", 2, 2**12), read.number(PARTIAL, 0.0, 1.0)
    turned = int(head_dim * factor)  # as transformers rounds
    if turned < 2 or turned % 2:
        raise BadInput(
            f"{file}: {PARTIAL} {factor:g} turns {turned} of {head_dim} values of a head, rotary "
            "embedding needs pairs"
        )
    return turned


def hf_of_rope(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json that `rope_of_hf` reads as these facts."""
    found, scaling = {"rope_theta": facts["rope_theta"]}, facts["rope_scaling"]
    if facts["rotary_dim"] is not None:
        found[PARTIAL] = _factor(facts["rotary_dim"], facts["head_dim"])
    if scaling and scaling["rope_type"] == LONGROPE:
        scaling = dict(scaling)
        found[ORIGINAL] = original = scaling.pop(ORIGINAL)
        if scaling["attention_factor"] == attention_factor(facts[_MAX], original):
            del scaling["attention_factor"]
    return {**found, "rope_scaling": scaling}


def _factor(turned: int, head_dim: int) -> float:
    """The share of a head that is rounded to `turned` values."""
    factor = turned / head_dim
    return factor if int(head_dim * factor) == turned else math.nextafter(factor, 1)
