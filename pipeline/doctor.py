"""What this machine can do."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline import __version__
from pipeline.hybrid.native.library import find
from pipeline.progress import size
from pipeline.report.optional import MISSING, can_draw

PACKAGES = (
    *("torch", "transformers", "bitsandbytes", "safetensors", "triton", "numpy"),
    *("huggingface_hub", "matplotlib"),
)

FULL_SIZE_HOST, FULL_SIZE_DISK = 47 << 30, 51 << 30
"""What `requant plan` says of recipes/qwen3-next-80b-gptq.yaml: loading it, and converting it."""


def examine() -> dict[str, Any]:
    """Findings by name, in the order in which a person asks."""
    memory = psutil.virtual_memory()
    found: dict[str, Any] = {
        "requant": __version__,
        "python": platform.python_version(),
        "GPU": "none; everything runs on the CPU",
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        found["GPU"] = f"{name}, {size(total)}, {size(free)} free"
        found["CUDA"] = torch.version.cuda
    found |= {
        "host memory": f"{size(memory.total)}, {size(memory.available)} available",
        "disk here": f"{size(shutil.disk_usage(Path.cwd()).free)} free",
        "CPU": f"{psutil.cpu_count(logical=False)} cores, {psutil.cpu_count()} threads,"
        f" {torch.backends.cpu.get_cpu_capability()}",
        "experts on CPU": _expert_kernel(),
        "torch int4 on CPU": "yes" if _int4_works() else "no; experts are dequantised per use",
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def advice(found: Mapping[str, Any]) -> list[str]:
    """What is missing on this machine, each with what to do about it."""
    free = psutil.virtual_memory().available
    disk = shutil.disk_usage(Path.cwd()).free
    lines = []
    if not torch.cuda.is_available():
        lines.append(_no_gpu())
    if found["experts on CPU"].startswith("torch"):
        lines.append(
            "experts on the CPU are computed by torch's products, about half as fast:"
            " install a C compiler (apt install gcc), then requant again"
        )
    if found["torch int4 on CPU"] != "yes":
        lines.append(
            "torch has no int4 product for this CPU: experts are dequantised per use, which is"
            " slower; a torch built for x86 with AVX2 or AVX512 has it"
        )
    if free < FULL_SIZE_HOST:
        lines.append(
            f"{size(free)} of RAM are free; an 80B model takes {size(FULL_SIZE_HOST)} to load:"
            " convert it here with --until shard, and run it elsewhere"
        )
    if disk < FULL_SIZE_DISK:
        lines.append(
            f"{size(disk)} of disk are free here; converting an 80B model takes"
            f" {size(FULL_SIZE_DISK)} beside the source: put output.path on a larger disk"
        )
    if not can_draw():
        lines.append(MISSING)
    return lines


def _no_gpu() -> str:
    if torch.version.cuda is None:
        return (
            "no GPU can be used: this torch is built for CPUs only; where there is a GPU,"
            " install torch's CUDA build"
        )
    return "no GPU was found: see that nvidia-smi lists it and that its driver is new enough"


def _expert_kernel() -> str:
    found = find()
    return f"torch's products; no native kernel: {found}" if isinstance(found, str) else found.name


def _int4_works() -> bool:
    """Run torch's int4 product once; it exists only in builds and on CPUs that support it."""
    codes = torch.full((32, 64), 8, dtype=torch.int32)
    scales = torch.ones(2, 32, 2, dtype=torch.bfloat16)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        torch.ops.aten._weight_int4pack_mm_for_cpu(
            torch.ones(1, 64, dtype=torch.bfloat16), packed, 32, scales
        )
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True
