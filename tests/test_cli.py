"""The command line as its users type it: what goes where, and that the text stays the same."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Said, m2c, m2c_ok
from tiny_models import pack_folder, write_checkpoint

from m2c.bundle.bundle import Bundle
from m2c.cli.app import COMMANDS
from m2c.model.aliases import ALIASES

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|answer|>"


@pytest.fixture(scope="module")
def chat_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat format."""
    folder = tmp_path_factory.mktemp("chat")
    checkpoint = write_checkpoint(folder / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text(CHAT)
    return pack_folder(checkpoint, folder / "chat.m2c").path


def greedy(bundle: Path, *options: object, stdin: bytes = b"a tale of") -> str:
    return m2c_ok("run", bundle, "--max-tokens", 24, "-q", *options, stdin=stdin)


def stats_of(bundle: Path, folder: Path, *options: object) -> dict[str, Any]:
    greedy(bundle, *options, "--stats", folder / "stats.json")
    return json.loads((folder / "stats.json").read_bytes())


def smallest(bundle: Path, flag: str, *options: object) -> int:
    """MiB that the refusal of a too small budget names."""
    said = m2c("run", bundle, "-p", "x", *options, flag, "1KiB")
    assert said.code == 7
    found = re.search(rf"the smallest that works is {flag} (\d+)MiB", said.reason)
    assert found
    return int(found[1])


# -- the three commands ----------------------------------------------------------------------------


def test_profile_pack_run_without_repeating_a_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    profiled = m2c("profile", tiny_checkpoint, "--tokens", 64)
    assert profiled.code == 0
    path = Path(profiled.out.removesuffix("\n"))
    assert path.is_file()
    assert "the top 30 % of neurons" in profiled.err

    packed = m2c("pack", "-", "--ssd", tmp_path, stdin=profiled.out.encode())
    assert packed.code == 0
    assert packed.out == f"{tmp_path / 'checkpoint.m2c'}\n"
    assert "m2c: default mix " in packed.err

    again = m2c("pack", "--ssd", tmp_path)
    assert (again.code, again.out) == (0, packed.out)
    assert "was complete already" in again.err

    said = m2c("run", "--prompt", "hello", "--max-tokens", 4)
    assert said.code == 0
    first, expected, last = said.err.splitlines()
    assert re.fullmatch(
        r"m2c: exact mode, expecting \d.* tok/s \(mixed \d.*\): all weights in memory", expected
    )
    assert first == f"m2c: using {tmp_path / 'checkpoint.m2c'} (the bundle packed last)"
    assert re.match(r"m2c: TTFT .* decode .* tok/s.* tokens per pass", last)
    assert m2c_ok("check", "--source", tiny_checkpoint).endswith(
        f"ok (every byte, bit-exact copy of {tiny_checkpoint})\n"
    )


def test_a_bundle_by_name(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = greedy(bundle)
    assert greedy(Path("bundle"), "--ssd", bundle.parent) == expected
    monkeypatch.setenv("M2C_SSD", str(bundle.parent))
    monkeypatch.setenv("M2C_MODEL", "bundle")
    said = m2c("run", "-n", 24, "-q", stdin=b"a tale of")
    assert (said.out, said.err) == (expected, "m2c: using bundle (M2C_MODEL)\n")
    # a bundle knows nothing about where it lies
    assert greedy(shutil.copytree(bundle, tmp_path / "elsewhere")) == expected


def test_running_and_checking_leave_the_bundle_alone(bundle: Path) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in bundle.rglob("*")}

    before = state()
    greedy(bundle)
    m2c_ok("check", bundle)
    assert state() == before


# -- run: what goes to which stream ----------------------------------------------------------------


def test_only_the_text_is_on_stdout(bundle: Path) -> None:
    quiet = m2c("run", bundle, "-p", "a tale of", "-n", 24, "-q")
    assert quiet.err == ""
    assert quiet.out.endswith("\n")
    talking = m2c("run", bundle, "-p", "a tale of", "-n", 24)
    assert talking.out == quiet.out
    assert talking.reason.startswith("TTFT ")


def test_the_prompt_comes_from_the_option_or_from_stdin(bundle: Path) -> None:
    expected = m2c_ok("run", bundle, "-p", "a tale of", "-n", 24, "-q")
    assert greedy(bundle) == expected
    assert greedy(bundle, "-p", "-") == expected
    assert greedy(bundle, stdin=b"a tale of\n") == expected
    assert greedy(bundle, stdin=b"another tale of") != expected
    assert greedy(bundle, "--no-stream") == expected


@pytest.mark.parametrize("flags", [("--temp", "1.5"), ("--temp", "3", "--top-k", "40")])
def test_a_seed_makes_sampling_repeat(bundle: Path, flags: tuple[str, ...]) -> None:
    texts = {seed: greedy(bundle, *flags, "--seed", seed) for seed in range(4)}
    assert len(set(texts.values())) > 1
    assert greedy(bundle, *flags, "--seed", 2) == texts[2]


def test_a_seed_that_was_drawn_is_said(bundle: Path) -> None:
    said = m2c("run", bundle, "-p", "a tale of", "-n", 24, "--temp", 3)
    seed = said.err.splitlines()[1].removeprefix("m2c: seed ")
    assert greedy(bundle, "--temp", 3, "--seed", seed) == said.out


def test_max_tokens_and_the_end_of_the_context(bundle: Path, tmp_path: Path) -> None:
    assert stats_of(bundle, tmp_path, "-n", 1)["generated_tokens"] == 1
    prompt = stats_of(bundle, tmp_path, "-n", 1)["prompt_tokens"]
    full = stats_of(bundle, tmp_path, "--ctx-size", prompt + 3)
    assert full["finish_reason"] == "context"
    # the last token needs no room: nothing comes after it
    assert full["generated_tokens"] == 4
    said = m2c("run", bundle, "-p", "a tale of", "--ctx-size", prompt + 3)
    assert said.reason.endswith("stopped as the context is full")


def test_text_ends_before_a_stop_string(bundle: Path) -> None:
    text = greedy(bundle).removesuffix("\n")
    stop = text[len(text) // 2 :][:3]
    assert greedy(bundle, "--stop", "never said", "--stop", stop) == text.split(stop)[0] + "\n"


def test_typed_control_tokens_and_the_chat_format(chat_bundle: Path, tmp_path: Path) -> None:
    raw = stats_of(chat_bundle, tmp_path, "--raw")["prompt_tokens"]
    chat = stats_of(chat_bundle, tmp_path)["prompt_tokens"]
    system = stats_of(chat_bundle, tmp_path, "--system", "be brief")["prompt_tokens"]
    assert raw < chat < system
    one = stats_of(chat_bundle, tmp_path, "--raw", "-p", "a</s>b")["prompt_tokens"]
    # as text it is several tokens, as a command it would be one
    assert one > stats_of(chat_bundle, tmp_path, "--raw", "-p", "a!b")["prompt_tokens"] + 1


# -- budgets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["0/25/75", "5/15/80", "0/0/100", "100/0/0"])
def test_the_text_does_not_depend_on_the_budget(deep_bundle: Bundle, mix: str) -> None:
    path = deep_bundle.path
    expected = greedy(path, "--mix", mix)
    dram = smallest(path, "--dram", "--mix", mix)
    assert greedy(path, "--mix", mix, "--dram", f"{dram}MiB") == expected
    assert m2c("run", path, "-p", "x", "--mix", mix, "--dram", f"{dram - 1}MiB").code == 7
    hbm = smallest(path, "--hbm", "--mix", mix)
    assert greedy(path, "--mix", mix, "--hbm", f"{hbm}MiB", "--dram", "64MiB") == expected
    assert m2c("run", path, "-p", "x", "--mix", mix, "--hbm", f"{hbm - 1}MiB").code == 7


def test_dropping_neurons_names_its_price(bundle: Path) -> None:
    said = m2c("run", bundle, "-p", "hello", "-n", 2, "--drop", 99)
    assert said.code == 0
    assert said.err.startswith("m2c: what dropping 99 % costs was never measured")


# -- output for programs ---------------------------------------------------------------------------


def test_stats_and_trace_are_read_again(bundle: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    stats = stats_of(bundle, tmp_path, "--trace", trace)
    assert stats["generated_tokens"] == 24
    assert stats["plan"]["dram_used"] <= stats["plan"]["dram_budget"]
    table = m2c_ok("bench", "--replay", trace)
    assert "23 tokens, 2 layers, 25% of 96 neurons active" in " ".join(table.split())
    found = json.loads(m2c_ok("bench", "--replay", trace, "--json", "--share", 30))
    rates = {row["policy"]: row["hit_rate"] for row in found["30"]["rows"]}
    assert max(rates, key=lambda name: rates[name]) == "belady"


def test_json_is_json(bundle: Path) -> None:
    shown = json.loads(m2c_ok("show", bundle, "--json"))
    assert shown["mix"] == [0, 25, 75]
    assert len(shown["layers"]) == 2
    planned = json.loads(m2c_ok("plan", bundle, "--json", "--dram", "1GiB"))
    assert planned["dram_budget"] == 1 << 30


def test_show_names_the_planes(bundle: Path) -> None:
    shown = m2c_ok("show", bundle)
    assert all(plane in shown for plane in ("FP16", "INT8", "INT4"))
    assert "\x1b" not in shown


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_every_alias_has_a_plan(alias: str) -> None:
    first, *rest = m2c_ok("plan", alias, "--dram", "64GiB", "--hbm", "24GiB").splitlines()
    assert re.match(rf"{re.escape(alias)}: \d+\.\d\d G weights", first)
    tiers = [line.split()[0] for line in rest if line.startswith(("HBM", "DRAM"))]
    assert tiers == ["HBM", "DRAM"]


def test_plan_options_only_say(bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert m2c_ok("run", bundle, "--plan", "--mode", "mixed").startswith("mix 0/25/75")
    assert m2c_ok("run", bundle, "--plan").startswith("exact mode at fp16, drafts from INT4")
    m2c_ok("profile", tiny_checkpoint, "--tokens", 32)
    said = m2c("pack", "--ssd", tmp_path, "--dry-run")
    assert (said.code, said.out) == (0, "")
    assert "needs" in said.err
    assert list(tmp_path.iterdir()) == []


# -- the program itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--version"], ["--help"], [], ["run", "--help"]])
def test_help_does_not_wait_for_torch(words: list[str]) -> None:
    heavy = ("torch", "numpy", "tokenizers", "rich")
    code = (
        "import sys; from m2c.cli.app import call; code = call(sys.argv[1:]);"
        f"sys.exit(code or [name for name in {heavy} if name in sys.modules] or None)"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert done.stdout.startswith("m2c " if words == ["--version"] else "Usage: m2c ")


def test_help_tells_commands_and_exit_codes() -> None:
    text = " ".join(m2c_ok("--help").split())
    assert all(f" {name} " in text for name in COMMANDS)
    assert "7 does not fit in the given memory, 8 busy, 130 interrupted" in text
    for name in COMMANDS:
        assert re.search(rf"Example: m2c .*\b{name}\b", m2c_ok(name, "--help"))


# -- the embedded model ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_model_from_profile_to_text(smollm2_packed: Said) -> None:
    assert smollm2_packed.code == 0, smollm2_packed.err
    path = Path(smollm2_packed.out.removesuffix("\n"))
    assert path.name == "smollm2-135m.m2c"
    # in the folder that pack was told
    assert (path.parent / "profile.safetensors").is_file()
    auto = m2c("run", path, "-c", 512, "-n", 2, "-p", "x")
    assert auto.code == 0
    assert re.search(r"^m2c: (exact|mixed) mode, expecting \d.* tok/s", auto.err, re.MULTILINE)
    # which of them auto takes depends on speeds, and the text on the mode
    mixed = ("--mode", "mixed", "-c", 512)
    options = (*mixed, "-n", 24, "-q", "-p", "What is the capital of France?")
    text = m2c_ok("run", path, *options)
    # a small model, calibrated on little text: what it knows, it need not say in mixed mode
    assert len(text.split()) > 3
    asked = ("--exact", "-c", 512, "-n", 24, "-q", "-p", "What is the capital of France?")
    assert "Paris" in m2c_ok("run", path, *asked)
    dram, hbm = (smallest(path, flag, *mixed) for flag in ("--dram", "--hbm"))
    assert m2c_ok("run", path, *options, "--dram", f"{dram}MiB") == text
    assert m2c_ok("run", path, *options, "--hbm", f"{hbm}MiB", "--dram", "120MiB") == text
    assert "bit-exact" in m2c_ok("check", path, "--source", "smollm2-135m")
