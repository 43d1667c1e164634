"""A Hugging Face model folder: config.json, safetensors shards and their index, small files.

The folder may be a snapshot in the hub's cache, whose files are links into `blobs/` next to it; any
other link that leaves the folder is refused. Knows nothing about which tensors a model needs.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from m2c.bundle.strict import parse_object
from m2c.errors import BadInput
from m2c.model.config import ModelConfig
from m2c.model.ranged_file import RangedFile
from m2c.model.safetensors_file import Entry, SafetensorsFile

CONFIG: Final = "config.json"
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_MAX_SHARDS = 512  # all stay open, and 1024 open files are a common limit
_MIB = 1 << 20
_SIDECARS: Final = {
    "config.json": 4 * _MIB,
    "generation_config.json": _MIB,
    "tokenizer.json": 128 * _MIB,
    "tokenizer.model": 64 * _MIB,
    "added_tokens.json": 4 * _MIB,
    "vocab.json": 64 * _MIB,
    "merges.txt": 64 * _MIB,
    "tokenizer_config.json": 16 * _MIB,
    "special_tokens_map.json": 4 * _MIB,
    "chat_template.jinja": 4 * _MIB,
}
_LEGAL: Final = ("LICENSE", "NOTICE", "USE_POLICY")
_PLAIN: Final = re.compile(r"[\w .()-]{1,100}")  # a name that a bundle may hold
_MAX_LEGAL, _LEGAL_NBYTES = 16, _MIB


class HfFolder:
    """`shards` maps file name -> opened file; `config` has generation_config.json merged in."""

    def __init__(self, path: Path, *, weights: bool = True) -> None:
        """weights: open them too, if they are there.

        Raises BadInput for a folder that is no checkpoint or a damaged one.
        """
        self.path = path
        self._root = path.resolve()
        self._blobs = _blobs_of(self._root)
        self.name = _name_of(self._root)
        self.config = self._read_config()
        self.shards: Mapping[str, SafetensorsFile] = {}
        self._shard_of: Mapping[str, str] = {}
        if not weights:
            return
        if self._has(SINGLE):
            self.shards = {SINGLE: SafetensorsFile(self._inside(SINGLE))}
            self._shard_of = dict.fromkeys(self.shards[SINGLE].entries, SINGLE)
        elif self._has(INDEX):
            self._shard_of = weight_map(self._load(INDEX, 64 * _MIB), f"{path}/{INDEX}")
            names = sorted(set(self._shard_of.values()))
            self.shards = {name: SafetensorsFile(self._inside(name)) for name in names}
            self._check_index()

    def matching(self, suffixes: Iterable[str]) -> list[Path]:
        """Files of the folder with one of these suffixes, sorted."""
        return sorted(file for file in self.path.iterdir() if file.suffix in set(suffixes))

    def stored_names(self, wanted: Iterable[str]) -> dict[str, str]:
        """The name in the files of each wanted tensor: with or without the leading `model.`, and
        with what a multimodal checkpoint puts before its language model.

        Raises BadInput for the first that is missing.
        """
        found = {}
        for name in wanted:
            bare = name.removeprefix("model.")
            names = (name, bare, f"language_model.{name}", f"model.language_model.{bare}")
            stored = next((known for known in names if known in self._shard_of), None)
            if stored is None:
                raise self._missing(name)
            found[name] = stored
        return found

    def entry(self, stored: str) -> Entry:
        return self.shards[self._shard_of[stored]].entries[stored]

    def read(self, stored: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.shards[self._shard_of[stored]].read(stored, start, stop)

    def sidecars(self) -> dict[str, bytes]:
        """The small files there are, by name, each within its size limit."""
        limits = small_files(file.name for file in self.path.iterdir())
        return {
            name: self._load(name, limit)
            for name, limit in limits.items()
            if not (self.path / name).is_dir()
        }

    def _missing(self, name: str) -> BadInput:
        if self.shards:
            return BadInput(
                f"{self.path}: the tensor {name} is missing", "fetch the whole checkpoint again"
            )
        ggufs = self.matching([".gguf"])
        hint = f"pass the GGUF file itself: {ggufs[0]}" if ggufs else "fetch the whole checkpoint"
        return BadInput(f"{self.path}: has neither {SINGLE} nor {INDEX}", hint)

    def _read_config(self) -> ModelConfig:
        if not self._has("config.json"):
            ggufs = self.matching([".gguf"])
            hint = f"pass the GGUF file itself: {ggufs[0]}" if ggufs else "is it a model folder?"
            raise BadInput(f"{self.path}: has no config.json", hint)
        config = ModelConfig.from_hf(
            self._object("config.json"), file=str(self.path / "config.json")
        )
        if not self._has("generation_config.json"):
            return config
        return _merge_generation(
            config,
            self._object("generation_config.json"),
            file=str(self.path / "generation_config.json"),
        )

    def _object(self, name: str) -> dict[str, Any]:
        return parse_object(self._load(name, _SIDECARS[name]), str(self.path / name))

    def _load(self, name: str, limit: int) -> bytes:
        file = RangedFile(self._inside(name))
        if file.size > limit:
            raise BadInput(f"{self.path / name}: {file.size} bytes, at most {limit} are accepted")
        data = bytes(file.read(0, file.size))
        file.close()
        return data

    def _has(self, name: str) -> bool:
        file = self.path / name
        return file.exists() or file.is_symlink()  # a dangling link is an error, not an absence

    def _inside(self, name: str) -> Path:
        """The path of a file of this folder. Raises BadInput if it is a link that leads away."""
        try:
            target = (self._root / name).resolve()
        except (OSError, RuntimeError, ValueError):  # a link to itself, a name no disk can hold
            raise BadInput(f"{self.path / name[:80]}: leads nowhere") from None
        allowed = (self._root, self._blobs) if self._blobs else (self._root,)
        if not any(target.is_relative_to(folder) for folder in allowed):
            raise BadInput(
                f"{self.path / name}: a link out of the folder", "put the file itself there"
            )
        return self.path / name

    def _check_index(self) -> None:
        """Every name of the index is in its shard, and in no other."""
        for shard, opened in self.shards.items():
            for name in opened.entries:
                if self._shard_of.get(name, shard) != shard:
                    raise BadInput(f"{self.path}: {name[:80]} is in {shard} and in another shard")
        for name, shard in self._shard_of.items():
            if name not in self.shards[shard].entries:
                raise BadInput(
                    f"{self.path}: {name[:80]} is not in {shard}, where the index has it",
                    "fetch the whole checkpoint again",
                )


def small_files(names: Iterable[str]) -> dict[str, int]:
    """Which of the files `names` travel with a model, and how many bytes each may have."""
    found = set(names)
    if found & {"tokenizer.json", "tokenizer.model"}:  # these say more
        found -= {"vocab.json", "merges.txt"}
    legal = sorted(name for name in found if name.startswith(_LEGAL) and _PLAIN.fullmatch(name))
    limits = {name: limit for name, limit in _SIDECARS.items() if name in found}
    return limits | dict.fromkeys(legal[:_MAX_LEGAL], _LEGAL_NBYTES)


def weight_map(data: bytes, file: str) -> dict[str, str]:
    """Tensor to file name, from an index; each is a plain name, so none leads out of the folder."""
    found = parse_object(data, file).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise BadInput(f"{file}: has no weight_map")
    for shard in found.values():
        plain = isinstance(shard, str) and len(shard) < 256 and Path(shard).name == shard
        if not plain or "\\" in shard:
            raise BadInput(f"{file}: {str(shard)[:80]!r} is not the name of a file in the folder")
        if not shard.endswith(".safetensors") or "\0" in shard:
            raise BadInput(f"{file}: {shard[:80]!r} is not a safetensors file")
    if len(set(found.values())) > _MAX_SHARDS:
        raise BadInput(f"{file}: names more than {_MAX_SHARDS} shards")
    return found


def _merge_generation(config: ModelConfig, data: Mapping[str, Any], *, file: str) -> ModelConfig:
    """Any end-of-text id of either file ends the text."""
    eos = data.get("eos_token_id")
    more = eos if isinstance(eos, list) else [] if eos is None else [eos]
    bos = config.bos_token_id
    facts = config.to_dict() | {
        "eos_token_ids": more,
        "bos_token_id": data.get("bos_token_id") if bos is None else bos,
    }
    read = ModelConfig.from_dict(facts, file=file)
    together = (*config.eos_token_ids, *read.eos_token_ids)
    return replace(read, eos_token_ids=tuple(dict.fromkeys(together)))


def _is_snapshot(root: Path) -> bool:
    return root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")


def _blobs_of(root: Path) -> Path | None:
    return root.parent.parent / "blobs" if _is_snapshot(root) else None


def _name_of(root: Path) -> str:
    """The folder's name; for a snapshot, whose name is a hash, the repository's."""
    return root.parent.parent.name.split("--")[-1] if _is_snapshot(root) else root.name
