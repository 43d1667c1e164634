"""The forward pass over a bundle: token ids in, logits out, weights from the store.

Knows nothing about text, sampling or where the bytes lie.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2c.errors import BadInput
from m2c.kernels.dispatch import matmul_rows
from m2c.kernels.workers import Workers
from m2c.model.attention import Rotary, attention, layer_vectors, rms_norm
from m2c.model.config import ModelConfig
from m2c.model.ffn import mixed_ffn
from m2c.model.kv import KvCache
from m2c.model.mix import Mix
from m2c.tiers.store import FFN, NeuronStore

Ids = npt.NDArray[np.int32]


class Transformer:
    """vectors: norms and biases, f32, by Hugging Face name. down_norms: [layers] of [neurons]."""

    def __init__(
        self, config: ModelConfig, store: NeuronStore, *, vectors: dict[str, Tensor],
        down_norms: list[Tensor], mix: Mix, kv: KvCache, workers: Workers,
        record: Callable[[int, str, Ids], None] | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.kv = kv
        self.record = record
        self._store = store
        self._mix = mix
        self._workers = workers
        self._layers = [layer_vectors(vectors, i) for i in range(config.num_hidden_layers)]
        self._norm = vectors["model.norm.weight"]
        self._down_norms = down_norms
        self._rotary = Rotary(config, kv.ctx_size, store.device)

    def forward(self, ids: Ids, *, all_logits: bool = False) -> Tensor:
        """Append `ids` [tokens] to the context; logits of the last one [vocab], or of all
        [tokens, vocab], f32.

        Every layer's weights are read once, however many tokens there are. Raises UsageError when
        the context is full, BadInput when the logits are not finite.
        """
        self.kv.require_room(len(ids))
        x = self._store.embed(ids)
        for layer in range(self.config.num_hidden_layers):
            x = self._layer(layer, x)
        self.kv.advance(len(ids))
        with self._store.layer(self.config.num_hidden_layers) as rows:
            last = rms_norm(x if all_logits else x[-1:], self._norm, self.config.rms_norm_eps)
            (head,) = rows.values()
            logits = matmul_rows(last, head, self._workers)
        if not bool(torch.isfinite(logits).all()):
            raise BadInput("the model's output is not finite", "check the bundle with m2c check")
        return logits if all_logits else logits[0]

    def _layer(self, layer: int, x: Tensor) -> Tensor:
        vectors = self._layers[layer]
        with self._store.layer(layer) as rows:
            x, _, _ = attention(
                x, vectors, rows, config=self.config, rotary=self._rotary, start=self.kv.length,
                extend=lambda k, v: self.kv.append(layer, k, v), workers=self._workers,
            )  # fmt: skip
            normed = rms_norm(x, vectors.ffn_norm, self.config.rms_norm_eps)
            single = x.shape[0] == 1
            floor = rows[FFN]
            record = self.record if single else None
            return x + mixed_ffn(
                normed, floor, self._down_norms[layer], act=self.config.hidden_act, mix=self._mix,
                fetch=lambda plane, ids: self._store.upgrade(
                    layer, plane, ids, floor, step=single
                ),
                workers=self._workers,
                record=None if record is None else lambda plane, ids: record(layer, plane, ids),
            )  # fmt: skip
