"""The description of a decoder-only transformer: what a family reads out of config.json.

Data only. A field exists because some family differs from the others in it.
"""

from dataclasses import dataclass
from typing import Literal

from headrace.layers.attention import AttentionSpec
from headrace.layers.latent import LatentSpec
from headrace.layers.mlp import MLPSpec
from headrace.layers.moe import MoESpec
from headrace.layers.names import Layout
from headrace.layers.norm import NormSpec
from headrace.layers.rope_scaling import RopeSpec

Wiring = Literal["pre", "post", "both", "parallel", "parallel-two"]


@dataclass(frozen=True)
class LayerSpec:
    """Attention and feed-forward on a residual stream.

    `wiring`: where norms stand. "pre": before each block. "post": after each block, before it is
    added. "both": before and after. "parallel": both blocks read the same norm of the stream;
    "parallel-two": each a norm of its own. `branch_scale` multiplies what a block adds.
    """

    attention: AttentionSpec | LatentSpec
    mlp: MLPSpec | MoESpec
    wiring: Wiring = "pre"
    branch_scale: float = 1.0


_AS_IS = Layout()


@dataclass(frozen=True)
class DecoderSpec:
    """`ropes`: the rotary embeddings that layers name by index. `positions`: learned ones, 0: none;
    the row of position 0 is `first_position`. Logits are scaled, then capped."""

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    ropes: tuple[RopeSpec, ...] = ()
    positions: int = 0
    first_position: int = 0
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    tied: bool = False
    head_bias: bool = False
    layout: Layout = _AS_IS
