"""What config.json says of a mixture of experts: its keys to the fields of a config.

Knows nothing about families but the names of their keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

SHARED_SIZE: Final = "shared_expert_intermediate_size"
MOST_EXPERTS: Final = 2**10
EXPERT_FACTS: Final = ("num_experts", "num_experts_per_tok", "norm_topk_prob", SHARED_SIZE)


@dataclass(frozen=True)
class Mixture:
    """The keys of a family: for how many experts there are, and for the size of each."""

    count_key: str = "num_experts"
    size_key: str = "moe_intermediate_size"
    shared: bool = False  # one more, which every token uses: SHARED_SIZE

    def one_name(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """How many experts there are, under the family's own key: transformers writes either."""
        keys = ("num_experts", "num_local_experts")
        said = next((data[key] for key in keys if data.get(key) is not None), None)
        return {} if said is None else {self.count_key: said}

    def read(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "num_experts": data[self.count_key],
            "num_experts_per_tok": data["num_experts_per_tok"],
            "norm_topk_prob": data.get("norm_topk_prob", False),
            **({SHARED_SIZE: data[SHARED_SIZE]} if self.shared else {}),
        }

    def write(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """`read` undone."""
        found = {name: facts[name] for name in EXPERT_FACTS}
        found[self.count_key] = found.pop("num_experts")
        found[self.size_key] = facts["intermediate_size"]
        if not self.shared:
            del found[SHARED_SIZE]
        return found


def odd_mixture(data: Mapping[str, Any]) -> str:
    """What a mixture of experts has that is not computed here; "" for nothing."""
    if data.get("mlp_only_layers") or data.get("decoder_sparse_step") not in (None, 1):
        return "a mixture of experts in some layers only"
    if data["model_type"] == "qwen2_moe" and data.get("qkv_bias") is False:
        return "qwen2_moe without biases of q, k and v"
    return "use_sliding_window" if data.get("use_sliding_window") else ""
