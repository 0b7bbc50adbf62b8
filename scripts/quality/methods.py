"""The rows of the table: what each is called, and what makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way to quantise.

    family: rows of one family store the same kind of numbers, and may be compared: gptq is
    symmetric, awq has zero points; `any` is compared with whatever is best.
    peer: module of `quality.peers` and environment; None where it is ours.
    settings: ours: of the recipe's `requantize`; a peer's: `method` as the contract has it.
    seconds: a run that takes longer is stopped, and its row says so.
    """

    name: str
    family: str
    settings: Mapping[str, Any]
    peer: str | None = None
    environment: str | None = None
    seconds: int = 2400
    package: str | None = None
    """Distribution whose version names the peer."""
    mends: str | None = None
    """Name of the peer's row that this one is without its known faults (see mended.py)."""


def _ours(name: str, family: str, **settings: str | bool | int) -> Method:
    return Method(name, family, settings)


def _gptqmodel(method: str, environment: str) -> Method:
    settings = {"method": method}
    return Method(
        f"GPTQModel {method}", method, settings, "gptqmodel_run", environment, package="gptqmodel"
    )


def _llm_compressor(name: str, family: str, method: str) -> Method:
    package, settings = "llmcompressor", {"method": method}
    return Method(name, family, settings, "llm_compressor", "llm-compressor", package=package)


def _auto_round(name: str, method: str) -> Method:
    settings = {"method": method}
    return Method(name, "autoround", settings, "auto_round_run", "auto-round", package="auto-round")


SOURCE = Method("source", "source", {})

METHODS = {
    method.name: method
    for method in (
        SOURCE,
        _ours("rounding min/max", "rounding", method="rtn", scale_search=False),
        _ours("rounding", "rounding", method="rtn"),
        _ours("rounding asymmetric", "rounding", method="rtn", symmetric=False),
        _ours(
            "ours gptq as published",
            "gptq",
            method="gptq",
            error_correction=False,
            refinement_passes=0,
            output_weighting=False,
        ),
        _ours("ours gptq", "gptq", method="gptq"),
        _ours("ours gptq asymmetric", "asymmetric", method="gptq", symmetric=False),
        _ours("ours awq", "awq", method="awq", symmetric=False),
        _ours("ours awq+gptq", "awq", method="awq+gptq", symmetric=False),
        _gptqmodel("gptq", "gptqmodel"),
        _gptqmodel("awq", "gptqmodel-awq"),
        _llm_compressor("llm-compressor gptq", "gptq", "gptq"),
        _llm_compressor("llm-compressor gptq all tokens", "gptq", "gptq-all"),
        _llm_compressor("llm-compressor awq", "awq", "awq"),
        _auto_round("AutoRound light", "autoround-light"),
        _auto_round("AutoRound", "autoround"),
    )
}


def _mended(name: str) -> Method:
    of = METHODS[name]
    said = f"{name} mended"
    return Method(said, "mended", {}, environment=of.environment, package=of.package, mends=name)


METHODS |= {row.name: row for row in (_mended("llm-compressor awq"),)}


def slug(name: str, group: int) -> str:
    """A row's name as a file's."""
    kept = "".join(c if c.isalnum() else "-" for c in name.lower())
    return "-".join(part for part in kept.split("-") if part) + f"-g{group}"
