"""open_checkpoint: whole folders and files, damaged ones, and ones that try to get out."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.checkpoint import open_checkpoint
from m2c.model.config import ModelConfig
from m2c.model.tensors import expected_tensors

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
INDEX = "model.safetensors.index.json"


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = expected_tensors(ModelConfig.from_hf(CONFIG))
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def single(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **change: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    save_file(weights() if tensors is None else tensors, folder / "model.safetensors")
    return folder


def sharded(folder: Path) -> Path:
    """Two shards and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = weights()
    names = sorted(tensors)
    shards = {"one.safetensors": names[:7], "two.safetensors": names[7:]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("build", [single, sharded])
def test_folder_is_read_as_it_was_written(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    checkpoint = open_checkpoint(build(tmp_path / "Tiny"))
    assert checkpoint.name == "Tiny"
    assert checkpoint.gguf_metadata() is None
    expected = weights()
    assert list(checkpoint.names()) == list(expected)
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.stored_type(name) == "bf16"
        assert torch.equal(checkpoint.read(name), tensor)
        assert torch.equal(checkpoint.read(name, 3, 9), tensor[3:9])


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float32, "f32"), (torch.float16, "f16"), (torch.bfloat16, "bf16")]
)
def test_stored_types(tmp_path: Path, dtype: torch.dtype, stored: str) -> None:
    checkpoint = open_checkpoint(single(tmp_path, weights(dtype)))
    assert checkpoint.stored_type("model.norm.weight") == stored
    assert checkpoint.read("model.norm.weight").dtype == dtype


def test_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="F64"):
        open_checkpoint(single(tmp_path, weights(torch.float64)))


def test_extra_tensors_are_ignored(tmp_path: Path) -> None:
    extra = {
        "lm_head.weight": torch.zeros(40, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "position_ids": torch.arange(4),
    }
    checkpoint = open_checkpoint(single(tmp_path, weights() | extra))
    assert checkpoint.names() == weights().keys()


def test_names_without_the_model_prefix(tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in weights().items()}
    checkpoint = open_checkpoint(single(tmp_path, bare))
    assert torch.equal(checkpoint.read("model.norm.weight"), weights()["model.norm.weight"])


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        open_checkpoint(single(tmp_path / "a", tensors))
    with pytest.raises(BadInput, match=r"lm_head\.weight is missing"):
        open_checkpoint(single(tmp_path / "b", tie_word_embeddings=False))


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"gate_proj.*\[48, 32\].*\[56, 32\]"):
        open_checkpoint(single(tmp_path, intermediate_size=56))


def test_generation_config_adds_its_ends_of_text(tmp_path: Path) -> None:
    single(tmp_path, bos_token_id=None)
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": [2, 7], "bos_token_id": 5, "temperature": 0.6}')
    config = open_checkpoint(tmp_path).config
    assert (config.bos_token_id, config.eos_token_ids) == (5, (2, 7))
    for bad in ('{"eos_token_id": "2"}', '{"eos_token_id": 40}', "[]"):
        path.write_text(bad)
        with pytest.raises(BadInput, match=r"generation_config\.json"):
            open_checkpoint(tmp_path)


