"""Every family of models against transformers: its own config, its own files, its own logits.

transformers makes the checkpoint, so that what a family leaves out of config.json and how it calls
and fuses its tensors is theirs, not ours.
"""

import importlib.util
import json
import shutil
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from running import MIXES, decode, inputs, options_for, same, smallest_dram
from safetensors.torch import load_file, save_file
from tiny_models import job_for, make_checkpoint_script, profile_folder, run_pack

from m2c import mixsearch, speculate
from m2c.bundle.bundle import Bundle, open_bundle
from m2c.contents import config_of, importance_of
from m2c.engine import Engine
from m2c.evaluate import cut, options_within, predictions_of
from m2c.generate import generate_step, prefill
from m2c.kernels.native import LIBRARY
from m2c.kernels.operands import Norm
from m2c.kernels.reference import apply_norm, gather_ffn
from m2c.kernels.rows import ExactRows
from m2c.kernels.workers import Workers
from m2c.model.checkpoint import open_checkpoint
from m2c.model.families import FAMILIES
from m2c.model.ffn import Ids, mixed_ffn, uniform_ffn
from m2c.model.mix import Mix
from m2c.model.tensors import up_bias_name
from m2c.model.transformer import Transformer
from m2c.model.weights import layer_rows, vector_tensors
from m2c.modes import exact_options
from m2c.sampling import Sampler, SamplingParams
from m2c.speculate import Speculator

transformers = pytest.importorskip("transformers")

