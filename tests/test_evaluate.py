"""m2c eval: windows, the arithmetic of its figures, and that the reference really is one."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import m2c, m2c_ok
from running import MIXES, GiB, options_for, plan_of
from tiny_models import TEXT

from m2c import evaluate
from m2c.bundle.bundle import Bundle
from m2c.contents import config_of
from m2c.engine import Engine, RunOptions
from m2c.errors import NoSpace, UsageError
from m2c.evaluate import FULL, Reference, compare, cut, options_within, perplexity

WINDOW = 16
RANDOM = np.random.default_rng(3)
IDS = RANDOM.integers(0, 300, 5 * WINDOW + 7).tolist()
WORDS = "It was a fine day and they walked to the shore; nobody spoke of the letter. " * 8


def at(bundle: Bundle, mix: str, **changes: object) -> Engine:
    return Engine(bundle, options_for(MIXES[mix], ctx_size=WINDOW, **changes))


def reference_of(bundle: Bundle, folder: Path) -> Reference:
    with at(bundle, "100/0/0") as engine:
        return Reference(engine, cut(IDS, WINDOW), folder=folder)


def plainly(engine: Engine) -> torch.Tensor:
    """Log-probabilities [windows, WINDOW, vocab], token by token."""
    found = []
    for ids in cut(IDS, WINDOW):
        engine.model.kv.truncate(0)
        logits = [engine.model.forward(ids[i : i + 1]) for i in range(WINDOW)]
        found.append(torch.stack(logits).double().log_softmax(-1))
    return torch.stack(found)


# -- windows ---------------------------------------------------------------------------------------


def test_windows_are_whole_and_may_begin_with_the_bos() -> None:
    windows = cut(IDS, WINDOW)
    assert windows.shape == (5, WINDOW)
    assert windows.reshape(-1).tolist() == IDS[: 5 * WINDOW]
    marked = cut(IDS, WINDOW, bos=299)
    assert set(marked[:, 0]) == {299}
    assert np.array_equal(marked[:, 1:], windows[:, 1:])


@pytest.mark.parametrize(("tokens", "window"), [(31, 16), (0, 16), (100, 3)])
def test_what_gives_no_standard_error_is_refused(tokens: int, window: int) -> None:
    with pytest.raises(UsageError):
        cut(list(range(tokens)), window)


def test_the_error_is_of_windows_and_not_of_tokens() -> None:
    losses = np.array([[1.0, 1, 1, 1], [3, 3, 3, 3]])
    found = evaluate.estimate(losses)
    assert (found.value, found.standard_error) == (2.0, pytest.approx(1.0))
    assert evaluate.estimate(losses.T).standard_error == 0


# -- figures ---------------------------------------------------------------------------------------


def test_perplexity_is_of_the_second_half_of_each_window(tiny_bundle: Bundle) -> None:
    with at(tiny_bundle, "0/100/0") as engine:
        log_p, found = plainly(engine), perplexity(engine, IDS, window=WINDOW)
    half = WINDOW // 2
    losses = [
        -float(log_p[w, i, ids[i + 1]])
        for w, ids in enumerate(cut(IDS, WINDOW))
        for i in range(half, WINDOW - 1)
    ]
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_figures_are_those_of_a_plain_computation(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with at(tiny_bundle, "100/0/0") as engine:
        log_p = plainly(engine)[:, WINDOW // 2 : -1]
    with reference_of(tiny_bundle, tmp_path) as reference, at(tiny_bundle, "0/0/100") as engine:
        log_q = plainly(engine)[:, WINDOW // 2 : -1]
        found = compare(engine, reference)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
    targets = torch.from_numpy(cut(IDS, WINDOW)[:, WINDOW // 2 + 1 :].astype(np.int64))
    losses = [-kind.gather(2, targets[..., None])[..., 0].numpy() for kind in (log_p, log_q)]
    ratios = losses[1].mean(1) - losses[0].mean(1)
    assert divergence.mean() > 1e-4
    assert found.divergence.value == pytest.approx(divergence.mean(), rel=1e-3)
    error = divergence.mean(1).std(ddof=1) / math.sqrt(5)
    assert found.divergence.standard_error == pytest.approx(error, rel=1e-2)
    assert found.divergence_p99 == pytest.approx(np.quantile(divergence, 0.99), rel=1e-2)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert found.agreement.value == pytest.approx(float(agreement))
    assert found.log_ratio.value == pytest.approx(ratios.mean(), abs=1e-5)
    assert found.log_ratio.standard_error == pytest.approx(ratios.std(ddof=1) / 5**0.5, rel=1e-2)


def test_the_reference_is_no_distance_from_itself(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with reference_of(tiny_bundle, tmp_path) as reference, at(tiny_bundle, "100/0/0") as engine:
        found = compare(engine, reference)
        assert found.perplexity == reference.predictions.perplexity
    assert 0 <= found.divergence.value < 1e-6
    assert (found.agreement.value, found.log_ratio.value) == (1.0, 0.0)


def test_passes_of_few_rows_give_the_same_figures(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bounds the memory of logits must not change a figure."""
    with reference_of(tiny_bundle, tmp_path) as reference, at(tiny_bundle, "0/0/100") as engine:
        whole = compare(engine, reference)
        monkeypatch.setattr(evaluate, "_rows", lambda config, window: 3)
        pieces = compare(engine, reference)
    with at(tiny_bundle, "100/0/0") as engine:
        again = Reference(engine, cut(IDS, WINDOW), folder=tmp_path)
    with again, reference:
        assert np.array_equal(again.predictions.losses, reference.predictions.losses)
    assert pieces.divergence.value == pytest.approx(whole.divergence.value, rel=1e-6)
    assert pieces.perplexity.value == pytest.approx(whole.perplexity.value, rel=1e-9)
    assert pieces.agreement == whole.agreement


