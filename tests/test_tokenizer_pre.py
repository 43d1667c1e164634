"""tokenizer_gguf.py: hostile texts are cut into words as the models' own tokenizers cut them.

The words were compared with llama.cpp's ids where it computes the same expression; what it only
approximates (gpt-4o, tekken) is marked. Published vocabularies of these kinds were compared too.
"""

import pytest
from tokenizers import Tokenizer as Engine
from vocabularies import small_metadata

from m2c.tokenizer_gguf import PRE_TOKENIZERS, build_from_gguf, build_tokenizer_config

TEXTS = (
    "I'll they'VE don't I'\u017ft",
    "HelloWorld WORLDs \xe9lan\xc9tat \u0142\u1e9e",
    "12345 a1 \u0967\u0968\u0969\u096a \xb2\xbd",
    "  two \n\n three\t\r\nend  ",
    "a.b/\n/c //\nd",
    "e\u0301a \u0939\u093f\u0928\u094d\u0926\u0940's",
    "\u65e5\u672c\u3001\u30c6\u30b9\u3002\ud55c\uad6d a\xa0\u3000b\u2028c",
    "--> $5.00 `x`!",
)
# words of TEXTS between bars, by the first name of each kind
WORDS = {
    "gpt-2": (
        "I|'ll| they|'|VE| don|'t| I|'|\u017ft",
        "HelloWorld| WORLDs| \xe9lan\xc9tat| \u0142\u1e9e",
        "12345| a|1| \u0967\u0968\u0969\u096a| \xb2\xbd",
        " | two| \n\n| three|\t\r|\n|end|  ",
        "a|.|b|/|\n|/|c| //|\n|d",
        "e|\u0301|a| \u0939|\u093f|\u0928|\u094d|\u0926|\u0940'|s",
        "\u65e5\u672c|\u3001|\u30c6\u30b9|\u3002|\ud55c\uad6d| a|\xa0|\u3000|b|\u2028|c",
        "-->| $|5|.|00| `|x|`!",
    ),
    "smollm": (
        "I|'ll| they|'|VE| don|'t| I|'|\u017ft",
        "HelloWorld| WORLDs| \xe9lan\xc9tat| \u0142\u1e9e",
        "1|2|3|4|5| a|1| |\u0967|\u0968|\u0969|\u096a| |\xb2|\xbd",
        " | two| \n\n| three|\t\r|\n|end|  ",
        "a|.|b|/|\n|/|c| //|\n|d",
        "e|\u0301|a| \u0939|\u093f|\u0928|\u094d|\u0926|\u0940'|s",
        "\u65e5\u672c|\u3001|\u30c6\u30b9|\u3002|\ud55c\uad6d| a|\xa0|\u3000|b|\u2028|c",
        "-->| $|5|.|0|0| `|x|`!",
    ),
    "qwen2": (
        "I|'ll| they|'VE| don|'t| I|'\u017f|t",
        "HelloWorld| WORLDs| \xe9lan\xc9tat| \u0142\u1e9e",
        "1|2|3|4|5| a|1| |\u0967|\u0968|\u0969|\u096a| |\xb2|\xbd",
        " | two| \n\n| three|\t\r\n|end|  ",
        "a|.b|/\n|/c| //\n|d",
        "\xe9a| \u0939|\u093f\u0928|\u094d\u0926|\u0940'|s",
        "\u65e5\u672c|\u3001\u30c6\u30b9|\u3002\ud55c\uad6d| a|\xa0|\u3000b|\u2028c",
        "-->| $|5|.|0|0| `|x|`!",
    ),
    "llama-bpe": (
        "I|'ll| they|'VE| don|'t| I|'\u017f|t",
        "HelloWorld| WORLDs| \xe9lan\xc9tat| \u0142\u1e9e",
        "123|45| a|1| |\u0967\u0968\u0969|\u096a| |\xb2\xbd",
        " | two| \n\n| three|\t\r\n|end|  ",
        "a|.b|/\n|/c| //\n|d",
        "e|\u0301a| \u0939|\u093f\u0928|\u094d\u0926|\u0940'|s",
        "\u65e5\u672c|\u3001\u30c6\u30b9|\u3002\ud55c\uad6d| a|\xa0|\u3000b|\u2028c",
        "-->| $|5|.|00| `|x|`!",
    ),
    "gpt-4o": (
        "I'll| they'VE| don't| I'\u017f|t",
        "Hello|World| WORLDs| \xe9lan|\xc9tat| \u0142|\u1e9e",
        "123|45| a|1| |\u0967\u0968\u0969|\u096a| |\xb2\xbd",
        " | two| \n\n| three|\t\r\n|end|  ",
        "a|.b|/\n/|c| //\n|d",
        "e\u0301a| \u0939\u093f\u0928\u094d\u0926\u0940's",
        "\u65e5\u672c|\u3001\u30c6\u30b9|\u3002\ud55c\uad6d| a|\xa0|\u3000b|\u2028c",
        "-->| $|5|.|00| `|x|`!",
    ),
    "tekken": (
        "I|'ll| they|'VE| don|'t| I|'\u017ft",
        "Hello|World| WORLDs| \xe9lan|\xc9tat| \u0142|\u1e9e",
        "1|2|3|4|5| a|1| |\u0967|\u0968|\u0969|\u096a| |\xb2|\xbd",
        " | two| \n\n| three|\t\r\n|end|  ",
        "a|.b|/\n/|c| //\n|d",
        "e\u0301a| \u0939\u093f\u0928\u094d\u0926\u0940|'s",
        "\u65e5\u672c|\u3001\u30c6\u30b9|\u3002\ud55c\uad6d| a|\xa0|\u3000b|\u2028c",
        "-->| $|5|.|0|0| `|x|`!",
    ),
    "seed-coder": (
        "I|'ll| they|'VE| don|'t| I|'\u017f|t",
        "HelloWorld| WORLDs| \xe9lan\xc9tat| \u0142\u1e9e",
        "1|2|3|4|5| a|1| |\u0967|\u0968|\u0969|\u096a| |\xb2|\xbd",
        " | two| \n\n| three|\t\r\n|end|  ",
        "a|.b|/|\n|/c| //|\n|d",
        "e|\u0301a| \u0939|\u093f\u0928|\u094d\u0926|\u0940'|s",
        "\u65e5\u672c|\u3001\u30c6\u30b9|\u3002\ud55c\uad6d| a|\xa0|\u3000b|\u2028c",
        "-->| $|5|.|0|0| `|x|`!",
    ),
    "deepseek-llm": (
        "I|'|ll| they|'|VE| don|'|t| I|'|\u017f|t",
        "HelloWorld| WORLDs| \xe9|lan|\xc9|tat| \u0142|\u1e9e",
        "1|2|3|4|5| a|1| |\u0967|\u0968|\u0969|\u096a| |\xb2|\xbd",
        " | two| |\n|\n| three|\t|\r|\n|end|  ",
        "a|.|b|/|\n|/|c| //|\n|d",
        "e|\u0301|a| |\u0939\u093f\u0928\u094d\u0926\u0940|'|s",
        "\u65e5\u672c|\u3001|\u30c6\u30b9|\u3002|\ud55c\uad6d| a|\xa0|\u3000|b|\u2028|c",
        "-->| $|5|.|0|0| `|x|`!",
    ),
    "deepseek-coder": (
        "I|'|ll| they|'|VE| don|'|t| I|'|\u017ft",
        "HelloWorld| WORLDs| \xe9lan\xc9tat| \u0142|\u1e9e",
        "1|2|3|4|5| a|1| |\u0967|\u0968|\u0969|\u096a| |\xb2|\xbd",
        " | two| |\n|\n| three|\t|\r|\n|end|  ",
        "a|.|b|/|\n|/|c| //|\n|d",
        "e|\u0301|a| |\u0939|\u093f|\u0928|\u094d|\u0926|\u0940|'|s",
        "\u65e5\u672c|\u3001|\u30c6\u30b9|\u3002|\ud55c\uad6d| a|\xa0|\u3000|b|\u2028|c",
        "--|> $|5|.|0|0| `|x|`|!",
    ),
}
SAME = {
    "qwen2": "deepseek-r1-qwen megrez stablelm2",
    "llama-bpe": "llama3 llama-v3 falcon3 pixtral midm-2.0 dbrx smaug-bpe",
    "smollm": "minerva-7b refact starcoder",
}
KINDS = {name: first for first, names in SAME.items() for name in names.split()}


