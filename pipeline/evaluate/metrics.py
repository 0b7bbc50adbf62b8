"""Perplexity, KL divergence and top-1 agreement of a model against a Reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import CheckpointError, NumericalError
from pipeline.evaluate.reference import ROWS, Reference, scored_rows


@dataclass(frozen=True)
class WindowSums:
    """Sums over the scored positions of each window, float64 [windows] (count: int64)."""

    count: Tensor
    source_nll: Tensor
    quantized_nll: Tensor
    kl: Tensor
    agreed: Tensor


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Comparison:
    """A quantised model against the record of its source.

    kl_divergence: mean KL(source || quantised) in nats per token, a lower bound (see reference.py).
    top1_agreement: share of positions where a likeliest token of the source is a likeliest token of
    the quantised model; bf16 logits often tie at the top, and the order of equals means nothing.
    """

    source_perplexity: float
    quantized_perplexity: float
    kl_divergence: float
    top1_agreement: float
    windows: WindowSums

    @property
    def perplexity_ratio(self) -> float:
        """Quantised perplexity over the source's; 1 is no loss."""
        return self.quantized_perplexity / self.source_perplexity

    def ratio_interval(self, seed: int = 0) -> Interval:
        """Bootstrap confidence interval of the perplexity ratio over windows of text."""
        sums = self.windows
        log = paired_bootstrap(sums.quantized_nll, sums.source_nll, sums.count, seed=seed)
        return Interval(math.exp(log.estimate), math.exp(log.low), math.exp(log.high), log.level)


