"""What a model is: `ModelConfig`, and the names and shapes of the tensors that follow from it.

Fields are named as in Hugging Face's config.json. Everything is checked for type and range here,
once, so that no later code sizes an array by a number nobody looked at.
Knows nothing about files, weights or torch.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from m2c.errors import BadInput
from m2c.model.families import (
    FACTORS,
    FAMILIES,
    HIDDEN_ACTS,
    MODEL_TYPES,
    SUPPORTED,
    facts_of_hf,
    hf_of_facts,
)
from m2c.model.fields import Fields
from m2c.model.mixture import MOST_EXPERTS, SHARED_SIZE
from m2c.model.rope import ORIGINAL, PARTIAL, RopeScaling, rotary_of


@dataclass(frozen=True)
class ModelConfig:
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    hidden_act: str
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    # What sets some families apart. A manifest names these only where they are not as here, so
    # that a bundle and a fingerprint of a family without them never change.
    sliding_window: int | None = None  # positions that a sliding layer sees, its own included
    sliding_layers: tuple[int, ...] = ()
    qk_norm: bool = False  # an RMS norm of every head of q and k, before they are rotated
    post_norms: bool = False  # an RMS norm of what attention and FFN give, before it is added
    scale_embeddings: bool = False  # by the root of hidden_size
    local_rope_theta: float | None = None  # of sliding layers, which then have no rope_scaling
    query_pre_attn_scalar: int | None = None  # in place of head_dim in the scale of scores
    attn_logit_softcapping: float | None = None  # scores s become cap * tanh(s / cap)
    final_logit_softcapping: float | None = None
    hidden_act_param: float | None = None  # of fatrelu: what is not above it becomes zero
    gated: bool = True  # a neuron is a gate row, an up row and a down column; False: without gate
    layer_norms: bool = False  # norms take the mean off and have a bias; else they are RMS norms
    ffn_bias: bool = False  # of up and down, where neurons have no gate
    # the FFN reads what the layer's attention reads, through so many norms; 0: what attention gives
    parallel_norms: int = 0
    learned_positions: bool = False  # a vector is added to the embedding, and nothing is rotated
    num_experts: int = 0  # of every layer's FFN, each of intermediate_size neurons; 0: it is one
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = False  # the weights of a token's experts add up to 1
    # neurons of one more expert, which every token uses, weighted by a gate of its own; 0: none
    shared_expert_intermediate_size: int = 0
    rotary_dim: int | None = None  # how many values of a head are rotated, the first; None: all
    embedding_multiplier: float | None = None  # of embeddings; None of these four: 1
    residual_multiplier: float | None = None  # of what attention and FFN give, before it is added
    attention_multiplier: float | None = None  # of scores, in place of 1 / root of head_dim
    logits_scaling: float | None = None  # what logits are divided by

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], *, file: str = "config.json") -> "ModelConfig":
        """From a parsed config.json. Unknown keys are ignored, known ones checked.

        Raises UnsupportedModel for a model this version would compute wrongly, BadInput for a
        value of a wrong type or range.
        """
        return cls.from_dict(facts_of_hf(data, file), file=file)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, file: str = "manifest") -> "ModelConfig":
        """Inverse of `to_dict`: no other keys. Raises BadInput, UnsupportedModel."""
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if odd := sorted(
            (needed - set(data)) | (set(data) - {field.name for field in fields(cls)})
        ):
            raise BadInput(f"{file}: the model config lacks or does not know {odd[0][:80]!r}")
        read = Fields(data, file)
        heads = read.integer("num_attention_heads", 1, 2**12)
        kv_heads = read.integer("num_key_value_heads", 1, heads)
        if heads % kv_heads:
            raise BadInput(f"{file}: {heads} attention heads do not share {kv_heads} KV heads")
        head_dim = read.integer("head_dim", 2, 2**12)
        if head_dim % 2:
            raise BadInput(f"{file}: head_dim {head_dim} is odd, rotary embedding needs pairs")
        vocab = read.integer("vocab_size", 1, 2**22)
        layers = read.integer("num_hidden_layers", 1, 4096)
        window, sliding = _sliding(read, layers)
        experts, active = _experts(read)
        rotary, scaling = _rope(read, head_dim)
        return cls(
            model_type=read.choice("model_type", MODEL_TYPES, SUPPORTED),
            hidden_size=read.integer("hidden_size", 1, 2**17),
            intermediate_size=read.integer("intermediate_size", 1, 2**20),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=vocab,
            hidden_act=read.choice("hidden_act", HIDDEN_ACTS, SUPPORTED),
            rms_norm_eps=read.number("rms_norm_eps", 1e-12, 1.0),
            rope_theta=read.number("rope_theta", 1.0, 1e12),
            rope_scaling=scaling,
            max_position_embeddings=read.integer("max_position_embeddings", 1, 2**31 - 1),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            qkv_bias=read.flag("qkv_bias"),
            o_bias=read.flag("o_bias"),
            bos_token_id=read.token("bos_token_id", vocab),
            eos_token_ids=read.tokens("eos_token_ids", vocab),
            sliding_window=window,
            sliding_layers=sliding,
            qk_norm=read.flag("qk_norm", False),
            post_norms=read.flag("post_norms", False),
            scale_embeddings=read.flag("scale_embeddings", False),
            local_rope_theta=read.maybe_number("local_rope_theta", 1.0, 1e12),
            query_pre_attn_scalar=read.maybe_integer("query_pre_attn_scalar", 1, 2**20),
            attn_logit_softcapping=read.maybe_number("attn_logit_softcapping", 1e-3, 1e6),
            final_logit_softcapping=read.maybe_number("final_logit_softcapping", 1e-3, 1e6),
            hidden_act_param=_threshold(read),
            gated=read.flag("gated", True),
            layer_norms=read.flag("layer_norms", False),
            ffn_bias=_ffn_bias(read),
            parallel_norms=_parallel_norms(read),
            learned_positions=read.flag("learned_positions", False),
            num_experts=experts,
            num_experts_per_tok=active,
            norm_topk_prob=read.flag("norm_topk_prob", False),
            shared_expert_intermediate_size=_shared_size(read),
            rotary_dim=rotary,
            **_factors(read),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for a manifest: optional fields only where they differ from their default."""
        facts = self._facts()
        usual = {field.name for field in fields(self) if getattr(self, field.name) == field.default}
        return {name: value for name, value in facts.items() if name not in usual}

    def to_hf(self) -> dict[str, Any]:
        """As a config.json that other programs read too; `from_hf` gives this config back."""
        return hf_of_facts(self._facts())

    @property
    def activation(self) -> str:
        """As kernels call it: `kernels.operands.activation_of`."""
        if self.hidden_act_param is None:
            return self.hidden_act
        return f"{self.hidden_act}:{self.hidden_act_param!r}"

    @property
    def vectors(self) -> int:
        """Of a neuron, as long as the hidden size each."""
        return 3 if self.gated else 2

    @property
    def neurons(self) -> int:
        """Of a layer, those of all its experts."""
        return self.intermediate_size * max(1, self.num_experts)

    @property
    def most_at_once(self) -> int:
        """Neurons that are computed in one go: of an FFN, or of its largest expert."""
        return max(self.intermediate_size, self.shared_expert_intermediate_size)

    def window(self, layer: int) -> int | None:
        """How many positions a token sees in this layer, its own included; None: all."""
        return self.sliding_window if layer in self.sliding_layers else None

    def _facts(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        lists = {"eos_token_ids", "sliding_layers"}
        facts = asdict(self) | {name: list(getattr(self, name)) for name in lists}
        scaling = None if self.rope_scaling is None else self.rope_scaling.to_dict()
        return facts | {"rope_scaling": scaling}


def _threshold(read: Fields) -> float | None:
    if read.data.get("hidden_act") == "fatrelu":
        return read.number("hidden_act_param", 0.0, 1e6)
    if read.data.get("hidden_act_param") is not None:
        raise BadInput(f"{read.file}: hidden_act_param belongs to fatrelu alone")
    return None


def _ffn_bias(read: Fields) -> bool:
    biased = read.flag("ffn_bias", False)
    if biased and read.flag("gated", True):
        raise BadInput(f"{read.file}: ffn_bias belongs to neurons without a gate")
    return biased


def _parallel_norms(read: Fields) -> int:
    norms = read.maybe_integer("parallel_norms", 0, 2) or 0
    if norms and read.flag("post_norms", False):
        raise BadInput(f"{read.file}: parallel_norms and post_norms do not belong together")
    return norms


def _experts(read: Fields) -> tuple[int, int]:
    """num_experts and num_experts_per_tok, of the families that have experts and of no other."""
    family = FAMILIES.get(str(read.data.get("model_type")))
    if family is None or family.mixture is None:
        if read.data.get("num_experts") or read.data.get("num_experts_per_tok"):
            raise BadInput(f"{read.file}: experts in a model_type that has none")
        return 0, 0
    if not read.flag("gated", True) or read.maybe_integer("parallel_norms", 0, 2):
        raise BadInput(f"{read.file}: experts without a gate, or beside attention")
    experts = read.integer("num_experts", 2, MOST_EXPERTS)
    return experts, read.integer("num_experts_per_tok", 1, experts)


def _shared_size(read: Fields) -> int:
    """Of the families with a shared expert and of no other."""
    family = FAMILIES.get(str(read.data.get("model_type")))
    if family is not None and family.mixture is not None and family.mixture.shared:
        return read.integer(SHARED_SIZE, 1, 2**20)
    if read.data.get(SHARED_SIZE):
        raise BadInput(f"{read.file}: a shared expert in a model_type that has none")
    return 0


def _factors(read: Fields) -> dict[str, float | None]:
    """The factors of the families that have them, all four, and of no other."""
    family = FAMILIES.get(str(read.data.get("model_type")))
    known = family is not None and FACTORS.keys() <= family.defaults.keys()
    if not known and any(read.data.get(name) is not None for name in FACTORS):
        raise BadInput(f"{read.file}: multipliers in a model_type that has none")
    if known and (read.flag("qk_norm", False) or read.flag("post_norms", False)):
        raise BadInput(f"{read.file}: multipliers and norms within layers do not belong together")
    return {name: read.number(name, *FACTORS[name]) for name in FACTORS} if known else {}


def _rope(read: Fields, head_dim: int) -> tuple[int | None, RopeScaling | None]:
    """rotary_dim and rope_scaling, as the family has them."""
    family = FAMILIES.get(str(read.data.get("model_type")))
    knows = {} if family is None else family.defaults
    rotary = rotary_of(read, head_dim, partial=PARTIAL in knows)
    scaling = read.mapping("rope_scaling")
    if scaling is None:
        return rotary, None
    pairs = (rotary or head_dim) // 2 if ORIGINAL in knows else 0
    found = RopeScaling.from_dict(scaling, file=read.file, supported=SUPPORTED, long_pairs=pairs)
    return rotary, found


def _sliding(read: Fields, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """sliding_window and sliding_layers, both or none."""
    window = read.maybe_integer("sliding_window", 1, 2**31 - 1)
    sliding = read.integers("sliding_layers", 0, layers - 1)
    if (window is None) != (not sliding):
        raise BadInput(f"{read.file}: sliding_window and sliding_layers do not belong together")
    return window, sliding
