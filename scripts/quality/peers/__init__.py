"""One file per peer; each runs in that peer's environment by the contract in `contract.py`."""
