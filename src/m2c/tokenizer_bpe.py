"""A tokenizer.json of a byte-level BPE: from its parts, or from a vocab.json and a merges.txt.

Older repositories (OPT) have only these two files. Knows nothing about tokenizing.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from m2c.bundle.strict import parse_object
from m2c.errors import BadInput, UnsupportedModel

DOWNLOAD_AGAIN: Final = "fetch the file again from where the model came from"
_CLASSES: Final = ("GPT2Tokenizer", "GPT2TokenizerFast")
_ROLES: Final = ("bos_token", "eos_token", "unk_token", "pad_token")


def bpe_json(
    vocab: Mapping[str, int], merges: Iterable[str], added: list[dict[str, Any]], *,
    normalizer: Any, pre_tokenizer: Any, ignore_merges: bool = False, hint: str = DOWNLOAD_AGAIN,
) -> bytes:  # fmt: skip
    """merges: pairs joined by a space. Raises BadInput for one that does not join two tokens."""
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": [_pair(merge, vocab, hint) for merge in merges],
    }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": byte_level(),
        "model": model,
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def byte_level(*, use_regex: bool = False, add_prefix_space: bool = False) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def added_token(token: str, token_id: int, *, special: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def build_from_vocabulary(
    vocab: bytes, merges: bytes, *, source: str, config: bytes | None, special: bytes | None
) -> bytes:
    """A tokenizer.json from a vocab.json, a merges.txt, and the tokenizer_config.json and
    special_tokens_map.json beside them, for GPT-2's tokenizer.

    source: their folder. Raises UnsupportedModel for another tokenizer, BadInput for files that
    contradict each other.
    """
    settings = {} if config is None else parse_object(config, f"{source}/tokenizer_config.json")
    kind = settings.get("tokenizer_class", _CLASSES[0])
    if kind not in _CLASSES:
        raise UnsupportedModel(
            f"{source}: a vocab.json of {str(kind)[:80]!r} cannot be converted",
            "put a tokenizer.json beside it: transformers writes one with save_pretrained",
        )
    ids = _ids(parse_object(vocab, f"{source}/vocab.json"), source)
    named = {} if special is None else parse_object(special, f"{source}/special_tokens_map.json")
    parts = (settings, named)
    tokens = {_content(part[role]) for part in parts for role in _ROLES if part.get(role)}
    if unknown := sorted(str(token) for token in tokens if token not in ids):
        raise BadInput(f"{source}/vocab.json: lacks the token {unknown[0][:80]!r}", DOWNLOAD_AGAIN)
    special_ids = sorted((ids[token], token) for token in tokens if token is not None)
    added = [added_token(token, id, special=True) for id, token in special_ids]
    prefix = settings.get("add_prefix_space") is True
    return bpe_json(
        ids, _lines(merges, source), added, normalizer=None,
        pre_tokenizer=byte_level(use_regex=True, add_prefix_space=prefix),
    )  # fmt: skip


def _ids(vocab: Mapping[str, Any], source: str) -> dict[str, int]:
    used = set()
    for token, id in vocab.items():
        if type(id) is not int or id < 0 or id in used:  # True is an int too
            raise BadInput(
                f"{source}/vocab.json: {token[:80]!r} has no id of its own", DOWNLOAD_AGAIN
            )
        used.add(id)
    return dict(vocab)


def _lines(merges: bytes, source: str) -> list[str]:
    try:
        lines = merges.decode().split("\n")
    except UnicodeDecodeError:
        raise BadInput(f"{source}/merges.txt: not UTF-8", DOWNLOAD_AGAIN) from None
    return [line for line in lines if line.strip() and not line.startswith("#version")]


def _content(token: Any) -> str | None:
    """Of a token given as a string or as {"content": string}."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _pair(merge: str, vocab: Mapping[str, int], hint: str) -> list[str]:
    left, space, right = merge.partition(" ")
    if not space or left not in vocab or right not in vocab or left + right not in vocab:
        raise BadInput(f"the merge {merge[:80]!r} does not join two tokens", hint)
    return [left, right]
