"""A compact record of what the source model predicts on fixed windows of text.

For every scored position: the source's most likely tokens with their log-probabilities, the log of
the mass all other tokens share, and the log-probability of the token that really came.  Against it
a quantised model's KL divergence can be measured anywhere, without the source.

The KL divergence is taken between distributions over (kept tokens, one bucket for the rest).
Merging outcomes can only lower a KL divergence (data processing inequality; Cover and Thomas,
Elements of Information Theory, 2.8), so it is a LOWER BOUND of the divergence over the whole
vocabulary, and 0 only says that kept tokens and rest agree.

Storage, one safetensors file.  `kept` entries per position vary: at most top_k, fewer where the
source is sure, because entries below `MIN_PROBABILITY` go to the rest.
  token_ids     int32   [windows, length]
  scored        bool    [windows, length]
  kept          uint8   [positions]          at least 1; positions in order of window and token
  ids           uint16  [sum of kept]        int32 for a vocabulary above 65,536; likeliest first
  logprobs      float16 [sum of kept]
  log_rest      float16 [positions]          log of the mass of all tokens not kept
  target        float32 [positions]          log-probability of the scored token
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.checkpoint.writer import FileRecord, write_safetensors
from pipeline.errors import CheckpointError, NumericalError
from pipeline.evaluate.windows import Windows

FORMAT = "requant-reference-1"

MIN_PROBABILITY = 1e-4
"""Entries the source gives less go to the rest.  On a small trained model with top_k 64 that takes
0.2 % off the measured KL and 40 % off the file (5.3 MB for 32k positions; 92 % of the full KL)."""

ROWS = 128
"""Positions worked on at once: 128 x 152k float32 logits are 78 MB."""

_LOWEST = -60000.0  # float16 ends at -65504; exp() of it is 0 all the same


@dataclass(frozen=True)
class Reference:
    """The record; arrays as in the module's description, ids widened to int64.

    offsets int64 [positions + 1]: position p keeps entries offsets[p] to offsets[p + 1].
    labels: what was measured, in the caller's words (text name and sha256, tokenizer sha256 ...).
    """

    windows: Windows
    kept: Tensor
    ids: Tensor
    logprobs: Tensor
    log_rest: Tensor
    target: Tensor
    top_k: int
    vocabulary: int
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def offsets(self) -> Tensor:
        """int64 [positions + 1], where each position's entries start."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.kept.long().cumsum(0)])

    @property
    def perplexity(self) -> float:
        """Perplexity of the source on the scored tokens."""
        return float(torch.exp(-self.target.double().mean()))

    def metadata(self) -> dict[str, str]:
        """What the file says about itself (safetensors metadata)."""
        return {
            "record": FORMAT,
            "top_k": str(self.top_k),
            "vocabulary": str(self.vocabulary),
            "window_length": str(self.windows.length),
            "window_stride": str(self.windows.stride),
            "windows": str(len(self.windows)),
            "positions": str(self.windows.positions),
            "source_perplexity": repr(self.perplexity),
            "labels": json.dumps(dict(self.labels), sort_keys=True),
        }

    def save(self, path: Path) -> FileRecord:
        """Write the file whole or not at all."""
        ids_dtype = torch.uint16 if self.vocabulary <= 65536 else torch.int32
        tensors = {
            "token_ids": self.windows.token_ids.to(torch.int32),
            "scored": self.windows.scored,
            "kept": self.kept,
            "ids": self.ids.to(ids_dtype),
            "logprobs": self.logprobs,
            "log_rest": self.log_rest,
            "target": self.target,
        }
        return write_safetensors(path, tensors, self.metadata())

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read and check a file; CheckpointError names it when it is missing or not ours."""
        try:
            with safe_open(str(path), framework="pt") as file:
                labels = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: cannot read the validation reference ({error}): "
                "run validate with --source"
            ) from error
        if labels.get("record") != FORMAT:
            raise CheckpointError(
                f"{path}: not a validation reference of format {FORMAT}: run validate with --source"
            )
        try:
            windows = Windows(
                tensors["token_ids"].long(), tensors["scored"], int(labels["window_stride"])
            )
            reference = cls(
                windows,
                tensors["kept"],
                tensors["ids"].long(),
                tensors["logprobs"],
                tensors["log_rest"],
                tensors["target"],
                int(labels["top_k"]),
                int(labels["vocabulary"]),
                json.loads(labels["labels"]),
            )
            reference._check()
        except (LookupError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: damaged validation reference ({error}): run validate with --source"
            ) from error
        return reference

    def _check(self) -> None:
        count = self.windows.positions
        for name in ("kept", "log_rest", "target"):
            if getattr(self, name).shape != (count,):
                raise ValueError(f"{name} does not have {count} entries")
        entries = int(self.kept.long().sum())
        if self.ids.shape != (entries,) or self.logprobs.shape != (entries,):
            raise ValueError(f"ids or logprobs do not have {entries} entries")
        if entries and not 0 <= int(self.ids.min()) <= int(self.ids.max()) < self.vocabulary:
            raise ValueError("a token id is outside the vocabulary")


class ReferenceBuilder:
    """Collects the source's logits, batch after batch and in any order, into a Reference."""

    def __init__(
        self, windows: Windows, top_k: int = 64, labels: Mapping[str, str] | None = None
    ) -> None:
        """top_k: 1 to 255 entries kept per position at most; labels: see Reference."""
        if not 1 <= top_k <= 255:
            raise ValueError(f"top_k {top_k} is not between 1 and 255")
        self.windows = windows
        self.top_k = top_k
        self.labels = dict(labels or {})
        self._vocabulary: int | None = None
        self._parts: dict[int, dict[str, Tensor]] = {}

    def add(self, first_window: int, logits: Tensor) -> None:
        """Record windows first_window, first_window + 1, ... from logits [b, length, vocabulary].

        Any float dtype and device; log-softmax is taken in float32, `ROWS` positions at a time.
        Raises NumericalError where the source's logits are not finite.
        """
        last = first_window + logits.shape[0]
        if logits.dim() != 3 or logits.shape[1] != self.windows.length or last > len(self.windows):
            raise ValueError(f"logits {tuple(logits.shape)} do not fit window {first_window} on")
        vocabulary = int(logits.shape[2])
        if self._vocabulary not in (None, vocabulary):
            raise ValueError(f"vocabulary changed from {self._vocabulary} to {vocabulary}")
        self._vocabulary = vocabulary
        for row in range(logits.shape[0]):
            window = first_window + row
            if window in self._parts:
                raise ValueError(f"window {window} was added twice")
            self._parts[window] = self._record(window, logits[row])

    def build(self) -> Reference:
        """The finished record; ValueError while windows are missing."""
        missing = [i for i in range(len(self.windows)) if i not in self._parts]
        if missing or self._vocabulary is None:
            raise ValueError(f"{len(missing)} windows were never added, the first is {missing[0]}")
        parts = [self._parts[i] for i in range(len(self.windows))]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Reference(
            self.windows,
            **joined,
            top_k=self.top_k,
            vocabulary=self._vocabulary,
            labels=self.labels,
        )

    def _record(self, window: int, logits: Tensor) -> dict[str, Tensor]:
        targets, rows = scored_rows(self.windows, window)
        collected: list[dict[str, Tensor]] = []
        for start in range(0, rows.numel(), ROWS):
            chunk = logits[rows[start : start + ROWS].to(logits.device)].float()
            if not bool(torch.isfinite(chunk).all()):
                raise NumericalError(f"source logits of evaluation window {window} have NaN or Inf")
            collected.append(
                _summarise(chunk, targets[start : start + ROWS].to(chunk.device), self.top_k)
            )
        return {name: torch.cat([part[name] for part in collected]) for name in collected[0]}


