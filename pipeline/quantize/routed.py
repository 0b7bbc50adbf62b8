"""Products of routed tokens with the weights of the experts they were sent to, and their sums.

Everything here takes pairs (token, expert) in expert order, as `routed_hessians` does.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.quantize.backend import solver_backend
from pipeline.quantize.sent import sent


def grouped_product(x_sorted: Tensor, weight: Tensor, offsets: Sequence[int]) -> Tensor:
    """Each expert's rows times its transposed weight: [S, out], in the dtype of `x_sorted`.

    `x_sorted`: [S, in], ordered by expert; `weight`: [E, out, in]; expert e has the rows offsets[e]
    to offsets[e + 1], counted from offsets[0].  On a GPU in bfloat16 it is one launch.
    """
    first = offsets[0]
    if x_sorted.is_cuda and x_sorted.dtype == torch.bfloat16 and len(x_sorted):
        # The kernel wants no empty group, rows of whole 16 bytes, and ends without the zero.
        filled = [e for e, (start, stop) in enumerate(pairwise(offsets)) if stop > start]
        some = weight if len(filled) == len(weight) else weight[filled]
        if x_sorted.shape[1] % 8 == 0 and weight.shape[1] % 8 == 0:
            ends = [offsets[e + 1] - first for e in filled]
            stops = sent(torch.tensor(ends, dtype=torch.int32), x_sorted.device)
            return F.grouped_mm(x_sorted, some.transpose(1, 2), offs=stops)
    out = x_sorted.new_empty(len(x_sorted), weight.shape[1])
    for e, (start, stop) in enumerate(pairwise(offsets)):
        torch.mm(
            x_sorted[start - first : stop - first],
            weight[e].T,
            out=out[start - first : stop - first],
        )
    return out


@dataclass(frozen=True)
class Turns:
    """An order in which pairs can be added to their tokens' rows, many at once.

    Pairs of one turn belong to different tokens, so no two additions of a turn meet; a token's
    pairs have their turns in the order of the pairs.  The sum over turns therefore has one order on
    every device, the one of adding pair after pair.
    """

    rows: Tensor
    """int64 [U]: the tokens that occur, rising."""
    place: Tensor
    """int64 [S]: each pair's token as an index into `rows`."""
    pairs: Tensor
    """int64 [S]: the pairs, in the order of their turns within each chunk."""
    counts: tuple[tuple[int, ...], ...]
    """Pairs in each turn, for each chunk."""

    @classmethod
    def of(cls, tokens: Tensor, chunk: int) -> Turns:
        """For pairs of the given tokens int64 [S], `chunk` pairs at a time."""
        size = len(tokens)
        rows, place = torch.unique(tokens, return_inverse=True)
        by_token = torch.argsort(place, stable=True)
        sorted_place = place[by_token]
        first = torch.searchsorted(sorted_place, sorted_place)
        turn = torch.empty_like(place)
        turn[by_token] = torch.arange(size, device=tokens.device) - first
        most = int(turn.max()) + 1 if size else 0
        chunks = -(-size // chunk)
        number = torch.arange(size, device=tokens.device) // chunk
        key = number * most + turn
        pairs = torch.argsort(key, stable=True)
        table = torch.bincount(key, minlength=chunks * most).view(chunks, most).tolist()
        return cls(rows, place, pairs, tuple(tuple(counts) for counts in table))

    def add(self, total: Tensor, number: int, start: int, values: Tensor, weights: Tensor) -> None:
        """Add a chunk's weighted values to `total` float32 [U, out], a row for each of `rows`.

        `number`: of the chunk, whose first pair is `start`; `values` [n, out], `weights` float32
        [n].
        """
        position = start
        for count in self.counts[number]:
            pairs = self.pairs[position : position + count]
            position += count
            chosen = pairs - start
            part = values.index_select(0, chosen).float()
            part *= weights.index_select(0, chosen).unsqueeze(1)
            total.index_add_(0, self.place.index_select(0, pairs), part)


@dataclass(frozen=True)
class Runs:
    """The same sums, in the same order, for a kernel that walks along each token's pairs."""

    rows: Tensor
    """int64 [U]: the tokens that occur, rising."""
    pairs: Tensor
    """int64 [S]: the pairs by chunk, token, and their own order."""
    starts: Tensor
    """int64 [chunks * U + 1]: where each chunk's pairs of each token begin among `pairs`."""

    @classmethod
    def of(cls, tokens: Tensor, chunk: int) -> Runs:
        """As `Turns.of`."""
        rows, place = torch.unique(tokens, return_inverse=True)
        chunks = -(-len(tokens) // chunk)
        key = torch.arange(len(tokens), device=tokens.device) // chunk * len(rows) + place
        key, pairs = torch.sort(key, stable=True)
        wanted = torch.arange(chunks * len(rows) + 1, device=tokens.device)
        return cls(rows, pairs, torch.searchsorted(key, wanted))

    def add(self, total: Tensor, number: int, start: int, values: Tensor, weights: Tensor) -> None:
        """As `Turns.add`."""
        kernels = importlib.import_module("pipeline.quantize.triton_routed")
        starts = self.starts[number * len(self.rows) :]
        kernels.add_pairs(total, values, weights, self.pairs, starts, start)


def token_sums(tokens: Tensor, chunk: int) -> Turns | Runs:
    """How to add the values of pairs of the given tokens int64 [S], `chunk` pairs at a time."""
    kind: type[Turns | Runs] = Runs if solver_backend(tokens.device) == "triton" else Turns
    return kind.of(tokens, chunk)


def add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """total[rows[i]] += values[i], float32 [., out]; `rows`: int64, none of them twice."""
    if solver_backend(total.device) == "triton":
        importlib.import_module("pipeline.quantize.triton_routed").add_rows(total, rows, values)
    else:
        total.index_add_(0, rows, values)
