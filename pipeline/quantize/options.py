"""What a solver may be told besides the scheme: numbers only, a recipe maps onto it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SolverOptions:
    """Settings of the quantisers; a quantiser ignores what has no meaning for it."""

    damping: float = 0.1
    """Added to the Hessian's diagonal, as a fraction of the diagonal's mean.

    The usual 0.01 fits the calibration text too closely: on text held back 0.1 lost as little with
    50 tokens per input column and far less with 4, which is what an expert sees in practice."""
    activation_order: bool = True
    """Columns of large second moment first.  Groups and stored order stay as they are, so `g_idx`
    is trivial."""
    scale_search: bool = True
    """Search shrunk ranges for the least squared error; False: plain minimum and maximum."""
    negative_scales: bool = True
    """Let a symmetric group whose largest weight lies above zero have a scale below 0, so that it
    has the longer side of the grid (-8 to 7 steps at 4 bits); False: for readers that cannot."""
    refinement_passes: int = 2
    """Passes of coordinate descent over the codes after the column loop, scales being refitted
    between two of them (where `scale_search` allows); 0: GPTQ as published."""

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"damping must be positive and finite, not {self.damping}")
        if self.refinement_passes < 0:
            raise ValueError(f"refinement_passes must be 0 or more, not {self.refinement_passes}")