def test_better_precision_is_nearer(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with reference_of(tiny_bundle, tmp_path) as reference:
        found = {}
        for mix in ("0/100/0", "0/25/75", "0/0/100"):
            with at(tiny_bundle, mix) as engine:
                found[mix] = compare(engine, reference).divergence.value
    assert found["0/100/0"] < found["0/25/75"] < found["0/0/100"]


# -- resources -------------------------------------------------------------------------------------


def test_the_temporary_file_has_the_stated_size_and_no_name(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    with reference_of(tiny_bundle, tmp_path) as reference:
        stated = Reference.nbytes_for(config_of(tiny_bundle), reference.windows)
        assert stated == 2 * 300 * 5 * (WINDOW // 2 - 1)
        assert reference._file.seek(0, 2) == stated
        assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Reference, "_keep", full)
    with pytest.raises(NoSpace):
        reference_of(tiny_bundle, tmp_path)


def test_logits_come_out_of_the_budget(tiny_bundle: Bundle) -> None:
    config = config_of(tiny_bundle)
    asked = RunOptions(dram=GiB)
    within = options_within(asked, config, WINDOW)
    assert within.ctx_size == WINDOW
    alone = plan_of(tiny_bundle, replace(asked, ctx_size=WINDOW))
    room = plan_of(tiny_bundle, within).used_dram - alone.used_dram
    assert room >= 4 * config.vocab_size * (WINDOW // 2 - 1)  # a pass's logits, more than once


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS, encoding="utf-8")
    return path


def test_the_table_begins_with_the_reference(tiny_bundle: Bundle, text: Path) -> None:
    words = ("eval", tiny_bundle.path, "--text", text, "-w", 16, "-t", 1, "--drop", 30)
    said = m2c(*words, "--mix", "0/25/75", "--mix", "0/0/100", "--dense", "int8")
    assert said.code == 0, said.err
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in said.out.splitlines()]
    assert rows[0] == ["mix", "attention", "bits", "PPL", "ln PPL", "KL", "KL 99 %", "top-1"]
    names = [(row[0], row[1]) for row in rows[2:]]
    assert names == [("100/0/0", "fp16"), ("0/25/75 drop 30", "int8"), ("0/0/100 drop 30", "int8")]
    assert rows[2][4:] == ["-"] * 4
    assert "3 passes; a temporary file of" in said.reason


def test_json_has_every_figure(tiny_bundle: Bundle, text: Path) -> None:
    words = ("eval", tiny_bundle.path, "--text", text, "-w", 16, "-n", 64, "-t", 1)
    full, default = json.loads(m2c_ok(*words, "--json"))
    assert (full["mix"], full["reference"]) == (str(FULL), True)
    assert (default["mix"], default["dense"], default["reference"]) == ("0/25/75", "int8", False)
    assert (default["windows"], default["window"], default["scored"]) == (4, 16, 28)
    assert default["ppl"] == pytest.approx(full["ppl"] * math.exp(default["log_ppl_difference"]))
    assert 0 < default["kl"] < default["kl_p99"]
    assert default["ffn_bits_per_weight"] == pytest.approx(5.5, abs=0.01)
    for name in ("ppl", "kl", "log_ppl_difference", "top1"):
        assert default[f"{name}_standard_error"] >= 0


def test_the_text_of_the_profile_is_told(bundle: Path, text: Path, tmp_path: Path) -> None:
    known = tmp_path / "known.txt"
    known.write_text(TEXT, encoding="utf-8")
    words = ("eval", bundle, "-w", 4, "-n", 8, "-t", 1, "--text")
    assert "flatter" in m2c(*words, known).err
    assert "flatter" not in m2c(*words, text).err
    assert m2c(*words, text, "--quiet").err == ""


def test_what_cannot_be_evaluated_is_refused(bundle: Path, text: Path, tmp_path: Path) -> None:
    assert m2c("eval", bundle).code == 2
    assert m2c("eval", bundle, "--text", text, "--mix", "1/2/3").code == 2
    assert m2c("eval", bundle, "--text", text, "-w", 257).reason.startswith("--window 257")
    assert m2c("eval", bundle, "-w", 16, "--text", tmp_path / "absent").code == 4
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert m2c("eval", bundle, "-w", 16, "--text", tmp_path / "binary").code == 4
    assert m2c("eval", bundle, "--text", text, "-w", 16, "--dram", "64KiB").code == 7
