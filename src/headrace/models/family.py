"""What families share when they read config.json into a `DecoderSpec`.

Raises LoadError, which names the field, for a configuration that cannot be. Builds nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.layers.attention import AttentionSpec
from headrace.layers.mlp import MLPSpec
from headrace.layers.names import Layout
from headrace.layers.norm import NormSpec
from headrace.layers.rope_scaling import RopeSpec, read_rope
from headrace.models.spec import DecoderSpec, LayerSpec

Fields = dict[str, Any]

# Names that many older families have in common.
_WINDOWED, _FULL = "sliding_attention", "full_attention"


def decoder(
    info: ModelInfo,
    *,
    norm: NormSpec | None = None,
    windows: Sequence[int] = (),
    ropes: tuple[RopeSpec, ...] | None = None,
    attention: Fields | None = None,
    mlp: Fields | None = None,
    layer: Fields | None = None,
    **fields: Any,
) -> DecoderSpec:
    """A decoder like Llama but for what is given: fields of the norm, of layers and of the whole.

    `windows`: the sliding window of each layer, 0 or nothing for none.
    """
    hf = info.text
    norm = norm or NormSpec(float(hf.get("rms_norm_eps", 1e-6)))
    one = LayerSpec(
        attention=replace(plain_attention(info, norm), **(attention or {})),
        mlp=MLPSpec(**_mlp_fields(info, mlp or {})),
        **(layer or {}),
    )
    spec = DecoderSpec(
        vocab_size=info.vocab_size,
        hidden_size=info.hidden_size,
        layers=with_windows(one, windows or no_windows(info)),
        norm=norm,
        ropes=(read_rope(hf, info.head_dim),) if ropes is None else ropes,
        tied=bool(info.hf.get("tie_word_embeddings", False)),
    )
    return replace(spec, **fields)


def plain_attention(info: ModelInfo, norm: NormSpec) -> AttentionSpec:
    """Sizes of config.json and nothing special."""
    return AttentionSpec(
        hidden_size=info.hidden_size,
        heads=info.num_heads,
        kv_heads=info.num_kv_heads,
        head_dim=info.head_dim,
        norm=norm,
    )


def attention_bias(info: ModelInfo) -> Fields:
    """Biases on q, k, v and on the output, where `attention_bias` says so."""
    bias = bool(info.text.get("attention_bias", False))
    return {"qkv_bias": bias, "out_bias": bias}


def _mlp_fields(info: ModelInfo, given: Fields) -> Fields:
    hf = info.text
    found = dict(given)
    if "inner_size" not in found:
        found["inner_size"] = size(hf, "intermediate_size")
    if "activation" not in found:
        found["activation"] = str(hf.get("hidden_act") or "silu")
    return found


def attention_of(layer: LayerSpec) -> AttentionSpec:
    """Of a layer that keeps keys and values."""
    assert isinstance(layer.attention, AttentionSpec)
    return layer.attention


def with_windows(layer: LayerSpec, windows: Sequence[int]) -> tuple[LayerSpec, ...]:
    """The same layer once for each of the sliding windows."""
    return tuple(
        replace(layer, attention=replace(attention_of(layer), window=window)) for window in windows
    )


def with_ropes(spec: DecoderSpec, ropes: Sequence[int | None]) -> DecoderSpec:
    """Which rotary embedding each layer takes."""
    layers = tuple(
        replace(layer, attention=replace(attention_of(layer), rope=rope))
        for layer, rope in zip(spec.layers, ropes, strict=True)
    )
    return replace(spec, layers=layers)


def typed_ropes(info: ModelInfo, local: RopeSpec) -> tuple[RopeSpec, RopeSpec]:
    """Of full_attention and sliding_attention layers, which is `local` where none is given."""
    given = info.text.get("rope_parameters") or {}
    if not {_FULL, _WINDOWED} & given.keys():
        return read_rope(info.text, info.head_dim), local
    full, windowed = (
        read_rope(dict(info.text, rope_parameters=given.get(kind) or {}), info.head_dim)
        for kind in (_FULL, _WINDOWED)
    )
    return full, windowed


def no_windows(info: ModelInfo) -> tuple[int, ...]:
    return (0,) * info.num_layers


def typed_windows(info: ModelInfo, default: Sequence[str] | None = None) -> tuple[int, ...]:
    """Of `layer_types`, or of `default` where config.json has none."""
    window = int(info.text.get("sliding_window") or 0)
    return tuple(window if kind == _WINDOWED else 0 for kind in layer_types(info, default))


def layer_types(info: ModelInfo, default: Sequence[str] | None = None) -> Sequence[str]:
    """full_attention or sliding_attention for each layer."""
    types = info.text.get("layer_types") or default or [_FULL] * info.num_layers
    if len(types) != info.num_layers or not set(types) <= {_WINDOWED, _FULL}:
        raise LoadError(
            f"layer_types must name {_FULL} or {_WINDOWED} for each of "
            f"{info.num_layers} layers, not {types}",
            field="layer_types",
        )
    return list(types)


def every(info: ModelInfo, pattern: int) -> list[str]:
    """Each `pattern`-th layer sees everything, the others have the window."""
    return [_WINDOWED if (i + 1) % pattern else _FULL for i in range(info.num_layers)]


def size(hf: Fields, *keys: str) -> int:
    """The first of these fields that is there; it must be a positive integer of 31 bits."""
    key = next((key for key in keys if hf.get(key) is not None), keys[0])
    value = hf.get(key)
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise LoadError(f"config.json needs a positive integer {key!r}, not {value!r}", field=key)
    return value


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """ALiBi (arXiv 2108.12409): powers of 2^(-8 / n), for other numbers of heads with some of those
    for the next power of 2."""
    n = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / n) for i in range(n)]
    between = [2.0 ** (-4 * (2 * i + 1) / n) for i in range(heads - n)]
    return tuple(slopes + between)


def ignored_layers(info: ModelInfo) -> tuple[str, ...]:
    """Patterns of the layers after the last, which predict more tokens at once (MTP)."""
    extra = int(info.text.get("num_nextn_predict_layers") or info.text.get("num_mtp_layers") or 0)
    first = info.num_layers
    if not 0 <= extra <= 1 << 12:
        raise LoadError(f"num_nextn_predict_layers is {extra}", field="num_nextn_predict_layers")
    return tuple(rf"^model\.layers\.{index}\." for index in range(first, first + extra))


def layer_norm(hf: Fields, *keys: str, bias: bool = True, **fields: Any) -> NormSpec:
    """Layer norm with the epsilon of the first of these fields that is there."""
    given = (hf[key] for key in (*keys, "layer_norm_eps", "layer_norm_epsilon") if hf.get(key))
    return NormSpec(float(next(given, 1e-5)), "layer", bias=bias, **fields)


def renamed(*pairs: tuple[str, str], **fields: Any) -> Layout:
    """A layout of renames alone."""
    return Layout(renames=pairs, **fields)
