"""What all weights of a model take in few bits (`lowbit_weights`), and what that spares, before any are rounded. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from rowcast.kernels.lowbit_sizes import stored_bytes, work_bytes
from rowcast.runtime.spec import ModelSpec, layer_parameters

HEAD_BITS = {8: 8, 4: 8}
"""Of the LM head, by those of the layers: in 4 bits it costs SmolLM2 a tenth of the acceptance that 4-bit layers leave."""


def rounded_bytes(spec: ModelSpec, bits: int) -> int:
    """Of the rounded matrices of all layers and of the LM head. Of a rank's share that cuts groups of inputs: but for one more group of
    the output and down projections, at most."""
    layer = sum(stored_bytes(rows, columns, bits) for rows, columns in _matrices(spec))
    return spec.num_layers * layer + stored_bytes(spec.vocab_size, spec.embed_size, HEAD_BITS[bits])


def replaced_bytes(spec: ModelSpec, width: int) -> int:
    """Of the same matrices in the model's own format."""
    layer = sum(rows * columns for rows, columns in _matrices(spec))
    return (spec.num_layers * layer + spec.vocab_size * spec.embed_size) * width


def spared_bytes(spec: ModelSpec, width: int) -> int:
    """Of those that nobody needs beside the view: all but an LM head that is the embedding, too."""
    return replaced_bytes(spec, width) - spec.tied_embeddings * spec.vocab_size * spec.embed_size * width


def bias_bytes(spec: ModelSpec, width: int, *, banks: bool) -> int:
    """Of the vectors in the layers' products that a view holds for itself. `banks`: made of banks, with which it shares them unless it
    has to join two."""
    if banks:
        return spec.num_layers * 2 * spec.intermediate_size * width if spec.gated and spec.mlp_bias else 0
    return spec.num_layers * (layer_parameters(spec) - sum(rows * columns for rows, columns in _matrices(spec))) * width


def making_bytes(spec: ModelSpec, width: int) -> int:
    """Most that making it takes for a while: a sub-layer or the LM head in the model's own format, and what is rounded of it."""
    qkv, out, up, down = (rows * columns for rows, columns in _matrices(spec))
    return max(qkv + out, up + down, spec.vocab_size * spec.embed_size) * width + product_bytes(spec)


def product_bytes(spec: ModelSpec) -> int:
    """Most that one product of many tokens takes beside its result."""
    return max(work_bytes(spec.vocab_size * spec.embed_size), *(work_bytes(r * c) for r, c in _matrices(spec)))


def token_bytes(spec: ModelSpec) -> int:
    """For each token of a pass: the widest product in float32."""
    return 4 * max(rows for rows, _ in _matrices(spec))


def _matrices(spec: ModelSpec) -> Sequence[tuple[int, int]]:
    """Rows and columns of a layer's products: qkv, out, up with gate, down."""
    hidden, neurons = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return (queries + 2 * keys, hidden), (hidden, queries), ((2 if spec.gated else 1) * neurons, hidden), (hidden, neurons)