def test_sidecars(tmp_path: Path) -> None:
    single(tmp_path)
    for name in ("tokenizer.json", "LICENSE.txt", "USE_POLICY.md", "README.md", "model.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / "NOTICES").mkdir()
    found = open_checkpoint(tmp_path).sidecars()
    assert list(found) == ["config.json", "tokenizer.json", "LICENSE.txt", "USE_POLICY.md"]
    assert found["tokenizer.json"] == b"tokenizer.json"
    os.truncate(tmp_path / "LICENSE.txt", (1 << 20) + 1)
    with pytest.raises(BadInput, match=r"LICENSE\.txt"):
        open_checkpoint(tmp_path).sidecars()


def test_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    first = open_checkpoint(folder).fingerprint()
    assert first == open_checkpoint(tmp_path / "b").fingerprint()
    single(tmp_path / "c")
    assert first != open_checkpoint(tmp_path / "c").fingerprint()
    shard = tmp_path / "b" / "two.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    changed = open_checkpoint(tmp_path / "b").fingerprint()
    assert changed != first
    (folder / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 5e4}))
    assert open_checkpoint(folder).fingerprint() != first


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    [
        "../outside/two.safetensors",
        "/etc/two.safetensors",
        "sub/two.safetensors",
        "..",
        "",
        ".safetensors/",
        "a\\two.safetensors",
        "two\0.safetensors",
        "model.bin",
        "three.safetensors",
        7,
        None,
    ],
)
def test_index_entries_that_lead_elsewhere(tmp_path: Path, shard: Any) -> None:
    folder = sharded(tmp_path / "a")
    (tmp_path / "outside").mkdir()
    shutil.copy(folder / "two.safetensors", tmp_path / "outside")
    edit_index(folder, lambda names: names.update({"model.norm.weight": shard}))
    with pytest.raises(BadInput, match=str(folder)):
        open_checkpoint(folder)


def test_index_against_its_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "moved")
    edit_index(folder, lambda names: names.update({"model.norm.weight": "one.safetensors"}))
    with pytest.raises(BadInput, match=r"model\.norm\.weight"):
        open_checkpoint(folder)
    folder = sharded(tmp_path / "twice")
    norm = weights()["model.norm.weight"]
    part = {name: weights()[name] for name in sorted(weights())[:7]}
    save_file(part | {"model.norm.weight": norm}, folder / "one.safetensors")
    with pytest.raises(BadInput, match="in another shard"):
        open_checkpoint(folder)
    folder = sharded(tmp_path / "absent")
    edit_index(folder, lambda names: names.update({"ghost": "one.safetensors"}))
    with pytest.raises(BadInput, match="ghost"):
        open_checkpoint(folder)
    folder = sharded(tmp_path / "many")
    many = {f"t{i}": f"{i}.safetensors" for i in range(513)}
    edit_index(folder, lambda names: names.update(many))
    with pytest.raises(BadInput, match="more than 512 shards"):
        open_checkpoint(folder)
    folder = sharded(tmp_path / "duplicate")
    (folder / INDEX).write_text('{"weight_map": {"a": "one.safetensors", "a": "b.safetensors"}}')
    with pytest.raises(BadInput, match="duplicate key"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = single(tmp_path / "a")
    (folder / "tokenizer.json").write_text("{}")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(BadInput, match="a link out of the folder"):
        open_checkpoint(folder).sidecars()


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--Tiny-1B"
    snapshot = single(repo / "snapshots" / ("0" * 40))
    (repo / "blobs").mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repo / "blobs" / str(i))
        file.symlink_to(f"../../blobs/{i}")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.name == "Tiny-1B"
    assert torch.equal(checkpoint.read("model.norm.weight"), weights()["model.norm.weight"])
    (tmp_path / "outside").write_text("secret")
    (snapshot / "LICENSE").symlink_to(tmp_path / "outside")
    with pytest.raises(BadInput, match="LICENSE: a link out of the folder"):
        checkpoint.sidecars()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnsupportedModel, match=rf"{name}: a pickle file"):
            open_checkpoint(path)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(BadInput) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "x.gguf") in caught.value.hint
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(BadInput, match=r"has neither model\.safetensors nor"):
        open_checkpoint(tmp_path)
    single(tmp_path / "a")
    for path in (tmp_path / "absent", tmp_path / "a" / "model.safetensors", tmp_path / "x.gguf"):
        with pytest.raises(BadInput, match=str(path)):
            open_checkpoint(path)


def test_transformers_computes_the_same_from_what_we_read(tmp_path: Path) -> None:
    """A folder written by transformers, read by us, is the model that transformers has."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{**CONFIG, "model_type": "qwen2"})
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    checkpoint = open_checkpoint(tmp_path)
    state = model.state_dict()
    assert (tmp_path / INDEX).exists()
    assert checkpoint.config.qkv_bias
    for name in checkpoint.names():
        assert np.array_equal(checkpoint.read(name).float().numpy(), state[name].float().numpy())
