"""A checkpoint, whatever its format: `open_checkpoint` takes a Hugging Face folder or a GGUF file.

Opening reads headers only and checks that every tensor the config calls for is there in the right
shape; weights are read by rows, on demand. Never runs code from a checkpoint, never unpickles.
Knows nothing about bundles or about where checkpoints come from (`m2c.hub`).
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.config import ModelConfig
from m2c.model.families import SUPPORTED
from m2c.model.gguf_file import GgufFile
from m2c.model.hf_folder import HfFolder
from m2c.model.places import file_name, norm_offset, places, stored_tensors
from m2c.model.ranged_file import RangedFile, check_rows
from m2c.model.tensors import expected_tensors

_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt")
_STORED: Final = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_SAMPLES, _SAMPLE_NBYTES = 64, 4096


class Checkpoint(Protocol):
    """Tensors go by their Hugging Face names, in the order of `expected_tensors(config)`."""

    name: str
    path: Path
    config: ModelConfig

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def stored_type(self, name: str) -> str:
        """One of f32, f16, bf16, quantized."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) in the stored type, f32 for quantized ones."""

    def fingerprint(self) -> str:
        """Hex sha256 over config, sizes, headers and samples: which checkpoint, not if intact."""

    def sidecars(self) -> dict[str, bytes]:
        """config.json and what else belongs to the model besides weights, by file name."""

    def gguf_metadata(self) -> dict[str, Any] | None: ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises BadInput for a damaged or incomplete checkpoint, UnsupportedModel for one not ours."""
    path = Path(path)
    if path.is_dir():
        return HfCheckpoint(path)
    if path.suffix in _PICKLES:
        raise _pickled(path)
    if path.suffix == ".safetensors":
        raise BadInput(f"{path}: one file of a checkpoint", f"pass its folder: {path.parent}")
    return GgufCheckpoint(path)


def read_stored(checkpoint: Checkpoint, stored: str, *, gguf: bool = False) -> torch.Tensor:
    """A tensor as safetensors or GGUF files of this family store it; what is stored as one is put
    together."""
    where, shape = places(checkpoint.config, gguf=gguf), stored_tensors(checkpoint.config)[stored]
    names = [name for name, place in where.items() if place.stored == stored]
    out = torch.empty(0)
    for name in names:
        rows, done = checkpoint.read(name), 0
        if len(names) == 1:
            return rows
        out = out if len(out) else torch.empty(shape, dtype=rows.dtype)
        for first, end in where[name].parts(0, len(rows)):
            out[first:end] = rows[done : done + end - first]
            done += end - first
    return out


class HfCheckpoint:
    """A folder with config.json and one or more safetensors files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = HfFolder(path)
        self.name = self._folder.name
        if not self._folder.shards and (pickles := self._folder.matching(_PICKLES)):
            raise _pickled(pickles[0])
        self.config = self._folder.config
        self._shapes, self._places = expected_tensors(self.config), places(self.config)
        wanted = stored_tensors(self.config)
        files = {name: file_name(self.config, name) for name in wanted}
        found = self._folder.stored_names(files.values())
        self._stored = {name: found[file] for name, file in files.items()}
        for name, shape in wanted.items():
            entry = self._folder.entry(self._stored[name])
            _check_shape(path, name, entry.shape, shape)
            if entry.dtype not in _STORED:
                message = f"{path}: {name} is stored as {entry.dtype}"
                raise UnsupportedModel(message, "this version reads F32, F16 and BF16")

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def stored_type(self, name: str) -> str:
        return _STORED[self._folder.entry(self._stored[self._places[name].stored]).dtype]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        place = self._places[name]
        stop = check_rows(name, start, stop, self._shapes[name][0])
        stored = self._stored[place.stored]
        parts = [self._folder.read(stored, *part) for part in place.parts(start, stop)]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        # in f32, as the models themselves add it
        offset = norm_offset(self.config, name)
        return rows.float() + offset if offset else rows

    def fingerprint(self) -> str:
        shards = sorted(self._folder.shards.items())
        files = [(name, shard.file, len(shard.header) + 8) for name, shard in shards]
        return _fingerprint(self.config, files)

    def sidecars(self) -> dict[str, bytes]:
        return self._folder.sidecars()

    def gguf_metadata(self) -> None:
        return None


class GgufCheckpoint:
    """One GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self._gguf = GgufFile(path)
        self.config = self._gguf.config
        self._shapes, self._places = expected_tensors(self.config), places(self.config, gguf=True)
        wanted = stored_tensors(self.config)
        for name, shape in wanted.items():
            if name not in self._gguf.tensors:
                raise _missing(path, name)
            _check_shape(path, name, self._gguf.tensors[name].shape, shape)
        # GGUF has no leftovers: a tensor we have no place for would change the result
        if extra := self._gguf.tensors.keys() - wanted.keys():
            raise UnsupportedModel(f"{path}: the tensor {min(extra)} is unexpected", SUPPORTED)

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def stored_type(self, name: str) -> str:
        return _STORED.get(self._gguf.tensors[self._places[name].stored].type_name, "quantized")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        place = self._places[name]
        stop = check_rows(name, start, stop, self._shapes[name][0])
        ((first, end),) = place.parts(start, stop)
        return self._gguf.read(place.stored, first, end)

    def fingerprint(self) -> str:
        # without the file's name: people rename GGUF files
        return _fingerprint(self.config, [("gguf", self._gguf.file, self._gguf.header_nbytes)])

    def sidecars(self) -> dict[str, bytes]:
        config = self.config.to_hf()
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        return {"config.json": _json(config), "generation_config.json": _json(generation)}

    def gguf_metadata(self) -> dict[str, Any]:
        return self._gguf.metadata


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def _check_shape(path: Path, name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if got != wanted:
        raise BadInput(
            f"{path}: {name} has the shape {list(got)}, the config calls for {list(wanted)}",
            "weights and config are not of the same model",
        )


def _missing(path: Path, name: str) -> BadInput:
    return BadInput(f"{path}: the tensor {name} is missing", "fetch the whole checkpoint again")


def _pickled(path: Path) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path}: a pickle file, which can run code when it is opened",
        "get the safetensors version of this model (on the hub a pull request may add it: "
        "NAME@refs/pr/NUMBER), or convert it in a sandbox",
    )


def _fingerprint(config: ModelConfig, files: Iterable[tuple[str, RangedFile, int]]) -> str:
    """Of the config and (name, file, bytes of header) in a fixed order."""
    digest = hashlib.sha256(_json(config.to_dict()))
    for name, file, header_nbytes in files:
        digest.update(f"{name}\0{file.size}\0{header_nbytes}\0".encode())
        digest.update(file.read(0, header_nbytes))
        nbytes = min(_SAMPLE_NBYTES, file.size)
        for i in range(_SAMPLES):
            digest.update(file.read((file.size - nbytes) * i // (_SAMPLES - 1), nbytes))
    return digest.hexdigest()
