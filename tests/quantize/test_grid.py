import pytest
import torch
from problems import fresh

import pipeline.quantize.grid as grid_module
from pipeline.errors import NumericalError
from pipeline.quantize.grid import SMALLEST_SCALE, encode, fit_grid
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES = [
    AffineScheme(bits, group, symmetric)
    for bits in (4, 8)
    for group in (32, 128, -1)
    for symmetric in (True, False)
]


def rounded(weight, scheme, *, search, importance=None):
    grid = fit_grid(weight, scheme, search=search, importance=importance)
    codes = encode(weight, grid, scheme.bits)
    arrays = {"codes": codes, "scales": grid.scales, "zeros": grid.zeros}
    return QuantizedTensor(scheme, arrays)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("search", [True, False])
def test_grid_is_storable_and_codes_fit(scheme, search):
    weight = torch.randn((3, 24, 256), generator=fresh()) * 0.05
    result = rounded(weight, scheme, search=search)
    scales, zeros, codes = (result.arrays[k] for k in ("scales", "zeros", "codes"))
    assert scales.shape == (3, 24, 256 // scheme.group(256))
    assert scales.dtype == torch.float16
    assert torch.equal(scales.to(torch.bfloat16).float(), scales.float())
    assert bool((scales.float().abs() >= SMALLEST_SCALE).all())
    assert scheme.symmetric or bool((scales > 0).all())
    assert zeros.dtype == torch.uint8
    assert int(zeros.min()) >= 1
    assert int(codes.max()) < 2**scheme.bits
    if scheme.symmetric:
        assert bool((zeros == 2 ** (scheme.bits - 1)).all())
    worst = 0.75 if search else 0.51  # in steps; a searched grid may clip
    error = (weight - result.dequantize()).abs()
    inside = codes.gt(0) & codes.lt(2**scheme.bits - 1)
    step = scales.float().abs().repeat_interleave(scheme.group(256), -1)
    assert float((error / step)[inside].max()) < worst


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
def test_search_has_the_smaller_error(symmetric, group):
    weight = torch.randn((2, 64, 256), generator=fresh())
    scheme = AffineScheme(4, group, symmetric)
    plain, searched = (
        (weight - rounded(weight, scheme, search=s).dequantize()).square().mean()
        for s in (False, True)
    )
    assert searched < 0.97 * plain


def test_search_minds_importance():
    generator = fresh()
    weight = torch.randn((2, 64, 256), generator=generator)
    importance = torch.exp(2 * torch.randn((2, 256), generator=generator))
    scheme = AffineScheme(4, 64, symmetric=True)

    def loss(**options):
        error = weight - rounded(weight, scheme, search=True, **options).dequantize()
        return (error.square() * importance.unsqueeze(1)).sum()

    assert loss(importance=importance) < 0.95 * loss()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_on_a_grid_come_back_exactly(scheme):
    generator = fresh()
    top = 2**scheme.bits - 1
    codes = torch.randint(0, top + 1, (1, 16, 256), generator=generator)
    codes[..., ::32], codes[..., 1::32] = 0, top  # every group uses its whole range
    zero = 2 ** (scheme.bits - 1) if scheme.symmetric else 5
    weight = (codes - zero) * 0.03125
    result = rounded(weight.float(), scheme, search=True)
    assert torch.equal(result.dequantize(), weight.float())


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_tiny_and_one_sided_rows(search, symmetric):
    weight = torch.randn((1, 5, 64), generator=fresh())
    weight[0, 0] = 0
    weight[0, 1] *= 1e-12
    weight[0, 2] = weight[0, 2].abs() + 1
    weight[0, 3] = -weight[0, 3].abs() - 1
    result = rounded(weight, AffineScheme(4, 32, symmetric), search=search)
    dense = result.dequantize()
    assert bool(torch.isfinite(dense).all())
    assert bool((dense[0, :2] == 0).all())
    assert int(result.arrays["zeros"].min()) >= 1
    step = result.arrays["scales"].float().abs().repeat_interleave(32, -1)
    assert float(((weight - dense).abs() / step)[0, 2:4].max()) < 3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("search", [True, False])
def test_a_group_whose_longer_side_is_above_zero_is_turned_around(search, bits):
    weight = torch.randn((2, 40, 128), generator=fresh())
    scheme = AffineScheme(bits, 32, symmetric=True)
    grid = fit_grid(weight, scheme, search=search)
    groups = weight.unflatten(-1, (4, 32))
    above = groups.amax(-1) > -groups.amin(-1)
    assert torch.equal(grid.scales < 0, above)
    assert bool(above.any()) and not bool(above.all())
    # Mirrored weights lie on the mirrored grid, and are rounded to the mirrored numbers.
    mirrored = fit_grid(-weight, scheme, search=search)
    assert torch.equal(mirrored.scales, -grid.scales)
    codes = [encode(w, g, bits) for w, g in ((weight, grid), (-weight, mirrored))]
    assert torch.equal(*codes)
    kept = fit_grid(weight, scheme, search=search, turning=False)
    assert bool((kept.scales > 0).all())
    assert torch.equal(kept.scales[~above], grid.scales[~above])


@pytest.mark.parametrize(("group", "most"), [(32, 0.93), (128, 0.95)])
def test_turned_groups_lose_less(group, most):
    weight = torch.randn((4, 64, 512), generator=fresh())
    scheme = AffineScheme(4, group, symmetric=True)
    lost = []
    for turning in (True, False):
        grid = fit_grid(weight, scheme, search=True, turning=turning)
        arrays = {"codes": encode(weight, grid, 4), "scales": grid.scales, "zeros": grid.zeros}
        lost.append((weight - QuantizedTensor(scheme, arrays).dequantize()).square().sum())
    assert lost[0] < most * lost[1]


@pytest.mark.parametrize("method", list(QUANTIZERS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e6])
def test_unusable_weights_are_named(bad, method):
    weight = torch.randn((4, 8, 64), generator=fresh())
    weight[2, 3, 4] = bad
    scheme = AffineScheme(4, 32, symmetric=True)
    with pytest.raises(NumericalError, match="matrix 2 "):
        QUANTIZERS[method].quantize(weight, torch.eye(64).repeat(4, 1, 1), scheme, SolverOptions())


def test_slabs_do_not_change_the_result(monkeypatch):
    generator = fresh()
    weight = torch.randn((5, 30, 128), generator=generator)
    importance = torch.rand((5, 128), generator=generator)
    scheme = AffineScheme(4, 32, symmetric=False)
    whole = fit_grid(weight, scheme, search=True, importance=importance)
    monkeypatch.setattr(grid_module, "_SLAB_ELEMENTS", 7 * 128)
    parts = fit_grid(weight, scheme, search=True, importance=importance)
    assert torch.equal(whole.scales, parts.scales)
    assert torch.equal(whole.zeros, parts.zeros)
