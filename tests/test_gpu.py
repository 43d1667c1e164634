"""What only kernels for a GPU do: on a CPU by emulation, and on a GPU where there is one.

Their arithmetic is tested with that of the others, in test_native.py and test_frames.py.
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated import Emulator
from running import PROMPT, decode, inputs, options_for, same
from test_frames import framed
from test_native import EXTRAS, KINDS, as_calls, gather, make_rows, relative
from tiny_models import pack_folder, write_checkpoint

from m2c import device as devices
from m2c import engine as engines
from m2c.bundle.bundle import Bundle
from m2c.bundle.planes import RecordLayout
from m2c.device import device_of, workers_of
from m2c.engine import Engine, RunOptions
from m2c.errors import BadInput, DoesNotFit, UsageError
from m2c.generate import prefill
from m2c.kernels import cuda_driver, dispatch, gpu_products, reference
from m2c.kernels.cuda_driver import NoKernels, Nvrtc, kernel_names
from m2c.kernels.gpu import GpuKernels
from m2c.kernels.operands import AttentionCall, LayerCall, Norm, Stack
from m2c.kernels.rows import ExactRows
from m2c.kernels.workers import Workers
from m2c.model.mix import Mix
from m2c.sampling import Sampler, SamplingParams
from m2c.speculate import Speculator

TOKENS = 11


@pytest.fixture
def gpu(emulated: GpuKernels) -> GpuKernels:
    return emulated


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vectors", [3, 2])
def test_tokens_do_not_change_a_bit(gpu: GpuKernels, kind: str, vectors: int) -> None:
    rows, x = make_rows(kind, 300, vectors, 250), inputs(TOKENS, 250)
    norm = Norm(inputs(1, 250)[0], 1e-5, inputs(1, 250)[0])
    how: dict[str, Any] = {"norm": norm, "bias": inputs(1, 300)[0]} if vectors == 2 else {}
    found = []
    for tokens in (1, 2, 5, TOKENS):
        parts = [gather(gpu, x[i : i + tokens], rows, **how) for i in range(0, TOKENS, tokens)]
        found.append(torch.cat(parts))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_calls_of_whole_chunks_give_the_bits_of_one(gpu: GpuKernels, kind: str) -> None:
    whole, x = make_rows(kind, 700, 3, 96), inputs(2, 96)
    expected, got = x.clone(), x.clone()
    gpu.ffn(x, whole, "silu", into=expected)
    for start, stop in ((0, 256), (256, 512), (512, 700)):
        index = torch.arange(start, stop)
        gpu.ffn(x, whole.take(index), "silu", into=got)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("extras", EXTRAS)
def test_attention_of_a_batch_is_that_of_each_token(gpu: GpuKernels, extras: str) -> None:
    norm, x, found = Norm(torch.ones(72), 1e-5), inputs(TOKENS, 72), []
    for tokens in (1, 3, TOKENS):
        call = as_calls("int8", kv=torch.float16, bias=True, extras=extras)
        out = x.clone()
        for start in range(0, TOKENS, tokens):
            gpu.attention(out[start : start + tokens], call, start, norm=norm)
        found.append(torch.cat((out.flatten(), call.keys.flatten(), call.values.flatten())))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("window", [None, 5, 256, 300])
@pytest.mark.parametrize("dim", [16, 20, 160])
def test_attention_over_chunks_of_positions(gpu: GpuKernels, dim: int, window: int | None) -> None:
    """The softmax of a context that is cut in three is that of the whole."""
    heads, kv_heads, hidden, positions, start = 4, 2, 32, 700, 690
    q, k, v = (make_rows("bf16", n * dim, 1, hidden) for n in (heads, kv_heads, kv_heads))
    generator = torch.Generator().manual_seed(1)

    def call() -> AttentionCall:
        keys, values = torch.randn(2, kv_heads, positions, dim, generator=generator.manual_seed(2))
        return AttentionCall(
            projections=(q, k, v, make_rows("bf16", hidden, 1, heads * dim)), biases=(None,) * 4,
            keys=keys.contiguous(), values=values.contiguous(), cosines=None, sines=None,
            heads=heads, scale=0.05, window=window,
        )  # fmt: skip

    norm, x, workers = Norm(torch.ones(hidden), 1e-5), inputs(4, hidden), Workers(1)
    expected = reference.attention(x, call(), start, workers, norm=norm)
    got = x.clone()
    gpu.attention(got, call(), start, norm=norm)
    assert relative(got - x, expected - x) < 1e-5


@pytest.mark.parametrize("parallel", [True, False])
def test_a_stack_gives_the_bits_of_its_layers(gpu: GpuKernels, parallel: bool) -> None:
    norms = [Norm(inputs(1, 72, seed=i)[0], 1e-5, inputs(1, 72, seed=i + 9)[0]) for i in (1, 2)]

    def stack() -> Stack:
        layers = [
            LayerCall(
                as_calls("int4", kv=torch.float16, bias=True), norms[0],
                make_rows("int4", 40, 2, 72), norms[1], "relu", inputs(1, 40, seed=i)[0],
                inputs(1, 72, seed=i)[0],
            )
            for i in range(2)
        ]  # fmt: skip
        return Stack(tuple(layers), parallel=parallel)

    workers = Workers(1, gpu=gpu)
    x = inputs(3, 72)
    expected = x
    for layer in stack().layers:
        given, out = (
            expected,
            dispatch.attention(expected, layer.attention, 0, workers, norm=layer.attn_norm),
        )
        dispatch.gather_ffn(
            given if parallel else out.clone(), layer.neurons, layer.act, workers,
            norm=layer.ffn_norm, into=out, bias=layer.up_bias,
        )  # fmt: skip
        expected = out + layer.down_bias
    assert torch.equal(dispatch.run_stack(x, stack(), 0, workers), expected)


@pytest.mark.parametrize("most", [1, 2, 4, 16])
def test_warps_that_share_a_frame_give_the_weights_of_one(
    gpu: GpuKernels, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(gpu_products, "_MOST_OF_FRAME", most)
    for shape in ((37, 1, 250, 16), (5, 3, 1000, 1), (65, 1, 576, 64)):
        rows, decoded = framed(*shape, "bf16")
        assert rows.frames is not None
        assert torch.equal(gpu.decode(rows).view(torch.int16), decoded.weights.view(torch.int16))
        gpu.check()
        rows.frames.nbytes[0] += 1  # and what follows is read a byte too late
        rows.frames.nbytes[-1] -= 1
        broken = replace(rows, frames=replace(rows.frames))
        gpu.decode(broken)
        with pytest.raises(BadInput, match="damaged frame"):
            gpu.check()


def test_what_the_kernels_do_not_take_is_left_to_torch(gpu: GpuKernels) -> None:
    workers, x = Workers(1, gpu=gpu), inputs(2, 64)
    f32 = ExactRows(RecordLayout(1, 64), torch.randn(20, 64))
    assert not gpu.takes(x, f32)
    assert torch.equal(
        dispatch.matmul_rows(x, f32, workers), reference.matmul_rows(x, f32, workers)
    )
    assert not gpu.takes(x.to("meta"), make_rows("int4", 20, 1, 64))


@pytest.fixture
def on_emulated(monkeypatch: pytest.MonkeyPatch, gpu: GpuKernels) -> list[str]:
    """Engines compute with the emulated kernels; the names of those launched."""
    monkeypatch.setattr(engines, "workers_of", lambda *_: Workers(1, gpu=gpu))
    launcher = gpu._launch.__self__  # type: ignore[attr-defined]
    assert isinstance(launcher, Emulator)
    launcher.launched.clear()
    return launcher.launched


@pytest.mark.parametrize("mix", ["0/25/75", "10/20/70", "0/100/0", "100/0/0"])
def test_a_model_gives_the_same_bits_whatever_the_tiers(
    tiny_bundle: Bundle, on_emulated: list[str], mix: str
) -> None:
    """All in HBM, and as much of it as a plan allows streamed through DRAM."""
    options = options_for(Mix.parse(mix), hbm=1 << 30)
    with Engine(tiny_bundle, options) as engine:
        everything = decode(engine)
        assert engine.workers.kernel == "cuda"
    with Engine(tiny_bundle, smallest_hbm(tiny_bundle, options)) as engine:
        assert engine.plan.link_nbytes_per_token
        assert same(decode(engine), everything)
    assert {"m2c_attend_4", "m2c_add_chunks"} <= set(on_emulated)


def smallest_hbm(bundle: Bundle, options: RunOptions) -> RunOptions:
    """With all of DRAM, the least HBM that a plan can be made for."""
    try:
        Engine(bundle, replace(options, hbm=1))
    except DoesNotFit as error:
        return replace(options, hbm=error.smallest)
    raise AssertionError("a byte of HBM is enough")


@pytest.mark.parametrize("hbm", ["all", "least"])
def test_exact_mode_in_three_tiers_gives_the_checkpoints_own_tokens(
    tiny_bundle: Bundle, on_emulated: list[str], hbm: str
) -> None:
    """INT4 planes in HBM draft; what is above them is decoded there."""
    mix = Mix(100, 0, 0)
    with Engine(tiny_bundle, options_for(mix, hbm=1 << 30)) as engine:
        ids, _ = decode(engine)
    options = options_for(mix, hbm=1 << 30, speculate=True)
    if hbm == "least":
        options = smallest_hbm(tiny_bundle, options)
    on_emulated.clear()
    with Engine(tiny_bundle, options) as engine:
        assert speculated(engine, len(ids)) == ids
        if hbm == "least":
            assert "m2c_decode" in on_emulated
        else:
            assert engine.draft is not None


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of experts, with a shared one."""
    folder = tmp_path_factory.mktemp("mixture")
    shape = {
        "model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 300, "shared_expert_intermediate_size": 270,
    }  # fmt: skip
    return pack_folder(write_checkpoint(folder / "checkpoint", shape), folder / "a.m2c")


