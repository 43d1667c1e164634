"""Options that several commands share, and what their values mean.

Knows nothing about what the commands do with them.
"""

from pathlib import Path
from typing import Annotated

import typer

from m2c.cli import complete

BundleName = Annotated[
    str | None,
    typer.Argument(
        help="What m2c pack printed, or its name [default: the one packed last].",
        autocompletion=complete.bundles,
    ),
]
Ssd = Annotated[
    Path | None,
    typer.Option("--ssd", envvar="M2C_SSD", help="Folder on the SSD that holds the bundles."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", "-t", envvar="M2C_THREADS", min=1, max=1024,
        help="Compute threads [default: all allowed cores].",
    ),
]  # fmt: skip
Kernel = Annotated[
    str,
    typer.Option(envvar="M2C_KERNEL", help="Compute kernels: auto, avx512, avx2, scalar or torch."),
]
Offline = Annotated[
    bool,
    typer.Option("--offline", envvar="HF_HUB_OFFLINE", help="Fetch nothing from the hub."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no figures.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Mix = Annotated[
    str | None,
    typer.Option(
        help="Percent of each layer's neurons at FP16/INT8/INT4, best first, e.g. 5/15/80; of a "
        "mixture, of a token's experts by router weight, rounded half up [default: found at pack "
        "time]."
    ),
]
Drop = Annotated[
    float, typer.Option(min=0, max=99, help="Percent of neurons, lowest scores, not computed.")
]
Dense = Annotated[
    str | None,
    typer.Option(
        help="Precision of attention, shared experts, embeddings and head: fp16, int8 or int4 "
        "[default: by mix]."
    ),
]
CtxSize = Annotated[
    int | None,
    typer.Option("--ctx-size", "-c", min=1, help="Context in tokens [default: up to 4096]."),
]
Kv = Annotated[str, typer.Option("--kv", help="Type of the KV cache: f16 or f32.")]
Hbm = Annotated[
    str | None,
    typer.Option(
        envvar="M2C_HBM",
        help="Memory of the top tier, e.g. 20GiB, or auto. With --device cpu the tier is "
        "emulated [default: auto on a GPU, else none].",
    ),
]
Dram = Annotated[
    str | None,
    typer.Option(
        envvar="M2C_DRAM",
        help="Memory for weights, KV cache and buffers, e.g. 24GiB, or auto [default: auto].",
    ),
]
Device = Annotated[str, typer.Option(envvar="M2C_DEVICE", help="cpu or cuda[:N].")]
Policy = Annotated[
    str | None,
    typer.Option(
        help="Neuron cache policy: pinned, atu, lru, lfu or ema [default: atu in HBM, else pinned]."
    ),
]
Temperature = Annotated[float, typer.Option("--temp", "--temperature", min=0, help="0 is greedy.")]
TopK = Annotated[int, typer.Option(min=0, help="Keep the k best tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Keep this much probability.")]
MinP = Annotated[float, typer.Option(help="Keep tokens above this share of the best.")]
RepeatPenalty = Annotated[float, typer.Option(help="1 is none.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop before this text.")]
Exact = Annotated[
    bool, typer.Option("--exact", help="Same as --mode exact: the checkpoint's own output.")
]
Mode = Annotated[
    str | None,
    typer.Option(
        help="exact, mixed or auto [default: auto; mixed if a mix, a policy, a trace or a GPU "
        "is asked for]."
    ),
]
ExactPrecision = Annotated[
    str, typer.Option(help="Precision that exact mode verifies at: fp16, int8 or int4.")
]
Draft = Annotated[
    str | None,
    typer.Option(
        help="Bundle of a smaller model with the same vocabulary, whose drafts exact mode may "
        "verify. It runs at INT4 and needs its memory within --dram."
    ),
]
Depth = Annotated[int, typer.Option(min=1, max=64, help="Blocks read ahead.")]
Energy = Annotated[
    bool, typer.Option("--energy", help="Measure energy, and print J per token and gCO2e.")
]
GridIntensity = Annotated[
    float | None,
    typer.Option(
        min=0, max=5000,
        help="With --energy: gCO2e per kWh of your electricity [default: 481, the world's average "
        "of 2023 by Ember].",
    ),
]  # fmt: skip
