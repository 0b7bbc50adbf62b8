"""What the system may refuse at any moment (disk, rights, memory), in one line with what helps.

The places that expect a refusal say it better; this is for all others.  What no user can mend by
other means than the code's stays what it is, with its traceback.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from pipeline.errors import OutputError, ResourceError

ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EIO: "the disk fails, see the system's log",
    errno.ENOENT: "put it back",
    errno.ESTALE: "mount the file system anew",
    errno.EACCES: "give this user the right to it",
    errno.EPERM: "give this user the right to it",
    errno.EROFS: "make the file system writable",
    errno.EXDEV: "set output.path to a directory that is no mount point",
    errno.EBUSY: "set output.path to a directory that is no mount point",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs' files",
    errno.ENOMEM: "free some memory",
    errno.ENOLCK: "use a file system that has locks",
    errno.ENAMETOOLONG: "choose a shorter path",
}
"""By error number, what helps."""

NO_MEMORY = ("can't allocate memory", "can't start new thread", "not enough memory", "bad_alloc")
"""How torch and Python word it, which have no exception of its own for it."""


def advice(error: OSError) -> str:
    """The end of a line that tells of it: "; DO THIS, then give the same command again", or ""."""
    helps = ADVICE.get(error.errno or 0)
    return "" if helps is None else f"; {helps}, then give the same command again"


@contextlib.contextmanager
def system_errors(where: str = "", kept: str = "") -> Iterator[None]:
    """Turn the system's refusals into OutputError and ResourceError.

    `where`: said first; `kept`: said before the advice to try again.
    """
    start, middle = f"{where}: " if where else "", f"{kept}, " if kept else ""
    try:
        yield
    except OSError as error:
        helps = ADVICE.get(error.errno or 0)
        if helps is None:
            raise
        path = "" if error.filename is None else f"{error.filename}: "
        again = f"{helps}; {middle}then give the same command again"
        raise OutputError(f"{start}{path}{error.strerror}; {again}") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in NO_MEMORY):
            raise
        raise ResourceError(
            f"{start}the machine's memory ran out; {middle}free some, or lower limits.host_memory,"
            " then give the same command again"
        ) from error
