"""The small files that travel with a checkpoint: config, tokenizer, chat template, licence.

Knows nothing about weights or bundles.
"""

from pathlib import Path

from m2c.bundle.files import read_small
from m2c.bundle.strict import parse_object
from m2c.errors import BadInput, UnsupportedModel
from m2c.model.checkpoint import Checkpoint
from m2c.model.config import ModelConfig
from m2c.tokenizer import MAX_JSON_NBYTES, Tokenizer
from m2c.tokenizer_bpe import build_from_vocabulary
from m2c.tokenizer_gguf import build_from_gguf, build_tokenizer_config
from m2c.tokenizer_spm import convert_tokenizer_model


def model_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """File name to bytes; the tokenizer of a GGUF or a tokenizer.model becomes a tokenizer.json.

    Raises UnsupportedModel for a tokenizer that cannot be rebuilt exactly.
    """
    files = dict(checkpoint.sidecars())
    metadata = checkpoint.gguf_metadata()
    if metadata is None:
        return with_tokenizer(files, checkpoint.path)
    try:
        files["tokenizer.json"] = build_from_gguf(metadata)
    except UnsupportedModel:
        beside = checkpoint.path.parent / "tokenizer.json"
        if not beside.is_file():
            raise
        files["tokenizer.json"] = read_small(beside, limit=MAX_JSON_NBYTES)
    files["tokenizer_config.json"] = build_tokenizer_config(metadata)
    return files


def with_tokenizer(files: dict[str, bytes], source: Path) -> dict[str, bytes]:
    """The small files of the folder `source` with a tokenizer.json, without what it is made of."""
    kept = dict(files)
    model, added = (kept.pop(name, None) for name in ("tokenizer.model", "added_tokens.json"))
    if model is not None and "tokenizer.json" not in kept:
        kept["tokenizer.json"], kept["tokenizer_config.json"] = convert_tokenizer_model(
            model, source=f"{source}/tokenizer.model",
            config=kept.get("tokenizer_config.json"), added=added,
        )  # fmt: skip
    vocab, merges = (kept.pop(name, None) for name in ("vocab.json", "merges.txt"))
    if vocab is not None and merges is not None and "tokenizer.json" not in kept:
        kept["tokenizer.json"] = build_from_vocabulary(
            vocab, merges, source=str(source), config=kept.get("tokenizer_config.json"),
            special=kept.get("special_tokens_map.json"),
        )  # fmt: skip
    return kept


def tokenizer_of_files(files: dict[str, bytes], source: Path) -> Tokenizer:
    """Raises BadInput when there is no tokenizer.json."""
    if "tokenizer.json" not in files:
        raise BadInput(
            f"{source}: has neither tokenizer.json nor tokenizer.model, nor vocab.json with "
            "merges.txt",
            "fetch it from the model's repository",
        )
    return Tokenizer.from_json(
        files["tokenizer.json"], source=f"{source}/tokenizer.json",
        config=files.get("tokenizer_config.json"),
    )  # fmt: skip


def require_usable(files: dict[str, bytes], source: Path) -> None:
    """Raises what opening a folder with these small files and the right weights would raise."""
    file = f"{source}/config.json"
    ModelConfig.from_hf(parse_object(files["config.json"], file), file=file)
    tokenizer_of_files(with_tokenizer(files, source), source)
