"""No code of a model is run, whatever lies in its folder and whatever its files ask for (R14)."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile_files as files
import pytest
from watched import SYSTEM, watch

from m2c.chat import render
from m2c.errors import BadInput


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
    files.tell(folder, "auto_map", auto)
    files.tell(folder, "trust_remote_code", True)
    files.tell(folder, "custom_pipelines", {"x": {"impl": "modeling_x.X"}})
    files.tell(folder, "tokenizer_class", "modeling_x.X")


@pytest.mark.slow
def test_no_code_of_a_model_is_run(tmp_path: Path) -> None:
    folder, marker, ssd = tmp_path / "evil", tmp_path / "marker", tmp_path / "ssd"
    files.folder_with_tokenizer(folder)
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
