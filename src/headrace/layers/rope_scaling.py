"""Rotary frequencies of every scaling that transformers knows, from a raw config.json.

A formula maps a `RopeSpec` (and sequence lengths, for the two that depend on them) to inverse
frequencies, fp32. Invariant: same fp32 operations in the same order as the models were trained
with, so that angles agree to the last bits. Does not know positions or caches.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.core.errors import LoadError

TEMPERATURE = "temperature"
"""The kind of a table that is no rotation."""


@dataclass(frozen=True)
class RopeSpec:
    """`dim`: rotated elements of a head. `params`: the scaling's own fields.

    `max_positions`: max_position_embeddings. `original`: the context before scaling.
    """

    kind: str
    theta: float
    dim: int
    max_positions: int
    original: int
    params: Mapping[str, Any]

    def number(self, key: str) -> float:
        """A numeric field that the scaling needs."""
        value = self.params.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise LoadError(
                f"rope scaling {self.kind!r} needs a number {key!r}, config.json has {value!r}",
                field=f"rope_parameters.{key}",
            )
        return float(value)

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")


def read_rope(hf: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """Read `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before).

    Raises:
        LoadError: unknown kind, or a field is missing.
    """
    params = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = params.get("rope_type") or params.get("type") or "default"
    if kind not in _FORMULAS:
        raise LoadError(
            f"unknown rope scaling {kind!r}; known: {', '.join(_FORMULAS)}", field="rope_type"
        )
    theta = params.get("rope_theta") or hf.get("rope_theta") or 10000.0
    partial = params.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    max_positions = int(hf.get("max_position_embeddings") or 2048)
    original = (
        hf.get("original_max_position_embeddings")
        or params.get("original_max_position_embeddings")
        or max_positions
    )
    spec = RopeSpec(
        kind=kind,
        theta=float(theta),
        dim=head_dim if kind == "proportional" else int(head_dim * partial),
        max_positions=max_positions,
        original=int(original),
        params=dict(params, partial_rotary_factor=partial),
    )
    inverse_frequencies(spec, torch.tensor([1]))  # complain now about missing fields
    return spec


def inverse_frequencies(spec: RopeSpec, lengths: Tensor) -> Tensor:
    """fp32 [dim / 2]; [n, dim / 2] for lengths int64 [n] if the scaling is `by_length`."""
    return _FORMULAS[spec.kind](spec, lengths)


def attention_factor(spec: RopeSpec) -> float:
    """What cosines and sines are multiplied with (YaRN and LongRoPE sharpen attention)."""
    given = spec.params.get("attention_factor")
    if spec.kind not in ("yarn", "longrope"):
        return 1.0
    if given is not None:
        return float(given)
    factor = _factor(spec)
    if spec.kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(spec.original)) if factor > 1 else 1.0
    mscale, mscale_all = spec.params.get("mscale"), spec.params.get("mscale_all_dim")
    if mscale and mscale_all:
        return _mscale(factor, mscale) / _mscale(factor, mscale_all)
    return _mscale(factor, 1.0)


def length_factors(spec: RopeSpec, lengths: Tensor) -> Tensor | None:
    """fp64 [n, 1] in the place of the attention factor, where short and long sequences have each
    their own (PhiMoE)."""
    short, long = spec.params.get("short_mscale"), spec.params.get("long_mscale")
    if spec.kind != "longrope" or short is None or long is None:
        return None
    return torch.where(lengths > spec.original, float(long), float(short)).double()[:, None]


def temperature(hf: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """A table that grows with the position and is a factor of q (arXiv 2501.19399), of Llama 4."""
    params = {
        "attn_scale": float(hf.get("attn_scale", 0.1)),
        "floor_scale": float(hf.get("floor_scale", 8192)),
    }
    context = int(hf.get("max_position_embeddings") or 2048)
    return RopeSpec(TEMPERATURE, 1.0, head_dim, context, context, params)


def temperatures(spec: RopeSpec, positions: Tensor) -> Tensor:
    """fp32 of each of the positions."""
    steps = torch.floor((positions.float() + 1) / spec.number("floor_scale"))
    return (torch.log1p(steps.double()) * spec.number("attn_scale") + 1).float()


def latent_scale(spec: RopeSpec) -> float:
    """What latent attention multiplies its scores with where `mscale_all_dim` is given."""
    mscale_all = spec.params.get("mscale_all_dim")
    if spec.kind == "default" or not mscale_all:
        return 1.0
    return _mscale(spec.number("factor"), mscale_all) ** 2


def _factor(spec: RopeSpec) -> float:
    if spec.params.get("factor") is None:
        return spec.max_positions / spec.original
    return spec.number("factor")


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _powers(theta: float | Tensor, dim: int) -> Tensor:
    """theta^(2i / dim), fp32 [dim / 2], or [n, dim / 2] for theta [n, 1]."""
    exponents: Tensor = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return theta**exponents


def _default(spec: RopeSpec, lengths: Tensor) -> Tensor:
    """arXiv 2104.09864."""
    return 1.0 / _powers(spec.theta, spec.dim)


def _linear(spec: RopeSpec, lengths: Tensor) -> Tensor:
    """Positions divided by a factor (arXiv 2306.15595)."""
    return _default(spec, lengths) / spec.number("factor")


def _dynamic(spec: RopeSpec, lengths: Tensor) -> Tensor:
    """The base grows with sequences longer than the trained context ("NTK-aware", dynamic)."""
    factor, context = spec.number("factor"), spec.max_positions
    growth = factor * lengths.clamp_min(context) / context - (factor - 1)
    base = spec.theta * growth ** (spec.dim / (spec.dim - 2))
    return 1.0 / _powers(base[:, None], spec.dim)


def _yarn(spec: RopeSpec, lengths: Tensor) -> Tensor:
    """Slow pairs interpolated, fast pairs left alone, a ramp between (arXiv 2309.00071)."""
    fast = spec.params.get("beta_fast") or 32
    slow = spec.params.get("beta_slow") or 1

    def pair_of(rotations: float) -> float:
        return (spec.dim * math.log(spec.original / (rotations * 2 * math.pi))) / (
            2 * math.log(spec.theta)
        )

    low, high = pair_of(fast), pair_of(slow)
    if spec.params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(spec.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    powers = _powers(spec.theta, spec.dim)
    return 1.0 / (_factor(spec) * powers) * (1 - keep) + 1.0 / powers * keep


def _longrope(spec: RopeSpec, lengths: Tensor) -> Tensor:
    """One searched factor per pair, another set for long sequences (arXiv 2402.13753)."""
    powers = _powers(spec.theta, spec.dim)
    short, long = (1.0 / (_factors(spec, key) * powers) for key in ("short_factor", "long_factor"))
    return torch.where(lengths[:, None] > spec.original, long, short)


def _factors(spec: RopeSpec, key: str) -> Tensor:
    values = spec.params.get(key)
    if not isinstance(values, list) or len(values) != spec.dim // 2:
        raise LoadError(
            f"rope scaling 'longrope' needs {spec.dim // 2} numbers in {key!r}",
            field=f"rope_parameters.{key}",
        )
    return torch.tensor(values, dtype=torch.float32)


def _llama3(spec: RopeSpec, lengths: Tensor) -> Tensor:
    """Long wavelengths slowed down, short ones kept, a blend between (Llama 3.1)."""
    factor = spec.number("factor")
    low, high = spec.number("low_freq_factor"), spec.number("high_freq_factor")
    plain = _default(spec, lengths)
    wavelength = 2 * math.pi / plain
    is_long = wavelength > spec.original / low
    is_short = wavelength < spec.original / high
    blend = (spec.original / wavelength - low) / (high - low)
    blended = (1 - blend) * plain / factor + blend * plain
    return torch.where(is_long, plain / factor, torch.where(is_short, plain, blended))


def _proportional(spec: RopeSpec, lengths: Tensor) -> Tensor:
    """Only the first share of the pairs turns; the exponents are those of the whole head."""
    turning = int(spec.params["partial_rotary_factor"] * spec.dim // 2)
    frequencies = _default(spec, lengths)
    frequencies[turning:] = 0
    return frequencies / float(spec.params.get("factor") or 1.0)


def _given_factors(spec: RopeSpec, lengths: Tensor) -> Tensor:
    """A divisor for each pair, as GGUF files have it for Llama 3."""
    factors = spec.params.get("factors")
    if not isinstance(factors, list) or len(factors) != spec.dim // 2:
        raise LoadError(f"rope scaling 'factors' needs {spec.dim // 2} numbers", field="factors")
    return _default(spec, lengths) / torch.tensor(factors, dtype=torch.float32)


_FORMULAS: dict[str, Callable[[RopeSpec, Tensor], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
    "factors": _given_factors,
}
