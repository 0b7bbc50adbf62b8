"""The compiled kernel for linear layers on the CPU against float64, in all its variants."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

from pipeline.hybrid.native import dense, library

FOUND = library.find()

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(isinstance(FOUND, str), reason=f"no native kernel: {FOUND}"),
]

# rows, columns: whole vectors, parts of one, odd numbers of both, several threads' turns
SHAPES = [(1, 1), (3, 7), (2, 8), (5, 15), (64, 64), (33, 65), (17, 271), (129, 1031), (400, 512)]


def _random(tokens, rows, columns):
    """Inputs and a weight with means, so that sums do not cancel."""
    x, weight = torch.randn(tokens, columns) + 0.3, torch.randn(rows, columns) + 0.2
    return x.bfloat16(), weight.bfloat16()


def _variants():
    return [dataclasses.replace(FOUND, kind=kind) for kind in range(FOUND.kind + 1)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_every_variant(rows, columns):
    for kernel in _variants():
        for tokens in (1, 2, 3, 4, 7):
            x, weight = _random(tokens, rows, columns)
            got = dense.multiply(x, weight, kernel)
            want = x.double() @ weight.double().t()
            most = x.double().abs() @ weight.double().abs().t()
            assert got.dtype == torch.bfloat16 and got.shape == want.shape
            # half a step of bfloat16, and float32's own error of sums
            assert ((got.double() - want).abs() <= want.abs() * 2**-8 + most * 1e-5).all()


def test_threads_and_company_change_no_bit(monkeypatch):
    x, weight = _random(7, 600, 515)
    for kernel in _variants():
        monkeypatch.setattr(dense, "threads", lambda: 1)
        alone = dense.multiply(x, weight, kernel)
        for count in (2, 3, 7, 40):
            monkeypatch.setattr(dense, "threads", lambda count=count: count)
            for _ in range(5):
                assert torch.equal(dense.multiply(x, weight, kernel), alone)
        for first, last in ((0, 1), (1, 3), (2, 7)):
            assert torch.equal(dense.multiply(x[first:last], weight, kernel), alone[first:last])


def test_extreme_numbers():
    """Ties go to even, what overflows and what is not finite shows, as in torch's own rounding."""
    sums = [[1, 2**-8], [1, 3 * 2**-7], [3.3895e38, 1e36], [-1e-40, 0], [0, 0]]
    x = torch.tensor(sums).bfloat16()
    for kernel in _variants():
        got = dense.multiply(x, torch.ones(3, 2).bfloat16(), kernel)
        assert torch.equal(got, x.float().sum(1, keepdim=True).bfloat16().expand(5, 3))
        wrong = torch.tensor([[float("nan"), 1], [float("inf"), 1], [float("inf"), float("-inf")]])
        got = dense.multiply(wrong.bfloat16(), torch.ones(1, 2).bfloat16(), kernel)
        assert got[0].isnan() and got[1] == float("inf") and got[2].isnan()


def test_any_memory_will_do():
    """Weights that begin at an odd element, and inputs with strides."""
    x, weight = _random(3, 20, 96)
    moved = torch.empty(20 * 96 + 1, dtype=torch.bfloat16)[1:].view(20, 96).copy_(weight)
    want = dense.multiply(x, weight, FOUND)
    assert moved.data_ptr() % 4 == 2
    assert torch.equal(dense.multiply(x.t().contiguous().t(), moved, FOUND), want)
    assert torch.equal(dense.multiply(x[:, None], moved, FOUND), want[:, None])


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(96, 40, bias=False, dtype=torch.bfloat16)
        self.biased = nn.Linear(96, 40, dtype=torch.bfloat16)
        self.tied = nn.Sequential(nn.Linear(96, 40, bias=False))
        self.tied[0].weight = self.plain.weight


def test_a_models_layers():
    model = _Model().eval()
    before = copy.deepcopy(model.state_dict())
    dense.use_in(model)
    assert isinstance(model.plain, dense.NativeLinear) and type(model.biased) is nn.Linear
    assert model.tied[0].weight is model.plain.weight and not model.plain.training
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    copied = copy.deepcopy(model)
    x, _ = _random(dense.FEW, 1, 96)
    with torch.no_grad():
        want = dense.multiply(x, model.plain.weight, FOUND)
        assert torch.equal(model.plain(x), want) and torch.equal(copied.plain(x), want)


@pytest.mark.parametrize("what", ["many", "none", "float32", "strides", "gradients", "hidden"])
def test_what_it_leaves_to_torch(what, monkeypatch):
    """The results are torch's to the bit."""
    x, weight = _random({"many": dense.FEW + 1, "none": 0}.get(what, 2), 40, 96)
    if what == "float32":
        x, weight = x.float(), weight.float()
    if what == "strides":
        weight = weight.t().contiguous().t()
    if what == "hidden":
        monkeypatch.setattr(dense, "find", lambda: "this test hides it")
    else:
        monkeypatch.setattr(dense, "multiply", None)
    layer = dense.NativeLinear(nn.Parameter(weight, requires_grad=what == "gradients"))
    got = layer(x)
    assert torch.equal(got, nn.functional.linear(x, weight))
    assert got.requires_grad == (what == "gradients")


def test_wrong_widths_are_torchs_to_refuse():
    layer = dense.NativeLinear(nn.Parameter(_random(1, 40, 96)[1], requires_grad=False))
    with pytest.raises(RuntimeError, match="shapes"):
        layer(torch.zeros(2, 48, dtype=torch.bfloat16))


FORKED = """
import os, torch
from pipeline.hybrid.native import dense, library
torch.set_num_threads(3)
x, weight = torch.randn(2, 512).bfloat16(), torch.randn(1000, 512).bfloat16()
want = dense.multiply(x, weight, library.find())
child = os.fork()
if not child:
    os._exit(0 if torch.equal(dense.multiply(x, weight, library.find()), want) else 1)
print(os.waitpid(child, 0)[1], torch.equal(dense.multiply(x, weight, library.find()), want))
"""


def test_a_forked_child_computes_too():
    """OpenMP's threads are not there in the child, and waiting for them would never end."""
    command = [sys.executable, "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["0", "True"]
