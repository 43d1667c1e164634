"""Text to token ids and back, for any tokenizer.json.

The `tokenizers` package does the work; this file decides what it may be fed, whether a control
token in a text is a command or just text, and when streamed text is safe to print.
Knows nothing about models, chat templates or sampling; GGUF vocabularies: tokenizer_gguf.py.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

from tokenizers import Tokenizer as Engine

from m2c.bundle.strict import parse_object
from m2c.errors import BadInput, UnsupportedModel, UsageError

MAX_JSON_NBYTES = 256 << 20  # the largest published vocabularies take about 35 MB

# A character has at most four bytes and a token at least one: a tail that is still no character
# after this many tokens is garbage, or ends in at most three tokens that are not.
_MAX_HELD_TOKENS = 16
_REPLACEMENT = "\ufffd"

# letters that one letter may become; those of published models stay below
MOST_GROWTH: Final = 4096
_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_GROWTH: Final = {
    "NFKC": 18, "NFKD": 18, "NFC": 3, "NFD": 4, "Lowercase": 3, "BertNormalizer": 8,
    "ByteLevel": 4, "Metaspace": 2, "Precompiled": 32,
}  # fmt: skip

_DOWNLOAD_AGAIN = "fetch the file again from where the model came from"


class Tokenizer:
    """One vocabulary. Build it with `from_json`.

    `bos_id`, `eos_id`: ids, None where the model has none. `add_bos`: whether the model expects
    `bos_id` before a text; `encode` never adds it, because only the caller knows where a text
    begins.
    """

    def __init__(
        self, engine: Engine, *, source: str, bos_id: int | None, eos_id: int | None, add_bos: bool
    ) -> None:
        self._engine = engine
        self._source = source
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.add_bos = add_bos and bos_id is not None
        added = engine.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._control_texts = tuple(token.content for token in added.values() if token.special)

    @classmethod
    def from_json(cls, data: bytes, *, source: str, config: bytes | None = None) -> "Tokenizer":
        """From the bytes of a tokenizer.json; `config` is the tokenizer_config.json beside it.

        `source` names the file in errors. BadInput when either file is malformed.
        """
        if len(data) > MAX_JSON_NBYTES:
            raise BadInput(f"{source}: {len(data)} bytes is more than any tokenizer.json holds")
        # stricter than the engine: it takes the last of two keys
        _require_bounded(parse_object(data, source), source)
        settings = {} if config is None else parse_object(config, f"config of {source}")
        with _engine_errors(source), _without_panics():
            engine = Engine.from_buffer(data)
            # Saved training settings: left on, they would cut a long prompt without a word.
            engine.no_truncation()
            engine.no_padding()
            template_bos = _bos_of_template(engine)
            engine.decode(engine.encode("a", add_special_tokens=False).ids)  # does it work?
        bos_id = _id_of(engine, settings.get("bos_token"))
        add_bos = settings.get("add_bos_token")
        return cls(
            engine,
            source=source,
            bos_id=template_bos if bos_id is None else bos_id,
            eos_id=_id_of(engine, settings.get("eos_token")),
            add_bos=add_bos if isinstance(add_bos, bool) else template_bos is not None,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return self._engine.get_vocab_size(with_added_tokens=True)

    def difference(self, other: "Tokenizer") -> str | None:
        """Where the vocabularies first differ, in words; None when all ids mean the same tokens."""
        mine, its = self._by_id(), other._by_id()
        for token_id in sorted(mine.keys() | its.keys()):
            one, two = mine.get(token_id), its.get(token_id)
            if one != two:
                words = [repr(t) if t is not None else "no token" for t in (one, two)]
                return f"id {token_id} is {words[0]} in one and {words[1]} in the other"
        return None

    def _by_id(self) -> dict[int, str]:
        return {id: token for token, id in self._engine.get_vocab(with_added_tokens=True).items()}

    def token_to_id(self, token: str) -> int | None:
        return self._engine.token_to_id(token)

    def token_text(self, token_id: int | None) -> str:
        """The token as it is written in templates; empty for None."""
        return "" if token_id is None else self._engine.id_to_token(token_id) or ""

    def spells_control_token(self, text: str) -> bool:
        return any(control in text for control in self._control_texts)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, without any token that is not in it.

        Control tokens spelled out in `text` stay ordinary text, so that a user cannot end the
        turn by typing `<|im_end|>`; `special=True` turns them into their ids, for the output of
        a chat template. UsageError when `text` holds a lone surrogate,
        BadInput when the vocabulary lacks what it needs for the text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text is not valid Unicode at character {error.start}", "pass UTF-8 text"
            ) from None
        self._engine.encode_special_tokens = not special
        with _engine_errors(self._source):
            return self._engine.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD, ids without a token nothing."""
        with _engine_errors(self._source):
            return self._engine.decode(list(ids), skip_special_tokens=skip_special)


