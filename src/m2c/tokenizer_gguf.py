"""tokenizer.json and tokenizer_config.json for a GGUF file, which has neither.

Knows nothing about GGUF's bytes (it is given the metadata as a dict) nor about tokenizing.
"""

import json
from typing import Any

from m2c.errors import BadInput, UnsupportedModel
from m2c.tokenizer_bpe import added_token, bpe_json, byte_level
from m2c.tokenizer_spm import CONTROL, UNUSED, USER_DEFINED, Vocabulary, build_spm

_DOWNLOAD_AGAIN = "fetch the GGUF file again from where it came from"
_BRING_TOKENIZER = "put the tokenizer.json of the original model beside it"

# Pre-tokenizers of the GGUF files that can be rebuilt, under the names llama.cpp gives them.
# The regular expressions are those of the models' own tokenizer.json.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_PRE_TOKENIZERS = ("smollm", "gpt-2", "qwen2", "falcon", *_LLAMA3)
_BPE, _SPM = "gpt2", "llama"  # values of tokenizer.ggml.model; gemma files say llama too


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
    normalizer, pre_tokenizer = _pipeline(metadata.get("tokenizer.ggml.pre"))
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise BadInput("tokenizer.ggml.tokens names a token twice", _DOWNLOAD_AGAIN)
    return bpe_json(
        vocab, _strings(metadata, "tokenizer.ggml.merges"),
        _added_tokens(tokens, metadata.get("tokenizer.ggml.token_type")),
        normalizer=normalizer, pre_tokenizer=pre_tokenizer,
        # whole words that no sequence of merges reaches
        ignore_merges=metadata["tokenizer.ggml.pre"] in _LLAMA3, hint=_DOWNLOAD_AGAIN,
    )  # fmt: skip


def build_tokenizer_config(metadata: dict[str, Any]) -> bytes:
    """A tokenizer_config.json made from GGUF metadata: bos, eos, whether to add bos, template."""
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    # llama.cpp adds bos for these models even where the file does not say so
    kind = metadata.get("tokenizer.ggml.model")
    implied = kind == _SPM or metadata.get("tokenizer.ggml.pre") in _LLAMA3
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


def _pipeline(name: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """(normalizer, pre-tokenizer) of a model family."""
    if name == "gpt-2":
        return None, byte_level(use_regex=True)
    if name == "smollm":
        steps = [{"type": "Digits", "individual_digits": True}, byte_level(use_regex=True)]
        return None, {"type": "Sequence", "pretokenizers": steps}
    if name == "qwen2":
        return {"type": "NFC"}, _split_words(digits="")
    if name == "falcon":
        return None, _falcon()
    if name in _LLAMA3:
        return None, _split_words(digits="{1,3}")
    raise UnsupportedModel(
        f"the GGUF file's pre-tokenizer {repr(name)[:40]} is not one of "
        f"{', '.join(_PRE_TOKENIZERS)}",
        _BRING_TOKENIZER,
    )


def _split_words(*, digits: str) -> dict[str, Any]:
    pattern = {"Regex": _WORDS.replace("DIGITS", digits)}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level()]}


def _falcon() -> dict[str, Any]:
    """Runs of punctuation apart, then GPT-2's words, digits three by three."""
    digits = {"type": "Digits", "individual_digits": False}
    threes = {
        "type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated",
        "invert": False,
    }  # fmt: skip
    punctuation = {"type": "Punctuation", "behavior": "Contiguous"}
    steps = [punctuation, byte_level(use_regex=True), digits, threes]
    return {"type": "Sequence", "pretokenizers": steps}


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
