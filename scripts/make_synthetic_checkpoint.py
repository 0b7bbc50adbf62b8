"""Makes a checkpoint of a big model's true geometry with random weights, as Unsloth uploads them.

    python scripts/make_synthetic_checkpoint.py --layers 2 --output /dev/shm/two-layers
    python scripts/make_synthetic_checkpoint.py --output /dev/shm/whole          # 48 layers, 42 GiB
    python scripts/make_synthetic_checkpoint.py --headers-only --output /tmp/plan
    python scripts/make_synthetic_checkpoint.py --converted gptq --output /dev/shm/result

Names, parts, file sizes and the order of tensors within a file are those of a bitsandbytes NF4
upload with double quantisation; the weights are random (`synthetic_noise.py`), with scales chosen
so that activations keep their size through all layers, and the router prefers some experts.  It
serves to measure time and memory; its output is noise, and quality cannot be measured on it.
`--converted` makes what a conversion of it would leave (`synthetic_converted.py`); to generate with
it, Qwen3-Next needs 4 layers, the first with attention.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from synthetic_converted import METHODS, Dense, write_converted
from synthetic_geometries import BNB_CONFIG, MODELS, Model, Shape
from synthetic_noise import (
    BLOCK,
    NESTED,
    Tables,
    fill_gaussian,
    fill_matrix,
    make_tables,
    nested_parts,
    quant_state,
    rng_for,
)

TOKENIZER = Path(__file__).parents[1] / "tests" / "models" / "qwen3-next-tiny-nf4"
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SHARD_BYTES = 5_000_000_000
MARK = "quant_state.bitsandbytes__nf4"
CHUNK_BYTES = 32 << 20
"""What one thread makes and writes at once."""
STD = 0.02
"""Of weights; hidden 2048 and normalised inputs give outputs of about 0.9."""
EMBEDDING_STD = 0.5


@dataclass(frozen=True)
class Matrix:
    """A linear module, stored as six tensors."""

    module: str
    rows: int
    columns: int

    @property
    def blocks(self) -> int:
        """Blocks of 64 weights."""
        return self.rows * self.columns // BLOCK

    @property
    def nested(self) -> int:
        """Blocks of 256 block scales."""
        return -(-self.blocks // NESTED)

    @property
    def nbytes(self) -> int:
        """All six parts, about."""
        return self.rows * self.columns // 2 + self.blocks + 4 * self.nested + 1300


@dataclass(frozen=True)
class Plain:
    """A tensor stored as BF16, its values Gaussian."""

    name: str
    shape: Shape
    mean: float = 0.0
    std: float = 0.1

    @property
    def nbytes(self) -> int:
        """Two bytes an element."""
        return 2 * int(np.prod(self.shape))


def contents(model: Model) -> Iterator[Matrix | Plain]:
    """Everything the model stores, in the order in which files are filled."""
    table = (model.vocabulary, model.hidden)
    yield Plain("model.embed_tokens.weight", table, std=EMBEDDING_STD)
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        for name, shape in model.plain(layer).items():
            yield Plain(prefix + name, shape, *_distribution(model, name))
        yield Matrix(prefix + model.router, model.experts, model.hidden)
        for name, shape in model.matrices(layer).items():
            yield Matrix(prefix + name, shape[0], shape[1])
        for expert in range(model.experts):
            for name, shape in model.expert_matrices().items():
                module = f"{prefix}{model.experts_module}.{expert}.{name}"
                yield Matrix(module, shape[0], shape[1])
    yield Plain("model.norm.weight", (model.hidden,), model.norm)
    yield Plain("lm_head.weight", table, std=STD)


def _distribution(model: Model, name: str) -> tuple[float, float]:
    """Mean and standard deviation of a layer's tensor that is no matrix, by what it is."""
    by_name = {
        "linear_attn.A_log": (1.8, 0.5),  # the decay's rate, 6 and from 2 to 16 mostly
        "linear_attn.dt_bias": (1.0, 0.1),
        "linear_attn.norm.weight": (1.0, 0.1),  # of another class than the other norms
        "linear_attn.conv1d.weight": (0.0, 0.3),
    }
    return by_name.get(name, (model.norm, 0.1))


