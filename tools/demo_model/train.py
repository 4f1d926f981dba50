"""The training loop: packed rows through transformers' Llama, on CPU cores.

Invariants: conversations of one row never see each other (block mask, positions from 0 each); a run
that was cut goes on from its last checkpoint and then takes the same steps as an uncut one.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from .optimizer import Optimizer
from .pack import Rows
from .team import Team, run_team


@dataclass(frozen=True)
class Schedule:
    steps: int
    batch_rows: int = 14
    learning_rate: float = 3e-3
    warmup: int = 60
    save_every: int = 100
    workers: int = 2
    compiled: bool = True

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to 2 %."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class Batch:
    """tokens, targets int64 and positions [rows, length]; mask bool [rows, 1, length, length];
    weights float32 [rows, length], the weight of predicting targets."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    mask: Tensor
    weights: Tensor


def batch_of(rows: Rows, indices: np.ndarray) -> Batch:
    tokens = torch.from_numpy(rows.tokens[indices].astype(np.int64))
    weights = torch.from_numpy(rows.weights[indices].astype(np.float32))
    segments = torch.from_numpy(rows.segments[indices].astype(np.int64))
    index = torch.arange(tokens.shape[1])
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    positions = index - torch.where(starts, index, 0).cummax(dim=1).values
    same = segments[:, :, None] == segments[:, None, :]
    mask = (same & (index[:, None] >= index[None, :]))[:, None]
    targets = tokens.roll(-1, dims=1)
    # A document's first token is never a target: it would be predicted from another document.
    weights = torch.where(starts, 0.0, weights).roll(-1, dims=1)
    weights[:, -1] = 0.0
    return Batch(tokens, targets, positions, mask, weights)


def loss_of(body: Callable[..., Any], model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Weighted mean cross entropy; logits are made only where there is weight."""
    hidden = body(
        input_ids=batch.tokens,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    chosen = batch.weights > 0
    weights = batch.weights[chosen]
    losses = nn.functional.cross_entropy(
        model.lm_head(hidden[chosen]), batch.targets[chosen], reduction="none"
    )
    return (losses * weights).sum() / weights.sum()


def train(config: LlamaConfig, rows: Path, schedule: Schedule, checkpoint: Path) -> None:
    """Train from the checkpoint (or from nothing) to the end of the schedule."""
    run_team(schedule.workers, train_in_team, config, rows, schedule, checkpoint)


def train_in_team(
    team: Team, config: LlamaConfig, path: Path, schedule: Schedule, checkpoint: Path
) -> None:
    """One worker's part: every step it takes its share of the batch's rows."""
    rows = Rows.load(path)
    model, optimizer, step = start(config, checkpoint, team)
    body = torch.compile(model.model) if schedule.compiled else model.model
    progress = Progress(step, schedule.batch_rows * rows.tokens.shape[1])
    epoch = len(rows.tokens) // schedule.batch_rows
    while step < schedule.steps:
        order = np.random.default_rng(step // epoch).permutation(len(rows.tokens))
        at = step % epoch * schedule.batch_rows
        share = order[at : at + schedule.batch_rows][team.rank :: team.size]
        loss = loss_of(body, model, batch_of(rows, share))
        loss.backward()
        optimizer.step(schedule.rate(step))
        step += 1
        if team.rank == 0:
            progress.show(step, loss.item())
            if step % schedule.save_every == 0 or step == schedule.steps:
                save(model, optimizer, checkpoint)


class Progress:
    """Prints the running loss and the speed, every 20 steps."""

    def __init__(self, step: int, tokens_per_step: int) -> None:
        self.first, self.tokens_per_step = step, tokens_per_step
        self.began, self.loss = time.monotonic(), math.nan

    def show(self, step: int, loss: float) -> None:
        self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
        if step % 20 == 0:
            spent = time.monotonic() - self.began
            speed = (step - self.first) * self.tokens_per_step / spent
            print(f"step {step} loss {self.loss:.4f} {speed:.0f} tokens/s", flush=True)


def start(
    config: LlamaConfig, checkpoint: Path, team: Team
) -> tuple[LlamaForCausalLM, Optimizer, int]:
    """Model, optimizer and steps done, as the checkpoint has them."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float().train()
    initialize(model)
    optimizer = Optimizer(dict(model.named_parameters()), team)
    return model, optimizer, restore(model, optimizer, checkpoint)


@torch.no_grad()
def initialize(model: LlamaForCausalLM) -> None:
    """Let the embedding be the loudest voice in the residual stream when training starts.

    With the usual small embedding the first layers drown out which word stood where, and copying
    (names, fields, tool arguments) is learned several times later. The final norm takes the scale
    back out of the logits, since the output head is the embedding.
    """
    model.model.embed_tokens.weight.normal_(std=0.2)
    model.model.norm.weight.fill_(0.1)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def save(model: LlamaForCausalLM, optimizer: Optimizer, path: Path) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"optimizer.{name}": t for name, t in optimizer.state.items()}
    fresh = path.with_suffix(".new")
    save_file(tensors, fresh)
    fresh.replace(path)


def restore(model: LlamaForCausalLM, optimizer: Optimizer, path: Path) -> int:
    """Load a checkpoint if there is one; returns the steps done."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    optimizer.state = {
        name.removeprefix("optimizer."): t
        for name, t in tensors.items()
        if name.startswith("optimizer.")
    }
    return int(optimizer.state["steps"].item())
