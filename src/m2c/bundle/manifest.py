"""manifest.json: the index of a bundle, written last. A folder without one is not a bundle.

docs/FORMAT.md, section "Manifest". Knows nothing about what the architecture fields mean.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from m2c.bundle.exact import EXACT_TYPES
from m2c.bundle.files import MEND, read_small, write_atomic
from m2c.bundle.strict import MAX_JSON_NBYTES, decode, dump_json, load_json
from m2c.errors import BadInput

FORMAT: Final = "m2c-bundle"
VERSION: Final = 3
MANIFEST: Final = "manifest.json"


@dataclass(frozen=True)
class FileFact:
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ShardFact:
    nbytes: int
    sha256: str
    digest: str  # XXH3-128 of the shard's header and index


@dataclass(frozen=True)
class Source:
    name: str
    fingerprint: str
    stored_type: str  # f32, f16, bf16 or quantized


@dataclass(frozen=True)
class MixChoice:
    """The precision mix `m2c run` uses unless told otherwise, and how it was found."""

    percent: tuple[int, ...]  # FP16, INT8, INT4
    search: str  # "error", "entropy" or "given"
    bits_per_weight: float  # average over the neurons of a token
    relative_error: float  # of the FFN output on the calibration sample; 0 when not measured


@dataclass(frozen=True)
class Manifest:
    created_by: str
    name: str
    recipe: str
    exact_type: str
    source: Source
    architecture: dict[str, Any]
    mix: MixChoice
    shards: dict[str, ShardFact]
    files: dict[str, FileFact]
    format: str = FORMAT
    version: int = VERSION
    quality: dict[str, float] = field(default_factory=dict)


def encode_manifest(manifest: Manifest) -> bytes:
    facts = asdict(manifest)
    checksum = hashlib.sha256(dump_json(facts)).hexdigest()
    return dump_json({**facts, "checksum": checksum}) + b"\n"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    write_atomic(directory / MANIFEST, encode_manifest(manifest))


def read_manifest(directory: Path) -> Manifest:
    """Raises BadInput when there is none, or it is damaged, foreign or of another version."""
    path = directory / MANIFEST
    if not path.exists():
        raise BadInput(
            f"{directory}: not a complete bundle ({MANIFEST} is missing)",
            "run m2c pack again to finish it",
        )
    data = read_small(path, limit=MAX_JSON_NBYTES)
    facts = load_json(data, file=path)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise BadInput(f"{path}: not the manifest of an m2c bundle")
    if facts.get("version") != VERSION:
        raise BadInput(
            f"{path}: bundle format {repr(facts.get('version'))[:40]}, this m2c reads {VERSION}",
            "pack the model again: m2c profile MODEL | m2c pack - --ssd DIR",
        )
    checksum = facts.pop("checksum", None)
    sound = checksum == hashlib.sha256(dump_json(facts)).hexdigest()
    # other bytes can stand for the same facts: 1e-05 and 1E-05 differ in one bit
    if not sound or data != dump_json({**facts, "checksum": checksum}) + b"\n":
        raise BadInput(f"{path}: damaged", MEND)
    manifest = decode(Manifest, facts, file=path)
    for name in (*manifest.shards, *manifest.files):
        _check_name(name, path)
    for folder in sorted({name.partition("/")[0] for name in (*manifest.shards, *manifest.files)}):
        if (directory / folder).is_symlink():
            raise BadInput(
                f"{directory / folder}: a link, and all of a bundle lies in its folder",
                "put the folder itself there",
            )
    if manifest.exact_type not in EXACT_TYPES:
        raise BadInput(f"{path}: exact_type must be one of {', '.join(EXACT_TYPES)}")
    if len(manifest.mix.percent) != 3 or sum(manifest.mix.percent) != 100:
        raise BadInput(f"{path}: the mix must be three percentages that add up to 100")
    return manifest


def _check_name(name: str, path: Path) -> None:
    """A name inside the bundle: relative, plain, at most one folder deep."""
    parts = PurePosixPath(name).parts
    # a root is "/", or "//" where that means something else
    plain = all(not part.startswith((".", "/")) for part in parts) and name.isprintable()
    if not plain or not 1 <= len(parts) <= 2 or "\\" in name or len(name) > 200:
        raise BadInput(f"{path}: {name[:80]!r} is not a name inside a bundle")