class Comparer:
    """Collects a model's logits on a reference's windows, in any order, into a Comparison."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._windows = reference.windows
        # where each window's positions start in the reference's flat arrays
        self._first = torch.cat(
            [torch.zeros(1, dtype=torch.int64), self._windows.scored.sum(1).cumsum(0)]
        ).tolist()
        self._offsets = reference.offsets
        self._sums = torch.full((len(self._windows), 3), torch.nan, dtype=torch.float64)

    def add(self, first_window: int, logits: Tensor) -> None:
        """Score windows first_window, first_window + 1, ... from logits [b, length, vocabulary].

        Raises CheckpointError when the vocabulary is not the reference's, NumericalError when
        logits are not finite.
        """
        if logits.shape[2] != self.reference.vocabulary:
            raise CheckpointError(
                f"the model predicts {logits.shape[2]} tokens, the validation reference has "
                f"{self.reference.vocabulary}: it was made from another model"
            )
        last = first_window + logits.shape[0]
        if logits.shape[1] != self._windows.length or last > len(self._windows):
            raise ValueError(f"logits {tuple(logits.shape)} do not fit window {first_window} on")
        for row in range(logits.shape[0]):
            self._sums[first_window + row] = self._score(first_window + row, logits[row])

    def build(self) -> Comparison:
        """The comparison; ValueError while windows are missing."""
        missing = int(self._sums.isnan().any(1).sum())
        if missing:
            raise ValueError(f"{missing} windows were never added")
        count = self._windows.scored.sum(1)
        source = torch.stack([-part.double().sum() for part in self._split(self.reference.target)])
        sums = WindowSums(count, source, self._sums[:, 0], self._sums[:, 1], self._sums[:, 2])
        total = int(count.sum())
        return Comparison(
            source_perplexity=math.exp(float(sums.source_nll.sum()) / total),
            quantized_perplexity=math.exp(float(sums.quantized_nll.sum()) / total),
            kl_divergence=float(sums.kl.sum()) / total,
            top1_agreement=float(sums.agreed.sum()) / total,
            windows=sums,
        )

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [flat[a:b] for a, b in zip(self._first, self._first[1:], strict=False)]

    def _score(self, window: int, logits: Tensor) -> Tensor:
        """float64 [3]: negative log-likelihood, KL and agreements, summed over one window."""
        targets, rows = scored_rows(self._windows, window)
        total = torch.zeros(3, dtype=torch.float64)
        for start in range(0, rows.numel(), ROWS):
            chunk = logits[rows[start : start + ROWS].to(logits.device)].float()
            if not bool(torch.isfinite(chunk).all()):
                raise NumericalError(f"logits of evaluation window {window} have NaN or Inf")
            logprobs = torch.log_softmax(chunk, dim=-1)
            target = targets[start : start + ROWS].to(chunk.device).unsqueeze(1)
            position = self._first[window] + start
            kl, agreed = self._against(position, logprobs)
            total += torch.stack([-logprobs.gather(1, target).double().sum(), kl, agreed]).cpu()
        return total

    def _against(self, position: int, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Summed KL and agreements of positions position ... from log-probs [s, vocabulary]."""
        ids, source, valid, source_rest = self._padded(position, logprobs.shape[0], logprobs.device)
        mine = logprobs.gather(1, ids)
        rest = logprobs.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        source = source.masked_fill(~valid, -torch.inf)
        p = torch.cat([source, source_rest], dim=1).double()
        p = p - p.logsumexp(1, keepdim=True)  # float16 rounding left a sum that is not quite 1
        q = torch.cat([mine, rest], dim=1).double()
        terms = p.exp() * (p - q)
        # 0 * (log 0 - anything) is 0: padding, and a rest that is empty on both sides
        kl = torch.where(p.exp() > 0, terms, 0.0).sum()
        likeliest = (source == source[:, :1]) & (mine >= logprobs.amax(1, keepdim=True))
        agreed = likeliest.any(1).double().sum()
        return kl, agreed

    def _padded(
        self, position: int, count: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rectangular ids, source log-probs, validity [s, widest] and log rest [s, 1].

        Padding repeats a position's first id, which a scatter may write twice without harm.
        """
        reference = self.reference
        start = self._offsets[position : position + count]
        kept = reference.kept[position : position + count].long()
        columns = torch.arange(int(kept.max()))
        valid = columns < kept.unsqueeze(1)
        index = start.unsqueeze(1) + torch.where(valid, columns, 0)
        rest = reference.log_rest[position : position + count].float().unsqueeze(1)
        arrays = (reference.ids[index], reference.logprobs[index].float(), valid, rest)
        return tuple(array.to(device) for array in arrays)  # type: ignore[return-value]


def compare(
    model: PreTrainedModel,
    reference: Reference,
    batch_size: int = 1,
    progress: Callable[[str], None] = lambda _message: None,
) -> Comparison:
    """`compare_each` with one reference."""
    return compare_each(model, [reference], batch_size, progress)[0]


def compare_each(
    model: PreTrainedModel,
    references: Sequence[Reference],
    batch_size: int = 1,
    progress: Callable[[str], None] = lambda _message: None,
) -> list[Comparison]:
    """Run a causal language model over the windows that the references share, and compare.

    Memory: batch_size * length * vocabulary logits in the model's dtype on its device, plus some
    128 rows in float32.  For a model that is not a transformers model, use `Comparer`.
    """
    windows = references[0].windows
    if any(not torch.equal(r.windows.token_ids, windows.token_ids) for r in references):
        raise ValueError("the references are of different windows")
    comparers = [Comparer(reference) for reference in references]
    for first in range(0, len(windows), batch_size):
        ids = windows.token_ids[first : first + batch_size].to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
            for comparer in comparers:
                comparer.add(first, logits)
        progress(f"window {first + len(ids)} of {len(windows)}")
    return [comparer.build() for comparer in comparers]


def paired_bootstrap(
    a: Tensor,
    b: Tensor,
    count: Tensor,
    *,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Confidence interval of mean(a) - mean(b) per position, resampling whole windows.

    a, b: sums per window [n] of two measurements of the same windows; count [n]: their positions.
    Windows are drawn with replacement, the same ones for a and b (Koehn 2004), which takes out
    how hard the text is; neighbouring windows of one text are not quite independent, so the
    interval is a little too narrow.  Percentile method, `seed` makes it repeatable.
    """
    if not a.shape == b.shape == count.shape or a.dim() != 1:
        raise ValueError("a, b and count must be one-dimensional and equally long")
    difference, weight = (a.double() - b.double()).cpu(), count.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(a.numel(), (samples, a.numel()), generator=generator)
    means = difference[drawn].sum(1) / weight[drawn].sum(1)
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(difference.sum() / weight.sum()), low, high, level)
