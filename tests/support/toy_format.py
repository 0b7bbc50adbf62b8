"""A storage format that the package does not know, for tests that a new one needs no other edit.

Stored per module M with weight [out, in]: M.toy_codes U8 [out, in], M.toy_steps F16 [out, groups],
M.toy_zeros U8 [out, groups].
"""

import torch

from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.stored import DTYPES, State, StoredWeight, decoding_problems
from pipeline.quantize.tensor import AffineScheme, QuantizedTensor

PARTS = {"toy_codes": "codes", "toy_steps": "scales", "toy_zeros": "zeros"}


class Toy:
    """Affine codes as they are, a byte each."""

    name = "toy"
    rank = 5
    convertible = False

    def claim(self, entries, config):
        modules = [n.removesuffix(".toy_codes") for n in entries if n.endswith(".toy_codes")]
        found = []
        for module in modules:
            parts = {part: entries[f"{module}.{part}"] for part in PARTS}
            rows, columns = parts["toy_codes"].shape
            groups = parts["toy_steps"].shape[1]
            bits = config["quantization_config"]["bits"]
            scheme = AffineScheme(bits, columns // groups, False)
            state = State((rows, columns), DTYPES["F16"], (scheme,), scheme)
            found.append(StoredWeight(f"{module}.weight", "toy", parts, rows * columns, state))
        return found

    def state_part(self, weight):
        return None

    def parse_state(self, weight, data):
        raise NotImplementedError

    def quantized(self, weights, state, parts):
        return QuantizedTensor(state.details, {PARTS[k]: v for k, v in parts.items()})

    def decode(self, weights, state, parts):
        return self.quantized(weights, state, parts).dequantize(state.dtype)

    def problems(self, weights, parts, config):
        return decoding_problems(self, weights, parts)


def toy_parts(module: str, quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The stored tensors of one matrix."""
    return {f"{module}.{part}": quantized.arrays[array] for part, array in PARTS.items()}


def register(monkeypatch) -> None:
    """Make the format known until the test ends, as its file in the formats' room would."""
    list(FORMATS)  # the room's own files first: they are imported once
    monkeypatch.setattr(FORMATS, "_members", dict(FORMATS._members))
    FORMATS.register(Toy.name, Toy())
