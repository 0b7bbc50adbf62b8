"""The whole way on the trained model: the result keeps the quality of its source, GPTQ beats
rounding, and the hybrid model is the one that its directory stands for."""

from pathlib import Path

import pytest
import torch
from hybrid_models import MODELS, dequantised_state, plain_model

from pipeline import hybrid
from pipeline.evaluate.metrics import compare, paired_bootstrap
from pipeline.evaluate.reference import Reference
from pipeline.recipe import parse_recipe
from pipeline.run import run

TEXTS = MODELS.parents[1] / "calibration"


def _convert(method: str, folder: Path) -> Path:
    out = folder / method
    recipe = {
        "source": {"model": str(MODELS / "qwen3-next-tiny-nf4")},
        "output": {"path": str(out)},
        "requantize": {"method": method, "group_size": 128},
        "calibration": {
            "sources": [str(TEXTS / "docs-calib.txt")],
            "samples": 48,
            "sequence_length": 256,
        },
        "validate": {
            "text": str(TEXTS / "docs-eval.txt"),
            "window": 256,
            "stride": 128,
            "max_windows": 40,
        },
        "limits": {"threads": 1},
    }
    run(parse_recipe(recipe, method), "", until="shard", quiet=True)
    return out


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Output directories by method."""
    folder = tmp_path_factory.mktemp("converted")
    return {method: _convert(method, folder) for method in ("gptq", "rtn")}


@pytest.fixture(scope="module")
def comparisons(converted):
    """Both results against the record of their common source."""
    reference = Reference.load(converted["gptq"] / "validation_reference.safetensors")
    return {m: compare(hybrid.load(p, device="cpu"), reference, 8) for m, p in converted.items()}


@pytest.mark.usefixtures("one_thread", "cpu_only")
def test_quality_is_kept_and_gptq_beats_rounding(comparisons):
    gptq, rounding = comparisons["gptq"], comparisons["rtn"]
    assert gptq.perplexity_ratio < 1.015
    assert gptq.top1_agreement > 0.95
    won = paired_bootstrap(rounding.windows.kl, gptq.windows.kl, gptq.windows.count)
    assert won.low > 0, won
    assert won.estimate > 0.1 * rounding.kl_divergence


@pytest.mark.usefixtures("one_thread", "cpu_only")
def test_hybrid_is_the_dequantised_model(converted):
    out = converted["gptq"]
    ids = Reference.load(out / "validation_reference.safetensors").windows.token_ids[:12, :128]
    state = dequantised_state(out)
    with torch.inference_mode():
        exact = plain_model(out, state, torch.float32)(ids).logits
        rounded = plain_model(out, state, torch.bfloat16)(ids).logits
        got = hybrid.load(out, device="cpu")(ids).logits
    cost = (rounded.float() - exact).norm()
    assert (got.float() - exact).norm() < 1.5 * cost
    first, second = exact.topk(2, dim=-1).values.unbind(-1)
    sure = first - second > (rounded.float() - exact).abs().amax()
    assert sure.float().mean() > 0.1
    assert torch.equal(got.argmax(-1)[sure], exact.argmax(-1)[sure])
