"""The hybrid model is the model its directory stands for.

In float32 it must agree with the dequantised model to rounding.  In bfloat16 its logits may be off
by at most 1.5 times what bfloat16 costs the dequantised model itself, and the likeliest token must
be the same wherever float32 prefers it by more than that noise.
"""

import itertools

import pytest
import torch
from hybrid_models import (
    EVERYTHING,
    EXPERTS_ONLY,
    MODELS,
    dequantised,
    dequantised_state,
    plain_model,
    write_output,
)
from transformers import AutoTokenizer

from pipeline import hybrid
from pipeline.quantize.tensor import AffineScheme

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINED = MODELS / "qwen3-next-tiny-nf4"
TEXT = MODELS.parents[1] / "calibration" / "docs-eval.txt"
SCHEMES = [
    AffineScheme(bits, group, symmetric)
    for bits, group, symmetric in itertools.product((4, 8), (32, 64, 128, -1), (True, False))
]


@pytest.fixture(scope="module")
def token_ids():
    """Passages of held-out text, [24, 192], other ones every time.

    So many because the errors are heavy-tailed: one token that bf16 routes to another expert weighs
    as much as a thousand others, and a quarter of the passages gave ratios from 0.8 to 1.5.
    """
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    text = TEXT.read_text(encoding="utf-8")
    start = int(torch.randint(len(text) - 60_000, ()))
    tokens = torch.tensor(tokenizer(text[start : start + 60_000]).input_ids)
    starts = torch.randint(tokens.numel() - 192, (24,)).tolist()
    return torch.stack([tokens[s : s + 192] for s in starts])


def _error(got, want):
    return ((got.float() - want).norm() / want.norm()).item()


def _without_the_worst(results, exact):
    """The passages, [24] bool, less the one in which each result strays furthest from `exact`.

    One token that bf16 sends to another expert can stray by more than nearly every margin; as the
    noise of all it would leave next to nothing to compare.
    """
    calm = torch.ones(len(exact), dtype=torch.bool)
    for result in results:
        calm[(result.float() - exact).abs().amax(dim=(1, 2)).argmax()] = False
    return calm


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_trained_model_in_bfloat16(scheme, token_ids, tmp_path):
    # two of the groups quantise attention, DeltaNet and the shared expert as well
    also = EVERYTHING if scheme.group_size in (64, -1) else EXPERTS_ONLY
    out = write_output(TRAINED, tmp_path, scheme, also)
    state = dequantised_state(out)
    with torch.inference_mode():
        exact = plain_model(out, state, torch.float32)(token_ids).logits
        rounded = plain_model(out, state, torch.bfloat16)(token_ids).logits
        got = hybrid.load(out, device="cpu")(token_ids).logits
    ratio = _error(got, exact) / _error(rounded, exact)
    assert ratio < 1.5, f"{_error(got, exact):.5f} against {_error(rounded, exact):.5f}"
    calm = _without_the_worst((rounded, got), exact)
    got, rounded, exact = got[calm], rounded[calm], exact[calm]
    first, second = exact.topk(2, dim=-1).values.unbind(-1)
    noise = (rounded.float() - exact).abs().amax()
    sure = first - second > noise
    assert int(sure.sum()) > 64  # else this would say nothing
    assert torch.equal(got.argmax(-1)[sure], exact.argmax(-1)[sure])
    print(f"ratio {ratio:.3f}, {sure.float().mean():.2f} of positions sure")


@pytest.mark.parametrize(
    "scheme",
    [
        AffineScheme(4, 32, True),
        AffineScheme(4, -1, False),
        AffineScheme(8, 64, False),
        AffineScheme(2, 16, False),  # a group that the fast kernel lacks
    ],
    ids=str,
)
def test_micro_model_in_float32(scheme, tmp_path):
    out = write_output(MODELS / "micro-nf4", tmp_path, scheme, EVERYTHING)
    ids = torch.randint(5, 512, (3, 33))
    with torch.inference_mode():
        want = dequantised(out, torch.float32)(ids).logits
        got = hybrid.load(out, dtype=torch.float32, device="cpu")(ids).logits
    assert _error(got, want) < 1e-4