def shards(model: Model) -> list[list[Matrix | Plain]]:
    """The contents cut into files of at most 5 GB."""
    files: list[list[Matrix | Plain]] = [[]]
    filled = 0
    for item in contents(model):
        if filled + item.nbytes > SHARD_BYTES:
            files.append([])
            filled = 0
        files[-1].append(item)
        filled += item.nbytes
    return files


class Shard:
    """One file: its header, and the chunks of bytes that fill it.

    As safetensors writes it: float32 tensors first, then BF16, then bytes, each by name.
    """

    def __init__(self, path: Path, items: Sequence[Matrix | Plain], seed: int) -> None:
        self.path = path
        self.names: list[str] = []
        self._entries: list[str] = []
        self._end = 0
        self._seed = seed
        self.matrices = sorted((i for i in items if isinstance(i, Matrix)), key=lambda m: m.module)
        self.plain = sorted((i for i in items if isinstance(i, Plain)), key=lambda p: p.name)
        for matrix in self.matrices:
            weight = f"{matrix.module}.weight"
            self._add(f"{weight}.nested_absmax", "F32", (matrix.nested,), 4 * matrix.nested)
            self._add(f"{weight}.nested_quant_map", "F32", (256,), 1024)
            self._add(f"{weight}.quant_map", "F32", (16,), 64)
        for tensor in self.plain:
            self._add(tensor.name, "BF16", tensor.shape, tensor.nbytes)
        for matrix in self.matrices:
            weight = f"{matrix.module}.weight"
            half = matrix.rows * matrix.columns // 2
            self._add(weight, "U8", (half, 1), half)
            self._add(f"{weight}.absmax", "U8", (matrix.blocks,), matrix.blocks)
            state = len(self._state(matrix))
            self._add(f"{weight}.{MARK}", "U8", (state,), state)
        text = ('{"__metadata__":{"format":"pt"},' + ",".join(self._entries) + "}").encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text
        self.size = len(self.header) + self._end

    def _add(self, name: str, dtype: str, shape: Shape, nbytes: int) -> None:
        # As text: 440,000 dictionaries would take too long.
        numbers = ",".join(map(str, shape))
        span = f"[{self._end},{self._end + nbytes}]"
        self._entries.append(
            f'"{name}":{{"dtype":"{dtype}","shape":[{numbers}],"data_offsets":{span}}}'
        )
        self.names.append(name)
        self._end += nbytes

    def write_header(self, *, whole: bool) -> None:
        """The header; `whole`: and the file at its final size, to be filled."""
        self.path.write_bytes(self.header)
        if whole:
            os.truncate(self.path, self.size)

    def tasks(self) -> Iterator[tuple[int, list[Matrix | Plain], str]]:
        """(offset, items, what of them) of chunks that can be filled in any order."""
        offset = len(self.header)
        for kind, items in (
            ("maps", self.matrices),
            ("plain", self.plain),
            ("codes", self.matrices),
        ):
            chunk: list[Matrix | Plain] = []
            size = 0
            for item in items:
                chunk.append(item)
                size += self._length(item, kind)
                if size >= CHUNK_BYTES:
                    yield offset, chunk, kind
                    offset, chunk, size = offset + size, [], 0
            if chunk:
                yield offset, chunk, kind
                offset += size

    def fill(self, offset: int, items: Sequence[Matrix | Plain], kind: str, tables: Tables) -> int:
        """Make a chunk and write it in its place; returns its bytes."""
        buffer = np.empty(sum(self._length(item, kind) for item in items), dtype=np.uint8)
        place = 0
        for item in items:
            part = buffer[place : place + self._length(item, kind)]
            place += len(part)
            if isinstance(item, Plain):
                rng = rng_for(self._seed, item.name)
                fill_gaussian(part, item.mean, item.std, tables, rng)
            elif kind == "maps":
                std = _std(item)
                parts = nested_parts(item.nested, std, self._seed, item.module, tables)
                part[:] = np.frombuffer(b"".join(parts), dtype=np.uint8)
            else:
                half, rng = item.rows * item.columns // 2, rng_for(self._seed, item.module)
                scales = part[half : half + item.blocks]
                fill_matrix(part[:half], scales, item.rows, item.columns, tables, rng)
                part[half + item.blocks :] = np.frombuffer(self._state(item), dtype=np.uint8)
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            data, done = buffer.data, 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)
        finally:
            os.close(descriptor)
        return len(buffer)

    def _length(self, item: Matrix | Plain, kind: str) -> int:
        if isinstance(item, Plain):
            return item.nbytes
        if kind == "maps":
            return 4 * item.nested + 1024 + 64
        return item.rows * item.columns // 2 + item.blocks + len(self._state(item))

    def _state(self, matrix: Matrix) -> bytes:
        return quant_state(matrix.rows, matrix.columns, _std(matrix), self._seed, matrix.module)