@pytest.mark.parametrize("mix", ["0/0/100", "100/0/0", "0/50/50", "50/50/0"])
def test_a_mixture_gives_the_same_bits_whatever_the_tiers(
    mixture: Bundle, on_emulated: list[str], mix: str
) -> None:
    options = options_for(Mix.parse(mix), hbm=1 << 30)
    with Engine(mixture, options) as engine:
        assert engine.plan.expert_slots is None
        everything = decode(engine)
    with Engine(mixture, smallest_hbm(mixture, options)) as engine:
        assert engine.plan.expert_slots is not None
        assert same(decode(engine), everything)


@pytest.mark.parametrize("hbm", ["all", "least"])
def test_exact_mode_of_a_mixture_gives_the_tokens_of_one_by_one(
    mixture: Bundle, on_emulated: list[str], hbm: str
) -> None:
    mix = Mix(100, 0, 0)
    with Engine(mixture, options_for(mix, hbm=1 << 30)) as engine:
        ids, _ = decode(engine)
    options = options_for(mix, hbm=1 << 30, speculate=True)
    if hbm == "least":
        options = smallest_hbm(mixture, options)
    with Engine(mixture, options) as engine:
        assert speculated(engine, len(ids)) == ids


def speculated(engine: Engine, tokens: int) -> list[int]:
    speculator = Speculator(engine.model, engine.draft, Sampler(SamplingParams()))
    ids = PROMPT.tolist()
    engine.model.kv.truncate(0)
    found = list(speculator.tokens(prefill(engine.model, ids), ids, tokens))
    return found[:tokens]


