"""Families with mixtures of experts in the place of the feed-forward."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from headrace.core.model_info import ModelInfo
from headrace.layers.attention import AttentionSpec
from headrace.layers.moe import MoESpec
from headrace.layers.names import Layout, Split
from headrace.layers.norm import NormSpec
from headrace.layers.rope_scaling import read_rope, temperature
from headrace.models.decoder import Decoder
from headrace.models.family import (
    Fields,
    attention_bias,
    attention_of,
    decoder,
    ignored_layers,
    layer_norm,
    no_windows,
    size,
    typed_windows,
)
from headrace.models.llama import GraniteForCausalLM
from headrace.models.spec import DecoderSpec
from headrace.ops.experts import RouterSpec


class MixtralForCausalLM(Decoder):
    """Mixtral (arXiv 2401.04088)."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        window = int(info.text.get("sliding_window") or 0)
        moe = experts_of(info)
        return sparse(
            decoder(info, windows=(window,) * info.num_layers, layout=_MIXTRAL_NAMES), moe
        )


class Qwen2MoeForCausalLM(Decoder):
    """Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): a gated shared expert."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        window = hf.get("use_sliding_window")
        spec = decoder(
            info,
            windows=typed_windows(info) if window else no_windows(info),
            attention={"qkv_bias": bool(hf.get("qkv_bias", True))},
        )
        moe = experts_of(
            info,
            renormalize=bool(hf.get("norm_topk_prob", False)),
            shared=size(hf, "shared_expert_intermediate_size"),
            shared_gate=True,
        )
        return _qwen_sparse(info, spec, moe)


class Qwen3MoeForCausalLM(Decoder):
    """Qwen3-MoE (arXiv 2505.09388)."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        window = int(hf.get("sliding_window") or 0) if hf.get("use_sliding_window") else 0
        spec = decoder(
            info,
            windows=(window,) * info.num_layers,
            attention=attention_bias(info) | {"qk_norm": "head"},
        )
        moe = experts_of(info, renormalize=bool(hf.get("norm_topk_prob", False)))
        return _qwen_sparse(info, spec, moe)


class OlmoeForCausalLM(Decoder):
    """OLMoE (arXiv 2409.02060): q and k normalized as a whole, weights not renormalized."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        clip = float(hf.get("clip_qkv") or 0.0)
        spec = decoder(
            info,
            attention=attention_bias(info) | {"qk_norm": "all", "clip": clip},
        )
        moe = experts_of(
            info,
            inner="intermediate_size",
            renormalize=bool(hf.get("norm_topk_prob", False)),
        )
        return sparse(spec, moe)


class GraniteMoeForCausalLM(Decoder):
    """Granite 3 MoE: Granite's multipliers; gates and ups of all experts in one tensor."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        layout = Layout(
            renames=(
                (r"\.block_sparse_moe\.router\.layer\.", ".mlp.gate."),
                (r"\.block_sparse_moe\.input_linear\.weight", ".mlp.experts.gate_up_proj"),
                (r"\.block_sparse_moe\.output_linear\.weight", ".mlp.experts.down_proj"),
            )
        )
        spec = replace(GraniteForCausalLM.describe(info), layout=layout)
        return sparse(spec, experts_of(info, inner="intermediate_size"))


class Glm4MoeForCausalLM(Decoder):
    """GLM-4.5 (arXiv 2508.06471): sigmoid router in groups, dense layers first."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        bias = bool(hf.get("attention_bias", False))
        spec = decoder(
            info,
            ropes=(read_rope({"partial_rotary_factor": 0.5} | hf, info.head_dim),),
            attention={
                "qkv_bias": bias,
                "qk_norm": "head" if hf.get("use_qk_norm") else "",
            },
            layout=Layout(
                renames=((r"\.shared_experts\.", ".shared_expert."),),
                ignored=ignored_layers(info),
            ),
        )
        moe = shared_experts_of(info, sigmoid_router(hf), "n_shared_experts")
        return sparse(spec, moe, dense=int(hf.get("first_k_dense_replace") or 0))


class Ernie4_5_MoeForCausalLM(Decoder):
    """ERNIE 4.5 MoE: a bias chooses, softmax weighs."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        bias = bool(hf.get("use_bias", False))
        spec = decoder(
            info,
            attention={"qkv_bias": bias, "out_bias": bias, "interleaved": True},
            mlp={"bias": bias},
            layout=Layout(
                renames=(
                    (r"\.shared_experts\.", ".shared_expert."),
                    (r"\.moe_statics\.e_score_correction_bias", ".gate.e_score_correction_bias"),
                ),
                splits=(
                    Split(
                        r"(.*\.e_score_correction_bias)",
                        (r"\1",),
                        lambda tensor: [tensor.flatten()],
                    ),
                ),
                ignored=(r"\.mtp_",),
            ),
        )
        router = RouterSpec(size(hf, "moe_k", "num_experts_per_tok"))
        moe = replace(shared_experts_of(info, router, "moe_num_shared_experts"), bias=True)
        first = int(hf.get("moe_layer_start_index", 1))
        last = int(hf.get("moe_layer_end_index", -1)) % info.num_layers
        step = int(hf.get("moe_layer_interval", 1))
        sparse = [(i + 1) % step == 0 and first <= i <= last for i in range(info.num_layers)]
        return _where(spec, moe, sparse)


