"""Whatever names and links files hold, nothing outside the source, the bundle and m2c's own folder
is opened: each case runs in a process that notes what it opens (R13).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_files as files
import pytest
from tiny_models import digest, job_for, run_pack
from watched import SYSTEM, watch

from m2c.bundle.manifest import MANIFEST
from m2c.bundle.strict import dump_json
from m2c.kernels.workers import Workers
from m2c.model.checkpoint import open_checkpoint
from m2c.profile import profile

SECRET = "the secret of another folder"
NAMES = (
    "../outside/secret.safetensors", "/etc/hostname", "..", ".", "",
    "a/../../outside/secret.safetensors", "a\\..\\..\\outside\\secret.safetensors",
    "a\0.safetensors", "x" * 10_000 + ".safetensors",
    "\ud800.safetensors", "/dev/zero", "/dev/zero.safetensors", "/proc/self/environ",
    "//x.safetensors",
    "./model-00001-of-00003.safetensors", "model-00001-of-00003.safetensors/", "~/x.safetensors",
    "$HOME/x.safetensors", "*.safetensors", "-rf.safetensors", "a\nb.safetensors",
    "\x1b[2J.safetensors",
    "file:///etc/hostname", "http://127.0.0.1/x.safetensors", "\u202e.safetensors",
    "é" * 120 + ".safetensors",
)  # fmt: skip
Make = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = files.folder_with_tokenizer(tmp_path_factory.mktemp("paths") / "model")
    importance = profile(
        open_checkpoint(model), [1, 2, 3, 4] * 9, text="t", text_source="t", workers=Workers(1)
    )
    path = tmp_path_factory.mktemp("packed") / "bundle.m2c"
    run_pack(job_for(model, importance), path)
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that nobody was asked to read."""
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    for name in ("secret.safetensors", "config.json", "sub/x"):
        (folder / name).write_text(SECRET)
    return folder


def check(found: dict[str, Any], allowed: tuple[Path, ...], what: str) -> None:
    """One line if it failed, nothing of elsewhere opened, nothing written but at home."""
    lines = found["err"].splitlines()
    assert found["code"] in (0, 3, 4), f"{what}: {found['code']} {lines}"
    if found["code"]:
        assert len(lines) == 1, f"{what}: {lines}"
        assert len(lines[0]) < 1500, what
        assert lines[0].isprintable(), f"{what}: {lines[0]!r}"
    assert "Traceback" not in found["err"], what
    assert SECRET not in found["out"] + found["err"], what
    inside = (*(str(path) + "/" for path in allowed), "/dev/null/")
    for kind, path in found["notes"]:
        if kind in ("read", "write"):
            here = (path + "/").startswith(inside)
            assert here or (kind == "read" and path.startswith(SYSTEM)), f"{what}: {kind} {path}"
        assert kind != "network", f"{what}: {path}"


# -- a checkpoint ----------------------------------------------------------------------------------


def named(name: str) -> Make:
    """The index sends every tensor of one shard elsewhere."""

    def make(folder: Path, outside: Path) -> None:
        path = folder / "model.safetensors.index.json"
        where = json.loads(path.read_text())["weight_map"]
        first = next(iter(where.values()))
        path.write_text(
            json.dumps({"weight_map": {k: name if v == first else v for k, v in where.items()}})
        )

    return make


def odd_file(name: str, kind: str) -> Make:
    def make(folder: Path, outside: Path) -> None:
        path = folder / name
        kept = path.read_bytes() if path.is_file() else SECRET.encode()
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "good copy":
            (outside / "copy").write_bytes(kept)
            path.symlink_to(outside / "copy")
        else:
            path.symlink_to({
                "secret": outside / "secret.safetensors", "relative": "../outside/config.json",
                "zero": "/dev/zero", "nothing": outside / "nothing", "dir": outside,
                "chain": "../outside/sub/../config.json",
            }[kind])  # fmt: skip

    return make


SOURCE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE",
    "model.safetensors.index.json", "model-00001-of-00003.safetensors", "chat_template.jinja",
)  # fmt: skip
KINDS = (
    "secret",
    "relative",
    "good copy",
    "zero",
    "nothing",
    "dir",
    "chain",
    "loop",
    "fifo",
    "folder",
)


