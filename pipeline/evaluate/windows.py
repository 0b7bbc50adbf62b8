"""Sliding windows over one long token sequence, each token scored at most once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import CalibrationError


@dataclass(frozen=True)
class Windows:
    """Equally long windows and which of their tokens count.

    token_ids: int64 [n, length]
    scored:    bool  [n, length]; scored[i, t]: the prediction OF token t (made by the logits at
               t - 1) counts.  scored[:, 0] is False, as nothing predicts a window's first token.
    stride:    tokens between the starts of two windows; 0 where the windows were not cut from one
               text by `sliding_windows`.
    """

    token_ids: Tensor
    scored: Tensor
    stride: int = 0

    def __post_init__(self) -> None:
        ids, scored = self.token_ids, self.scored
        if ids.dtype != torch.int64 or scored.dtype != torch.bool or ids.dim() != 2:
            raise ValueError("token_ids must be int64 [n, length] and scored bool")
        if ids.shape != scored.shape:
            raise ValueError(f"token_ids {tuple(ids.shape)} and scored {tuple(scored.shape)}")
        if bool(scored[:, 0].any()):
            raise ValueError("the first token of a window has no prediction and cannot be scored")
        if len(ids) == 0 or not bool(scored.any(1).all()):
            raise ValueError("every window must score at least one token")

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def length(self) -> int:
        """Tokens per window."""
        return int(self.token_ids.shape[1])

    @property
    def positions(self) -> int:
        """Scored tokens in all windows together."""
        return int(self.scored.sum())


def sliding_windows(
    tokens: Sequence[int] | Tensor, length: int, stride: int, limit: int | None = None
) -> Windows:
    """Cut `tokens` (one-dimensional) into windows that start every `stride` tokens.

    Each token is scored at most once, and with at least `length - stride` tokens of context except
    in the first window, which scores all but its first token.  The last window is moved back so
    that it ends with the text; it scores only what no window before it scored.

    limit: keep that many windows from the start.  Raises CalibrationError for a text shorter than
    one window, ValueError for an impossible length, stride or limit.
    """
    if length < 2 or not 1 <= stride <= length:
        raise ValueError(f"length {length} and stride {stride}: need 1 <= stride <= length >= 2")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: need at least one window")
    text = torch.as_tensor(tokens, dtype=torch.int64)
    if text.dim() != 1:
        raise ValueError(f"tokens must be one-dimensional, not {tuple(text.shape)}")
    total = text.numel()
    if total < length:
        raise CalibrationError(
            f"evaluation text has {total} tokens, one window needs {length}: "
            "use a longer text or a shorter sequence_length"
        )
    starts = list(range(0, total - length + 1, stride))
    if starts[-1] + length < total:
        starts.append(total - length)
    starts = starts[:limit]
    ids = torch.stack([text[start : start + length] for start in starts])
    scored = torch.zeros(ids.shape, dtype=torch.bool)
    done = 0  # tokens of the text before this one are scored, or are the very first
    for row, start in enumerate(starts):
        scored[row, max(done - start, 1) :] = True
        done = start + length
    return Windows(ids, scored, stride)
