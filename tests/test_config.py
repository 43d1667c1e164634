"""config.json in, ModelConfig out: what is accepted, what is refused, what follows from it."""

import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2c.bundle.strict import parse_object
from m2c.errors import BadInput, UnsupportedModel
from m2c.model.aliases import ALIASES
from m2c.model.config import ModelConfig, RopeScaling
from m2c.model.families import MODEL_TYPES
from m2c.model.tensors import dense_matrices, expected_tensors, ffn_names, parameter_count

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SLIDES = {"model_type": "qwen2", "use_sliding_window": True}
SLIDING, FULL = "sliding_attention", "full_attention"

# Of Gemma 3 that sees pictures: patches, places, 27 layers and a norm of width 1152
_EYES = (3 * 14 * 14 + 1 + 4096) * 1152 + 2 * 1152
_EYES += 27 * (4 * (1152 + 1) * 1152 + 2 * 4304 * 1152 + 4304 + 1152 + 4 * 1152)


def _text_of_gemma3(published: int, hidden: int) -> int:
    """Without what reads pictures and what makes tokens of them."""
    return published - _EYES - 1152 * (hidden + 1)


# numbers of weights in the published safetensors files
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-coder-0.5b": 494_032_768,
    "qwen3-0.6b": 751_632_384 - 151936 * 1024,  # the files hold the tied embeddings twice
    "qwen3-1.7b": 2_031_739_904 - 151936 * 2048,  # likewise
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57_408_658_944,
    "mixtral-8x7b": 46_702_792_704,
    "mistral-7b": 7_248_023_552,
    "mistral-small-24b": 23_572_403_200,
    "phi3-mini-4k": 3_821_079_552,
    "phi3-mini-128k": 3_821_079_552,
    "phi3.5-mini": 3_821_079_552,
    "phi4": 14_659_507_200,
    "phi4-mini": 3_836_021_760,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": _text_of_gemma3(4_300_079_472, 2560),
    "gemma3-12b": _text_of_gemma3(12_187_325_040, 3840),
    "gemma3-27b": _text_of_gemma3(27_432_406_640, 5376),
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-coder-1.5b": 1_543_714_304,
    "qwen2.5-coder-3b": 3_085_938_688,
    "qwen2.5-coder-7b": 7_615_616_512,
    "qwen2.5-coder-14b": 14_770_033_664,
    "qwen2.5-coder-32b": 32_763_876_352,
    "prosparse-llama2-7b": 6_738_415_616,
    "prosparse-llama2-13b": 13_015_864_320,
    "granite3.3-2b": 2_533_539_840,
    "granite3.3-8b": 8_170_864_640,
    "falcon-7b": 7_217_189_760 - 65024 * 4544,  # the files hold the tied embeddings twice
    "falcon-40b": 41_835_970_560 - 65024 * 8192,  # likewise
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,  # counted as the others are: there is no safetensors file
}


def test_defaults_are_those_of_hugging_face() -> None:
    config = ModelConfig.from_hf(TINY | {"unknown": [1]})
    assert (config.head_dim, config.hidden_act, config.rms_norm_eps) == (16, "silu", 1e-6)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    flags = (config.tie_word_embeddings, config.qkv_bias, config.o_bias)
    assert flags == (False, False, False)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    without = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    assert ModelConfig.from_hf(without).num_key_value_heads == 4


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (7, (7,)), ([7, 9, 7], (7, 9))])
def test_eos_may_be_absent_one_or_many(eos: Any, ids: tuple[int, ...]) -> None:
    assert ModelConfig.from_hf(TINY | {"eos_token_id": eos}).eos_token_ids == ids


