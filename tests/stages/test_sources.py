"""Sources beyond NF4, converted whole: bf16 as transformers 5 saves it, block FP8."""

import json

import pytest
import torch
from support.variants import bf16_source, fp8_source

from pipeline.checkpoint import Checkpoint

MAKE = {
    "bf16": bf16_source,
    "fp8": fp8_source,
}


@pytest.mark.parametrize(("kind", "said"), [("bf16", "dense BF16"), ("fp8", "fp8")])
def test_a_whole_conversion(project, micro, tmp_path, cli, kind, said):
    source = MAKE[kind](micro, tmp_path / "source")
    inspected = json.loads(cli("inspect", source, "--json").out)
    assert said in inspected["formats"] and inspected["expert_layout"] == "one by one"
    project.change(source={"model": str(source)})
    answer = cli("run", project.write())
    assert answer.code == 0, answer.err
    report = project.report()
    assert report["passed"] and 0.9 < report["perplexity_ratio"] < 1.1
    assert report["experts"]["fallback"] == 0
    assert report["baseline"] == f"{source} as stored ({said})"
    assert cli("verify", project.output).code == 0
    config = json.loads((project.output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    # What is not quantised passes through to the bit.
    ours, theirs = Checkpoint.open(project.output), Checkpoint.open(source)
    name = "model.layers.0.mlp.gate.weight"
    assert torch.equal(ours.load(name), theirs.load(name))