EXACT = Mix(100, 0, 0)
IDS = np.array([1, 299, 7, 7, 42, 260, 0, 13, 128, 5, 77, 31, 9, 200, 100, 64, 2, 3], np.int32)
SIZES: dict[str, Any] = {
    "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
FAT = 0.3
SLIDING, FULL = "sliding_attention", "full_attention"
FACTORS = {
    "short_factor": [1.0, 1.1, 1.25, 1.5, 1.9, 2.5, 2.0, 3.0],
    "long_factor": [1.08, 1.5, 2, 4.25, 9.0, 20.5, 33.1, 64.0],
}
SIX = [1.25, 2.0, 3.5, 6.0, 17.0, 40.5]  # of three quarters of a head of 16
MODELS: dict[str, dict[str, Any]] = {
    "qwen2-windows": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5,
        "max_window_layers": 1,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "mistral-windows": {"model_type": "mistral", "sliding_window": 5, "head_dim": 24},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3-windows-biases": {
        "model_type": "qwen3", "head_dim": 16, "use_sliding_window": True, "sliding_window": 5,
        "max_window_layers": 2, "attention_bias": True,
    },
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False},
    "phi3-windows": {"model_type": "phi3", "sliding_window": 5, "num_key_value_heads": 1},
    # of contexts above 16 tokens, and of those up to 600, which IDS and calibration stay below
    "phi3-long": {"model_type": "phi3", "original_max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "longrope", **FACTORS}},
    "phi3-short": {"model_type": "phi3", "original_max_position_embeddings": 600,
        "max_position_embeddings": 4000, "sliding_window": 5,
        "rope_scaling": {
            "type": "su", "original_max_position_embeddings": 600, **FACTORS}},
    "phi3-partial": {"model_type": "phi3", "partial_rotary_factor": 0.5},
    "phi4-mini": {"model_type": "phi3", "original_max_position_embeddings": 16,
        "partial_rotary_factor": 0.75, "tie_word_embeddings": True, "rope_scaling": {
            "type": "longrope", "short_factor": SIX[::-1], "long_factor": SIX}},
    "phi3-factor": {"model_type": "phi3", "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", "factor": 3.0, **FACTORS}},
    "phi3-odd": {"model_type": "phi3", "original_max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "yarn", "partial_rotary_factor": 0.75, "factor": 5.0,
            "short_factor": SIX[::-1], "long_factor": SIX, "attention_factor": 1.3,
            "short_mscale": 1.2, "long_mscale": 1.3, "rope_theta": 500.0}},
    "sparsellama": {"model_type": "llama", "hidden_act": "relu"},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16,
        "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 32, "query_pre_attn_scalar": 32,
        "sliding_window": 5, "num_hidden_layers": 7},
    "gemma3-odd": {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 24,
        "sliding_window": 5, "layer_types": [FULL, SLIDING, SLIDING],
        "attn_logit_softcapping": 1.0, "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 500.0},
            FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}}},
    "stablelm": {"model_type": "stablelm", "use_qkv_bias": True},
    "stablelm-parallel": {"model_type": "stablelm", "use_parallel_residual": True,
        "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    "falcon-7b": {"model_type": "falcon"},
    "falcon-40b": {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2,
        "ffn_hidden_size": 96, "tie_word_embeddings": False},
    "falcon-one-norm": {"model_type": "falcon", "new_decoder_architecture": True,
        "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True, "activation": "relu"},
    "falcon-after": {"model_type": "falcon", "parallel_attn": False, "multi_query": False,
        "bias": True},
    "opt": {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64},
    "opt-no-bias": {"model_type": "opt", "ffn_dim": 300, "word_embed_proj_dim": 64,
        "activation_function": "gelu", "enable_bias": False, "tie_word_embeddings": False},
    "granite": {"model_type": "granite", "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22, "attention_multiplier": 0.0625, "logits_scaling": 8.0,
        "tie_word_embeddings": True},
    "granite-odd": {"model_type": "granite", "residual_multiplier": 1.7, "logits_scaling": 0.3,
        "attention_multiplier": 0.3, "rms_norm_eps": 0.01, "attention_bias": True},
    "mixtral": {"model_type": "mixtral", "head_dim": 16, "num_local_experts": 6,
        "num_experts_per_tok": 2, "intermediate_size": 600},
    "mixtral-windows": {"model_type": "mixtral", "sliding_window": 5, "num_local_experts": 3,
        "num_experts_per_tok": 1, "head_dim": 24, "intermediate_size": 500},
    "qwen3-moe": {"model_type": "qwen3_moe", "head_dim": 32, "num_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 512, "norm_topk_prob": True},
    "qwen3-moe-odd": {"model_type": "qwen3_moe", "head_dim": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 400, "attention_bias": True,
        "tie_word_embeddings": True},
    "qwen2-moe": {"model_type": "qwen2_moe", "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 700},
    "qwen2-moe-odd": {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 400, "shared_expert_intermediate_size": 100,
        "norm_topk_prob": True, "tie_word_embeddings": True},
}  # fmt: skip
IN_GGUF = [
    "mistral", "qwen3", "phi3", "phi3-windows", "phi3-long", "phi3-short", "phi3-partial",
    "phi4-mini", "phi3-factor", "phi3-odd", "gemma2", "gemma3", "falcon-7b", "falcon-40b",
    "stablelm", "stablelm-parallel", "granite", "granite-odd", "mixtral", "qwen3-moe", "qwen2-moe",
]  # fmt: skip
WITHOUT_GGUF = [
    "mistral-windows", "qwen2-windows", "gemma3-odd", "sparsellama", "falcon-one-norm",
    "falcon-after", "opt", "mixtral-windows", "qwen3-moe-odd",
    "qwen2-moe-odd",
]  # fmt: skip


@cache
def make_gguf_script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "make_gguf.py"
    spec = importlib.util.spec_from_file_location("make_gguf", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Made:
    """A family's checkpoint by transformers, the logits it computes, and our bundle of it."""

    def __init__(self, name: str, folder: Path) -> None:
        config = {**SIZES, **MODELS[name]}
        self.facts = transformers.AutoConfig.for_model(**config, attn_implementation="eager")
        model = transformers.AutoModelForCausalLM.from_config(self.facts).eval()
        if name == "sparsellama":  # which transformers does not have
            for layer in model.model.layers:
                layer.mlp.act_fn = torch.nn.Threshold(FAT, 0.0)
        generator = torch.Generator().manual_seed(0)
        for key, weight in model.named_parameters():
            # norms near what they are born with, matrices that keep activations near 1
            norm, wide = (
                "norm" in key or ".ln_" in key,
                0.3 if "embed" in key else weight.shape[-1] ** -0.5,
            )
            drawn = torch.randn(weight.shape, generator=generator) * (0.1 if norm else wide)
            drawn = drawn + weight.data if norm else drawn
            weight.data = drawn.bfloat16().float()
        self.checkpoint = folder / "checkpoint"
        # not model.bfloat16(): that would round the rotary frequencies too
        stored = {key: weight.bfloat16() for key, weight in model.state_dict().items()}
        model.save_pretrained(self.checkpoint, state_dict=stored)
        if name == "sparsellama":
            fat = {"model_type": name, "hidden_act": "fatrelu", "hidden_act_param": FAT}
            path = self.checkpoint / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | fat))
        make_checkpoint_script().write_tokenizer(self.checkpoint, 300)
        with torch.no_grad():
            self.logits = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0]
        run_pack(job_for(self.checkpoint), folder / "bundle.m2c")
        self.bundle = open_bundle(folder / "bundle.m2c")
        self.has_experts = bool(config_of(self.bundle).num_experts)


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


every_model = pytest.mark.parametrize("made", MODELS, indirect=True)


def logits_of(bundle: Bundle, at_once: int, *, ids: Ids = IDS, **changes: Any) -> torch.Tensor:
    """`at_once` tokens at a time."""
    options = replace(options_for(EXACT, kv_type="f32"), **changes)
    with Engine(bundle, options) as engine:
        parts = range(0, len(ids), at_once)
        return torch.cat(
            [engine.model.forward(ids[i : i + at_once], all_logits=True) for i in parts]
        )


@every_model
@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("at_once", [1, 18])
def test_exact_planes_give_the_logits_of_transformers(
    made: Made, kernel: str, at_once: int
) -> None:
    """Measured: at most 6e-7 of the largest logit, the rounding of float32 sums."""
    got = logits_of(made.bundle, at_once, kernel=kernel)
    assert (got - made.logits).abs().max() < 3e-6 * made.logits.abs().max()


@pytest.mark.parametrize("made", ["phi3-long", "phi4-mini"], indirect=True)
def test_the_context_size_chooses_the_factors_of_longrope(made: Made) -> None:
    """transformers asks for the length of the text; at that length both choose alike."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        made.checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    ids = IDS[:16]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    short, long = (
        logits_of(made.bundle, 16, ids=ids, ctx_size=size) for size in (len(ids), len(ids) + 1)
    )
    assert (short - expected).abs().max() < 3e-6 * expected.abs().max()
    assert (long - short).abs().max() > 0.1 * expected.abs().max()
    # a longer text changes nothing of what was said before it
    assert (long - made.logits[:16]).abs().max() < 3e-6 * expected.abs().max()
    for size in (16, 17):  # of a window, which is the context of eval
        windows = cut((IDS.tolist() * 2)[: 2 * size], size)
        options = options_within(
            options_for(EXACT, kv_type="f32"), config_of(made.bundle), windows.shape[1]
        )
        with Engine(made.bundle, options) as engine:
            losses = predictions_of(engine, windows).losses
        with torch.no_grad():
            logits = theirs(torch.from_numpy(windows.astype(np.int64))).logits
        known = -logits.log_softmax(-1).gather(2, torch.from_numpy(windows[:, 1:, None]).long())
        assert np.allclose(losses, known[:, size // 2 :, 0].numpy(), atol=1e-4)


@every_model
def test_a_profile_is_of_what_the_model_computes(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches the head went through everything, of every layer."""
    met, logits = [], Transformer._logits

    def spied(self: Transformer, x: torch.Tensor) -> torch.Tensor:
        met.append(apply_norm(x, self._norm))
        return logits(self, x)

    monkeypatch.setattr(Transformer, "_logits", spied)
    ids = np.array(tiny_models.IDS, np.int32)
    with Engine(made.bundle, options_for(EXACT, kv_type="f32", ctx_size=128)) as engine:
        engine.model.forward(ids, all_logits=True)
    known = torch.from_numpy(importance_of(made.bundle).head_input)
    assert torch.allclose(met[0].square().mean(0), known, rtol=1e-4)


@every_model
@pytest.mark.skipif(not LIBRARY.exists(), reason="the native kernels were not built")
@pytest.mark.parametrize("mix", [EXACT, Mix(0, 100, 0), Mix(0, 0, 100)])
def test_tokens_and_threads_do_not_change_a_bit(made: Made, mix: Mix) -> None:
    once = logits_of(made.bundle, 18, mix=mix)
    for at_once, threads in ((1, 1), (1, 2), (5, 3)):
        assert torch.equal(logits_of(made.bundle, at_once, mix=mix, threads=threads), once)


@every_model
def test_tiers_do_not_change_a_bit(made: Made) -> None:
    for mix in (EXACT, MIXES["0/0/100" if made.has_experts else "5/15/80"]):
        options = options_for(mix)
        with Engine(made.bundle, options) as engine:
            expected = decode(engine)
        with Engine(made.bundle, replace(options, dram=smallest_dram(made.bundle, options))) as e:
            assert e.plan.expert_slots == 0 if made.has_experts else e.plan.streamed
            assert same(decode(e), expected)


@every_model
@pytest.mark.skipif(not LIBRARY.exists(), reason="exact mode needs the native kernels")
def test_exact_mode_gives_the_tokens_of_one_by_one_decoding(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    # drafts of three tokens by the INT4 planes, whatever was measured
    monkeypatch.setattr(speculate.Depth, "again", lambda _, sure, following=None: len(sure) < 3)
    monkeypatch.setattr(speculate.Lookup, "propose", lambda *_: [])
    options = exact_options(options_for(MIXES["0/25/75"], ctx_size=64), "fp16")
    ids, greedy = IDS.tolist(), Sampler(SamplingParams())
    with Engine(made.bundle, replace(options, speculate=False)) as engine:
        expected = list(islice(generate_step(engine.model, ids, greedy), 32))
    with Engine(made.bundle, options) as engine:
        assert engine.draft is not None
        speculator = Speculator(engine.model, engine.draft, greedy)
        found = list(speculator.tokens(prefill(engine.model, ids), ids, 32))
        assert speculator.figures.accepted > 0
    assert found == expected


@every_model
def test_low_precisions_stay_close(made: Made) -> None:
    """A fact that one path forgets would show here, with both sets of kernels."""
    for kernel in ("auto", "torch"):
        mix = MIXES["0/100/0" if made.has_experts else "0/25/75"]
        got = logits_of(made.bundle, 18, mix=mix, kernel=kernel)
        assert (got - made.logits).norm() < 0.5 * made.logits.norm()


@pytest.mark.parametrize("made", ["opt"], indirect=True)
@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_upgraded_neurons_keep_their_own_biases(made: Made, kernel: str, tokens: int) -> None:
    """With the same weights at every precision a mix changes nothing but the order of a sum."""
    rows = layer_rows(open_checkpoint(made.checkpoint), 0)["ffn"]
    x = inputs(tokens, 64)
    given: dict[str, Any] = {
        "norm": Norm(torch.ones(64), 1e-5, torch.zeros(64)), "act": "relu",
        "bias": 3 * inputs(1, len(rows), seed=1)[0], "out_bias": inputs(1, 64, seed=2)[0],
        "workers": Workers(2, kernel=kernel),
    }  # fmt: skip

    def fetch(plane: str, ids: Ids) -> ExactRows:
        return rows.take(torch.from_numpy(ids.astype(np.int64)))

    whole = uniform_ffn(x, [rows], **given)
    halves = [ExactRows(rows.layout, rows.weights[:64]), ExactRows(rows.layout, rows.weights[64:])]
    assert torch.allclose(uniform_ffn(x, halves, **given), whole, atol=1e-5)
    norms = torch.rand(len(rows), generator=torch.Generator().manual_seed(3)) + 0.1
    mixed = mixed_ffn(x, rows, norms, mix=Mix(10, 20, 70), fetch=fetch, **given)
    given["workers"].close()
    assert torch.allclose(mixed, whole, atol=1e-5)


@pytest.mark.parametrize("made", ["opt", "falcon-40b"], indirect=True)
def test_the_search_for_a_mix_computes_what_the_checkpoint_does(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, known = open_checkpoint(made.checkpoint), importance_of(made.bundle)
    found, of_layer = [], mixsearch._layer_errors

    def spied(*given: Any, **more: Any) -> tuple[torch.Tensor, float]:
        found.append(of_layer(*given, **more))
        return found[-1]

    monkeypatch.setattr(mixsearch, "_layer_errors", spied)
    workers = Workers(1)
    errors = mixsearch.search_by_error(made.bundle, known, [EXACT, Mix(0, 0, 100)], workers)
    assert errors[0].relative_error < 1e-5 < errors[1].relative_error
    vectors = vector_tensors(checkpoint)
    for layer, (_, truth) in enumerate(found):
        rows = layer_rows(checkpoint, layer)["ffn"]
        x = torch.from_numpy(known.layers[layer].sample)
        bias = vectors.get(up_bias_name(layer))
        y = gather_ffn(x, rows, checkpoint.config.activation, workers, bias=bias)
        assert truth == pytest.approx(float(y.double().square().sum()), rel=1e-4)


@every_model
def test_our_config_json_is_theirs(made: Made) -> None:
    """What m2c writes for a GGUF file, transformers reads as the same model."""
    config = open_checkpoint(made.checkpoint).config
    if config.model_type == "sparsellama":
        pytest.skip("transformers does not have it")
    written = config.to_hf()
    theirs = transformers.AutoConfig.for_model(**written)
    for key in ("sliding_window", "layer_types", "head_dim"):
        if hasattr(made.facts, key):
            assert getattr(theirs, key) == getattr(made.facts, key), key
    assert turns(theirs) == turns(made.facts)


def turns(facts: Any) -> Any:
    """What transformers makes of the rope of its config."""
    rope = getattr(facts, "rope_parameters", None)
    if not rope or rope.get("rope_type") != "longrope":
        return rope
    made = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["longrope"]
    found = [made(facts, "cpu", seq_len=length) for length in (1, facts.max_position_embeddings)]
    share = rope["partial_rotary_factor"]
    return share, [(frequencies.tolist(), factor) for frequencies, factor in found]


@pytest.mark.parametrize("made", IN_GGUF, indirect=True)
def test_gguf_of_the_same_weights_gives_the_same_tokens(made: Made, tmp_path: Path) -> None:
    source = open_checkpoint(made.checkpoint)
    make_gguf_script().write_gguf(source, tmp_path / "a.gguf", kind="bf16")
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert list(checkpoint.names()) == list(source.names())
    known = profile_folder(tmp_path / "a.gguf")
    job = job_for(made.checkpoint)  # for its tokenizer: ours is not in the file
    run_pack(replace(job, checkpoint=checkpoint, importance=known), tmp_path / "gguf.m2c")
    runs = []
    for bundle in (made.bundle, open_bundle(tmp_path / "gguf.m2c")):
        with Engine(bundle, options_for(EXACT)) as engine:
            runs.append(decode(engine))
    assert same(*runs)


@pytest.mark.parametrize("made", WITHOUT_GGUF, indirect=True)
def test_what_gguf_cannot_say_is_not_written(made: Made, tmp_path: Path) -> None:
    with pytest.raises(make_gguf_script().UnsupportedModel, match="GGUF has no word"):
        make_gguf_script().write_gguf(open_checkpoint(made.checkpoint), tmp_path / "a.gguf")


@pytest.mark.parametrize("made", ["gemma3"], indirect=True)
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_a_multimodal_checkpoint(
    made: Made, prefix: str, tmp_path: Path
) -> None:
    plain = open_checkpoint(made.checkpoint)
    shutil.copytree(made.checkpoint, tmp_path / "whole")
    path = tmp_path / "whole" / "model.safetensors"
    tensors = {k.replace("model.", prefix, 1): v for k, v in load_file(path).items()}
    save_file({**tensors, "vision_tower.weight": torch.zeros(3)}, path)
    text = json.loads((made.checkpoint / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 3}}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    checkpoint = open_checkpoint(tmp_path / "whole")
    assert checkpoint.config == plain.config
    assert all(torch.equal(checkpoint.read(name), plain.read(name)) for name in plain.names())


@pytest.mark.parametrize("made", ["gemma2", "phi3", "phi4-mini", "falcon-40b"], indirect=True)
def test_a_gguf_exported_as_a_folder_is_the_same_checkpoint(made: Made, tmp_path: Path) -> None:
    """Fused matrices are put together again, and norms lose the one that GGUF adds."""
    source = open_checkpoint(made.checkpoint)
    tokens = ["a", "b", "ab", *(f"t{i}" for i in range(3, 300))]
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
                "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b"],
                "tokenizer.ggml.token_type": [1] * 300}  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "tokens.gguf", "llama")
    for name, value in metadata.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    make_gguf_script().write_gguf(
        source, tmp_path / "a.gguf", kind="bf16", tokenizer=tmp_path / "tokens.gguf"
    )
    make_checkpoint_script().export_gguf(tmp_path / "back", tmp_path / "a.gguf", dtype="bf16")
    back = open_checkpoint(tmp_path / "back")
    assert back.config.rope_scaling == source.config.rope_scaling
    assert back.config.rotary_dim == source.config.rotary_dim
    assert all(torch.equal(back.read(name), source.read(name)) for name in source.names())


def test_every_family_is_here_or_among_the_tests_of_the_model() -> None:
    tested = {model["model_type"] for model in MODELS.values()} | {"llama", "sparsellama"}
    assert tested == set(FAMILIES)
