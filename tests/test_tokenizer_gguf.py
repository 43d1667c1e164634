"""tokenizer_gguf.py: each family splits as its original does; contradictions are refused."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf_builders import VOCAB, write
from vocabularies import (
    HOSTILE,
    byte_symbols,
    small_metadata,
    small_tokenizer,
    smollm,
    smollm_metadata,
)

from m2c.data import calibration_text
from m2c.errors import BadInput, UnsupportedModel
from m2c.model.checkpoint import open_checkpoint
from m2c.source import model_files, tokenizer_of_files
from m2c.tokenizer import Tokenizer
from m2c.tokenizer_gguf import build_from_gguf, build_tokenizer_config


@pytest.mark.parametrize("text", HOSTILE)
def test_round_trip_of_a_real_vocabulary(text: str) -> None:
    assert smollm().decode(smollm().encode(text)) == text
    assert not set(smollm().encode(text)) & smollm().special_ids


def test_qwen2_normalises_to_composed_characters() -> None:
    tokenizer = small_tokenizer("qwen2")
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


def test_known_ids_of_smollm2() -> None:
    assert smollm().encode("Hello world") == [19556, 905]
    assert smollm().vocab_size == 49152
    assert (smollm().bos_id, smollm().eos_id, smollm().add_bos) == (1, 2, False)


def test_smollm2_agrees_with_a_plain_bpe() -> None:
    tokens = smollm_metadata()["tokenizer.ggml.tokens"]
    merges = smollm_metadata()["tokenizer.ggml.merges"]
    vocab = {token: id for id, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    # the last text is long enough to meet rare merges
    for text in [*HOSTILE[:-1], calibration_text()[:20_000]]:
        expected = [vocab[part] for word in split_words(text) for part in merge_all(word, ranks)]
        assert smollm().encode(text) == expected


def split_words(text: str) -> list[str]:
    """SmolLM2's words in byte symbols: each digit alone, then GPT-2's expression."""
    regex = pytest.importorskip("regex")
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    parts = (part for part in regex.split(r"(\p{N})", text) if part)
    words = (word for part in parts for word in regex.findall(gpt2, part))
    symbols = byte_symbols()
    return ["".join(symbols[byte] for byte in word.encode()) for word in words]


def merge_all(word: str, ranks: dict[tuple[str, ...], int]) -> list[str]:
    parts = list(word)
    while True:
        pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts))]
        rank, first = min(pairs, default=(len(ranks), 0))
        if rank == len(ranks):
            return parts
        parts[first : first + 2] = [parts[first] + parts[first + 1]]


def test_digits_and_merges_by_family() -> None:
    # smollm splits off each digit, gpt-2 keeps a space with the number, llama and falcon take three
    assert small_tokenizer("smollm").encode(" he") == [259]
    first_words = {
        "smollm": "12", "gpt-2": "1234", "qwen2": "1", "llama-bpe": "123", "falcon": "123",
    }  # fmt: skip
    for pre, words in first_words.items():
        tokens = ["<|im_start|>", *byte_symbols(), "12", "123", "1234"]
        metadata = small_metadata(
            pre,
            tokens=tokens,
            token_type=[3, *[1] * 259],
            merges=["1 2", "12 3", "123 4"],
        )
        tokenizer = Tokenizer.from_json(build_from_gguf(metadata), source="test")
        first = tokenizer.decode(tokenizer.encode("1234")[:1])
        assert first == ("1" if pre == "smollm" else words)


def test_falcon_keeps_punctuation_from_words() -> None:
    """GPT-2's expression would put the space before the comma into one word with it."""
    tokens = ["<|im_start|>", *byte_symbols(), "\u0120,", ",,"]
    changes = {"tokens": tokens, "token_type": [3, *[1] * 258], "merges": ["\u0120 ,", ", ,"]}
    for pre, expected in (("gpt-2", ["a", " ,", ","]), ("falcon", ["a", " ", ",,"])):
        made = build_from_gguf(small_metadata(pre, **changes))
        tokenizer = Tokenizer.from_json(made, source="test")
        assert [tokenizer.decode([id]) for id in tokenizer.encode("a ,,")] == expected


def test_llama3_takes_whole_words_that_no_merge_reaches() -> None:
    changes = {"tokens": [*byte_symbols(), "xyz"], "token_type": [1] * 257, "merges": []}
    for pre, expected in (("llama-bpe", 1), ("gpt-2", 3)):
        metadata = small_metadata(pre, **changes)
        tokenizer = Tokenizer.from_json(build_from_gguf(metadata), source="test")
        assert len(tokenizer.encode("xyz")) == expected


def test_gguf_vocabularies_that_cannot_be_rebuilt_are_named() -> None:
    with pytest.raises(UnsupportedModel, match=r"'t5'.*'gpt2'.*'llama'"):
        build_from_gguf(small_metadata(model="t5"))
    for pre in ("default", "superbpe", None):
        with pytest.raises(UnsupportedModel, match=f"{pre!r}.*smollm.*qwen2"):
            build_from_gguf(small_metadata(pre=pre))


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": None},
        {"tokens": ["a", 1]},
        {"tokens": ["a", "a"]},
        {"token_type": [1]},
        {"token_type": None},
        {"merges": ["he"]},
        {"merges": ["h q"]},
        {"merges": ["x Ω"]},
        {"merges": None},
    ],
)
def test_contradictory_gguf_metadata_is_bad_input(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        build_from_gguf(small_metadata(**change))


def test_gguf_token_ids_out_of_range_are_bad_input() -> None:
    for id in (-1, 261, "1", True):
        with pytest.raises(BadInput, match="bos_token_id"):
            build_tokenizer_config(small_metadata(bos_token_id=id))


def test_config_from_gguf() -> None:
    config = json.loads(build_tokenizer_config(small_metadata()))
    assert config == {
        "add_bos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": "{{ messages }}",
    }
    assert json.loads(build_tokenizer_config(small_metadata("llama-bpe")))["add_bos_token"]


def test_building_is_deterministic() -> None:
    first = build_from_gguf(smollm_metadata())
    assert first == build_from_gguf(dict(reversed(smollm_metadata().items())))
    assert first == build_from_gguf(smollm_metadata())


def test_a_tokenizer_beside_the_file_stands_in_for_one_that_cannot_be_rebuilt(
    tmp_path: Path,
) -> None:
    fixed = {"tokenizer.ggml.model": "t5", "tokenizer.ggml.pre": "default"}
    write(tmp_path / "a.gguf", meta=fixed | {"tokenizer.ggml.tokens": ["a"] * VOCAB})
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    with pytest.raises(UnsupportedModel, match="'t5'") as caught:
        model_files(checkpoint)
    assert "tokenizer.json of the original model beside it" in caught.value.hint
    (tmp_path / "tokenizer.json").write_bytes(build_from_gguf(small_metadata()))
    files = model_files(checkpoint)
    assert tokenizer_of_files(files, tmp_path).encode(" he") == [259]
