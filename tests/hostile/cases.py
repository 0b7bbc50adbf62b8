"""Hostile checkpoints and recipes, and the command that meets each of them.

docs/security.md shows every case with the line that is printed, and test_cases.py holds the two
together; a test that fails prints the row as it should be.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

from support.damage import edit_json

SHARD = "model-00001-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
STATE = "model.layers.1.mlp.experts.3.down_proj.weight.quant_state.bitsandbytes__nf4"
ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

Spoil = Callable[[Path], object]


def header(table: object, data: int = 8, length: int | None = None) -> Spoil:
    """A shard of that header (a table, or bytes) and so many bytes of data."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    head = struct.pack("<Q", len(text) if length is None else length)
    return lambda model: (model / SHARD).write_bytes(head + text + bytes(data))


def tensor(name: str = "a", **changes: object) -> Spoil:
    """A shard of one tensor, with changes to its entry."""
    return header({name: ONE | changes})


def names(old: str, new: str) -> Spoil:
    """The index names another file in a shard's place."""

    def edit(table: dict) -> None:
        table["weight_map"] = {k: new if v == old else v for k, v in table["weight_map"].items()}

    return lambda model: edit_json(model / INDEX, edit)


def config(file: str = "config.json", **changes: object) -> Spoil:
    """Changes to a JSON file."""
    return lambda model: edit_json(model / file, lambda table: table.update(changes))


def text(file: str, content: bytes) -> Spoil:
    """Another content of a file."""
    return lambda model: (model / file).write_bytes(content)


def link(file: str) -> Spoil:
    """A link to a file outside of the model in a file's place."""

    def make(model: Path) -> None:
        outside = model.parent / "outside" / "secret"
        outside.parent.mkdir(exist_ok=True)
        outside.write_bytes((model / file).read_bytes() if (model / file).exists() else b"secret")
        (model / file).unlink(missing_ok=True)
        (model / file).symlink_to(outside)

    return make


def pipe(file: str) -> Spoil:
    """A named pipe, which a reader would wait for."""

    def make(model: Path) -> None:
        (model / file).unlink()
        os.mkfifo(model / file)

    return make


def state(content: bytes) -> Spoil:
    """Another quant_state of one matrix, in a file of its own."""

    def make(model: Path) -> None:
        for file in sorted(model.glob("model-*.safetensors")):
            data = file.read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            table = json.loads(data[8:end])
            if STATE in table:
                first, last = table[STATE]["data_offsets"]
                old = data[end + first : end + last]
                file.write_bytes(data.replace(old, content[: len(old)].ljust(len(old)), 1))

    return make


def large_state(model: Path) -> None:
    """A quant_state of a megabyte."""
    name = "w.weight.quant_state.bitsandbytes__nf4"
    parts = {"w.weight": ("U8", 4), "w.weight.absmax": ("F32", 1),
             "w.weight.quant_map": ("F32", 16), name: ("U8", 1 << 20)}  # fmt: skip
    table, end = {}, 0
    for part, (dtype, count) in parts.items():
        size = count * (4 if dtype == "F32" else 1)
        table[part] = {"dtype": dtype, "shape": [count], "data_offsets": [end, end + size]}
        end += size
    for file in model.glob("model*"):
        file.unlink()
    header(table, end)(model)
    (model / SHARD).rename(model / "model.safetensors")


def twin(model: Path) -> None:
    """The index names one file in two spellings."""

    def edit(table: dict) -> None:
        name = next(k for k, v in table["weight_map"].items() if v == SHARD)
        table["weight_map"][name] = SHARD.replace("model", "Model")

    edit_json(model / INDEX, edit)


