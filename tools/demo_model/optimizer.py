"""The optimizer: Muon for weight matrices, Adam for the embedding and the norms.

Muon orthogonalizes the momentum of a matrix with a Newton-Schulz iteration (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon/); for so short a run it needs about half of Adam's steps.
Invariant: all state is in `state`, a flat dictionary of tensors, so that a checkpoint is one
safetensors file.
"""

import torch
from torch import Tensor

from .team import Team

MOMENTUM, BETAS, EPSILON, DECAY = 0.95, (0.9, 0.98), 1e-8, 0.05


def orthogonalized(matrix: Tensor, rounds: int = 5) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of `matrix` [rows, columns]."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Optimizer:
    """Steps on the gradients of named parameters and clears them."""

    def __init__(self, parameters: dict[str, Tensor], team: Team) -> None:
        self.parameters = parameters
        self.team = team
        self.state: dict[str, Tensor] = {"steps": torch.zeros(())}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Average the workers' gradients and step; each worker makes its share of the updates."""
        self.state["steps"] += 1
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        self.team.add_up([*gradients.values()])
        updates = []
        for index, (name, gradient) in enumerate(gradients.items()):
            gradient /= self.team.size
            mine = index % self.team.size == self.team.rank
            matrix = gradient.ndim == 2 and "embed" not in name
            updates.append(
                self.muon(name, gradient, mine) if matrix else self.adam(name, gradient, mine)
            )
        self.team.add_up(updates)
        for name, update in zip(gradients, updates, strict=True):
            parameter = self.parameters[name]
            parameter.mul_(1 - rate * DECAY)
            parameter -= rate * update
            parameter.grad = None

    def muon(self, name: str, gradient: Tensor, mine: bool) -> Tensor:
        momentum = self.state.setdefault(f"{name}.momentum", torch.zeros_like(gradient))
        momentum.lerp_(gradient, 1 - MOMENTUM)
        if not mine:
            return torch.zeros_like(gradient)
        direction = orthogonalized(gradient.lerp(momentum, MOMENTUM))
        # 0.2 per element is about the size of an Adam update, so both share one learning rate.
        return direction * (0.2 * max(gradient.shape) ** 0.5)

    def adam(self, name: str, gradient: Tensor, mine: bool) -> Tensor:
        steps = int(self.state["steps"])
        mean = self.state.setdefault(f"{name}.mean", torch.zeros_like(gradient))
        square = self.state.setdefault(f"{name}.square", torch.zeros_like(gradient))
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient * gradient, 1 - BETAS[1])
        if not mine:
            return torch.zeros_like(gradient)
        corrected = (square / (1 - BETAS[1] ** steps)).sqrt() + EPSILON
        return mean / (1 - BETAS[0] ** steps) / corrected
