"""Families close to Llama: RMS norm, rotary positions, a gated feed-forward, its tensor names."""

import torch
from torch import Tensor

from headrace.core.model_info import ModelInfo
from headrace.layers.names import Layout, Split, grouped_qkv
from headrace.layers.norm import NormSpec
from headrace.layers.rope_scaling import read_rope
from headrace.models.decoder import Decoder
from headrace.models.family import (
    alibi_slopes,
    attention_bias,
    decoder,
    every,
    layer_types,
    no_windows,
    typed_ropes,
    typed_windows,
    with_ropes,
)
from headrace.models.spec import DecoderSpec


class LlamaForCausalLM(Decoder):
    """Llama 1 to 3.x (arXiv 2302.13971, 2407.21783)."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        return decoder(
            info,
            attention=attention_bias(info),
            mlp={"bias": bool(info.text.get("mlp_bias", False))},
        )


class ArceeForCausalLM(Decoder):
    """Llama with a feed-forward of one matrix and squared ReLU (arXiv 2109.08668)."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        return decoder(
            info,
            attention=attention_bias(info),
            mlp={"bias": bool(info.text.get("mlp_bias", False)), "gated": False},
        )


class HeliumForCausalLM(Decoder):
    """Helium: Llama whose rotary embedding turns neighbors."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        bias = bool(info.text.get("attention_bias", False))
        return decoder(info, attention={"qkv_bias": bias, "interleaved": True})


class MistralForCausalLM(Decoder):
    """Mistral (arXiv 2310.06825): every layer has the sliding window, if there is one."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        window = int(info.text.get("sliding_window") or 0)
        return decoder(info, windows=(window,) * info.num_layers)


class MinistralForCausalLM(Decoder):
    """Ministral 8B: layers with a window and layers without."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        window = ["sliding_attention" if info.text.get("sliding_window") else "full_attention"]
        return decoder(info, windows=typed_windows(info, window * info.num_layers))


class Qwen2ForCausalLM(Decoder):
    """Qwen2 and 2.5 (arXiv 2407.10671): biases on q, k, v; some layers may have a window."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        return decoder(info, windows=_qwen_windows(info), attention={"qkv_bias": True})


class Qwen3ForCausalLM(Decoder):
    """Qwen3 (arXiv 2505.09388): q and k are normalized per head."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        return decoder(
            info,
            windows=_qwen_windows(info),
            attention=attention_bias(info) | {"qk_norm": "head"},
        )


class Phi3ForCausalLM(Decoder):
    """Phi-3 and Phi-4 (arXiv 2404.14219): stacked projections, part of a head turns."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        window = int(info.text.get("sliding_window") or 0)
        return decoder(info, windows=(window,) * info.num_layers)


class InternLM2ForCausalLM(Decoder):
    """InternLM2 (arXiv 2403.17297): Llama under other names, q, k, v stacked by KV head."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        bias = bool(info.text.get("bias", False))
        layout = Layout(
            renames=(
                ("tok_embeddings", "embed_tokens"),
                (r"\.attention\.wo\.", ".self_attn.o_proj."),
                (r"\.attention\.", ".self_attn."),
                (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
                (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
                (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
                (r"\.attention_norm\.", ".input_layernorm."),
                (r"\.ffn_norm\.", ".post_attention_layernorm."),
                (r"^output\.", "lm_head."),
            ),
            splits=(grouped_qkv("wqkv", info.num_heads, info.num_kv_heads, info.head_dim),),
        )
        return decoder(info, attention={"qkv_bias": bias, "out_bias": bias}, layout=layout)


class InternLM3ForCausalLM(Decoder):
    """InternLM3: Llama with biases by choice."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        qkv = bool(hf.get("qkv_bias", hf.get("attention_bias", False)))
        rest = bool(hf.get("bias", hf.get("mlp_bias", False)))
        out = bool(hf.get("bias", hf.get("attention_bias", False)))
        return decoder(info, attention={"qkv_bias": qkv, "out_bias": out}, mlp={"bias": rest})


