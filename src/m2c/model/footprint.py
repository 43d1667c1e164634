"""How many bytes a model needs, of what kind: the input of `tiers.plan`.

From a bundle (true sizes) or from a config alone (sizes by formula, for models that are not here).
Reads no weights.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Final

import numpy as np
import numpy.typing as npt

from m2c.bundle.bundle import Bundle
from m2c.bundle.planes import RecordLayout
from m2c.bundle.shard import BLOCK, PLANES, align
from m2c.kernels.gpu_products import PARTIAL_NBYTES, SPAN
from m2c.kernels.reference import CHUNK
from m2c.model.config import ModelConfig
from m2c.model.ffn import FETCH
from m2c.model.kv import kv_nbytes
from m2c.model.mix import Mix
from m2c.model.tensors import dense_matrices, small_tensors
from m2c.tiers.blocks import Precisions, block_of, head_name, planes_of
from m2c.tiers.expert_parts import expert_nbytes, parts_of
from m2c.tiers.expert_plan import ExpertFact
from m2c.tiers.facts import BlockFact, DraftFact, Footprint, UpgradeFact
from m2c.tiers.fetch import DECODE_WEIGHTS, staging_nbytes
from m2c.units import MiB

# exact plane of Gaussian weights (BENCHMARKS.md); only for models not packed yet
ESTIMATED_EXACT_BITS: Final = {"bf16": 3.1, "f16": 6.2}
_ACTIVATIONS_NBYTES: Final = 64 * MiB  # of a prefill batch
LOGITS: Final = 4  # tokens whose logits by a piece of the head are computed at a time
_STAGING_NBYTES: Final = 32 * MiB
_DECODE_NBYTES: Final = 44  # temporary bytes per weight while the exact plane is decoded
# sums of chunks, of spans of positions, and weights decoded at a time (kernels/gpu_products.py)
CUDA_NBYTES: Final = 80 * MiB
# neurons and head stream in pieces of about this size: the ring holds a few, whatever the model
PIECE_NBYTES: Final = 8 * MiB
_CUDA_PIECE_NBYTES: Final = 32 * MiB  # to ask a GPU for one takes about as long as 10 MB cross it
_CHANCE: Final = tuple(k / 100 for k in range(101))


@dataclass(frozen=True)
class RunShape:
    """What a run asks for, apart from budgets."""

    mix: Mix
    dense: str
    ctx_size: int
    kv_type: str
    threads: int
    kernels: str = "c"  # that compute: "c", "cuda" or "torch", which need memory in other ways
    drafts: bool = False  # INT4 planes lie in memory to draft with; blocks are what is above them
    stored: bool = False  # exact blocks in memory stay as stored, not decoded to 16 bits
    at_once: int = 1  # tokens whose logits are wanted together: more where drafts are verified
    by_expert: bool = False  # the mix is that of a token's experts, each of one precision

    @property
    def speculates(self) -> bool:
        return self.at_once > 1

    @property
    def precisions(self) -> Precisions:
        return Precisions(self.dense, self.neurons, self.drafts, self.stored)

    @property
    def neurons(self) -> str:
        """At what precision blocks hold neurons: the floor, or of experts what any may need."""
        return self.mix.best if self.by_expert else self.mix.floor


@dataclass(frozen=True)
class _Sizes:
    """Payload bytes of one shard family in each plane, and its weights."""

    planes: dict[str, int]
    weights: int
    records: int

    def __add__(self, other: "_Sizes") -> "_Sizes":
        planes = {plane: nbytes + other.planes[plane] for plane, nbytes in self.planes.items()}
        return _Sizes(planes, self.weights + other.weights, self.records + other.records)

    def read(self, precision: str, held: int = 0) -> int:
        """Bytes on the SSD, the `held` lowest planes left out."""
        return sum(self.planes[p] for p in PLANES[held : PLANES.index(precision) + 1])

    def resident(self, precision: str, shape: "RunShape") -> int:
        if precision == "fp16" and not shape.stored:
            return 2 * self.weights
        return self.read(precision, shape.drafts)


def batch_tokens(config: ModelConfig) -> int:
    """Tokens of a prefill batch: as many as keep its activations within 64 MiB."""
    per_token = 4 * (8 * config.most_at_once + 8 * config.hidden_size)
    return max(8, min(512, _ACTIVATIONS_NBYTES // per_token))


def footprint_of_bundle(
    bundle: Bundle, config: ModelConfig, shape: RunShape, hit_share: npt.NDArray[np.floating],
    popularity: npt.NDArray[np.floating] | None = None,
) -> Footprint:  # fmt: skip
    """hit_share: [101], share of the uses of upgraded neurons that the hottest k % serve.
    popularity: [layers, experts], share of the tokens that use each."""
    layers = range(config.num_hidden_layers)
    dense = [_bundle_sizes(bundle, "dense", layer) for layer in layers]
    neurons = [_bundle_sizes(bundle, "neurons", layer) for layer in layers]
    head = _bundle_sizes(bundle, "dense", head_name(bundle))
    largest = max(
        int(index.frame_nbytes[s.name].max())
        for index in bundle.shards.values()
        for s in index.header.sections
        if s.frames
    )
    made = _footprint(config, shape, dense, neurons, head, largest, bundle.manifest.exact_type)
    made = replace(made, blocks=tuple(_true_size(bundle, b, shape) for b in made.blocks))
    if made.experts is not None:
        made = replace(made, experts=_true_experts(bundle, made.experts, shape, popularity))
    tables = sum(index.block_hashes.nbytes for index in bundle.shards.values())
    tables += sum(t.nbytes for i in bundle.shards.values() for t in i.frame_nbytes.values()) * 6
    share = tuple(float(v) for v in hit_share)
    return replace(
        made,
        fixed_nbytes=made.fixed_nbytes + tables,
        upgrades=tuple(replace(u, hit_share=share) for u in made.upgrades),
    )


def footprint_of_config(config: ModelConfig, shape: RunShape, exact_type: str) -> Footprint:
    """Estimated: the exact plane by its usual bits per weight, upgrades without a hot set."""
    matrices = dense_matrices(config)
    first = [m for name, m in matrices.items() if name.startswith("model.layers.0.")]
    dense = _estimate(first, 1, exact_type)
    if shared := config.shared_expert_intermediate_size:
        dense += _estimate([(shared, config.hidden_size)], config.vectors, exact_type)
    embed = _estimate([(config.vocab_size, config.hidden_size)], 1, exact_type)
    ffn = _estimate([(config.neurons, config.hidden_size)], config.vectors, exact_type)
    layers = config.num_hidden_layers
    largest = 6 * max(config.vectors * config.hidden_size, 1 << 15)
    return _footprint(config, shape, [dense] * layers, [ffn] * layers, embed, largest, exact_type)


def bundle_nbytes(config: ModelConfig, exact_type: str) -> int:
    """Estimated size on the SSD of a bundle with all planes."""
    shape = RunShape(Mix(100, 0, 0), "fp16", 1, "f16", 1)
    footprint = footprint_of_config(config, shape, exact_type)
    total = sum(block.streamed_nbytes for block in footprint.blocks)
    head = sum(block.streamed_nbytes for block in footprint.blocks if block.kind == "head")
    return total + (0 if config.tie_word_embeddings else head)


def _footprint(
    config: ModelConfig, shape: RunShape, dense: list[_Sizes], neurons: list[_Sizes],
    head: _Sizes, largest_frame: int, exact_type: str,
) -> Footprint:  # fmt: skip
    blocks = []
    # a mix needs all of a layer's scores before it can upgrade the best; experts are in memory all
    # together, or not as blocks
    pieces = shape.mix.is_uniform and not config.num_experts
    for i, (attn, ffn) in enumerate(zip(dense, neurons, strict=True)):
        blocks.append(_block("dense", i, attn, shape.dense, shape))
        blocks += _blocks("neurons", i, ffn, shape.neurons, shape, pieces)
    blocks += _blocks("head", len(dense), head, shape.dense, shape, True)
    layout = RecordLayout(config.vectors, config.hidden_size)
    counts = shape.mix.counts(config.intermediate_size)
    upgrades = []
    for plane in () if shape.by_expert else shape.mix.upgrades:
        stored = max(size.planes[plane] for size in neurons) // config.intermediate_size
        slot = layout.code_nbytes if plane == "int8" else 2 * config.vectors * config.hidden_size
        # the floor's down column is taken back, and INT8 builds on the floor's codes
        floor = layout.nbytes("int4")
        reads = slot + floor // config.vectors + (floor if plane == "int8" else 0)
        upgrades.append(UpgradeFact(plane, stored, slot, reads, counts[plane], _CHANCE))
    plane_nbytes = max(size.planes[p] for size in neurons for p in PLANES)
    planes = sum(size.planes["int4"] for size in (*dense, *neurons, head))
    idle = 1 - config.num_experts_per_tok / config.num_experts if config.num_experts else 0
    unread = int(idle * sum(size.planes["int4"] for size in neurons))
    return Footprint(
        layers=len(dense),
        neurons=config.neurons,
        blocks=tuple(blocks),
        upgrades=tuple(upgrades),
        kv_nbytes=kv_nbytes(config, shape.ctx_size, shape.kv_type),
        fixed_nbytes=_vectors_nbytes(config),
        embed_nbytes=_embed_nbytes(config, shape, head),
        draft=DraftFact(planes, planes - unread, len(dense)) if shape.drafts else None,
        experts=_experts(config, shape, neurons) if config.num_experts else None,
        workspace_nbytes=_workspace_nbytes(config, shape),
        staging_nbytes=max(min(plane_nbytes, _STAGING_NBYTES), 0) // BLOCK * BLOCK
        + staging_nbytes(max(largest_frame, layout.nbytes("int4"))),
    )


def _experts(config: ModelConfig, shape: RunShape, neurons: list[_Sizes]) -> ExpertFact:
    """Estimated: what is read of an expert is whole checksum blocks, in every plane."""
    levels = shape.mix.by_rank(config.num_experts_per_tok)
    planes = planes_of(shape.neurons)
    if shape.mix.is_uniform:
        uses: tuple[int, ...] = (len(levels),)
        most = [max(size.read(shape.neurons, shape.drafts) for size in neurons)]
        gaps = len(planes) - shape.drafts
    else:
        uses = tuple(sum(level > i for level in levels) for i in range(len(planes)))
        most, gaps = [max(size.planes[plane] for size in neurons) for plane in planes], 1
    nbytes = tuple(align(n // config.num_experts, BLOCK) + gaps * BLOCK for n in most)
    return ExpertFact(
        len(neurons), config.num_experts, uses, max(nbytes), nbytes,
        shared=config.shared_expert_intermediate_size > 0,
    )  # fmt: skip


def _true_experts(
    bundle: Bundle, facts: ExpertFact, shape: RunShape,
    popularity: npt.NDArray[np.floating] | None,
) -> ExpertFact:  # fmt: skip
    """What exactly the experts read, by the bundle's own tables."""
    held = int(shape.drafts)
    layers = [
        parts_of(
            replace(block_of(bundle, "neurons", layer, shape.neurons), held=held), facts.parts
        )
        for layer in range(facts.layers)
    ]  # fmt: skip
    sizes = np.array([[expert_nbytes(part, facts.count) for part in parts] for parts in layers])
    shares = () if popularity is None else tuple(tuple(map(float, row)) for row in popularity)
    return replace(
        facts, slot_nbytes=align(int(sizes.max())), popularity=shares,
        stored_nbytes=tuple(int(sizes[:, part].mean()) for part in range(facts.parts)),
    )  # fmt: skip


