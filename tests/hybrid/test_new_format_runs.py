"""The hybrid runtime runs whatever storage format gives quantised matrices."""

import json

import torch
from hybrid_models import EVERYTHING, MODELS, write_output
from safetensors.torch import save_file
from support import toy_format

from pipeline import hybrid
from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint.index import build_index
from pipeline.checkpoint.writer import write_json
from pipeline.quantize.tensor import AffineScheme


def test_a_registered_format_runs(tmp_path, monkeypatch, one_thread):
    gptq = write_output(
        MODELS / "micro-nf4", tmp_path / "gptq", AffineScheme(4, 32, True), also=EVERYTHING
    )
    toy = tmp_path / "toy"
    _rewrite(gptq, toy)
    toy_format.register(monkeypatch)
    ids = torch.randint(5, 512, (2, 9))
    models = [hybrid.load(path, device="cpu") for path in (gptq, toy)]
    with torch.inference_mode():
        first, second = (model(ids).logits for model in models)
    assert torch.equal(first, second)
    backends = [model.hybrid_placement["backends"] for model in models]
    assert backends[0] == backends[1]


def _rewrite(source, target):
    """The same matrices in the toy format."""
    checkpoint = Checkpoint.open(source)
    tensors = {}
    for name in checkpoint.weights:
        if checkpoint.is_packed(name):
            matrix = checkpoint.load_quantized([name])[0]
            tensors |= toy_format.toy_parts(name.removesuffix(".weight"), matrix)
        else:
            tensors[name] = checkpoint.load(name)
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "toy", "bits": 4}
    write_json(target / "config.json", config)
    save_file(tensors, target / "model.safetensors")
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    write_json(target / "model.safetensors.index.json", build_index({"model.safetensors": sizes}))