class BaichuanForCausalLM(Decoder):
    """Baichuan 1 and 2 (arXiv 2309.10305): 13B with ALiBi; the second has rows of length 1 in its
    head."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        second = info.vocab_size == 125696
        head = Split(r"(lm_head\.weight)", (r"\1",), lambda weight: [_normalized(weight)])
        layout = Layout(renames=((r"\.W_pack\.", ".qkv_proj."),), splits=(head,) if second else ())
        # Only models with rotary positions have this field.
        if info.text.get("max_position_embeddings") is not None:
            return decoder(info, layout=layout)
        slopes = {"rope": None, "slopes": alibi_slopes(info.num_heads)}
        return decoder(info, ropes=(), attention=slopes, layout=layout)


class SmolLM3ForCausalLM(Decoder):
    """SmolLM3: Llama where every fourth layer has no positions (NoPE, arXiv 2501.18795)."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        spec = decoder(
            info,
            windows=typed_windows(info) if hf.get("use_sliding_window") else no_windows(info),
            attention=attention_bias(info),
            mlp={"bias": bool(hf.get("mlp_bias", False))},
        )
        every_nth = int(hf.get("no_rope_layer_interval") or 4)
        given = hf.get("no_rope_layers")
        turns = given or [(i + 1) % every_nth for i in range(info.num_layers)]
        return with_ropes(spec, [0 if turn else None for turn in turns])


class Ernie4_5ForCausalLM(Decoder):
    """ERNIE 4.5, the dense models: Llama whose rotary embedding turns neighbors."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        bias = bool(info.text.get("use_bias", False))
        return decoder(
            info,
            attention={"qkv_bias": bias, "out_bias": bias, "interleaved": True},
            mlp={"bias": bias},
            tied=bool(info.hf.get("tie_word_embeddings", True)),
        )


class GraniteForCausalLM(Decoder):
    """Granite 3: Llama with a multiplier at each place where scales are."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        scale = float(hf.get("attention_multiplier", 1.0))
        return decoder(
            info,
            attention=attention_bias(info) | {"scale": scale},
            mlp={"bias": bool(hf.get("mlp_bias", False))},
            layer={"branch_scale": float(hf.get("residual_multiplier", 1.0))},
            embedding_scale=float(hf.get("embedding_multiplier", 1.0)),
            logit_scale=1.0 / float(hf.get("logits_scaling", 1.0)),
        )


class MiniCPMForCausalLM(Decoder):
    """MiniCPM (arXiv 2404.06395): Llama with scales that grow with depth and width."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        depth = float(hf.get("scale_depth", 1.0)) / info.num_layers**0.5
        base = float(hf.get("dim_model_base") or info.hidden_size)
        return decoder(
            info,
            layer={"branch_scale": depth},
            embedding_scale=float(hf.get("scale_emb", 1.0)),
            logit_scale=base / info.hidden_size,
        )


class OlmoForCausalLM(Decoder):
    """OLMo (arXiv 2402.00838): layer norm without weights; q, k, v may be clipped."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        clip = float(info.text.get("clip_qkv") or 0.0)
        return decoder(
            info,
            norm=NormSpec(1e-5, "layer", weight=False),
            attention=attention_bias(info) | {"clip": clip},
        )


class Olmo2ForCausalLM(Decoder):
    """OLMo 2 (arXiv 2501.00656): norms after the blocks, q and k normalized as a whole."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        return decoder(
            info,
            attention=attention_bias(info) | {"qk_norm": "all"},
            layer={"wiring": "post"},
        )


class Olmo3ForCausalLM(Decoder):
    """OLMo 3: OLMo 2 with windows; where there is one, positions are not rescaled."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        types = layer_types(info, every(info, 4))
        local = read_rope({"rope_theta": hf.get("rope_theta")}, info.head_dim)
        spec = decoder(
            info,
            windows=typed_windows(info, types),
            ropes=typed_ropes(info, local),
            attention=attention_bias(info) | {"qk_norm": "all"},
            layer={"wiring": "post"},
        )
        return with_ropes(spec, [0 if kind == "full_attention" else 1 for kind in types])


class Exaone4ForCausalLM(Decoder):
    """EXAONE 4 (arXiv 2507.11407): norms after the blocks; with windows, only those turn."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        pattern = hf.get("sliding_window_pattern")
        hybrid = bool(hf.get("sliding_window"))
        default = every(info, int(pattern)) if hybrid and isinstance(pattern, int) else None
        types = layer_types(info, default)
        spec = decoder(
            info,
            windows=typed_windows(info, types),
            attention={"qk_norm": "head"},
            layer={"wiring": "post"},
        )
        return with_ropes(
            spec, [None if hybrid and kind == "full_attention" else 0 for kind in types]
        )


def _normalized(weight: Tensor) -> Tensor:
    return torch.nn.functional.normalize(weight.float()).to(weight.dtype)


def _qwen_windows(info: ModelInfo) -> tuple[int, ...]:
    """`layer_types` if given, else layers from `max_window_layers` on have the window."""
    hf = info.text
    first = int(hf.get("max_window_layers", 28))
    default = [
        "full_attention" if i < first else "sliding_attention" for i in range(info.num_layers)
    ]
    types = layer_types(info, default)
    return typed_windows(info, types) if hf.get("use_sliding_window") else no_windows(info)
