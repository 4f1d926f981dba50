"""Mixtures of experts: a router, gated experts of which each token takes a few, and shared ones.

Experts are cut over tensor-parallel ranks along their inner size, as every feed-forward is, or
dealt to groups of ranks (expert parallelism): every rank routes all tokens, computes what its
experts add, and the sum over ranks is the whole. Does not know how checkpoints stack experts beyond
the two usual ways.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.dist.topology import Cut, Shard, even, whole
from headrace.layers.build import Build
from headrace.layers.linear import ColumnLinear, tree_sum
from headrace.layers.mlp import ACTIVATIONS, MLP, MLPSpec
from headrace.ops.experts import PackedExperts, RouterSpec
from headrace.ops.packed import PackedWeight
from headrace.quant.base import (
    Part,
    Targets,
    WeightTarget,
    cut_target,
    merged,
    plain,
    when_filled,
)
from headrace.quant.dense import METHODS


@dataclass(frozen=True)
class MoESpec:
    """`inner_size` of one expert. `bias`: the router has one for the choice.

    `shared`: inner size of the block that every token takes, 0 for none; `shared_gate`: the token
    decides how much of it.
    """

    experts: int
    inner_size: int
    activation: str
    router: RouterSpec
    bias: bool = False
    shared: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.router.top_k <= self.experts:
            raise LoadError(
                f"num_experts_per_tok must be 1 to {self.experts}, not {self.router.top_k}",
                field="num_experts_per_tok",
            )


_KINDS = ("gates", "ups", "downs")


class Experts:
    """Some of the experts: unpacked while they are loaded, packed when all are there.

    `shard` of the experts, and `part` of each. Numbers are those of the checkpoint.
    """

    def __init__(
        self, hidden_size: int, spec: MoESpec, dtype: torch.dtype, shard: Shard, part: Shard
    ) -> None:
        self.count, self.hidden = spec.experts, hidden_size
        mine = even(spec.experts, shard)
        self.first, self.here = shard.rank * mine.local, mine.local
        self.inner = even(spec.inner_size, part)
        self.dtype = dtype
        # Kind and number of an expert -> its matrix; whoever saves and restores weights walks it.
        self.weights: dict[str, PackedWeight] = {}
        self._packed: PackedExperts | None = None
        self._gate_up: Tensor | None = None
        self._down: Tensor | None = None

    def targets(self, prefix: str) -> Targets:
        """Each expert alone, and all of them as [experts, gate | up, hidden]."""
        found: Targets = {}
        for index in range(self.count):
            own = f"{prefix}{index}."
            found[f"{own}gate_proj.weight"] = self._target(index, 0)
            found[f"{own}up_proj.weight"] = self._target(index, 1)
            found[f"{own}down_proj.weight"] = self._target(index, 2)
        found = when_filled(found, self._pack)
        return found | self._stacks(prefix, found)

    def _target(self, index: int, which: int) -> WeightTarget:
        place = index - self.first
        if which == 2:
            target = cut_target(
                lambda source: self._open(source)[1][place], whole(self.hidden), self.inner
            )
        else:
            target = cut_target(
                lambda source: self._open(source)[0][place].chunk(2)[which],
                self.inner,
                whole(self.hidden),
            )
        return target if 0 <= place < self.here else replace(target, copy=lambda source: None)

    def _stacks(self, prefix: str, single: Targets) -> Targets:
        """One tensor of all experts' gates and ups, one of their downs."""
        inner, hidden = self.inner.full, self.hidden

        def names(*parts: str) -> tuple[str, ...]:
            return tuple(
                f"{prefix}{i}.{part}_proj.weight" for i in range(self.count) for part in parts
            )

        def pour(members: tuple[str, ...], rows: int) -> WeightTarget:
            def copy(source: Tensor) -> None:
                pieces = source.reshape(-1, rows, source.shape[-1])
                for name, piece in zip(members, pieces, strict=True):
                    single[name].copy(piece)

            columns = hidden if rows == inner else inner
            per_expert = len(members) // self.count
            shape = (self.count, per_expert * rows, columns)
            return WeightTarget(shape=shape, copy=copy, covers=members)

        return {
            f"{prefix}gate_up_proj": pour(names("gate", "up"), inner),
            f"{prefix}down_proj": pour(names("down"), hidden),
        }

    def _open(self, source: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._gate_up is None or self._down is None:
            dtype, inner = ops.stored_dtype(source, self.dtype), self.inner.local
            self._gate_up = torch.zeros(self.here, 2 * inner, self.hidden, dtype=dtype)
            self._down = torch.zeros(self.here, self.hidden, inner, dtype=dtype)
        return self._gate_up, self._down

    def _pack(self) -> None:
        packed = ops.pack_experts(*self._open(self.dtype))  # all may be padding
        for kind in _KINDS:
            matrices = enumerate(getattr(packed, kind))
            self.weights |= {f"{kind}.{index}": weight for index, weight in matrices}
        self._gate_up = self._down = None

    def packed_shapes(self) -> dict[str, tuple[int, int]]:
        """What `weights` has once all are packed, each [out, in]."""
        inner, hidden = self.inner.local, self.hidden
        shapes = {"gates": (inner, hidden), "ups": (inner, hidden), "downs": (hidden, inner)}
        return {f"{kind}.{i}": shapes[kind] for kind in _KINDS for i in range(self.count)}

    @property
    def packed(self) -> PackedExperts:
        """The experts that are here, as `ops.moe_packed` takes them."""
        if self._packed is None:
            gates, ups, downs = (
                tuple(self.weights[f"{kind}.{index}"] for index in range(self.here))
                for kind in _KINDS
            )
            self._packed = PackedExperts(gates, ups, downs)
        return self._packed


class MoE:
    """x [tokens, hidden] -> [tokens, hidden]."""

    def __init__(self, hidden_size: int, spec: MoESpec, build: Build) -> None:
        self.spec, self.group = spec, build.group
        self.activation = ACTIVATIONS[spec.activation]
        # Routers are small, and an error in them takes another expert.
        exact = replace(build, quant=METHODS["none"])
        self.router = _small(hidden_size, "gate", spec.experts, exact)
        self.bias = torch.zeros(spec.experts) if spec.bias else None
        shard, part = build.expert_shards
        first, units = shard.rank * shard.pieces, shard.size * shard.pieces
        self.experts = [
            Experts(hidden_size, spec, build.dtype, Shard(first + i, units), part)
            for i in range(shard.pieces)
        ]
        # Sums over units of experts are fp32, as those of `TreeLinear`.
        self.wide = build.split.units > 0 and build.dtype != torch.float32
        shared = MLPSpec(spec.shared, spec.activation) if spec.shared else None
        self.shared = MLP(hidden_size, shared, build) if shared else None
        gate = _small(hidden_size, "shared_expert_gate", 1, exact) if spec.shared_gate else None
        self.shared_gate = gate

    def __call__(self, x: Tensor) -> Tensor:
        ids, weights = ops.router_topk(self.router(x), self.spec.router, self.bias)
        taken = ops.cast(x, torch.float32) if self.wide else x
        parts = [
            ops.moe_packed(taken, some.packed, ids, weights, self.activation, some.first)
            for some in self.experts
        ]
        y = self.group.all_reduce(tree_sum(parts), x.dtype)
        if self.shared is None:
            return y
        gate = self.shared_gate(x) if self.shared_gate else None
        return ops.combine(y, self.shared(x), gate=gate)

    def targets(self, prefix: str) -> Targets:
        experts = merged([some.targets(f"{prefix}experts.") for some in self.experts])
        found = self.router.targets(prefix) | experts
        if self.bias is not None:
            bias = cut_target(plain(self.bias), whole(len(self.bias)))
            found[f"{prefix}gate.e_score_correction_bias"] = bias
        if self.shared is not None:
            found |= self.shared.targets(f"{prefix}shared_expert.")
        if self.shared_gate is not None:
            found |= self.shared_gate.targets(prefix)
        return found


def _small(in_size: int, name: str, rows: int, build: Build) -> ColumnLinear:
    """A matrix that every rank holds."""
    cut: Cut = whole(rows)
    return ColumnLinear((Part(name, cut),), in_size, build)
