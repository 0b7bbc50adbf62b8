"""Coverage-guided fuzzing of everything that parses a stranger's bytes, with atheris.

    python scripts/fuzz.py all --runs 1000000        each target in a process of its own, one by one
    python scripts/fuzz.py header --runs 50000

Needs the extra `fuzz`.  A target fails on any exception but our own errors, on an error of more
than one line, on an input that takes more than 5 s, and on an allocation of more than 1 GB.  Prints
one JSON line per target.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import atheris

with atheris.instrument_imports(include=["pipeline", "yaml"]):
    import yaml  # noqa: F401  (before others bring it along unwatched)

    from pipeline.checkpoint.formats import FORMATS
    from pipeline.checkpoint.header import parse_header
    from pipeline.checkpoint.index import INDEX_LIMITS, INDEX_NAME, check_against, listed_files
    from pipeline.checkpoint.shard_map import MAP_NAME, check_version, mapped_files
    from pipeline.checkpoint.stored import StoredWeight, TensorEntry
    from pipeline.checkpoint.untrusted import parse_table
    from pipeline.errors import UserError
    from pipeline.plain_yaml import PlainYamlError, parse_yaml
    from pipeline.recipe import parse_recipe

    list(FORMATS)  # imports its members, so that they are watched too

ROOT = Path(__file__).parents[1]
MICRO = ROOT / "tests" / "models" / "micro-nf4"
SECONDS, MEGABYTES = 5, 1000
METHODS: tuple[dict[str, Any], ...] = (
    {},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": {"quant_method": "awq"}},
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
)


def header(data: bytes) -> None:
    """A header, and what every format makes of its tensors.

    The first byte chooses the config, and whether the file ends after its header or later.
    """
    first = data[0] if data else 0
    config = METHODS[first % len(METHODS)]
    size = 8 + len(data[1:]) + 16 * max(0, first - 128)
    found = parse_header(data[1:], size, "file")
    remaining = {entry.name: entry for entry in found.entries}
    for member in sorted((FORMATS[name] for name in FORMATS), key=lambda f: f.rank):
        for weight in member.claim(remaining, config):
            for part in weight.parts.values():
                del remaining[part.name]


ENTRIES = {n: TensorEntry(n, "model.safetensors", "F32", (1,), 0, 4) for n in ("a.weight", "b.w")}


def index(data: bytes) -> None:
    """An index against the two tensors of one file."""
    table = parse_table(data, INDEX_NAME, INDEX_LIMITS).get("weight_map")
    listed_files(table)
    assert isinstance(table, dict)
    check_against(table, ENTRIES)


def _matrix(nested: bool) -> StoredWeight:
    def part(name: str, dtype: str, count: int) -> TensorEntry:
        return TensorEntry(f"w.{name}", "file", dtype, (count,), 0, count)

    parts = {
        "quant_state": part("quant_state.bitsandbytes__nf4", "U8", 200),
        "weight": part("weight", "U8", 1024),
        "absmax": part("absmax", "U8" if nested else "F32", 32),
        "quant_map": part("quant_map", "F32", 16),
    }
    if nested:
        parts |= {"nested_absmax": part("nested_absmax", "F32", 1)}
        parts |= {"nested_quant_map": part("nested_quant_map", "F32", 256)}
    return StoredWeight("w.weight", "nf4", parts, 2048)


MATRICES = (_matrix(False), _matrix(True))


def quant_state(data: bytes) -> None:
    """A quant_state of a matrix of 2,048 elements."""
    FORMATS["bnb4"].parse_state(MATRICES[data[0] % 2 if data else 0], data[1:])


def recipe(data: bytes) -> None:
    """A recipe's text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return
    found = parse_yaml(text)
    if isinstance(found, dict):
        parse_recipe(found, "recipe")


def shard_map(data: bytes) -> None:
    """A shard map's text."""
    mapped_files(check_version(parse_table(data, MAP_NAME)))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "index": index,
    "quant_state": quant_state,
    "recipe": recipe,
    "shard_map": shard_map,
}


def seeds(target: str) -> list[bytes]:
    """Sound inputs of a target, small enough to be changed quickly."""

    def text(table: object) -> bytes:
        return json.dumps(table).encode()

    nested = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 64],
              "nested_blocksize": 256, "nested_dtype": "float32",
              "nested_offset": 0.01}  # fmt: skip
    if target == "header":
        return [*_headers(text)]
    if target == "index":
        return [text({"metadata": {"total_size": 8},
                      "weight_map": dict.fromkeys(ENTRIES, "model.safetensors")})]  # fmt: skip
    if target == "quant_state":
        return [b"\1" + text(nested), b"\0" + text({**nested, "quant_type": "nf4"})]
    if target == "recipe":
        return [(ROOT / "recipes" / "demo.yaml").read_bytes(),
                b"source: {model: x}\noutput: {path: y}\n"]  # fmt: skip
    files = [{"name": "a.safetensors", "class": "nonexpert", "layer": None, "bytes": 4},
             {"name": "b.safetensors", "class": "experts", "layer": 1, "bytes": 4,
              "sha256": "0" * 64}]  # fmt: skip
    return [text({"schema_version": 1, "files": files})]


