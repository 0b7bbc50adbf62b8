"""Step: GPTQModel opens the directory on the CPU in bfloat16."""

from __future__ import annotations

import time

import torch
from findings import arguments, report_reader
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear

PATH, _, NAME_OF_BACKEND = arguments()
started = time.perf_counter()
model = GPTQModel.load(
    str(PATH), backend=BACKEND(NAME_OF_BACKEND), device="cpu", dtype=torch.bfloat16
).model
seconds = time.perf_counter() - started
packed = {n: m for n, m in model.named_modules() if isinstance(m, BaseQuantLinear)}
report_reader("gptqmodel", model, packed, seconds)
