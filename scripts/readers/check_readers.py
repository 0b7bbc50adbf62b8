"""Opens an output directory in GPTQModel and in transformers and compares the logits.

Run inside the environment that make_env.sh builds:

    scripts/readers/make_env.sh
    .venv-readers/bin/python scripts/readers/check_readers.py out/NAME

The yardstick is a dense model in plain transformers, dequantised from the packed tensors by
packed_gptq.py. A reader passes if it
  - holds exactly those modules quantised that are packed on disk,
  - decodes every packed matrix to our weights, within one rounding to bfloat16, and
  - gives logits no further from the float32 yardstick than NOISE_MARGIN times the distance of the
    same dense model computed in bfloat16 (error: Frobenius norm, relative); and where it can
    compute in float32, then no further than FLOAT32_TOLERANCE.
The rules pass if each reader's own matching code names exactly the packed modules.
Exit code 0: all passed; 1: something failed; 2: the directory cannot be checked.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from packed_gptq import PackedGptq

READERS = ("gptqmodel", "transformers")
NOISE_MARGIN = 1.5
"""Two bfloat16 computations in another order are about as far from float32, not exactly so."""
WEIGHT_TOLERANCE = 2.0**-8
"""One rounding to bfloat16 (8 significant bits), relative to the matrix's largest weight."""
FLOAT32_TOLERANCE = 1e-3
"""For a reader that can compute in float32: sums in another order, and a router's near ties."""
PACKAGES = ("torch", "transformers", "gptqmodel", "optimum", "defuser")
TEXT = """A mixture of experts keeps many small networks and asks only a few of them about each
word. The router decides which; the others rest in memory. When the weights are stored in four
bits, each group of them shares one scale, and a word is no longer answered exactly as before, only
nearly. Whoever opens the files has to unpack the same integers and multiply by the same scales, or
the answer will be a different one. def unpack(word): return [(word >> shift) & 15 for shift in
range(0, 32, 4)]. This paragraph says nothing else; it is here to be read by a machine."""


class Failed(Exception):
    """A step ended badly; the message is the last thing that it said."""


