"""tokenizer.json for a sentencepiece vocabulary, from a `tokenizer.model` or a GGUF file.

Only what comes out token for token as sentencepiece itself would have it is converted: BPE without
rules that rewrite the text. Everything else is refused by name.
Knows nothing about how either file is laid out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from m2c.bundle.strict import parse_object
from m2c.errors import BadInput, UnsupportedModel
from m2c.spm_file import BPE, MODEL_TYPES, SpmFile, read_spm

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE: Final = "▁"
_MAX_PIECE: Final = 1024  # letters: a piece is cut at each of them, and trainers stop far below
_MAX_LETTERS: Final = 1 << 22  # of all pieces: the largest published vocabulary has 2 million
_MAX_MERGES: Final = 1 << 20  # of which it has 580,000, of 5 million letters
_AGAIN = "fetch the file again from where the model came from"
_OTHER_FILE = (
    "get a version of this model that has a tokenizer.json, or make one: "
    "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of the transformers package"
)


@dataclass(frozen=True)
class Vocabulary:
    """`kinds`: values of `spm_file`. `dummy_prefix`: a text begins as if with a space.

    `more`: (text, whether it is a control token) of the ids after the pieces.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    dummy_prefix: bool
    source: str
    more: Sequence[tuple[str, bool]] = ()


def convert_tokenizer_model(
    data: bytes, *, source: str, config: bytes | None = None, added: bytes | None = None
) -> tuple[bytes, bytes]:
    """(tokenizer.json, tokenizer_config.json) for the bytes of a tokenizer.model.

    `config`, `added`: the tokenizer_config.json and added_tokens.json beside it. They may make a
    piece a control token and add tokens. UnsupportedModel for what cannot be converted exactly.
    """
    file = read_spm(data, source)
    _refuse_inexact(file, source)
    settings = {} if config is None else parse_object(config, f"config of {source}")
    listed = {} if added is None else parse_object(added, f"added_tokens.json of {source}")
    tokens = _added_tokens(settings, listed, source)
    kinds, more = _with_added(file, tokens, source)
    vocabulary = Vocabulary(file.pieces, file.scores, kinds, file.dummy_prefix, source, more)
    filled = {"add_bos_token": True} | settings
    for role, id in (("bos_token", file.bos_id), ("eos_token", file.eos_id)):
        if 0 <= id < len(file.pieces):
            filled.setdefault(role, file.pieces[id])
    return build_spm(vocabulary), json.dumps(filled, ensure_ascii=False, sort_keys=True).encode()


