"""The small files that travel with a checkpoint: config, tokenizer, chat template, licence.

Knows nothing about weights or bundles.
"""

from pathlib import Path

from m2c.errors import BadInput
from m2c.model.checkpoint import Checkpoint
from m2c.tokenizer import Tokenizer
from m2c.tokenizer_gguf import build_from_gguf, build_tokenizer_config


def model_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """File name to bytes; a GGUF's tokenizer is written out as tokenizer.json.

    Raises UnsupportedModel for a GGUF tokenizer that cannot be rebuilt exactly.
    """
    files = dict(checkpoint.sidecars())
    metadata = checkpoint.gguf_metadata()
    if metadata is not None:
        files["tokenizer.json"] = build_from_gguf(metadata)
        files["tokenizer_config.json"] = build_tokenizer_config(metadata)
    return files


def tokenizer_of_files(files: dict[str, bytes], source: Path) -> Tokenizer:
    """Raises BadInput when there is no tokenizer.json."""
    if "tokenizer.json" not in files:
        raise BadInput(
            f"{source}: no tokenizer.json",
            "fetch it from the model's repository, or convert its tokenizer.model",
        )
    return Tokenizer.from_json(
        files["tokenizer.json"], source=f"{source}/tokenizer.json",
        config=files.get("tokenizer_config.json"),
    )  # fmt: skip
