"""llm-compressor's GPTQ on a dense model: load, oneshot, save, each timed.

    python -m full_size_peers.peer MODEL TOKENS OUTPUT GROUP

As the quality benchmark's peer calls it (`quality/peers/llm_compressor.py`): experts alone, each
calibrated on the tokens that are routed to it.  The last line is a JSON object.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from quality.peers.llm_compressor import recipe, without_pinning
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def main() -> None:
    """See the module's text."""
    model_path, tokens_path, output, group = sys.argv[1:]
    rows = load_file(tokens_path)["calibration"].unsqueeze(1)
    sequences = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    without_pinning()
    weights = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=int(group), symmetric=True
    )
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(Path(model_path), dtype=torch.bfloat16)
    linearize_moe(model)
    loaded = time.perf_counter()
    oneshot(
        model=model,
        dataset=DataLoader(sequences, batch_size=None),  # type: ignore[arg-type]
        recipe=recipe("gptq", weights),
        num_calibration_samples=len(sequences),
        max_seq_length=rows.shape[-1],
        moe_calibrate_all_experts=False,
    )
    solved = time.perf_counter()
    model.save_pretrained(output, save_compressed=True)
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    figures = {
        "version": importlib.metadata.version("llmcompressor"),
        "load_seconds": loaded - started,
        "solve_seconds": solved - loaded,
        "save_seconds": time.perf_counter() - solved,
        "device_gib": gpu,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
