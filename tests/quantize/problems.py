"""Random quantisation problems that look like a layer's: correlated inputs, uneven channels."""

from __future__ import annotations

import torch
from torch import Tensor


def fresh() -> torch.Generator:
    """A generator whose seed no run shares with another; printed by pytest when a test fails."""
    seed = int(torch.seed() % 2**31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def problem(
    generator: torch.Generator, experts: int, out: int, columns: int, *, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weights [E, out, in] and mean Hessians [E, in, in] of `tokens` (default 2 in) inputs."""
    count = tokens or 2 * columns
    x = inputs(generator, experts, count, columns)
    weight = 0.03 * torch.randn((experts, out, columns), generator=generator)
    return weight, torch.bmm(x.transpose(1, 2), x) / count


def inputs(generator: torch.Generator, experts: int, tokens: int, columns: int) -> Tensor:
    """Inputs [E, tokens, in] with a decaying spectrum and channels of uneven size."""
    mixing = torch.randn((experts, columns, columns), generator=generator)
    mixing *= torch.arange(1, columns + 1).pow(-0.4)
    x = torch.randn((experts, tokens, columns), generator=generator) @ mixing.transpose(1, 2)
    channel = torch.exp(0.5 * torch.randn((experts, 1, columns), generator=generator))
    return x * channel / columns**0.5
