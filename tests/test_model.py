"""The forward pass over a bundle against transformers, and what must not change its result."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import MIXES, PROMPT, budgets, options_for, plan_of
from safetensors.torch import load_file, save_file
from tiny_models import CONFIG, job_for, pack_folder, profile_folder, run_pack, write_checkpoint

from m2c.bundle.bundle import Bundle
from m2c.engine import Engine, RunOptions
from m2c.errors import BadInput, UsageError
from m2c.model.checkpoint import open_checkpoint
from m2c.model.mix import Mix
from m2c.model.transformer import Transformer

EXACT = Mix(100, 0, 0)
IDS = np.array([1, 299, 7, 7, 42, 260, 0, 13, 128, 5, 77, 31, 9, 200, 100, 64, 2, 3], np.int32)
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-relu": {"tie_word_embeddings": True, "hidden_act": "relu"},
    "llama-biases": {"attention_bias": True},
    "llama-no-gqa": {"num_key_value_heads": 4, "rope_theta": 5e5, "rms_norm_eps": 1e-6},
    "llama-head-dim": {"head_dim": 24, "intermediate_size": 77},
    "llama-linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-llama3-rope": {"rope_scaling": LLAMA3_ROPE},
    "llama-odd-sizes": {
        "hidden_size": 36, "head_dim": 18, "intermediate_size": 301, "vocab_size": 301,
    },
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
}  # fmt: skip


def transformers_logits(folder: Path, config: dict[str, Any], ids: np.ndarray) -> torch.Tensor:
    """All logits of the checkpoint in `folder`, computed by transformers in float32."""
    transformers = pytest.importorskip("transformers")
    kind = {"llama": "Llama", "qwen2": "Qwen2"}[config["model_type"]]
    facts = getattr(transformers, f"{kind}Config")(**config, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(facts).eval()
    checkpoint = open_checkpoint(folder)
    state = {name: checkpoint.read(name).float() for name in checkpoint.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]


@contextmanager
def model_of(bundle: Bundle, **options: Any) -> Iterator[Transformer]:
    known = RunOptions(mix=EXACT, ctx_size=64, kv_type="f32", threads=1, dram=1 << 30)
    with Engine(bundle, replace(known, **options)) as engine:
        yield engine.model


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", MODELS)
def test_exact_planes_give_the_logits_of_transformers(
    name: str, dtype: str, tmp_path: Path
) -> None:
    """Measured: at most 6e-7 of the largest logit, the rounding of float32 sums."""
    config = CONFIG | MODELS[name]
    ids = IDS % config["vocab_size"]
    folder = write_checkpoint(tmp_path / "checkpoint", config, dtype=dtype)
    bundle = pack_folder(folder, tmp_path / "bundle.m2c")
    expected = transformers_logits(folder, config, ids)
    with model_of(bundle) as model:
        got = model.forward(ids, all_logits=True)
    assert got.shape == (len(ids), config["vocab_size"])
    assert (got - expected).abs().max() < 3e-6 * expected.abs().max()


def test_lower_planes_come_closer_step_by_step(tiny_bundle: Bundle) -> None:
    errors = []
    with model_of(tiny_bundle) as model:
        exact = model.forward(IDS)
    for mix in (Mix(0, 0, 100), Mix(0, 25, 75), Mix(0, 100, 0), Mix(50, 50, 0)):
        with model_of(tiny_bundle, mix=mix, dense="fp16") as model:
            errors.append(float((model.forward(IDS) - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert 0.03 < errors[0] < 0.5
    assert errors[-1] < 0.02


@pytest.mark.parametrize("mix", [EXACT, Mix(0, 100, 0), Mix(5, 15, 80), Mix(0, 25, 75, drop=30)])
def test_a_batch_is_close_to_token_by_token(tiny_bundle: Bundle, mix: Mix) -> None:
    with model_of(tiny_bundle, mix=mix, kernel="torch") as model:
        batch = model.forward(IDS, all_logits=True)
        model.kv.truncate(0)
        single = torch.stack([model.forward(IDS[i : i + 1]) for i in range(len(IDS))])
    assert (batch - single).abs().max() < 1e-4 * batch.abs().max()


def test_native_kernels_are_close_to_the_reference(tiny_bundle: Bundle) -> None:
    """Activations meet 8-bit codes as int8, so close is a percent, not a rounding error."""
    for mix, limit in ((EXACT, 3e-6), (Mix(0, 100, 0), 0.02), (Mix(0, 0, 100), 0.02)):
        found = []
        for kernel in ("torch", "auto"):
            with model_of(tiny_bundle, mix=mix, kernel=kernel) as model:
                found.append(model.forward(IDS[:8], all_logits=True))
        assert (found[0] - found[1]).norm() < limit * found[0].norm()


def test_the_last_logits_are_the_last_of_all(tiny_bundle: Bundle) -> None:
    with model_of(tiny_bundle) as model:
        all_logits = model.forward(IDS, all_logits=True)
        model.kv.truncate(0)
        assert (model.forward(IDS) - all_logits[-1]).abs().max() < 1e-5


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_truncated_context_gives_the_same_logits_again(tiny_bundle: Bundle, kv_type: str) -> None:
    with model_of(tiny_bundle, kv_type=kv_type) as model:
        model.forward(IDS[:8])
        first = [model.forward(IDS[i : i + 1]) for i in range(8, 12)]
        model.kv.truncate(8)
        model.forward(IDS[-3:])  # another continuation, forgotten as well
        model.kv.truncate(8)
        assert model.kv.length == 8
        again = [model.forward(IDS[i : i + 1]) for i in range(8, 12)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_context_matters(tiny_bundle: Bundle) -> None:
    with model_of(tiny_bundle) as model:
        model.forward(IDS[:8])
        with_context = model.forward(IDS[8:9])
        model.kv.truncate(0)
        assert not torch.allclose(model.forward(IDS[8:9]), with_context, atol=1e-2)


def test_a_full_context_is_an_error_and_no_harm(tiny_bundle: Bundle) -> None:
    with model_of(tiny_bundle, ctx_size=10) as model:
        expected = model.forward(IDS[:10])
        for ids in (IDS[10:11], IDS[:5]):
            with pytest.raises(UsageError, match="context of 10 tokens is full") as caught:
                model.forward(ids)
            assert "--ctx-size" in caught.value.hint
        model.kv.truncate(0)
        assert torch.equal(model.forward(IDS[:10]), expected)


def test_a_context_longer_than_the_model_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="--ctx-size 257"), model_of(tiny_bundle, ctx_size=257):
        pass


# -- weights that are no numbers -------------------------------------------------------------------


def poison(source: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of a checkpoint in which the last row of tensor `name` is `value`."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][-1] = value
            save_file(tensors, file)
            return folder
    raise KeyError(name)


READ_BY_PROFILE = (
    "model.layers.1.mlp.gate_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.norm.weight",
)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", READ_BY_PROFILE)
def test_profile_names_the_tensor_with_a_nan(
    tiny_checkpoint: Path, tmp_path: Path, name: str, value: float
) -> None:
    folder = poison(tiny_checkpoint, tmp_path / "bad", name, value)
    with pytest.raises(BadInput, match=f"{name} holds NaN or infinity"):
        profile_folder(folder)


@pytest.mark.parametrize("name", [*READ_BY_PROFILE, "lm_head.weight", "model.embed_tokens.weight"])
def test_pack_names_the_tensor_with_a_nan(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    """With a profile that knows nothing of it, as after a damage on the way."""
    folder = poison(tiny_checkpoint, tmp_path / "bad", name, float("nan"))
    importance = profile_folder(tiny_checkpoint)
    fingerprint = open_checkpoint(folder).fingerprint()
    calibration = replace(importance.calibration, fingerprint=fingerprint)
    importance = replace(importance, calibration=calibration)
    with pytest.raises(BadInput, match=f"{name} holds NaN or infinity"):
        run_pack(job_for(folder, importance), tmp_path / "out.m2c")
    assert not (tmp_path / "out.m2c" / "manifest.json").exists()


def test_activations_that_overflow_name_the_layer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = poison(tiny_checkpoint, tmp_path / "huge", "model.layers.1.mlp.up_proj.weight", 3e38)
    with pytest.raises(BadInput, match="activations of layer 1 are not finite"):
        profile_folder(folder)


@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize("mix", ["100/0/0", "0/100/0", "0/0/100"])
def test_all_layers_in_one_call_give_the_bits_of_layer_by_layer(
    deep_bundle: Bundle, mix: str, kernel: str
) -> None:
    with Engine(deep_bundle, options_for(MIXES[mix], kernel=kernel, threads=2)) as engine:
        assert engine.store.holds_all
        found = []
        for tokens in (1, 5):
            for whole in (True, False):
                engine.store.holds_all = whole
                engine.model.kv.truncate(0)
                engine.model.forward(PROMPT)
                found.append(engine.model.forward(PROMPT[:tokens], all_logits=True))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[2], found[3])


def test_streamed_layers_are_not_taken_for_resident(deep_bundle: Bundle) -> None:
    resident = options_for(MIXES["0/0/100"])
    streaming = next(
        plan for plan in budgets(deep_bundle, resident)
        if plan_of(deep_bundle, replace(resident, dram=plan)).streamed
    )  # fmt: skip
    with Engine(deep_bundle, replace(resident, dram=streaming)) as engine:
        assert not engine.store.holds_all


def test_an_output_that_is_not_finite_is_refused_by_the_model_itself(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anybody samples from it: eval and drafts do not."""
    with Engine(tiny_bundle, options_for(Mix(0, 0, 100))) as engine:
        hidden = engine.config.hidden_size
        monkeypatch.setattr(
            engine.store, "embed", lambda ids: torch.full((len(ids), hidden), float("nan"))
        )
        with pytest.raises(BadInput, match="the model's output is not finite"):
            engine.model.forward(PROMPT)
