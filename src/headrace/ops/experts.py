"""Mixtures of experts: how tokens are routed, and weights as one implementation multiplies them.

`PackedExperts` is made once by `ops.pack_experts`. Knows no models.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from headrace.ops.packed import PackedWeight


@dataclass(frozen=True)
class RouterSpec:
    """How experts are chosen and weighted.

    Scores are the softmax over all experts, or the `sigmoid` of each. Of more than one of `groups`
    only the `top_groups` are chosen from whose `group_best` best scores have the largest sum. The
    weights are the scores, divided by their sum if `renormalize`, times `scale`.

    With a `jitter` above 0 it is the SparseMixer of arXiv 2409.12136 as it is used after training:
    the best expert's weight is its share of a softmax over the experts whose logit is at most
    2 * jitter * max(|logit|, best) below the best one, and so on with those that are left.
    """

    top_k: int
    renormalize: bool = True
    sigmoid: bool = False
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    scale: float = 1.0
    jitter: float = 0.0


@dataclass(frozen=True)
class ClampedSwiglu:
    """g * sigmoid(alpha * g) * (u + 1), g = min(gate, limit), u = up within [-limit, limit]."""

    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """Each expert's gate and up [inner, hidden] and down [hidden, inner], each of its own format.

    Biases are fp32, [experts, gate | up] and [experts, hidden]. `orders`: which inputs each of
    gates, ups and downs, in a row, takes in which order, None for all as they are; none where that
    is so of every matrix. `handles`: what implementations keep beside them.
    """

    gates: tuple[PackedWeight, ...]
    ups: tuple[PackedWeight, ...]
    downs: tuple[PackedWeight, ...]
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    orders: tuple[Tensor | None, ...] = ()
    handles: dict[str, Any] = field(default_factory=dict, repr=False)
