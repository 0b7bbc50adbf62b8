"""Records into sequences of one length, drawn by seed and weight.

Packed, the records of a source follow one another and are cut every `length` tokens; a plain text
always is.  Not packed, a record gives the sequence it begins with, and shorter ones give none: the
model sees no padding, so nothing needs a mask.

Without weights sequences are drawn from all sources together, so that a longer text gives more of
them.  With a weight on any source each gives its share (those without one: weight 1).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.calibration.chat import chat_template, render
from pipeline.calibration.source import TextSource, read_text, records
from pipeline.calibration.tokens import Tokenizer, tokenize
from pipeline.errors import CalibrationError

POOL = 8
"""Sequences read from records for every one that is drawn: a data set is not read to its end."""

SEARCHED = 200_000
"""Records looked at for sequences, at most; a data set may have none that is long enough."""

SEPARATOR = "\n\n"
"""Stands between packed texts; chats end by their template's own marks."""


def calibration_sequences(
    tokenizer: Tokenizer,
    sources: Sequence[str | TextSource],
    *,
    samples: int,
    length: int,
    seed: int,
    packing: bool = True,
) -> Tensor:
    """A seeded sample of non-overlapping sequences, int64 [samples, length].

    Equal arguments and equal texts give equal tokens.  A source given as a string is a file.
    Raises CalibrationError when the sources hold fewer sequences than asked for, or cannot be used.
    """
    given = [TextSource(file=s) if isinstance(s, str) else s for s in sources]
    if all(source.weight is None for source in given):
        pool = [s for source in given for s in _read(tokenizer, source, samples, length, packing)]
        names = ", ".join(source.name for source in given)
        return torch.stack(_draw(pool, samples, length, seed, names, packing))
    counts = _shares([1.0 if s.weight is None else s.weight for s in given], samples)
    drawn: list[Tensor] = []
    for number, (source, count) in enumerate(zip(given, counts, strict=True)):
        if count:
            pool = _read(tokenizer, source, count, length, packing)
            own = seed * 1_000_003 + number
            drawn += _draw(pool, count, length, own, source.name, packing)
    random.Random(seed).shuffle(drawn)
    return torch.stack(drawn)


def digest(tokens: Tensor) -> str:
    """sha256 of token ids, for fingerprints."""
    return hashlib.sha256(tokens.to(torch.int64).numpy().tobytes()).hexdigest()


def _shares(weights: Sequence[float], samples: int) -> list[int]:
    """Sequences of each source, by largest remainder; the earlier source wins a tie."""
    total = sum(weights)
    if total <= 0:
        raise CalibrationError(
            "calibration.sources: the weights sum to nothing; give a source a weight above 0"
        )
    exact = [samples * weight / total for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    return counts


def _draw(
    pool: Sequence[Tensor], count: int, length: int, seed: int, names: str, packing: bool
) -> list[Tensor]:
    if len(pool) < count:
        whole = "" if packing else " (records shorter than that give none without packing)"
        raise CalibrationError(
            f"{names}: {len(pool)} sequences of {length} tokens{whole}, {count} were"
            f" asked for; set calibration.samples={len(pool)}, shorten"
            " calibration.sequence_length or add text"
            if pool
            else f"{names}: not one sequence of {length} tokens{whole};"
            " shorten calibration.sequence_length or add text"
        )
    return [pool[i] for i in random.Random(seed).sample(range(len(pool)), count)]


def _read(
    tokenizer: Tokenizer, source: TextSource, wanted: int, length: int, packing: bool
) -> list[Tensor]:
    """The sequences of a source that may be drawn, in its order."""
    if source.is_text:
        return list(_cut(tokenize(tokenizer, read_text(str(source.path))), length))
    found: list[Tensor] = []
    rest = torch.empty(0, dtype=torch.int64)
    empty = True
    for number, text in enumerate(_texts(tokenizer, source)):
        if len(found) >= POOL * wanted or number >= SEARCHED:
            break
        if not text.strip():
            continue
        empty = False
        if packing:
            ids = tokenize(tokenizer, text if source.chat else text + SEPARATOR)
            rest = torch.cat([rest, ids])
            found += _cut(rest, length)
            rest = rest[len(rest) // length * length :]
        else:
            found += [ids for ids in [tokenize(tokenizer, text)[:length]] if len(ids) == length]
    if empty:
        raise CalibrationError(f"{source.name}: every {source.field!r} is empty")
    return found


def _texts(tokenizer: Tokenizer, source: TextSource) -> Iterator[str]:
    if source.chat:
        with chat_template(tokenizer, source) as template:
            for record in records(source):
                yield render(template, record, source.field)
        return
    for record in records(source):
        if isinstance(record.value, str):
            yield record.value
        else:
            hint = "; set chat: true" if isinstance(record.value, list) else ""
            raise CalibrationError(
                f"{record.where}: {source.field!r} is no text but"
                f" {type(record.value).__name__}{hint}"
            )


def _cut(tokens: Tensor, length: int) -> Sequence[Tensor]:
    whole = len(tokens) // length
    return tokens[: whole * length].view(whole, length).unbind()
