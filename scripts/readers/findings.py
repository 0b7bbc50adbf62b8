"""What a step leaves behind for `check_readers.py`: two small files in the work directory.

A step is a script of its own, run as `STEP.py MODEL WORK BACKEND`, because readers patch
transformers' classes for good and because a kernel that dislikes its tensors aborts the process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packed_gptq import PackedGptq
from torch import nn

TOKENS = "tokens.json"


def arguments() -> tuple[Path, Path, str]:
    """(model, work directory, backend) of the running step."""
    model, work, backend = sys.argv[1:]
    return Path(model), Path(work), backend


def logits(model: nn.Module, work: Path) -> np.ndarray[Any, Any]:
    """The model's logits for the tokens that the work directory holds: float32 [tokens, words]."""
    tokens = torch.tensor([json.loads((work / TOKENS).read_text())])
    with torch.no_grad():
        output = model(input_ids=tokens, use_cache=False)
    return output.logits[0].float().numpy()


def report_reader(
    name: str, model: nn.Module, packed: dict[str, nn.Module], seconds: float
) -> None:
    """Writes NAME.json and NAME.npy; `packed`: the modules that the reader holds quantised."""
    path, work, _ = arguments()
    # Weights before logits: some kernels repack theirs in the first forward.
    found = {
        "packed": {module: type(layer).__name__ for module, layer in packed.items()},
        "weight_error": _weight_error(PackedGptq(path), packed),
        "seconds": seconds,
    }
    np.save(work / f"{name}.npy", logits(model, work))
    (work / f"{name}.json").write_text(json.dumps(found))


def _weight_error(stored: PackedGptq, packed: dict[str, nn.Module]) -> float:
    """Largest |reader's - ours| over the largest |ours| of the same matrix, of all matrices."""
    worst = 0.0
    with torch.no_grad():
        for name, ours in stored.weights():
            if name in packed:
                theirs = packed[name].dequantize_weight().T.float()  # type: ignore[operator]
                worst = max(worst, float((theirs - ours).abs().max() / ours.abs().max()))
    return worst
