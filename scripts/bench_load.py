"""Load a converted directory, cold or warm, and say how long it took and what memory it holds.

    python scripts/make_synthetic_checkpoint.py --converted gptq --output /dev/shm/result
    python scripts/bench_load.py /dev/shm/result --device-memory 10GiB --times warm warm --speed

Cold: the directory's pages are dropped from the page cache before (which does nothing where the
directory is memory itself, as /dev/shm).  One line a load: seconds, bytes a second, the process's
memory, the GPU's memory beside the ledger.  `--speed` measures prompts and decoding at the end, as
`requant validate` does.  Exit code 1 when a load took longer than `--most` seconds.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline import hybrid
from pipeline.evaluate.speed import measure, peak_host_bytes, reset_peaks, timed

GIB = 2**30


def drop(folder: Path) -> None:
    """Take a directory's files out of the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm(folder: Path) -> None:
    """Read all of it once."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def on_gpu(told: dict[str, int]) -> str:
    """What is in use of the GPU beside the ledger."""
    if not torch.cuda.is_available():
        return "no GPU"
    free, total = torch.cuda.mem_get_info()
    used, reserved = (total - free) / GIB, torch.cuda.memory_reserved() / GIB
    return (
        f"GPU {used:.2f} GiB, {reserved:.2f} of it reserved by torch "
        f"({torch.cuda.max_memory_allocated() / GIB:.2f} allocated at most); "
        f"ledger {sum(told.values()) / GIB:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--placement", default="auto")
    parser.add_argument("--device-memory")
    parser.add_argument("--times", nargs="+", choices=("cold", "warm"), default=["cold", "warm"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--most", type=float, default=float("inf"), help="seconds a load may take")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    nbytes = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    print(f"{nbytes / 1e9:.2f} GB, {args.threads} threads, load {os.getloadavg()[0]:.1f}")
    slowest = 0.0
    model: Any = None
    for how in args.times:
        model = None
        gc.collect()
        (drop if how == "cold" else warm)(args.model)
        reset_peaks()
        started = time.process_time()
        model, seconds = timed(
            lambda: hybrid.load(
                args.model, device_memory=args.device_memory, placement=args.placement
            )
        )
        worked = time.process_time() - started
        slowest = max(slowest, seconds)
        held = psutil.Process().memory_info().rss / GIB
        print(
            f"{how}: {seconds:.1f} s, {nbytes / 1e9 / seconds:.2f} GB/s; {worked:.1f} s of "
            f"processors; {held:.1f} GiB of RAM, {peak_host_bytes() / GIB:.1f} at most; "
            f"{on_gpu(model.hybrid_placement['ledger'])}",
            flush=True,
        )
    print({k: v for k, v in model.hybrid_placement.items() if k not in ("experts", "ledger")})
    if args.speed:
        vocabulary = model.config.vocab_size
        found = measure(model, torch.randint(5, vocabulary, (4096,)))
        told = model.hybrid_placement["ledger"]
        print(
            f"decode {found.decode_tokens_per_second:.1f} tokens/s, prefill of 4,096 "
            f"{found.prefill_tokens_per_second:.0f}; {on_gpu(told)}"
        )
        print(", ".join(f"{name} {size / GIB:.2f}" for name, size in told.items()))
    sys.exit(1 if slowest > args.most else 0)


if __name__ == "__main__":
    main()
