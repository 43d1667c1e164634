"""open_checkpoint on a GGUF file: the same model as the folder it was made from."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from test_checkpoint import single, weights

from m2c.errors import BadInput, M2CError, UnsupportedModel
from m2c.model.checkpoint import open_checkpoint
from m2c.model.config import ModelConfig

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
}


def write_gguf(path: Path, *, kind: str = "F16", without: str = "", layers: int = 2) -> None:
    """The same tiny model as `weights()`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(layers)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(64)
    writer.add_vocab_size(40)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for hf_name, tensor in weights(torch.float32).items():
        name, weight = hf_name, tensor.numpy()
        for old, new in GGUF_NAMES.items():
            name = name.replace(old, new)
        if "attn_q" in name or "attn_k" in name:
            weight = weight.reshape(-1, 2, 4, 32).swapaxes(1, 2).reshape(weight.shape)
        if name != without:
            fits = weight.ndim > 1 and weight.shape[-1] % 32 == 0
            qtype = gguf.GGMLQuantizationType[kind if fits else "F32"]
            writer.add_tensor(name, gguf.quants.quantize(weight, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_is_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    checkpoint = open_checkpoint(path)
    folder = open_checkpoint(single(tmp_path / "a", weights(torch.float16)))
    assert checkpoint.config == folder.config
    assert checkpoint.name == "tiny"
    assert list(checkpoint.names()) == list(folder.names())
    for name in folder.names():
        assert checkpoint.shape(name) == folder.shape(name)
        assert torch.equal(checkpoint.read(name).half(), folder.read(name))
    assert checkpoint.stored_type("model.embed_tokens.weight") == "f16"
    assert checkpoint.stored_type("model.norm.weight") == "f32"
    metadata = checkpoint.gguf_metadata()
    assert metadata is not None
    assert metadata["llama.block_count"] == 2


def test_gguf_sidecars_are_what_hugging_face_would_have(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, kind="Q8_0")
    checkpoint = open_checkpoint(path)
    assert checkpoint.stored_type("model.embed_tokens.weight") == "quantized"
    found = checkpoint.sidecars()
    assert ModelConfig.from_hf(json.loads(found["config.json"])) == checkpoint.config
    assert json.loads(found["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2}
    shutil.copy(path, tmp_path / "renamed.gguf")
    assert open_checkpoint(tmp_path / "renamed.gguf").fingerprint() == checkpoint.fingerprint()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"without": "blk.1.attn_v.weight"}, BadInput, r"layers\.1\.self_attn\.v_proj.*missing"),
        ({"layers": 3}, BadInput, r"layers\.2\.self_attn.*missing"),
        ({"layers": 1}, UnsupportedModel, r"model\.layers\.1"),
    ],
)
def test_gguf_tensors_are_checked(
    tmp_path: Path, change: dict[str, Any], error: type[M2CError], match: str
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, **change)
    with pytest.raises(error, match=match):
        open_checkpoint(path)