def test_every_kernel_is_launched_by_its_name() -> None:
    text = (Path(cuda_driver.__file__).parent / "gpu.py").read_text()
    text += (Path(cuda_driver.__file__).parent / "gpu_products.py").read_text()
    for name in kernel_names():
        stem = name.rstrip("0123456789_")
        assert f'"{stem}' in text, name
    assert len(set(kernel_names())) == len(kernel_names())


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_has_its_number_as_tensors_have_it(
    monkeypatch: pytest.MonkeyPatch, name: str, index: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(name) == torch.device("cuda", index)
    with pytest.raises(UsageError, match="no such GPU"):
        device_of("cuda:2")


def test_where_kernels_cannot_be_compiled_torch_must_be_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise NoKernels("NVRTC is not there")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(devices, "CudaDriver", refuse)
    with pytest.raises(UsageError, match="NVRTC is not there; add --kernel torch"):
        workers_of("cuda", "auto", 1)
    with closing(workers_of("cuda", "torch", 1)) as workers:
        assert workers.kernel == "torch"
        assert workers.host is not None


def test_no_compiler_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_candidates", lambda: ["libnone-such.so"])
    with pytest.raises(NoKernels, match="NVRTC"):
        Nvrtc()


def test_kept_code_is_whole_or_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "kernels" / "sm_90.cubin"
    assert cuda_driver._kept(path) is None
    cuda_driver._keep(path, b"code" * 1000)
    assert cuda_driver._kept(path) == b"code" * 1000
    path.write_bytes(path.read_bytes()[:-1])
    assert cuda_driver._kept(path) is None


def test_indices_of_random_rows(gpu: GpuKernels) -> None:
    """As a mix gathers them: the floor where it lies, refinements copied."""
    rows = make_rows("int8", 90, 3, 64)
    picked = np.random.default_rng(0).choice(90, 20, replace=False)
    picked.sort()
    index = torch.from_numpy(picked.astype(np.int32))
    some = replace(rows, int8=rows.int8[index.long()].contiguous(), index4=index)
    x = inputs(3, 64)
    assert torch.equal(gather(gpu, x, some), gather(gpu, x, rows.take(index.long())))
