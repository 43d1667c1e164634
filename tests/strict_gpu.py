"""A GPU that is not there, strict about what a real one is strict about.

Its memory is the host's and its kernels are the emulated ones, but tensors know whether they lie on
it: mixing them up, looking at them from the host, or waiting for them while launches are recorded
fails as on a card. Recorded launches are replayed on the memory they were recorded with.

Kernels run at once, copies in a stream of their own as late as a card may do them: when a kernel or
the host waits for them. Whoever does not wait gets what was there before. And a copy onto what a
kernel has read, in a stream that did not wait for that kernel, fails.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from emulated import Emulator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from m2c import device as devices
from m2c.kernels import cuda_driver

CUDA = torch.device("cuda", 0)
# what makes the host wait for the GPU
_WAITS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "unique", "masked_select", "__bool__", "__int__",
    "__float__", "__index__", "equal", "is_nonzero",
}  # fmt: skip
_MAY_CROSS = {"copy_", "__setitem__", "__getitem__", "to", "cpu", "__get__"}


def on_gpu(tensor: Tensor) -> bool:
    return getattr(tensor, "_on_gpu", False)


def _placed(found: Any, there: bool) -> Any:
    for one in tree_leaves(found):
        if isinstance(one, Tensor):
            one._on_gpu = there  # type: ignore[attr-defined]
    return found


class StrictGpu(TorchFunctionMode):
    """While it is entered, `device="cuda"` means this."""

    def __init__(self, emulator: Emulator) -> None:
        super().__init__()
        self.recorded: list[Callable[[], None]] | None = None
        self._emulator = emulator
        self.computes = Stream(self)
        self.current = self.computes
        self.streams = [self.computes]
        self._given: dict[int, int] = {}  # address to the last launch that was given it

    device = CUDA

    def launch(self, kernel: str, grid: int, block: int, arguments: Any) -> None:
        self.computes.asked += 1
        for argument in arguments:
            raw = bytes(argument)
            for word in memoryview(raw[: len(raw) // 8 * 8]).cast("Q"):
                self._given[word] = self.computes.asked
        self._emulator.launch(kernel, grid, block, arguments)
        if self.recorded is not None:
            self.recorded.append(lambda: self._emulator.launch(kernel, grid, block, arguments))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if name == "__get__" and func.__self__.__name__ in ("device", "is_cuda"):
            there = on_gpu(args[0])
            if func.__self__.__name__ == "is_cuda":
                return there
            return CUDA if there else func(*args)
        if not tensors:
            there = _is_gpu(kwargs.get("device"))
            if there:
                kwargs["device"] = "cpu"
            return self._done(func, args, kwargs, there)
        there = self._required(name, args, tensors)
        if name == "copy_" and self.current is not self.computes:
            return self._copied_later(*args)
        if name == "cpu" or (name == "to" and _names_a_device(args[1:], kwargs)):
            return self._moved(func, args, kwargs)
        if _is_gpu(kwargs.get("device")):  # as empty_like has it
            kwargs["device"], there = "cpu", True
        return self._done(func, args, kwargs, there)

    def _required(self, name: str, args: Any, tensors: list[Tensor]) -> bool:
        """Where the result lies; fails where a card would."""
        places = {on_gpu(one) for one in tensors if one.dim() or len(tensors) == 1}
        if len(places) > 1:
            # an index may lie on the host; a slice may be filled from there
            index_on_gpu = name == "__getitem__" and not on_gpu(args[0])
            by_index = name == "__setitem__" and any(
                isinstance(one, Tensor) for one in tree_leaves(args[1])
            )
            if name not in _MAY_CROSS or index_on_gpu or by_index:
                raise RuntimeError(f"{name}: tensors on two devices")
            if self.recorded is not None:
                raise RuntimeError(f"{name}: a copy from the host while recording")
        there = on_gpu(tensors[0]) if name in _MAY_CROSS else True in places
        if name == "numpy" and there:
            raise TypeError("numpy of a tensor on a GPU")
        if there and name in _WAITS and self.recorded is not None:
            raise RuntimeError(f"{name}: waits for the GPU while recording")
        return there

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        source, rest = args[0], [_on_host(one) for one in args[1:]]
        target = func.__name__ != "cpu" and any(map(_is_gpu, (*args[1:], kwargs.get("device"))))
        if target != on_gpu(source) and self.recorded is not None:
            raise RuntimeError("a copy between host and GPU while recording")
        found = func(source, *rest, **{key: _on_host(value) for key, value in kwargs.items()})
        if target != on_gpu(source):
            found = found.clone()
        return self._kept(func, (source, *rest), {}, _placed(found, target))

    def _copied_later(self, target: Tensor, source: Tensor, *_: Any) -> Tensor:
        start = target.data_ptr()
        for address, launch in self._given.items():
            if start <= address < start + target.nbytes and launch > self.current.known:
                raise RuntimeError("copied onto what a kernel may be reading")
        self.current.ask(lambda: target.copy_(source))
        return target

    def stream(self) -> "Stream":
        """`torch.cuda.Stream`."""
        self.streams.append(Stream(self))
        return self.streams[-1]

    @contextmanager
    def within(self, stream: "Stream") -> Iterator[None]:
        """`torch.cuda.stream`."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def synchronize(self, *_: object) -> None:
        for stream in self.streams:
            stream.run(stream.asked)

    def _done(self, func: Any, args: Any, kwargs: dict[str, Any], there: bool) -> Any:
        return self._kept(func, args, kwargs, _placed(func(*args, **kwargs), there))

    def _kept(self, func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> Any:
        """While recording: what will be done again, into the same memory."""
        outs = [one for one in tree_leaves(found) if isinstance(one, Tensor)]
        writes = outs or func.__name__ == "__setitem__"
        if self.recorded is not None and func.__name__.startswith("empty"):
            self.recorded.append(lambda: outs and None)  # memory stays with the recording
        elif self.recorded is not None and writes:

            def again() -> None:
                new = [one for one in tree_leaves(func(*args, **kwargs)) if isinstance(one, Tensor)]
                for old, one in zip(outs, new, strict=True):
                    if old.data_ptr() != one.data_ptr():
                        old.copy_(one)

            self.recorded.append(again)
        return found


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, gpu: StrictGpu) -> None:
        self._gpu = gpu
        self._launches: list[Callable[[], None]] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        self._gpu.recorded = self._launches
        try:
            yield
        finally:
            self._gpu.recorded = None

    def replay(self) -> None:
        with torch._C.DisableTorchFunction():
            for launch in self._launches:
                launch()


