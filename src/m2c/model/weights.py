"""A checkpoint's tensors in the shape the rest of m2c works with.

Knows nothing about bundles or planes.
"""

import torch
from torch import Tensor

from m2c.bundle.planes import RecordLayout
from m2c.errors import BadInput
from m2c.kernels.rows import ExactRows
from m2c.model.attention import MATRICES
from m2c.model.checkpoint import Checkpoint
from m2c.model.tensors import experts_of, ffn_names, shared_names, small_tensors


def neuron_records(checkpoint: Checkpoint, layer: int) -> Tensor:
    """[neurons, vectors * hidden]: gate row if there is one, up row, down column of every neuron,
    in the stored type; experts one after another.

    Needs the memory of the layer's FFN plus its largest matrix. Raises BadInput on NaN or infinity.
    """
    parts = experts_of(checkpoint.config)
    first = expert_records(checkpoint, layer, parts[0])
    if len(parts) == 1:
        return first
    size = len(first)
    records = first.new_empty((len(parts) * size, first.shape[1]))
    records[:size] = first
    for i in range(1, len(parts)):
        records[i * size : (i + 1) * size] = expert_records(checkpoint, layer, parts[i])
    return records


def expert_records(checkpoint: Checkpoint, layer: int, expert: int | None) -> Tensor:
    """As `neuron_records`, of one expert; None: of an FFN that is one."""
    return _records(checkpoint, ffn_names(layer, expert, gated=checkpoint.config.gated))


def shared_records(checkpoint: Checkpoint, layer: int) -> Tensor:
    """As `neuron_records`, of the expert that every token uses."""
    return _records(checkpoint, shared_names(layer))


def _records(checkpoint: Checkpoint, names: tuple[str, ...]) -> Tensor:
    hidden, vectors = checkpoint.config.hidden_size, len(names)
    records = None
    for position, name in enumerate(names):
        matrix = checkpoint.read(name)
        require_finite(matrix, checkpoint, name)
        if position == vectors - 1:
            matrix = matrix.T
        if records is None:
            records = torch.empty((matrix.shape[0], vectors * hidden), dtype=matrix.dtype)
        records[:, position * hidden : (position + 1) * hidden] = matrix
    assert records is not None
    return records


def layer_rows(checkpoint: Checkpoint, layer: int) -> dict[str, ExactRows]:
    """Operands of a layer's attention matrices and, as "ffn", its neurons unless they are in
    experts."""
    rows = {}
    if not checkpoint.config.num_experts:
        layout = RecordLayout(checkpoint.config.vectors, checkpoint.config.hidden_size)
        rows["ffn"] = ExactRows(layout, neuron_records(checkpoint, layer))
    for short in MATRICES:
        name = matrix_name(layer, short)
        matrix = checkpoint.read(name)
        require_finite(matrix, checkpoint, name)
        rows[short] = ExactRows(RecordLayout(1, matrix.shape[1]), matrix)
    return rows


def matrix_name(layer: int, short: str) -> str:
    return f"model.layers.{layer}.self_attn.{short}.weight"


def vector_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Norms, biases, routers and learned positions, f32, by Hugging Face name."""
    found = {}
    for name in small_tensors(checkpoint.config):
        found[name] = checkpoint.read(name).float()
        require_finite(found[name], checkpoint, name)
    return found


def require_finite(tensor: Tensor, checkpoint: Checkpoint, name: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise BadInput(
            f"{checkpoint.path}: {name} holds NaN or infinity", "fetch the checkpoint again"
        )
