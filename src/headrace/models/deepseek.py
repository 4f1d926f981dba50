"""Families with multi-head latent attention."""

from dataclasses import replace

from headrace.core.model_info import ModelInfo
from headrace.layers.latent import LatentSpec
from headrace.layers.names import Layout
from headrace.layers.norm import NormSpec
from headrace.layers.rope_scaling import latent_scale, read_rope
from headrace.models.decoder import Decoder
from headrace.models.family import decoder, ignored_layers, size
from headrace.models.llama import MiniCPMForCausalLM
from headrace.models.moe import shared_experts_of, sigmoid_router, sparse
from headrace.models.spec import DecoderSpec
from headrace.ops.experts import RouterSpec


class DeepseekV2ForCausalLM(Decoder):
    """DeepSeek-V2 (arXiv 2405.04434): softmax router, whose best groups have the best experts."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        limited = hf.get("topk_method") == "group_limited_greedy"
        router = RouterSpec(
            top_k=size(hf, "num_experts_per_tok"),
            renormalize=bool(hf.get("norm_topk_prob", False)),
            groups=size(hf, "n_group") if limited else 1,
            top_groups=size(hf, "topk_group") if limited else 1,
            scale=float(hf.get("routed_scaling_factor", 1.0)),
        )
        return _deepseek(info, router, interleaved=True)


class DeepseekV3ForCausalLM(Decoder):
    """DeepSeek-V3, R1 (arXiv 2412.19437) and Kimi-K2 (arXiv 2507.20534): a sigmoid router."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        turned = bool(info.text.get("rope_interleave", True))
        return _deepseek(info, sigmoid_router(info.text), interleaved=turned)


class MiniCPM3ForCausalLM(Decoder):
    """MiniCPM3: MiniCPM's scales and latent attention."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        return _latent(info, MiniCPMForCausalLM.describe(info), interleaved=False)


def _deepseek(info: ModelInfo, router: RouterSpec, *, interleaved: bool) -> DecoderSpec:
    hf = info.text
    moe = shared_experts_of(info, router, "n_shared_experts")
    layout = Layout(
        renames=((r"\.shared_experts\.", ".shared_expert."),), ignored=ignored_layers(info)
    )
    spec = decoder(info, mlp={"bias": bool(hf.get("mlp_bias", False))}, layout=layout)
    spec = sparse(spec, moe, dense=int(hf.get("first_k_dense_replace") or 0))
    return _latent(info, spec, interleaved=interleaved)


def _latent(info: ModelInfo, spec: DecoderSpec, *, interleaved: bool) -> DecoderSpec:
    """The same with latent attention in every layer."""
    hf = info.text
    plain, turned = size(hf, "qk_nope_head_dim"), size(hf, "qk_rope_head_dim")
    rope = read_rope(hf, turned)
    attention = LatentSpec(
        hidden_size=info.hidden_size,
        heads=info.num_heads,
        plain_dim=plain,
        turned_dim=turned,
        value_dim=int(hf.get("v_head_dim") or info.hidden_size // info.num_heads),
        rank=size(hf, "kv_lora_rank"),
        query_rank=int(hf.get("q_lora_rank") or 0),
        # The norms of latents have an epsilon of their own.
        norm=NormSpec(1e-6),
        scale=(plain + turned) ** -0.5 * latent_scale(rope),
        bias=bool(hf.get("attention_bias", False)),
        interleaved=interleaved,
    )
    layers = tuple(replace(layer, attention=attention) for layer in spec.layers)
    return replace(spec, layers=layers, ropes=(rope,))
