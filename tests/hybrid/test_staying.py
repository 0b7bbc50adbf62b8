"""A model that stays loaded: many tokens, two models at once, sequences side by side."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hybrid_models import EVERYTHING, MODELS, write_output

from pipeline import hybrid
from pipeline.quantize.tensor import AffineScheme

pytestmark = pytest.mark.usefixtures("one_thread", "cpu_only")

SCRIPT = Path(__file__).parents[2] / "scripts" / "many_tokens.py"


def _directory(folder, scheme):
    return write_output(MODELS / "micro-nf4", folder, scheme, EVERYTHING)


def _generate(model, ids, tokens):
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)


def test_two_models_in_turn(tmp_path):
    """Each goes on as if it were alone, and gives back what it took."""
    schemes = AffineScheme(4, 32, True), AffineScheme(8, 64, False)
    paths = [_directory(tmp_path / str(s.bits), s) for s in schemes]
    ids = torch.randint(5, 512, (3, 9))
    models = [hybrid.load(p, dtype=torch.float32, device="cpu") for p in paths]
    alone = [_generate(model, ids, 6) for model in models]
    together = [_generate(model, ids, 6) for model in (*models, models[0])]
    assert torch.equal(together[0], alone[0]) and torch.equal(together[2], alone[0])
    assert torch.equal(together[1], alone[1])
    each = _generate(models[0], ids[1:2], 6)
    assert torch.equal(each[0], alone[0][1])  # and a sequence is not touched by its neighbours
    taken = models[0].hybrid_placement["bytes"]["experts"]
    assert taken > 0
    del models, alone, together, each
    gc.collect()
    modules = ("HybridExperts", "NativeExperts")
    assert not any(type(o).__name__ in modules for o in gc.get_objects())


def test_many_tokens_leak_nothing(tmp_path):
    """In a process of its own, so that no other test's memory is counted."""
    path = _directory(tmp_path, AffineScheme(4, 32, True))
    command = [sys.executable, SCRIPT, path, "--tokens", "400"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "400 tokens" in run.stdout
