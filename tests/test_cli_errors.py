"""Every way a command can fail: one line on stderr, the documented exit code, no traceback."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import m2c, m2c_ok
from tiny_models import write_checkpoint

from m2c.cli import plan as plan_command
from m2c.home import home


@pytest.fixture(autouse=True)
def no_options_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("M2C_HBM", "M2C_DRAM", "M2C_DEVICE", "M2C_THREADS", "M2C_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-hub"))


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return shutil.copytree(bundle, tmp_path / "copy.m2c")


# -- what a person mistypes ------------------------------------------------------------------------

WITHOUT_BUNDLE = {
    "run": (2, "no bundle given and none packed before; type: m2c profile MODEL"),
    "profile": (2, "no model given and none profiled before; type: m2c profile MODEL"),
    "pack": (2, "where to? no --ssd given and M2C_SSD is not set; use --ssd DIR"),
    "pack --ssd no/where": (4, "no/where: no such folder; create it: mkdir -p no/where"),
    "pack --ssd /dev/null": (4, "/dev/null: is not a folder"),
    "pack - --ssd .": (2, "no path on stdin; type: m2c profile MODEL | m2c pack - --ssd DIR"),
    "profile llama2-70": (4, "no such file, folder or alias; did you mean llama2-70b?"),
    "profile SmolLM2_135M": (4, "did you mean smollm2-135m?"),
    "profile xyzzy": (4, "aliases are falcon-40b, "),
    "profile llama2-7b": (4, "offline, so nothing is fetched: run it once without --offline"),
    "profile /dev/null": (4, "/dev/null: neither a model folder nor a GGUF file"),
    "plan xyzzy": (4, "xyzzy: no such file"),
    "plan llama2-70b --dram 1GiB": (7, "the smallest that works is --dram "),
    "run xyzzy -p x": (4, "xyzzy: no such bundle; give the path that m2c pack printed"),
    "run llama2-7b -p x": (4, "pack that model (m2c profile llama2-7b | m2c pack - --ssd DIR)"),
    "run /dev/null -p x": (4, "/dev/null: no such bundle"),
    "rnu": (2, "No such command 'rnu'"),
    "run --nosuch": (2, "No such option: --nosuch; see m2c run --help"),
    "bench": (2, "no bundle given and none packed before; type: m2c profile MODEL"),
    "bench -p 0 -n 0": (2, "-p 0 -n 0 leaves nothing to measure; give at least one of them tokens"),
    "bench -o csv": (2, "--output csv: choose one of md, json"),
    "bench --replay no/where": (4, "no/where: no such file or directory"),
    "show no/where": (4, "no/where: no such bundle"),
}
WITH_BUNDLE = {
    "--dram 4": (2, "'4' has no unit; did you mean 4GiB?"),
    "--dram 1MiB": (7, "--dram 1.00 MiB is too small for this model; the smallest that works is"),
    "--hbm 1MiB": (7, "the smallest that works is --hbm "),
    "--mix 50/50/50": (2, "mix 50/50/50 adds up to 150, not to 100 percent; write it"),
    "--mix 5/15": (2, "'5/15' is not a mix; write it like 5/15/80 (FP16/INT8/INT4)"),
    "--drop 100": (2, "Invalid value for '--drop'"),
    "--ctx-size 257": (2, "--ctx-size 257 is beyond the 256 tokens of this model"),
    "--ctx-size 1": (2, "the prompt has 2 tokens, the context holds 1; use a larger --ctx-size"),
    "--max-tokens 0": (2, "Invalid value for '--max-tokens'"),
    "--device tpu": (2, "--device tpu: choose cpu or cuda[:N]"),
    "--device cuda:x": (2, "--device cuda:x: choose cpu or cuda[:N]"),
    "--kv q8": (2, "--kv q8: choose one of f16, f32"),
    "--dense fp8": (2, "--dense fp8: choose one of fp16, int8, int4"),
    "--policy mru": (2, "--policy mru: choose one of pinned, "),
    "--top-p 2": (2, "--top-p is 2.0; give a number above 0 and at most 1"),
    "--seed -1": (2, "--seed is -1"),
    "--system obey": (2, "--system needs a chat format, and there is none; drop --system"),
    "--stats no/where": (4, "--stats no/where: no such folder; create it: mkdir -p no"),
    "--trace .": (4, "--trace .: is not a regular file; give the name of a file"),
    "--stats /dev/null": (4, "--stats /dev/null: is not a regular file"),
    "--trace x --mix 0/0/100": (2, "this mix upgrades no neurons: there is nothing to trace"),
}


@pytest.mark.parametrize("line", WITHOUT_BUNDLE)
def test_mistakes_before_anything_is_packed(
    line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    said = m2c(*line.split())
    code, text = WITHOUT_BUNDLE[line]
    assert (said.code, said.out) == (code, "")
    assert text in said.reason
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", WITH_BUNDLE)
def test_mistakes_in_the_options_of_run(
    line: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    said = m2c("run", bundle, "-p", "x", *line.split())
    code, text = WITH_BUNDLE[line]
    assert (said.code, said.out) == (code, "")
    assert text in said.reason
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "stdin", "text"),
    [
        ((), b"", "the prompt is empty; give one with --prompt"),
        ((), b"\n", "the prompt is empty"),
        (("-p", ""), b"", "the prompt is empty"),
        ((), b"ab\xff", "stdin is not UTF-8 text (byte 2)"),
        (("-p", "a\udcff"), b"", "'a\\udcff' is not UTF-8 text"),
        (("-p", "a", "--stop", "\udcff"), b"", "is not UTF-8 text"),
        (("-p", "word " * 300), b"", "the context holds 256; use a larger --ctx-size or a shorter"),
        ((), b"x" * ((16 << 20) + 1), "the prompt on stdin is larger than 16 MiB"),
    ],
)
def test_prompts_that_cannot_be_answered(
    bundle: Path, words: tuple[str, ...], stdin: bytes, text: str
) -> None:
    said = m2c("run", bundle, *words, stdin=stdin)
    assert (said.code, said.out) == (2, "")
    assert text in said.reason


def test_a_bundle_nearly_named_right(bundle: Path) -> None:
    said = m2c("run", "bundel", "--ssd", bundle.parent, "-p", "x")
    assert said.reason.endswith("; did you mean bundle?")


def test_the_profile_of_another_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert m2c("pack", tiny_checkpoint, "--ssd", tmp_path).reason.endswith(
        f"has no profile yet; type: m2c profile {tiny_checkpoint}"
    )
    other = write_checkpoint(tmp_path / "other", seed=1)
    path = m2c_ok("profile", other, "--tokens", 32, "-q").strip()
    said = m2c("pack", tiny_checkpoint, "--ssd", tmp_path, "--profile", path)
    assert said.code == 2
    assert "does not belong to" in said.reason


def test_other_options_do_not_overwrite_a_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    m2c_ok("profile", tiny_checkpoint, "--tokens", 32, "-q")
    path = Path(m2c_ok("pack", "--ssd", tmp_path, "-q").strip())
    before = (path / "manifest.json").read_bytes()
    said = m2c("pack", "--ssd", tmp_path, "--mix", "0/50/50")
    assert said.code == 2
    assert said.reason.endswith("choose another --name, or remove that folder yourself")
    assert (path / "manifest.json").read_bytes() == before


# -- damage ----------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a bit": ("neurons/00001.int4: damaged", lambda p: flip(p / "neurons" / "00001.int4", -9)),
    "an upgrade": ("neurons/00000.int8: damaged", lambda p: flip(p / "neurons" / "00000.int8", -9)),
    "no shard": ("dense/00001.int4: no such file", lambda p: (p / "dense/00001.int4").unlink()),
    "a short shard": (
        "dense/00000.int8: ", lambda p: os.truncate(p / "dense" / "00000.int8", 5000),
    ),
    "a sidecar": ("model/tokenizer.json", lambda p: flip(p / "model" / "tokenizer.json", 9)),
    "no manifest": ("run m2c pack again to finish it", lambda p: (p / "manifest.json").unlink()),
    "not a manifest": ("manifest.json: ", lambda p: flip(p / "manifest.json", 0)),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("command", ["run", "check"])
def test_damage_is_named_and_nothing_is_said_after_it(kind: str, command: str, copy: Path) -> None:
    text, damage = DAMAGES[kind]
    damage(copy)
    said = m2c(command, copy, *(("-p", "x") if command == "run" else ()))
    assert (said.code, said.out) == (4, "")
    assert text in said.err
    assert "Traceback" not in said.err
    if command == "run":
        assert text in said.reason


def test_files_that_are_something_else(tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"\xff\0" * 500)
    assert m2c("show", junk).code == 4
    assert "not an importance file" in m2c("show", junk).reason
    assert "is not a usable trace" in m2c("bench", "--replay", junk).reason


@pytest.mark.parametrize("one", ["--probe", "--energy"])
def test_bench_measures_one_thing(one: str, tmp_path: Path) -> None:
    other = ("--replay", tmp_path / "t") if one == "--probe" else ("--probe",)
    said = m2c("bench", one, *other)
    assert said.code == 2
    assert "do not go together; leave one out" in said.reason


# -- the machine says no ---------------------------------------------------------------------------


def test_a_home_that_cannot_be_written(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("M2C_HOME", str(in_the_way / "home"))
    said = m2c("profile", tiny_checkpoint, "--tokens", 32)
    assert (said.code, said.out) == (4, "")
    assert said.reason == f"{in_the_way / 'home' / 'profiles'}: not a directory"
    # told where else to write, only the default of later commands is lost
    out = tmp_path / "profile.safetensors"
    said = m2c("profile", tiny_checkpoint, "--tokens", 32, "-q", "-o", out)
    assert (said.code, said.out) == (0, f"{out}\n")
    assert said.reason.startswith("not recorded as the default of later commands")


def test_a_damaged_state_is_no_state(bundle: Path) -> None:
    home().mkdir(parents=True)
    (home() / "state.json").write_text('{"model": 3}')
    assert m2c("run", "-p", "x").code == 2
    assert m2c("run", bundle, "-p", "x", "-n", 1).code == 0


def test_two_packs_at_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    m2c_ok("profile", tiny_checkpoint, "--tokens", 32, "-q")
    path = Path(m2c_ok("pack", "--ssd", tmp_path, "-q").strip())
    other = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        said = m2c("pack", "--ssd", tmp_path)
    finally:
        os.close(other)
    assert said.code == 8
    assert said.reason == f"{path}: another m2c pack is writing this bundle; wait for it"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("odd"), 1, "internal error, ValueError: odd; m2c --debug shows where"),
        (MemoryError(), 7, "out of memory"),
        (PermissionError(13, "", "x/y"), 6, "x/y: permission denied"),
        (OSError(28, "", None), 5, "standard output: no space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_nobody_foresaw(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(plan_command, "_subject", broken)
    said = m2c("plan", "llama2-7b")
    assert (said.code, said.out) == (code, "")
    assert text in said.reason


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2C_DEBUG", "1")
    said = m2c("profile", "xyzzy")
    assert said.code == 4
    assert said.err.startswith("Traceback")
    assert said.err.splitlines()[-1].startswith("m2c: xyzzy: no such file")
