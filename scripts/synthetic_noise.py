"""Random weights, drawn directly in the form in which bitsandbytes stores 4-bit matrices.

Nothing is quantised one by one: bytes come out of tables of 65,536 entries that hold what Gaussian
weights become, at the speed of a look-up.  Per matrix there are a scale of its own, a spread of row
scales, and blocks around outlier columns, whose scale is larger and whose other codes are small.
The bytes depend on seed and name alone, on no device and no number of threads.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.bnb import functional

Bytes = npt.NDArray[np.uint8]

BLOCK, NESTED = 64, 256
TABLE = 1 << 16
STEP = 1 << 18
"""Values drawn at once: few enough that their indices stay in a processor's cache."""
ROW_BUCKETS = 16
ROW_SPREAD = 0.2
"""Standard deviation of the logarithm of a row's scale: 10th to 90th percentile is 0.77 to 1.29."""
MATRIX_SPREAD = 0.1
OUTLIER = 4.0
"""How much larger an outlier column's weights are than its neighbours."""
OUTLIER_EVERY = 16
"""One block of columns in so many holds an outlier column."""
MEAN, SPREAD = 2.39, 0.42
"""Mean and standard deviation of the largest of 64 absolute Gaussian values."""
CENTRE = MEAN * 1.1
"""What is subtracted from block scales before they are quantised; bitsandbytes takes their mean."""
REACH = MEAN * OUTLIER * 1.6
"""Largest distance from that centre that the scales' codes can express."""


@dataclass(frozen=True)
class Tables:
    """What random 16-bit numbers are looked up in."""

    codes: Bytes
    """Two NF4 codes a byte, of blocks of Gaussian values."""
    beside: Bytes
    """The same for values that share a block with an outlier column."""
    scales: Bytes
    """Code of a block's scale; the row's scale bucket is in the upper 4 bits of the index."""
    beside_scales: Bytes
    quant_map: npt.NDArray[np.float32]
    nested_map: npt.NDArray[np.float32]
    gaussian: npt.NDArray[np.float32]


def make_tables() -> Tables:
    """The same tables every time; takes some 20 ms."""
    rng = np.random.Generator(np.random.SFC64(20_481))
    levels = functional().get_4bit_type("nf4", device="cpu").numpy().astype(np.float32)
    nested = functional().create_dynamic_map().numpy().astype(np.float32)
    values = rng.standard_normal((2 * TABLE // BLOCK, BLOCK), dtype=np.float32)
    largest = np.abs(values).max(1, keepdims=True)
    quantiles = np.array([_normal_quantile((i + 0.5) / ROW_BUCKETS) for i in range(ROW_BUCKETS)])
    rows = np.exp(ROW_SPREAD * quantiles)[:, None]
    drawn = np.abs(rng.standard_normal((TABLE // ROW_BUCKETS, BLOCK))).max(1)[None, :]
    return Tables(
        codes=_pairs(values / largest, levels),
        beside=_pairs(values / (OUTLIER * largest), levels),
        scales=_nearest((rows * drawn - CENTRE) / REACH, nested).reshape(-1),
        beside_scales=_nearest((rows * drawn * OUTLIER - CENTRE) / REACH, nested).reshape(-1),
        quant_map=levels,
        nested_map=nested,
        gaussian=rng.standard_normal(TABLE, dtype=np.float32),
    )


def rng_for(seed: int, name: str) -> np.random.Generator:
    """A generator of the name's own."""
    return np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))


def quant_state(rows: int, columns: int, std: float, seed: int, name: str) -> bytes:
    """The JSON that bitsandbytes keeps beside a matrix; always as long for the same shape."""
    table: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": "bfloat16",
        "shape": [rows, columns],
        "nested_blocksize": NESTED,
        "nested_dtype": "float32",
    }
    offset = f"{CENTRE * _matrix_scale(std, seed, name):.15f}"
    return (json.dumps(table)[:-1] + f', "nested_offset": {offset}}}').encode()


def fill_matrix(
    packed: Bytes,
    absmax: Bytes,
    rows: int,
    columns: int,
    tables: Tables,
    rng: np.random.Generator,
) -> None:
    """Codes of a matrix [rows, columns] into `packed` [rows * columns / 2], scales into `absmax`.

    `columns` must be a multiple of 64.
    """
    blocks = columns // BLOCK
    draws = rng.integers(0, 2**64 - 1, endpoint=True, dtype=np.uint64, size=packed.size // 4)
    np.take(tables.codes, draws.view(np.uint16), out=packed, mode="wrap")
    bucket = rng.integers(0, ROW_BUCKETS, size=rows, dtype=np.uint16) << 12
    low = rng.integers(0, 1 << 12, size=(rows, blocks), dtype=np.uint16)
    index = bucket[:, None] | low
    scales = absmax.reshape(rows, blocks)
    np.take(tables.scales, index, out=scales, mode="wrap")
    # The same columns in every matrix of a width: outliers come from the stream they read.
    special = np.arange(OUTLIER_EVERY // 2, blocks, OUTLIER_EVERY)
    if not len(special):
        return
    grid = packed.reshape(rows, blocks, BLOCK // 2)
    again = rng.integers(0, TABLE, size=(rows, len(special), BLOCK // 2), dtype=np.uint16)
    beside = tables.beside[again]
    sign = rng.integers(0, 2, size=(rows, len(special)), dtype=np.uint8)
    beside[:, :, 5] = beside[:, :, 5] & 0x0F | (sign * 0xF0)  # codes 0 and 15 are -1 and +1
    grid[:, special] = beside
    scales[:, special] = tables.beside_scales[index[:, special]]


def nested_parts(
    count: int, std: float, seed: int, name: str, tables: Tables
) -> tuple[bytes, bytes, bytes]:
    """nested_absmax of `count` blocks of scales, nested_quant_map and quant_map, as bytes."""
    reach = np.full(count, REACH * _matrix_scale(std, seed, name), dtype=np.float32)
    return reach.tobytes(), tables.nested_map.tobytes(), tables.quant_map.tobytes()


def fill_gaussian(
    out: Bytes, mean: float, std: float, tables: Tables, rng: np.random.Generator
) -> None:
    """BF16 values into `out`, the bytes of a tensor."""
    table, values = bfloat16_bits(mean + std * tables.gaussian), out.view(np.uint16)
    for start in range(0, len(values), STEP):
        part = values[start : start + STEP]
        index = rng.integers(0, TABLE, size=len(part), dtype=np.uint16)
        np.take(table, index, out=part, mode="wrap")


def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """BF16 bits of float32 values, towards zero."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _matrix_scale(std: float, seed: int, name: str) -> float:
    noise = (zlib.crc32(f"{seed}:{name}".encode()) / 2**32 - 0.5) * 12**0.5
    return float(std * np.exp(MATRIX_SPREAD * noise))


def _nearest(values: npt.NDArray[Any], levels: npt.NDArray[np.float32]) -> Bytes:
    middle = (levels[1:] + levels[:-1]) / 2
    return np.searchsorted(middle, values).astype(np.uint8)


def _pairs(values: npt.NDArray[Any], levels: npt.NDArray[np.float32]) -> Bytes:
    codes = _nearest(values, levels).reshape(-1, 2)
    return (codes[:, 0] * 16 + codes[:, 1]).astype(np.uint8)


def _normal_quantile(p: float) -> float:
    return NormalDist().inv_cdf(p)
