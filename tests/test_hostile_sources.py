"""Checkpoints made to hurt: whatever their files say, they are read or refused in one line (R11).

A trial is BATCH mutations of small honest files. Each must be accepted or raise an error of m2c's
own within SECONDS and within twice the file and 64 MiB of memory.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_files as files
import pytest
from hostile import BATCH, INTEGERS, TEXTS, judge, mutate_bytes, mutate_json, mutate_pieces
from safetensors import SafetensorError, deserialize
from trials import trials

from m2c.chat import chat_template_of
from m2c.errors import M2CError
from m2c.model.checkpoint import open_checkpoint
from m2c.model.hf_folder import HfFolder
from m2c.model.safetensors_file import SafetensorsFile
from m2c.source import model_files, tokenizer_of_files
from m2c.tokenizer import Tokenizer
from m2c.tokenizer_spm import convert_tokenizer_model

pytestmark = pytest.mark.campaign
TEXT = "ab <s> a\u0301 \U0001f600 12"


def batches(promise: str, campaign: int, attack: Callable[[random.Random], None]) -> None:
    for trial in trials(promise, ci=1, campaign=campaign):
        with trial as seed:
            for i in range(BATCH):
                attack(random.Random(f"{promise} {seed} {i}"))


def test_safetensors_headers(tmp_path: Path) -> None:
    """What m2c takes, the reader of the safetensors package takes too."""
    path, header = tmp_path / "m.safetensors", files.safetensors_header()
    data = bytes(files.data_nbytes(header))
    others = ("F16", "C64", "F8_E4M3", "F4", [0, 2**62, 4], [2**32, 2**32], [6, 12], [])

    def attack(rng: random.Random) -> None:
        text = mutate_json(rng, header, others)
        content = files.with_length(text, data)
        if rng.random() < 0.2:
            content = mutate_bytes(rng, content)
        path.write_bytes(content)
        found = judge(lambda: SafetensorsFile(path), repr(content), len(content))
        if isinstance(found, SafetensorsFile):
            try:
                tensors = dict(deserialize(content))
            except SafetensorError as error:
                raise AssertionError(f"the package refuses {content!r}: {error}") from None
            got = {name: list(entry.shape) for name, entry in found.entries.items()}
            assert got == {name: tensor["shape"] for name, tensor in tensors.items()}

    batches("R11-safetensors", 800, attack)


def read_all(path: Path) -> None:
    """Everything that profile and pack read of a checkpoint."""
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        checkpoint.read(name)
        checkpoint.stored_type(name)
    checkpoint.fingerprint()
    found = model_files(checkpoint)
    tokenizer = tokenizer_of_files(found, path)
    tokenizer.decode(tokenizer.encode(TEXT, special=True))
    chat_template_of(found)


def small_folder(folder: Path) -> Path:
    """A checkpoint of three shards with a tokenizer."""
    files.small_checkpoint(folder)
    (folder / "tokenizer.json").write_text(json.dumps(files.tokenizers()[0]))
    (folder / "tokenizer_config.json").write_text(json.dumps(files.SETTINGS))
    return folder


def test_files_of_a_folder(tmp_path: Path) -> None:
    """One file of a whole checkpoint at a time; what opens must be readable to the end."""
    folder = small_folder(tmp_path / "model")
    read_all(folder)
    honest = {
        path: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".json"
    }
    shard = next(folder.glob("model-00001*"))
    honest[shard] = shard.read_bytes()
    names = (shard.name, f"../{shard.name}", "/dev/zero", "model-9.safetensors", "x.json")

    def attack(rng: random.Random) -> None:
        path = rng.choice(list(honest))
        content = honest[path]
        if path.suffix == ".json" and rng.random() < 0.9:
            made = mutate_json(rng, json.loads(content), names)
        else:
            made = mutate_bytes(rng, content)
        path.write_bytes(made)
        try:
            judge(lambda: read_all(folder), f"{path.name}: {made!r}", len(made))
        finally:
            path.write_bytes(content)

    batches("R11-folder", 600, attack)


def test_configs(tmp_path: Path) -> None:
    """config.json of every family, with generation_config.json beside it."""
    configs, others = files.configs(), ("gemma3_text", "llama3", "linear", {"rope_type": "linear"})
    generation = {"eos_token_id": [1, 2], "bos_token_id": 1}

    def attack(rng: random.Random) -> None:
        config = mutate_json(rng, rng.choice(configs), others)
        beside = mutate_json(rng, generation) if rng.random() < 0.1 else b"{}"
        (tmp_path / "config.json").write_bytes(config)
        (tmp_path / "generation_config.json").write_bytes(beside)

        def read() -> None:
            found = HfFolder(tmp_path, weights=False).config
            assert type(found).from_hf(found.to_hf()).to_dict() == found.to_dict()

        judge(read, f"{config!r} {beside!r}", len(config))

    batches("R11-config", 800, attack)


def test_tokenizer_json() -> None:
    honest = files.tokenizers()
    kinds = tuple(
        {"type": kind} for kind in ("NFKC", "Lowercase", "StripAccents", "Whitespace", "WordLevel")
    )
    parts = [model[key] for model in honest for key in ("normalizer", "pre_tokenizer", "decoder")]

    def attack(rng: random.Random) -> None:
        data = mutate_json(rng, rng.choice(honest), (*kinds, *parts))
        config = mutate_json(rng, files.SETTINGS) if rng.random() < 0.2 else b"{}"

        def read() -> None:
            made = Tokenizer.from_json(data, source="t", config=config)
            ids = made.encode(TEXT)
            made.encode(TEXT, special=True)
            made.decode(ids)
            made.difference(made)
            chat_template_of({"tokenizer_config.json": config})

        judge(read, f"{data!r} {config!r}", len(data))

    batches("R11-tokenizer-json", 400, attack)


def test_tokenizer_model() -> None:
    """What converts is a tokenizer that the engine takes."""
    added = {"<more>": 8}

    def attack(rng: random.Random) -> None:
        data = spm_mutation(rng)
        config = mutate_json(rng, files.SETTINGS) if rng.random() < 0.2 else b"{}"
        more = mutate_json(rng, added) if rng.random() < 0.1 else None

        def read() -> None:
            made, settings = convert_tokenizer_model(data, source="t", config=config, added=more)
            tokenizer = Tokenizer.from_json(made, source="t", config=settings)
            tokenizer.decode(tokenizer.encode("ab"))

        judge(read, f"{data!r} {config!r} {more!r}", len(data))

    batches("R11-tokenizer-model", 800, attack)


def spm_mutation(rng: random.Random) -> bytes:
    fields = [
        (n, [*value] if isinstance(value, list) else value) for n, value in files.spm_fields()
    ]
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        holder: list[tuple[int, Any]] = fields
        if rng.random() < 0.8:
            holder = rng.choice([value for _, value in fields if isinstance(value, list)])
        at, kind = rng.randrange(len(holder) + 1), rng.randrange(4)
        text = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        value = rng.choice((rng.choice(INTEGERS), text, 1e38, float("nan"), -0.5))
        if kind == 0 or at == len(holder):
            holder.insert(at, (rng.choice((1, 2, 3, 5, 24, 41, 1 << 28)), value))
        elif kind == 1 and len(holder) > 1:
            del holder[at]
        elif kind == 2:
            holder.insert(at, holder[rng.randrange(len(holder))])
        elif not isinstance(holder[at][1], list):
            holder[at] = (holder[at][0], value)
    data = files.spm_bytes(fields)
    return mutate_bytes(rng, data) if rng.random() < 0.4 else data


def test_gguf(tmp_path: Path) -> None:
    path, pieces = tmp_path / "m.gguf", files.gguf_pieces()
    path.write_bytes(b"".join(pieces))
    with pytest.raises(M2CError, match=r"rope_freqs\.weight is not llama3 rope"):
        open_checkpoint(path)  # its table is zero; everything else is well
    pieces[-1] = bytes(len(pieces[-1]))

    def attack(rng: random.Random) -> None:
        made = mutate_pieces(rng, pieces)
        if rng.random() < 0.5:  # as a converter would have padded it
            head = sum(map(len, made[:-2]))
            made[-2:] = [bytes(-head % 32), bytes(5000)]
        content = b"".join(made)
        path.write_bytes(content)
        judge(lambda: read_all(path), repr(content), len(content))

    batches("R11-gguf", 800, attack)
