"""Texts into sequences."""

import random
import shutil

import pytest
import torch

from pipeline.calibration import (
    calibration_sequences,
    digest,
    load_tokenizer,
    read_text,
    tokenize,
)
from pipeline.errors import CalibrationError, CheckpointError


@pytest.fixture(scope="module")
def tokenizer(micro):
    return load_tokenizer(micro)


def _sequences(tokenizer, texts, **change):
    options = {"samples": 6, "length": 50, "seed": 3} | change
    return calibration_sequences(tokenizer, [str(path) for path in texts.values()], **options)


def test_sequences_are_disjoint_pieces_of_the_texts(tokenizer, texts):
    taken = _sequences(tokenizer, texts, samples=40)
    assert taken.shape == (40, 50) and taken.dtype == torch.int64
    pieces = []
    for path in texts.values():
        tokens = tokenize(tokenizer, path.read_text()).tolist()
        pieces += [tuple(tokens[i : i + 50]) for i in range(0, len(tokens) - 49, 50)]
    found = [tuple(row) for row in taken.tolist()]
    assert set(found) <= set(pieces) and len(set(found)) == 40


def test_the_seed_decides(tokenizer, texts):
    first = _sequences(tokenizer, texts)
    assert torch.equal(first, _sequences(tokenizer, texts))
    assert not torch.equal(first, _sequences(tokenizer, texts, seed=4))
    assert digest(first) == digest(first.clone()) != digest(_sequences(tokenizer, texts, seed=4))


def test_a_text_too_short_for_one_sequence_adds_none(tokenizer, texts, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("value")
    both = {"short": short, **texts}
    assert torch.equal(_sequences(tokenizer, both), _sequences(tokenizer, texts))
    with pytest.raises(CalibrationError, match=r"short.txt: not one sequence of 50 tokens"):
        _sequences(tokenizer, {"short": short})


def test_exactly_as_many_as_there_are(tokenizer, texts):
    count = sum(len(tokenize(tokenizer, p.read_text())) // 50 for p in texts.values())
    assert len(_sequences(tokenizer, texts, samples=count)) == count
    with pytest.raises(
        CalibrationError, match=rf"{count} sequences of .* calibration.samples={count}, shorten"
    ):
        _sequences(tokenizer, texts, samples=count + 1)


def test_no_special_tokens_and_no_warning_for_long_texts(tokenizer, recwarn, caplog):
    ids = tokenize(tokenizer, "value of the list " * 3000)
    assert len(ids) > 1024 and int(ids.min()) > 0
    assert not caplog.records and not recwarn.list


def test_text_is_read_as_it_is(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("Zeile\r\nzwei \u00fc".encode())
    assert read_text(str(path)) == "Zeile\r\nzwei \u00fc"


def test_code_of_a_model_is_never_run(micro, tmp_path):
    """A tokenizer that wants code of its own is refused or ignored, in one line."""
    model = shutil.copytree(micro, tmp_path / "model")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    (model / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}'
    )
    try:
        load_tokenizer(model)
    except CheckpointError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


def test_plain_texts_give_the_tokens_that_they_always_gave(tokenizer, texts):
    """Recipes of the first version keep their digest: cut every text, draw from all pieces."""
    pieces = []
    for path in texts.values():
        tokens = tokenize(tokenizer, path.read_text())
        pieces += [tokens[i : i + 50] for i in range(0, len(tokens) - 49, 50)]
    for seed in (0, 3):
        drawn = random.Random(seed).sample(range(len(pieces)), 6)
        expected = torch.stack([pieces[i] for i in drawn])
        assert digest(_sequences(tokenizer, texts, seed=seed)) == digest(expected)
