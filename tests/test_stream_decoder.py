"""tokenizer.StreamDecoder: never half a character, never a lost space, bounded cost."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import HOSTILE, small_metadata, small_tokenizer, smollm, spm_tokenizer

from m2c.tokenizer import StreamDecoder, Tokenizer
from m2c.tokenizer_gguf import build_from_gguf


def stream(tokenizer: Tokenizer, ids: list[int], context: tuple[int, ...] = ()) -> list[str]:
    decoder = StreamDecoder(tokenizer, context=context)
    return [*(decoder.push(id) for id in ids), decoder.flush()]


@pytest.mark.parametrize("text", [text for text in HOSTILE if len(text) < 100])
def test_streaming_never_prints_half_a_character(text: str) -> None:
    for tokenizer in (small_tokenizer(), smollm()):
        pieces = stream(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)


@given(st.lists(st.integers(0, 260), max_size=60))
@settings(max_examples=200, deadline=None)
def test_streaming_any_ids_gives_what_decoding_them_gives(ids: list[int]) -> None:
    tokenizer = small_tokenizer()
    # a control token may cut a character in two; the decoder prints what there was
    ids = [id for id in ids if id > 1]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_after_garbage_survives() -> None:
    tokenizer = small_tokenizer()
    garbage = [2 + 0x98] * 50
    emoji = tokenizer.encode("🧿")
    pieces = stream(tokenizer, garbage + emoji + garbage + emoji)
    assert "".join(pieces) == "\ufffd" * 50 + "🧿" + "\ufffd" * 50 + "🧿"


def test_streaming_waits_no_longer_than_needed() -> None:
    tokenizer = small_tokenizer()
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(id) for id in tokenizer.encode("a€b")] == ["a", "", "", "€", "b"]
    assert decoder.flush() == ""


def test_flush_prints_an_unfinished_character() -> None:
    tokenizer = small_tokenizer()
    assert stream(tokenizer, tokenizer.encode("a€")[:-1])[-1] == "\ufffd"


def test_cost_of_a_push_does_not_grow() -> None:
    class Counting(Tokenizer):
        longest = 0

        def decode(self, ids: Any, *, skip_special: bool = True) -> str:
            ids = list(ids)
            Counting.longest = max(Counting.longest, len(ids))
            return super().decode(ids, skip_special=skip_special)

    tokenizer = Counting.from_json(build_from_gguf(small_metadata()), source="test")
    stream(tokenizer, tokenizer.encode("he said 🧿 " * 50) + [2 + 0x98] * 200 + [1] * 50)
    assert 0 < Counting.longest <= 32


def test_spaces_survive_where_the_tokenizer_drops_the_first_one() -> None:
    tokenizer = spm_tokenizer()
    prompt, answer = tokenizer.encode("a"), [4, 5, 4]
    assert tokenizer.decode(answer) == "world b world"
    assert "".join(stream(tokenizer, answer, tuple(prompt))) == " world b world"
    assert "".join(stream(tokenizer, [4, 1, 5])) == "world b"


def test_byte_fallback_is_held_back_until_complete() -> None:
    tokenizer = spm_tokenizer()
    assert stream(tokenizer, tokenizer.encode("a€😀a")) == [
        "", "a", "", "", "€", "", "", "", "😀", "a", "",
    ]  # fmt: skip
