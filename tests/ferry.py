"""Kernels of a GPU for tests that know only host memory: operands are taken there and back."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from m2c.kernels.gpu import GpuKernels


class Ferry:
    """Each call takes copies to the GPU, and brings back what was returned and what was written."""

    def __init__(self, kernels: GpuKernels) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._kernels, name)

        def call(*given: Any, **named: Any) -> Any:
            crossed: dict[int, tuple[Tensor, Tensor]] = {}
            device = self._kernels.device
            there = [cross(one, device, crossed) for one in given]
            out = method(*there, **{key: cross(v, device, crossed) for key, v in named.items()})
            for here, copied in crossed.values():
                here.copy_(copied)
            return out.cpu() if isinstance(out, Tensor) else out

        return call


def cross(one: Any, device: torch.device, crossed: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """`one` with every tensor in it on the device; the same tensor is copied once."""
    if isinstance(one, Tensor):
        if id(one) not in crossed:
            crossed[id(one)] = one, one.to(device)
        return crossed[id(one)][1]
    if isinstance(one, tuple):
        return tuple(cross(part, device, crossed) for part in one)
    if is_dataclass(one) and not isinstance(one, type):
        parts = {field.name: getattr(one, field.name) for field in fields(one)}
        return replace(one, **{name: cross(part, device, crossed) for name, part in parts.items()})
    return one
