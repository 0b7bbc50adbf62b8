"""Texts into token sequences: for calibration (seeded sample) and for evaluation (whole text).

Sources are local UTF-8 text files.  Every error names the file.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.errors import CalibrationError, CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of these holds a tokenizer's vocabulary."""


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; never runs code from it.

    Raises CheckpointError for one that is missing (transformers would make up an empty one) or
    damaged.
    """
    if not any((model / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{model}: holds no tokenizer ({', '.join(TOKENIZER_FILES)}); download it too"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(model), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises no narrower class
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{model}: the tokenizer cannot be loaded ({line})") from error
    return tokenizer


def read_text(path: str) -> str:
    """A whole UTF-8 text; raises CalibrationError when it is missing, empty or not UTF-8."""
    file = Path(path)
    try:
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise CalibrationError(f"text {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"text {path} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise CalibrationError(f"text {path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise CalibrationError(f"text {path} is empty")
    return text


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids int64 [tokens] of a text, without special tokens."""
    # The fast tokenizer behind the interface is called directly: the interface warns about texts
    # longer than the model's context, which are what sliding windows are for.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_sequences(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    samples: int,
    length: int,
    seed: int,
) -> Tensor:
    """A seeded sample of non-overlapping sequences, int64 [samples, length].

    Raises CalibrationError when the sources together hold fewer sequences than asked for.
    """
    chunks: list[Tensor] = []
    for source in sources:
        tokens = tokenize(tokenizer, read_text(source))
        whole = len(tokens) // length
        chunks.extend(tokens[: whole * length].view(whole, length))
    if len(chunks) < samples:
        raise CalibrationError(
            f"{', '.join(sources)}: {len(chunks)} sequences of {length} tokens, {samples} were"
            f" asked for; set calibration.samples={len(chunks)}, shorten"
            " calibration.sequence_length or add text"
            if chunks
            else f"{', '.join(sources)}: not one sequence of {length} tokens;"
            " shorten calibration.sequence_length or add text"
        )
    chosen = random.Random(seed).sample(range(len(chunks)), samples)
    return torch.stack([chunks[i] for i in chosen])


def digest(tokens: Tensor) -> str:
    """sha256 of token ids, for fingerprints."""
    return hashlib.sha256(tokens.to(torch.int64).numpy().tobytes()).hexdigest()
