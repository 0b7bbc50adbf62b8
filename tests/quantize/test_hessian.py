from itertools import pairwise

import pytest
import torch
from problems import fresh, inputs

import pipeline.quantize.hessian as hessian_module
from pipeline.quantize.hessian import (
    PRIOR,
    add_moment,
    effective_rank,
    rounded_out,
    routed_hessians,
    router_emphasis,
    shrink,
)

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = (0, 5, 300, 1, 700, 0, 64, 256, 257, 0, 30)


def routed(columns, dtype=torch.float32):
    x = inputs(fresh(), 1, sum(COUNTS), columns)[0].to(dtype)
    offsets = torch.tensor([0, *COUNTS]).cumsum(0)
    return x, offsets


def expected(x, offsets, weights=None):
    weights = torch.ones(len(x)) if weights is None else weights
    rows = [slice(a, b) for a, b in pairwise(offsets.tolist())]
    return torch.stack([x[r].double().T @ (weights[r, None] * x[r].double()) for r in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_each_experts_tokens(dtype):
    x, offsets = routed(96, dtype)
    sums = routed_hessians(x, offsets)
    assert sums.dtype == torch.float32
    assert torch.allclose(sums.double(), expected(x, offsets), rtol=1e-5, atol=1e-4)
    assert bool((sums[0] == 0).all())


def test_batches_of_tokens_and_weights_add_up():
    x, offsets = routed(48)
    weights = torch.rand(len(x), generator=fresh()) + 0.1
    total = torch.zeros((len(COUNTS), 48, 48))
    for _ in range(2):
        assert routed_hessians(x, offsets, weights=weights, out=total) is total
    right = 2 * expected(x, offsets, weights)
    assert torch.allclose(total.double(), right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_moments_add_up_in_full_float32_whatever_is_switched_on(device):
    """Only a GPU, or a CPU whose products have a bfloat16 mode, would be off by more."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = inputs(fresh(), 1, 384, 64)[0].view(3, 128, 64).to(device)
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision
    try:
        cuda.fp32_precision, cpu.fp32_precision = "tf32", "bf16"
        first = add_moment(None, x)
        total = add_moment(first, x)
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before
    assert total is first
    right = 2 * torch.einsum("sti,stj->ij", x.double(), x.double())
    assert float((total.double() - right).norm() / right.norm()) < 1e-6


def test_an_expert_does_not_depend_on_its_neighbours():
    x, offsets = routed(80, torch.bfloat16)
    whole = routed_hessians(x, offsets)
    for first, last in ((0, 1), (2, 3), (4, 11), (1, 8)):
        part = routed_hessians(x, offsets[first : last + 1])
        assert torch.equal(part, whole[first:last])


def test_tile_constants_are_whole_numbers_for_the_fingerprint():
    assert hessian_module.HESSIAN_TOKENS > 0
    assert hessian_module.HESSIAN_EXPERTS > 0


def test_shrink_draws_starved_experts_to_the_common_mean():
    x, offsets = routed(32)
    sums, counts = routed_hessians(x, offsets), offsets.diff()
    common = x.T @ x / len(x)
    mean = shrink(sums, counts, common, strength=64.0)
    assert torch.allclose(mean[0], common)
    assert torch.allclose(mean[6], (sums[6] / 64 + common) / 2, rtol=1e-5)  # 64 tokens: half own
    assert torch.allclose(mean[4], (sums[4] + 64 * common) / 764, rtol=1e-5)
    assert int(torch.linalg.cholesky_ex(mean).info.max()) == 0
    own = common.expand(len(COUNTS), -1, -1) * torch.arange(1, 12).view(-1, 1, 1)
    assert torch.allclose(shrink(sums, counts, own, strength=64.0)[5], 6 * common)


def test_shrink_needs_something_for_an_expert_without_tokens():
    x, offsets = routed(16)
    with pytest.raises(ValueError, match="strength"):
        shrink(routed_hessians(x, offsets), offsets.diff(), torch.eye(16), strength=0.0)


def test_effective_rank_is_the_participation_ratio_of_the_eigenvalues():
    x, offsets = routed(40)
    sums = routed_hessians(x, offsets)
    values = torch.linalg.eigvalsh(sums.double()).clamp_min(0)
    expected = values.sum(1).square() / values.square().sum(1)
    found = effective_rank(sums)
    seen = torch.tensor(COUNTS) > 0
    assert torch.allclose(found[seen].double(), expected[seen], rtol=1e-4)
    assert found[~seen].tolist() == [0.0] * int((~seen).sum())
    assert torch.allclose(effective_rank(1e-6 * sums), found, rtol=1e-4)
    assert torch.allclose(effective_rank(torch.eye(7).expand(2, 7, 7)), torch.tensor(7.0))
    assert 0.99 < float(found[3]) < 1.01  # one token, one direction


def test_router_emphasis_is_the_squared_weight_with_mean_one():
    _, offsets = routed(8)
    weights = torch.rand(int(offsets[-1]), generator=fresh()) + 0.01
    found = router_emphasis(weights, offsets)
    for start, stop in pairwise(offsets.tolist()):
        squares = weights[start:stop].double().square()
        assert torch.allclose(found[start:stop].double(), squares / squares.mean(), rtol=1e-4)
    equal = router_emphasis(torch.full((int(offsets[-1]),), 0.3), offsets)
    assert torch.allclose(equal, torch.ones(len(equal)))


def test_few_tokens_are_drawn_towards_equal_moments():
    x = inputs(fresh(), 1, 20, 48)[0]
    mean = x.T @ x / 20
    prior = PRIOR * 48
    level = mean.trace().double() / 48
    expected = (20 * mean.double() + prior * level * torch.eye(48)) / (20 + prior)
    found = rounded_out(mean, 20)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.allclose(found.trace(), mean.trace(), rtol=1e-5)  # the level is kept
    assert torch.allclose(rounded_out(mean, 10**9), mean, rtol=1e-4, atol=1e-5)
    assert torch.equal(rounded_out(torch.stack([mean, 0 * mean]), 20)[1], torch.zeros(48, 48))
