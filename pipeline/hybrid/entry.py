"""Other ways in: the call that people know from transformers, and models loaded before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.hybrid.loader import load

Memory = str | int

HOOKED = ("forward", "_prepare_cache_for_generation")
"""Methods that decoding on a GPU puts in the place of the class's (`generation.py`)."""


def from_pretrained(
    path: Path | str,
    *,
    device_map: str | int | torch.device = "auto",
    max_memory: Mapping[int | str, Memory] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    placement: str = "auto",
    follow_use: bool = True,
    native: bool = True,
) -> PreTrainedModel:
    """`load` in transformers' words.

    device_map: "auto", or one device for all but the experts; a map of modules is refused.
    max_memory: {0: "10GiB", "cpu": "60GiB"}, bytes or sizes, of that GPU and of host memory.
    Raises what `load` raises.
    """
    if isinstance(device_map, Mapping):
        raise UserError('device_map: modules are placed by the runtime; say "auto" or one device')
    limits = dict(max_memory or {})
    host = limits.pop("cpu", None)
    if len(limits) > 1:
        raise UserError(f"max_memory names {len(limits)} GPUs, the hybrid runtime uses one")
    number = next(iter(limits), None)
    if isinstance(number, str):
        raise UserError(f'max_memory: "{number}" is neither a GPU\'s number nor "cpu"')
    device: Any = None if device_map == "auto" else device_map
    if device is None and number is not None and torch.cuda.is_available():
        device = f"cuda:{number}"
    if isinstance(device, int):
        device = f"cuda:{device}"
    return load(
        path,
        device_memory=None if number is None else limits[number],
        host_memory=host,
        device=device,
        dtype=dtype,
        placement=placement,
        follow_use=follow_use,
        native=native,
    )


def place(
    model: PreTrainedModel,
    *,
    device_memory: Memory | None = None,
    device: torch.device | str | None = None,
    placement: str = "auto",
    follow_use: bool = True,
    native: bool = True,
) -> PreTrainedModel:
    """Turn a model that was loaded from one of our directories, dense or hybrid, into a hybrid one
    of this placement, in place; returns it.

    Weights are read anew from `model.name_or_path`, so changes made to them since are lost, and
    until this returns both are in memory.  On an error the model is as it was.
    Raises UserError when that is no directory, and what `load` raises.
    """
    path = Path(model.name_or_path or "?")
    if not (path / "config.json").is_file():
        raise UserError(f"place: the model's name_or_path, {path}, is not a model directory")
    dtype = torch.float32 if model.dtype == torch.float32 else torch.bfloat16
    new = load(
        path,
        device_memory=device_memory,
        device=device,
        dtype=dtype,
        placement=placement,
        follow_use=follow_use,
        native=native,
    )
    if type(new) is not type(model):
        raise UserError(f"place: {path} holds a {type(new).__name__}, not {type(model).__name__}")
    for name, child in new.named_children():
        setattr(model, name, child)
    model.tie_weights()
    for name in ("hybrid_quantization", "hybrid_placement", "save_pretrained"):
        setattr(model, name, getattr(new, name))
    for name in HOOKED:  # bound to `new`, whose parts are this model's
        vars(model).pop(name, None)
        if name in vars(new):
            setattr(model, name, vars(new)[name])
    return model.eval()
