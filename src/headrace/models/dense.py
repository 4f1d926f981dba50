"""Dense decoder families: each reads its config.json into a `DecoderSpec`."""

from dataclasses import replace
from typing import Any

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.layers.attention import AttentionSpec
from headrace.layers.mlp import GATED_ACTIVATIONS
from headrace.layers.rope_scaling import read_rope
from headrace.models.decoder import Decoder, DecoderSpec


class LlamaForCausalLM(Decoder):
    """Llama 1 to 3.x (arXiv 2302.13971, 2407.21783)."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.hf
        bias = bool(hf.get("attention_bias", False))
        spec = _describe(info, windows=_no_windows(info), qkv_bias=bias, out_bias=bias)
        return replace(spec, mlp_bias=bool(hf.get("mlp_bias", False)))


class MistralForCausalLM(Decoder):
    """Mistral (arXiv 2310.06825): every layer has the sliding window, if there is one."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        window = int(info.hf.get("sliding_window") or 0)
        return _describe(info, windows=(window,) * info.num_layers)


class Qwen2ForCausalLM(Decoder):
    """Qwen2 and 2.5 (arXiv 2407.10671): biases on q, k, v; some layers may have a window."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        return _describe(info, windows=_qwen_windows(info), qkv_bias=True)


class Qwen3ForCausalLM(Decoder):
    """Qwen3 (arXiv 2505.09388): q and k are normalized per head."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        bias = bool(info.hf.get("attention_bias", False))
        return _describe(
            info, windows=_qwen_windows(info), qkv_bias=bias, out_bias=bias, qk_norm=True
        )


def _describe(
    info: ModelInfo,
    *,
    windows: tuple[int, ...],
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: bool = False,
) -> DecoderSpec:
    """What the families have in common."""
    hf = info.hf
    if info.num_heads % info.num_kv_heads:
        raise LoadError(
            f"num_attention_heads {info.num_heads} is not a multiple of "
            f"num_key_value_heads {info.num_kv_heads}",
            field="num_key_value_heads",
        )
    eps = float(hf.get("rms_norm_eps", 1e-6))
    return DecoderSpec(
        vocab_size=info.vocab_size,
        inner_size=_size(hf, "intermediate_size"),
        activation=_activation(hf),
        attention=AttentionSpec(
            hidden_size=info.hidden_size,
            heads=info.num_heads,
            kv_heads=info.num_kv_heads,
            head_dim=info.head_dim,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            eps=eps,
        ),
        windows=windows,
        rope=read_rope(hf, info.head_dim),
        eps=eps,
        tied=bool(hf.get("tie_word_embeddings", False)),
    )


def _no_windows(info: ModelInfo) -> tuple[int, ...]:
    return (0,) * info.num_layers


def _qwen_windows(info: ModelInfo) -> tuple[int, ...]:
    """`layer_types` if given, else layers from `max_window_layers` on have the window."""
    hf = info.hf
    window = int(hf.get("sliding_window") or 0) if hf.get("use_sliding_window") else 0
    first = int(hf.get("max_window_layers", 28))
    types = hf.get("layer_types") or [
        "sliding_attention" if index >= first else "full_attention"
        for index in range(info.num_layers)
    ]
    if len(types) != info.num_layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise LoadError(
            f"layer_types must name full_attention or sliding_attention for each of "
            f"{info.num_layers} layers, not {types}",
            field="layer_types",
        )
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _size(hf: dict[str, Any], key: str) -> int:
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LoadError(f"config.json needs a positive integer {key!r}, not {value!r}", field=key)
    return value


def _activation(hf: dict[str, Any]) -> str:
    name = str(hf.get("hidden_act", "silu"))
    if name not in GATED_ACTIVATIONS:
        raise LoadError(
            f"unknown activation {name!r}; known: {', '.join(GATED_ACTIVATIONS)}",
            field="hidden_act",
        )
    return name
