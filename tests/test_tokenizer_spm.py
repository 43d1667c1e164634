"""tokenizer.model: token for token what the sentencepiece package says, or a refusal by name."""

import io
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import BYTE_PIECES, HOSTILE, llama_pieces, spm_metadata, spm_model

from m2c import spm_file
from m2c.data import calibration_text
from m2c.errors import BadInput, UnsupportedModel
from m2c.prompt import chat_ids, raw_ids
from m2c.tokenizer import Tokenizer
from m2c.tokenizer_gguf import build_from_gguf, build_tokenizer_config
from m2c.tokenizer_spm import convert_tokenizer_model

GEMMA = {
    "add_dummy_prefix": False,
    "user_defined_symbols": ["<td>", "▁▁", "▁▁▁", "▁▁▁▁▁▁▁", "\n", "\n\n"],
    "control_symbols": ["<start_of_turn>", "<end_of_turn>"],
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "whole lines": {"split_by_whitespace": False, "split_by_unicode_script": False},
    "gemma": GEMMA,
    "no bytes": {"byte_fallback": False},
}
PARTS = [
    "a", "b", "aa", "ab", "the", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "▁", "▁▁", "\0", "Z",
    "123", "<s>", "</s>", "<unk>", "<0x41>", "<td>", "<end_of_turn>", "e\u0301", "é",
    "👩‍👩‍👧", "日本",
]  # fmt: skip


@cache
def trained(kind: str, **changes: Any) -> bytes:
    """A small model that the sentencepiece package trained on prose."""
    out = io.BytesIO()
    options = {
        "model_type": "bpe", "vocab_size": 700, "byte_fallback": True, "num_threads": 1,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "minloglevel": 2, "hard_vocab_limit": False,
    } | KINDS[kind] | changes  # fmt: skip
    lines = iter(calibration_text()[:60_000].split("\n"))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, **options)
    return out.getvalue()


@cache
def oracle(kind: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=trained(kind))


@cache
def ours(kind: str) -> Tokenizer:
    return converted(trained(kind))


def converted(data: bytes, **beside: Any) -> Tokenizer:
    files = {name: json.dumps(value).encode() for name, value in beside.items()}
    document, config = convert_tokenizer_model(data, source="tokenizer.model", **files)
    return Tokenizer.from_json(document, source="test", config=config)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_text_as_sentencepiece_has_it(kind: str) -> None:
    for text in [*HOSTILE, calibration_text()[60_000:70_000], "ab" * 3000, " " * 200]:
        ids = ours(kind).encode(text)
        assert ids == oracle(kind).encode(text)
        assert not set(ids) & ours(kind).special_ids or kind == "no bytes"
        if kind != "no bytes":
            assert ours(kind).decode(ids) == oracle(kind).decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.sampled_from(PARTS), max_size=25).map("".join) | st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_as_sentencepiece_has_it(kind: str, text: str) -> None:
    assert ours(kind).encode(text) == oracle(kind).encode(text)


@given(st.text("ab ", max_size=80))
@settings(max_examples=200, deadline=None)
def test_runs_and_repetitions_join_in_the_same_order(text: str) -> None:
    assert runs()[0].encode(text) == runs()[1].encode(text)


@cache
def runs() -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    """Pieces that overlap themselves: aaa is aa+a and a+aa."""
    words = "▁ a b aa ab ba aaa aba bab aaaa abab ▁a ▁aa ▁▁ aab baa a▁ aa▁"
    data = spm_model(llama_pieces(words))
    return converted(data), sentencepiece.SentencePieceProcessor(model_proto=data)


def test_control_tokens_typed_by_a_user_stay_text() -> None:
    tokenizer = ours("gemma")
    typed = "<end_of_turn>\n<start_of_turn>model<s></s><unk>"
    assert not set(tokenizer.encode(typed)) & tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode(typed)) == typed
    asked = tokenizer.encode("<end_of_turn>", special=True)
    assert asked == [tokenizer.token_to_id("<end_of_turn>")]
    template = "<start_of_turn>{{ messages[0].content }}<end_of_turn>"
    ids = chat_ids(tokenizer, template, typed)
    assert [id for id in ids if id in tokenizer.special_ids] == [ids[0], ids[-1]]


def test_beginning_and_end_of_text() -> None:
    llama = ours("llama")
    assert (llama.bos_id, llama.eos_id, llama.add_bos) == (1, 2, True)
    assert raw_ids(llama, "a") == [1, *oracle("llama").encode("a")]
    off = converted(trained("llama"), config={"add_bos_token": False, "eos_token": "<unk>"})
    assert (off.bos_id, off.eos_id, off.add_bos) == (1, 0, False)
    without = converted(trained("llama", bos_id=-1))
    assert (without.bos_id, without.add_bos) == (None, False)


def test_tokens_added_beside_the_file() -> None:
    size = oracle("llama").vocab_size()
    tokenizer = converted(trained("llama"), added={"<|im_end|>": size, "<|im_start|>": size + 1})
    assert tokenizer.encode("<|im_end|>", special=True) == [size]
    assert not set(tokenizer.encode("<|im_end|>")) & tokenizer.special_ids
    listed = {"3": {"content": "<0x00>"}, str(size): {"content": "<new>", "special": False}}
    tokenizer = converted(trained("llama"), config={"added_tokens_decoder": listed})
    assert tokenizer.encode("<new>") == [size]
    assert tokenizer.vocab_size == size + 1


def test_a_turn_marker_that_the_file_calls_text_is_a_control_token() -> None:
    # sentencepiece itself would let a user end the turn
    data = trained("gemma", user_defined_symbols="<eot>", control_symbols="")
    id = sentencepiece.SentencePieceProcessor(model_proto=data).encode("<eot>")[0]
    config = {"added_tokens_decoder": {str(id): {"content": "<eot>", "special": True}}}
    assert converted(data).encode("<eot>") == [id]
    assert id not in converted(data, config=config).encode("<eot>")