class MiniMaxM2ForCausalLM(Decoder):
    """MiniMax-M2: sigmoid router with a bias, q and k normalized as a whole."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        part = float(hf.get("rotary_dim") or info.head_dim) / info.head_dim
        spec = decoder(
            info,
            ropes=(read_rope({"partial_rotary_factor": part} | hf, info.head_dim),),
            attention={"qk_norm": "all"},
            layout=replace(
                _MIXTRAL_NAMES,
                renames=(
                    (
                        r"\.block_sparse_moe\.e_score_correction_bias",
                        ".mlp.gate.e_score_correction_bias",
                    ),
                    *_MIXTRAL_NAMES.renames,
                ),
            ),
        )
        router = RouterSpec(size(hf, "num_experts_per_tok"), sigmoid=True)
        return sparse(spec, experts_of(info, inner="intermediate_size", router=router, bias=True))


class DbrxForCausalLM(Decoder):
    """DBRX: layer norm, clipped q, k, v, experts stacked into one matrix."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.hf
        attention, ffn = hf.get("attn_config") or {}, hf.get("ffn_config") or {}
        experts, inner = int(ffn.get("moe_num_experts", 4)), int(ffn.get("ffn_hidden_size", 3584))

        def single(tensor: Tensor) -> list[Tensor]:
            return list(tensor.view(experts, inner, -1))

        def single_down(tensor: Tensor) -> list[Tensor]:
            return list(tensor.view(experts, inner, -1).transpose(1, 2))

        def names(part: str) -> tuple[str, ...]:
            return tuple(rf"\1.{i}.{part}_proj.weight" for i in range(experts))

        rope = read_rope({"rope_theta": attention.get("rope_theta")}, info.head_dim)
        spec = decoder(
            info,
            norm=layer_norm({}, bias=False),
            ropes=(rope,),
            attention={
                "kv_heads": int(attention.get("kv_n_heads") or 1),
                "clip": float(attention.get("clip_qkv") or 0.0),
            },
            mlp={"inner_size": inner, "activation": "silu"},
            layout=Layout(
                renames=(
                    (r"^transformer\.wte\.", "model.embed_tokens."),
                    (r"^transformer\.norm_f\.", "model.norm."),
                    (r"^transformer\.blocks\.", "model.layers."),
                    (r"\.norm_attn_norm\.norm_1\.", ".input_layernorm."),
                    (r"\.norm_attn_norm\.norm_2\.", ".post_attention_layernorm."),
                    (r"\.norm_attn_norm\.attn\.Wqkv\.", ".self_attn.qkv_proj."),
                    (r"\.norm_attn_norm\.attn\.out_proj\.", ".self_attn.o_proj."),
                    (r"\.ffn\.router\.layer\.", ".mlp.gate."),
                    (r"\.ffn\.experts\.mlp\.", ".mlp.experts."),
                ),
                splits=(
                    Split(r"(.*\.experts)\.w1", names("gate"), single),
                    Split(r"(.*\.experts)\.v1", names("up"), single),
                    Split(r"(.*\.experts)\.w2", names("down"), single_down),
                ),
            ),
        )
        top = int(ffn.get("moe_top_k", 1))
        # A p-norm of 1, the only one published, makes the weights add up to 1.
        router = RouterSpec(top, bool(ffn.get("moe_normalize_expert_weights", 1)))
        moe = MoESpec(experts, inner, "silu", router)
        return sparse(spec, moe)


