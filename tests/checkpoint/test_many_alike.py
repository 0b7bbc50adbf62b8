"""What is judged for thousands of matrices at once is judged as for each by itself."""

from __future__ import annotations

import random

import pytest
import torch

from pipeline.checkpoint.finite import sound_scales
from pipeline.checkpoint.gptq_settings import settings_of, settings_of_each

RULES = (
    r"-:.*mlp\.gate$",
    r"-:.*self_attn\..*",
    r"+:.*\.experts\..*\.up_proj$",
    r".*layers\.1\..*",
    r"-:.*experts\.[12]\..*",
    r"-:.*1.*",
    r"-:model\..*proj",
    r"-:.*experts\...\.up_proj",
)
LEFT_DENSE = ("self_attn.q_proj", "lm_head", "experts.2.up_proj", "conv1d", "17")
MODULES = [
    f"model.layers.{layer}.{rest}"
    for layer in (0, 1, 10, 21)
    for rest in (
        "mlp.gate",
        "self_attn.q_proj",
        "linear_attn.conv1d",
        *(f"mlp.experts.{e}.{p}" for e in (0, 1, 2, 12, 17, 100) for p in ("up_proj", "17")),
    )
]


def test_rules_are_asked_once_only_where_they_cannot_tell_modules_apart() -> None:
    rng = random.Random(3)
    for _ in range(60):
        config = {
            "bits": 4,
            "dynamic": {rule: {"bits": 8} for rule in rng.sample(RULES, rng.randrange(4))},
            "modules_to_not_convert": rng.sample(LEFT_DENSE, rng.randrange(3)),
        }
        each = [settings_of(module, config) for module in MODULES]
        assert settings_of_each(MODULES, config) == each


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_sound_together_where_each_is(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    for odd in (1.0, -1.0, 0.0, -0.0, float("nan"), float("inf"), -float("inf"), 6e-8):
        for turned in (False, True):
            scales = torch.rand(5, 3, 4, generator=generator).add(0.1).to(dtype)
            scales[2, 1, 3] = odd
            symmetric = torch.zeros(5, 3, 4, dtype=torch.bool)
            symmetric[2] = turned
            value = float(scales[2, 1, 3])
            fine = abs(value) < float("inf") and (value > 0 or (value < 0 and turned))
            assert sound_scales(scales, symmetric) == [True, True, fine, True, True]
            everywhere = torch.ones(1, dtype=torch.bool)
            fine = 0 < abs(value) < float("inf")
            assert sound_scales(scales, everywhere) == [True, True, fine, True, True]