def told(key: str, value: Any) -> Make:
    return lambda folder, outside: files.tell(folder, key, value)


def nothing(folder: Path, outside: Path) -> None:
    pass


SOURCES: dict[str, Make] = {
    "honest": nothing,
    **{f"index names {name[:40]!r}": named(name) for name in NAMES},
    **{f"{name} is {kind}": odd_file(name, kind) for name in SOURCE_FILES for kind in KINDS},
    **{
        f"{key} is {value}": told(key, value)
        for key in ("_name_or_path", "tokenizer_file", "vocab_file", "added_tokens_file")
        for value in ("../outside/config.json", "/etc/hostname")
    },
}  # fmt: skip


@pytest.mark.slow
def test_sources_are_read_inside_their_folder(outside: Path, tmp_path: Path) -> None:
    model = files.folder_with_tokenizer(tmp_path / "honest")
    lines = []
    for i, make in enumerate(SOURCES.values()):
        folder = shutil.copytree(model, tmp_path / "models" / str(i) / "m")
        near = shutil.copytree(outside, folder.parent / "outside")
        make(folder, near)
        lines.append(["profile", str(folder), "-q", "--tokens", "16"])
    before = digest(outside)
    found = watch(lines, tmp_path, tmp_path)
    for i, (what, one) in enumerate(zip(SOURCES, found, strict=True)):
        folder = tmp_path / "models" / str(i) / "m"
        check(one, (folder, tmp_path / "home"), what)
        assert i or not one["code"], one["err"]
        assert not [p for k, p in one["notes"] if k == "write" and p.startswith(str(folder))], what
    assert digest(outside) == before


# -- a bundle --------------------------------------------------------------------------------------


def entry(kind: str, name: str) -> Make:
    """The manifest vouches for one more file, which lies outside."""

    def make(folder: Path, outside: Path) -> None:
        facts = json.loads((folder / MANIFEST).read_text())
        del facts["checksum"]
        fact = {"nbytes": len(SECRET), "sha256": hashlib.sha256(SECRET.encode()).hexdigest()}
        facts[kind][name] = fact | ({"digest": "0" * 32} if kind == "shards" else {})
        facts["checksum"] = hashlib.sha256(dump_json(facts)).hexdigest()
        (folder / MANIFEST).write_bytes(dump_json(facts) + b"\n")

    return make


def linked_folder(name: str) -> Make:
    def make(folder: Path, outside: Path) -> None:
        shutil.move(folder / name, outside / name)
        (folder / name).symlink_to(outside / name)

    return make


BUNDLE_FILES = (
    MANIFEST, "importance.safetensors", "vectors.safetensors", "model/config.json",
    "model/tokenizer.json", "dense/embed.int4", "neurons/00000.fp16",
)  # fmt: skip
BUNDLES: dict[str, Make] = {
    "honest": nothing,
    **{
        f"{kind} names {name[:40]!r}": entry(kind, name)
        for kind in ("files", "shards") for name in ("../outside/config.json", *NAMES)
    },
    **{f"{name} is {kind}": odd_file(name, kind) for name in BUNDLE_FILES for kind in KINDS},
    **{f"{name} is a link": linked_folder(name) for name in ("dense", "neurons", "model")},
}  # fmt: skip


@pytest.mark.slow
def test_bundles_are_read_inside_their_folder(packed: Path, outside: Path, tmp_path: Path) -> None:
    lines = []
    for i, make in enumerate(BUNDLES.values()):
        folder = shutil.copytree(packed, tmp_path / "bundles" / str(i) / "b.m2c")
        make(folder, shutil.copytree(outside, folder.parent / "outside"))
        lines.append(["run", str(folder), "-p", "a", "-n", "1", "-q", "-c", "8"])
        lines.append(["check", str(folder), "-q"])
    for i, one in enumerate(watch(lines, tmp_path, tmp_path)):
        what, folder = list(BUNDLES)[i // 2], tmp_path / "bundles" / str(i // 2) / "b.m2c"
        if one["code"] == 4 and i % 2:  # check says each damage, then how many
            one["err"] = one["err"].splitlines()[-1]
        check(one, (folder, tmp_path / "home"), f"{lines[i][0]}: {what}")
        assert i > 1 or not one["code"], one["err"]
        if "is" in what.split():
            assert one["code"], what
