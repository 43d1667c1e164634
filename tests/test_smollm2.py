"""The embedded default model, real weights: m2c against an independent implementation.

transformers' Llama with the same weights in float32 is the oracle.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from m2c.bundle.bundle import Bundle
from m2c.check import compare_with_source
from m2c.engine import Engine, RunOptions
from m2c.generate import generate_step
from m2c.model.checkpoint import open_checkpoint
from m2c.model.mix import Mix
from m2c.sampling import Sampler, SamplingParams

pytestmark = pytest.mark.slow
PROMPT = "The lighthouse keeper climbed the stairs every evening to"
STEPS = 32


def oracle(gguf: Path, exact_type: torch.dtype) -> torch.nn.Module:
    """The checkpoint's weights, rounded once as pack rounds them, in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = open_checkpoint(gguf)
    model = LlamaForCausalLM(LlamaConfig(**checkpoint.config.to_hf())).float().eval()
    weights = {}
    for name in checkpoint.names():
        tensor = checkpoint.read(name).float()
        weights[name] = tensor.to(exact_type).float() if tensor.ndim == 2 else tensor
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def test_greedy_text_at_full_precision_is_the_oracles(smollm2: Bundle, smollm2_gguf: Path) -> None:
    options = RunOptions(mix=Mix(100, 0, 0), ctx_size=128, kv_type="f32")
    with Engine(smollm2, options) as engine:
        ids = engine.tokenizer.encode(PROMPT)
        steps = generate_step(engine.model, ids, Sampler(SamplingParams()))
        ours = [next(steps) for _ in range(STEPS)]
        engine.model.kv.truncate(0)
        logits = engine.model.forward(np.asarray(ids, np.int32), all_logits=True)
        text = engine.tokenizer.decode(ours)
    model = oracle(smollm2_gguf, torch.float16)
    with torch.no_grad():
        theirs_logits = model(torch.tensor([ids])).logits[0]
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    assert ours == out[0, len(ids) :].tolist(), text
    # f32 sums in another order; measured 1.8e-6 of the largest logit
    assert float((logits - theirs_logits).abs().max()) < 2e-5 * float(theirs_logits.abs().max())


def test_the_exact_plane_is_the_checkpoint(smollm2: Bundle, smollm2_gguf: Path) -> None:
    assert list(compare_with_source(smollm2, open_checkpoint(smollm2_gguf))) == []
