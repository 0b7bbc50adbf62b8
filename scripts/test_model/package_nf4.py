"""Quantises a dense bf16 model to NF4 and saves it as Unsloth's uploads are saved.

Runs under transformers 4.57.6 with bitsandbytes (see make_env.sh): that version holds one
nn.Linear per expert, makes a Linear4bit of every nn.Linear but lm_head (so the router,
shared_expert_gate and in_proj_ba too), and save_pretrained writes the six tensors of each.
Nothing is edited afterwards but the file modes.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WORLD_READABLE = 0o644  # safetensors creates its files for the owner alone
SUFFIXES = (
    "",
    ".absmax",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_map",
    ".quant_state.bitsandbytes__nf4",
)


def quantise(source: Path, output: Path, shard_size: str) -> None:
    """Load `source` with NF4 and double quantisation and save it to `output`."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(output, max_shard_size=shard_size)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, output / name)
    for path in output.iterdir():
        path.chmod(WORLD_READABLE)


def check_layout(output: Path) -> tuple[int, int, int]:
    """Return (matrices, other tensors, bytes); raise ValueError if a matrix lacks a part."""
    names: set[str] = set()
    dtypes: dict[str, torch.dtype] = {}
    shards = sorted(output.glob("*.safetensors"))
    for path in shards:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - no mapping, but a handle
                names.add(name)
                dtypes[name] = handle.get_tensor(name).dtype
    bases = {name for name in names if dtypes[name] == torch.uint8 and name.endswith(".weight")}
    missing = [base + suffix for base in bases for suffix in SUFFIXES if base + suffix not in names]
    if missing:
        raise ValueError(f"{output}: {len(missing)} parts are missing, first {min(missing)}")
    if not any(".experts.0.gate_proj.weight" in base for base in bases):
        raise ValueError(f"{output}: the experts are not stored one by one")
    others = len(names) - len(SUFFIXES) * len(bases)
    return len(bases), others, sum(path.stat().st_size for path in shards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shard-size", default="9MB", help="as transformers' max_shard_size")
    args = parser.parse_args()
    torch.set_num_threads(2)
    start = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    for stale in args.output.glob("*.safetensors*"):
        stale.unlink()
    quantise(args.source, args.output, args.shard_size)
    matrices, others, size = check_layout(args.output)
    print(
        json.dumps(
            {
                "matrices": matrices,
                "plain_tensors": others,
                "shard_bytes": size,
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
