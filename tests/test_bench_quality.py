"""The parts of scripts/bench_quality.py: reading peers' formats, running them, comparing rows."""

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch
from bench_quality import BEGIN, END, chosen, insert, packed_by_us
from quality import packers
from quality.compressed_tensors import to_dense
from quality.mended import mend
from quality.methods import METHODS, slug
from quality.rows import code_version, digest, reading_error, rewritten, run_measured, tree
from quality.table import (
    against_rounding,
    comparisons,
    difference,
    recovered,
    recovered_interval,
    table,
)
from safetensors.torch import save_file

from pipeline import __version__
from pipeline.checkpoint.reader import Checkpoint
from pipeline.errors import OutputError

BITS = 4


def packed_along(codes, dim):
    """Signed 4-bit codes [a, b] to int32 words along `dim`, eight a word, one by one in Python."""
    codes = codes.T if dim == 0 else codes
    words = [
        [
            sum((int(code) + 8) << (4 * i) for i, code in enumerate(row[start : start + 8]))
            for start in range(0, len(row), 8)
        ]
        for row in codes.tolist()
    ]
    result = torch.tensor(words, dtype=torch.int64).to(torch.uint32).view(torch.int32)
    return (result.T if dim == 0 else result).contiguous()


def packed_directory(folder, symmetric, group):
    """A pack-quantized directory of two experts and a norm, and the weights that it means."""
    generator = torch.Generator().manual_seed(group + symmetric)
    tensors = {"model.norm.weight": torch.randn(64, generator=generator).bfloat16()}
    weights = {}
    for name, (rows, columns) in {"gate": (16, 64), "down": (64, 32)}.items():
        codes = torch.randint(-8, 8, (rows, columns), generator=generator)
        scales = torch.rand(rows, columns // group, generator=generator).bfloat16()
        zeros = torch.randint(-8, 8, scales.shape, generator=generator)
        zeros = zeros * 0 if symmetric else zeros
        module = f"model.layers.0.mlp.experts.3.{name}_proj"
        tensors[f"{module}.weight_packed"] = packed_along(codes, 1)
        tensors[f"{module}.weight_scale"] = scales
        tensors[f"{module}.weight_shape"] = torch.tensor([rows, columns])
        if not symmetric:
            tensors[f"{module}.weight_zero_point"] = packed_along(zeros, 0)
        weights[module] = torch.tensor(
            [
                [
                    (codes[o, i] - zeros[o, i // group]).item() * scales[o, i // group].item()
                    for i in range(columns)
                ]
                for o in range(rows)
            ]
        )
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config = {"model_type": "qwen3_next", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors, weights


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32])
def test_compressed_tensors_become_dense(tmp_path, symmetric, group):
    tensors, weights = packed_directory(tmp_path / "packed", symmetric, group)
    to_dense(tmp_path / "packed", tmp_path / "dense")
    dense = Checkpoint.open(tmp_path / "dense")
    assert set(dense.weights) == {*(f"{m}.weight" for m in weights), "model.norm.weight"}
    for module, weight in weights.items():
        assert torch.equal(dense.load(f"{module}.weight"), weight)
    assert torch.equal(dense.load("model.norm.weight"), tensors["model.norm.weight"])
    assert "quantization_config" not in dense.config


def test_reading_is_held_against_the_peers_own(tmp_path):
    _, weights = packed_directory(tmp_path / "packed", False, 16)
    to_dense(tmp_path / "packed", tmp_path / "dense")
    save_file(weights, tmp_path / "own.safetensors")
    assert reading_error(tmp_path / "dense", tmp_path / "own.safetensors") == 0
    wrong = {module: weight * 1.5 for module, weight in weights.items()}
    save_file(wrong, tmp_path / "own.safetensors")
    error = reading_error(tmp_path / "dense", tmp_path / "own.safetensors")
    assert error == pytest.approx(1 / 3)


def test_what_a_peer_rewrote_is_named(tmp_path):
    norm, expert = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.experts.0.up.weight"
    for name, factor in {"source": 1.0, "peer": 0.5}.items():
        (tmp_path / name).mkdir()
        tensors = {norm: torch.ones(4) * factor, expert: torch.ones(4, 4) * factor}
        save_file(
            tensors | {"lm_head.weight": torch.ones(4)}, tmp_path / name / "model.safetensors"
        )
        (tmp_path / name / "config.json").write_text("{}")
    assert rewritten(tmp_path / "peer", tmp_path / "source") == ["input_layernorm.weight"]


def dense_directory(folder, tensors):
    """A directory of plain tensors."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_next"}))


def test_a_fold_without_the_router_is_mended(tmp_path):
    generator = torch.Generator().manual_seed(3)
    layer = "model.layers.0"
    post, first = f"{layer}.post_attention_layernorm.weight", f"{layer}.input_layernorm.weight"
    router, delta = f"{layer}.mlp.gate.weight", f"{layer}.linear_attn.norm.weight"
    source = {
        post: torch.randn(16, generator=generator) * 0.3,
        first: torch.rand(16, generator=generator) - 0.9,
        router: torch.randn(4, 16, generator=generator),
        delta: torch.rand(16, generator=generator),
    }
    scale = torch.rand(16, generator=generator) + 0.5
    folded = (1 + source[post]) / scale - 1
    rounded = (1 + source[first]).bfloat16().float() - 1
    dense_directory(tmp_path / "source", source)
    dense_directory(tmp_path / "peer", source | {post: folded, first: rounded})
    mend(tmp_path / "peer", tmp_path / "source", tmp_path / "mended")
    mended = Checkpoint.open(tmp_path / "mended")
    assert torch.equal(mended.load(first), source[first])
    assert torch.equal(mended.load(delta), source[delta])
    assert torch.equal(mended.load(post), folded)
    hidden = torch.randn(5, 16, generator=generator)
    before = (hidden * (1 + source[post])) @ source[router].T
    after = (hidden * (1 + mended.load(post))) @ mended.load(router).T
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-5)


def test_a_process_is_measured(tmp_path):
    code = "x = bytearray(300 << 20); sum(range(10 ** 6)); print('said')"
    ended = run_measured([sys.executable, "-c", code], os.environ, tmp_path / "log", 60)
    assert ended.error is None
    assert ended.peak_bytes > 300 << 20
    assert ended.cpu_seconds > 0
    assert (tmp_path / "log").read_text() == "said\n"


def test_a_peers_error_is_its_last_line(tmp_path):
    code = "raise ValueError('needs a GPU')"
    ended = run_measured([sys.executable, "-c", code], os.environ, tmp_path / "log", 60)
    assert ended.error == "ValueError: needs a GPU"


def test_a_peer_is_stopped_with_its_children(tmp_path):
    child = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    ended = run_measured([sys.executable, "-c", code], os.environ, tmp_path / "log", 1)
    assert ended.error == "stopped after 1 s"
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def made(method, perplexity, kl, peer=False, family="gptq", error=None):
    """A row on one text of four windows of ten tokens, all alike."""
    nll = torch.tensor(perplexity).log().item() * 10
    windows = {"count": [10] * 4, "nll": [nll] * 4, "kl": [kl * 10] * 4}
    found = {"source_perplexity": 8.0, "perplexity": perplexity, "kl": kl, "top1": 0.9}
    row = {"method": method, "group": 32, "family": family, "peer": peer, "error": error}
    row |= {"bytes": 10**6, "seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 2**30}
    return row if error else row | {"texts": {"in": found | {"windows": windows}}}


def test_ours_is_compared_with_the_best_peer_of_its_kind():
    rows = [
        made("rounding", 10.0, 0.04, family="rounding"),
        made("ours gptq", 9.0, 0.02),
        made("ours awq", 9.5, 0.03, family="awq"),
        made("A gptq", 9.2, 0.01, peer=True),
        made("B gptq", 9.4, 0.05, peer=True),
        made("B awq", 9.6, 0.06, peer=True, family="awq"),
        made("C", 0, 0, peer=True, family="autoround", error="needs a GPU"),
    ]
    lines = comparisons(rows).splitlines()[2:]
    assert lines == [
        "| 32 | ours gptq | in | KL, nats per token | A gptq"
        " | +0.01000 [+0.01000, +0.01000] | **worse** |",
        "| 32 | ours gptq | in | log perplexity | A gptq"
        " | -0.02198 [-0.02198, -0.02198] | better |",
        "| 32 | ours awq | in | KL, nats per token | B awq"
        " | -0.03000 [-0.03000, -0.03000] | better |",
        "| 32 | ours awq | in | log perplexity | B awq | -0.01047 [-0.01047, -0.01047] | better |",
    ]
    assert recovered(rows[1], rows[0], "in") == pytest.approx(0.5)
    assert difference(rows[0], rows[0], "in", "kl").estimate == 0
    source = {"bytes": 10**7, "texts": {"in": {"perplexity": 8.0}}}
    shown = table(rows, source)
    assert "| 32 | C | | failed: needs a GPU |" in shown
    assert "| 32 | ours gptq | in | 9.0000 | 1.1250 | 0.02000 | 0.9000 | 50% |" in shown


def test_what_is_won_back_of_roundings_loss_has_an_interval():
    generator = torch.Generator().manual_seed(1)
    hard = torch.rand(60, generator=generator) * 20 + 10
    source = {"texts": {"in": {"perplexity": 8.0, "windows": {"nll": hard.tolist()}}}}
    rows = []
    for method, lost in (("rounding", 0.4), ("ours gptq", 0.1)):
        row = made(method, 8.0, lost, family="rounding" if method == "rounding" else "gptq")
        noise = torch.randn(60, generator=generator) * 0.05
        windows = {"count": [10] * 60, "kl": [lost] * 60, "nll": (hard + lost + noise).tolist()}
        perplexity = float(torch.tensor(windows["nll"]).sum().div(600).exp())
        row["texts"]["in"] |= {"windows": windows, "perplexity": perplexity}
        row["texts"]["in"]["source_perplexity"] = float(hard.sum().div(600).exp())
        rows.append(row)
    low, high = recovered_interval(rows[1], rows[0], source, "in")
    share = recovered(rows[1], rows[0], "in")
    assert 0.6 < low < share < high < 0.9
    lines = against_rounding(rows, source).splitlines()
    assert lines[2:] == [
        "| 32 | ours gptq | in | symmetric | -0.03000 [-0.03000, -0.03000]"
        f" | {share:.0%} [{low:.0%}, {high:.0%}] |"
    ]
    rows[1]["family"] = "awq"
    assert len(against_rounding(rows, source).splitlines()) == 2, "no rounding of its kind"
    rows.append(rows[0] | {"method": "rounding asymmetric"})
    assert "| ours gptq | in | asymmetric |" in against_rounding(rows, source)


def test_rows_have_names_of_files():
    names = {slug(name, group) for name in METHODS for group in (32, 128)}
    assert len(names) == 2 * len(METHODS)
    assert all(Path(name).name == name and " " not in name for name in names)


def test_rows_are_chosen_by_name_and_by_kind():
    assert chosen("ours gptq, GPTQModel awq") == ["ours gptq", "GPTQModel awq"]
    assert "rounding" in chosen("ours") and "AutoRound" in chosen("peers")
    assert set(chosen("ours,peers")) == METHODS.keys() - {"source"}
    with pytest.raises(ArgumentTypeError, match="no row is called 'gtpq'"):
        chosen("gtpq")


def test_tables_go_between_the_marks_of_a_page(tmp_path):
    page = tmp_path / "quality.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    insert(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(OutputError, match="to put the tables into"):
        insert(page, "new")
    assert page.read_text() == "no marks"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout with a package that nothing has installed; the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("pipeline", "scripts/oracles"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "code.py").write_text("1\n")
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], check=True)
    return tmp_path


def test_our_version_is_the_codes_own_and_tells_of_changes(repository):
    clean = code_version()
    assert clean.startswith(f"requant {__version__}, pipeline/ of ")
    (repository / "pipeline" / "code.py").write_text("2\n")
    assert code_version() == f"{clean} and changes since"


def test_what_the_packers_oracles_said_is_kept_until_something_changes(repository):
    """The oracles themselves need environments of their own: here only what is kept of them."""
    assert "not been checked" in packers.known(repository).text
    result = repository / "models" / slug("ours awq", 32)
    result.mkdir(parents=True)
    (result / "SHA256SUMS").write_text("0  model.safetensors\n")
    (repository / "models" / slug("rounding", 32)).mkdir()
    assert packed_by_us(repository) == [result]
    made_from = digest(tree("pipeline"), tree("scripts/oracles"), "0  model.safetensors\n")
    record = {"made_from": made_from, "output": "one\ntwo", "failed": True, "by": "requant 7"}
    (repository / packers.RECORD).write_text(json.dumps(record))
    said = packers.check(repository, [result])
    assert said.failed
    assert "requant 7" in said.text
    assert said.text.endswith("\n\n    one\n    two")
