"""Muon for many small matrices: those of one shape are orthogonalised together, and in float32.

``torch.optim.Muon`` goes matrix by matrix in bfloat16, which a CPU without instructions for it is slow at: for the 80
matrices of the tiny Wan a step of it takes longer than the model's forward and backward. The rule is the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
"""Of the quintic Newton-Schulz iteration (Keller Jordan, "Muon", 2024), as in ``torch.optim.Muon``."""


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Nesterov), its step as large as AdamW's (``adjust_lr_fn="match_rms_adamw"``)."""

    def __init__(
        self, params: Iterable[torch.Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every matrix that has a gradient; a closure is not taken."""
        if closure is not None:
            raise NotImplementedError("Muon.step takes no closure")
        for group in self.param_groups:
            alike = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[tuple(matrix.shape)].append(matrix)
            for shape, matrices in alike.items():
                updates = orthogonalised(torch.stack([self._update(matrix, group["momentum"]) for matrix in matrices]))
                size = 0.2 * math.sqrt(max(shape)) * group["lr"]
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(updates.unbind()), alpha=-size)

    def _update(self, matrix: torch.Tensor, momentum: float) -> torch.Tensor:
        gradient, state = matrix.grad, self.state[matrix]
        if gradient is None:
            raise ValueError("a matrix without gradient has no update")
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of matrices (batch, rows, columns) near one."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    result = matrices.mT if is_tall else matrices
    result = result / result.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = result @ result.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        result = torch.baddbmm(result, polynomial, result, beta=a)
    return result.mT if is_tall else result
