import time

import pytest
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from pipeline.evaluate.speed import measure, peak_device_bytes, peak_host_bytes, timed

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = Qwen3NextConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    eos_token_id=list(range(63)),  # all but one would end generation, were it not held open
    pad_token_id=0,
)


def test_decoding_and_prefill_are_measured():
    model = Qwen3NextForCausalLM(CONFIG).eval()
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    started = time.perf_counter()
    speed = measure(model, torch.randint(64, (24,)), decode_tokens=6, warmup_tokens=2, repeats=1)
    elapsed = time.perf_counter() - started
    assert seen.count((1, 24)) == 3  # warm-up, prefill, the prompt of one generation
    assert seen.count((1, 1)) == 1 + 2 + 6 - 1
    assert speed.decode_tokens == 6 and speed.prefill_tokens == 24
    assert speed.decode_tokens_per_second > 6 / elapsed
    assert speed.prefill_tokens_per_second > 24 / elapsed
    assert speed.peak_host_bytes > 50 * 2**20
    if not torch.cuda.is_available():
        assert speed.peak_device_bytes == 0


def test_peaks_do_not_fall():
    before = peak_host_bytes()
    assert peak_host_bytes() >= before > 50 * 2**20
    assert peak_device_bytes() >= 0


def test_timed():
    result, seconds = timed(lambda: time.sleep(0.05) or "loaded")
    assert result == "loaded" and 0.05 <= seconds < 5
