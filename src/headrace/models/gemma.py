"""Gemma 1 to 3 and GLM-4: norms with weights around one, norms on both sides of a block."""

from dataclasses import replace
from typing import Any

from headrace.core.model_info import ModelInfo
from headrace.layers.names import Layout
from headrace.layers.norm import NormSpec
from headrace.layers.rope_scaling import RopeSpec, read_rope
from headrace.models.decoder import Decoder
from headrace.models.family import (
    Fields,
    decoder,
    every,
    layer_types,
    renamed,
    size,
    typed_ropes,
    typed_windows,
    with_ropes,
)
from headrace.models.spec import DecoderSpec


class GemmaForCausalLM(Decoder):
    """Gemma (arXiv 2403.08295): embeddings scaled by the root of their size."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        return _gemma(info)


class Gemma2ForCausalLM(Decoder):
    """Gemma 2 (arXiv 2408.00118): every other layer has a window; scores and logits are capped."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        return _gemma(
            info,
            windows=typed_windows(info, every(info, 2)),
            attention={
                "scale": float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
                "soft_cap": float(hf.get("attn_logit_softcapping") or 0.0),
            },
            layer={"wiring": "both"},
            logit_cap=float(hf.get("final_logit_softcapping") or 0.0),
        )


class Gemma3ForCausalLM(Decoder):
    """Gemma 3 (arXiv 2503.19786), the text model: q and k normalized, two bases of positions."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        types = layer_types(info, every(info, int(hf.get("sliding_window_pattern") or 6)))
        local = read_rope({"rope_theta": hf.get("rope_local_base_freq")}, info.head_dim)
        spec = _gemma(
            info,
            windows=typed_windows(info, types),
            ropes=typed_ropes(info, local),
            attention={
                "scale": float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
                "soft_cap": float(hf.get("attn_logit_softcapping") or 0.0),
                "qk_norm": "head",
            },
            layer={"wiring": "both"},
            logit_cap=float(hf.get("final_logit_softcapping") or 0.0),
        )
        return with_ropes(spec, [0 if kind == "full_attention" else 1 for kind in types])


def _gemma(info: ModelInfo, *, attention: Fields | None = None, **fields: Any) -> DecoderSpec:
    """What all three have in common."""
    hf = info.text
    activation = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu_pytorch_tanh"
    # The first Gemma's configs say "gelu" and mean its tanh form.
    activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    bias = bool(hf.get("attention_bias", False))
    spec = decoder(
        info,
        norm=NormSpec(float(hf.get("rms_norm_eps", 1e-6)), from_one=True),
        attention={"qkv_bias": bias, "out_bias": bias} | (attention or {}),
        mlp={"activation": activation},
        embedding_scale=info.hidden_size**0.5,
        **fields,
    )
    return replace(spec, tied=bool(info.hf.get("tie_word_embeddings", True)))


class GlmForCausalLM(Decoder):
    """GLM-4 9B (arXiv 2406.12793): half of a head turns, in neighbors."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        bias = bool(info.text.get("attention_bias", True))
        return decoder(
            info, ropes=_glm_ropes(info), attention={"qkv_bias": bias, "interleaved": True}
        )


class Glm4ForCausalLM(Decoder):
    """GLM-4-0414: GLM-4 with norms on both sides."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        bias = bool(info.text.get("attention_bias", True))
        return decoder(
            info,
            ropes=_glm_ropes(info),
            attention={"qkv_bias": bias, "interleaved": True},
            layer={"wiring": "both"},
            layout=renamed(
                (r"\.post_attention_layernorm\.", ".pre_feedforward_layernorm."),
                (r"\.post_self_attn_layernorm\.", ".post_attention_layernorm."),
                (r"\.post_mlp_layernorm\.", ".post_feedforward_layernorm."),
            ),
        )


class ChatGLMModel(Decoder):
    """ChatGLM2, ChatGLM3 and GLM-4 in their own layout: the network of GLM under other names."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        theta = 10000.0 * float(hf.get("rope_ratio") or 1.0)
        rope = read_rope({"rope_theta": theta, "partial_rotary_factor": 0.5}, info.head_dim)
        return decoder(
            info,
            norm=NormSpec(float(hf.get("layernorm_epsilon", 1e-5))),
            ropes=(replace(rope, max_positions=info.context_length),),
            attention={
                "qkv_bias": bool(hf.get("add_qkv_bias") or hf.get("add_bias_linear")),
                "out_bias": bool(hf.get("add_bias_linear")),
                "interleaved": True,
            },
            mlp={
                "inner_size": size(hf, "ffn_hidden_size"),
                "activation": "silu",
                "bias": bool(hf.get("add_bias_linear")),
            },
            tied=bool(hf.get("tie_word_embeddings", False)),
            layout=Layout(
                renames=(
                    (r"^transformer\.embedding\.word_embeddings\.", "model.embed_tokens."),
                    (r"^transformer\.output_layer\.", "lm_head."),
                    (r"^transformer\.encoder\.final_layernorm\.", "model.norm."),
                    (r"^transformer\.encoder\.", "model."),
                    (r"\.self_attention\.query_key_value\.", ".self_attn.qkv_proj."),
                    (r"\.self_attention\.dense\.", ".self_attn.o_proj."),
                    (r"\.mlp\.dense_h_to_4h\.", ".mlp.gate_up_proj."),
                    (r"\.mlp\.dense_4h_to_h\.", ".mlp.down_proj."),
                ),
                ignored=(r"rotary_pos_emb",),
            ),
        )


def _glm_ropes(info: ModelInfo) -> tuple[RopeSpec]:
    return (read_rope({"partial_rotary_factor": 0.5} | info.text, info.head_dim),)
