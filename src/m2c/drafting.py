"""Where drafts come from when a model makes them: the same model's INT4 planes, or another model.

Both answer one question: the logits after a text. What of the text was computed before is their own
concern, so that nobody else has to keep a second KV cache in step. Knows nothing about sampling,
or whether a draft is right.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from m2c.model.footprint import batch_tokens
from m2c.model.transformer import Transformer


class Draft(Protocol):
    """What `Speculator` asks for drafts."""

    name: str  # in few words
    model: Transformer

    def logits(self, ids: Sequence[int]) -> Tensor | None:
        """After all of `ids`: f32, at least one for every id that may be drafted. None: no more."""
        ...


class SharedDraft:
    """model: the exact model's layers with cheaper weights, over the same KV cache.

    All of a text but its last token must be in the cache; whoever drafts cuts off again what the
    drafts left there.
    """

    name = "int4 planes"

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def logits(self, ids: Sequence[int]) -> Tensor:
        """As `Draft.logits`: [vocab]."""
        return self.model.forward(np.asarray(ids[-1:], np.int32))


class OwnDraft:
    """model: another one with the same vocabulary and a KV cache of its own.

    It remembers which ids its cache holds. Whatever happened since (drafts refused, a text cut
    back, a pass broken off) the cache is cut back to what a text shares with them.
    """

    def __init__(self, model: Transformer, name: str, vocab: int) -> None:
        """vocab: ids below this may be drafted."""
        self.name = name
        self.model = model
        self._vocab = min(vocab, model.config.vocab_size)
        self._step = batch_tokens(model.config)
        self._ids: list[int] = []  # never fewer keys and values than ids

    def logits(self, ids: Sequence[int]) -> Tensor | None:
        """As `Draft.logits`: [the smaller vocab]. None when the context is full."""
        if len(ids) > self.model.kv.ctx_size:
            return None
        known = self._known(ids)
        del self._ids[known:]
        self.model.kv.truncate(known)
        logits = None
        for start in range(known, len(ids), self._step):
            batch = list(ids[start : start + self._step])
            # embeddings may have more rows than the vocabulary, of one model more than of the other
            logits = self.model.forward(np.minimum(batch, self._vocab - 1).astype(np.int32))
            self._ids += batch
        return None if logits is None else logits[: self._vocab]

    def _known(self, ids: Sequence[int]) -> int:
        """How many of `ids`, the last not among them, have their keys and values in the cache."""
        most = min(len(self._ids), len(ids) - 1)
        pairs = zip(self._ids[:most], ids, strict=False)
        return next((at for at, (old, new) in enumerate(pairs) if old != new), most)
