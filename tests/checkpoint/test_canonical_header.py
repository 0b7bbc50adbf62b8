"""Headers and indexes read as columns: what JSON says, and nothing that JSON refuses."""

from __future__ import annotations

import json
import random

import pytest

from pipeline.checkpoint.canonical import parse_canonical, parse_index
from pipeline.checkpoint.header import _parse_any
from pipeline.checkpoint.stored import DTYPES
from pipeline.checkpoint.untrusted import parse_table
from pipeline.errors import CheckpointError

ALPHABET = '"{}[],:0123456789 \\/abdhpstyF_.é\n'


def header(rng: random.Random, tensors: int, metadata: str) -> str:
    """A sound header with tensors of all types and of 0 to 4 dimensions, not all in order."""
    entries = []
    place = 0
    for number in range(tensors):
        dtype = rng.choice(sorted(DTYPES))
        shape = [rng.randrange(4) for _ in range(rng.randrange(5))]
        size = DTYPES[dtype].itemsize
        for dimension in shape:
            size *= dimension
        entries.append(
            f'"layers.{number}.w":{{"dtype":"{dtype}","shape":{shape},'
            f'"data_offsets":[{place},{place + size}]}}'.replace(", ", ",")
        )
        place += size
    rng.shuffle(entries)
    return "{" + metadata + ",".join(entries) + "}" + " " * rng.randrange(8)


@pytest.mark.parametrize("metadata", ["", '"__metadata__":{"format":"pt"},', '"__metadata__":{},'])
def test_a_sound_header_is_read_as_json_reads_it(metadata: str) -> None:
    rng = random.Random(metadata)
    for tensors in range(1, 40):
        text = header(rng, tensors, metadata).encode()
        assert parse_canonical(text, "file") == _parse_any(text, "file")


def test_whatever_is_taken_for_sound_is_so() -> None:
    rng = random.Random(5)
    taken = left = 0
    for _ in range(4000):
        text = list(header(rng, rng.randrange(1, 4), '"__metadata__":{"a":"b"},'))
        for _ in range(rng.randrange(1, 3)):
            at = rng.randrange(len(text))
            kind = rng.randrange(4)
            if kind == 0:
                del text[at]
            elif kind == 1:
                text.insert(at, rng.choice(ALPHABET))
            elif kind == 2:
                text[at] = rng.choice(ALPHABET)
            else:  # a stretch twice
                text[at:at] = text[at : at + rng.randrange(60)]
        changed = "".join(text).encode()
        found = parse_canonical(changed, "file")
        if found is None:
            left += 1
        else:
            taken += 1
            assert found == _parse_any(changed, "file")
    assert taken > 100
    assert left > 100


@pytest.mark.parametrize(
    "text",
    [
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}',
        '{"a":{"dtype":"U8","shape":[02],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":1[0,2]}}',
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}},',
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        '{"a":{"dtype":"U8","shape":[9223372036854775807,2],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8","shape":[18446744073709551618],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,18446744073709551618]}}',
    ],
)
def test_what_json_or_a_check_refuses_is_left_to_them(text: str) -> None:
    assert parse_canonical(text.encode(), "file") is None
    with pytest.raises(CheckpointError):
        _parse_any(text.encode(), "file")


def index(rng: random.Random, names: int, indent: int | None) -> str:
    files = {f"layers.{n}.w": f"model-{rng.randrange(3)}.safetensors" for n in range(names)}
    return json.dumps({"metadata": {"total_size": 7}, "weight_map": files}, indent=indent)


def test_an_index_is_read_as_json_reads_it_or_left_to_it() -> None:
    rng = random.Random(6)
    taken = left = 0
    for number in range(3000):
        text = list(index(rng, rng.randrange(1, 5), rng.choice([None, 2])))
        for _ in range(number % 3):
            at = rng.randrange(len(text))
            text[at : at + rng.randrange(2)] = rng.choice(ALPHABET)
        changed = "".join(text).encode()
        found = parse_index(changed, "index")
        if found is None:
            left += 1
            assert number % 3
        else:
            taken += 1
            assert found == parse_table(changed, "index")
    assert taken > 1000
    assert left > 100