def test_biases_follow_the_architecture() -> None:
    llama = ModelConfig.from_hf(TINY | {"attention_bias": True})
    qwen = ModelConfig.from_hf(TINY | {"model_type": "qwen2", "attention_bias": False})
    assert (llama.qkv_bias, llama.o_bias, qwen.qkv_bias, qwen.o_bias) == (True, True, True, False)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_old_and_new_spelling_of_rope(rope: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(TINY | rope)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def test_other_rope_forms() -> None:
    linear = TINY | {"rope_scaling": {"type": "linear", "factor": 2}}
    assert ModelConfig.from_hf(linear).rope_scaling == RopeScaling("linear", 2.0)
    plain = TINY | {"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}
    assert ModelConfig.from_hf(plain).rope_scaling is None
    assert ModelConfig.from_hf(plain).rope_theta == 7e4


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "deepseek_v2"},
        {"model_type": "qwen2_moe", "mlp_only_layers": [1]},
        {"model_type": "qwen2_moe", "decoder_sparse_step": 2},
        {"model_type": "qwen2_moe", "use_sliding_window": True},
        {"model_type": "qwen2_moe", "qkv_bias": False},
        {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
        {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
        {"model_type": "qwen3_moe", "use_sliding_window": True},
        {"model_type": None},
        {"model_type": ["llama"]},
        {"hidden_act": "gelu_new"},
        {"mlp_bias": True},
        {"quantization_config": {"quant_method": "gptq"}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        {"partial_rotary_factor": 0.5},
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "layer_types": ["chunked_attention"] * 2,
        },
    ],
)
def test_what_we_would_compute_wrongly_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        ModelConfig.from_hf(TINY | change, file="some/config.json")
    assert "some/config.json" in caught.value.message
    assert "llama, qwen2, mistral" in caught.value.hint.replace(" and ", ", ")


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({}, [None, None]),
        ({"sliding_window": 32}, [None, None]),  # llama has none, whatever the file says
        ({"model_type": "mistral"}, [4096, 4096]),
        ({"model_type": "mistral", "sliding_window": 32}, [32, 32]),
        ({"model_type": "mistral", "sliding_window": None}, [None, None]),
        ({"model_type": "qwen2", "sliding_window": 32, "max_window_layers": 1}, [None, None]),
        ({**SLIDES, "sliding_window": 32, "max_window_layers": 1}, [None, 32]),
        ({**SLIDES, "sliding_window": 32}, [None, None]),  # max_window_layers is 28
        ({**SLIDES, "sliding_window": None, "max_window_layers": 1}, [None, None]),
        ({**SLIDES, "sliding_window": 9, "layer_types": [SLIDING, FULL]}, [9, None]),
    ],
)
def test_windows(change: dict[str, Any], windows: list[int | None]) -> None:
    config = ModelConfig.from_hf(TINY | change)
    assert [config.window(layer) for layer in range(2)] == windows
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": True},
        {"hidden_size": 64.0},
        {"hidden_size": "64"},
        {"hidden_size": 0},
        {"hidden_size": 2**17 + 1},
        {"hidden_size": 66},
        {"num_hidden_layers": 4097},
        {"num_hidden_layers": None},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 8},
        {"head_dim": 15},
        {"head_dim": 0},
        {"vocab_size": 2**22 + 1},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": "1e-5"},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": float("inf")},
        {"rope_theta": True},
        {"rope_theta": 10**400},
        {"tie_word_embeddings": 1},
        {"attention_bias": "yes"},
        {"bos_token_id": 128},
        {"bos_token_id": -1},
        {"eos_token_id": True},
        {"eos_token_id": [2, "3"]},
        {"eos_token_id": [1] * 257},
        {"rope_scaling": "llama3"},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0.0}},
        {"rope_scaling": {"rope_type": 3, "factor": 2.0}},
        {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 0}},
        {"model_type": "mistral", "sliding_window": 0},
        {"model_type": "mistral", "sliding_window": "32"},
        {**SLIDES, "layer_types": [SLIDING]},
        {**SLIDES, "layer_types": SLIDING},
        {**SLIDES, "max_window_layers": -1},
    ],
)
def test_wrong_types_and_ranges_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"some/config\.json"):
        ModelConfig.from_hf(TINY | change, file="some/config.json")


def test_manifest_form_is_strict() -> None:
    config = ModelConfig.from_hf(TINY | {"rope_scaling": LLAMA3})
    data = config.to_dict()
    assert ModelConfig.from_dict(data) == config
    with pytest.raises(BadInput, match="'head_dim'"):
        ModelConfig.from_dict({key: data[key] for key in data if key != "head_dim"})
    with pytest.raises(BadInput, match="'extra'"):
        ModelConfig.from_dict(data | {"extra": 1})
    for odd in ({"sliding_window": 9}, {"sliding_window": 9, "sliding_layers": [1, 0]}):
        with pytest.raises(BadInput, match="sliding"):
            ModelConfig.from_dict(data | odd)


