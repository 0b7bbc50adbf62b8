"""Step: transformers opens the directory through optimum and GPTQModel, in bfloat16 on the CPU."""

from __future__ import annotations

import time

import defuser
import torch
from findings import arguments, report_reader
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from packed_gptq import PackedGptq
from transformers import AutoModelForCausalLM, GPTQConfig

PATH, _, NAME_OF_BACKEND = arguments()
stored = PackedGptq(PATH)
# Before the model is built: experts become one nn.Linear each, under the names they have on disk.
# Without this line transformers has one stacked tensor for all experts and fills it at random.
defuser.replace_fused_blocks(stored.config["model_type"])
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(
    PATH,
    dtype=torch.bfloat16,
    device_map="cpu",
    # Only the kernel is taken from here; everything else comes from config.json.
    quantization_config=GPTQConfig(bits=stored.quantization["bits"], backend=NAME_OF_BACKEND),
).eval()
seconds = time.perf_counter() - started
packed = {n: m for n, m in model.named_modules() if isinstance(m, BaseQuantLinear)}
report_reader("transformers", model, packed, seconds)
