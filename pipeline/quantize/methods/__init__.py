"""The quantisers: one file each, registered under the name a recipe uses."""

from __future__ import annotations

from pipeline.quantize.solved import Quantizer
from pipeline.registry import Registry

QUANTIZERS: Registry[Quantizer] = Registry(__name__, "quantizer")
