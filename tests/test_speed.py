"""m2c bench: which work is done and counted, and that its tables can be pasted and parsed."""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from command_line import m2c, m2c_ok
from running import MIXES, options_for, smallest_dram

from m2c.bundle.bundle import Bundle
from m2c.engine import Engine
from m2c.speed import Speed, SpeedJob, measure_speed

Call = tuple[int, int]  # tokens in the context before, tokens of the pass


def spied(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The forward passes that `engine` will compute."""
    calls: list[Call] = []
    forward = engine.model.forward

    def noted(ids: npt.NDArray[np.int32], **options: Any) -> Any:
        calls.append((engine.model.kv.length, len(ids)))
        return forward(ids, **options)

    monkeypatch.setattr(engine.model, "forward", noted)
    return calls


def streaming(bundle: Bundle, mix: str, ctx_size: int = 32) -> Any:
    options = options_for(MIXES[mix], ctx_size=ctx_size)
    return options_for(MIXES[mix], ctx_size=ctx_size, dram=smallest_dram(bundle, options))


# -- the work --------------------------------------------------------------------------------------


def test_each_test_is_warmed_up_and_starts_from_the_same_context(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = SpeedJob(prompt=7, generate=20, depth=3, repetitions=2)
    done: list[int] = []
    with Engine(tiny_bundle, options_for(MIXES["0/25/75"], ctx_size=job.ctx_size)) as engine:
        calls = spied(engine, monkeypatch)
        prompt, decode = measure_speed(engine, job, progress=done.append)
    tokens = [(3 + i, 1) for i in range(20)]
    assert calls == [(0, 3), *[(3, 7)] * 3, *tokens[:16], *tokens, *tokens]
    assert sum(done) == job.total == 3 + 3 * 7 + 16 + 2 * 20
    assert (prompt.test, prompt.tokens, len(prompt.seconds)) == ("pp7 @ d3", 7, 2)
    assert (decode.test, decode.tokens, len(decode.seconds)) == ("tg20 @ d3", 20, 2)
    assert min(*prompt.seconds, *decode.seconds) > 0


def test_a_test_of_no_tokens_is_left_out(tiny_bundle: Bundle) -> None:
    for job, names in (
        (SpeedJob(prompt=4, generate=0, repetitions=1), ["pp4"]),
        (SpeedJob(prompt=0, generate=4, repetitions=1), ["tg4"]),
    ):
        done: list[int] = []
        with Engine(tiny_bundle, options_for(MIXES["0/25/75"], ctx_size=4)) as engine:
            assert [s.test for s in measure_speed(engine, job, progress=done.append)] == names
        assert sum(done) == job.total == 8


def test_long_prompts_are_computed_in_batches(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2c.generate.batch_tokens", lambda config: 5)
    job = SpeedJob(prompt=12, generate=0, repetitions=1)
    with Engine(tiny_bundle, options_for(MIXES["0/25/75"])) as engine:
        calls = spied(engine, monkeypatch)
        list(measure_speed(engine, job))
    assert calls == [(0, 5), (5, 5), (10, 2)] * 2


def test_traffic_is_counted_per_token(deep_bundle: Bundle) -> None:
    """Of a mix without upgrades the streamed blocks are read once a pass, no matter which ids."""
    job = SpeedJob(prompt=8, generate=6, repetitions=2)
    with Engine(deep_bundle, streaming(deep_bundle, "0/0/100")) as engine:
        prompt, decode = measure_speed(engine, job)
        planned = engine.plan.ssd_nbytes_per_token
    assert planned > 0
    assert decode.ssd_bytes_per_s > 0
    # the ring reads a few layers over the end of a test, rows of the embedding come on top
    assert planned <= decode.ssd_nbytes_per_token < 1.5 * planned
    assert prompt.ssd_nbytes_per_token < decode.ssd_nbytes_per_token / 2
    with Engine(deep_bundle, options_for(MIXES["0/0/100"])) as engine:
        (resident,) = measure_speed(engine, SpeedJob(prompt=0, generate=2, repetitions=1))
    assert resident.ssd_nbytes_per_token < planned / 10


# -- the figures -----------------------------------------------------------------------------------


def test_mean_and_deviation_are_over_repetitions() -> None:
    speed = Speed("tg10", 10, (1.0, 2.0, 4.0), 0.0, 0.0)
    assert speed.tps == (10.0, 5.0, 2.5)
    assert speed.mean == pytest.approx(fmean(speed.tps))
    assert speed.deviation == pytest.approx(stdev(speed.tps))
    assert Speed("tg10", 10, (2.0,), 0.0, 0.0).deviation == 0


# -- the command -----------------------------------------------------------------------------------


def test_the_table_is_markdown(bundle: Path) -> None:
    said = m2c("bench", bundle, "-p", 4, "-n", 3, "-r", 2, "-t", 1, "--dram", "1GiB")
    assert (said.code, said.err) == (0, "")
    header, rule, *rows = said.out.splitlines()
    assert len({len(line) for line in (header, rule, *rows)}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]
    assert cells[0] == [
        "model", "size", "params", "backend", "dram", "test", "t/s", "SSD MB/token", "GB/s",
        "predicted t/s",
    ]  # fmt: skip
    assert set(rule) == set("| -:")
    prompt, decode = (dict(zip(cells[0], row, strict=True)) for row in cells[1:])
    assert (prompt["test"], decode["test"]) == ("pp4", "tg3")
    assert prompt["model"] == "bundle 0/25/75, dense int8"
    assert prompt["dram"] == "1.00 GiB"
    assert decode["backend"].endswith(", 1 threads")
    mean, deviation = decode["t/s"].split(" ± ")
    assert float(mean) > 0
    assert float(deviation) >= 0
    assert prompt["predicted t/s"] == "-"
    assert float(decode["predicted t/s"]) > 0


@pytest.mark.parametrize("flags", [("--json",), ("-o", "json")])
def test_json_has_every_run(bundle: Path, flags: tuple[str, ...]) -> None:
    text = m2c_ok("bench", bundle, "-p", 0, "-n", 3, "-d", 2, "-r", 2, "--hbm", "1GiB", *flags)
    (found,) = json.loads(text)
    assert (found["test"], found["tokens"], len(found["seconds"])) == ("tg3 @ d2", 3, 2)
    assert found["tps_mean"] == pytest.approx(fmean(3 / s for s in found["seconds"]))
    assert found["size_nbytes"] == found["plan"]["compute_nbytes_per_token"]
    assert found["plan"]["hbm_budget"] == 1 << 30


def test_budgets_that_were_not_asked_for_are_no_columns(bundle: Path) -> None:
    header = m2c_ok("bench", bundle, "-p", 0, "-n", 1, "-r", 1).splitlines()[0]
    assert "dram" not in header
    assert "hbm" not in header


def test_what_the_model_cannot_hold_is_refused(bundle: Path) -> None:
    said = m2c("bench", bundle, "-p", 8, "-n", 200, "-d", 57)
    assert said.code == 2
    assert said.reason.startswith("257 tokens are beyond the 256 of this model; lower -d")
    assert m2c("bench", bundle, "-r", 0).code == 2
    assert m2c("bench", bundle, "-p", 4, "-n", 4, "--dram", "1MiB").code == 7
