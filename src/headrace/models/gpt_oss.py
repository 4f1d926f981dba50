"""gpt-oss: attention with sinks, experts with biases and a clamped activation, stored in MXFP4."""

import torch
from torch import Tensor

from headrace.core.model_info import ModelInfo
from headrace.layers.names import Layout, Split
from headrace.layers.norm import NormSpec
from headrace.layers.rope_scaling import read_rope
from headrace.models.decoder import Decoder
from headrace.models.family import decoder, every, size, typed_windows
from headrace.models.moe import COUNTS, experts_of, sparse
from headrace.models.spec import DecoderSpec
from headrace.ops.experts import ClampedSwiglu


class GptOssForCausalLM(Decoder):
    """gpt-oss (arXiv 2508.10925): sinks, every other layer windowed, experts with biases."""

    @staticmethod
    def describe(info: ModelInfo) -> DecoderSpec:
        hf = info.text
        bias = bool(hf.get("attention_bias", True))
        spec = decoder(
            info,
            norm=NormSpec(float(hf.get("rms_norm_eps", 1e-5))),
            windows=typed_windows(info, every(info, 2)),
            ropes=(read_rope({"rope_theta": 150000.0} | hf, info.head_dim),),
            attention={"qkv_bias": bias, "out_bias": bias, "sinks": True},
            layout=_gpt_oss_names(size(hf, *COUNTS)),
        )
        clamped = ClampedSwiglu(
            float(hf.get("swiglu_alpha", 1.702)), float(hf.get("swiglu_limit", 7.0))
        )
        return sparse(spec, experts_of(info, router_bias=True, expert_bias=True, clamped=clamped))


def _gpt_oss_names(experts: int) -> Layout:
    """All experts lie in one tensor, a gate row before each up row: turned floats, or blocks."""

    def names(*parts: str) -> tuple[str, ...]:
        return tuple(rf"\1.{i}.{part}_proj" for part in parts for i in range(experts))

    def floats(*parts: str) -> tuple[str, ...]:
        return tuple(f"{name}.weight" for name in names(*parts))

    def blocks(*parts: str) -> tuple[str, ...]:
        return tuple(rf"{name}.\2" for name in names(*parts))

    def single(tensor: Tensor) -> list[Tensor]:
        return list(tensor.unbind())

    def pairs(tensor: Tensor) -> list[Tensor]:
        return single(tensor[:, ::2]) + single(tensor[:, 1::2])

    return Layout(
        renames=((r"\.mlp\.router\.", ".mlp.gate."),),
        splits=(
            Split(r"(.*\.experts)\.gate_up_proj", floats("gate", "up"), lambda t: pairs(t.mT)),
            Split(r"(.*\.experts)\.down_proj", floats("down"), lambda t: single(t.mT)),
            Split(r"(.*\.experts)\.gate_up_proj_(blocks|scales)", blocks("gate", "up"), pairs),
            Split(r"(.*\.experts)\.down_proj_(blocks|scales)", blocks("down"), single),
            Split(
                r"(.*\.experts\.gate_up_proj_bias)",
                (r"\1",),
                lambda t: [torch.cat([t[:, ::2], t[:, 1::2]], 1)],
            ),
        ),
    )
