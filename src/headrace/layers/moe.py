"""Mixtures of experts: a router, gated experts of which each token takes a few, and shared ones.

Experts are cut over tensor-parallel ranks along their inner size, as every feed-forward is, or
dealt to groups of ranks (expert parallelism): every rank routes all tokens, computes what its
experts add, and the sum over ranks is the whole. Does not know how checkpoints stack experts beyond
the two usual ways.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.dist.topology import Cut, Shard, even, whole
from headrace.layers.build import Build
from headrace.layers.linear import ColumnLinear, tree_sum
from headrace.layers.mlp import ACTIVATIONS, MLP, MLPSpec
from headrace.ops.experts import ClampedSwiglu, PackedExperts, RouterSpec
from headrace.ops.packed import PackedWeight
from headrace.quant.base import (
    LinearShape,
    Part,
    QuantMethod,
    Targets,
    Weights,
    WeightTarget,
    cut_target,
    merged,
    plain,
    when_filled,
)
from headrace.quant.dense import AS_IS

# What no model has more of: each has layers of its own.
_MOST_EXPERTS = 1 << 12


@dataclass(frozen=True)
class MoESpec:
    """`inner_size` of one expert. `bias`: the router has one for the choice.

    `router_bias`: its logits have one; `expert_bias`: each matrix of an expert has one. Where an
    activation is `clamped`, the other one does not count. `shared`: inner size of the block that
    every token takes, 0 for none; `shared_gate`: the token decides how much of it. `on_input`:
    weights are on what experts see, not on what they give.
    """

    experts: int
    inner_size: int
    activation: str
    router: RouterSpec
    bias: bool = False
    shared: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    clamped: ClampedSwiglu | None = None
    on_input: bool = False

    def __post_init__(self) -> None:
        if self.experts > _MOST_EXPERTS:
            raise LoadError(f"{self.experts} experts; the most is {_MOST_EXPERTS}")
        if not 1 <= self.router.top_k <= self.experts:
            raise LoadError(
                f"num_experts_per_tok must be 1 to {self.experts}, not {self.router.top_k}",
                field="num_experts_per_tok",
            )


_KINDS = ("gates", "ups", "downs")
_PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Dealt:
    """Which `experts` are here, and which `part` of each."""

    experts: Cut
    first: int
    part: Shard

    @staticmethod
    def of(spec: MoESpec, at: int, count: int, part: Shard) -> "Dealt":
        """The `at`-th of `count` equal lots of the experts."""
        mine = even(spec.experts, Shard(at, count))
        return Dealt(mine, at * mine.local, part)

    def has(self, index: int) -> bool:
        return 0 <= index - self.first < self.experts.local


class ExpertBiases:
    """The biases of experts, as `PackedExperts` has them; checkpoints stack those of all."""

    def __init__(self, hidden_size: int, spec: MoESpec, dealt: Dealt) -> None:
        self.dealt, self.inner = dealt, even(spec.inner_size, dealt.part)
        self.hidden = whole(hidden_size)
        self.gate_up = torch.zeros(dealt.experts.local, 2 * self.inner.local)
        self.down = torch.zeros(dealt.experts.local, hidden_size)

    def targets(self, prefix: str) -> Targets:
        down = cut_target(plain(self.down), self.dealt.experts, self.hidden)
        if self.dealt.part.rank:  # one part adds them, so that the sum has them once
            down = replace(down, copy=_ignore)
        return {
            f"{prefix}gate_up_proj_bias": self._gate_up_target(),
            f"{prefix}down_proj_bias": down,
        }

    def _gate_up_target(self) -> WeightTarget:
        experts, inner = self.dealt.experts, self.inner
        halves = [cut_target(plain(half), experts, inner) for half in self.gate_up.chunk(2, dim=1)]

        def copy(source: Tensor) -> None:
            for half, part in zip(halves, source.chunk(2, dim=1), strict=True):
                half.copy(part)

        return WeightTarget((experts.full, 2 * inner.full), copy)


def _biases(hidden_size: int, spec: MoESpec, dealt: Dealt) -> ExpertBiases | None:
    return ExpertBiases(hidden_size, spec, dealt) if spec.expert_bias else None


def _ignore(source: Tensor) -> None:
    """The copy of what another rank has."""


def _packed(
    gates: Sequence[PackedWeight],
    ups: Sequence[PackedWeight],
    downs: Sequence[PackedWeight],
    biases: ExpertBiases | None,
    orders: tuple[Tensor | None, ...] = (),
) -> PackedExperts:
    return PackedExperts(
        tuple(gates),
        tuple(ups),
        tuple(downs),
        biases.gate_up if biases else None,
        biases.down if biases else None,
        orders,
    )


def _stacks(prefix: str, single: Targets, count: int) -> Targets:
    """One tensor of all experts' gates and ups, one of their downs, out of those of each."""

    def pour(*parts: str) -> WeightTarget:
        names = tuple(f"{prefix}{i}.{part}.weight" for i in range(count) for part in parts)
        rows, columns = single[names[0]].shape

        def copy(source: Tensor) -> None:
            pieces = source.reshape(-1, rows, columns)
            for name, piece in zip(names, pieces, strict=True):
                single[name].copy(piece)

        return WeightTarget((count, len(parts) * rows, columns), copy, covers=names)

    return {
        f"{prefix}gate_up_proj": pour(*_PARTS[:2]),
        f"{prefix}down_proj": pour(_PARTS[2]),
    }