def _embed_nbytes(config: ModelConfig, shape: RunShape, embed: _Sizes) -> int:
    """Of embeddings in memory, always ready for use; a tied head has them already."""
    if config.tie_word_embeddings:
        return 0
    return 2 * embed.weights if shape.dense == "fp16" else embed.read(shape.dense)


def _block(kind: str, layer: int, sizes: _Sizes, precision: str, shape: RunShape) -> BlockFact:
    resident, read = sizes.resident(precision, shape), sizes.read(precision, shape.drafts)
    return BlockFact(kind, layer, resident, read)


def _blocks(
    kind: str, layer: int, sizes: _Sizes, precision: str, shape: RunShape, pieces: bool
) -> list[BlockFact]:
    """All records of one shard family, in pieces of whole chunks: how they are cut must not change
    a sum over neurons."""
    per_record = sizes.read(precision, shape.drafts) / sizes.records
    piece = _CUDA_PIECE_NBYTES if shape.kernels == "cuda" else PIECE_NBYTES
    step = max(1, round(piece / per_record / CHUNK)) * CHUNK
    if not pieces or step >= sizes.records:
        return [replace(_block(kind, layer, sizes, precision, shape), end=sizes.records)]
    found = []
    for start in range(0, sizes.records, step):
        end = min(start + step, sizes.records)
        resident = sizes.resident(precision, shape) * (end - start) // sizes.records
        # whole checksum blocks, one of them shared with a neighbour in every plane
        stored = align(int(per_record * (end - start)), BLOCK) + BLOCK
        found.append(BlockFact(kind, layer, resident, stored, start, end))
    return found


