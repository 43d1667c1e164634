"""Where checkpoints keep the tensors of a model: some families store several matrices as one.

Knows nothing about files or formats; names are those of Hugging Face.
"""

from dataclasses import dataclass
from typing import Final

from m2c.model.config import ModelConfig, expected_tensors
from m2c.model.families import FAMILIES

_FUSED: Final = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}  # fmt: skip


_EXPERT_MATRICES: Final = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclass(frozen=True)
class Place:
    """The rows of the stored tensor `stored` from `start` on."""

    stored: str
    start: int


def places(config: ModelConfig) -> dict[str, Place]:
    """The place of each of `expected_tensors`."""
    found, used = {}, dict[str, int]()
    for name, shape in expected_tensors(config).items():
        stored = _stored_name(config, name)
        found[name] = Place(stored, used.get(stored, 0))
        used[stored] = used.get(stored, 0) + shape[0]
    return found


def stored_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor as it is stored."""
    found = dict[str, tuple[int, ...]]()
    for name, shape in expected_tensors(config).items():
        stored = _stored_name(config, name)
        rows = found[stored][0] if stored in found else 0
        found[stored] = (rows + shape[0], *shape[1:])
    return found


def norm_offset(config: ModelConfig, name: str) -> float:
    """What safetensors files of the family leave out of a norm's weights; GGUF files do not."""
    one_less = FAMILIES[config.model_type].one_less_norms and name.endswith("norm.weight")
    return 1.0 if one_less else 0.0


def _stored_name(config: ModelConfig, name: str) -> str:
    if config.model_type == "mixtral" and ".mlp." in name:
        return _mixtral_name(name)
    if not FAMILIES[config.model_type].fused:
        return name
    *path, short, kind = name.split(".")
    return ".".join((*path, _FUSED.get(short, short), kind))


def _mixtral_name(name: str) -> str:
    *path, short, kind = name.replace(".mlp.", ".block_sparse_moe.").split(".")
    return ".".join((*path, _EXPERT_MATRICES.get(short, short), kind))
