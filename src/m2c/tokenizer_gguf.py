"""tokenizer.json and tokenizer_config.json for a GGUF file, which has neither.

Knows nothing about GGUF's bytes (it is given the metadata as a dict) nor about tokenizing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from m2c.errors import BadInput, UnsupportedModel
from m2c.tokenizer_bpe import added_token, bpe_json, byte_level
from m2c.tokenizer_spm import CONTROL, UNUSED, USER_DEFINED, Vocabulary, build_spm

_DOWNLOAD_AGAIN = "fetch the GGUF file again from where it came from"
_BRING_TOKENIZER = "put the tokenizer.json of the original model beside it"

_BPE, _SPM = "gpt2", "llama"  # values of tokenizer.ggml.model; gemma files say llama too


# How a text is cut into words, by llama.cpp's names; the expressions are those of the models' own
# tokenizer.json. Where llama.cpp approximates these its ids differ: tests/test_tokenizer_pre.py has
# such texts.


@dataclass(frozen=True)
class PreTokenizer:
    """steps: parts of a tokenizer.json, in order."""

    steps: tuple[Mapping[str, Any], ...]
    composed: bool = False  # the text is first brought to composed characters (NFC)
    # a word that is a token becomes that token, even if no sequence of merges reaches it; of such
    # models llama.cpp adds bos even where the file does not say so
    whole_words: bool = False

    def pipeline(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """(normalizer, pre-tokenizer) of a tokenizer.json."""
        steps = [dict(step) for step in self.steps]
        found = {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]
        return {"type": "NFC"} if self.composed else None, found


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def _digits(*, individual: bool) -> dict[str, Any]:
    return {"type": "Digits", "individual_digits": individual}


def _of(ranges: str) -> str:
    """A class of characters for a regular expression, from code points in hex."""
    points = (part.split("-") for part in ranges.split())
    return f"[{''.join('-'.join(chr(int(point, 16)) for point in part) for part in points)}]"


_BYTE_LEVEL: Final = byte_level()
_GPT2: Final = byte_level(use_regex=True)
_EACH_DIGIT: Final = _digits(individual=True)
_ENDS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # of English words
_SYMBOLS: Final = r"| ?[^\s\p{L}\p{N}]+"
_SPACES: Final = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
# words of cl100k (GPT-4) and of all that took after it, but for how many digits are one word
_CL100K: Final = _ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_LLAMA3: Final = _CL100K + "{1,3}" + _SYMBOLS + r"[\r\n]*" + _SPACES
_QWEN2: Final = _CL100K + _SYMBOLS + r"[\r\n]*" + _SPACES
# those of o200k (GPT-4o) end before an upper-case letter, and marks are parts of them
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST: Final = r"[^\r\n\p{L}\p{N}]?"
_TAIL: Final = _SYMBOLS + r"[\r\n/]*" + _SPACES
_TEKKEN: Final = rf"{_FIRST}{_UPPER}*{_LOWER}+|{_FIRST}{_UPPER}+{_LOWER}*|\p{{N}}" + _TAIL
_O200K: Final = (
    rf"{_FIRST}{_UPPER}*{_LOWER}+{_ENDS}?|{_FIRST}{_UPPER}+{_LOWER}*{_ENDS}?|\p{{N}}{{1,3}}" + _TAIL
)
# DeepSeek's first tokenizers list characters; here by code point, as an editor that composes
# characters would change some
_CASED: Final = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 "
    "388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD "
    "1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D "
    "1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 "
    "1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE "
    "2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 "
    "FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 "
    "118A0-118DF 1E900-1E943"
)  # letters that have a case
_MARKS: Final = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"  # letters too: so it is
_EAST_ASIAN: Final = "4E00-9FA5 800-4E00 AC00-D7FF"
_DEEPSEEK_END: Final = (_split(_of(_EAST_ASIAN) + "+"), _EACH_DIGIT, _BYTE_LEVEL)

_BY_NAMES: Final = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "olmo": PreTokenizer((_GPT2,), composed=True),
    "smollm minerva-7b refact starcoder": PreTokenizer((_EACH_DIGIT, _GPT2)),
    "qwen2 deepseek-r1-qwen megrez stablelm2": PreTokenizer((_split(_QWEN2), _BYTE_LEVEL), True),
    "llama-bpe llama3 llama-v3 falcon3 pixtral midm-2.0": PreTokenizer(
        (_split(_LLAMA3), _BYTE_LEVEL), whole_words=True
    ),
    "dbrx smaug-bpe": PreTokenizer((_split(_LLAMA3), _BYTE_LEVEL)),
    "gpt-4o": PreTokenizer((_split(_O200K), _BYTE_LEVEL)),
    "tekken": PreTokenizer((_split(_TEKKEN), _BYTE_LEVEL), whole_words=True),
    "seed-coder": PreTokenizer((_split(_CL100K + _SYMBOLS + _SPACES), _BYTE_LEVEL)),
    # runs of punctuation apart, then GPT-2's words, digits three by three
    "falcon": PreTokenizer((
        {"type": "Punctuation", "behavior": "Contiguous"}, _GPT2, _digits(individual=False),
        _split("[0-9][0-9][0-9]"),
    )),
    "deepseek-llm": PreTokenizer((
        _split("[\r\n]"), _split(rf"\s?{_of(_CASED)}+"), _split(rf"\s?{_of(_MARKS)}+"),
        _split(r"\s+$"), *_DEEPSEEK_END,
    )),
    "deepseek-coder": PreTokenizer((
        _split("[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), *_DEEPSEEK_END,
    )),
}  # fmt: skip
PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = {
    name: pre_tokenizer for names, pre_tokenizer in _BY_NAMES.items() for name in names.split()
}


def build_from_gguf(metadata: dict[str, Any]) -> bytes:
    """A tokenizer.json made from GGUF metadata; the same metadata gives the same bytes.

    UnsupportedModel when the vocabulary is neither byte-level BPE nor sentencepiece, or its
    pre-tokenizer is not known here, BadInput when the metadata contradicts itself.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == _SPM:
        return build_spm(_spm_vocabulary(metadata))
    if kind != _BPE:
        raise UnsupportedModel(
            f"the GGUF file holds a {repr(kind)[:40]} vocabulary, and only {_BPE!r} (byte-level "
            f"BPE) and {_SPM!r} (sentencepiece BPE) can be rebuilt",
            _BRING_TOKENIZER,
        )
    cut = _pre_tokenizer(metadata.get("tokenizer.ggml.pre"))
    normalizer, pre_tokenizer = cut.pipeline()
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise BadInput("tokenizer.ggml.tokens names a token twice", _DOWNLOAD_AGAIN)
    return bpe_json(
        vocab, _strings(metadata, "tokenizer.ggml.merges"),
        _added_tokens(tokens, metadata.get("tokenizer.ggml.token_type")),
        normalizer=normalizer, pre_tokenizer=pre_tokenizer,
        ignore_merges=cut.whole_words, hint=_DOWNLOAD_AGAIN,
    )  # fmt: skip


