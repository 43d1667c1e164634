"""Writes the golden files: a tiny bundle of format version 3, and what it must decode to.

    python scripts/make_golden.py tests/golden/v3

Run once for each version of the format and never again: the golden files say what bundles written
in the past look like, so they are evidence only as long as nobody writes them anew. An existing
folder is refused. Beside the bundle goes `expected.npz`, see tests/golden/README.md.
Knows nothing about how the bundle is read back.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from make_checkpoint import random_tensor, write_json, write_tokenizer
from safetensors.torch import save_file

from m2c.bundle.importance import Importance, write_importance
from m2c.bundle.planes import dequantize, quantize
from m2c.kernels.workers import Workers
from m2c.mixsearch import choose_mix
from m2c.model.checkpoint import Checkpoint, open_checkpoint
from m2c.model.config import ModelConfig
from m2c.model.tensors import expected_tensors
from m2c.pack import PackJob, pack
from m2c.profile import profile
from m2c.sections import shard_groups
from m2c.steer import Steering

CONFIG: Final[Mapping[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "hidden_size": 40,  # no multiple of 32: every record ends in padding
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,  # a head of its own would be a third of the bytes
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
SEED: Final = 20
MIX: Final = "0/25/75"
BITS: Final = 5.5
RECORDS: Final = (0, 3, -1)  # of each section, whose INT4 and INT8 values are kept
TEXT: Final = "token ids by formula"
# tokens whose embeddings are ordinary: the first rows hold the awkward values
IDS: Final = [16 + (7 * i * i + 3 * i) % 242 for i in range(24)]

U16 = npt.NDArray[np.uint16]


def random_weights() -> dict[str, U16]:
    """Bits of a bf16 model by tensor name, some of them awkward."""
    config = ModelConfig.from_hf(CONFIG)
    bits = {}
    for name, shape in expected_tensors(config).items():
        tensor = random_tensor(
            name, shape, config.num_hidden_layers, dtype=torch.bfloat16, distribution="student",
            seed=SEED,
        )  # fmt: skip
        bits[name] = tensor.view(torch.int16).numpy().view(np.uint16)
    awkward = bits["model.embed_tokens.weight"]
    awkward[0] = 0  # +0
    awkward[1] = 0x8000  # -0
    awkward[2, ::2] ^= 0x8000  # signs
    awkward[3, 5] = 0x7F7F  # the largest bf16, far beyond any FP16 scale
    awkward[4] = np.arange(1, 41)  # subnormal bf16: the group's scale is 0
    awkward[5, :32] = 0xB3A0  # -2**-24 * 5 / 4: the smallest FP16 scale
    awkward[6, 7] = 0x0001
    bits["model.layers.0.mlp.gate_proj.weight"][5] = 0  # a neuron that never fires
    bits["model.layers.1.mlp.down_proj.weight"][3, 9] = 0x4220  # 40, an outlier
    return bits


def write_checkpoint(folder: Path, bits: Mapping[str, U16]) -> None:
    """The weights `bits` as a Hugging Face folder in bf16, one safetensors file."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", CONFIG)
    write_tokenizer(folder, CONFIG["vocab_size"])
    tensors = {
        name: torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
        for name, values in bits.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def measure(checkpoint: Checkpoint) -> Importance:
    workers = Workers(1)
    known = profile(checkpoint, IDS, text=TEXT, text_source="golden", workers=workers)
    workers.close()
    return known


def pack_checkpoint(
    checkpoint: Checkpoint, known: Importance, out: Path, *, exact_type: str = "bf16",
    threads: int = 1,
) -> None:  # fmt: skip
    """Pack as the golden bundle was. `known` may be the profile of an equal checkpoint."""
    calibration = replace(known.calibration, fingerprint=checkpoint.fingerprint())
    known = replace(known, calibration=calibration)
    job = PackJob(checkpoint, known, dict(checkpoint.sidecars()), exact_type, MIX, BITS)
    workers = Workers(threads)
    pack(
        job, out, workers=workers,
        choose_mix=lambda bundle: choose_mix(bundle, known, MIX, BITS, workers)[:2],
    )  # fmt: skip
    workers.close()


def expected(
    checkpoint: Checkpoint, known: Importance, bits: Mapping[str, U16]
) -> dict[str, npt.NDArray[Any]]:
    """What the golden bundle must decode to, by name as tests/golden/README.md explains.

    Goes from the weights to the values with the numpy reference, and without the shard in between.
    """
    arrays: dict[str, npt.NDArray[Any]] = {f"weights/{name}": v for name, v in bits.items()}
    kept, workers = np.array(RECORDS), Workers(1)
    for group in shard_groups(checkpoint, known, Steering("bf16", None)):
        shard = group.files["int4"].removesuffix(".int4")
        for matrix in group.matrices:
            piece, layout = matrix.open(workers)(0, matrix.records), matrix.layout
            shape = (matrix.records, layout.vectors, layout.length)
            codes = None if piece.codes is None else piece.codes.reshape(shape)
            values = piece.rows.float().numpy().reshape(shape)
            int4, int8, _ = quantize(values, matrix.importance, codes)
            name = f"{shard}/{matrix.name}"
            arrays[f"int4/{name}"] = dequantize(layout, int4[kept])
            arrays[f"int8/{name}"] = dequantize(layout, int4[kept], int8[kept])
    workers.close()
    return arrays


def same_files(one: Path, other: Path) -> bool:
    def files(folder: Path) -> dict[str, bytes]:
        found = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}

    return files(one) == files(other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write; must not exist")
    folder = parser.parse_args().folder
    if folder.exists():
        raise SystemExit(f"{folder} exists: golden files are never written again")
    bits = random_weights()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "golden"
        write_checkpoint(source, bits)
        checkpoint = open_checkpoint(source)
        known = measure(checkpoint)
        twin = Path(scratch) / "twin.m2c"
        pack_checkpoint(checkpoint, known, twin, threads=2)
        bundle = folder / "golden.m2c"
        pack_checkpoint(checkpoint, known, bundle)
        if not same_files(bundle, twin):
            raise SystemExit(f"{bundle}: packing is not deterministic")
        write_importance(folder / "importance.safetensors", known)
        arrays: dict[str, Any] = expected(checkpoint, known, bits)
        np.savez_compressed(folder / "expected.npz", **arrays)
    print(f"{folder}: {sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())} bytes")


if __name__ == "__main__":
    main()
