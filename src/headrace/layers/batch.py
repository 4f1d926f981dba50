"""What a model sees of one step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.ops.meta import AttentionMeta, KvCache


@dataclass(frozen=True, eq=False)
class ForwardBatch:
    """Flat tokens of any mix of chunks.

    `ids`, `positions`: int64 [tokens]. `caches`: of each layer, as the model's
    `state_specs` say.
    `prompt_lens`: int32 [chunks], length of the prompt of each chunk's row; only models whose
    rotary embedding depends on it read it (see `layers.rope`). Without it a chunk's context counts.
    `seconds`: int32 [tokens], where the second text of a token's sequence begins; without it there
    is none. Only models with token types read it.
    `cos_sin`: fp32 [tokens, rotary_dim], the model's `cos_sin` of this batch if already computed.
    """

    ids: Tensor
    positions: Tensor
    meta: AttentionMeta
    caches: list[KvCache]
    prompt_lens: Tensor | None = None
    cos_sin: Tensor | None = None
    seconds: Tensor | None = None

    def lengths(self) -> Tensor:
        """int64 [tokens]: length of the sequence a token was computed in, as rope scaling counts.

        The prompt's for its tokens, position + 1 for tokens after it.
        """
        meta = self.meta
        chunk_lens = meta.context if self.prompt_lens is None else self.prompt_lens
        per_token = torch.repeat_interleave(chunk_lens.long(), meta.query_start.diff().long())
        return torch.maximum(per_token, self.positions + 1)
