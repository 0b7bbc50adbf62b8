"""The tokenizer of a model, and texts through it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.checkpoint.admission import refuse_code
from pipeline.checkpoint.index import resolve_inside
from pipeline.errors import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of these holds a tokenizer's vocabulary."""
READ_BESIDE = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)
"""What transformers reads to make one."""


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; never runs code from it.

    Raises CheckpointError for one that is missing (transformers would make up an empty one), is
    damaged, asks for code of its own, or links to files elsewhere.
    """
    if not any((model / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{model}: holds no tokenizer ({', '.join(TOKENIZER_FILES)}); download it too"
        )
    refuse_code(model)
    for name in READ_BESIDE:
        if (model / name).is_symlink() or (model / name).exists():
            resolve_inside(model, name)  # refuses links to elsewhere
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(model), trust_remote_code=False, local_files_only=True
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises no narrower class, even panics
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{model}: the tokenizer cannot be loaded ({line})") from error
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids int64 [tokens] of a text, without special tokens."""
    # The fast tokenizer behind the interface is called directly: the interface warns about texts
    # longer than the model's context, which are what sliding windows are for.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
