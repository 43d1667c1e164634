"""How a byte-level BPE cuts a text into words, by the names that GGUF files have for it.

The names are llama.cpp's, the regular expressions those of the models' own tokenizer.json. Where
llama.cpp approximates these its ids differ from ours: tests/test_tokenizer_pre.py has such texts.
Knows nothing about GGUF or vocabularies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from m2c.tokenizer_bpe import byte_level


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


_BYTES: Final = byte_level()
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
_DEEPSEEK_END: Final = (_split(_of(_EAST_ASIAN) + "+"), _EACH_DIGIT, _BYTES)

_BY_NAMES: Final = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "olmo": PreTokenizer((_GPT2,), composed=True),
    "smollm minerva-7b refact starcoder": PreTokenizer((_EACH_DIGIT, _GPT2)),
    "qwen2 deepseek-r1-qwen megrez stablelm2": PreTokenizer((_split(_QWEN2), _BYTES), True),
    "llama-bpe llama3 llama-v3 falcon3 pixtral midm-2.0": PreTokenizer(
        (_split(_LLAMA3), _BYTES), whole_words=True
    ),
    "dbrx smaug-bpe": PreTokenizer((_split(_LLAMA3), _BYTES)),
    "gpt-4o": PreTokenizer((_split(_O200K), _BYTES)),
    "tekken": PreTokenizer((_split(_TEKKEN), _BYTES), whole_words=True),
    "seed-coder": PreTokenizer((_split(_CL100K + _SYMBOLS + _SPACES), _BYTES)),
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
