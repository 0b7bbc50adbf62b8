"""The compiled kernels of a decode step, in all their variants, against transformers' modules."""

import copy
import dataclasses

import pytest
import torch
from judging import error
from transformers import DynamicCache, Qwen3NextConfig
from transformers.models.qwen3_next import modeling_qwen3_next as plain

from pipeline.hybrid.native import dense, library, step, steps
from pipeline.hybrid.native.steps import qwen3_next

FOUND = library.find()

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(isinstance(FOUND, str), reason=f"no native kernel: {FOUND}"),
]
THREADS = (2, 3, 7)


def _variants():
    return [dataclasses.replace(FOUND, kind=kind) for kind in range(FOUND.kind + 1)]


def _use(monkeypatch, kernel, threads=1):
    for module in (qwen3_next, dense):
        monkeypatch.setattr(module, "find", lambda: kernel)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)


def _config(**sizes):
    common = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 16,
        "num_experts": 20,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "layer_types": ["linear_attention"],
        "attn_implementation": "sdpa",
    }
    return Qwen3NextConfig(**(common | sizes))


def _random(module):
    """With random weights, of which DeltaNet's keep their usual sizes, in bfloat16."""
    for name, parameter in module.named_parameters():
        new = torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.15)
        if name.endswith("A_log"):
            new = torch.empty_like(parameter).uniform_(0.01, 16).log_()
        parameter.data = new.bfloat16()
        parameter.requires_grad_(False)
    return module.eval()


def _native(module, kind):
    """A copy that the kernels serve, its linear layers too."""
    own = copy.deepcopy(module)
    for name, child in own.named_children():
        if type(child) is torch.nn.Linear:
            setattr(own, name, dense.NativeLinear(child.weight))
    own.__class__ = kind
    return own


def _exact(module):
    own = copy.deepcopy(module)
    return own.float()


def _inputs(tokens, config):
    return torch.randn(tokens, 1, config.hidden_size).bfloat16()


def _delta_cache(config, tokens, dtype):
    """States as some tokens before could have left them; the same for each dtype and seed."""
    cache = DynamicCache(config=config)
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    window = torch.randn(tokens, 2 * keys + values, config.linear_conv_kernel_dim).bfloat16()
    heads, sizes = config.linear_num_value_heads, config.linear_value_head_dim
    memory = torch.randn(tokens, heads, config.linear_key_head_dim, sizes) * 0.3
    cache.update_conv_state(window.to(dtype), 0, conv_kernel_size=window.shape[-1])
    cache.update_recurrent_state(memory, 0)
    return cache


def _states(cache):
    return cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0]


# key heads, value heads, key size, value size, taps
DELTAS = [(1, 1, 16, 16, 4), (2, 4, 32, 16, 4), (3, 9, 48, 64, 3), (2, 4, 128, 128, 4)]


@pytest.mark.parametrize("sizes", DELTAS, ids=str)
def test_delta(sizes, monkeypatch):
    """Steps of one and several tokens: results and states are no further from float32's than
    bfloat16 takes transformers itself, and the same with any number of threads."""
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    settings = {f"linear_{name}": size for name, size in zip(names, sizes, strict=False)}
    config = _config(**settings, linear_conv_kernel_dim=sizes[4])
    own = _random(plain.Qwen3NextGatedDeltaNet(config, 0))
    for tokens in (1, 3, dense.FEW):
        seed = int(torch.randint(1 << 30, ()))

        def run(module, dtype, seed=seed, tokens=tokens):
            torch.manual_seed(seed)
            cache, results = _delta_cache(config, tokens, dtype), []
            for _ in range(3):
                x = _inputs(tokens, config).to(dtype)
                results.append(module(hidden_states=x, cache_params=cache))
            return torch.cat(results), *(state.clone() for state in _states(cache))

        exact, rounded = run(_exact(own), torch.float32), run(own, torch.bfloat16)
        for kernel in _variants():
            _use(monkeypatch, kernel)
            served = _native(own, qwen3_next.DeltaNet)
            got = run(served, torch.bfloat16)
            for mine, theirs, true in zip(got, rounded, exact, strict=True):
                assert mine.dtype == theirs.dtype
                assert error(mine, true) <= 1.3 * error(theirs, true) + 2**-8  # few numbers
            assert torch.equal(got[1][..., :-3], rounded[1][..., :-3])  # it has moved on by three
            for threads in THREADS:
                _use(monkeypatch, kernel, threads)
                again = run(served, torch.bfloat16)
                assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))


