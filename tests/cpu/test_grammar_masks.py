"""mask_logits at every instruction-set level, and masks on their way from a plan to logits."""

import numpy as np
import pytest
import torch

from headrace import ops
from headrace.core.plan import TokenMasks
from headrace.grammar.masks import MaskedLogits
from headrace.ops import ref
from tests.support.native import native_level, native_levels


def some(rows: int, vocab: int, masked: list[int], kind: str):
    random = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=random)
    words = -(-vocab // 32)
    masks = torch.randint(-(2**31), 2**31 - 1, (len(masked), words), generator=random)
    if kind != "mixed":
        masks = torch.full_like(masks, -1 if kind == "all" else 0)
        masks[:, words // 2] = 5
    return logits, torch.tensor(masked), masks.to(torch.int32)


@pytest.mark.parametrize("level", [*native_levels(), "torch"])
@pytest.mark.parametrize("kind", ["mixed", "all", "none"])
@pytest.mark.parametrize("vocab", [1, 31, 32, 50, 2051])
def test_the_kernel_is_the_definition(level, kind, vocab):
    logits, rows, masks = some(5, vocab, [3, 0], kind)
    want = logits.clone()
    ref.mask_logits(want, rows, masks)
    with native_level(level):
        (ref if level == "torch" else ops).mask_logits(logits, rows, masks)
    assert torch.equal(logits, want)
    bits = np.unpackbits(masks.numpy().view(np.uint8), axis=1, bitorder="little")[:, :vocab]
    assert (torch.isfinite(want[rows]).numpy() == bits).all()


def test_only_positions_with_a_mask_change():
    logits = torch.zeros(3, 40)
    words = np.array([[0b101, 0], [0b10, 0]], dtype="<i4").tobytes()
    extra = TokenMasks([4, 4], [10, 11], words)
    MaskedLogits().edit(logits, np.array([4, 2, 4]), np.array([11, 10, 10]), extra)
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [1]
    assert torch.isfinite(logits[1]).all()
    assert torch.isfinite(logits[2]).nonzero().flatten().tolist() == [0, 2]
    MaskedLogits().edit(logits, np.array([1]), np.array([10]), extra)
