"""Our packing against that of the projects whose formats we write: AutoAWQ and AutoGPTQ.

    scripts/oracles/make_env.sh
    python scripts/oracles/check_packers.py [DIRECTORY ...]

Random matrices of every scheme that a recipe can ask for are packed by our code; the projects' own
code, in environments of its own, then
  - AutoAWQ: unpacks them by `dequantize_gemm`, to the very float16 weights that we say they are,
    and packs the weights by `WQLinear_GEMM.from_linear`, to the same bits;
  - AutoGPTQ: packs the weights by its `QuantLinear.pack`, to the same bits.
Each DIRECTORY, a result of `requant run` in either format, is checked likewise, matrix by matrix.
Exit code 0: all equal; 1: something differs; 2: it cannot be checked.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.output import OutputFormat
from pipeline.checkpoint.reader import Checkpoint
from pipeline.errors import UserError
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

HERE = Path(__file__).parent
ENVIRONMENTS = {"awq": "autoawq", "gptq": "autogptq"}
SCHEMES = {
    "awq": [(4, group, sym) for group in (32, 64, 128, -1) for sym in (False, True)],
    "gptq": [
        (bits, group, sym)
        for bits in (4, 8)
        for group in (32, 64, 128, -1)
        for sym in (True, False)
    ],
}
SHAPES = ((64, 256), (256, 128))


def random_cases(name: str) -> dict[str, Tensor]:
    """Parts and weights of one random matrix for every scheme and shape."""
    written = FORMATS[name]
    assert isinstance(written, OutputFormat)
    cases: dict[str, Tensor] = {}
    for bits, group, symmetric in SCHEMES[name]:
        scheme = AffineScheme(bits, group, symmetric)
        for rows, columns in SHAPES:
            shape = (rows, columns // scheme.group(columns))
            lowest = 0 if name == "awq" else 1  # GPTQ's version 1 cannot hold the zero 0
            zeros = torch.randint(lowest, 2**bits, shape, dtype=torch.uint8)
            scales = (torch.rand(shape) * 0.1 + 0.001).bfloat16().to(torch.float16)
            if symmetric:  # such a group may be turned around
                scales = torch.where(torch.rand(shape) < 0.5, -scales, scales)
            arrays = {
                "codes": torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8),
                "scales": scales,
                "zeros": torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
            }
            quantized = QuantizedTensor(scheme, arrays)
            case = f"{bits} bits, group {group}, sym {symmetric}, {rows}x{columns}"
            cases |= _case(case, written.pack(quantized), quantized)
    return cases


def stored_cases(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The same of every packed matrix of a directory, its parts as they are on disk."""
    cases: dict[str, Tensor] = {}
    for name, weight in checkpoint.weights.items():
        if checkpoint.is_packed(name):
            parts = {part: t[0] for part, t in checkpoint.load_parts([name]).items()}
            cases |= _case(weight.name, parts, checkpoint.load_quantized([name])[0])
    return cases


def _case(name: str, parts: dict[str, Tensor], quantized: QuantizedTensor) -> dict[str, Tensor]:
    tensors = {**parts, "true_scales": quantized.arrays["scales"]}
    tensors |= {"true_zeros": quantized.arrays["zeros"], "weight": quantized.dequantize()}
    return {f"{name}|{part}": tensor.contiguous().clone() for part, tensor in tensors.items()}


def ask(name: str, cases: dict[str, Tensor], environments: Path) -> bool:
    """Let a project's own code judge; it prints what it found."""
    python = environments / ENVIRONMENTS[name] / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.safetensors"
        save_file(cases, file)
        script = HERE / f"{ENVIRONMENTS[name]}_oracle.py"
        return subprocess.run([python, "-W", "ignore", script, file], check=False).returncode == 0


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("directories", nargs="*", type=Path, help="results of requant run")
    parser.add_argument("--environments", type=Path, default=Path(".env-oracles"))
    asked = parser.parse_args()
    for folder in ENVIRONMENTS.values():
        if not (asked.environments / folder / "bin" / "python").exists():
            print(f"{asked.environments / folder} is missing; run scripts/oracles/make_env.sh")
            return 2
    print(f"Python {platform.python_version()}, torch {torch.__version__}", flush=True)
    passed = True
    for name in ENVIRONMENTS:
        print(f"{name}, random matrices:", flush=True)
        passed &= ask(name, random_cases(name), asked.environments)
    for path in asked.directories:
        try:
            checkpoint = Checkpoint.open(path)
            method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
            if method not in ENVIRONMENTS:
                print(f"{path}: quant_method is {method}; only {', '.join(ENVIRONMENTS)} can be")
                return 2
            print(f"{method}, {path}:", flush=True)
            passed &= ask(method, stored_cases(checkpoint), asked.environments)
        except UserError as error:
            print(error)
            return 2
    print("all equal" if passed else "something differs")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