def test_delta_does_not_drift(monkeypatch):
    """Behind 500 tokens the memory is no further from float32's than transformers' own."""
    config = _config()
    own = _random(plain.Qwen3NextGatedDeltaNet(config, 0))
    served, exact = _native(own, qwen3_next.DeltaNet), _exact(own)
    _use(monkeypatch, FOUND)
    torch.manual_seed(seed := int(torch.randint(1 << 30, ())))
    caches = []
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float32):
        torch.manual_seed(seed)
        caches.append(_delta_cache(config, 2, dtype))
    for _ in range(500):
        x = _inputs(2, config)
        for module, cache in zip((served, own, exact), caches, strict=True):
            module(hidden_states=x.to(module.A_log.dtype), cache_params=cache)
    mine, theirs, true = (_states(cache)[1] for cache in caches)
    assert error(mine, true) <= 1.3 * error(theirs, true) + 1e-5


# query heads, key heads, size
ATTENTIONS = [(1, 1, 16), (4, 2, 32), (6, 2, 48), (16, 2, 256)]


@pytest.mark.parametrize("sizes", ATTENTIONS, ids=str)
@pytest.mark.parametrize("length", [0, 15, 64, 300, 1500])
def test_attention(sizes, length, monkeypatch):
    config = _config(
        num_attention_heads=sizes[0], num_key_value_heads=sizes[1], head_dim=sizes[2],
        layer_types=["full_attention"], partial_rotary_factor=0.5,
    )  # fmt: skip
    own = _random(plain.Qwen3NextAttention(config, 0))
    for tokens, masked in ((1, False), (3, True)):
        past = [torch.randn(tokens, sizes[1], length, sizes[2]).bfloat16() for _ in range(2)]
        x = _inputs(tokens, config)
        angles = torch.randn(tokens, 1, sizes[2] // 2).bfloat16()
        mask = None
        if masked:
            mask = torch.rand(tokens, 1, 1, length + 1) < 0.7
            mask[..., -1] = True

        def run(module, dtype, x=x, angles=angles, mask=mask, past=past):
            cache = DynamicCache(config=config)
            cache.update(past[0].to(dtype), past[1].to(dtype), 0)
            rotary = angles.to(dtype).cos(), angles.to(dtype).sin()
            out, _ = module(x.to(dtype), rotary, mask, cache)
            return out, cache.layers[0].keys[:, :, -1].clone()

        exact, rounded = run(_exact(own), torch.float32), run(own, torch.bfloat16)
        for kernel in _variants():
            _use(monkeypatch, kernel)
            served = _native(own, qwen3_next.Attention)
            got = run(served, torch.bfloat16)
            for mine, theirs, true in zip(got, rounded, exact, strict=True):
                assert error(mine, true) <= 1.3 * error(theirs, true) + 2**-8  # few numbers
            for threads in THREADS:
                _use(monkeypatch, kernel, threads)
                again = run(served, torch.bfloat16)
                assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))


def test_a_mask_of_another_length_is_refused(monkeypatch):
    _use(monkeypatch, FOUND)
    config = _config(layer_types=["full_attention"])
    own = _native(_random(plain.Qwen3NextAttention(config, 0)), qwen3_next.Attention)
    rotary = (torch.ones(1, 1, 8).bfloat16(),) * 2
    mask = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="a mask of 2 for 1 keys"):
        own(_inputs(1, config), rotary, mask, DynamicCache(config=config))


def test_attention_to_masked_rubbish(monkeypatch):
    """What is masked may be anything, and nothing of it shows."""
    _use(monkeypatch, FOUND)
    query = torch.randn(1, 2, 32).bfloat16()
    keys, values = (torch.randn(1, 1, 40, 32).bfloat16() for _ in range(2))
    seen = torch.rand(1, 40) < 0.5
    seen[0, 3] = True
    mixed = torch.randn(1, 6 * 32).bfloat16()
    for kernel in _variants():
        want = step.attend(mixed, query, keys, values, seen, 0.2, kernel)
        wrong = [x.masked_fill(~seen[:, None, :, None], float("nan")) for x in (keys, values)]
        assert torch.equal(step.attend(mixed, query, *wrong, seen, 0.2, kernel), want)


def _distinct(tokens, count):
    """Logits no two of which are alike."""
    bits = torch.stack([torch.randperm(count) for _ in range(tokens)]).short() + 0x3F80
    return bits.view(torch.bfloat16)


@pytest.mark.parametrize(("experts", "chosen"), [(1, 1), (5, 5), (33, 4), (250, 10)])
def test_route(experts, chosen):
    for kernel in _variants():
        for normalise in (True, False):
            logits = _distinct(3, experts)
            index, weights, inner = step.route(logits, experts, chosen, kernel, normalise=normalise)
            shares, want = logits.float().softmax(-1).topk(chosen)
            shares = shares / shares.sum(-1, keepdim=True) if normalise else shares
            assert torch.equal(index, want) and inner.numel() == 0
            assert torch.allclose(weights.float(), shares, rtol=2**-8)