def build_spm(vocabulary: Vocabulary) -> bytes:
    """A tokenizer.json for a BPE vocabulary; the same vocabulary gives the same bytes."""
    _check(vocabulary)
    ids = {piece: id for id, piece in enumerate(vocabulary.pieces)}
    has_bytes = BYTE in vocabulary.kinds
    unknown = [
        piece
        for piece, kind in zip(vocabulary.pieces, vocabulary.kinds, strict=True)
        if kind == UNKNOWN
    ]
    # with a token for every byte nothing is unknown, and GGUF files call the token a control one
    if len(unknown) != 1 and not (has_bytes and not unknown):
        raise BadInput(f"{vocabulary.source}: {len(unknown)} unknown tokens", _AGAIN)
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    unescape = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    normalizer: dict[str, Any] = escape
    decoders: list[dict[str, Any]] = [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if vocabulary.dummy_prefix:
        prefix = {"type": "Prepend", "prepend": SPACE}
        normalizer = {"type": "Sequence", "normalizers": [prefix, escape]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_entries(vocabulary),
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown[0] if unknown else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": has_bytes,
            "ignore_merges": False,
            "vocab": ids,
            "merges": _merges(vocabulary),
        },
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to join two pieces into one, best score first.

    Sentencepiece joins the neighbours whose piece has the best score, the leftmost of equals; so
    pieces of equal score have no order here.
    """
    pieces = vocabulary.pieces
    normal = {piece: id for id, piece in enumerate(pieces) if vocabulary.kinds[id] == NORMAL}
    if sum(map(len, normal)) > _MAX_LETTERS:
        raise BadInput(f"{vocabulary.source}: tokens of more than {_MAX_LETTERS} letters", _AGAIN)
    found: list[tuple[float, int, int, str, str]] = []
    products: dict[float, str] = {}
    letters = 0
    for piece, id in normal.items():
        score = vocabulary.scores[id]
        begun = len(found)
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                found.append((-score, normal[left], normal[right], left, right))
            elif _is_part(left, normal) and _is_part(right, normal):
                raise _inexact(vocabulary.source, f"{piece!r} has letters that are no tokens")
        letters += len(piece) * (len(found) - begun)
        if len(found) > _MAX_MERGES or letters > 4 * _MAX_LETTERS:
            raise BadInput(f"{vocabulary.source}: too many ways to join its tokens", _AGAIN)
        if len(found) > begun and products.setdefault(score, piece) != piece:
            raise _inexact(vocabulary.source, f"{products[score]!r} and {piece!r} score the same")
    found.sort()
    return [(left, right) for *_, left, right in found]


def _is_part(text: str, normal: Mapping[str, int]) -> bool:
    return len(text) == 1 or text in normal


def _added_entries(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    found = [
        (id, piece, kind != USER_DEFINED)
        for id, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    start = len(vocabulary.pieces)
    found += [(start + i, text, control) for i, (text, control) in enumerate(vocabulary.more)]
    return [
        {
            "id": id,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            # user-defined tokens of spaces are found in the text whose spaces are escaped; with a
            # prefix the token's own text would get one too
            "normalized": not special and not vocabulary.dummy_prefix,
            "special": special,
        }
        for id, text, special in found
    ]


def _check(vocabulary: Vocabulary) -> None:
    pieces, source = vocabulary.pieces, vocabulary.source
    if not len(pieces) == len(vocabulary.scores) == len(vocabulary.kinds):
        raise BadInput(f"{source}: pieces, scores and types do not match", _AGAIN)
    texts = [*pieces, *(text for text, _ in vocabulary.more)]
    if len(set(texts)) != len(texts) or "" in texts:
        raise BadInput(f"{source}: a token is empty or there twice", _AGAIN)
    if any(len(text) > _MAX_PIECE for text in texts):
        raise BadInput(f"{source}: a token of more than {_MAX_PIECE} letters", _AGAIN)
    if not all(map(math.isfinite, vocabulary.scores)):
        raise BadInput(f"{source}: a score is not a number", _AGAIN)
    listed = list(zip(pieces, vocabulary.kinds, strict=True))
    if odd := next((kind for _, kind in listed if not NORMAL <= kind <= BYTE), None):
        raise BadInput(f"{source}: a token of the type {odd}", _AGAIN)
    spelled = {piece for piece, kind in listed if kind == BYTE}
    if spelled and spelled != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise BadInput(f"{source}: the tokens for bytes are not the 256 there are", _AGAIN)
    if any(len(piece) == 1 and kind in (CONTROL, UNKNOWN) for piece, kind in listed):
        raise BadInput(f"{source}: a control token of one letter", _AGAIN)


def _refuse_inexact(file: SpmFile, source: str) -> None:
    if file.model_type != BPE:
        kind = MODEL_TYPES.get(file.model_type, str(file.model_type))
        raise _inexact(source, f"it is a {kind} vocabulary, and only BPE can be converted")
    for reason, found in {
        "it rewrites the text by a table of rules": file.has_rules,
        "it removes white space": file.removes_whitespace,
        "it does not escape spaces": not file.escapes_whitespace,
        "it puts spaces at the end of words": file.whitespace_as_suffix,
        "it is cut to a smaller vocabulary": UNUSED in file.kinds,
        "it has user-defined tokens and a space before the text": (
            file.dummy_prefix and USER_DEFINED in file.kinds
        ),
    }.items():
        if found:
            raise _inexact(source, reason)


def _added_tokens(
    settings: Mapping[str, Any], listed: Mapping[str, Any], source: str
) -> dict[int, tuple[str, bool]]:
    """id -> (text, whether it is a control token), from the two JSON files."""
    found: dict[int, tuple[str, bool]] = {}
    for text, id in listed.items():
        if type(id) is not int or id < 0:
            raise BadInput(f"added_tokens.json of {source}: {text[:80]!r} has no id", _AGAIN)
        found[id] = (text, True)
    decoder = settings.get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, dict) else {}).items():
        content = token.get("content") if isinstance(token, dict) else None
        if not key.isdecimal() or len(key) > 9 or not isinstance(content, str):
            raise BadInput(f"config of {source}: added_tokens_decoder[{key[:80]!r}]", _AGAIN)
        found[int(key)] = (content, bool(token.get("special", True)))
    return found


def _with_added(
    file: SpmFile, tokens: Mapping[int, tuple[str, bool]], source: str
) -> tuple[list[int], list[tuple[str, bool]]]:
    """(kinds of the pieces, tokens after them)."""
    kinds: list[int] = list(file.kinds)
    more: list[tuple[str, bool]] = []
    for id, (text, control) in sorted(tokens.items()):
        if id < len(kinds):
            if file.pieces[id] != text:
                raise BadInput(f"{source}: token {id} is not {text[:80]!r}, as it says beside it")
            if control and kinds[id] in (NORMAL, USER_DEFINED):
                kinds[id] = CONTROL
        elif id == len(kinds) + len(more):
            more.append((text, control))
        else:
            raise BadInput(f"{source}: no token comes before the added {text[:80]!r}, id {id}")
    return kinds, more


def _inexact(source: str, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"{source} cannot be converted exactly: {reason}", _OTHER_FILE)
