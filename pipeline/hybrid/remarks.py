"""What a load has to say of the machine or the model, said once."""

from __future__ import annotations

import logging
from functools import cache

log = logging.getLogger(__name__)


@cache  # once per process
def tell(remark: str) -> None:
    log.warning(remark)


@cache  # once per process and model
def tell_rounded(path: str, count: int, first: str) -> None:
    log.warning(
        "%s: scales of %d weights, %s first, were rounded to bfloat16 (up to 0.4 %%)",
        path,
        count,
        first,
    )
