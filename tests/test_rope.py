"""Longrope and partial rotation: what a config may say of them, what a context makes of it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.attention import Rotary, rope_frequencies
from m2c.model.config import ModelConfig, RopeScaling

TINY: dict[str, Any] = {
    "model_type": "phi3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "max_position_embeddings": 1024, "original_max_position_embeddings": 64,
}  # fmt: skip
SHORT, LONG = [1.0, 1.0, 1.1, 1.5], [1.0, 2.0, 17.5, 60.25]
FACTORS: dict[str, Any] = {"short_factor": SHORT, "long_factor": LONG}
HALF = {"partial_rotary_factor": 0.5}
USUAL = (1 + 4 / 6) ** 0.5  # of 2^6 positions stretched to 2^10


def long(**more: Any) -> dict[str, Any]:
    return {**TINY, **HALF, "rope_scaling": {"type": "longrope", **FACTORS, **more}}


@pytest.mark.parametrize(
    "said",
    [
        {"rope_scaling": {"type": "longrope", **FACTORS}, **HALF},
        {"rope_scaling": {"type": "su", **FACTORS}, **HALF},
        {"rope_scaling": {"rope_type": "yarn", **FACTORS}, **HALF},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **HALF, **FACTORS}},
        {"rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": None, **FACTORS},
            **HALF},
        # transformers takes the length beside it, and knows no scale of the magnitude
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 7,
            "long_mscale": 1.2, "short_mscale": 1.3, **HALF, **FACTORS}},
    ],
)  # fmt: skip
def test_spellings_of_longrope(said: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(TINY | said)
    assert config.rope_scaling == RopeScaling(
        "longrope", original_max_position_embeddings=64, attention_factor=pytest.approx(USUAL),
        short_factor=tuple(SHORT), long_factor=tuple(LONG),
    )  # fmt: skip
    assert (config.rotary_dim, config.rope_theta) == (8, 1e4)
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({}, USUAL),
        ({"factor": 8.0}, (1 + 3 / 6) ** 0.5),
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 1.25, "factor": 8.0}, 1.25),
    ],
)
def test_the_factor_of_cosines_and_sines(change: dict[str, Any], factor: float) -> None:
    config = ModelConfig.from_hf(long(**change))
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == pytest.approx(factor)
    assert ModelConfig.from_hf(config.to_hf()) == config
    for positions in (64, 65):
        cosines, sines = Rotary(config, positions, torch.device("cpu")).tables(local=False)
        assert cosines is not None
        assert sines is not None
        assert cosines.shape == sines.shape == (positions, 4)
        assert torch.allclose(cosines.hypot(sines), torch.tensor(factor))


def test_the_size_of_the_context_chooses_the_factors() -> None:
    config = ModelConfig.from_hf(long())
    plain = rope_frequencies(ModelConfig.from_hf(TINY | HALF), 1024)
    for positions, factors in ((1, SHORT), (64, SHORT), (65, LONG), (1024, LONG)):
        assert torch.allclose(rope_frequencies(config, positions), plain / torch.tensor(factors))


def test_the_original_context_of_a_phi3_that_does_not_say_it() -> None:
    said = {key: long()[key] for key in long() if key != "original_max_position_embeddings"}
    scaling = ModelConfig.from_hf(said).rope_scaling
    assert scaling is not None
    assert (scaling.original_max_position_embeddings, scaling.attention_factor) == (4096, 1.0)


@pytest.mark.parametrize(("share", "turned"), [(0.5, 8), (0.75, 12), (0.3, 4), (1.0, None)])
def test_a_share_of_a_head_turns(share: float, turned: int | None) -> None:
    config = ModelConfig.from_hf(TINY | {"partial_rotary_factor": share})
    assert config.rotary_dim == turned
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert ("rotary_dim" in config.to_dict()) == (turned is not None)


@pytest.mark.parametrize(("said", "turned"), [({}, 4), (HALF, 8), ({**HALF, "rope_theta": 5}, 8)])
def test_stablelm_turns_a_quarter_unless_it_says_so(said: dict[str, Any], turned: int) -> None:
    config = ModelConfig.from_hf(TINY | {"model_type": "stablelm"} | said)
    assert config.rotary_dim == turned
    assert ModelConfig.from_hf(config.to_hf()) == config
    whole = ModelConfig.from_hf(config.to_hf() | {"partial_rotary_factor": 1.0})
    assert whole.rotary_dim is None
    assert ModelConfig.from_hf(whole.to_hf()) == whole


@given(st.integers(2, 1024), st.floats(0, 1))
def test_any_share_comes_back(pairs: int, share: float) -> None:
    """As a number that transformers rounds to the same width."""
    said = TINY | {"head_dim": 2 * pairs, "partial_rotary_factor": share}
    try:
        config = ModelConfig.from_hf(said)
    except BadInput:
        assert int(2 * pairs * share) < 2 or int(2 * pairs * share) % 2
        return
    assert (config.rotary_dim or config.head_dim) == int(2 * pairs * share)
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "change",
    [
        {"partial_rotary_factor": 0.7},  # 11 of 16
        {"partial_rotary_factor": 0.1},
        {"partial_rotary_factor": 0.0},
        {"partial_rotary_factor": -0.5},
        {"partial_rotary_factor": 1.5},
        {"partial_rotary_factor": 10**400},
        {"partial_rotary_factor": float("nan")},
        {"partial_rotary_factor": "0.5"},
        {"partial_rotary_factor": 0.5, "head_dim": 10**400},
        {"partial_rotary_factor": 0.5, "head_dim": -4},
        long(short_factor=SHORT[1:]),
        long(long_factor=[*LONG, 1.0]),
        long(long_factor=[]),
        long(long_factor=None),
        long(short_factor=1.0),
        long(short_factor=[*SHORT[1:], 0.0]),
        long(short_factor=[*SHORT[1:], -1.0]),
        long(long_factor=[*LONG[1:], float("inf")]),
        long(long_factor=[*LONG[1:], float("nan")]),
        long(long_factor=[*LONG[1:], 1e7]),
        long(long_factor=[*LONG[1:], 10**400]),
        long(long_factor=[*LONG[1:], "1"]),
        long(long_factor=[*LONG[1:], True]),
        long(factor=0),
        long(factor="8"),
        long(attention_factor=0),
        long(attention_factor=1e9),
        long() | {"partial_rotary_factor": 1.0},  # factors of half a head
        long() | {"original_max_position_embeddings": 1},
        long() | {"original_max_position_embeddings": None},
        long() | {"max_position_embeddings": 0},
    ],
)
def test_wrong_numbers_are_refused_in_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"some/config\.json") as caught:
        ModelConfig.from_hf(TINY | change, file="some/config.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_width_without_pairs_is_told_by_its_own_key() -> None:
    with pytest.raises(BadInput, match=r"partial_rotary_factor 0\.7 turns 11 of 16 values"):
        ModelConfig.from_hf(TINY | {"partial_rotary_factor": 0.7})


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
def test_families_that_have_neither_are_refused(model_type: str) -> None:
    for said in (HALF, {"rope_scaling": {"type": "longrope", "factor": 2.0, **FACTORS}}):
        with pytest.raises(UnsupportedModel, match=r"some/config\.json"):
            ModelConfig.from_hf(TINY | {"model_type": model_type} | said, file="some/config.json")
    facts = ModelConfig.from_hf(long()).to_dict()
    with pytest.raises(UnsupportedModel, match="longrope"):
        ModelConfig.from_dict({**facts, "model_type": "stablelm"})
    with pytest.raises(BadInput, match="whole heads"):
        ModelConfig.from_dict(facts | {"model_type": "llama"})
    with pytest.raises(UnsupportedModel, match="longrope"):
        ModelConfig.from_dict({**facts, "model_type": "llama", "rotary_dim": None})


@pytest.mark.parametrize("rotary", [0, 7, 16, 18, -2, 8.0, True, "8"])
def test_a_manifest_with_another_width_is_refused(rotary: Any) -> None:
    facts = ModelConfig.from_hf(TINY | HALF).to_dict()
    with pytest.raises(BadInput, match="rotary_dim"):
        ModelConfig.from_dict(facts | {"rotary_dim": rotary})
