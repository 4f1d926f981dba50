"""The tensors of Mistral's own checkpoints by the names, and in the order of rows, of transformers.

Mistral rotates neighbors of a head, transformers its halves: rows of q and k are put in the other
order, which is all that differs in the values.
"""

from torch import Tensor

from headrace.core.model_info import ModelInfo
from headrace.layers.names import Layout, Split
from headrace.loader.iterators import Weights

_RENAMES = (
    (r"^tok_embeddings\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^layers\.", "model.layers."),
    (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.feed_forward\.(gate|experts)\.", r".block_sparse_moe.\1."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.qscale_weight$", ".weight_scale"),
    (r"\.qscale_act$", ".input_scale"),
)


def usual_weights(info: ModelInfo, weights: Weights) -> Weights:
    """Every tensor as a checkpoint of transformers has it."""
    splits = (_halves("q", info.num_heads), _halves("k", info.num_kv_heads))
    return Layout(renames=_RENAMES, splits=splits).canonical(weights)


def _halves(which: str, heads: int) -> Split:
    """Rows of each head: first those of even index, then the others."""

    def cut(tensor: Tensor) -> list[Tensor]:
        pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
        return [pairs.transpose(1, 2).flatten(0, 2)]

    return Split(rf"(.*\.{which}_proj\.weight)", (r"\1",), cut)
