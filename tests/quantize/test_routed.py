"""Grouped products and ordered sums against one pair after another."""

import pytest
import torch

from pipeline.quantize.correction import routed_drift
from pipeline.quantize.routed import Turns, grouped_product, token_sums

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


def _offsets(counts):
    return [0, *torch.tensor(counts).cumsum(0).tolist()]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_grouped_product(device):
    offsets = _offsets([5, 0, 17, 1, 0])
    x = torch.randn(23, 48, device=device).bfloat16()
    weight = torch.randn(5, 32, 48, device=device).bfloat16()
    found = grouped_product(x, weight, offsets)
    for e in range(5):
        rows = slice(offsets[e], offsets[e + 1])
        expected = x[rows].float() @ weight[e].float().T
        torch.testing.assert_close(found[rows].float(), expected, rtol=0.01, atol=0.1)
    later = grouped_product(x[5:], weight, [5, *(max(o, 5) for o in offsets[1:])])
    assert torch.equal(later, found[5:])
    assert grouped_product(x[:0], weight, [0] * 6).shape == (0, 32)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_sums_have_the_order_of_the_pairs(device, chunk):
    tokens = torch.randint(0, 20, (150,), device=device)
    values = torch.randn(150, 6, device=device).bfloat16()
    weights = torch.rand(150, device=device)
    sums = token_sums(tokens, chunk)
    found = torch.zeros(len(sums.rows), 6, device=device)
    for number, start in enumerate(range(0, 150, chunk)):
        part = slice(start, start + chunk)
        sums.add(found, number, start, values[part], weights[part])
    expected = torch.zeros(20, 6, device=device)
    for pair, token in enumerate(tokens.tolist()):
        expected[token] += values[pair].float() * weights[pair]
    assert torch.equal(sums.rows, tokens.unique())
    assert torch.equal(found, expected[sums.rows])


def test_no_pairs():
    turns = Turns.of(torch.zeros(0, dtype=torch.int64), 8)
    assert turns.counts == ()
    assert len(turns.rows) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_drift_on_a_gpu(dtype):
    offsets = _offsets([0, 300, 1, 77])
    x = torch.randn(378, 200).to(dtype)
    target = (x + 0.03 * torch.randn(378, 200)).to(dtype)
    for weights in (None, torch.rand(378)):
        expected = routed_drift(target, x, offsets, weights)
        moved = None if weights is None else weights.cuda()
        found = routed_drift(target.cuda(), x.cuda(), offsets, moved).cpu()
        # Differences that are no bfloat16 numbers, as all weighted ones, are rounded to it.
        bound = 2**-9 if dtype == torch.bfloat16 else 1e-5
        assert float((found - expected).norm() / expected.norm()) < bound
    assert float(routed_drift(x.cuda(), x.cuda(), offsets).abs().max()) == 0
