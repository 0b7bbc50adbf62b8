"""Stands in for the `datasets` library where llm-compressor is to run without it.

llm-compressor imports these names for texts that it downloads by itself; here it is given tokens as
a DataLoader and uses none of them.  datasets needs pyarrow and pandas, 60 MB of wheels, which are
too much to take to a machine without a network.
"""


class Dataset:
    """Never made."""


class DatasetDict:
    """Never made."""


class IterableDataset:
    """Never made."""


def load_dataset(*_: object, **__: object) -> Dataset:
    """Never called."""
    raise NotImplementedError("this is not the datasets library")