class Steps:
    """Runs the step scripts on one model; what they find lies in `work`."""

    def __init__(self, model: Path, work: Path, backend: str) -> None:
        self.model, self.work, self.backend = model, work, backend

    def run(self, step: str) -> None:
        """Runs read_STEP.py in a process of its own; Failed if it does not end well."""
        script = Path(__file__).with_name(f"read_{step}.py")
        command = [sys.executable, str(script), str(self.model), str(self.work), self.backend]
        # GPTQModel starts a pool of workers for the CPU; two are enough to load anywhere.
        environment = {"GPTQMODEL_CPU_WORKERS": "2", **os.environ}
        done = subprocess.run(
            command, env=environment, text=True, errors="replace", check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode:
            said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            how = "aborted" if done.returncode < 0 else "failed"
            raise Failed(f"{how}: {said[-1][:600] if said else 'without a word'}")

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """An array that a step wrote."""
        found: np.ndarray[Any, Any] = np.load(self.work / f"{name}.npy")
        return found

    def record(self, name: str) -> dict[str, Any]:
        """A record that a step wrote."""
        found: dict[str, Any] = json.loads((self.work / f"{name}.json").read_text())
        return found


def check_rules(steps: Steps, stored: set[str]) -> bool:
    """Prints what each reader's rules make of the module names; True if all agree with the disk."""
    try:
        steps.run("rules")
    except Failed as error:
        print(f"rules: FAIL, {error}")
        return False
    found = steps.record("rules")
    print(f"rules: {found['linears']} linear modules, {len(stored)} of them packed on disk")
    passed = True
    for rule, names in found["rules"].items():
        wrong = sorted(stored ^ set(names))
        verdict = "FAIL" if wrong else "PASS"
        about = f", wrong about {len(wrong)}, such as {', '.join(wrong[:3])}" if wrong else ""
        print(f"  {rule:<40} {verdict}  {len(names)} quantised{about}")
        passed &= not wrong
    return passed


def distance(logits: np.ndarray[Any, Any], yardstick: np.ndarray[Any, Any]) -> float:
    """Relative Frobenius distance."""
    return float(np.linalg.norm(logits - yardstick) / np.linalg.norm(yardstick))


def check_reader(steps: Steps, reader: str, stored: set[str]) -> bool:
    """Prints one reader's verdict with the figures that it rests on, and returns it."""
    try:
        steps.run(reader)
    except Failed as error:
        print(f"{reader}: FAIL, {error}")
        return False
    found, logits = steps.record(reader), steps.array(reader)
    yardstick, rounded = steps.array("dense-float32"), steps.array("dense-bfloat16")
    noise, away = distance(rounded, yardstick), distance(logits, yardstick)
    exact = steps.work / f"{reader}-float32.npy"
    away_exact = distance(np.load(exact), yardstick) if exact.exists() else 0.0
    passed = (
        set(found["packed"]) == stored
        and found["weight_error"] <= WEIGHT_TOLERANCE
        and bool(np.isfinite(logits).all())
        and away <= NOISE_MARGIN * noise
        and away_exact <= FLOAT32_TOLERANCE
    )
    kernels = ", ".join(f"{n} {k}" for k, n in Counter(found["packed"].values()).items())
    agreed = float((logits.argmax(-1) == yardstick.argmax(-1)).mean())
    differing = int((logits != rounded).sum())
    print(f"{reader}: {'PASS' if passed else 'FAIL'}")
    print(f"  quantised modules    {kernels or 'none'} ({len(stored)} on disk)")
    print(f"  weights              largest difference {found['weight_error']:.1e} of the largest")
    print(f"  logits to float32    error {away:.3e}; bfloat16 noise {noise:.3e}")
    print(f"  logits to bfloat16   {differing} of {logits.size} differ")
    if exact.exists():
        print(f"  read in float32      error {away_exact:.1e}")
    print(f"  same top token       {agreed:.1%} (the dense model in bfloat16: "
          f"{float((rounded.argmax(-1) == yardstick.argmax(-1)).mean()):.1%})")  # fmt: skip
    print(f"  loaded in            {found['seconds']:.1f} s")
    return passed


def check(steps: Steps, readers: tuple[str, ...], stored: set[str]) -> bool:
    """All of it; True if everything passed."""
    passed = check_rules(steps, stored)
    try:
        steps.run("dense")
    except Failed as error:
        print(f"dense yardstick: FAIL, {error}")
        return False
    tokens, words = steps.array("dense-float32").shape
    print(f"logits of {tokens} tokens, vocabulary {words}")
    for reader in readers:
        passed &= check_reader(steps, reader, stored)
    return passed


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="output directory of the pipeline")
    parser.add_argument("--reader", choices=(*READERS, "all"), default="all")
    parser.add_argument("--backend", default="gptq_torch", help="GPTQModel's kernel, or auto")
    parser.add_argument("--text", type=Path, help="UTF-8 file (default: a built-in paragraph)")
    parser.add_argument("--tokens", type=int, default=256, help="at most so many of the text")
    asked = parser.parse_args()
    try:
        packed = PackedGptq(asked.model)
        text = asked.text.read_text() if asked.text else TEXT
    except (OSError, KeyError) as error:
        print(
            f"{asked.model}: needs config.json with quantization_config, and an index ({error!r})"
        )
        return 2
    if (method := packed.quantization.get("quant_method")) != "gptq":
        print(f"{asked.model}: quant_method is {method}; only gptq can be checked")
        return 2
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, {asked.backend} kernels")
    print(f"model {asked.model}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "text.json").write_text(json.dumps({"text": text, "tokens": asked.tokens}))
        readers = READERS if asked.reader == "all" else (asked.reader,)
        passed = check(Steps(asked.model, work, asked.backend), readers, packed.modules())
    print("all passed" if passed else "something failed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