GRANITE = {
    **TINY, "model_type": "granite", "embedding_multiplier": 12, "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
}  # fmt: skip


def test_factors_belong_to_granite_alone() -> None:
    config = ModelConfig.from_hf(GRANITE)
    assert (config.embedding_multiplier, config.logits_scaling) == (12.0, 1.0)
    assert ModelConfig.from_hf(config.to_hf()) == config
    data = config.to_dict()
    assert ModelConfig.from_dict(data) == config
    llama = ModelConfig.from_hf(TINY | {"residual_multiplier": 0.5})
    assert llama.residual_multiplier is None
    for odd in (
        llama.to_dict() | {"residual_multiplier": 0.5},
        data | {"residual_multiplier": 0.0},
        data | {"logits_scaling": float("inf")},
        data | {"qk_norm": True},
        data | {"post_norms": True},
        {key: data[key] for key in data if key != "attention_multiplier"},
    ):
        with pytest.raises(BadInput, match=r"multiplier|logits_scaling"):
            ModelConfig.from_dict(odd)


GEMMA3 = {key: TINY[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size")}


def test_what_a_multimodal_gemma_leaves_out() -> None:
    """config.json of gemma-3-4b-it names only what differs from the class it was saved with."""
    text = {**GEMMA3, "model_type": "gemma3_text", "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    config = ModelConfig.from_hf(
        {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_position_embeddings) == (262208, 131072)
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)
    assert config.rope_scaling == RopeScaling("linear", 8.0)
    assert (config.sliding_layers, config.sliding_window) == ((0, 1), 1024)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (1, 106)
    assert ModelConfig.from_hf(config.to_hf()) == config
    for change in (
        {"text_config": None},
        {"text_config": text, "quantization_config": {}},
        {"text_config": {**text, "use_bidirectional_attention": True}},
        {"text_config": {**text, "rope_parameters": {SLIDING: {"rope_type": "linear"}}}},
    ):
        with pytest.raises((BadInput, UnsupportedModel)):
            ModelConfig.from_hf({"model_type": "gemma3", **change})


@pytest.mark.parametrize(
    "spelled", [{"sliding_window_pattern": 2}, {"layer_types": [SLIDING, FULL]}]
)
def test_spellings_of_the_pattern(spelled: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(
        TINY | {"model_type": "gemma3_text", "rope_local_base_freq": 500.0} | spelled
    )
    assert (config.sliding_layers, config.local_rope_theta) == ((0,), 500.0)
    assert ModelConfig.from_hf(TINY | {"model_type": "gemma2"}).sliding_layers == (0,)


def test_the_threshold_of_fatrelu() -> None:
    fat = TINY | {"model_type": "sparsellama", "hidden_act": "fatrelu"}
    config = ModelConfig.from_hf(fat | {"hidden_act_param": 0.01})
    assert config.activation == "fatrelu:0.01"
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert ModelConfig.from_hf(TINY | {"hidden_act_param": 0.01}).activation == "silu"
    for threshold in (None, -0.1, "0.01"):
        with pytest.raises(BadInput, match="hidden_act_param"):
            ModelConfig.from_hf(fat | {"hidden_act_param": threshold})
    with pytest.raises(BadInput, match="fatrelu alone"):
        ModelConfig.from_dict(ModelConfig.from_hf(TINY).to_dict() | {"hidden_act_param": 0.01})


def test_optional_facts_are_named_only_where_they_matter() -> None:
    """Bundles and fingerprints of llama models are as they were before there were such facts."""
    optional = ("sliding_window", "sliding_layers")
    assert not ModelConfig.from_hf(TINY).to_dict().keys() & set(optional)
    slides = ModelConfig.from_hf(TINY | {"model_type": "mistral"})
    assert [slides.to_dict()[name] for name in optional] == [4096, [0, 1]]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


FIELDS = [
    *TINY,
    "rope_scaling",
    "rope_parameters",
    "head_dim",
    "sliding_window",
    "layer_types",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
    "sliding_window_pattern",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "layer_norm_eps",
    "use_qkv_bias",
    "use_parallel_residual",
    "qk_layernorm",
    "text_config",
    "num_kv_heads",
    "ffn_hidden_size",
    "activation",
    "layer_norm_epsilon",
    "new_decoder_architecture",
    "num_ln_in_parallel_attn",
    "multi_query",
    "parallel_attn",
    "bias",
    "ffn_dim",
    "activation_function",
    "enable_bias",
    "word_embed_proj_dim",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "decoder_sparse_step",
    "mlp_only_layers",
    "qkv_bias",
]


@given(st.sampled_from(MODEL_TYPES), st.sampled_from(FIELDS), json_values)
def test_any_value_of_any_field_is_accepted_or_refused_politely(
    family: str, key: str, value: Any
) -> None:
    try:
        config = ModelConfig.from_hf(TINY | {"model_type": family, key: value})
    except (BadInput, UnsupportedModel):
        return
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "falcon", "alibi": True}, "alibi"),
        ({"model_type": "falcon", "num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        (
            {"model_type": "falcon", "new_decoder_architecture": True, "parallel_attn": False},
            "new_decoder_architecture",
        ),
        ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm"),
        ({"model_type": "opt", "do_layer_norm_before": False}, "do_layer_norm_before False"),
        ({"model_type": "opt", "word_embed_proj_dim": 32}, "word_embed_proj_dim"),
        ({"model_type": "opt", "_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ({"model_type": "opt", "layer_norm_elementwise_affine": False}, "elementwise_affine"),
    ],
)
def test_variants_of_a_family_that_do_not_run_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"some/config\.json: .*{named}") as caught:
        ModelConfig.from_hf(TINY | change, file="some/config.json")
    assert caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        {"ffn_bias": True},
        {"parallel_norms": 1, "post_norms": True},
        {"parallel_norms": 3},
        {"gated": 0},
    ],
)
def test_facts_that_do_not_go_together_are_refused(change: dict[str, Any]) -> None:
    facts = ModelConfig.from_hf(TINY).to_dict()
    with pytest.raises(BadInput):
        ModelConfig.from_dict(facts | change)


