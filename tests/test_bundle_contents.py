"""What `pack` writes is the checkpoint, bit for bit, and `check` finds every difference."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import job_for, pack_folder, run_pack, write_checkpoint

from m2c.bundle.bundle import Bundle, open_bundle
from m2c.check import check_bundle, compare_with_source
from m2c.errors import BadInput
from m2c.model.checkpoint import open_checkpoint
from m2c.pack import choose_exact_type


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_a_bundle_holds_its_checkpoint(tmp_path: Path, dtype: str, model_type: str) -> None:
    """Bit for bit; f32 weights are first rounded to the type that loses less."""
    config = {"model_type": model_type, "tie_word_embeddings": model_type == "qwen2"}
    source = write_checkpoint(tmp_path / "source", config, dtype=dtype)
    bundle = pack_folder(source, tmp_path / "out")
    checkpoint = open_checkpoint(source)
    assert bundle.manifest.exact_type == {"bf16": "bf16", "f16": "f16", "f32": "f16"}[dtype]
    assert bundle.manifest.source.stored_type == dtype
    assert list(compare_with_source(bundle, checkpoint)) == []
    assert list(check_bundle(bundle.path, read_data=True)) == []


def test_f32_weights_beyond_f16_are_kept_in_bf16(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", dtype="f32")
    change(source, "model.layers.0.mlp.down_proj.weight", 1e-20)
    change(source, "lm_head.weight", 1e6)
    assert choose_exact_type(open_checkpoint(source)) == "bf16"
    bundle = pack_folder(source, tmp_path / "out")
    assert list(compare_with_source(bundle, open_checkpoint(source))) == []
    with pytest.raises(BadInput, match="lm_head: a weight does not fit in f16") as caught:
        run_pack(job_for(source, exact_type="f16"), tmp_path / "f16")
    assert "--exact-type bf16" in caught.value.hint


def change(folder: Path, name: str, value: float) -> None:
    """Set the first weight of tensor `name` in a checkpoint."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name].view(-1)[0] = value
            save_file(tensors, file)


@pytest.mark.parametrize(
    ("tensor", "section"),
    [
        ("model.embed_tokens.weight", "dense embed embed_tokens"),
        ("model.layers.1.self_attn.k_proj.weight", "dense 1 k_proj"),
        ("model.layers.0.mlp.down_proj.weight", "neurons 0 ffn"),
        ("lm_head.weight", "dense head lm_head"),
    ],
)
def test_a_single_other_weight_is_found(
    tiny_checkpoint: Path, tiny_bundle: Bundle, tmp_path: Path, tensor: str, section: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    old = open_checkpoint(source).read(tensor).view(-1)[0]
    change(source, tensor, float(torch.nextafter(old, torch.tensor(9, dtype=old.dtype))))
    found = list(compare_with_source(tiny_bundle, open_checkpoint(source)))
    assert found == [f"{tiny_bundle.path}: {section}: 1 weights differ"]


def test_a_bundle_is_smaller_than_its_checkpoint(tmp_path: Path) -> None:
    """All planes together, tokenizer and profile included, for Gaussian weights."""
    config = {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 1024}
    source = write_checkpoint(tmp_path / "source", config)
    out = pack_folder(source, tmp_path / "out").path

    def size(folder: Path, pattern: str = "*") -> int:
        return sum(p.stat().st_size for p in folder.rglob(pattern) if p.is_file())

    assert size(out) < size(source)
    shards = sum(size(out / name) for name in ("dense", "neurons"))
    assert shards < 0.85 * size(source, "*.safetensors")


def test_damages_are_all_named(tiny_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_bundle.path, out)
    damages = {"dense/00001.int8": 5000, "neurons/00000.fp16": 4100, "dense/embed.int4": 100}
    for name, at in damages.items():
        data = bytearray((out / name).read_bytes())
        data[at] ^= 8
        (out / name).write_bytes(data)
    (out / "neurons/00001.int4").unlink()
    (out / "model/config.json").write_text("{}")
    (out / "extra").write_text("?")
    found = list(check_bundle(out, read_data=True))
    names = [*damages, "neurons/00001.int4", "model/config.json", "extra"]
    assert len(found) == len(names)
    assert all(sum(name in sentence for sentence in found) == 1 for name in names)
    quick = list(check_bundle(out, read_data=False))
    assert len(quick) == len(names) - 2  # damages inside payloads take reading them


def test_a_shard_of_another_bundle_is_not_taken_for_one_of_this(tmp_path: Path) -> None:
    """The same shape, recipe and length, sound in itself."""
    one, other = (
        pack_folder(write_checkpoint(tmp_path / f"source{seed}", seed=seed), tmp_path / f"b{seed}")
        for seed in (0, 1)
    )
    name = "neurons/00001.int4"
    shutil.copyfile(other.path / name, one.path / name)
    with pytest.raises(BadInput, match="not the shard that the manifest names"):
        open_bundle(one.path)
