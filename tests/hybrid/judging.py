"""What holds of a hybrid model's logits, whatever its format and wherever its experts are."""

import random

import torch
from hybrid_models import MODELS
from transformers import AutoTokenizer

from pipeline.quantize.tensor import AffineScheme

TRAINED = MODELS / "qwen3-next-tiny-nf4"
TEXT = MODELS.parents[1] / "calibration" / "docs-eval.txt"
FORMATS = [
    *(
        ("gptq", AffineScheme(b, g, s))
        for b in (4, 8)
        for g in (32, 64, 128)
        for s in (True, False)
    ),
    *(("awq", AffineScheme(4, g, False)) for g in (32, 64, 128)),
]
"""All that our own recipes and the models of others that `requant shard` takes can be."""
PLACEMENTS = ["resident", "zero-copy", "cpu", "random"]


def passages(count, length):
    """Passages of held-out text, int64 [count, length], other ones every time."""
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    text = TEXT.read_text(encoding="utf-8")
    start = random.randrange(len(text) - 60_000)
    tokens = torch.tensor(tokenizer(text[start : start + 60_000]).input_ids)
    starts = torch.randint(tokens.numel() - length, (count,)).tolist()
    return torch.stack([tokens[s : s + length] for s in starts])


def error(got, want):
    """Relative, over all logits."""
    return ((got.float() - want).norm() / want.norm()).item()


def surprise(logits, ids):
    """Of the passages' own next tokens, in nats, one for each."""
    flat = logits[:, :-1].float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten(), reduction="none")


def without_the_worst(results, exact):
    """The passages, bool, less the two in which each result strays furthest from `exact`.

    One token that bf16 sends to another expert can stray by more than nearly every margin; as the
    noise of all it would leave next to nothing to compare, and where only one result has such a
    token, they differ without either being wrong.  Two, as two passages at times have one.
    """
    calm = torch.ones(len(exact), dtype=torch.bool)
    for result in results:
        strays = (result.float() - exact).abs().amax(dim=(1, 2))
        calm[strays.topk(2).indices] = False
    return calm


def judge(got, rounded, exact, ids):
    """got: of the hybrid model; rounded, exact: of the dequantised one in bf16 and float32.

    The error is at most 1.5 times what bf16 costs the dequantised model, perplexity is within
    0.2 % as far as so little text can tell (4 standard errors), and the likeliest token is the same
    wherever float32 prefers it by more than 1.5 times that noise.
    """
    ratio = error(got, exact) / error(rounded, exact)
    assert ratio < 1.5, f"{error(got, exact):.5f} against {error(rounded, exact):.5f}"
    more = surprise(got, ids) - surprise(exact, ids)
    change, error_bar = more.mean().item(), 4 * more.std().item() / more.numel() ** 0.5
    assert abs(change) < 0.002 + error_bar, (change, error_bar)
    calm = without_the_worst((rounded, got), exact)
    got, rounded, exact = got[calm], rounded[calm], exact[calm]
    first, second = exact.topk(2, dim=-1).values.unbind(-1)
    noise = 1.5 * (rounded.float() - exact).abs().amax()
    sure = first - second > noise
    assert int(sure.sum()) > 64  # else this would say nothing
    assert torch.equal(got.argmax(-1)[sure], exact.argmax(-1)[sure])
    told = f"ratio {ratio:.3f}, perplexity {change:+.5f} (4 sigma {error_bar:.5f})"
    print(told, f"{sure.float().mean():.2f} of positions sure")
