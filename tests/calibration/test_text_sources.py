"""Sources of every kind: the records they give, how they are mixed, what is refused."""

import json
import random
import re

import pyarrow
import pyarrow.parquet
import pytest
import torch

from pipeline.calibration import (
    TextSource,
    calibration_sequences,
    check_source,
    digest,
    load_tokenizer,
    tokenize,
)
from pipeline.calibration.source import BUILTIN_FOLDER, records
from pipeline.errors import CalibrationError

WORDS = ["the", "of", "and", "list", "table", "index", "row", "column", "class", "method", "data"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)


def words(count):
    return " ".join(random.choices(WORDS, k=count))


@pytest.fixture
def tokenizer(micro):
    tokenizer = load_tokenizer(micro)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path, values, field="text"):
    """Records of one field, in the form that the ending says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({field: values, "id": range(len(values))}), path)
    else:
        lines = [json.dumps({"id": i, field: value}) for i, value in enumerate(values)]
        path.write_text("\n".join(lines) + "\n")
    return str(path)


def chats(count):
    said = [[("user", words(5)), ("assistant", words(30))] for _ in range(count)]
    return [[{"role": role, "content": text} for role, text in chat] for chat in said]


def sample(tokenizer, *sources, **change):
    options = {"samples": 6, "length": 40, "seed": 3} | change
    return calibration_sequences(tokenizer, sources, **options)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_packed_records_follow_one_another(tokenizer, tmp_path, ending):
    values = [words(random.randint(0, 90)) for _ in range(30)]
    path = write(tmp_path / f"a{ending}", values, "body")
    taken = sample(tokenizer, TextSource(file=path, column="body"))
    stream = [t for v in values if v for t in tokenize(tokenizer, v + "\n\n").tolist()]
    pieces = [tuple(stream[i : i + 40]) for i in range(0, len(stream) - 39, 40)]
    assert taken.shape == (6, 40)
    assert {tuple(row) for row in taken.tolist()} <= set(pieces[: 8 * 6])
    assert torch.equal(taken, sample(tokenizer, TextSource(file=path, column="body")))


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_without_packing_a_record_gives_its_beginning(tokenizer, tmp_path, ending):
    values = [words(n) for n in (3, 100, 5, 90, 80)]
    path = write(tmp_path / f"a{ending}", values)
    taken = sample(tokenizer, path, samples=3, packing=False)
    begun = {tuple(tokenize(tokenizer, v)[:40].tolist()) for v in values if len(v) > 200}
    assert {tuple(row) for row in taken.tolist()} == begun
    with pytest.raises(CalibrationError, match=r"a\..*: 3 sequences of 40 tokens \(records short"):
        sample(tokenizer, path, samples=4, packing=False)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_chats_go_through_the_template(tokenizer, tmp_path, ending):
    values = chats(20)
    path = write(tmp_path / f"a{ending}", values, "messages")
    taken = sample(tokenizer, TextSource(file=path, chat=True))
    text = "".join(f"<{m['role']}>{m['content']}\n" for chat in values for m in chat)
    whole = tokenizer.decode(tokenize(tokenizer, text))
    for row in taken:
        assert tokenizer.decode(row)[3:-3] in whole  # the ends may cut a character


def test_builtin(tokenizer):
    path = BUILTIN_FOLDER / "ood-eval.txt"
    assert torch.equal(
        sample(tokenizer, TextSource(builtin="ood-eval")), sample(tokenizer, str(path))
    )
    for name in ("gone", "../README", ""):
        with pytest.raises(CalibrationError, match=r"no built-in text .*; known: .*docs-calib"):
            check_source(TextSource(builtin=name))


def test_weights_share_out_the_sequences(tokenizer, tmp_path):
    marks = ["alpha", "omega", "gamma"]
    sources = []
    for mark, weight in zip(marks, (3, 1, 0), strict=True):
        path = tmp_path / f"{mark}.txt"
        path.write_text(f"{mark} " * 3000)
        sources.append(TextSource(file=str(path), weight=weight))

    def counts(taken):
        texts = [tokenizer.decode(row) for row in taken]
        return [sum(mark in text for text in texts) for mark in marks]

    taken = sample(tokenizer, *sources, samples=10)
    assert counts(taken) == [8, 2, 0]  # 7.5 and 2.5: the earlier source gets the odd one
    assert counts(sample(tokenizer, *sources, samples=40)) == [30, 10, 0]
    assert digest(taken) == digest(sample(tokenizer, *sources, samples=10))
    # One weight is enough: the others count 1.
    plain = [sources[0], TextSource(file=sources[1].file)]
    assert counts(sample(tokenizer, *plain, samples=40)) == [30, 10, 0]
    with pytest.raises(CalibrationError, match="the weights sum to nothing"):
        sample(tokenizer, *(TextSource(file=s.file, weight=0) for s in sources))
    with pytest.raises(CalibrationError, match=r"omega.txt: \d+ sequences of 5000 tokens, 6 were"):
        sample(tokenizer, sources[0], TextSource(file=sources[1].file, weight=999), length=5000)


def test_the_seed_decides_every_source(tokenizer, tmp_path):
    sources = []
    for i in range(2):
        path = write(tmp_path / f"{i}.jsonl", [words(60) for _ in range(60)])
        sources.append(TextSource(file=path, weight=1))
    digests = {digest(sample(tokenizer, *sources, seed=seed)) for seed in range(4)}
    assert len(digests) == 4


def _bad_line(line):
    return lambda path: path.write_bytes(b'{"text": "a b"}\n\n{"text": "c"}\n' + line + b"\n")


BAD = {
    "field": (
        _bad_line(b'{"body": 1, "id": 2}'),
        "record 3: has no field 'text'; it has: body, id",
    ),
    "json": (_bad_line(b'{"text": '), "record 3: is not JSON (Expecting value, column 9)"),
    "utf-8": (_bad_line(b'{"text": "\xff"}'), "record 3: is not UTF-8 (byte 10 of the line)"),
    "object": (_bad_line(b"[1]"), "record 3: is no object with fields"),
    "number": (_bad_line(b'{"text": 7}'), "record 3: 'text' is no text but int"),
    "chat": (_bad_line(b'{"text": []}'), "record 3: 'text' is no text but list; set chat: true"),
    "nothing": (lambda path: path.write_text("\n"), "a.jsonl is empty"),
    "blank": (lambda path: path.write_text('{"text": " "}'), "a.jsonl: every 'text' is empty"),
    "missing": (lambda path: None, "a.jsonl does not exist"),
    "directory": (lambda path: path.mkdir(), "a.jsonl cannot be read: Is a directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records(tokenizer, tmp_path, case):
    spoil, said = BAD[case]
    path = tmp_path / "a.jsonl"
    spoil(path)
    with pytest.raises(CalibrationError, match=re.escape(said)) as error:
        sample(tokenizer, str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_bad_parquet(tokenizer, tmp_path):
    path = write(tmp_path / "a.parquet", ["a"])
    with pytest.raises(CalibrationError, match=r"a\.parquet: has no column 'x'; it has: text, id"):
        check_source(TextSource(file=path, column="x"))
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(CalibrationError, match=r"b.parquet cannot be read as parquet: .*footer"):
        sample(tokenizer, str(tmp_path / "b.parquet"))
    with pytest.raises(CalibrationError, match=r"c.parquet does not exist"):
        check_source(TextSource(file=str(tmp_path / "c.parquet")))


MESSAGE = {"role": "user", "content": "value"}
BAD_CHATS = {
    "text": ("value", "'messages' is no list of messages"),
    "nobody": ([], "'messages' is no list of messages"),
    "no role": ([{"content": "a"}], "messages[0] has no text under 'role'"),
    "no content": ([MESSAGE, {"role": "user", "content": None}], "messages[1] has no text under"),
    "words": ([MESSAGE, "value"], "messages[1] has no text under 'role'"),
    "refused": ([MESSAGE, {**MESSAGE, "role": "tool"}], "template refuses it (no tools here)"),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_bad_chats(tokenizer, tmp_path, case):
    value, said = BAD_CHATS[case]
    path = write(tmp_path / "a.jsonl", [[MESSAGE], value], "messages")
    with pytest.raises(CalibrationError) as error:
        sample(tokenizer, TextSource(file=path, chat=True))
    assert f"{path}, record 2: " in str(error.value) and said in str(error.value)


def test_no_template(micro, tmp_path):
    path = write(tmp_path / "a.jsonl", chats(2), "messages")
    with pytest.raises(CalibrationError, match=f"tokenizer of {micro} has no chat template"):
        sample(load_tokenizer(micro), TextSource(file=path, chat=True))


def test_templates_run_in_a_sandbox(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ messages.__class__.__mro__[-1].__subclasses__() }}"
    path = write(tmp_path / "a.jsonl", chats(2), "messages")
    with pytest.raises(CalibrationError, match=r"record 1: the chat template refuses it .*unsafe"):
        sample(tokenizer, TextSource(file=path, chat=True))


def test_records_are_read_as_they_are_needed(tmp_path):
    """A bad record after those that are wanted is nobody's concern."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nbroken\n')
    assert next(iter(records(TextSource(file=str(path))))).value == "a"
