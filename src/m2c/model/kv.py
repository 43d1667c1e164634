"""The KV cache: keys and values of the tokens so far, allocated once for the whole context.

Knows nothing about weights.
"""

from typing import Final

import torch
from torch import Tensor

from m2c.errors import UsageError
from m2c.model.config import ModelConfig

KV_DTYPES: Final = {"f16": torch.float16, "f32": torch.float32}


def kv_nbytes(config: ModelConfig, ctx_size: int, kv_type: str) -> int:
    """Bytes of the KV cache for `ctx_size` tokens."""
    per_token = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return per_token * ctx_size * (2 if kv_type == "f16" else 4)


class KvCache:
    """keys, values: [layers, kv_heads, ctx_size, head_dim]."""

    def __init__(
        self, config: ModelConfig, ctx_size: int, *, kv_type: str, device: torch.device
    ) -> None:
        shape = (
            config.num_hidden_layers, config.num_key_value_heads, ctx_size, config.head_dim,
        )  # fmt: skip
        self.ctx_size = ctx_size
        self.length = 0
        self._keys = torch.zeros(shape, dtype=KV_DTYPES[kv_type], device=device)
        self._values = torch.zeros(shape, dtype=KV_DTYPES[kv_type], device=device)

    def require_room(self, tokens: int) -> None:
        """Raises UsageError when the context cannot take `tokens` more."""
        if self.length + tokens > self.ctx_size:
            raise UsageError(
                f"the context of {self.ctx_size} tokens is full", "use a larger --ctx-size"
            )

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [kv_heads, ctx_size, head_dim]; kernels write after `length`.

        `length` moves only with `advance`, once every layer has stored its part.
        """
        return self._keys[layer], self._values[layer]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length`."""
        self.length = min(self.length, length)
