"""--dram is an upper bound: the peak of a whole process stays under it plus the stated constant.

Layers are wide, so that a temporary nobody counted shows.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import shell
from running import options_for, smallest_dram
from tiny_models import pack_folder, write_checkpoint

from m2c.bundle.bundle import Bundle
from m2c.hardware import OVERHEAD_NBYTES
from m2c.model.mix import Mix
from m2c.units import MiB

pytestmark = pytest.mark.slow
WIDE = {
    "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("wide")
    return pack_folder(write_checkpoint(folder / "checkpoint", WIDE), folder / "wide.m2c")


def within_budget(bundle: Bundle, stats: Path, mix: str, extra_mib: int) -> dict[str, Any]:
    """Facts of a run with the smallest budget and `extra_mib`, which it must keep to: in a process
    of its own, as the peak of this one is packing's."""
    shape = options_for(Mix.parse(mix), ctx_size=512, threads=2, kv_type="f16")
    dram = (-(-smallest_dram(bundle, shape) // MiB) + extra_mib) * MiB
    said = shell(
        '"$@"', "run", str(bundle.path), "--raw", "-p", "to be or not to be " * 12, "-n", "6",
        "-c", "512", "-t", "2", "--mix", mix, "--dram", f"{dram // MiB}MiB", "--stats", str(stats),
    )  # fmt: skip
    assert said.code == 0, said.err
    facts: dict[str, Any] = json.loads(stats.read_text())
    assert facts["plan"]["dram_used"] <= dram
    assert facts["peak_memory_nbytes"] <= dram + OVERHEAD_NBYTES
    return facts


# with more memory than the least: rows that are decoded, all three planes, and all in memory
@pytest.mark.parametrize(
    ("mix", "extra_mib"),
    [(mix, 0) for mix in ("100/0/0", "50/50/0", "25/25/50", "0/25/75", "0/0/100")]
    + [(mix, 150) for mix in ("100/0/0", "25/25/50", "0/0/100")],
)
def test_the_budget_is_kept(wide_bundle: Bundle, tmp_path: Path, mix: str, extra_mib: int) -> None:
    within_budget(wide_bundle, tmp_path / "stats.json", mix, extra_mib)


EXPERTS = {
    "plain": {"model_type": "mixtral", "intermediate_size": 1100, "num_local_experts": 8,
              "num_experts_per_tok": 2},
    "shared": {"model_type": "qwen2_moe", "moe_intermediate_size": 520, "num_experts": 8,
               "num_experts_per_tok": 2, "shared_expert_intermediate_size": 5504},
}  # fmt: skip


@pytest.fixture(scope="module", params=EXPERTS)
def expert_bundle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    folder = tmp_path_factory.mktemp("wide-experts")
    checkpoint = write_checkpoint(folder / "checkpoint", WIDE | EXPERTS[request.param])
    return pack_folder(checkpoint, folder / "wide.m2c")


@pytest.mark.parametrize(
    ("mix", "extra_mib"), [("100/0/0", 24), ("0/0/100", 0), ("0/50/50", 0), ("50/0/50", 24)]
)
def test_the_budget_is_kept_with_experts(
    expert_bundle: Bundle, tmp_path: Path, mix: str, extra_mib: int
) -> None:
    facts = within_budget(expert_bundle, tmp_path / "stats.json", mix, extra_mib)
    assert facts["plan"]["expert_slots"] is not None
