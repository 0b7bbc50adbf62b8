"""Step: transformers opens the directory through optimum and GPTQModel, on the CPU.

In bfloat16, and once more in float32: optimum leaves the scales as they are stored and GPTQModel's
plain kernel computes in the type of its input, so this road shows the weights without the noise.
(Other kernels round inside; GPTQModel's own loader refuses float32 for the plain one.)
"""

from __future__ import annotations

import time

import defuser
import numpy as np
import torch
from findings import arguments, logits, report_reader
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from packed_gptq import PackedGptq
from transformers import AutoModelForCausalLM, GPTQConfig, PreTrainedModel

PATH, WORK, NAME_OF_BACKEND = arguments()
stored = PackedGptq(PATH)
# Before the model is built: experts become one nn.Linear each, under the names they have on disk.
# Without this line transformers has one stacked tensor for all experts and fills it at random.
defuser.replace_fused_blocks(stored.config["model_type"])


def load(dtype: torch.dtype) -> PreTrainedModel:
    """The model as a user would open it; only the kernel is not left to config.json."""
    asked = GPTQConfig(bits=stored.quantization["bits"], backend=NAME_OF_BACKEND)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        PATH, dtype=dtype, device_map="cpu", quantization_config=asked
    )
    return model.eval()


started = time.perf_counter()
model = load(torch.bfloat16)
seconds = time.perf_counter() - started
packed = {n: m for n, m in model.named_modules() if isinstance(m, BaseQuantLinear)}
report_reader("transformers", model, packed, seconds)
if NAME_OF_BACKEND == "gptq_torch":
    np.save(WORK / "transformers-float32.npy", logits(load(torch.float32), WORK))