class StreamDecoder:
    """Turns ids into text one at a time, holding back what may be half a character.

    `context`: the ids before the first pushed one, if they are text that it continues; some
    tokenizers drop the space at the very beginning of what they decode.

    The cost of a push does not grow with the number of tokens pushed: only the last printed
    piece and what is held back are decoded again.
    """

    def __init__(self, tokenizer: Tokenizer, *, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._printed = [id for id in context if id not in tokenizer.special_ids][-4:]
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that became certain with `token_id`; often empty, never half a character."""
        if token_id in self._tokenizer.special_ids:
            return self.flush()
        self._held.append(token_id)
        text = self._text_of_held()
        if not text.endswith(_REPLACEMENT):
            return self._print(len(self._held), text)
        if len(self._held) < _MAX_HELD_TOKENS:
            return ""
        return self._give_up(text)

    def flush(self) -> str:
        """What is still held back, as it is. Call it once after the last push."""
        return self._print(len(self._held), self._text_of_held())

    def _text_of_held(self) -> str:
        before = self._tokenizer.decode(self._printed)
        text = self._tokenizer.decode(self._printed + self._held)
        if text.startswith(before):
            return text[len(before) :]
        return self._tokenizer.decode(self._held)

    def _print(self, count: int, text: str) -> str:
        # What decodes to nothing cannot stand in for the text before the next token.
        self._printed = self._held[:count] if text else (self._printed + self._held)[-4:]
        self._held = self._held[count:]
        return text

    def _give_up(self, text: str) -> str:
        """Prints garbage, but keeps up to three last tokens that may begin a character."""
        for kept in (3, 2, 1):
            tail = self._tokenizer.decode(self._held[-kept:])
            head = text.removesuffix(tail)
            if head + tail == text and self._tokenizer.decode(self._held[:-kept]) == head:
                return self._print(len(self._held) - kept, head)
        return self._print(len(self._held), text)


@contextmanager
def _engine_errors(source: str) -> Iterator[None]:
    """Turns what the Rust package raises about the file `source` into BadInput."""
    try:
        yield
    except BaseException as error:
        # a panic in Rust arrives as a BaseException whose type cannot be imported; all others that
        # are no Exception, as those of signals, are not about the file
        panic = type(error).__name__ == "PanicException"
        if isinstance(error, MemoryError) or not (panic or isinstance(error, Exception)):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise BadInput(f"{source} is not a usable tokenizer: {reason}", _DOWNLOAD_AGAIN) from None


@contextmanager
def _without_panics() -> Iterator[None]:
    """The engine's Rust also prints where it panicked, some lines: what is wrong we say in one."""
    with ExitStack() as undo:
        # to find out where it was takes memory, and hangs where there is none
        os.environ["RUST_BACKTRACE"] = "0"
        with suppress(OSError):  # a closed stderr
            kept = os.dup(2)
            undo.callback(os.close, kept)
            undo.callback(os.dup2, kept, 2)
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), 2)
        yield


def _bos_of_template(engine: Engine) -> int | None:
    """The id that the tokenizer's own post-processor puts before a text, if any."""
    encoding = engine.encode("a", add_special_tokens=True)
    return encoding.ids[0] if encoding.special_tokens_mask[:1] == [1] else None


def _id_of(engine: Engine, token: Any) -> int | None:
    """The id of a token that tokenizer_config.json gives as a string or as {"content": string}."""
    content = token.get("content") if isinstance(token, dict) else token
    return engine.token_to_id(content) if isinstance(content, str) else None


def _require_bounded(document: Mapping[str, Any], source: str) -> None:
    """Raises UnsupportedModel for steps that multiply a text: forty that replace `a` by `aa` make a
    terabyte of one letter, and the engine then ends the whole process.

    What is malformed in other ways is left to the engine to refuse.
    """
    for part in _PARTS:
        growth, maps = 1, 0
        for step in _objects(document.get(part)):
            growth *= _growth(step)
            maps += step.get("type") == "Precompiled"  # replaces by texts as long as its own table
            if growth > MOST_GROWTH or maps > 1:
                raise UnsupportedModel(
                    f"{source}: its {part} makes a text more than {MOST_GROWTH} times as long",
                    "get this model from another place",
                )


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """All JSON objects in `value`; without recursion, which hostile nesting would exhaust."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left += value.values()
        elif isinstance(value, list):
            left += value


def _growth(step: Mapping[str, Any]) -> int:
    kind = step.get("type")
    if kind == "Replace":
        return _replaced(step.get("pattern"), step.get("content"))
    if kind == "Prepend":
        return 1 + _length(step.get("prepend"))
    if kind == "TemplateProcessing":
        tokens = [_length(t.get("ids")) for t in _objects(step.get("special_tokens")) if "ids" in t]
        return max(1, _length(step.get("single"))) * max([1, *tokens])
    return _GROWTH.get(kind, 1) if isinstance(kind, str) else 1


def _replaced(pattern: Any, content: Any) -> int:
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return max(1, -(-_length(content) // len(literal)))
    return 1 + _length(content)  # an expression may match between all letters


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list) else 0