def _headers(text: Callable[[object], bytes]) -> list[bytes]:
    def table(*tensors: tuple[str, str, list[int], int]) -> bytes:
        position, found = 0, {}
        for name, dtype, shape, nbytes in tensors:
            found[name] = {"dtype": dtype, "shape": shape,
                           "data_offsets": [position, position + nbytes]}  # fmt: skip
            position += nbytes
        return text({"__metadata__": {"format": "pt"}, **found})

    gptq = [("m.qweight", "I32", [1, 8], 32), ("m.qzeros", "I32", [1, 1], 4),
            ("m.scales", "F16", [1, 8], 16), ("m.g_idx", "I32", [8], 32)]  # fmt: skip
    awq = [("m.qweight", "I32", [8, 1], 32), *gptq[1:3]]
    nf4 = [("w.weight", "U8", [32, 1], 32), ("w.weight.absmax", "F32", [1], 4),
           ("w.weight.quant_map", "F32", [16], 64),
           ("w.weight.quant_state.bitsandbytes__nf4", "U8", [90], 90)]  # fmt: skip
    fp8 = [("w.weight", "F8_E4M3", [4, 4], 16), ("w.weight_scale_inv", "F32", [1, 1], 4)]
    int8 = [("w.weight", "I8", [4, 4], 16), ("w.SCB", "F32", [4], 16)]
    dense = [("a.weight", "BF16", [2, 4], 16), ("n", "I64", [], 8)]
    kinds = ((0, nf4), (1, gptq), (2, awq), (3, fp8), (0, int8), (0, dense))
    return [bytes([kind]) + table(*tensors) for kind, tensors in kinds]


ODD: tuple[Any, ...] = (
    0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**100, 1.5, float("inf"), float("nan"), True, None,
    "", "..", "../x", "/x", "a/b", "\0", "\n", "\ud800", "\u202e", "x" * 600, [], {}, [[]],
    [0] * 20, "model.bin", "A.WEIGHT", "F32", "U8", "nf4", "experts", {"": 0}, ["a"], [-1],
    [2**62, 2**62],
)  # fmt: skip


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the time what libFuzzer does to bytes, half of the time a change of the JSON tree."""
    random = Random(seed)
    start = data.find(b"{")
    try:
        table = json.loads(data[start:]) if start in (0, 1) and random.random() < 0.5 else None
    except (ValueError, RecursionError):
        table = None
    if table is None:
        return bytes(atheris.Mutate(data, max_size))
    for _ in range(random.randint(1, 3)):
        _change(table, random)
    changed = data[:start] + json.dumps(table).encode()
    return changed if len(changed) <= max_size else data


def _change(table: Any, random: Random) -> None:  # noqa: ANN401  (any JSON)
    places = []
    todo = [table]
    while todo:
        node = todo.pop()
        if isinstance(node, (dict, list)):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            places += [(node, key) for key in keys]
            todo += [node[key] for key in keys]
    if not places:
        return
    node, key = random.choice(places)
    act = random.randrange(4)
    if act == 0:
        del node[key]
    elif act == 1 and isinstance(node, dict):
        name = random.choice([v for v in ODD if isinstance(v, str)] + list(node))
        node[name] = node.pop(key)
    elif act == 2:
        other, there = random.choice(places)
        node[key] = json.loads(json.dumps(other[there]))
    else:
        node[key] = json.loads(json.dumps(random.choice(ODD)))


def run_one(target: str, folder: Path, runs: int, seed: int) -> None:
    """Fuzz one target in this process, which atheris ends."""
    for number, data in enumerate(seeds(target)):
        (folder / f"seed-{number}").write_bytes(data)

    def test(data: bytes) -> None:
        try:
            TARGETS[target](data)
        except (UserError, PlainYamlError) as error:
            assert "\n" not in str(error) and len(str(error)) < 2000

    options = [f"-runs={runs}", f"-seed={seed}", "-max_len=2048", f"-timeout={SECONDS}",
               f"-malloc_limit_mb={MEGABYTES}", "-rss_limit_mb=4096", "-print_final_stats=1",
               f"-artifact_prefix={folder}/found-", "-len_control=0"]  # fmt: skip
    print(f"resident before: {_resident()} MB", file=sys.stderr, flush=True)
    arguments = [sys.argv[0], *options, str(folder)]
    if target == "recipe":
        atheris.Setup(arguments, test)
    else:
        atheris.Setup(arguments, test, custom_mutator=mutate)
    atheris.Fuzz()


def _resident() -> int:
    words = Path("/proc/self/statm").read_text().split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def run_all(targets: list[str], runs: int, seed: int) -> int:
    """Every target in a process of its own; prints its figures; returns how many failed."""
    failed = 0
    for target in targets:
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            command = [sys.executable, __file__, target, "--runs", str(runs), "--seed", str(seed)]
            done = subprocess.run([*command, "--folder", folder], capture_output=True, check=False)
            said = done.stderr.decode(errors="replace")
            found = dict(re.findall(r"stat::(\w+):\s+(\d+)", said))
            before = re.search(r"resident before: (\d+)", said)
            artifacts = sorted(path.name for path in Path(folder).glob("found-*"))
            figures = {
                "target": target,
                "executions": int(found.get("number_of_executed_units", 0)),
                "seconds": round(time.monotonic() - started),
                "slowest_input_seconds": int(found.get("slowest_unit_time_sec", -1)),
                "peak_mb_above_start": int(found.get("peak_rss_mb", 0)) - int(before[1])
                if before
                else None,
                "corpus": len(list(Path(folder).iterdir())) - len(artifacts),
                "findings": artifacts,
                "exit_code": done.returncode,
            }
            print(json.dumps(figures), flush=True)
            if artifacts or done.returncode:
                failed += 1
                print(said[-3000:], file=sys.stderr)
                for name in artifacts:
                    print(name, (Path(folder) / name).read_bytes()[:300], file=sys.stderr)
    return failed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="corpus; given by the process of `all`")
    wanted = parser.parse_args()
    if wanted.folder is not None:
        run_one(wanted.target, wanted.folder, wanted.runs, wanted.seed)
        return
    targets = list(TARGETS) if wanted.target == "all" else [wanted.target]
    sys.exit(1 if run_all(targets, wanted.runs, wanted.seed) else 0)


if __name__ == "__main__":
    main()