class Stream:
    """What was asked for is done in order, when somebody waits for it; kernels are done at once."""

    def __init__(self, gpu: StrictGpu) -> None:
        self.asked = 0
        self.known = 0  # kernels that had been asked for when this was told to wait for them
        self._gpu = gpu
        self._done = 0
        self._later = deque[Callable[[], object]]()

    def ask(self, work: Callable[[], object]) -> None:
        self.asked += 1
        self._later.append(work)

    def run(self, until: int) -> None:
        with torch._C.DisableTorchFunction():
            while self._later and self._done < until:
                self._later.popleft()()
                self._done += 1

    def wait_stream(self, other: "Stream") -> None:
        self._wait(other, other.asked)

    def wait_event(self, event: "Event") -> None:
        if event.stream is not None:  # one that was never recorded is no reason to wait
            self._wait(event.stream, event.count)

    def _wait(self, other: "Stream", count: int) -> None:
        if other is self._gpu.computes:
            self.known = max(self.known, count)
        elif self is self._gpu.computes:
            other.run(count)


class Event:
    def __init__(self, **_: object) -> None:
        self.stream: Stream | None = None
        self.count = 0

    def record(self, stream: Stream) -> None:
        self.stream, self.count = stream, stream.asked

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.run(self.count)

    def elapsed_time(self, _: object) -> float:
        return 0.001


class Pinned(set[int]):
    """Addresses of what is pinned."""

    refuses = False

    def pin(self, address: int, nbytes: int) -> bool:
        assert nbytes > 0
        if not self.refuses:
            self.add(address)
        return not self.refuses


def install(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> tuple[StrictGpu, Pinned]:
    """torch.cuda and m2c as if there were such a GPU; enter the first to compute on it."""
    gpu, pinned = StrictGpu(emulator), Pinned()
    fakes: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, 
        "set_device": lambda device: None, "empty_cache": lambda: None,
        "mem_get_info": lambda device: (1 << 33, 1 << 33), "synchronize": gpu.synchronize,
        "current_stream": lambda *_: gpu.current, "Stream": lambda *_: gpu.stream(),
        "Event": Event, "stream": gpu.within,
        "CUDAGraph": lambda: Graph(gpu), "graph": lambda graph, pool: graph.record(),
        "graph_pool_handle": lambda: (0, 1),
        "get_device_name": lambda *_: "an emulated GPU",
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(devices, "CudaDriver", lambda device, cache: gpu)
    monkeypatch.setattr(cuda_driver, "pin", pinned.pin)
    monkeypatch.setattr(cuda_driver, "unpin", pinned.remove)
    monkeypatch.setattr(cuda_driver, "seen_at", lambda address: address)
    return gpu, pinned


def _is_gpu(one: Any) -> bool:
    return (isinstance(one, torch.device) and one.type == "cuda") or (
        isinstance(one, str) and one.startswith("cuda")
    )


def _names_a_device(args: Any, kwargs: dict[str, Any]) -> bool:
    return any(isinstance(one, torch.device | str) for one in (*args, kwargs.get("device")))


def _on_host(one: Any) -> Any:
    return "cpu" if _is_gpu(one) else one
