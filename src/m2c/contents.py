"""What a bundle holds besides shards: config, importance, norms and biases, tokenizer.

Everything is verified against the manifest and checked for shape. Knows nothing about memory.
"""

from typing import Final

import numpy as np
import torch

from m2c.bundle.bundle import Bundle, shard_name
from m2c.bundle.files import MEND
from m2c.bundle.importance import Importance, decode_importance
from m2c.bundle.shard import PLANES
from m2c.bundle.tensors import load_tensors
from m2c.errors import BadInput
from m2c.model.attention import MATRICES
from m2c.model.config import ModelConfig
from m2c.model.experts import SHARED
from m2c.model.tensors import dense_matrices, small_tensors, up_bias_name
from m2c.model.weights import matrix_name
from m2c.tiers.store import EMBED, FFN
from m2c.tokenizer import Tokenizer

IMPORTANCE: Final = "importance.safetensors"
VECTORS: Final = "vectors.safetensors"


def config_of(bundle: Bundle) -> ModelConfig:
    """Raises BadInput when the shards are not those of the architecture."""
    config = ModelConfig.from_dict(
        bundle.manifest.architecture, file=str(bundle.path / "manifest.json")
    )
    for (kind, name), shapes in _shard_shapes(config).items():
        for plane in PLANES:
            file = shard_name(kind, name, plane)
            header = bundle.shards[file].header if file in bundle.shards else None
            found = header and {s.name: (s.records, s.vectors, s.length) for s in header.sections}
            if header is None or header.plane != plane or found != shapes:
                raise BadInput(
                    f"{bundle.path}: {file} is missing or of another model", "pack the model again"
                )
    return config


def _shard_shapes(
    config: ModelConfig,
) -> dict[tuple[str, int | str], dict[str, tuple[int, int, int]]]:
    """(kind, name) of every shard group: section to (records, vectors, length)."""
    matrices = dense_matrices(config)
    hidden = config.hidden_size
    found: dict[tuple[str, int | str], dict[str, tuple[int, int, int]]] = {
        ("dense", "embed"): {EMBED: (config.vocab_size, 1, hidden)}
    }
    for layer in range(config.num_hidden_layers):
        attention = {short: matrices[matrix_name(layer, short)] for short in MATRICES}
        found["dense", layer] = {short: (n, 1, length) for short, (n, length) in attention.items()}
        if shared := config.shared_expert_intermediate_size:
            found["dense", layer][SHARED] = (shared, config.vectors, hidden)
        found["neurons", layer] = {FFN: (config.neurons, config.vectors, hidden)}
    if not config.tie_word_embeddings:
        found["dense", "head"] = {"lm_head": (config.vocab_size, 1, hidden)}
    return found


def importance_of(bundle: Bundle) -> Importance:
    importance = decode_importance(bundle.file(IMPORTANCE), bundle.path / IMPORTANCE)
    config = config_of(bundle)
    fits = len(importance.layers) == config.num_hidden_layers and all(
        len(layer.order) == config.neurons and keeps_experts(layer.order, config)
        for layer in importance.layers
    )
    if not fits:
        raise BadInput(f"{bundle.path / IMPORTANCE}: belongs to another model")
    return importance


def keeps_experts(order: np.ndarray, config: ModelConfig) -> bool:
    """Whether every expert's neurons are where its records are."""
    size = config.intermediate_size
    return not config.num_experts or bool((order // size == np.arange(len(order)) // size).all())


def vectors_of(bundle: Bundle, config: ModelConfig) -> dict[str, torch.Tensor]:
    """What no plane holds (norms, biases, routers, learned positions), f32.

    Raises BadInput when one is missing, of a wrong shape or not finite.
    """
    path = bundle.path / VECTORS
    arrays = load_tensors(bundle.file(VECTORS), path)
    found = {}
    for name, shape in small_tensors(config).items():
        array = arrays.get(name)
        if array is None or array.shape != shape or array.dtype != np.float32:
            raise BadInput(f"{path}: {name} is missing or of a wrong shape")
        if not np.isfinite(array).all():
            raise BadInput(f"{path}: {name} holds NaN or infinity", MEND)
        found[name] = torch.from_numpy(array.copy())
    return found


def in_shard_order(
    vectors: dict[str, torch.Tensor], importance: Importance
) -> dict[str, torch.Tensor]:
    """`vectors` with the biases of neurons in the order of the bundle's records."""
    found = dict(vectors)
    for i, layer in enumerate(importance.layers):
        if (name := up_bias_name(i)) in found:
            found[name] = found[name][torch.from_numpy(layer.order.astype(np.int64))]
    return found


def tokenizer_of(bundle: Bundle) -> Tokenizer:
    sidecars = sidecars_of(bundle)
    if "tokenizer.json" not in sidecars:
        raise BadInput(f"{bundle.path}: holds no tokenizer.json")
    source = str(bundle.path / "model" / "tokenizer.json")
    return Tokenizer.from_json(
        sidecars["tokenizer.json"], source=source, config=sidecars.get("tokenizer_config.json")
    )


def sidecars_of(bundle: Bundle) -> dict[str, bytes]:
    """The files of model/, by name."""
    prefix = "model/"
    return {
        name.removeprefix(prefix): bundle.file(name)
        for name in bundle.manifest.files
        if name.startswith(prefix)
    }
