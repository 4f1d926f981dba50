"""Mixtures of experts: the blocks of transformers, and the same bits in every batch."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from headrace.ops import cpu, ref
from headrace.ops.experts import PackedExperts, RouterSpec
from tests.support.native import native_level, native_levels, operators

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["ref", *native_levels()])
def impl(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with native_level(request.param):
        yield operators("ref" if request.param == "ref" else "cpu")


def mixtral() -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=96, intermediate_size=64, num_local_experts=6, num_experts_per_tok=2
    )
    return MixtralSparseMoeBlock(config)


def qwen3(norm_topk_prob: bool) -> nn.Module:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import (
        Qwen3MoeConfig,
        Qwen3MoeSparseMoeBlock,
    )

    config = Qwen3MoeConfig(
        hidden_size=70,
        moe_intermediate_size=40,
        num_experts=9,
        num_experts_per_tok=4,
        norm_topk_prob=norm_topk_prob,
    )
    return Qwen3MoeSparseMoeBlock(config)


BLOCKS = {
    "mixtral": (mixtral, 2, True),
    "qwen3": (lambda: qwen3(True), 4, True),
    "qwen3, not normalized": (lambda: qwen3(False), 4, False),
}


def run(impl: SimpleNamespace, block: nn.Module, x: Tensor, top_k: int, norm: bool) -> Tensor:
    router = impl.pack(block.gate.weight.data)
    logits = impl.linear_packed(x, router, None)
    ids, weights = impl.router_topk(logits, RouterSpec(top_k, norm), None)
    experts = impl.pack_experts(block.experts.gate_up_proj.data, block.experts.down_proj.data)
    return impl.moe_packed(x, experts, ids, weights, "silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_that_of_transformers(
    impl: SimpleNamespace, name: str, dtype: torch.dtype
) -> None:
    make, top_k, norm = BLOCKS[name]
    block = make().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    block = block.to(dtype)
    x = torch.randn(53, block.gate.weight.shape[1]).to(dtype)
    with torch.no_grad():
        oracle = block.float()(x[None].float())[0]
    y = run(impl, block.to(dtype), x, top_k, norm)
    assert y.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    worst = float((y.float() - oracle).abs().max())
    assert worst <= tolerance * float(oracle.abs().max())


def test_of_equal_experts_the_lower_one_is_chosen(impl: SimpleNamespace) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    ids, weights = impl.router_topk(logits, RouterSpec(2), None)
    assert ids.tolist() == [[1, 2], [0, 1]]
    assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    _, weights = impl.router_topk(logits, RouterSpec(5, False), None)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_every_batch(dtype: torch.dtype) -> None:
    """Alone, among others, in any order, on one thread and on three, in more than one part."""
    for level in native_levels():
        with native_level(level):
            torch.manual_seed(0)
            experts = cpu.pack_experts(
                torch.randn(5, 128, 90).to(dtype) / 9, torch.randn(5, 90, 64).to(dtype) / 8
            )
            x, logits = torch.randn(1100, 90).to(dtype), torch.randn(1100, 5)
            ids, weights = cpu.router_topk(logits, RouterSpec(3), None)
            together = cpu.moe_packed(x, experts, ids, weights, "silu")
            cpu.library.set_threads(3)
            assert torch.equal(cpu.moe_packed(x, experts, ids, weights, "silu"), together)
            order = torch.randperm(len(x))[:70]
            for rows in (order, *order.split(1)[:9], torch.arange(1000, 1100)):
                some = cpu.moe_packed(x[rows], experts, ids[rows], weights[rows], "silu")
                assert torch.equal(some, together[rows])
                again = cpu.router_topk(logits[rows], RouterSpec(3), None)
                assert torch.equal(again[0], ids[rows])
                assert torch.equal(again[1], weights[rows])


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_low_bit_experts_are_their_linear_layers(
    impl: SimpleNamespace, format: str, on_input: bool
) -> None:
    """Every expert by hand; one of them of floats. The same bits alone and among others."""
    count, hidden, inner, top_k = 4, 96, 70, 2
    formats = [format] * (count - 1) + [""]
    weights = {
        name: tuple(impl.pack(torch.randn(shape) / shape[1] ** 0.5, form) for form in formats)
        for name, shape in (
            ("gates", (inner, hidden)),
            ("ups", (inner, hidden)),
            ("downs", (hidden, inner)),
        )
    }
    x = torch.randn(41, hidden)
    ids, shares = impl.router_topk(torch.randn(41, count), RouterSpec(top_k), None)
    y = impl.moe_packed(x, PackedExperts(**weights), ids, shares, "silu", on_input)
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, share in zip(ids[token].tolist(), shares[token], strict=True):
            row = x[token : token + 1]
            if on_input:
                row, share = share * row, torch.tensor(1.0)
            gate, up, down = (weights[name][expert] for name in ("gates", "ups", "downs"))
            gate_up = torch.cat([impl.linear_packed(row, w, None) for w in (gate, up)], dim=1)
            out = impl.linear_packed(impl.gated(gate_up, "silu"), down, None)
            expected[token] += share * out[0]
    torch.testing.assert_close(y, expected, atol=2e-6, rtol=1e-5)
    few = ids[7:8], shares[7:8]
    alone = impl.moe_packed(x[7:8], PackedExperts(**weights), *few, "silu", on_input)
    assert torch.equal(alone, y[7:8]) or impl.moe_packed is ref.moe_packed


def test_wrong_shapes_are_refused(impl: SimpleNamespace) -> None:
    if impl.router_topk is not getattr(cpu, "router_topk", None):
        return
    with pytest.raises(ValueError, match="1 to 4 experts, not 5"):
        impl.router_topk(torch.randn(2, 4), RouterSpec(5), None)
    experts = impl.pack_experts(torch.randn(2, 8, 6), torch.randn(2, 6, 4))
    ids, weights = impl.router_topk(torch.randn(3, 2), RouterSpec(1), None)
    with pytest.raises(ValueError, match="7 columns"):
        impl.moe_packed(torch.randn(3, 7), experts, ids, weights, "silu")
