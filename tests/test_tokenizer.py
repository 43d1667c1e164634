"""tokenizer.py: round trips, control tokens, settings that must not apply, hostile files."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import HOSTILE, small_metadata, small_tokenizer, spm_tokenizer

from m2c.errors import BadInput, UsageError
from m2c.tokenizer import Tokenizer
from m2c.tokenizer_gguf import build_from_gguf


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
def test_round_trip(pre: str, text: str) -> None:
    tokenizer = small_tokenizer(pre)
    for special in (False, True):
        ids = tokenizer.encode(text, special=special)
        assert tokenizer.decode(ids, skip_special=False) == text


_ENDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {
    "phi-4": rf"{_ENDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
    "phi-4-mini": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
}


@pytest.mark.parametrize("shape", WORDS)
def test_a_tokenizer_json_shaped_like_that_of_phi4(shape: str) -> None:
    """Words by an expression of the model's own, control tokens that take the space around them."""
    document = json.loads(build_from_gguf(small_metadata("gpt-2")))
    split = {"type": "Split", "pattern": {"Regex": WORDS[shape]}, "behavior": "Removed",
             "invert": True}  # fmt: skip
    level = {**document["decoder"], "use_regex": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    document["post_processor"] = level
    for added in document["added_tokens"]:
        added |= {"lstrip": True, "rstrip": True}
    config = b'{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": false}'
    tokenizer = Tokenizer.from_json(json.dumps(document).encode(), source="test", config=config)
    for text in HOSTILE:
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (0, 1, False)
    assert tokenizer.encode("he <|im_end|> he", special=True) == [258, 1, 258]


def test_control_tokens_are_commands_only_when_asked() -> None:
    tokenizer = small_tokenizer()
    text = "he<|im_end|>he"
    assert tokenizer.encode(text, special=True) == [258, 1, 258]
    as_text = tokenizer.encode(text)
    assert not set(as_text) & tokenizer.special_ids
    assert tokenizer.decode(as_text) == text
    # the mode of one call does not leak into the next
    assert tokenizer.encode(text, special=True) == [258, 1, 258]
    assert tokenizer.decode([258, 1, 258]) == "hehe"
    assert tokenizer.decode([258, 1], skip_special=False) == "he<|im_end|>"


def test_user_defined_tokens_are_always_tokens() -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.encode("<think>") == [260]
    assert tokenizer.decode([260]) == "<think>"


def test_lone_surrogate_is_the_users_mistake() -> None:
    with pytest.raises(UsageError, match="character 1"):
        small_tokenizer().encode("a\udc80")


def test_saved_truncation_and_padding_do_not_apply() -> None:
    document = json.loads(build_from_gguf(small_metadata()))
    document["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    document["padding"] = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|im_start|>",
    }  # fmt: skip
    tokenizer = Tokenizer.from_json(json.dumps(document).encode(), source="test")
    assert len(tokenizer.encode("12345")) == 5


def test_bos_comes_from_the_config_or_else_from_the_template() -> None:
    assert (spm_tokenizer().bos_id, spm_tokenizer().add_bos) == (1, True)
    small = small_tokenizer()
    assert (small.bos_id, small.eos_id, small.add_bos) == (0, 1, False)
    data = build_from_gguf(small_metadata())
    for config, expected in (
        (b'{"bos_token": {"content": "<|im_end|>"}, "add_bos_token": true}', (1, True)),
        (b'{"bos_token": null, "add_bos_token": true}', (None, False)),
        (b"{}", (None, False)),
    ):
        tokenizer = Tokenizer.from_json(data, source="test", config=config)
        assert (tokenizer.bos_id, tokenizer.add_bos) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b'{"version": "1.0"}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a z"]}}',
        b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 99999999999}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}, "merges": []}}',
        b'{"model": {"type": "Pickle"}}',
        b'{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_malformed_files_are_bad_input(data: bytes) -> None:
    with pytest.raises(BadInput, match=r"some/tokenizer\.json"):
        Tokenizer.from_json(data, source="some/tokenizer.json")


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
@settings(max_examples=200)
def test_damaged_files_never_raise_anything_else(position: int, change: bytes) -> None:
    data = bytearray(build_from_gguf(small_metadata()))
    position %= len(data)
    data[position : position + len(change)] = change
    try:
        tokenizer = Tokenizer.from_json(bytes(data), source="tokenizer.json")
    except BadInput:
        return
    tokenizer.encode("he said 123")


def test_a_text_that_the_vocabulary_cannot_spell_is_bad_input() -> None:
    data = b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}}'
    tokenizer = Tokenizer.from_json(data, source="words.json")
    assert tokenizer.encode("a") == [0]
    with pytest.raises(BadInput, match=r"words\.json"):
        tokenizer.encode("b")


def test_malformed_config_is_bad_input() -> None:
    data = build_from_gguf(small_metadata())
    for config in (b"[]", b"{", b'{"a": 1, "a": 2}'):
        with pytest.raises(BadInput, match="config of test"):
            Tokenizer.from_json(data, source="test", config=config)


def test_the_first_difference_of_two_vocabularies_is_named() -> None:
    one, other = small_tokenizer(), spm_tokenizer()
    assert one.difference(small_tokenizer("gpt-2")) is None
    assert one.difference(other) == "id 0 is '<|im_start|>' in one and '<unk>' in the other"
    more = small_metadata()
    more["tokenizer.ggml.tokens"] = [*more["tokenizer.ggml.tokens"], "more"]
    more["tokenizer.ggml.token_type"] = [*more["tokenizer.ggml.token_type"], 1]
    longer = Tokenizer.from_json(build_from_gguf(more), source="longer")
    assert one.difference(longer) == "id 261 is no token in one and 'more' in the other"
