"""tokenizer.json and tokenizer_config.json for a GGUF file, which has neither.

Knows nothing about GGUF's bytes (it is given the metadata as a dict) nor about tokenizing.
"""

import json
from typing import Any

from m2c.errors import BadInput, UnsupportedModel
from m2c.tokenizer_bpe import added_token, bpe_json
from m2c.tokenizer_pre import PRE_TOKENIZERS, PreTokenizer
from m2c.tokenizer_spm import CONTROL, UNUSED, USER_DEFINED, Vocabulary, build_spm

_DOWNLOAD_AGAIN = "fetch the GGUF file again from where it came from"
_BRING_TOKENIZER = "put the tokenizer.json of the original model beside it"

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