def pickles(model: Path) -> None:
    """No weights but a pickle."""
    for file in model.glob("model*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


MILLION = b"{" + b",".join(b'"%d":{}' % i for i in range(1_000_000)) + b"}"
ENDLESS = f"-:{8 * '(.+)'}" + "".join(f"\\{n}" for n in range(1, 9))
EVIL = {"AutoConfig": "modeling_evil.EvilConfig", "AutoTokenizer": ["evil.Tokenizer", None]}

CHECKPOINTS: dict[str, tuple[Spoil, str]] = {
    "header of 2^63 bytes": (header({"a": ONE}, length=1 << 63), "inspect"),
    "header longer than the file": (header({"a": ONE}, length=99_000_000), "inspect"),
    "header not JSON": (header(b"\x80\x04cos\nsystem\n"), "inspect"),
    "header of 100,000 brackets": (header(b"[" * 100_000), "inspect"),
    "header of seven million empty lists": (
        header(b'{"a":[' + b"[]," * 7_000_000 + b"0]}"),
        "inspect",
    ),
    "a million tensors": (header(MILLION), "inspect"),
    "a name twice": (header(b'{"a": 1, "b": 2, "a": 3}'), "inspect"),
    "tensors that overlap": (
        header({"a": ONE, "b": ONE | {"data_offsets": [4, 12]}}, 12),
        "inspect",
    ),
    "offsets beyond the file": (tensor(data_offsets=[0, 1 << 40], shape=[1 << 38]), "inspect"),
    "offsets beyond 2^63": (tensor(data_offsets=[0, 1 << 64], shape=[1 << 62]), "inspect"),
    "bytes of no tensor": (tensor(data_offsets=[1 << 20, (1 << 20) + 8]), "inspect"),
    "a negative shape": (tensor(shape=[-1, -2]), "inspect"),
    "a shape that overflows": (tensor(shape=[1 << 62, 1 << 62, 1 << 62]), "inspect"),
    "100,000 dimensions": (tensor(shape=[1 << 62] * 100_000), "inspect"),
    "a number of 5,000 digits": (
        header(json.dumps({"a": ONE}).replace("[2]", f"[{'9' * 5000}]").encode()),
        "inspect",
    ),
    "a name with a separator": (tensor("../../etc/passwd"), "inspect"),
    "a name with NUL": (tensor("a\0.weight"), "inspect"),
    "a name with a line feed": (tensor("a\nrequant: all is well"), "inspect"),
    "a name written from right to left": (tensor("a\u202ethgiew"), "inspect"),
    "a name of 10,000 letters": (tensor("a" * 10_000), "inspect"),
    "two tensors that differ in case": (
        header({"A.weight": ONE, "a.weight": ONE | {"data_offsets": [8, 16]}}, 16),
        "inspect",
    ),
    "index with ..": (names(SHARD, "../outside.safetensors"), "inspect"),
    "index with an absolute path": (names(SHARD, "/etc/passwd.safetensors"), "inspect"),
    "index with a backslash": (names(SHARD, "..\\outside.safetensors"), "inspect"),
    "index with NUL": (names(SHARD, "a\0.safetensors"), "inspect"),
    "two files that differ in case": (twin, "inspect"),
    "index with a pickle": (names(SHARD, "pytorch_model-00001.bin"), "inspect"),
    "index with a pickle in capitals": (names(SHARD, "consolidated.00.PT"), "inspect"),
    "index with a name twice": (
        text(INDEX, b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        "inspect",
    ),
    "pickles only": (pickles, "inspect"),
    "a shard that links outside": (link(SHARD), "inspect"),
    "a config that links outside": (link("config.json"), "inspect"),
    "a shard that is a pipe": (pipe(SHARD), "inspect"),
    "a config that is a pipe": (pipe("config.json"), "inspect"),
    "a tokenizer that links outside": (link("tokenizer.json"), "plan"),
    "a licence that links outside": (link("LICENSE"), "plan"),
    "quant_state of a megabyte": (large_state, "inspect"),
    "quant_state of brackets": (state(b"[" * 500), "plan"),
    "quant_state with an endless offset": (
        state(
            b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 128],'
            b'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1e999}'
        ),
        "plan",
    ),
    "quant_state of another shape": (
        state(b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [99999999999],'
              b'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1}'),
        "plan",
    ),
    "config of 70 MB": (text("config.json", b" " * 70_000_000), "inspect"),
    "config of brackets": (text("config.json", b'{"a":' * 50_000), "inspect"),
    "config with remote code": (config(auto_map=EVIL), "inspect"),
    "remote code deep in a config": (config(text_config={"auto_map": EVIL}), "inspect"),
    "tokenizer with remote code": (config("tokenizer_config.json", auto_map=EVIL), "inspect"),
    "an expression that never ends": (
        config(quantization_config={"quant_method": "gptq", "bits": 4, "dynamic": {ENDLESS: {}}}),
        "verify gptq",
    ),
}  # fmt: skip
"""Name -> how a copy of the micro model is spoilt, and the verb that refuses it."""

BOMB = b"a: &a [x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (i, i, b", ".join([b"*%c" % (i - 1)] * 9)) for i in range(98, 110)
)
RECIPES: dict[str, bytes] = {
    "a billion laughs": BOMB + b"source: {model: x}\noutput: {path: *m}\n",
    "an anchor": b"source: &s {model: x}\noutput: {path: y}\n",
    "a tag": b"source: !!python/object/apply:os.system [id]\n",
    "a tag of a plain kind": b"source: {model: x}\noutput: {path: !!bool maybe}\n",
    "a key twice": b"source: {model: x}\noutput: {path: y}\noutput: {path: z}\n",
    "1,000 brackets": b"source: " + b"[" * 1000,
    "a megabyte": b"# " + b"x" * 1_000_000,
    "NUL in a path": b'source: {model: x}\noutput: {path: "a\\0b"}\n',
    "a lone surrogate": b'source: {model: x}\noutput: {path: "a\\ud800"}\n',
    "an impossible day": b"source: {model: x, revision: 2026-02-31}\noutput: {path: y}\n",
    "5,000 hexadecimal digits": b"source: {model: x}\nlimits: {threads: 0x" + b"f" * 5000 + b"}\n",
    "a list for a text": b"source: {model: [x]}\noutput: {path: y}\n",
    "a home of nobody": b"source: {model: ~nobody-at-all/x}\noutput: {path: y}\n",
    "not UTF-8": b"source: {model: \xff}\n",
}
"""Name -> text; `requant plan` refuses each."""