def _true_size(bundle: Bundle, fact: BlockFact, shape: RunShape) -> BlockFact:
    """What exactly a piece reads and keeps, by the bundle's own tables."""
    if fact.kind == "dense":
        return fact
    kind, name = ("dense", head_name(bundle)) if fact.kind == "head" else ("neurons", fact.layer)
    precision = shape.dense if fact.kind == "head" else shape.neurons
    block = block_of(bundle, kind, name, precision)
    block = replace(
        block, start=fact.start, end=fact.end, held=int(shape.drafts), stored=shape.stored
    )
    return replace(
        fact, resident_nbytes=block.resident_nbytes, streamed_nbytes=block.streamed_nbytes
    )


def _workspace_nbytes(config: ModelConfig, shape: RunShape) -> int:
    """Temporary values: chunks per thread, a prefill batch, attention, gathered neurons."""
    record = config.vectors * config.hidden_size
    width = max(record, config.num_attention_heads * config.head_dim)
    tokens = batch_tokens(config)
    batch = tokens * 4 * (8 * config.most_at_once + 8 * config.hidden_size)
    attend = 2 * 4 * config.head_dim * shape.ctx_size  # rotary tables
    attend *= 1 if config.local_rope_theta is None else 2
    logits = (4 + shape.at_once + min(LOGITS, shape.at_once)) * 4 * config.vocab_size
    if shape.kernels == "cuda":
        # one token's parts of attention may be more than what is taken of many tokens
        spans = -(-shape.ctx_size // SPAN)
        parts = 4 * config.num_attention_heads * spans * (config.head_dim + 2)
        kernels = CUDA_NBYTES + max(0, parts - PARTIAL_NBYTES)
        # passes of 1 to 8 tokens are recorded with the memory of what they give, drafts' besides
        logits += 2 * 36 * 4 * config.vocab_size
    elif shape.kernels == "c":
        kernels = max(8 * MiB, shape.threads * 128 * 4 * (config.hidden_size + 128))
        attend += 4 * shape.threads * shape.ctx_size
    else:
        # scores of a batch against the whole context, the f32 view of one layer's KV
        kernels = shape.threads * CHUNK * width * 12
        attend += 3 * 4 * config.num_attention_heads * tokens * shape.ctx_size
        attend += 2 * 4 * config.num_key_value_heads * config.head_dim * shape.ctx_size
    if "fp16" in (shape.dense, shape.neurons) and shape.kernels != "cuda":
        # exact rows that stream are decoded: chunks of neurons, a layer's attention as a whole
        kernels += shape.threads * CHUNK * width * _DECODE_NBYTES
        heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
        kernels += 4 * config.hidden_size * heads * config.head_dim
    gathered = 0
    for plane in () if shape.by_expert else shape.mix.upgrades:
        count = max(FETCH, shape.mix.counts(config.intermediate_size)[plane])
        weights = min(count, config.intermediate_size) * record
        if plane == "fp16":  # gathered at 16 bits, a piece of it being decoded
            need = 4 * weights + _DECODE_NBYTES * max(DECODE_WEIGHTS, record)
        else:
            need = 2 * weights
        gathered = max(gathered, need)
    return kernels + batch + attend + logits + gathered


def _vectors_nbytes(config: ModelConfig) -> int:
    """Norms, biases, routers and learned positions, and the norms of all down columns; experts have
    no use for these."""
    vectors = sum(prod(shape) for shape in small_tensors(config).values())
    if config.num_experts:
        return 10 * vectors  # with routers as operands besides: at most 6 bytes a weight
    return 4 * (vectors + config.num_hidden_layers * config.intermediate_size)


def _bundle_sizes(bundle: Bundle, kind: str, name: int | str) -> _Sizes:
    shards = {plane: bundle.shard(kind, name, plane).header for plane in PLANES}
    weights = sum(s.records * s.vectors * s.length for s in shards["int4"].sections)
    records = sum(s.records for s in shards["int4"].sections)
    planes = {plane: header.payload_nbytes for plane, header in shards.items()}
    return _Sizes(planes, weights, records)


def _estimate(shapes: list[tuple[int, int]], vectors: int, exact_type: str) -> _Sizes:
    planes = dict.fromkeys(PLANES, 0)
    weights = 0
    for rows, columns in shapes:
        layout = RecordLayout(vectors, columns)
        weights += rows * vectors * columns
        planes["int4"] += align(rows * layout.nbytes("int4"))
        planes["int8"] += align(rows * layout.nbytes("int8"))
        exact = rows * vectors * columns * ESTIMATED_EXACT_BITS[exact_type] / 8
        planes["fp16"] += align(int(exact))
    return _Sizes(planes, weights, sum(rows for rows, _ in shapes))
