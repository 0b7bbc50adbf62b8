"""bitsandbytes, imported when a bitsandbytes directory is decoded and not before."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

from pipeline.errors import CheckpointError


@cache
def functional() -> ModuleType:
    """`bitsandbytes.functional`; CheckpointError where it cannot be imported."""
    # On import it warns that its optional CPU matrix product is absent; nothing here multiplies.
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as module  # noqa: PLC0415
    except (ImportError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"bitsandbytes is needed to decode this model and cannot be imported ({error}); "
            "install it with pip"
        ) from error
    finally:
        log.setLevel(level)
    return module