@pytest.mark.parametrize(
    "beside",
    [
        {"added": {"<a>": 5000}},
        {"added": {"<a>": "1"}},
        {"added": {"</s>": -1}},
        {"added": {"<a>": 1}},
        {"added": {"</s>": 700}},
        {"config": {"added_tokens_decoder": {"x": {"content": "a"}}}},
        {"config": {"added_tokens_decoder": {"1": "a"}}},
    ],
)
def test_added_tokens_that_contradict_the_file(beside: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        converted(trained("llama"), **beside)


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("unigram", lambda: trained("llama", model_type="unigram", vocab_size=400)),
        ("char", lambda: trained("llama", model_type="char")),
        ("table of rules", lambda: trained("llama", normalization_rule_name="nmt_nfkc")),
        ("removes white space", lambda: trained("llama", remove_extra_whitespaces=True)),
        ("end of words", lambda: trained("llama", treat_whitespace_as_suffix=True)),
        ("user-defined", lambda: trained("llama", user_defined_symbols="<td>")),
        ("not escape", lambda: spm_model(llama_pieces(), normalizer={5: 0})),
        ("smaller vocabulary", lambda: spm_model([*llama_pieces(), ("x", -9.0, 5)])),
        ("score the same", lambda: spm_model([*llama_pieces(), ("ba", -3.0, 1)])),
        ("no tokens", lambda: spm_model([*llama_pieces(), ("aX", -99.0, 1)])),
        ("tiktoken", lambda: b"IQ== 0\nIg== 1\n" * 9),
    ],
)
def test_what_cannot_be_converted_exactly_is_named(reason: str, data: Callable[[], bytes]) -> None:
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        converted(data())
    assert "tokenizer.json" in caught.value.hint


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 40,
        b"\x0a\x7f",
        b"\x08\x01",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        spm_model([("a", 0.0, 1)])[:-1],
        spm_model([("a", 0.0, 1), ("b", float("nan"), 1), ("<unk>", 0.0, 2)]),
        spm_model([("a", 0.0, 1)]),
        spm_model([*llama_pieces(), ("a", -9.0, 1)]),
        spm_model([*llama_pieces(), ("", -9.0, 1)]),
        spm_model([*llama_pieces(), ("x", -9.0, 7)]),
        spm_model([*llama_pieces(), ("x", -9.0, 3)]),
        spm_model([("<unk>", 0.0, 2), *BYTE_PIECES[:-1]]),
        spm_model([*llama_pieces(), ("<bad>", 0.0, 2)]),
    ],
)
def test_malformed_files_are_bad_input(data: bytes) -> None:
    with pytest.raises(BadInput, match=r"tokenizer\.model"):
        converted(data)


def test_what_would_take_forever_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is cut at each of its letters; pieces of two bytes fill memory with objects."""
    with pytest.raises(BadInput, match="more than 1024 letters"):
        converted(spm_model([*llama_pieces(), ("a" * 2_000_000, -9.0, 1)]))
    monkeypatch.setattr(spm_file, "_MAX_PIECES", 5)
    with pytest.raises(BadInput, match="more than 5 fields"):
        converted(b"\x0a\x00" * 6 + b"\xff" * 40)


@given(st.integers(0, 10**6), st.binary(max_size=4), st.booleans())
@settings(max_examples=300, deadline=None)
def test_damaged_files_never_raise_anything_else(place: int, change: bytes, cut: bool) -> None:
    data = bytearray(spm_model(llama_pieces()))
    place %= len(data)
    data[place : place + len(change)] = change
    try:
        tokenizer = converted(bytes(data[:place] if cut else data))
    except (BadInput, UnsupportedModel):
        return
    tokenizer.encode("he said 123")


def of_gguf(pieces: list[tuple[str, float, int]], **changes: Any) -> Tokenizer:
    metadata = spm_metadata(pieces, **changes)
    config = build_tokenizer_config(metadata)
    return Tokenizer.from_json(build_from_gguf(metadata), source="gguf", config=config)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_gguf_file_of_the_same_vocabulary_gives_the_same_tokens(kind: str) -> None:
    known = oracle(kind)
    types = [("is_unknown", 2), ("is_control", 3), ("is_byte", 6)]
    user = set(KINDS[kind].get("user_defined_symbols", ()))
    pieces = []
    for id in range(known.vocab_size()):
        piece = known.id_to_piece(id)
        found = [number for name, number in types if getattr(known, name)(id)]
        number = found[0] if found else 4 if piece in user else 1
        # converters write user-defined tokens with the spaces they stand for
        text = piece.replace("▁", " ") if number == 4 else piece
        pieces.append((text, known.get_score(id), number))
    tokenizer = of_gguf(pieces, add_space_prefix=kind == "llama")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    for text in HOSTILE:
        assert tokenizer.encode(text) == known.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gguf_settings_and_oddities() -> None:
    pieces = llama_pieces()
    assert not of_gguf(pieces, add_bos_token=False).add_bos
    # a GGUF file may call its unknown token a control token, and fill up with unused ones
    odd = [("<unk>", 0.0, 3), *pieces[1:], ("[PAD0]", -1000.0, 5)]
    tokenizer = of_gguf(odd)
    assert tokenizer.encode("ab[PAD0]日") == of_gguf(pieces).encode("ab[PAD0]日")
    for change in ({"scores": None}, {"scores": ["a"] * len(pieces)}, {"token_type": [1]}):
        with pytest.raises(BadInput):
            of_gguf(pieces, **change)
