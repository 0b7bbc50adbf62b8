"""A loaded model decodes on the CPU by the compiled kernels, each half of a layer in one call."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from hybrid_models import EVERYTHING, EXPERTS_ONLY, dequantised_state, plain_model, write_output
from judging import TRAINED, passages

from pipeline import hybrid
from pipeline.hybrid.native import dense, experts, library
from pipeline.hybrid.native.steps import qwen3_next
from pipeline.quantize.tensor import AffineScheme

FOUND = library.find()
HALVES = ("delta_half", "attention_half", "sparse_half")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(isinstance(FOUND, str), reason=f"no native kernel: {FOUND}"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_output(TRAINED, tmp_path_factory.mktemp("trained"), AffineScheme(4, 64, True))


@pytest.fixture(scope="module")
def model(directory):
    return hybrid.load(directory, device="cpu")


@pytest.fixture
def calls(monkeypatch):
    """How often each half was one call."""
    counts = Counter()

    def counted(name):
        def call(*arguments):
            counts[name] += 1
            return getattr(FOUND, name)(*arguments)

        return call

    watched = dataclasses.replace(FOUND, **{name: counted(name) for name in HALVES})
    for module in (qwen3_next, dense, experts):
        monkeypatch.setattr(module, "find", lambda: watched)
    return counts


def decoded(model, ids, first, mask=None):
    """Logits of every token from `first` on, each a step of its own."""
    out = []
    with torch.inference_mode():
        for position in (0, *range(first, ids.shape[1])):
            stop = position + 1 if position else first
            step = model(
                ids[:, position:stop],
                attention_mask=None if mask is None else mask[:, :stop],
                position_ids=None if mask is None else places(mask)[:, position:stop],
                past_key_values=out[-1].past_key_values if out else None,
                use_cache=True,
            )
            out.append(step)
    return torch.cat([step.logits[:, -1:].float() for step in out], 1)


def apart(got, want):
    """Of a token as they typically are: one that chooses another expert may be far off."""
    return ((got - want).norm(dim=-1) / want.norm(dim=-1)).median().item()


def places(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def halves(model):
    layers = model.config.layer_types
    attention = layers.count("full_attention")
    sizes = (len(layers) - attention, attention, len(layers))
    return dict(zip(HALVES, sizes, strict=True))


def test_every_half_is_one_call(model, calls):
    decoded(model, passages(2, 12), 9)
    assert calls == {name: 3 * count for name, count in halves(model).items()}
    calls.clear()
    decoded(model, passages(dense.FEW + 1, 12), 9)
    assert not calls


def test_threads_change_no_bit(model, monkeypatch):
    ids = passages(2, 12)
    alone = decoded(model, ids, 6)
    for threads in (2, 3, 5):
        monkeypatch.setattr(library, "threads", lambda threads=threads: threads)
        # prompts are torch's own products, whose results may depend on its threads
        assert torch.equal(decoded(model, ids, 6), alone)


@pytest.mark.parametrize("also", [EXPERTS_ONLY, EVERYTHING], ids=["experts", "everything"])
def test_padded_prompts(also, tmp_path):
    """Of unequal lengths, linear layers dense or quantised, against the dequantised model: no
    further from float32's logits than torch's own products in bfloat16, as tokens typically are."""
    out = write_output(TRAINED, tmp_path, AffineScheme(4, 64, True), also)
    ids = passages(3, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[2, :3] = 0
    exact = decoded(plain_model(out, dequantised_state(out), torch.float32), ids, 12, mask)
    typical = []
    for native in (True, False):
        got = decoded(hybrid.load(out, device="cpu", native=native), ids, 12, mask)
        typical.append(apart(got, exact))
    assert typical[0] < 2 * typical[1], typical


def test_who_listens_is_told(model, calls):
    """transformers asks routers and attention by hooks, for which their own code computes them."""
    ids = passages(1, 30)
    want = decoded(model, ids, 8)
    calls.clear()
    copied = copy.deepcopy(model)
    copied.config.output_router_logits = True
    got = decoded(copied, ids, 8)
    assert calls == {"delta_half": 22 * halves(model)["delta_half"]}
    assert apart(got, want) < 0.1


def test_a_copy_has_its_own_weights(model):
    ids = passages(1, 10)
    want = decoded(model, ids, 8)
    copied = copy.deepcopy(model)
    assert torch.equal(decoded(copied, ids, 8), want)
    copied.model.layers[0].input_layernorm.weight.data.fill_(-1)
    assert not torch.equal(decoded(copied, ids, 8), want)
    assert torch.equal(decoded(model, ids, 8), want)


def test_generate_by_the_kernels(model, calls):
    ids = passages(1, 16)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
    )
    assert out.shape == (1, 22)
    assert calls == {name: 5 * count for name, count in halves(model).items()}


def test_other_weights_are_noticed(model):
    """What a step knows of a layer holds as long as its modules and their weights do."""
    ids = passages(1, 30)
    copied = copy.deepcopy(model)
    want = decoded(copied, ids, 8)
    mixers = (n for n, _ in copied.named_modules() if n.endswith("linear_attn"))
    mixer = copied.get_submodule(name := next(mixers))
    linear = mixer.out_proj
    weight = linear.weight
    linear.weight = torch.nn.Parameter(weight * 2, requires_grad=False)
    assert not torch.equal(decoded(copied, ids, 8), want)
    linear.weight = weight
    assert torch.equal(decoded(copied, ids, 8), want)
    linear.weight.data = weight * 2
    assert not torch.equal(decoded(copied, ids, 8), want)
    mixer.out_proj = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
    mixer.out_proj.weight = model.get_submodule(name).out_proj.weight
    assert apart(decoded(copied, ids, 8), want) < 0.1  # by torch's product
