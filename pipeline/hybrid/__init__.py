"""Running a quantised mixture-of-experts model: experts in RAM, everything else on a small GPU."""

from pipeline.hybrid.entry import from_pretrained, place
from pipeline.hybrid.loader import load

__all__ = ["from_pretrained", "load", "place"]
