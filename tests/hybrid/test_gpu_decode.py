"""With a GPU: captured decode steps are the model's, allocate nothing, and leave nothing behind."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hybrid_models import MODELS, dequantised, write_output

from pipeline import hybrid
from pipeline.errors import ResourceError
from pipeline.hybrid.native import crew
from pipeline.hybrid.native.library import find
from pipeline.quantize.tensor import AffineScheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
decode = pytest.importorskip("pipeline.hybrid.decode", exc_type=ImportError)
PARTS = "resident:0.25,zero-copy:0.5,cpu:0.25"
AT_ONCE = ["both:2", "both", "cpu", "zero-copy:0.7,cpu:0.3", PARTS]
native = pytest.mark.skipif(isinstance(find(), str), reason="no compiled kernel for the CPU")
PLACEMENTS = ["resident", "zero-copy", "cpu", PARTS]


@pytest.fixture(autouse=True)
def give_up_soon(monkeypatch):
    """A device that nobody answers ends within about a second."""
    monkeypatch.setattr(crew, "_PATIENCE", 1 << 20)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_output(
        MODELS / "qwen3-next-tiny-nf4", tmp_path_factory.mktemp("gpu"), AffineScheme(4, 32, True)
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("follow_use", [True, False])
def test_steps_are_the_models(directory, placement, follow_use):
    """Float32, two sequences, random tokens; first by graphs, then fused without graphs."""
    plain = dequantised(directory, torch.float32)
    model = hybrid.load(directory, dtype=torch.float32, placement=placement, follow_use=follow_use)
    ids = torch.randint(5, model.config.vocab_size, (2, 70))
    for graphs in (True, False):
        decoder = decode.Decoder(model, 2, 128, graphs=graphs)
        got = decoder.prefill(ids.cuda())
        with torch.inference_mode():
            want = plain(ids, use_cache=True)
            for _ in range(12):
                error = (got.cpu() - want.logits[:, -1]).norm() / want.logits[:, -1].norm()
                assert error < 5e-3
                tokens = torch.randint(5, model.config.vocab_size, (2,))
                decoder.tokens.copy_(tokens)
                got = decoder.step()
                want = plain(tokens[:, None], past_key_values=want.past_key_values, use_cache=True)


def _elsewhere(its):
    """For the device, a word that nobody writes."""
    return its._words.data_ptr() + crew._ANSWER + (8 if hasattr(its, "_handle") else 0)


@native
def test_this_device_can_call(monkeypatch):
    """As every load tries it; and answers that do not come are given up, once for a graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    calls = pytest.importorskip("pipeline.hybrid.calls", exc_type=ImportError)
    assert calls.calls_fail(device) is None
    monkeypatch.setattr(crew.Crew, "answer", property(_elsewhere))
    monkeypatch.setattr(calls, "_PATIENCE", 1 << 12)
    with pytest.raises(ResourceError, match="in time"):
        calls._try(find(), device)


@native
@pytest.mark.parametrize("placement", AT_ONCE)
@pytest.mark.parametrize("sequences", [1, 3])
def test_both_roads_are_one_graph(directory, placement, sequences):
    """200 steps, random tokens: as when the device computes all, unless a router tips over."""
    model = hybrid.load(directory, placement=placement)
    plain = hybrid.load(directory, placement="zero-copy")
    ids = torch.randint(5, model.config.vocab_size, (sequences, 40), device="cuda")
    both = [decode.Decoder(m, sequences, 256) for m in (model, plain)]
    for decoder in both:
        decoder.prefill(ids)
    errors, equal = [], []
    for _ in range(200):
        tokens = torch.randint(5, model.config.vocab_size, (sequences,), device="cuda")
        for decoder in both:
            decoder.tokens.copy_(tokens)
        got, want = (decoder.step().float() for decoder in both)
        errors.append((got - want).norm() / want.norm())
        equal.append((got.argmax(-1) == want.argmax(-1)).float().mean())
    error = torch.stack(errors)
    quantiles = error.quantile(torch.tensor([0.5, 0.9], device="cuda")).tolist()
    assert quantiles[0] < 0.03 and quantiles[1] < 0.15 and error.max() < 1, quantiles
    assert torch.stack(equal).mean() > 0.9  # random tokens: many steps are close calls
    assert [len(decoder._captured) for decoder in both] == [1, 1]
    crew = both[0]._crew
    assert crew is not None or placement == "both"  # which is measured, and may leave it nothing
    if crew is not None:
        crew.check()


@pytest.mark.parametrize(
    "placement",
    ["zero-copy", pytest.param("both:2", marks=native), pytest.param("cpu", marks=native)],
)
def test_a_step_allocates_nothing(directory, placement):
    model = hybrid.load(directory, placement=placement)
    decoder = decode.Decoder(model, 1, 256)
    decoder.prefill(torch.randint(5, 500, (1, 20), device="cuda"))
    decoder.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(200):
        decoder.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@native
def test_two_models_on_both_roads(directory):
    """In turns and from two threads: each says what it says alone."""
    ids = torch.randint(5, 500, (1, 40), device="cuda")
    wanted = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    models = [hybrid.load(directory, placement=p) for p in ("both:2", "both:1")]
    alone = [model.generate(ids, **wanted) for model in models]
    with ThreadPoolExecutor(2) as pool:
        again = list(pool.map(lambda model: model.generate(ids, **wanted), models))
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))


@native
def test_a_model_that_goes_while_it_decodes(directory):
    """Steps that are queued are done before what they read goes."""
    for placement in ("both:2", "cpu"):
        model = hybrid.load(directory, placement=placement)
        decoder = decode.Decoder(model, 1, 64)
        decoder.prefill(torch.randint(5, 500, (1, 20), device="cuda"))
        for _ in range(30):
            decoder.step()
        words = decoder._crew._words
        late = words[crew._LATE : crew._LATE + 8].view(torch.int64)
        del decoder, model
        gc.collect()
        torch.cuda.synchronize()
        assert not late.item()


@native
def test_a_first_step_that_is_interrupted(directory):
    """What it queued is answered, and decoding goes on as if there had been none."""
    model = hybrid.load(directory, placement="both:2")
    decoder = decode.Decoder(model, 1, 64)
    ids = torch.randint(5, 500, (1, 20), device="cuda")
    decoder.prefill(ids)
    decoder._build()
    halves = list(decoder._halves)

    def interrupt(_frame):
        raise KeyboardInterrupt

    decoder._halves[3] = interrupt
    with pytest.raises(KeyboardInterrupt):
        decoder.step()
    decoder._halves = halves
    decoder.prefill(ids)
    for _ in range(5):
        decoder.step()
    torch.cuda.synchronize()
    decoder._crew.check()


def test_two_models_and_nothing_left(directory):
    """Both generate at once; a second pair takes no more of the GPU than the first has left.

    The first leaves what libraries keep for good, such as cuBLAS's workspaces.
    """
    ids = torch.randint(5, 500, (1, 40), device="cuda")
    wanted = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}

    def pair():
        models = [hybrid.load(directory, placement="zero-copy") for _ in range(2)]
        first, second, again = [models[i].generate(ids, **wanted) for i in (0, 1, 0)]
        assert torch.equal(first, second) and torch.equal(first, again)
        return models[0].hybrid_placement["bytes"]["dense"]

    left = []
    for _ in range(2):
        dense = pair()
        gc.collect()
        torch.cuda.synchronize()
        left.append(torch.cuda.memory_allocated())
    assert left[1] - left[0] < dense / 2, "a model is left"
