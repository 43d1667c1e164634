"""tokenizer_bpe.py: vocab.json and merges.txt give the ids that transformers gives."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_checkpoint
from tokenizers import Tokenizer as Engine
from vocabularies import HOSTILE

from m2c.errors import BadInput, UnsupportedModel
from m2c.model.checkpoint import open_checkpoint
from m2c.source import model_files, tokenizer_of_files

CONFIG: dict[str, Any] = {
    "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False,
    "bos_token": {
        "content": "<|end|>", "lstrip": False, "rstrip": False, "normalized": True,
        "single_word": False, "__type": "AddedToken",
    },
    "eos_token": "<|end|>", "unk_token": "<|end|>", "pad_token": "<|begin|>",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with the files of facebook/opt-*, no tokenizer.json among them."""
    write_checkpoint(tmp_path, {"vocab_size": 400})
    engine = Engine.from_file(str(tmp_path / "tokenizer.json"))
    engine.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_ids_are_those_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    files = model_files(open_checkpoint(folder))
    assert not {"vocab.json", "merges.txt"} & files.keys()
    ours = tokenizer_of_files(files, folder)
    for text in HOSTILE:
        expected = theirs.encode(text, add_special_tokens=False)
        if "<|" not in text:  # a control token spelled out stays text here
            assert ours.encode(text) == expected
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.add_bos) == (1, 1, True)
    assert ours.special_ids == {0, 1}
    assert ours.encode("<|end|>", special=True) == [1]
    assert 1 not in ours.encode("<|end|>")


def test_another_tokenizer_of_the_same_files_is_refused(folder: Path) -> None:
    config = CONFIG | {"tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="CLIPTokenizer") as caught:
        model_files(open_checkpoint(folder))
    assert "tokenizer.json" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("vocab.json", '{"a": 0, "b": 0}', "'b' has no id of its own"),
        ("vocab.json", '{"a": true}', "'a' has no id of its own"),
        ("vocab.json", '{"a": 0}', "lacks the token"),
        ("vocab.json", "[]", "vocab.json"),
        ("merges.txt", "xyz qqq", "does not join"),
        ("tokenizer_config.json", '{"bos_token": "<nowhere>"}', "<nowhere>"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    folder: Path, name: str, text: str, named: str
) -> None:
    (folder / name).write_text(text)
    with pytest.raises(BadInput, match=named):
        model_files(open_checkpoint(folder))


def test_a_tokenizer_json_says_more(folder: Path) -> None:
    made = model_files(open_checkpoint(folder))["tokenizer.json"]
    (folder / "tokenizer.json").write_bytes(made)
    (folder / "vocab.json").write_text("[]")
    files = model_files(open_checkpoint(folder))
    assert files["tokenizer.json"] == made
    assert not {"vocab.json", "merges.txt"} & files.keys()
