"""Root mean square norms in one kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467) in one kernel where torch has one.

    Args:
        weight: [D].
        eps: added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension; float32 inside, x's number type outside."""
        return F.rms_norm(hidden_states, (len(self.weight),), self.weight, self.eps)


def fuse_norms(model: nn.Module) -> int:
    """Replace a model's RMS norms that compute what torch's does; return how many.

    Which do is found by trying: Gemma's, for one, multiplies by 1 + w.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            eps, weight = (getattr(module, key, None) for key in ("variance_epsilon", "weight"))
            if "RMSNorm" not in type(module).__name__ or eps is None or weight is None:
                continue
            fused = RMSNorm(weight, float(eps))
            if _same_function(module, fused):
                setattr(parent, name, fused)
                replaced += 1
    return replaced


@torch.no_grad()
def _same_function(module: nn.Module, fused: RMSNorm) -> bool:
    weight = fused.weight
    x = torch.linspace(-3.0, 2.0, len(weight), device=weight.device, dtype=weight.dtype)
    expected, actual = module(x[None]).float(), fused(x[None]).float()
    if expected.isnan().any():  # on torch's meta device, or damaged weights
        return False
    tolerance = 4 * torch.finfo(weight.dtype).eps
    return torch.allclose(
        actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