class SingleExperts:
    """Experts of which each matrix is stored, or quantized on load, by its own method, and packed
    as it comes."""

    def __init__(self, hidden_size: int, spec: MoESpec, build: Build, dealt: Dealt) -> None:
        self.first, self.dealt, self.dtype = dealt.first, dealt, build.dtype
        self.count = spec.experts
        inner, hidden = even(spec.inner_size, dealt.part), whole(hidden_size)
        self.methods: dict[str, QuantMethod] = {}
        self.shapes: dict[str, LinearShape] = {}
        self.weights: dict[str, Weights] = {}
        for name in (f"{i}.{part}" for i in range(spec.experts) for part in _PARTS):
            rows, columns = (hidden, inner) if name.endswith(_PARTS[2]) else (inner, hidden)
            self.methods[name] = build.method(name, kind="expert")
            self.shapes[name] = LinearShape((Part(name, rows),), columns)
        for name in (f"{i}.{part}" for i in range(spec.experts) for part in _PARTS):
            if dealt.has(int(name.split(".")[0])):
                self.weights[name] = self._empty(name)
        self.biases = _biases(hidden_size, spec, dealt)
        self._packed: PackedExperts | None = None

    def _empty(self, name: str) -> Weights:
        return self.methods[name].create_weights(self.shapes[name], self.dtype)

    def targets(self, prefix: str) -> Targets:
        found: Targets = {}
        for name, method in self.methods.items():
            weights = self.weights.get(name)
            targets = method.targets(self.shapes[name], weights or self._empty(name), prefix)
            if weights is None:
                found |= {key: replace(target, copy=_ignore) for key, target in targets.items()}
            else:
                found |= when_filled(targets, partial(method.process_after_loading, weights))
        if f"{prefix}0.{_PARTS[0]}.weight" in found:
            found |= _stacks(prefix, found, self.count)
        return found | (self.biases.targets(prefix) if self.biases else {})

    @property
    def packed(self) -> PackedExperts:
        """The experts that are here, as `ops.moe_packed` takes them."""
        if self._packed is None:
            numbers = range(self.first, self.first + self.dealt.experts.local)
            gates, ups, downs = (
                [self._matrix(index, part) for index in numbers] for part in _PARTS
            )
            self._packed = _packed(gates, ups, downs, self.biases, self._orders(numbers))
        return self._packed

    def _orders(self, numbers: range) -> tuple[Tensor | None, ...]:
        names = [f"{index}.{part}" for part in _PARTS for index in numbers]
        orders = tuple(self.weights.get(name, {}).get("order") for name in names)
        return orders if any(order is not None for order in orders) else ()

    def _matrix(self, index: int, part: str) -> PackedWeight:
        """Zeros behind the last expert: nobody takes those."""
        if f"{index}.{part}" not in self.weights:
            shape = self.shapes[f"0.{part}"]
            return ops.pack(torch.zeros(shape.local_rows, shape.columns.local, dtype=self.dtype))
        found: PackedWeight = self.weights[f"{index}.{part}"]["packed"]
        return found


