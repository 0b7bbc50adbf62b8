"""Run by test_spread.py in a process of its own, under Triton's interpreter.

DeltaNet over prompts, in one piece and in several, padded or not, against transformers' module.
"""

import logging
import sys

import torch
from hybrid_models import MODELS
from transformers import DynamicCache

from pipeline.checkpoint import Checkpoint
from pipeline.hybrid import delta_prefill
from pipeline.models.skeleton import build_skeleton, model_config


def module():
    """The micro model's DeltaNet with random weights, and its config."""
    config = model_config(Checkpoint.open(MODELS / "micro-nf4").config)
    own = build_skeleton(config, torch.float32).model.layers[0].linear_attn.to_empty(device="cpu")
    for name, parameter in own.named_parameters():
        parameter.data = torch.randn_like(parameter) * (1 if parameter.ndim == 1 else 0.1)
        if name == "A_log":
            parameter.data = torch.rand_like(parameter)
    return own.eval(), config


def prompts(_folder: str) -> None:
    own, config = module()
    for lengths, padded in (((150,), False), ((70, 3, 64), False), ((9,), True)):
        caches = [DynamicCache(config=config) for _ in range(2)]
        for length in lengths:
            hidden = torch.randn(2, length, config.hidden_size)
            mask = torch.ones(2, length, dtype=torch.int64) if padded else None
            if mask is not None:
                mask[1, : length // 2] = 0
            with torch.inference_mode():
                want = own(hidden_states=hidden, cache_params=caches[0], attention_mask=mask)
                delta_prefill.install(own)
                got = own(hidden_states=hidden, cache_params=caches[1], attention_mask=mask)
                del own.forward
            error = ((got - want).norm() / want.norm()).item()
            assert error < 1e-5, (lengths, length, error)
            for a, b in zip(
                (caches[0].layers[0].conv_states[0], caches[0].layers[0].recurrent_states[0]),
                (caches[1].layers[0].conv_states[0], caches[1].layers[0].recurrent_states[0]),
                strict=True,
            ):
                assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
            print(length, f"{error:.1e}")


if __name__ == "__main__":
    logging.disable()
    torch.set_num_threads(1)
    {"prompts": prompts}[sys.argv[1]](sys.argv[2])
