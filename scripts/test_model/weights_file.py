"""bfloat16 weights in a few small files, for moving them off the training machine.

The high bytes (sign and exponent) compress well and the low bytes hardly, so the two are
compressed apart: about 80 % of the plain size, in pieces small enough for any upload limit.
"""

import io
import zlib
from pathlib import Path

import numpy as np
import torch

PIECE = 12 * 2**20


def write_pieces(weights: dict[str, torch.Tensor], folder: Path) -> list[int]:
    """Write weights-00.bin ... below `folder`; return their sizes in bytes."""
    planes: list[list[np.ndarray]] = [[], []]
    shapes = {}
    for name in sorted(weights):
        tensor = weights[name].detach().to("cpu", torch.bfloat16).contiguous()
        shapes[name] = tuple(tensor.shape)
        octets = tensor.view(torch.uint8).reshape(-1, 2).numpy()
        planes[0].append(octets[:, 0])
        planes[1].append(octets[:, 1])
    packed = []
    for plane in planes:  # as tensors: pickled bytes objects would grow by half
        data = zlib.compress(np.concatenate(plane).tobytes(), 6)
        packed.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    buffer = io.BytesIO()
    torch.save({"shapes": shapes, "planes": packed}, buffer)
    whole = buffer.getvalue()
    pieces = [whole[at : at + PIECE] for at in range(0, len(whole), PIECE)]
    for index, piece in enumerate(pieces):
        (folder / f"weights-{index:02d}.bin").write_bytes(piece)
    return [len(piece) for piece in pieces]


def read_pieces(folder: Path) -> dict[str, torch.Tensor]:
    """Join what `write_pieces` wrote."""
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("weights-*.bin")))
    stored = torch.load(io.BytesIO(data), weights_only=True)
    planes = [
        np.frombuffer(zlib.decompress(plane.numpy().tobytes()), np.uint8)
        for plane in stored["planes"]
    ]
    octets = torch.from_numpy(np.stack(planes, axis=1).reshape(-1))
    weights, at = {}, 0
    for name, shape in stored["shapes"].items():
        size = 2 * int(np.prod(shape))
        weights[name] = octets[at : at + size].view(torch.bfloat16).reshape(shape).clone()
        at += size
    return weights
