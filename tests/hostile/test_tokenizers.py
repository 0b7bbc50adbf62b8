"""A tokenizer's expressions are a stranger's: no endless loop, no memory without end, no crash."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline.calibration import load_tokenizer, tokenize, tokens
from pipeline.errors import CheckpointError

SLOW = {"type": "Replace", "pattern": {"Regex": r"(?:\w+\W+)+\w+[!?]"}, "content": "x"}
"""The square of a text's length: hours for a megabyte."""
WORDS = "all of these words are read again from every place " * 4000 + " !"
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BOMB = {"type": "Sequence", "normalizers": [DOUBLE] * 40}
"""A terabyte for every a."""


@pytest.fixture
def changed(micro, tmp_path):
    """`changed(**parts)`: the micro model with other parts of its tokenizer.json."""

    def change(**parts):
        model = shutil.copytree(micro, tmp_path / "model")
        path = model / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | parts))
        return model

    return change


def test_it_says_what_transformers_says(micro, texts):
    ours, theirs = load_tokenizer(micro), AutoTokenizer.from_pretrained(micro)
    text = texts["evaluation"].read_text() + " \U0001f600 <|endoftext|> \u00fc\0"
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenize(ours, text).tolist() == ids
    assert ours.ids("") == []
    assert ours.ids(text, special=True) == theirs(text)["input_ids"]
    for skip in (False, True):
        spelt = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip_special_tokens=skip) == spelt
    assert ours.vocabulary() == theirs.get_vocab()
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template


def test_an_expression_without_end_is_stopped(changed, monkeypatch):
    tokenizer = load_tokenizer(changed(normalizer=SLOW))
    assert tokenizer.ids("a few words")
    monkeypatch.setattr(tokens, "SECONDS", 0.5)
    monkeypatch.setattr(tokens, "CHARACTERS_A_SECOND", 1 << 30)
    with pytest.raises(CheckpointError, match=r"204,002 characters \(it takes longer than 1 s; it"):
        tokenizer.ids(WORDS)
    with pytest.raises(CheckpointError, match="a text of 1 characters"):
        tokenizer.ids("a")  # its process has ended
    assert not tokenizer._process.is_alive()


def test_one_that_loads_without_end_is_stopped(changed, monkeypatch):
    """Tokens that are added go through the normalizer when the tokenizer is loaded."""
    token = {"id": 1, "content": WORDS, "normalized": True, "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    model = changed(normalizer=SLOW, added_tokens=[token | flags])
    monkeypatch.setattr(tokens, "SECONDS", 3.0)
    with pytest.raises(CheckpointError, match=r"cannot be loaded \(it takes longer than 3 s"):
        load_tokenizer(model)


def test_memory_without_end_is_refused(changed, monkeypatch):
    monkeypatch.setattr(tokens, "MEMORY_BYTES", 1 << 28)
    tokenizer = load_tokenizer(changed(normalizer=BOMB))
    assert tokenizer.ids("b")
    with pytest.raises(CheckpointError, match=r"its process ended; .* 0\.25 GiB that it"):
        tokenizer.ids("a")


def test_an_expression_that_is_none(changed):
    bad = {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded") as caught:
        load_tokenizer(changed(normalizer=bad))
    assert "\n" not in str(caught.value)


def test_its_process_ends_with_it_and_holds_nothing_of_ours(micro, tmp_path):
    with (tmp_path / "file").open("w") as ours:
        tokenizer = load_tokenizer(micro)
        process = tokenizer._process
        files = [path.readlink() for path in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert Path(ours.name) not in files
    del tokenizer
    assert not process.is_alive()


def test_its_process_ends_with_a_parent_that_is_killed(micro):
    code = (
        "import os; from pathlib import Path; from pipeline.calibration import load_tokenizer;"
        f"t = load_tokenizer(Path({str(micro)!r}));"
        "print(t._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 60
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_in_a_conversion(project, changed, cli, monkeypatch):
    """The line that a user reads, and nothing written."""
    monkeypatch.setattr(tokens, "SECONDS", 3.0)
    monkeypatch.setattr(tokens, "CHARACTERS_A_SECOND", 1 << 30)
    (project.folder / "text.txt").write_text(WORDS)
    project.change(
        source={"model": str(changed(normalizer=SLOW))},
        calibration={"sources": [str(project.folder / "text.txt")]},
    )
    answer = cli("run", project.write())
    assert answer.code == 2 and len(answer.err.splitlines()) == 1
    assert "the tokenizer cannot read a text of 204,002 characters (it takes longer" in answer.err
    assert not project.partial.exists()
