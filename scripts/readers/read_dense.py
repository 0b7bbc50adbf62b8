"""Step: the yardstick. Plain transformers, every weight dense, in float32 and in bfloat16.

Experts run one after another ("eager"), as the readers' unfused blocks do it: the order in which a
token's experts are added up is then the same, and so is the rounding of the sum.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import transformers
from findings import TOKENS, arguments, logits
from packed_gptq import PackedGptq
from transformers import AutoConfig, AutoTokenizer

PATH, WORK, _ = arguments()
stored = PackedGptq(PATH)
asked = json.loads((WORK / "text.json").read_text())
tokens = AutoTokenizer.from_pretrained(PATH)(asked["text"])["input_ids"][: asked["tokens"]]
(WORK / TOKENS).write_text(json.dumps(tokens))
config = AutoConfig.from_pretrained(PATH)
del config.quantization_config
model_class = getattr(transformers, stored.config["architectures"][0])
for dtype in (torch.float32, torch.bfloat16):
    model, loading = model_class.from_pretrained(
        None,
        config=config,
        state_dict=stored.state_dict(),
        dtype=dtype,
        experts_implementation="eager",
        output_loading_info=True,
    )
    absent = sorted({*loading["missing_keys"], *loading["mismatched_keys"]})
    if absent:
        raise SystemExit(f"the directory does not hold {', '.join(absent[:5])}")
    np.save(WORK / f"dense-{str(dtype).removeprefix('torch.')}.npy", logits(model.eval(), WORK))