def test_only_families_with_a_shared_expert_have_one() -> None:
    plain = ModelConfig.from_hf(TINY).to_dict()
    with pytest.raises(BadInput, match="a shared expert in a model_type that has none"):
        ModelConfig.from_dict(plain | {"shared_expert_intermediate_size": 96})
    moe = ModelConfig.from_hf(TINY | {"model_type": "qwen2_moe"}).to_dict()
    assert moe["shared_expert_intermediate_size"] == 5632
    for size in (0, None, 2**21):
        with pytest.raises(BadInput, match="shared_expert_intermediate_size"):
            ModelConfig.from_dict(moe | {"shared_expert_intermediate_size": size})


def test_tensors_of_a_tied_biased_model() -> None:
    config = ModelConfig.from_hf(TINY | {"model_type": "qwen2", "tie_word_embeddings": True})
    tensors = expected_tensors(config)
    assert "lm_head.weight" not in tensors
    assert tensors["model.layers.1.self_attn.k_proj.weight"] == (32, 64)
    assert tensors["model.layers.1.self_attn.k_proj.bias"] == (32,)
    assert "model.layers.1.self_attn.o_proj.bias" not in tensors
    assert [tensors[name] for name in ffn_names(0)] == [(96, 64), (96, 64), (64, 96)]
    assert dense_matrices(config).items() <= tensors.items()


def test_expected_tensors_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    for extra in ({}, {"attention_bias": True}, {"head_dim": 8}):
        hf = transformers.LlamaConfig(**{**TINY, **extra})
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(hf)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        assert expected_tensors(ModelConfig.from_hf(hf.to_dict())) == shapes


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_alias_has_the_published_size(alias: str) -> None:
    config = ALIASES[alias].config()
    assert parameter_count(config) == PUBLISHED[alias]
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 1}}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1} x',
        b'{"a": "\xff"}',
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_json_that_is_not_an_honest_object_is_refused(text: bytes) -> None:
    with pytest.raises(BadInput, match=r"x\.json"):
        parse_object(text, "x.json")


def test_planning_needs_no_torch() -> None:
    code = "import sys, m2c.hub as h; h.alias_config('llama2-7b'); sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=env).returncode == 0
