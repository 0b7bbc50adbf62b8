"""Why the pipeline exists: transformers 5 cannot open the source, and the pipeline can.

If the first test fails because loading works, the README's account of the problem is out of date.
"""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from pipeline.checkpoint.reader import Checkpoint

SOURCE = Path(__file__).parents[1] / "models" / "micro-nf4"
EXPERT = "model.layers.0.mlp.experts.5.down_proj.weight"


@pytest.fixture
def load_report(caplog):
    """What transformers logs, which it otherwise keeps from other handlers."""
    transformers_logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield caplog
    transformers_logging.disable_propagation()


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}])
def test_transformers_5_refuses_the_nf4_source(options, load_report):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(SOURCE, **options)
    # It stacks the packed bytes of each expert as if they were weights, and finds no place for the
    # tensors without which they cannot be decoded.
    report = {line.split("|")[0].strip(): line for line in load_report.text.splitlines()}
    experts = "model.layers.{0, 1}.mlp.experts."
    assert "MISMATCH" in report[f"{experts}gate_up_proj"]
    assert "MISMATCH" in report[f"{experts}down_proj"]
    assert "UNEXPECTED" in report[f"{experts}down_proj.absmax"]
    assert "UNEXPECTED" in report[f"{experts}gate_up_proj.quant_state.bitsandbytes__nf4"]
    # The router is no nn.Linear any more, so its packed form has no place to go either.
    assert "MISMATCH" in report["model.layers.{0, 1}.mlp.gate.weight"]


def test_told_to_ignore_the_mismatch_it_invents_the_experts(load_report):
    first, second = (
        AutoModelForCausalLM.from_pretrained(SOURCE, ignore_mismatched_sizes=True)
        .model.layers[0]
        .mlp.experts.down_proj.detach()
        .float()
        for _ in range(2)
    )
    assert not torch.equal(first, second), "two loadings of one file, two different models"
    stored = Checkpoint.open(SOURCE).load(EXPERT, dtype=torch.float32)
    assert (first[5].cpu() - stored).norm() > 0.5 * stored.norm()


def test_the_pipeline_reads_the_same_file():
    weight = Checkpoint.open(SOURCE).load(EXPERT, dtype=torch.float32)
    assert weight.shape == (128, 128)
    # NF4: at most 16 levels in a block of 64 weights.
    levels = [block.unique().numel() for block in weight.reshape(-1, 64)]
    assert 2 < max(levels) <= 16
