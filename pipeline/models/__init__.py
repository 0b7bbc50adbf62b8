"""What an architecture is: one declarative file each."""

from pipeline.models.architecture import Architecture
from pipeline.registry import Registry

ARCHITECTURES: Registry[Architecture] = Registry("pipeline.models", "architecture")
"""By the `model_type` of config.json."""

__all__ = ["ARCHITECTURES", "Architecture"]
