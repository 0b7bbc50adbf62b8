"""What `pipeline.hybrid.load` promises and refuses, on the micro model."""

import json
import logging
import os
import shutil

import pytest
import torch
from hybrid_models import EVERYTHING, EXPERTS_ONLY, MODELS, dequantised, write_output
from safetensors.torch import load_file, save_file

from pipeline import hybrid
from pipeline.errors import CheckpointError, NumericalError, ResourceError, UserError
from pipeline.hybrid import remarks
from pipeline.hybrid.modules import HybridExperts, QuantizedLinear
from pipeline.hybrid.native.experts import NativeExperts
from pipeline.hybrid.native.library import find
from pipeline.quantize.tensor import AffineScheme

pytestmark = pytest.mark.usefixtures("one_thread")

MICRO = MODELS / "micro-nf4"
NONEXPERT = "model-nonexpert-00001-of-00001.safetensors"
LAYER = "model-experts-layer-001.safetensors"


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every linear layer that may be quantised is, in groups of 64."""
    out = tmp_path_factory.mktemp("everything")
    return write_output(MICRO, out, AffineScheme(4, 64, True), also=EVERYTHING)


@pytest.fixture(scope="module")
def experts_only(tmp_path_factory):
    out = tmp_path_factory.mktemp("experts")
    return write_output(MICRO, out, AffineScheme(4, 32, False), also=EXPERTS_ONLY)


@pytest.fixture
def damaged(experts_only, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(experts_only, tmp_path / "copy")


def _ids(batch, length):
    return torch.randint(5, 512, (batch, length))


@pytest.mark.parametrize("native", [True, False])
def test_modules_and_placement(everything, native):
    before = dict(os.environ)
    model = hybrid.load(everything, device_memory="10GiB", device="cpu", native=native)
    kernel = find() if native else "not asked for"
    assert dict(os.environ) == before
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert not any(t.requires_grad for t in model.parameters()) and not model.training
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(HybridExperts if isinstance(kernel, str) else NativeExperts) == 2
    assert kinds.count(QuantizedLinear) == 2 + 4 + 3 * 2
    placement = model.hybrid_placement
    json.dumps(placement)
    assert placement["experts"] == {"0": "cpu", "1": "cpu"}
    name = "int4pack" if isinstance(kernel, str) else kernel.name
    assert placement["backends"] == {"experts": {name: 4}, "linears": {"int4pack": 12}}
    codes = 2 * 8 * 3 * 128 * 128 // 2
    assert codes < placement["bytes"]["experts"] < codes * 1.3  # held once, in 4 bits
    assert placement["device_memory_limit"] == 10 * 2**30 and placement["load_seconds"] > 0
    assert model.hybrid_quantization["quant_method"] == "gptq"
    assert getattr(model.config, "quantization_config", None) is None
    assert model.dtype == torch.bfloat16 and model.name_or_path == str(everything)


def test_generation_equals_the_dense_model(everything):
    """Greedy, batched, with a cache: token for token, since float32 leaves no noise."""
    model = hybrid.load(everything, dtype=torch.float32, device="cpu")
    plain = dequantised(everything, torch.float32)
    ids = _ids(3, 11)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    got = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(got, plain.generate(ids, attention_mask=mask, **options))
    assert got.shape == (3, 23)


def test_padded_batches_score_like_single_ones(experts_only):
    """What an evaluation harness does: left-padded requests of unequal length, loss and logits."""
    model = hybrid.load(experts_only, dtype=torch.float32, device="cpu")
    long, short = _ids(1, 20), _ids(1, 13)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.int64), short], dim=1)
    ids = torch.cat([long, padded])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.inference_mode():
        both = model(input_ids=ids, attention_mask=mask)
        alone = model(input_ids=short, labels=short)
        full = model(input_ids=long).logits
    assert torch.allclose(both.logits[0], full[0], atol=1e-4)
    assert torch.allclose(both.logits[1, 7:], alone.logits[0], atol=1e-3)
    assert torch.isfinite(alone.loss)


def test_cached_steps_equal_one_pass(experts_only):
    model = hybrid.load(experts_only, dtype=torch.float32, device="cpu")
    ids = _ids(2, 9)
    with torch.inference_mode():
        whole = model(ids).logits
        cache = None
        for t in range(9):
            step = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            assert torch.allclose(step.logits[:, 0], whole[:, t], atol=1e-3)


def test_a_tied_head(damaged):
    tensors = load_file(damaged / NONEXPERT)
    del tensors["lm_head.weight"]
    save_file(tensors, damaged / NONEXPERT)
    _edit_json(
        damaged / "model.safetensors.index.json", lambda t: t["weight_map"].pop("lm_head.weight")
    )
    _edit_json(damaged / "config.json", lambda t: t.update(tie_word_embeddings=True))
    model = hybrid.load(damaged)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_generation_config_and_draft_head(damaged):
    """generation_config.json counts, multi-token-prediction tensors do not."""
    (damaged / "generation_config.json").write_text('{"max_new_tokens": 3, "do_sample": false}')
    tensors = load_file(damaged / NONEXPERT)
    tensors["mtp.fc.weight"] = torch.randn(4, 4)
    save_file(tensors, damaged / NONEXPERT)
    _edit_json(
        damaged / "model.safetensors.index.json",
        lambda t: t["weight_map"].update({"mtp.fc.weight": NONEXPERT}),
    )
    model = hybrid.load(damaged, device="cpu")
    assert model.generate(_ids(1, 4)).shape[1] <= 7


def test_foreign_scales_are_told_once(damaged, caplog):
    tensors = load_file(damaged / LAYER)
    for name, tensor in tensors.items():
        if name.endswith(".scales"):
            tensors[name] = (tensor.float() * (1 + torch.rand_like(tensor.float()) / 50)).half()
    save_file(tensors, damaged / LAYER)
    remarks.tell.cache_clear()  # other tests have loaded models before
    with caplog.at_level(logging.WARNING, "pipeline.hybrid"):
        hybrid.load(damaged, native=False)
        hybrid.load(damaged, native=False)
    told = [r.getMessage() for r in caplog.records]
    assert sum("rounded to bfloat16" in line for line in told) == 1
    assert sum("no GPU" in line for line in told) == (not torch.cuda.is_available())


@pytest.mark.parametrize("device", [None, "cpu"])
def test_memory_budget(experts_only, device, cpu_only):
    """Without a GPU: of what else goes with them on one, `test_ledger.py` tells."""
    need = hybrid.load(experts_only, device="cpu").hybrid_placement["bytes"]["dense"]
    with pytest.raises(ResourceError, match=f"allow {need:,} bytes or more"):
        hybrid.load(experts_only, device_memory=need - 1, device=device)
    hybrid.load(experts_only, device_memory=need, device=device)


def test_refusals(experts_only, damaged):
    with pytest.raises(UserError, match="use torch"):
        hybrid.load(experts_only, dtype=torch.float16)
    with pytest.raises(UserError, match="not a size"):
        hybrid.load(experts_only, device_memory="plenty")
    with pytest.raises(CheckpointError, match=r"experts are stored as nf4.*requantise"):
        hybrid.load(MICRO)
    with pytest.raises(UserError, match="cannot be saved"):
        hybrid.load(experts_only).save_pretrained(damaged)
    _edit_json(damaged / "config.json", lambda t: t.update(num_experts=0))
    with pytest.raises(CheckpointError, match="malformed: its sizes are impossible"):
        hybrid.load(damaged)
    _edit_json(damaged / "config.json", lambda t: t.update(model_type="gpt2"))
    with pytest.raises(CheckpointError, match="'gpt2' is not supported"):
        hybrid.load(damaged)


def test_remote_code_is_never_run(damaged):
    (damaged / "evil.py").write_text("raise SystemExit('ran')\n")
    _edit_json(
        damaged / "config.json",
        lambda t: t.update(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
    )
    with pytest.raises(CheckpointError, match="asks for code of its own"):
        hybrid.load(damaged)


def _spoil(path, name, change):
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("file", "name", "change", "error", "message"),
    [
        (NONEXPERT, "model.norm.weight", lambda t: t[:-1].clone(), CheckpointError, "model.norm"),
        (NONEXPERT, "model.norm.weight", lambda t: t * torch.inf, NumericalError, "model.norm"),
        (
            LAYER,
            "model.layers.1.mlp.experts.3.up_proj.scales",
            lambda t: t * torch.nan,
            NumericalError,
            "experts.3.up_proj",
        ),
        (
            LAYER,
            "model.layers.1.mlp.experts.2.down_proj.g_idx",
            lambda t: t.flip(0),
            CheckpointError,
            "layers.1.mlp.experts.2.down_proj.*g_idx",
        ),
    ],
)
def test_spoilt_tensors_are_named(damaged, *, file, name, change, error, message):
    _spoil(damaged / file, name, change)
    with pytest.raises(error, match=message):
        hybrid.load(damaged)


def test_missing_expert_is_named(damaged):
    stem = "model.layers.1.mlp.experts.7.up_proj."
    tensors = {k: v for k, v in load_file(damaged / LAYER).items() if not k.startswith(stem)}
    save_file(tensors, damaged / LAYER)
    _edit_json(
        damaged / "model.safetensors.index.json",
        lambda t: [t["weight_map"].pop(k) for k in list(t["weight_map"]) if k.startswith(stem)],
    )
    with pytest.raises(CheckpointError, match=r"experts\.7\.up_proj"):
        hybrid.load(damaged)


def _edit_json(path, change):
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def test_without_the_compiled_kernel(experts_only, monkeypatch, caplog):
    """torch's products serve, which is said, once, and not where they were asked for."""
    ids = _ids(2, 9)
    with torch.inference_mode():
        want = hybrid.load(experts_only, device="cpu")(ids).logits
    remarks.tell.cache_clear()
    monkeypatch.setattr("pipeline.hybrid.native.experts.find", lambda: "this test hides it")
    model = hybrid.load(experts_only, device="cpu")
    assert model.hybrid_placement["backends"]["experts"] == {"int4pack": 4}
    assert [r for r in model.hybrid_placement["remarks"] if "this test hides it" in r]
    hybrid.load(experts_only, device="cpu")
    assert sum("this test hides it" in record.getMessage() for record in caplog.records) == 1
    for quiet in ({"native": False}, {"dtype": torch.float32}):
        assert not hybrid.load(experts_only, device="cpu", **quiet).hybrid_placement["remarks"]
    with torch.inference_mode():
        apart = (model(ids).logits - want).norm(dim=-1) / want.norm(dim=-1)
    assert apart.median() < 0.05  # a router that is in two minds may send a token elsewhere
