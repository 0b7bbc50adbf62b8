"""Interpolated Kneser-Ney 5-gram perplexity over token arrays: the yardstick of the test model.

Interpolated modified Kneser-Ney (Chen and Goodman 1999): the highest order counts tokens, lower
orders count distinct left contexts, three discounts per order, and the unigram is interpolated
with the uniform distribution. N-grams are integers in base `vocabulary`, sorted once, so memory
is about 24 bytes a token and order; `vocabulary ** order` must stay below 2 ** 63.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Order:
    """Everything one order of the model looks up, keyed by sorted integers.

    `grams` [G] with `counts` [G] (true counts at the top, continuation counts below);
    `contexts` [C] with `totals` [C] (sum of the counts) and `reserved` [C] (the mass, not yet
    divided by the total, that the discounts took away and that goes to the next lower order).
    """

    grams: Array
    counts: Array
    contexts: Array
    totals: Array
    reserved: Array
    discounts: tuple[float, float, float]


def _keys(tokens: Array, order: int, vocabulary: int) -> Array:
    """Integer of each n-gram, in the order of the tokens: [len(tokens) - order + 1]."""
    length = len(tokens) - order + 1
    keys = np.zeros(length, dtype=np.int64)
    for i in range(order):
        keys = keys * vocabulary + tokens[i : i + length]
    return keys


def _discounts(counts: Array) -> tuple[float, float, float]:
    """The three discounts from the counts of counts; plain halves where a text is too small."""
    n1, n2, n3, n4 = (float((counts == n).sum()) for n in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return 0.5, 0.5, 0.5
    y = n1 / (n1 + 2 * n2)
    raw = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return tuple(min(max(d, 0.05), n + 0.95) for n, d in enumerate(raw))  # type: ignore[return-value]


def _taken(counts: Array, discounts: tuple[float, float, float]) -> Array:
    table = np.array((0.0, *discounts))
    return table[np.minimum(counts, 3)]


class KneserNey:
    """Model over tokens 0 .. vocabulary - 1."""

    def __init__(self, tokens: Array, vocabulary: int, order: int = 5) -> None:
        if vocabulary**order >= 2**63:
            raise ValueError(f"{vocabulary} ** {order} does not fit 63 bits; lower the order")
        self.vocabulary, self.order = vocabulary, order
        tokens = tokens.astype(np.int64)
        grams, counts = np.unique(_keys(tokens, order, vocabulary), return_counts=True)
        self.orders: list[Order] = []  # highest first
        for n in range(order, 0, -1):
            self.orders.append(self._order(grams, counts))
            if n > 1:  # distinct left neighbours: each different n-gram counts once below
                grams, counts = np.unique(grams % vocabulary ** (n - 1), return_counts=True)

    def _order(self, grams: Array, counts: Array) -> Order:
        discounts = _discounts(counts)
        contexts, starts = np.unique(grams // self.vocabulary, return_index=True)
        totals = np.add.reduceat(counts, starts)
        reserved = np.add.reduceat(_taken(counts, discounts), starts)
        return Order(grams, counts, contexts, totals, reserved, discounts)

    def _lookup(self, table: Array, keys: Array) -> tuple[Array, Array]:
        at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
        return at, table[at] == keys

    def probability(self, contexts: Array, tokens: Array) -> Array:
        """P(token | context): contexts [N, order - 1] of tokens, tokens [N] -> float64 [N]."""
        result = np.full(len(tokens), 1.0 / self.vocabulary)
        for level in reversed(range(self.order)):
            order, width = self.orders[level], self.order - 1 - level
            context = np.zeros(len(tokens), dtype=np.int64)
            for column in range(self.order - 1 - width, self.order - 1):
                context = context * self.vocabulary + contexts[:, column]
            at, known = self._lookup(order.contexts, context)
            gram_at, seen = self._lookup(order.grams, context * self.vocabulary + tokens)
            counts = np.where(seen, order.counts[gram_at], 0)
            kept = counts - _taken(counts, order.discounts)
            mixed = (kept + order.reserved[at] * result) / order.totals[at]
            result = np.where(known, mixed, result)
        return result

    def log_probabilities(self, tokens: Array) -> Array:
        """Natural log P of tokens[order - 1:] given the tokens before each."""
        tokens = tokens.astype(np.int64)
        width = self.order - 1
        count = len(tokens) - width
        contexts = np.stack([tokens[i : i + count] for i in range(width)], axis=1)
        return np.log(self.probability(contexts, tokens[width:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path, help="uint16 tokens")
    parser.add_argument("texts", type=Path, nargs="+", help="uint16 tokens")
    parser.add_argument("--vocabulary", type=int, default=3072)
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--scores", type=Path, help="folder for the log-probabilities, float32")
    args = parser.parse_args()
    model = KneserNey(np.fromfile(args.train, np.uint16), args.vocabulary, args.order)
    print(json.dumps({"discounts": [order.discounts for order in model.orders]}))
    for path in args.texts:
        scores = model.log_probabilities(np.fromfile(path, np.uint16))
        figures = {"text": path.name, "tokens": len(scores)}
        print(json.dumps({**figures, "perplexity": math.exp(-float(scores.mean()))}))
        if args.scores:
            args.scores.mkdir(parents=True, exist_ok=True)
            scores.astype(np.float32).tofile(args.scores / f"{path.name}.kn")


if __name__ == "__main__":
    main()