def words(name: str, text: str) -> str:
    engine = Engine.from_str(build_from_gguf(small_metadata(name)).decode())
    if engine.normalizer is not None:
        text = engine.normalizer.normalize_str(text)
    cut = engine.pre_tokenizer
    assert cut is not None
    return "|".join(text[start:end] for _, (start, end) in cut.pre_tokenize_str(text))


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS.keys() - {"falcon", "olmo"}))
def test_words_of_hostile_texts(name: str) -> None:
    expected = WORDS[KINDS.get(name, name)]
    assert [words(name, text) for text in TEXTS] == [*expected]


def test_olmo_cuts_as_gpt2_what_was_composed_first() -> None:
    assert words("gpt-2", "e\u0301a") == "e|\u0301|a"
    assert words("olmo", "e\u0301a") == "\u00e9a"


def test_what_llama_cpp_approximates_is_as_in_the_models_tokenizer() -> None:
    """It takes marks for no letters here, and letters beyond ASCII for both cases at once."""
    for name in ("gpt-4o", "tekken"):
        assert words(name, "\u0926\u0940") == "\u0926\u0940"
        assert words(name, "\u0142\u1e9e") == "\u0142|\u1e9e"
        assert words(name, "\u093f\n") == "\u093f|\n"


def test_which_models_take_whole_words_and_begin_with_bos() -> None:
    """As llama.cpp knows it by name; other files have to say that bos is added."""
    found = {name for name in PRE_TOKENIZERS if PRE_TOKENIZERS[name].whole_words}
    assert found == {*SAME["llama-bpe"].split(), "llama-bpe", "tekken"} - {"dbrx", "smaug-bpe"}
    for name in PRE_TOKENIZERS:
        metadata = small_metadata(name)
        assert (b'"ignore_merges":true' in build_from_gguf(metadata)) == (name in found)
        assert (b'"add_bos_token": true' in build_tokenizer_config(metadata)) == (name in found)
    silent = small_metadata("tekken", add_bos_token=False)
    assert b'"add_bos_token": false' in build_tokenizer_config(silent)
