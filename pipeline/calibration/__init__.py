"""Texts into token sequences: for calibration (seeded sample) and for evaluation (whole text).

    source.py     what a source is, and the records it gives: text, .jsonl, .parquet
    hub.py        the records of a data set on the Hub, streamed
    chat.py       chat records through the tokenizer's template
    tokens.py     the tokenizer of a model, in a process of its own
    sequences.py  records into sequences of one length, drawn by seed and weight

Every error names the file or data set, and the record and field where there is one.
"""

from pipeline.calibration.sequences import calibration_sequences, digest
from pipeline.calibration.source import TextSource, check_source, read_text
from pipeline.calibration.tokens import Tokenizer, load_tokenizer, tokenize

__all__ = [
    "TextSource",
    "Tokenizer",
    "calibration_sequences",
    "check_source",
    "digest",
    "load_tokenizer",
    "read_text",
    "tokenize",
]
