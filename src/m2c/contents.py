"""What a bundle holds besides shards: config, importance, norms and biases, tokenizer.

Everything is verified against the manifest and checked for shape. Knows nothing about tiers.
"""

from typing import Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load

from m2c.bundle.bundle import Bundle
from m2c.bundle.importance import Importance, decode_importance
from m2c.errors import BadInput
from m2c.model.config import ModelConfig, expected_tensors
from m2c.tokenizer import Tokenizer

IMPORTANCE: Final = "importance.safetensors"
VECTORS: Final = "vectors.safetensors"


def config_of(bundle: Bundle) -> ModelConfig:
    return ModelConfig.from_dict(
        bundle.manifest.architecture, file=str(bundle.path / "manifest.json")
    )


def importance_of(bundle: Bundle) -> Importance:
    importance = decode_importance(bundle.file(IMPORTANCE), bundle.path / IMPORTANCE)
    config = config_of(bundle)
    fits = len(importance.layers) == config.num_hidden_layers and all(
        len(layer.order) == config.intermediate_size for layer in importance.layers
    )
    if not fits:
        raise BadInput(f"{bundle.path / IMPORTANCE}: belongs to another model")
    return importance


def vectors_of(bundle: Bundle, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Norms and biases, f32. Raises BadInput when one is missing or of a wrong shape."""
    path = bundle.path / VECTORS
    try:
        arrays = load(bundle.file(VECTORS))
    except SafetensorError as error:
        raise BadInput(f"{path}: {error}") from None
    found = {}
    for name, shape in expected_tensors(config).items():
        if len(shape) == 1:
            array = arrays.get(name)
            if array is None or array.shape != shape or array.dtype != np.float32:
                raise BadInput(f"{path}: {name} is missing or of a wrong shape")
            found[name] = torch.from_numpy(array.copy())
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