class Experts:
    """The floats of some experts: unpacked while they are loaded, packed when all are there."""

    def __init__(self, hidden_size: int, spec: MoESpec, build: Build, dealt: Dealt) -> None:
        self.count, self.hidden = spec.experts, hidden_size
        self.first, self.here = dealt.first, dealt.experts.local
        self.inner = even(spec.inner_size, dealt.part)
        self.dtype = build.dtype
        self.biases = _biases(hidden_size, spec, dealt)
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
        biases = self.biases.targets(prefix) if self.biases else {}
        return found | _stacks(prefix, found, self.count) | biases

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
        return target if 0 <= place < self.here else replace(target, copy=_ignore)

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
        return {f"{kind}.{i}": shapes[kind] for kind in _KINDS for i in range(self.here)}

    @property
    def packed(self) -> PackedExperts:
        """The experts that are here, as `ops.moe_packed` takes them."""
        if self._packed is None:
            gates, ups, downs = (
                [self.weights[f"{kind}.{index}"] for index in range(self.here)] for kind in _KINDS
            )
            self._packed = _packed(gates, ups, downs, self.biases)
        return self._packed


class MoE:
    """x [tokens, hidden] -> [tokens, hidden]."""

    def __init__(self, hidden_size: int, spec: MoESpec, build: Build) -> None:
        self.spec, self.group = spec, build.group
        self.activation = spec.clamped or ACTIVATIONS[spec.activation]
        self.router = _small(hidden_size, "gate", spec.experts, build, bias=spec.router_bias)
        self.bias = torch.zeros(spec.experts) if spec.bias else None
        shard, part = build.expert_shards
        first, units = shard.rank * shard.pieces, shard.size * shard.pieces
        self.experts = [
            _experts(hidden_size, spec, build.at("experts"), Dealt.of(spec, at, units, part))
            for at in range(first, first + shard.pieces)
        ]
        # Sums over units of experts are fp32, as those of `TreeLinear`.
        self.wide = build.split.units > 0 and build.dtype != torch.float32
        shared = MLPSpec(spec.shared, spec.activation) if spec.shared else None
        self.shared = MLP(hidden_size, shared, build.at("shared_expert")) if shared else None
        gate = _small(hidden_size, "shared_expert_gate", 1, build) if spec.shared_gate else None
        self.shared_gate = gate

    def __call__(self, x: Tensor) -> Tensor:
        ids, weights = ops.router_topk(self.router(x), self.spec.router, self.bias)
        taken = ops.cast(x, torch.float32) if self.wide else x
        act, on_input = self.activation, self.spec.on_input
        parts = [
            ops.moe_packed(taken, some.packed, ids, weights, act, on_input, some.first)
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


def _small(in_size: int, name: str, rows: int, build: Build, *, bias: bool = False) -> ColumnLinear:
    """A matrix that every rank holds."""
    cut: Cut = whole(rows)
    return ColumnLinear((Part(name, cut),), in_size, build, kind="router", bias=bias)


def _experts(
    hidden_size: int, spec: MoESpec, build: Build, dealt: Dealt
) -> Experts | SingleExperts:
    names = [f"{index}.{part}" for index in range(spec.experts) for part in _PARTS]
    floats = all(build.method(name, kind="expert") == AS_IS for name in names)
    return (Experts if floats else SingleExperts)(hidden_size, spec, build, dealt)
