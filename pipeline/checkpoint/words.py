"""Integer codes in 32-bit words, as GPTQ and AWQ files hold them.

Packing goes through bytes (low bits first within a byte, low byte first within a word), which
touches each code once and needs no 32-bit copies of them.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

assert sys.byteorder == "little", "words are assembled from bytes"


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 `[..., n]` with values below 2**bits -> int32 `[..., n * bits / 32]`, first lowest."""
    per_byte = 8 // bits
    packed = codes[..., ::per_byte].contiguous()
    for i in range(1, per_byte):
        packed |= codes[..., i::per_byte] << (bits * i)
    # flat, since a dimension of size 1 may carry a stride that a view of wider words refuses
    return packed.reshape(-1).view(torch.int32).view(*codes.shape[:-1], -1)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_words`: int32 `[..., m]` -> uint8 `[..., m * 32 / bits]`."""
    codes = words.reshape(-1).view(torch.uint8)
    if bits == 4:  # as arithmetic on whole words, four times as fast as shifts byte by byte
        wide = codes.to(torch.int16)
        wide |= wide << 4
        wide &= 0x0F0F
        codes = wide.view(torch.uint8)
    elif bits != 8:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes = (codes.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.view(*words.shape[:-1], -1)