class PhimoeForCausalLM(Decoder):
    """Phi-3.5-MoE (arXiv 2404.14219): layer norm, SparseMixer."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        spec = decoder(
            info,
            norm=layer_norm(hf, "rms_norm_eps"),
            windows=(int(hf.get("sliding_window") or 0),) * info.num_layers,
            attention=attention_bias(info),
            head_bias=bool(hf.get("lm_head_bias", False)),
            layout=replace(
                _MIXTRAL_NAMES,
                renames=((r"\.mlp\.router\.", ".mlp.gate."), *_MIXTRAL_NAMES.renames),
            ),
        )
        router = RouterSpec(
            size(hf, "num_experts_per_tok"), jitter=float(hf.get("router_jitter_noise", 0.01))
        )
        return sparse(spec, experts_of(info, router=router))


class Llama4ForCausalLM(Decoder):
    """Llama 4, the text model: chunks of attention with rotary positions, and layers that see
    everything without, where q grows with the position; experts weigh their input."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        every_nth = int(hf.get("no_rope_layer_interval") or 4)
        turns = hf.get("no_rope_layers") or [(i + 1) % every_nth for i in range(info.num_layers)]
        spec = decoder(
            info,
            ropes=(read_rope(hf, info.head_dim), temperature(hf, info.head_dim)),
            attention=attention_bias(info) | {"interleaved": True},
            mlp={"inner_size": size(hf, "intermediate_size_mlp")},
            layout=_LLAMA4_NAMES,
        )
        layers = tuple(
            replace(layer, attention=_llama4_attention(hf, attention_of(layer), bool(turn)))
            for layer, turn in zip(spec.layers, turns, strict=True)
        )
        router = RouterSpec(size(hf, "num_experts_per_tok"), renormalize=False, sigmoid=True)
        inner = size(hf, "intermediate_size")
        moe = experts_of(
            info, inner="intermediate_size", router=router, shared=inner, on_input=True
        )
        step = int(hf.get("interleave_moe_layer_step") or 1)
        chosen = hf.get("moe_layers")
        if chosen is None:
            chosen = range(step - 1, info.num_layers, step)
        return _where(
            replace(spec, layers=layers), moe, [i in chosen for i in range(info.num_layers)]
        )


def _llama4_attention(hf: Fields, attention: AttentionSpec, turns: bool) -> AttentionSpec:
    chunk = int(hf.get("attention_chunk_size") or 0)
    if not turns:
        tuned = bool(hf.get("attn_temperature_tuning", True))
        return replace(attention, rope=1 if tuned else None, rope_scales=tuned)
    if hf.get("use_qk_norm", True):
        # It follows the turn in the paper, which does not change lengths.
        norm = NormSpec(attention.norm.eps, weight=False)
        attention = replace(attention, qk_norm="head", norm=norm)
    return replace(attention, window=chunk, in_chunks=chunk > 0)


COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MIXTRAL_NAMES = Layout(
    renames=(
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
        (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
        (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
    )
)


_LLAMA4_NAMES = Layout(
    renames=(
        (r"^language_model\.", ""),
        (r"\.feed_forward\.router\.", ".mlp.gate."),
        (r"\.feed_forward\.", ".mlp."),
    ),
    splits=(
        Split(
            r"(.*\.experts\.(?:gate_up|down)_proj)",
            (r"\1",),
            lambda tensor: [tensor.transpose(1, 2)],
        ),
    ),
    ignored=(r"^vision_model\.", r"^multi_modal_projector\."),
)


def experts_of(
    info: ModelInfo,
    *,
    inner: str = "",
    renormalize: bool = True,
    router: RouterSpec | None = None,
    **fields: Any,
) -> MoESpec:
    """What configurations of all families say alike; softmax routers without a `router`."""
    hf = info.text
    own = "moe_intermediate_size" in hf
    width = inner or ("moe_intermediate_size" if own else "intermediate_size")
    return MoESpec(
        experts=size(hf, *COUNTS),
        inner_size=size(hf, width),
        activation=str(hf.get("hidden_act", "silu")),
        router=router or RouterSpec(size(hf, "num_experts_per_tok"), renormalize),
        **fields,
    )


def sigmoid_router(hf: Fields) -> RouterSpec:
    """That of DeepSeek-V3 (arXiv 2412.19437): a bias chooses, among the best groups."""
    return RouterSpec(
        top_k=size(hf, "num_experts_per_tok"),
        renormalize=bool(hf.get("norm_topk_prob", True)),
        sigmoid=True,
        groups=int(hf.get("n_group") or 1),
        top_groups=int(hf.get("topk_group") or 1),
        group_best=2,
        scale=float(hf.get("routed_scaling_factor", 1.0)),
    )


def shared_experts_of(info: ModelInfo, router: RouterSpec, count: str) -> MoESpec:
    """Experts of which each token takes `count` always, stored as one block."""
    width = "moe_intermediate_size"
    shared = size(info.text, width) * int(info.text.get(count) or 0)
    return experts_of(info, inner=width, router=router, bias=router.sigmoid, shared=shared)


def sparse(spec: DecoderSpec, moe: MoESpec, dense: int = 0) -> DecoderSpec:
    """All layers but the first `dense` ones have experts."""
    return _where(spec, moe, [index >= dense for index in range(len(spec.layers))])


def _qwen_sparse(info: ModelInfo, spec: DecoderSpec, moe: MoESpec) -> DecoderSpec:
    hf = info.text
    plain, step = hf.get("mlp_only_layers") or [], int(hf.get("decoder_sparse_step") or 1)
    return _where(
        spec, moe, [i not in plain and (i + 1) % step == 0 for i in range(info.num_layers)]
    )


def _where(spec: DecoderSpec, moe: MoESpec, sparse: list[bool]) -> DecoderSpec:
    layers = tuple(
        replace(layer, mlp=moe) if use else layer
        for layer, use in zip(spec.layers, sparse, strict=True)
    )
    return replace(spec, layers=layers)
