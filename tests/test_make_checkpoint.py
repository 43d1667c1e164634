"""scripts/make_checkpoint.py: a checkpoint that opens, repeats, and has sane numbers."""

import hashlib
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from m2c.model.checkpoint import open_checkpoint
from m2c.model.tensors import expected_tensors
from m2c.tokenizer import Tokenizer

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_checkpoint", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_it_opens_as_a_checkpoint(
    script: ModuleType, tmp_path: Path, model_type: str, tied: bool
) -> None:
    config = CONFIG | {"model_type": model_type, "tie_word_embeddings": tied}
    script.write_checkpoint(tmp_path, config, dtype="f16")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.hidden_size == 64
    assert {name: checkpoint.shape(name) for name in checkpoint.names()} == expected_tensors(
        checkpoint.config
    )
    assert {checkpoint.stored_type(name) for name in checkpoint.names()} == {"f16"}
    written = json.loads((tmp_path / "config.json").read_text())
    assert "synthetic" in written["_name_or_path"]
    tokenizer = Tokenizer.from_json(
        (tmp_path / "tokenizer.json").read_bytes(),
        source="tokenizer.json",
        config=(tmp_path / "tokenizer_config.json").read_bytes(),
    )
    assert tokenizer.vocab_size <= 300
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (0, 1, True)
    assert tokenizer.decode(tokenizer.encode("Any text 🧿\0")) == "Any text 🧿\0"


def test_one_layer_per_shard(script: ModuleType, tmp_path: Path) -> None:
    script.write_checkpoint(tmp_path, CONFIG)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    layers: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        layers.setdefault(file, set()).add(name.split(".")[2] if ".layers." in name else "")
    assert sorted(map(sorted, layers.values())) == [[""], [""], ["0"], ["1"], ["2"]]
    nbytes = sum(t.nbytes for file in layers for t in load_file(tmp_path / file).values())
    assert index["metadata"]["total_size"] == nbytes


def test_the_seed_decides_the_bytes(script: ModuleType, tmp_path: Path) -> None:
    config = CONFIG | {"vocab_size": 100}
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.write_checkpoint(tmp_path / folder, config, seed=seed)
    same, again, other = (digests(tmp_path / folder) for folder in "abc")
    assert same == again
    shards = [name for name in same if name.endswith(".safetensors")]
    assert all(same[name] != other[name] for name in shards)
    assert not (tmp_path / "a" / "tokenizer.json").exists()  # 100 ids cannot name all bytes


@pytest.mark.parametrize(
    ("distribution", "kurtosis"), [("gaussian", (2.9, 3.1)), ("student", (6.0, 30.0))]
)
def test_distributions(
    script: ModuleType, distribution: str, kurtosis: tuple[float, float]
) -> None:
    generator = torch.Generator().manual_seed(5)
    drawn = script.standard(1_000_000, distribution, generator).double()
    assert drawn.isfinite().all()
    assert abs(drawn.mean()) < 0.01
    assert drawn.var() == pytest.approx(1, abs=0.02)
    assert kurtosis[0] < (drawn**4).mean() / drawn.var() ** 2 < kurtosis[1]


def test_a_tensor_does_not_depend_on_how_it_is_drawn_in_parts(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "_CHUNK", 1 << 10)
    drawn = script.random_tensor(
        "model.layers.0.mlp.down_proj.weight", (64, 160), 8,
        dtype=torch.float32, distribution="gaussian", seed=0,
    )  # fmt: skip
    assert drawn.unique().numel() > 10_000  # no part repeats another
    assert drawn.std().item() == pytest.approx(1 / (160 * 16) ** 0.5, rel=0.05)


def test_dithering_is_one_step_of_each_groups_own_grid(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(2)
    steps = torch.tensor([[0.01], [3.0], [0.0], [1e-5]])
    levels = torch.arange(32).roll(5).remainder(16).float().sub(8)
    grid = (steps * levels).view(2, 64)
    moved = (script.dithered(grid, generator) - grid).view(4, 32)
    shares = (moved / steps)[[0, 1, 3]]
    assert shares.abs().max() <= 0.501
    assert shares.std() == pytest.approx(1 / math.sqrt(12), rel=0.1)
    assert not moved[2].any()  # one level only: its step is not known