def test_route_of_equals_and_of_none():
    for kernel in _variants():
        index, weights, _ = step.route(torch.ones(1, 30).bfloat16(), 30, 7, kernel, normalise=True)
        assert index.tolist() == [list(range(7))]
        assert torch.equal(weights, torch.full((1, 7), 1 / 7).bfloat16())
        logits = torch.randn(1, 30).bfloat16()
        logits[0, 11] = float("nan")
        index, weights, _ = step.route(logits, 30, 7, kernel, normalise=True)
        assert len(set(index[0].tolist())) == 7 and index.min() >= 0 and index.max() < 30
        assert weights.isnan().all()


def test_router_is_transformers(monkeypatch):
    config = _config()
    own = _random(plain.Qwen3NextTopKRouter(config))
    own.weight.data.zero_()[:, 0] = torch.linspace(-4, 4, config.num_experts)[
        torch.randperm(config.num_experts)
    ]
    x = torch.randn(3, config.hidden_size).bfloat16().abs() + 0.5
    want = own(x)
    served = _native(own, qwen3_next.Router)
    for kernel in _variants():
        _use(monkeypatch, kernel)
        logits, weights, index = served(x)
        assert torch.equal(index, want[2])
        assert torch.allclose(logits.float(), want[0].float(), rtol=2**-7)
        assert torch.allclose(weights.float(), want[1].float(), rtol=2**-5)


def test_norm(monkeypatch):
    own = _random(plain.Qwen3NextRMSNorm(96))
    x = torch.randn(2, 1, 96).bfloat16() * 7
    for kernel in _variants():
        _use(monkeypatch, kernel)
        got, want = _native(own, qwen3_next.Norm)(x), own(x)
        assert torch.allclose(got.float(), want.float(), rtol=2**-7, atol=0)


def test_sparse(monkeypatch):
    """The block, its routed experts replaced by something simple that is told the same."""

    class Simple(torch.nn.Module):
        def forward(self, x, index, weights):
            scale = (index.float() * weights.float()).sum(-1, keepdim=True)
            return (x.float() * scale / 10).to(x.dtype)

    config = _config()
    own = plain.Qwen3NextSparseMoeBlock(config)
    own.experts = torch.nn.Identity()
    _random(own).experts = Simple()
    exact = _exact(own)
    served = _native(own, qwen3_next.Sparse)
    for name, child in own.shared_expert.named_children():
        if type(child) is torch.nn.Linear:
            setattr(served.shared_expert, name, dense.NativeLinear(child.weight))
    x, heard = _inputs(4, config), []
    for kernel in _variants():
        _use(monkeypatch, kernel)
        got, theirs, true = served(x), own(x), exact(x.float())
        assert got.dtype == torch.bfloat16
        assert error(got, true) <= 1.5 * error(theirs, true) + 1e-2
        with monkeypatch.context() as patch:
            patch.setattr(step, "finish", None)  # who listens to the router is told by its module
            handle = served.gate.register_forward_hook(lambda *_: heard.append(1))
            assert error(served(x), true) <= 1.5 * error(theirs, true) + 1e-2
            handle.remove()
    assert len(heard) == len(_variants())


@pytest.mark.parametrize("what", ["many", "float32", "gradients", "hidden", "no state"])
def test_what_is_left_to_transformers(what, monkeypatch):
    """To the bit."""
    config = _config()
    own = _random(plain.Qwen3NextGatedDeltaNet(config, 0))
    tokens = dense.FEW + 1 if what == "many" else 2
    if what == "float32":
        own.float()
    served = copy.deepcopy(own)
    served.__class__ = qwen3_next.DeltaNet
    if what == "gradients":
        own.out_proj.weight.requires_grad_()
        served.out_proj.weight.requires_grad_()
    if what == "hidden":
        monkeypatch.setattr(qwen3_next, "find", lambda: "this test hides it")
    else:
        monkeypatch.setattr(step, "delta", None)
    torch.manual_seed(seed := int(torch.randint(1 << 30, ())))
    results = []
    for module in (own, served):
        torch.manual_seed(seed)
        dtype = own.A_log.dtype
        cache = DynamicCache(config=config)
        if what != "no state":
            cache = _delta_cache(config, tokens, dtype)
        x = _inputs(tokens, config).to(dtype)
        results.append(module(hidden_states=x, cache_params=cache))
    assert torch.equal(*results)
    assert results[1].requires_grad == (what == "gradients")


def test_an_unknown_architecture_is_left_alone():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("", (), {"model_type": "something else"})
            self.norm = plain.Qwen3NextRMSNorm(16)

    model = Model()
    steps.use_in(model)
    assert type(model.norm) is plain.Qwen3NextRMSNorm
