"""scripts/make_gguf.py: m2c's own reader finds every weight of the source, bit for bit."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_builders import permute as permuted
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.checkpoint import open_checkpoint

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0},
    "llama, biased, tied": {"attention_bias": True, "tie_word_embeddings": True},
    "llama, wide heads": {"head_dim": 24},
    "llama, llama3 rope": {"rope_scaling": LLAMA3_ROPE},
    "llama, linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "make_gguf.py"
    spec = importlib.util.spec_from_file_location("make_gguf", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("stored", "kind"), [("f16", "f16"), ("bf16", "bf16"), ("bf16", "f16"), ("f32", "bf16")]
)
def test_every_weight_comes_back(
    script: ModuleType, tmp_path: Path, shape: dict[str, Any], stored: str, kind: str
) -> None:
    source = open_checkpoint(write_checkpoint(tmp_path / "source", shape, dtype=stored))
    script.write_gguf(source, tmp_path / "a.gguf", kind=kind)
    written = open_checkpoint(tmp_path / "a.gguf")
    # the file has no tokenizer, so it knows no special tokens
    assert written.config == replace(source.config, bos_token_id=None, eos_token_ids=())
    assert list(written.names()) == list(source.names())
    for name in source.names():
        weight = source.read(name)
        matrix = weight.ndim > 1
        assert written.stored_type(name) == (kind if matrix else "f32")
        expected = weight.to(script.TYPES[kind].torch if matrix else torch.float32)
        assert torch.equal(written.read(name), expected), name


def test_the_tokenizer_of_another_file_is_copied(script: ModuleType, tmp_path: Path) -> None:
    known = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "<end>"],
        "tokenizer.ggml.token_type": [1, 1, 3], "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    for name, value in {**known, "llama.block_count": 99}.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    source = open_checkpoint(write_checkpoint(tmp_path / "source", dtype="f16"))
    script.write_gguf(source, tmp_path / "a.gguf", tokenizer=tmp_path / "other.gguf")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    copied = {name: f.contents() for name, f in fields.items() if name.startswith("tokenizer.")}
    assert copied == known
    assert fields["llama.block_count"].contents() == 2


def test_rows_and_layers_are_in_the_order_of_llama_cpp(script: ModuleType, tmp_path: Path) -> None:
    """Read by the gguf package: our own reader would forgive what our own writer does."""
    source = open_checkpoint(write_checkpoint(tmp_path / "source", dtype="f16"))
    script.write_gguf(source, tmp_path / "a.gguf")
    tensors = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    names = [tensor.name for tensor in tensors]
    assert names[0] == "token_embd.weight"
    assert set(names[-2:]) == {"output.weight", "output_norm.weight"}
    assert [name.split(".")[1] for name in names[1:-2]] == ["0"] * 9 + ["1"] * 9
    data = {tensor.name: tensor.data for tensor in tensors}
    for letter, heads in (("q", 4), ("k", 2)):
        rows = source.read(f"model.layers.1.self_attn.{letter}_proj.weight").numpy()
        assert np.array_equal(data[f"blk.1.attn_{letter}.weight"], permuted(rows, heads))


def test_numbers_beyond_f16_are_refused_and_nothing_is_left(
    script: ModuleType, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "source")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name][3, 5] = 1e30
    save_file(tensors, file)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.gguf").write_bytes(b"the one before")
    with pytest.raises(BadInput, match=r"up_proj.*--type bf16"):
        script.write_gguf(open_checkpoint(folder), out / "a.gguf")
    assert [path.read_bytes() for path in out.iterdir()] == [b"the one before"]
    script.write_gguf(open_checkpoint(folder), out / "a.gguf", kind="bf16")
    assert open_checkpoint(out / "a.gguf").read(name)[3, 5] == tensors[name][3, 5]


def test_an_activation_without_a_word_in_gguf_is_refused(
    script: ModuleType, tmp_path: Path
) -> None:
    source = open_checkpoint(write_checkpoint(tmp_path / "source", {"hidden_act": "relu"}))
    with pytest.raises(UnsupportedModel, match="relu"):
        script.write_gguf(source, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
