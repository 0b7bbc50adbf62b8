"""The compact record against the plain computation over the whole vocabulary."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import CheckpointError, NumericalError
from pipeline.evaluate.metrics import Comparer, compare, paired_bootstrap
from pipeline.evaluate.reference import Reference, ReferenceBuilder
from pipeline.evaluate.windows import sliding_windows

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, STRIDE = 48, 20


def _windows(vocabulary, total=300):
    return sliding_windows(torch.randint(vocabulary, (total,)), LENGTH, STRIDE)


def _logits(windows, vocabulary, sharpness=3.0):
    return torch.randn(len(windows), LENGTH, vocabulary) * sharpness


def _reference(windows, logits, **options):
    builder = ReferenceBuilder(windows, **options)
    order = torch.randperm(len(windows)).tolist()
    for window in order:
        builder.add(window, logits[window : window + 1])
    return builder.build()


def _comparison(reference, logits, batch=3):
    comparer = Comparer(reference)
    for first in range(0, len(reference.windows), batch):
        comparer.add(first, logits[first : first + batch])
    return comparer.build()


def _plain(windows, source, quantized):
    """Perplexities, full-vocabulary KL and top-1 agreement, float64, all at once."""
    p = source[:, :-1].double().log_softmax(-1)[windows.scored[:, 1:]]
    q = quantized[:, :-1].double().log_softmax(-1)[windows.scored[:, 1:]]
    target = windows.token_ids[windows.scored].unsqueeze(1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return (
        math.exp(-p.gather(1, target).mean().item()),
        math.exp(-q.gather(1, target).mean().item()),
        kl,
        (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    )


@pytest.mark.parametrize("vocabulary", [40, 700])
def test_against_the_whole_vocabulary(vocabulary):
    windows = _windows(vocabulary)
    source = _logits(windows, vocabulary, sharpness=5.0)
    quantized = source + 0.3 * torch.randn_like(source)
    got = _comparison(_reference(windows, source, top_k=64), quantized)
    source_ppl, quantized_ppl, kl, agreement = _plain(windows, source, quantized)
    assert got.source_perplexity == pytest.approx(source_ppl, rel=1e-5)
    assert got.quantized_perplexity == pytest.approx(quantized_ppl, rel=1e-5)
    assert got.perplexity_ratio == pytest.approx(quantized_ppl / source_ppl, rel=1e-5)
    assert got.top1_agreement == pytest.approx(agreement, abs=1e-12)
    # top-k and a rest are a lower bound, and here a close one
    assert kl * 0.97 < got.kl_divergence < kl * 1.002


def test_coarser_records_bound_the_divergence_from_below():
    windows = _windows(500)
    source = _logits(windows, 500, sharpness=1.0)
    quantized = source + torch.randn_like(source)
    kl = _plain(windows, source, quantized)[2]
    measured = [
        _comparison(_reference(windows, source, top_k=k), quantized).kl_divergence
        for k in (1, 4, 16, 64, 255)
    ]
    assert measured == sorted(measured)
    assert measured[0] > 0
    assert measured[-1] < kl


def test_a_model_equals_itself_even_with_ties():
    windows = _windows(300)
    source = _logits(windows, 300).round()  # many equal logits, as bf16 has them
    got = _comparison(_reference(windows, source), source)
    assert got.top1_agreement == 1.0
    assert 0 <= got.kl_divergence < 1e-5
    interval = got.ratio_interval()
    assert interval.low == interval.high == pytest.approx(1.0, abs=1e-6)


def test_ties_do_not_depend_on_what_is_kept():
    windows = _windows(300)
    source = _logits(windows, 300).round()
    quantized = (source + torch.randn_like(source)).round()
    agreements = {
        _comparison(_reference(windows, source, top_k=k), quantized).top1_agreement
        for k in (32, 64, 128)
    }
    best, other = (x == x.amax(-1, keepdim=True) for x in (source, quantized))
    want = (best & other).any(-1)[:, :-1][windows.scored[:, 1:]].double().mean().item()
    assert len(agreements) == 1 and agreements.pop() == pytest.approx(want)


def test_certain_predictions():
    """Probability one to float32: the rest has no mass, and nothing becomes NaN."""
    windows = _windows(50)
    source = torch.zeros(len(windows), LENGTH, 50)
    source.scatter_(2, torch.randint(50, (len(windows), LENGTH, 1)), 500.0)
    got = _comparison(_reference(windows, source), source)
    assert got.kl_divergence == pytest.approx(0, abs=1e-6)
    flat = _comparison(_reference(windows, source), torch.zeros_like(source))
    assert flat.kl_divergence == pytest.approx(math.log(50), rel=1e-3)


@pytest.mark.parametrize("vocabulary", [300, 70_000])
def test_file_round_trip(tmp_path, vocabulary):
    windows = _windows(vocabulary, total=100)
    source = _logits(windows, vocabulary)
    labels = {"text": "fresh", "text_sha256": "ab" * 32}
    reference = _reference(windows, source, top_k=32, labels=labels)
    path = tmp_path / "validation_reference.safetensors"
    reference.save(path)
    again = Reference.load(path)
    assert again.metadata() == reference.metadata() and again.labels == labels
    assert again.windows.stride == STRIDE and again.vocabulary == vocabulary
    for name in ("kept", "ids", "logprobs", "log_rest", "target"):
        assert torch.equal(getattr(again, name), getattr(reference, name)), name
    assert torch.equal(again.windows.token_ids, windows.token_ids)
    quantized = source + torch.randn_like(source)
    a, b = _comparison(reference, quantized), _comparison(again, quantized)
    assert a.kl_divergence == b.kl_divergence and a.perplexity_ratio == b.perplexity_ratio
    ids = load_file(path)["ids"]
    assert ids.dtype == (torch.uint16 if vocabulary <= 65536 else torch.int32)


def test_a_sure_source_needs_few_bytes(tmp_path):
    windows = _windows(4000, total=900)
    reference = _reference(windows, _logits(windows, 4000, sharpness=12.0))
    reference.save(tmp_path / "r.safetensors")
    positions = windows.positions
    overhead = windows.token_ids.numel() * 5 + positions * 7 + 2000
    assert (tmp_path / "r.safetensors").stat().st_size < overhead + positions * 16 * 4


def test_damaged_or_foreign_files(tmp_path):
    path = tmp_path / "r.safetensors"
    with pytest.raises(CheckpointError, match=r"r\.safetensors: cannot read"):
        Reference.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot read"):
        Reference.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a validation reference"):
        Reference.load(path)
    windows = _windows(100)
    reference = _reference(windows, _logits(windows, 100))
    reference.save(path)
    tensors = load_file(path)
    tensors["kept"] = tensors["kept"][:-1].clone()
    save_file(tensors, path, reference.metadata())
    with pytest.raises(CheckpointError, match="damaged"):
        Reference.load(path)


def test_misuse_is_refused():
    windows = _windows(60)
    logits = _logits(windows, 60)
    builder = ReferenceBuilder(windows, top_k=8)
    builder.add(0, logits[:2])
    with pytest.raises(ValueError, match="twice"):
        builder.add(1, logits[1:2])
    with pytest.raises(ValueError, match="never added"):
        builder.build()
    with pytest.raises(ValueError, match="do not fit"):
        builder.add(len(windows) - 1, logits[:2])
    with pytest.raises(NumericalError, match="window 3"):
        builder.add(3, torch.full_like(logits[:1], torch.nan))
    reference = _reference(windows, logits)
    with pytest.raises(CheckpointError, match="61 tokens"):
        Comparer(reference).add(0, torch.zeros(1, LENGTH, 61))
    comparer = Comparer(reference)
    comparer.add(0, logits[:1])
    with pytest.raises(ValueError, match="never added"):
        comparer.build()


def test_compare_runs_a_model_in_batches():
    windows = _windows(80)
    source = _logits(windows, 80)
    quantized = source + 0.2 * torch.randn_like(source)

    class Model:
        device = torch.device("cpu")
        calls = 0

        def __call__(self, input_ids, use_cache):
            assert not use_cache
            first = self.calls
            self.calls += len(input_ids)
            assert torch.equal(input_ids, windows.token_ids[first : self.calls])
            return type("Output", (), {"logits": quantized[first : self.calls].bfloat16()})

    reference = _reference(windows, source)
    model = Model()
    got = compare(model, reference, batch_size=4)
    assert model.calls == len(windows)
    assert got.kl_divergence == _comparison(reference, quantized.bfloat16()).kl_divergence


def test_bootstrap_covers_the_truth():
    """Of many experiments with a known mean difference, about the promised share covers it."""
    covered = 0
    for seed in range(60):
        count = torch.randint(20, 60, (80,))
        common = torch.randn(80) * 100  # hard and easy texts, the same for both
        b = common * count
        a = b + 0.5 * count + torch.randn(80) * count.sqrt() * 3
        interval = paired_bootstrap(a, b, count, samples=400, seed=seed, level=0.9)
        assert interval.low < interval.estimate < interval.high
        assert interval.high - interval.low < 1.0  # the common part has been taken out
        covered += interval.low <= 0.5 <= interval.high
    assert covered >= 42


def test_bootstrap_is_repeatable():
    a, b, count = torch.randn(30), torch.randn(30), torch.ones(30, dtype=torch.int64)
    assert paired_bootstrap(a, b, count, seed=4) == paired_bootstrap(a, b, count, seed=4)
    assert paired_bootstrap(a, b, count, seed=4) != paired_bootstrap(a, b, count, seed=5)
