"""What the hybrid bench gives to other runtimes is what ours computes with."""

import numpy as np
import pytest
import torch
from hybrid_peers import table
from hybrid_peers.gguf_arrays import q4_0, split_qkvz
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.options import SolverOptions
from pipeline.quantize.tensor import AffineScheme


def quantised(group, symmetric=True):
    options = SolverOptions(scale_search=False)
    scheme = AffineScheme(4, group, symmetric)
    return QUANTIZERS["rtn"].quantize(torch.randn(2, 5, 96), None, scheme, options).quantized


def test_blocks_of_q4_0_hold_the_very_same_values():
    given = quantised(32)
    blocks = q4_0(given).numpy().reshape(2, 5, 3, 18)
    scales = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    values = torch.from_numpy((codes.astype(np.float32) - 8) * scales).reshape(2, 5, 96)
    assert torch.equal(values, given.dequantize())


@pytest.mark.parametrize(("group", "symmetric"), [(96, True), (32, False)])
def test_what_is_no_block_of_q4_0_is_refused(group, symmetric):
    with pytest.raises(ValueError, match="no blocks of Q4_0"):
        q4_0(quantised(group, symmetric))


def test_rows_of_qkvz_are_told_apart_as_transformers_does_it():
    config = Qwen3NextConfig(
        hidden_size=24,
        linear_num_key_heads=3,
        linear_num_value_heads=6,
        linear_key_head_dim=8,
        linear_value_head_dim=16,
    )
    delta = Qwen3NextGatedDeltaNet(config, layer_idx=0)
    rows, x = delta.in_proj_qkvz.weight.detach(), torch.randn(1, 4, 24)
    want = delta.fix_query_key_value_ordering(x @ rows.T, torch.zeros(1, 4, 12))
    mixed, gate = split_qkvz(rows, config)
    queries, keys, values, z, *_ = (part.flatten(2) for part in want)
    torch.testing.assert_close(x @ mixed.T, torch.cat([queries, keys, values], dim=-1))
    torch.testing.assert_close(x @ gate.T, z)


def test_a_peer_without_its_environment_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(table, "LLAMA", tmp_path / "python")
    sides = table._prepared("llama.cpp", str(tmp_path), 1)
    assert len(sides) == 2
    assert "make_llama_env.sh makes its environment" in capsys.readouterr().out


def test_a_side_that_fails_is_told_and_passed_over(capsys):
    assert table._run(["python3", "-c", "raise SystemExit('no such model')"]) == []
    assert "no such model" in capsys.readouterr().out
