"""The memory of `profile` and `pack` is that of a layer: it does not grow with the model.

Checkpoints of more and more layers of one shape, each command in a process of its own, all of them
within one bound.
"""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command_line import COMMAND
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint_script
from trials import keep_row, trials

from m2c.bundle.importance import read_importance
from m2c.hardware import OVERHEAD_NBYTES
from m2c.units import MiB

pytestmark = pytest.mark.slow
SHAPE: dict[str, Any] = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 2816,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 1000,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
LAYER_NBYTES = 2 * (4 * 1024 * 1024 + 3 * 1024 * 2816)
LAYERS = (6, 40, 400)  # 0.15, 1 and 10 GB
MOST = OVERHEAD_NBYTES + LAYER_NBYTES  # what m2c takes before any weight, and a layer
COPIES = 3  # of the profile, which has 0.5 MB a layer here: pack hashes and writes it
FREE_NBYTES = 2.2  # times the checkpoint: it, the bundle, and some
COMMANDS = ("profile", "pack")


@pytest.fixture(scope="module")
def limits() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "scripts")
        yield importlib.import_module("limits")


def write_deep(folder: Path, layers: int) -> None:
    """One random layer, over and over: drawing 5 billion weights would take longer than packing."""
    make_checkpoint_script().write_checkpoint(folder, {**SHAPE, "num_hidden_layers": 1})
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    places = index["weight_map"]
    (shard,) = {file for name, file in places.items() if ".layers.0." in name}
    first = {name: t for name, t in load_file(folder / shard).items() if ".layers.0." in name}
    for layer in range(1, layers):
        tensors = {name.replace(".0.", f".{layer}.", 1): t for name, t in first.items()}
        save_file(tensors, folder / f"layer-{layer}.safetensors")
        places.update(dict.fromkeys(tensors, f"layer-{layer}.safetensors"))
    index["metadata"]["total_size"] += (layers - 1) * sum(t.nbytes for t in first.values())
    index_path.write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))


def peaks(limits: ModuleType, folder: Path, layers: int) -> dict[str, int]:
    """Largest resident set of each command, files it maps included, without the profile's copies;
    leaves nothing behind."""
    needed = FREE_NBYTES * LAYER_NBYTES * layers
    if shutil.disk_usage(folder).free < needed + (4 << 30):
        pytest.skip(f"needs {needed / 1e9:.0f} GB of disk")
    source, made = folder / "source", folder / "profile"
    try:
        write_deep(source, layers)
        words = {
            "profile": ["profile", source, "--tokens", 64, "-o", made],
            "pack": ["pack", source, "--ssd", folder, "--profile", made],
        }
        found = {}
        for name in COMMANDS:
            line = [*COMMAND, *words[name], "-q", "-t", 2]
            outcome = limits.run([*map(str, line)], timeout_s=3600)
            assert outcome.status == "", outcome.errors
            found[name] = outcome.peak_nbytes - COPIES * made.stat().st_size
            row = {"command": name, "checkpoint_mb": layers * LAYER_NBYTES // 10**6}
            row |= {"resident_peak_mib": outcome.peak_nbytes // MiB}
            keep_row("R10-pack", row | {"seconds": round(outcome.seconds, 1)})
        assert len(read_importance(made)[0].layers) == layers
        return found
    finally:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.campaign
def test_more_layers_take_no_more_memory(limits: ModuleType, tmp_path: Path) -> None:
    for trial in trials("R10-pack", ci=1, campaign=len(LAYERS)):
        with trial as number:
            found = peaks(limits, tmp_path, LAYERS[number])
            assert max(found.values()) <= MOST, found


def test_a_peak_is_seen(limits: ModuleType) -> None:
    """So that the comparison means something: 200 MiB for a moment count."""
    grab = "import time; data = bytearray(200 << 20); data = None; time.sleep(0.3)"
    assert limits.run([sys.executable, "-c", grab]).peak_nbytes > 200 * MiB
