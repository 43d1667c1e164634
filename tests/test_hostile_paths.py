"""Whatever names and links files hold, nothing outside the source, the bundle and m2c's own folder
is opened (R13), and no code of a model is run (R14). Each case runs in a process that notes both.
"""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_files as files
import pytest
from tiny_models import digest, job_for, run_pack

import m2c
from m2c.bundle.manifest import MANIFEST
from m2c.bundle.strict import dump_json
from m2c.kernels.workers import Workers
from m2c.model.checkpoint import open_checkpoint
from m2c.profile import profile

PACKAGE = Path(m2c.__file__).parents[1]
SECRET = "the secret of another folder"
# the interpreter, its packages, m2c, and what the system's libraries look at
SYSTEM = (
    sys.prefix, sys.base_prefix, str(PACKAGE), str(Path(__file__).parent),
    "/proc/", "/sys/", "/usr/", "/lib", "/etc/", "/dev/null", "/dev/urandom",
)  # fmt: skip
NAMES = (
    "../outside/secret.safetensors", "/etc/hostname", "..", ".", "",
    "a/../../outside/secret.safetensors", "a\\..\\..\\outside\\secret.safetensors", "a\0.safetensors",
    "x" * 10_000 + ".safetensors",
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
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = files.small_checkpoint(tmp_path_factory.mktemp("paths") / "model")
    (folder / "tokenizer.json").write_text(json.dumps(files.tokenizers()[0]))
    (folder / "tokenizer_config.json").write_text(json.dumps(files.SETTINGS))
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def watch(lines: list[list[str]], tmp_path: Path, cwd: Path) -> list[dict[str, Any]]:
    cases, found = tmp_path / "cases.json", tmp_path / "found.json"
    cases.write_text(json.dumps(lines))
    script = Path(__file__).parent / "watched.py"
    environment = {
        **os.environ, "M2C_HOME": str(tmp_path / "home"), "RUST_BACKTRACE": "0",
        "PYTHONPATH": str(PACKAGE),  # the cases run elsewhere
    }  # fmt: skip
    command = [sys.executable, "-B", str(script), str(cases), str(found)]
    done = subprocess.run(command, cwd=cwd, env=environment, timeout=500, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(found.read_text())


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
    def make(folder: Path, outside: Path) -> None:
        for name in ("config.json", "tokenizer_config.json"):
            facts = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**facts, key: value}))

    return make


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
def test_sources_are_read_inside_their_folder(model: Path, outside: Path, tmp_path: Path) -> None:
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


# -- code ------------------------------------------------------------------------------------------


class Canary:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include '/etc/hostname' %}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
    "{{ (messages|attr('__class__')).__base__ }}",
    "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "{{ messages.append(1) }}", "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['sys'].modules['os'].system('touch MARKER') }}",
    "{{ namespace.__init__.__globals__ }}", "{{ joiner.__init__.__globals__.os }}",
)  # fmt: skip


def plant(folder: Path, marker: Path) -> None:
    """Everything that some program runs when it meets it in a model's folder."""
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in (
        "modeling_x", "configuration_x", "tokenization_x", "tokenizer", "sitecustomize", "conftest",
        "setup", "__init__", "numpy", "torch", "jinja2", "tokenizers", "json", "gguf",
    ):  # fmt: skip
        (folder / f"{name}.py").write_text(code)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.ckpt", "x.pkl"):
        (folder / name).write_bytes(pickle.dumps(Canary(marker)))
    (folder / "evil.pth").write_text(f"import os; {code}")
    source = folder / "evil.c"
    source.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void f(void)"
        f'{{ fclose(fopen("{marker}", "w")); }}\n'
    )
    library = folder / "libm2c.so"
    if shutil.which("gcc"):
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        for name in ("tokenizers.so", "numpy.so", "libc.so.6", "_ctypes.so"):
            shutil.copy(library, folder / name)
    auto = {name: f"modeling_x.{name}" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}
    told("auto_map", auto)(folder, folder)
    told("trust_remote_code", True)(folder, folder)
    told("custom_pipelines", {"x": {"impl": "modeling_x.X"}})(folder, folder)
    told("tokenizer_class", "modeling_x.X")(folder, folder)


@pytest.mark.slow
def test_no_code_of_a_model_is_run(model: Path, tmp_path: Path) -> None:
    folder, marker, ssd = tmp_path / "evil", tmp_path / "marker", tmp_path / "ssd"
    shutil.copytree(model, folder)
    plant(folder, marker)
    ssd.mkdir()
    bundle = str(ssd / "evil.m2c")
    run = ["run", bundle, "-n", "1", "-c", "64", "-q", "-p"]
    lines = [
        ["profile", str(folder), "-q", "--tokens", "16"],
        ["pack", str(folder), "--ssd", str(ssd), "-q", "--mix", "0/25/75"],
        ["check", bundle, "-q", "--source", str(folder)], ["show", bundle], [*run, "a"],
    ]  # fmt: skip
    for words, one in zip(lines, watch(lines, tmp_path, folder), strict=True):
        assert one["code"] == 0, f"{words}: {one['err']}"
        for kind, what in one["notes"]:
            assert kind not in ("pickle.find_class", "network"), f"{words}: {kind} {what}"
            if kind in ("exec", "compile", "import", "ctypes.dlopen"):
                assert str(folder) not in what, f"{words}: {kind} {what}"
            if kind == "program":
                assert json.loads(what)[:3] == [sys.executable, "-I", "-B"], f"{words}: {what}"
            if kind == "ctypes.dlopen" and "/" in what:
                assert what.startswith(SYSTEM), f"{words}: {what}"
    assert not marker.exists()


@pytest.mark.parametrize("text", ESCAPES)
def test_templates_stay_in_their_sandbox(text: str, tmp_path: Path) -> None:
    from m2c.chat import render
    from m2c.errors import BadInput

    marker = tmp_path / "marker"
    text = text.replace("MARKER", str(marker))
    try:
        said = render(text, [{"role": "user", "content": "x"}])
    except BadInput as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert not any(word in said for word in ("<class", "<module", "'os'", "root:"))
    assert not marker.exists()
    assert os.listdir(tmp_path) == []
