import pytest
import torch
from test_backends import CPU, random_quantized

from pipeline.hybrid.backends import choose
from pipeline.hybrid.modules import HybridExperts, QuantizedLinear

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, INNER, EXPERTS = 64, 32, 6


def _experts(dtype):
    gate_up = random_quantized(EXPERTS, 2 * INNER, HIDDEN, bits=4, group=32, symmetric=True)
    down = random_quantized(EXPERTS, HIDDEN, INNER, bits=4, group=32, symmetric=True)
    packed = [choose(q.scheme, *q.shape[1:], CPU).pack(q, dtype) for q in (gate_up, down)]
    module = HybridExperts(*packed, EXPERTS, torch.nn.functional.silu)
    return module, gate_up.dequantize().double(), down.dequantize().double()


def _plain(x, index, weights, gate_up, down):
    """Token by token, expert by expert, float64."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for token in range(x.shape[0]):
        for slot in range(index.shape[1]):
            expert = index[token, slot]
            gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            out[token] += (down[expert] @ inner) * weights[token, slot].double()
    return out


@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_experts_against_plain_loops(tokens, dtype, bound):
    module, gate_up, down = _experts(dtype)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    index = torch.stack([torch.randperm(EXPERTS)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3).to(dtype)
    got = module(x, index, weights)
    want = _plain(x, index, weights, gate_up, down)
    assert got.dtype == dtype and got.shape == x.shape
    assert (got.double() - want).norm() < bound * want.norm()


def test_one_expert_for_all_tokens():
    module, gate_up, down = _experts(torch.float32)
    x = torch.randn(9, HIDDEN)
    index = torch.full((9, 1), EXPERTS - 1)
    want = _plain(x, index, torch.ones(9, 1), gate_up, down)
    assert torch.allclose(module(x, index, torch.ones(9, 1)).double(), want, atol=1e-4)


def test_experts_are_neither_moved_nor_cast():
    module, *_ = _experts(torch.bfloat16)
    x, index = torch.randn(3, HIDDEN).bfloat16(), torch.randint(EXPERTS, (3, 2))
    weights = torch.rand(3, 2).bfloat16()
    before = module(x, index, weights)
    module.to(torch.float32).to("meta")
    assert torch.equal(module(x, index, weights), before)
    assert not list(module.state_dict()) and module.nbytes > 0


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_keeps_leading_dimensions(with_bias):
    quantized = random_quantized(1, 48, HIDDEN, bits=8, group=64, symmetric=False)
    matrix = choose(quantized.scheme, 48, HIDDEN, CPU).pack(quantized, torch.float32)
    bias = torch.randn(48) if with_bias else None
    linear = QuantizedLinear(matrix, 48, HIDDEN, bias)
    x = torch.randn(2, 5, HIDDEN)
    want = torch.nn.functional.linear(x, quantized.dequantize()[0], bias)
    assert torch.allclose(linear(x), want, atol=1e-5)
    assert torch.allclose(linear(x.transpose(0, 1)), want.transpose(0, 1), atol=1e-5)
