"""Storage formats, one file each; adding a file adds a format."""

from pipeline.checkpoint.stored import StorageFormat
from pipeline.registry import Registry

FORMATS: Registry[StorageFormat] = Registry(__name__, "storage format")
