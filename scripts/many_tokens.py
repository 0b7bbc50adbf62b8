"""Generate many tokens with a loaded model, and see whether it keeps more memory than it had.

    python scripts/many_tokens.py MODEL --tokens 10000 [--placement auto]

Texts of 100 tokens, batches of 1 and 2 in turn.  Counted are Python's tensors, what torch holds on
a GPU, and the process's resident memory; exit code 1 when either of the first two has grown since
the first tenth, or the last by more than 32 MiB (allocators keep what was freed).
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import psutil
import torch

from pipeline import hybrid

LENGTH = 100
SLACK = 32 << 20


def held() -> dict[str, int]:
    """Number of tensors that live, bytes on the GPU, bytes of the process."""
    gc.collect()
    return {
        "tensors": sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor),
        "device": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
        "resident": psutil.Process().memory_info().rss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--placement", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = hybrid.load(args.model, placement=args.placement)
    first: dict[str, int] = {}
    done = 0
    while done < args.tokens:
        for batch in (1, 2):
            ids = torch.randint(5, 500, (batch, 8), device=model.device)
            model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=LENGTH,
                min_new_tokens=LENGTH,
                do_sample=True,
            )
            done += LENGTH
        if not first and done >= args.tokens / 10:
            first = held()
    last = held()
    print(f"{done:,} tokens: " + ", ".join(f"{k} {first[k]:,} to {last[k]:,}" for k in last))
    grown = last["tensors"] > first["tensors"] or last["device"] > first["device"]
    sys.exit(1 if grown or last["resident"] > first["resident"] + SLACK else 0)


if __name__ == "__main__":
    main()
