"""A small writable Hub over real HTTP, strict where the real one is, with faults on demand.

    with HubServer() as hub:
        hub.store.token("hf_secret", user="ann", orgs=("acme",))
        hub.faults.add("status", status=503, on="PUT", times=2)
        ...HF_ENDPOINT=hub.url, HF_TOKEN=hf_secret, HF_HUB_DISABLE_XET=1...

What it answers is what huggingface_hub 2.4's own source asks for and makes of the answers
(`hf_api.py`, `_commit_api.py`, `lfs.py`, `file_download.py`, `utils/_http.py`).
"""

from support.hub.faults import Fault, Faults
from support.hub.server import HubServer, Request
from support.hub.store import Repo, Store, git_hash

__all__ = ["Fault", "Faults", "HubServer", "Repo", "Request", "Store", "git_hash"]
