"""A conversation: what was said, how much of it the model still sees, and its next answer.

`Conversation` is messages and `CachedIds` token ids, both bookkeeping only; `Dialogue` has them
answered by an engine. Chat templates: chat.py. Knows nothing about terminals or printing.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from m2c.bundle.strict import decode, load_json
from m2c.engine import Engine
from m2c.errors import BadInput, UsageError
from m2c.generate import GenerationStats, Piece, stream_generate
from m2c.model.kv import KvCache
from m2c.prompt import conversation_ids
from m2c.sampling import Sampler, SamplingParams

Messages = list[tuple[str, str]]  # (role, text)
_CUTS: Final = ("", "interrupted", "length", "context")


@dataclass(frozen=True)
class Exchange:
    """A message and its answer. cut: why the answer is not whole ("interrupted", "length",
    "context"); empty if it is."""

    message: str
    answer: str
    cut: str = ""


@dataclass(frozen=True)
class _Line:
    """One message in a file of messages, JSON."""

    role: str
    content: str
    cut: str = ""


class Conversation:
    """`dropped` of the oldest exchanges are still known, but the model no longer sees them."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.exchanges: list[Exchange] = []
        self.dropped = 0

    def clear(self) -> None:
        """Forget all but the system message."""
        self.exchanges.clear()
        self.dropped = 0

    def pop(self) -> Exchange | None:
        """Take the last exchange out, if there is one."""
        last = self.exchanges.pop() if self.exchanges else None
        self.dropped = min(self.dropped, len(self.exchanges))
        return last

    def messages(self, message: str, dropped: int) -> Messages:
        """What the model sees: all but the first `dropped` exchanges, then `message`."""
        seen: Messages = [] if self.system is None else [("system", self.system)]
        for exchange in self.exchanges[dropped:]:
            seen += [("user", exchange.message), ("assistant", exchange.answer)]
        return [*seen, ("user", message)]

    def to_records(self) -> list[dict[str, Any]]:
        """All messages, those that the model no longer sees too, for a file of JSON lines."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for exchange in self.exchanges:
            found.append({"role": "user", "content": exchange.message})
            answer = {"role": "assistant", "content": exchange.answer}
            found.append(answer | ({"cut": exchange.cut} if exchange.cut else {}))
        return found

    @classmethod
    def of_lines(cls, data: bytes, *, file: Path) -> "Conversation":
        """From JSON lines: a system message or none, then messages and answers in turn.

        Raises BadInput naming the line that is anything else.
        """
        made, message = cls(), None
        lines = [(n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
        for number, text in lines:
            where = f"{file}, line {number}"
            line = decode(_Line, load_json(text, file=where), file=where)
            wanted = "user" if message is None else "assistant"
            if line.role == "system" and number == lines[0][0]:
                made.system = line.content
            elif line.role != wanted or line.cut not in _CUTS:
                raise BadInput(f"{where}: not a message of the {wanted}", "see what /save writes")
            elif message is None:
                message = line.content
            else:
                made.exchanges.append(Exchange(message, line.content, line.cut))
                message = None
        if message is not None or not made.exchanges:
            raise BadInput(f"{file}: does not end with an answer", "see what /save writes")
        return made

    def prompt(
        self, message: str, ids_of: Callable[[Messages], list[int]], *, ctx_size: int, room: int
    ) -> list[int]:
        """Ids that ask for an answer to `message`, with `room` for it in the context.

        Where the context is too small the oldest exchanges are dropped until the prompt takes half
        of it: dropping just enough would move everything in the KV cache at every message.
        Raises UsageError, and drops nothing, when the message alone does not fit.
        """
        ids = ids_of(self.messages(message, self.dropped))
        if len(ids) + room <= ctx_size:
            return ids
        most = len(self.exchanges)
        dropped = bisect_left(
            range(self.dropped, most), True,
            key=lambda n: len(ids_of(self.messages(message, n))) <= ctx_size // 2,
        ) + self.dropped  # fmt: skip
        if dropped > self.dropped:
            ids = ids_of(self.messages(message, dropped))
        if len(ids) >= ctx_size:
            raise UsageError(
                f"the message makes a prompt of {len(ids)} tokens, the context holds {ctx_size}",
                "use a larger --ctx-size or a shorter message",
            )
        self.dropped = dropped
        return ids


class CachedIds:
    """Which token ids the KV cache holds: a new prompt is computed from where it differs."""

    def __init__(self, kv: KvCache) -> None:
        self._kv = kv
        self._ids: list[int] = []

    def reuse(self, ids: Sequence[int]) -> int:
        """How many of the first `ids` are in the cache; what follows them there is forgotten.

        The last of `ids` is never among them: it must be computed for its logits.
        """
        pairs = zip(self._ids, ids[:-1], strict=False)
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        if same is None:
            same = min(len(self._ids), len(ids) - 1)
        self._ids = self._ids[:same]
        self._kv.truncate(same)
        return same

    def settle(self, ids: Sequence[int]) -> None:
        """Cut the cache back to what is certain after `ids`, however their generation ended.

        Keys and values of the last one were not computed, or by the draft; a prompt that was
        broken off reaches as far as the cache.
        """
        self._kv.truncate(max(0, len(ids) - 1))
        self._ids = list(ids[: self._kv.length])


class Dialogue:
    """A conversation with an engine. `figures`: of every answer that has begun."""

    def __init__(
        self, engine: Engine, template: str, params: SamplingParams, *, max_tokens: int,
        stop: Sequence[str] = (), system: str | None = None,
    ) -> None:  # fmt: skip
        self.conversation = Conversation(system)
        self.figures: list[GenerationStats] = []
        self.max_tokens = max_tokens
        self.sampler = Sampler(params)
        self._engine = engine
        self._template = template
        self._stop = stop
        self._cached = CachedIds(engine.model.kv)

    def set_system(self, text: str | None) -> None:
        """Raises BadInput, and changes nothing, when the chat format has no place for it."""
        if text is not None:
            self._ids([("system", text), ("user", "")])
        self.conversation.system = text

    def set_sampling(self, **changes: Any) -> None:
        """Raises UsageError, and changes nothing, when a value is out of range."""
        known = replace(self.sampler.params, seed=self.sampler.seed)
        self.sampler = Sampler(replace(known, **changes))

    def prompt(self, message: str) -> list[int]:
        """Ids to answer; drops the oldest exchanges where they no longer fit."""
        ctx_size = self._engine.shape.ctx_size
        room = min(self.max_tokens, ctx_size // 4)
        return self.conversation.prompt(message, self._ids, ctx_size=ctx_size, room=room)

    def answer(self, message: str, ids: list[int]) -> Iterator[Piece]:
        """Pieces of the answer to `message`, whose prompt `ids` is.

        The exchange is in the conversation once the last piece is taken; not if there was no text
        when it was interrupted.
        """
        out: list[int] = []
        text = ""
        cached = self._cached.reuse(ids)
        pieces = stream_generate(
            self._engine, ids, self.sampler, max_tokens=self.max_tokens, stop=self._stop,
            cached=cached,
        )  # fmt: skip
        try:
            for piece in pieces:
                out += piece.ids
                text += piece.text
                if piece.stats is not None:
                    self._note(message, text, piece.stats)
                yield piece
        finally:
            self._cached.settle([*ids, *out])

    def _note(self, message: str, text: str, stats: GenerationStats) -> None:
        cut = "" if stats.finish_reason == "stop" else stats.finish_reason
        if stats.generated_tokens:
            self.figures.append(stats)
        if text or cut != "interrupted":
            self.conversation.exchanges.append(Exchange(message, text, cut))

    @property
    def context_used(self) -> int:
        """Tokens in the KV cache."""
        return self._engine.model.kv.length

    def _ids(self, messages: Messages) -> list[int]:
        return conversation_ids(self._engine.tokenizer, self._template, messages)
