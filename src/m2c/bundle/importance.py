"""importance.safetensors: what `m2c profile` learnt about a checkpoint's neurons.

Written by profile, read by pack, and carried inside the bundle. docs/FORMAT.md, section
"Importance". Knows nothing about how the figures were measured.
"""

import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from m2c.bundle.files import read_small, write_atomic
from m2c.bundle.steering import MOST_DIRECTIONS
from m2c.bundle.strict import decode, dump_json, load_json
from m2c.bundle.tensors import load_tensors
from m2c.errors import BadInput

F32 = npt.NDArray[np.float32]
MAX_NBYTES = 1 << 30
_MOST_SHARE = 1.01  # sums of f32 may come out a little above 1
_DIRECTIONS = ("attn_directions", "o_directions", "ffn_directions", "down_directions")


@dataclass(frozen=True)
class LayerImportance:
    """N neurons, H hidden size, A inputs of o_proj; energy is the squared score.

    R principal directions of inputs, each as long as their root mean square along it; R is 0 in a
    bundle, which was packed with them.
    """

    mean: F32  # [N] mean score: |act(gate.x) * (up.x)| * ||down column||
    energy: F32  # [N] mean squared score
    frequency: F32  # [N] share of tokens whose top TOP_SHARE the neuron is in
    order: npt.NDArray[np.int32]  # [N] neuron numbers of the checkpoint, most important first
    down_norm: F32  # [N] ||down column||
    attn_input: F32  # [H] mean square of the input of q, k and v
    o_input: F32  # [A] mean square of the input of o_proj
    ffn_input: F32  # [H] mean square of the input of gate and up
    attn_directions: F32  # [H, R] of the input of q, k and v
    o_directions: F32  # [A, R] of the input of o_proj
    ffn_directions: F32  # [H, R] of the input of gate and up
    down_directions: F32  # [N, R] of the input of down, neurons as in the checkpoint
    sample: F32  # [tokens, H] inputs of the FFN, to measure output errors on
    coverage_own: F32  # [101] share of a token's energy in its own top k %
    coverage_static: F32  # [101] share of all energy in the top k % of the ranking
    overlap: F32  # [2] of adjacent tokens' top 10 % and top 30 %, minus chance


@dataclass(frozen=True)
class Calibration:
    """What the figures were measured on."""

    model: str
    fingerprint: str  # of the checkpoint
    tokens: int
    text_sha256: str
    text_source: str
    layers: int
    created_by: str


@dataclass(frozen=True)
class Importance:
    calibration: Calibration
    layers: list[LayerImportance]
    head_input: F32  # [H] mean square of the input of the head
    head_directions: F32  # [H, R] of the input of the head

    def without_directions(self) -> "Importance":
        """What a bundle keeps of it."""
        return Importance(
            self.calibration,
            [
                replace(layer, **{name: getattr(layer, name)[:, :0] for name in _DIRECTIONS})
                for layer in self.layers
            ],
            self.head_input,
            self.head_directions[:, :0],
        )

    @property
    def hit_share(self) -> F32:
        """[101]: share of top-set memberships that the hottest k % of the ranking account for."""
        curves = []
        for layer in self.layers:
            held = np.concatenate(([0], np.cumsum(layer.frequency[layer.order], dtype=np.float64)))
            at = np.linspace(0, len(held) - 1, 101).astype(np.int64)
            curves.append(held[at] / max(held[-1], 1e-12))
        return np.mean(curves, axis=0).astype(np.float32)


def encode_importance(importance: Importance) -> bytes:
    """Deterministic bytes of the file."""
    tensors = {
        "head_input": importance.head_input,
        "head_directions": np.ascontiguousarray(importance.head_directions),
    }
    for i, layer in enumerate(importance.layers):
        for field in fields(layer):
            tensors[f"layers.{i}.{field.name}"] = np.ascontiguousarray(getattr(layer, field.name))
    facts = {
        field.name: getattr(importance.calibration, field.name) for field in fields(Calibration)
    }
    return save(tensors, metadata={"m2c": dump_json(facts).decode()})


def write_importance(path: Path, importance: Importance) -> None:
    write_atomic(path, encode_importance(importance))


def read_importance(path: Path) -> tuple[Importance, str]:
    """The file and its sha256. Raises BadInput when it is not what profile writes."""
    data = read_small(path, limit=MAX_NBYTES)
    return decode_importance(data, path), hashlib.sha256(data).hexdigest()


def decode_importance(data: bytes, path: Path) -> Importance:
    tensors = load_tensors(data, path, "an importance file of m2c profile")
    try:
        length = int.from_bytes(data[:8], "little")
        header = load_json(data[8 : 8 + length], file=path)
        facts = load_json(header["__metadata__"]["m2c"].encode(), file=path)
    except (KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise BadInput(f"{path}: not an importance file of m2c profile ({error})") from None
    calibration = decode(Calibration, facts, file=path)
    if not 1 <= calibration.layers <= 4096:
        raise BadInput(f"{path}: {calibration.layers} layers")
    layers = [_layer(tensors, i, path) for i in range(calibration.layers)]
    head = (_tensor(tensors, f"head_{name}", np.float32, path) for name in ("input", "directions"))
    importance = Importance(calibration, layers, *head)
    _check_shapes(importance, path)
    return importance


def _layer(tensors: dict[str, Any], i: int, path: Path) -> LayerImportance:
    arrays = {}
    for field in fields(LayerImportance):
        dtype = np.int32 if field.name == "order" else np.float32
        arrays[field.name] = _tensor(tensors, f"layers.{i}.{field.name}", dtype, path)
    return LayerImportance(**arrays)


def _check_shapes(importance: Importance, path: Path) -> None:
    """All arrays are of one model: its H, its R, and each layer's N and A."""
    hidden, directions = importance.head_input.shape, importance.head_directions.shape
    if len(hidden) != 1 or len(directions) != 2 or directions[1] > MOST_DIRECTIONS:
        raise BadInput(f"{path}: its head arrays are of wrong shapes")
    rank = directions[1:]
    if directions != hidden + rank:
        raise BadInput(f"{path}: its head arrays are of wrong shapes")
    for i, layer in enumerate(importance.layers):
        n, a = layer.order.shape, layer.o_input.shape
        expected = {
            "mean": n, "energy": n, "frequency": n, "down_norm": n, "attn_input": hidden,
            "ffn_input": hidden, "attn_directions": hidden + rank, "o_directions": a + rank,
            "ffn_directions": hidden + rank, "down_directions": n + rank,
            "coverage_own": (101,), "coverage_static": (101,), "overlap": (2,),
        }  # fmt: skip
        shapes = {name: getattr(layer, name).shape for name in expected}
        if shapes != expected or len(n) != 1 or len(a) != 1 or layer.sample.shape[1:] != hidden:
            raise BadInput(f"{path}: layer {i} has arrays of wrong shapes")
        if not np.array_equal(np.sort(layer.order), np.arange(*n)):
            raise BadInput(f"{path}: the order of layer {i} is not a permutation")
        shares = layer.frequency, layer.coverage_own, layer.coverage_static, layer.overlap
        if any((np.abs(array) > _MOST_SHARE).any() for array in shares):
            raise BadInput(f"{path}: layer {i} has shares of more than everything")


def _tensor(tensors: dict[str, Any], name: str, dtype: type, path: Path) -> Any:
    array = tensors.get(name)
    if array is None or array.dtype != dtype or not np.isfinite(array).all():
        raise BadInput(
            f"{path}: {name} is missing, of a wrong type or not finite",
            "an older m2c may have written it; measure again: m2c profile MODEL",
        )
    return array