def scored_rows(windows: Windows, window: int) -> tuple[Tensor, Tensor]:
    """Scored tokens of a window, int64 [s], and the logit rows that predict them, int64 [s]."""
    positions = windows.scored[window].nonzero().squeeze(1)
    return windows.token_ids[window, positions], positions - 1


def _summarise(logits: Tensor, targets: Tensor, top_k: int) -> dict[str, Tensor]:
    """One chunk of positions: float32 logits [s, vocabulary] to the arrays of the file, on CPU."""
    logprobs = torch.log_softmax(logits, dim=-1)
    top, ids = logprobs.topk(min(top_k, logits.shape[-1]), dim=-1)
    keep = top >= torch.tensor(MIN_PROBABILITY).log()
    keep[:, 0] = True  # a flat distribution over a large vocabulary has no likely token at all
    target = logprobs.gather(1, targets.unsqueeze(1)).squeeze(1)
    rest = logprobs.scatter(1, ids, torch.where(keep, -torch.inf, top)).logsumexp(-1)
    arrays = {
        "kept": keep.sum(-1).to(torch.uint8),
        "ids": ids[keep],
        "logprobs": top[keep].to(torch.float16),
        "log_rest": rest.clamp(min=_LOWEST).to(torch.float16),
        "target": target,
    }
    return {name: array.cpu() for name, array in arrays.items()}