def _std(matrix: Matrix) -> float:
    """Wider matrices get smaller weights, so that outputs are of one size."""
    return float(STD * (2048 / matrix.columns) ** 0.5)


Task = tuple[int, list[Matrix | Plain], str]
_WORK: list[tuple[Shard, Task, Tables]] = []


def _fill(number: int) -> None:
    shard, task, tables = _WORK[number]
    shard.fill(*task, tables)


def write_checkpoint(
    model: Model, output: Path, *, seed: int, headers_only: bool, threads: int
) -> int:
    """Write the whole directory; returns the bytes of its tensor files."""
    output.mkdir(parents=True)
    groups = shards(model)
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    files = [Shard(output / name, items, seed) for name, items in zip(names, groups, strict=True)]
    for file in files:
        file.write_header(whole=not headers_only)
    if not headers_only:
        tables = make_tables()
        # Processes made by forking know all of this: only numbers travel to them.
        work = [(file, task, tables) for file in files for task in file.tasks()]
        # The embedding and the head are the longest tasks by far, and so the first.
        _WORK[:] = sorted(work, key=lambda one: one[1][2] != "plain")
        if threads == 1:
            for number in range(len(_WORK)):
                _fill(number)
        else:
            fork = multiprocessing.get_context("fork")
            with ProcessPoolExecutor(threads, mp_context=fork) as pool:
                for _ in pool.map(_fill, range(len(_WORK))):
                    pass
        _WORK.clear()
    mapped = [f'"{tensor}":"{file.path.name}"' for file in files for tensor in file.names]
    total = sum(file.size for file in files)
    index = f'{{"metadata":{{"total_size":{total}}},"weight_map":{{' + ",".join(mapped) + "}}"
    (output / "model.safetensors.index.json").write_text(index)
    config = model.config | {"quantization_config": BNB_CONFIG}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in SIDE_FILES:
        shutil.copy(TOKENIZER / name, output / name)
    return total


def outside_experts(model: Model) -> Dense:
    """All but the routed experts, as a result holds it: nothing packed."""
    found: dict[str, tuple[Shape, float, float]] = {}
    for item in contents(model):
        if isinstance(item, Plain):
            found[item.name] = item.shape, item.mean, item.std
        elif model.experts_module not in item.module:
            found[f"{item.module}.weight"] = (item.rows, item.columns), 0.0, _std(item)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Write one checkpoint and say how fast."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a directory that is not there")
    parser.add_argument("--geometry", choices=list(MODELS), default="qwen3-next-80b")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--experts", type=int, help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--headers-only", action="store_true", help="enough for requant plan")
    parser.add_argument("--converted", choices=list(METHODS), help="as a result of this method")
    args = parser.parse_args(argv)
    if args.converted and args.headers_only:
        parser.error("--converted makes whole files only")
    if args.output.exists():
        parser.error(f"{args.output} exists")
    try:
        model = MODELS[args.geometry].cut(args.layers, args.experts)
    except ValueError as error:
        parser.error(str(error))
    started = time.perf_counter()
    if args.converted:
        total = write_converted(
            model,
            args.output,
            outside_experts(model),
            method=args.converted,
            seed=args.seed,
            threads=args.threads,
            side=TOKENIZER,
        )
    else:
        total = write_checkpoint(
            model,
            args.output,
            seed=args.seed,
            headers_only=args.headers_only,
            threads=args.threads,
        )
    seconds = time.perf_counter() - started
    rate = "" if args.headers_only else f", {total / seconds / 1e9:.2f} GB/s"
    print(f"{args.output}: {model.layers} layers of {model.experts} experts")
    print(f"{total / 1e9:.2f} GB of tensor files in {seconds:.1f} s{rate}")


if __name__ == "__main__":
    main()
