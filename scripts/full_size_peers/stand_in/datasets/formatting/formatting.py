"""See the package above."""


class LazyRow:
    """Never made."""
