"""What `generate` cannot do as asked: one line, exit code 2, and nothing left in memory."""

import gc
import json
import shutil
import subprocess
import sys

import psutil
import pytest
import torch

from pipeline import hybrid
from pipeline.errors import ResourceError
from pipeline.hybrid import roads

pytestmark = pytest.mark.usefixtures("one_thread", "cpu_only")


@pytest.fixture
def model(finished, tmp_path):
    return shutil.copytree(finished.output, tmp_path / "model")


@pytest.fixture
def refused(cli, model):
    """`requant generate` fails as it should; returns the line that it said."""

    def run(*options):
        answer = cli("generate", model, "--prompt", "the value", "--max-new-tokens", 2, *options)
        lines = answer.err.splitlines()
        assert (answer.code, len(lines), answer.out) == (2, 1, ""), answer
        assert lines[0].startswith("requant: ")
        return lines[0]

    return run


def _memory(monkeypatch, available):
    found = psutil.virtual_memory()._replace(available=available)
    monkeypatch.setattr(roads.psutil, "virtual_memory", lambda: found)


def test_ram_too_small(refused, monkeypatch):
    _memory(monkeypatch, 1 << 10)
    line = refused()
    assert "of RAM" in line and "are allowed or available: free some" in line


def test_nothing_stays_when_memory_does_not_suffice(model):
    """Refused before anything of it is read."""
    before = sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor)
    with pytest.raises(ResourceError, match="experts need"):
        hybrid.load(model, host_memory=1000)
    gc.collect()
    assert sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor) <= before


def test_budget_below_the_rest(refused):
    line = refused("--device-memory", "10KiB")
    assert "weights outside the experts need" in line and "bytes or more" in line


def test_no_gpu(refused):
    line = refused("--placement", "resident")
    assert "need a GPU" in line and "use placement cpu or auto" in line


def test_checksums(refused, model):
    file = model / "model-experts-layer-001.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    line = refused("--verify")
    assert file.name in line and "SHA-256" in line and "requant verify" in line


def test_unknown_architecture(refused, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "'gpt2' is not supported" in refused()


def test_without_triton(model):
    """A GPU's driver that Triton does not run on: the CPU computes, which is said.

    In a process of its own, where Triton cannot be imported and the device is said to be a GPU.
    """
    script = """
import sys, torch
sys.modules["triton"] = None
from pipeline.checkpoint.shard_map import LayerExperts
from pipeline.hybrid.roads import choose
table, remarks = choose("zero-copy", {0: LayerExperts(4, 10)}, torch.device("cuda"))
assert table == {0: ["cpu"] * 4}
print(*remarks)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said = run.stdout.strip()
    assert said.startswith("Triton cannot be used, the CPU computes all experts: ")
    assert "triton" in said.partition(": ")[2] and "\n" not in said
