"""What a shell offers when Tab is pressed: asked as bash asks."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from command_line import COMMAND, m2c

from m2c.home import record
from m2c.model.aliases import ALIASES

QWEN = sorted(name for name in ALIASES if name.startswith("qwen2.5-"))


def offered(line: str, **environment: str) -> list[str]:
    """Candidates for the last word of `line`, which may be empty."""
    env = {
        "_M2C_COMPLETE": "complete_bash", "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1), **environment,
    }  # fmt: skip
    with patch.dict(os.environ, env):
        said = m2c()
    assert (said.code, said.err) == (0, "")
    return said.out.split()


@pytest.fixture
def ssd(tmp_path: Path) -> Path:
    for name in ("one.m2c", "other.m2c", "no-bundle"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_commands_and_options() -> None:
    assert offered("m2c pl") == ["plan"]
    assert "--ctx-size" in offered("m2c plan --c")


@pytest.mark.parametrize("command", ["plan", "profile", "pack"])
def test_models_by_alias(command: str) -> None:
    assert offered(f"m2c {command} qwen2.5-") == QWEN


@pytest.mark.parametrize("command", ["run", "plan", "bench", "eval", "show", "check"])
def test_bundles_by_name(command: str, ssd: Path) -> None:
    if command != "check":
        named = offered(f"m2c {command} --ssd {ssd} o")
        assert [name for name in named if name not in ALIASES] == ["one", "other"]
    assert offered(f"m2c {command} ot", M2C_SSD=str(ssd)) == ["other"]


def test_the_ones_used_last() -> None:
    record(model="my/model", bundle=Path("/mnt/ssd/mine.m2c"))
    assert offered("m2c run ") == ["/mnt/ssd/mine.m2c"]
    assert offered("m2c profile my") == ["my/model"]


def test_what_cannot_be_read_is_no_candidate(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert offered("m2c run o", M2C_SSD=nowhere, M2C_HOME=nowhere) == []
    assert offered("m2c plan smollm2-1.7", M2C_HOME="/proc/1/root/x") == ["smollm2-1.7b"]


def test_bash_itself_completes(ssd: Path, tmp_path: Path) -> None:
    script = f"""
        PATH={tmp_path}/bin:$PATH
        eval "$(m2c --show-completion bash)"
        COMP_WORDS=(m2c run --ssd {ssd} on) COMP_CWORD=4
        _m2c_completion m2c
        echo "${{COMPREPLY[@]}}"
    """
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "m2c"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m m2c.cli.app "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("one\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_it_is_installed_in_the_home_folder(shell: str, tmp_path: Path) -> None:
    # the shell that is asked for, not the one that tests were started from
    env = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [*COMMAND, "--install-completion", shell]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("_M2C_COMPLETE" in path.read_text() for path in files)


def test_completion_does_not_wait_for_torch(ssd: Path) -> None:
    code = (
        "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules));"
        "from m2c.cli.app import call; sys.exit(call([]))"
    )
    env = {
        **os.environ, "_M2C_COMPLETE": "complete_bash", "COMP_WORDS": "m2c plan ot",
        "COMP_CWORD": "2", "M2C_SSD": str(ssd),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["other", "False"]