def build_tokenizer_config(metadata: dict[str, Any]) -> bytes:
    """A tokenizer_config.json made from GGUF metadata: bos, eos, whether to add bos, template."""
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    # llama.cpp adds bos for these models even where the file does not say so
    kind = metadata.get("tokenizer.ggml.model")
    cut = PRE_TOKENIZERS.get(str(metadata.get("tokenizer.ggml.pre")))
    implied = kind == _SPM or (cut is not None and cut.whole_words)
    config: dict[str, Any] = {
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", implied))
    }
    for role in ("bos", "eos"):
        id = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if id is None:
            continue
        if type(id) is not int or not 0 <= id < len(tokens):  # True is an int too
            raise BadInput(f"tokenizer.ggml.{role}_token_id is {repr(id)[:40]}: no such token")
        config[f"{role}_token"] = tokens[id]
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True).encode()


def _pre_tokenizer(name: Any) -> PreTokenizer:
    found = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if found is None:
        raise UnsupportedModel(
            f"the GGUF file's pre-tokenizer {repr(name)[:40]} is not one of "
            f"{', '.join(PRE_TOKENIZERS)}",
            _BRING_TOKENIZER,
        )
    return found


def _spm_vocabulary(metadata: dict[str, Any]) -> Vocabulary:
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    scores = _numbers(metadata, "tokenizer.ggml.scores", float, len(tokens))
    kinds = _numbers(metadata, "tokenizer.ggml.token_type", int, len(tokens))
    # what fills a vocabulary up is never a part of a text, so it is one of its control tokens
    kinds = [CONTROL if kind == UNUSED else kind for kind in kinds]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return Vocabulary(tokens, scores, kinds, prefix, "the GGUF file's vocabulary")


def _numbers(metadata: dict[str, Any], key: str, kind: type, count: int) -> list[Any]:
    values = metadata.get(key)
    fits = isinstance(values, list) and len(values) == count
    if not fits or any(type(value) is not kind for value in values or ()):
        raise BadInput(f"{key} does not match the tokens", _DOWNLOAD_AGAIN)
    return list(values or ())


def _strings(metadata: dict[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadInput(f"the GGUF file has no list of strings under {key}", _DOWNLOAD_AGAIN)
    return values


def _added_tokens(tokens: list[str], types: Any) -> list[dict[str, Any]]:
    if not isinstance(types, list) or len(types) != len(tokens):
        raise BadInput("tokenizer.ggml.token_type does not match the tokens", _DOWNLOAD_AGAIN)
    return [
        added_token(token, id, special=kind == CONTROL)
        for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
