"""What else runs such a model, on the same machine, in turns with ours: bench_hybrid's last rows.

    PYTHONPATH=scripts .venv/bin/python -m hybrid_peers.table --threads 2 --turns 3

Every side is a process of its own, so that nobody's threads or memory are in another's way, and
sides that are compared take turns.  A peer whose environment is not there (`make_env.sh` for
kt-kernel, `make_llama_env.sh` for llama.cpp) is named with the script that makes it.  The dense
model of four layers takes 8 GB of RAM, on a GPU 14.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SCRIPTS = Path(__file__).parents[1]
PEERS = SCRIPTS / "hybrid_peers"
KT_KERNEL = SCRIPTS.parent / ".env-kt-kernel" / "bin" / "python"
LLAMA = SCRIPTS.parent / ".env-llama-cpp" / "bin" / "python"
GROUPS = ("four-layers", "one-layer", "llama.cpp")
LIMIT = 1800
"""Seconds for one side's turn."""

Command = list[str]


@dataclass(frozen=True)
class Turn:
    """One side's figures, tokens per second; busy: of processor time (`timing.Speed`)."""

    side: str
    decode: float
    prefill: float
    decode_busy: float
    prefill_busy: float
    note: str = ""


def print_peers(threads: int, turns: int = 3, groups: Sequence[str] = GROUPS) -> None:
    """Run all groups and print a row for each side; what cannot run is said, and passed over."""
    print(
        f"beside it, mandatory: {threads} CPU threads, medians of {turns} turns [least, most]; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    for group in groups:
        with tempfile.TemporaryDirectory() as folder:
            sides = _prepared(group, folder, threads)
            found = [turn for _ in range(turns) for side in sides for turn in _run(side)]
        for name in dict.fromkeys(turn.side for turn in found):
            mine = [turn for turn in found if turn.side == name]
            for what in ("decode", "prefill"):
                clock = _spread([getattr(turn, what) for turn in mine])
                busy = _spread([getattr(turn, f"{what}_busy") for turn in mine])
                print(f"  {name:26s} {what:8s}{clock} tok/s; of processor time {busy}", flush=True)
            if mine[-1].note:
                print(f"  {'':26s} {mine[-1].note}", flush=True)


def _prepared(group: str, folder: str, threads: int) -> list[Command]:
    """The commands that take turns, after what they need was made."""
    given = ["--threads", str(threads)]
    if group == "four-layers":
        names = ["ours", "dense"]
        if torch.cuda.is_available():
            names += ["hybrid", "accelerate"]
        return [[*_module("four_layers"), name, folder, *given] for name in names]
    if group == "one-layer":
        script = str(PEERS / "one_layer.py")
        _run([sys.executable, script, "make", folder])
        sides = [[sys.executable, script, name, folder, *given] for name in ("ours", "ours-torch")]
        for name in ("kt-kernel", "kt-kernel-q4_0"):
            sides += _with(KT_KERNEL, "make_env.sh", [script, name, folder, *given])
        return sides
    sides = [[*_module("small_model"), group_size, *given] for group_size in ("32", "128")]
    script = str(PEERS / "llama_side.py")
    theirs = _with(LLAMA, "make_llama_env.sh", [script, "speed", folder, *given])
    if theirs:
        _run([*_module("small_model"), "export", folder])
        _run([str(LLAMA), script, "write", folder])
    return sides + theirs


def _module(name: str) -> Command:
    return [sys.executable, "-m", f"hybrid_peers.{name}"]


def _with(python: Path, maker: str, command: Command) -> list[Command]:
    if python.is_file():
        return [[str(python), *command]]
    print(f"  {command[1]} not run: scripts/hybrid_peers/{maker} makes its environment")
    return []


def _run(command: Command) -> list[Turn]:
    """What it says of itself; nothing, and its last line, where it fails."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    environment.pop("OMP_NUM_THREADS", None)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"  {' '.join(command[1:4])}: stopped after {LIMIT} s")
        return []
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        print(f"  {' '.join(command[1:4])}: {last}")
        return []
    found = [Turn(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    for turn in found:
        busy = f"{turn.decode_busy:.2f}, {turn.prefill_busy:.2f}"
        clock = f"{turn.decode:.2f}, {turn.prefill:.2f}"
        print(f"    {turn.side}: {clock} tok/s; of processor time {busy}", flush=True)
    return found


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    args = parser.parse_args()
    print_peers(args.threads, args.turns, args.groups)


if __name__ == "__main__":
    main()
