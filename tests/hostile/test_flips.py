"""A single flipped bit, anywhere in a finished directory, is found."""

import json
import random
import shutil

import pytest
from flip_bits import Flip, flipped, flips

from pipeline.checkpoint.seal import edited_card, seal_problems
from pipeline.checkpoint.sums import check_sums
from pipeline.stages.verify import verify_model


@pytest.fixture
def model(finished, tmp_path):
    """A copy to be spoilt."""
    return shutil.copytree(finished.output, tmp_path / "out")


def seals_fit(model):
    """The part of a verification that reads no value; the rest can only find more."""
    return not check_sums(model) and not seal_problems(model) and edited_card(model) is None


def test_a_thousand_flips(model):
    assert seals_fit(model)
    seed = random.randrange(1 << 32)
    missed = [
        flip
        for flip in flips(model, 1000, random.Random(seed))
        if flipped(model, flip, lambda: seals_fit(model))
    ]
    assert missed == [], seed
    assert seals_fit(model) and verify_model(model) == []


def test_every_bit_of_the_seals_and_recipes(model):
    """Where a bit can turn one spelling into another: hexadecimal digits, ends of lines, spaces."""
    rng = random.Random(0)
    for name in ("SHA256SUMS", "conversion.json", "report.json", "recipe.yaml"):
        data = (model / name).read_bytes()
        spaces = [i for i, byte in enumerate(data) if byte in b" \n"]
        letters = [i for i, byte in enumerate(data) if byte in b"abcdefE+-."]
        for position in rng.sample(spaces, 8) + rng.sample(letters, 8):
            for bit in range(8):
                flip = Flip(name, position, bit)
                assert not flipped(model, flip, lambda: seals_fit(model)), flip


def test_the_report_records_what_could_change_it(model):
    machine = json.loads((model / "report.json").read_text())["machine"]
    made = json.loads((model / "conversion.json").read_text())["fingerprint"]
    assert machine["tf32"] == "off" and machine["threads"] == made["threads"] == 1
    for name in ("torch", "transformers", "bitsandbytes", "requant"):
        assert machine[name] == made["versions"][name]
    for name in ("python", "numpy", "cuda", "device", "cpu_capability", "float32_products"):
        assert machine[name]
    assert made["device"] and made["solver"] and "cuda" in made["float32_products"]


def test_what_is_said_of_each_file(model, cli):
    """A problem and exit code 1; for a card, which may be edited, a remark."""
    for name in sorted(path.name for path in model.iterdir()):
        flip = Flip(name, (model / name).stat().st_size // 2, 0)
        answer = []
        flipped(model, flip, lambda answer=answer: answer.append(cli("verify", model)))
        assert answer[0].code == (0 if name == "README.md" else 1), answer
        assert name in answer[0].out
    assert cli("verify", model).code == 0
