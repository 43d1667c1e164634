"""The experiment on predicted neurons: its algebra, and that it runs on a bundle."""

import sys
from pathlib import Path

import pytest
import torch

from m2c.bundle.bundle import Bundle

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_predictor  # noqa: E402
from predictors import Packed, Weights, judge, low_rank, scores_by, scores_of  # noqa: E402


@pytest.fixture
def layer() -> tuple[Weights, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    gate, up, down = (torch.randn(96, 32, generator=draw) for _ in range(3))
    mixing = torch.randn(32, 32, generator=draw)
    return Weights(gate, up, down, down.norm(dim=1)), torch.randn(400, 32, generator=draw) @ mixing


def test_a_predictor_of_full_rank_makes_no_mistake(layer: tuple[Weights, torch.Tensor]) -> None:
    weights, x = layer
    after, before = low_rank(weights, x)
    torch.testing.assert_close(
        after @ before, torch.cat((weights.gate, weights.up)), rtol=1e-3, atol=1e-3
    )
    found = judge(weights, x, scores_by(after, before, weights.norms, x))
    assert found[0] > 0.999  # recall of the best 30 %


def test_more_rank_finds_more_of_the_best_neurons(layer: tuple[Weights, torch.Tensor]) -> None:
    weights, x = layer
    after, before = low_rank(weights, x)
    recall = [
        judge(weights, x, scores_by(after[:, :r], before[:r], weights.norms, x))[0]
        for r in (1, 8, 16, 24)
    ]
    assert recall == sorted(recall)
    assert recall[0] < 0.6 < recall[-1]


def test_the_true_scores_keep_the_most_energy(layer: tuple[Weights, torch.Tensor]) -> None:
    weights, x = layer
    scores = scores_of(weights, x)
    best, worst = judge(weights, x, scores), judge(weights, x, -scores)
    assert best[0] == 1
    assert best[1] > worst[1]
    assert best[2] < worst[2]


def test_packed_rows_hold_gate_and_up_of_a_neuron(layer: tuple[Weights, torch.Tensor]) -> None:
    after, before = low_rank(*layer)
    packed = Packed.of(after, before)
    gates, ups = packed.neurons.values(0, 96).unbind(1)
    assert torch.corrcoef(torch.stack((gates.flatten(), after[:96].flatten())))[0, 1] > 0.98
    assert torch.corrcoef(torch.stack((ups.flatten(), after[96:].flatten())))[0, 1] > 0.98


def test_the_depth_that_suits_the_costs() -> None:
    assert bench_predictor.best_rate(0.0, 1.0, 2.0, 0.1) == pytest.approx(0.5)
    free = bench_predictor.best_rate(1.0, 0.0, 1.0, 0.0)
    assert free == pytest.approx(bench_predictor.AT_ONCE + 1)


def test_drafts_of_a_bundle(
    deep_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Drafts decide nothing about the text: the script itself compares the answers."""
    monkeypatch.setattr(bench_predictor, "HELD_OUT", 2)
    monkeypatch.setattr(bench_predictor, "RANKS", (32,))
    kept = str(tmp_path / "kept.safetensors")
    words = ["bench_predictor", "drafts", "--bundle", str(deep_bundle.path), "--kept", kept]
    words += [
        "--tokens",
        "64",
        "--prompts",
        "1",
        "--length",
        "12",
        "--ctx-size",
        "200",
        "--threads",
        "1",
        "--settings",
        "0:50",
        "32:50",
    ]
    monkeypatch.setattr(sys, "argv", words)
    bench_predictor.main()
    out = capsys.readouterr().out
    assert "| all neurons | " in out
    assert "| rank 32, 50 % | " in out
