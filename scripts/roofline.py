"""What bytes alone allow a hybrid Qwen3-Next-80B; `bench_hybrid.py` prints it."""

from __future__ import annotations

LAPTOP = {"pcie": 13.0e9, "ram": 70e9, "gpu": 500e9}
"""RTX 4090 laptop: PCIe 4 x8 (15.75 GB/s), two channels of DDR5-5600 (89.6 GB/s), 576 GB/s; each
taken at what this kind of link usually gives."""

HITS = (0.0, 0.1, 0.3, 0.7, 0.85)
"""Parts of calls that experts on the GPU serve.  4 GB hold 51 of a layer's 512: 10 % of calls, if
all are used alike.  70 % is the aim on such a laptop; 85 % was reported of 120 of 512 experts a
layer that follow use (QwenLM/Qwen3-Coder#562)."""


def print_roofline(rates: dict[str, float]) -> None:
    """What bytes alone allow, here and on the user's likely machine."""
    experts, others, layer = 48 * 10 * 1.63e6, 4.09e9, 512 * 1.63e6
    for name, at in (("here", rates), ("laptop", LAPTOP)):
        if "pcie" not in at:
            continue
        ram = at["ram"]
        for hits in HITS:
            misses = experts * (1 - hits)
            rest = others / at["gpu"] + experts * hits / at["gpu"]
            one = rest + misses / at["pcie"]
            both = rest + misses / (at["pcie"] + max(ram - at["pcie"], 0))
            print(
                f"roofline {name:7s} {hits:.0%} hits: decode {1 / one:.0f} tok/s over PCIe alone, "
                f"{1 / both:.0f} with both roads"
            )
        print(f"roofline {name:7s} prefill 4096: {4096 / (48 * layer / at['pcie']):,.0f} tok/s")
