"""Reports, plans and inspections as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.checkpoint.summary import Summary
from pipeline.plan import Plan
from pipeline.progress import duration, size


def result_table(report: Mapping[str, Any]) -> Table:
    """The figures of a report.json, best known first."""
    table = Table(title=str(report.get("model", "result")), show_header=True)
    table.add_column("measure")
    table.add_column("value", justify="right")
    low, high = report["perplexity_ratio_interval"]
    rows = [
        ("source perplexity", f"{report['source']['perplexity']:.4f}"),
        ("quantised perplexity", f"{report['quantized']['perplexity']:.4f}"),
        ("perplexity ratio", f"{report['perplexity_ratio']:.4f}  [{low:.4f}, {high:.4f}]"),
        ("KL divergence, nats/token", f"{report['kl_divergence']:.5f}"),
        ("top-1 agreement", f"{report['top1_agreement']:.2%}"),
        ("scored tokens", f"{report['scored_tokens']:,}"),
        ("decode, tokens/s", f"{report['decode_tokens_per_second']:.1f}"),
        ("prefill, tokens/s", f"{report['prefill_tokens_per_second']:.0f}"),
        ("load time", duration(report["load_seconds"])),
        ("peak host memory", size(report["peak_host_bytes"])),
        ("peak device memory", size(report["peak_device_bytes"])),
    ]
    experts = report.get("experts") or {}
    if experts:
        rows += [
            ("experts per layer", str(experts["count"])),
            (
                "tokens per expert, least / median",
                f"{experts['tokens_min']} / {experts['tokens_median']:.0f}",
            ),
            ("matrices solved by plain rounding", str(experts["fallback"])),
        ]
    verdict = "passed" if report["passed"] else "FAILED: " + "; ".join(report["failures"])
    for name, value in [*rows, ("verdict", verdict)]:
        table.add_row(name, value)
    return table


def plan_table(plan: Plan) -> Table:
    """Jobs summed by stage, and what the machine must have."""
    table = Table(title=f"plan for {plan.device}: about {duration(plan.seconds)}")
    table.add_column("stage")
    for name in ("units", "reads", "writes", "time", "host memory", "device memory"):
        table.add_column(name, justify="right")
    for stage in dict.fromkeys(job.stage for job in plan.jobs):
        jobs = [job for job in plan.jobs if job.stage == stage]
        table.add_row(
            stage,
            str(len(jobs)),
            size(sum(job.bytes_read for job in jobs)),
            size(sum(job.bytes_written for job in jobs)),
            duration(sum(plan.job_seconds(job) for job in jobs)),
            size(max(job.host_bytes for job in jobs)),
            size(max(job.device_bytes for job in jobs)),
        )
    table.add_section()
    table.add_row(
        "needs",
        str(len(plan.jobs)),
        "",
        f"{size(plan.disk_bytes)} disk",
        duration(plan.seconds),
        size(plan.host_bytes),
        size(plan.device_bytes),
    )
    return table


def summary_table(title: str, summary: Summary) -> Table:
    """What `requant inspect` found."""
    pairs: dict[str, object] = {"quant_method": summary.quant_method or "none"}
    for name, share in summary.formats.items():
        pairs[name] = f"{share.count:,} tensors, {share.elements:,} elements, {size(share.nbytes)}"
    pairs |= {
        "weights": f"{size(summary.nbytes)}, {size(summary.expert_nbytes)} of it routed experts",
        "experts": f"{summary.experts} in each of {len(summary.layers)} layers,"
        f" {summary.expert_layout}",
        "router": summary.router,
        "files": f"{summary.files}{', headers only' if summary.headers_only else ''}",
        "oddities": "; ".join(summary.oddities) or "none",
        "conflicts": "; ".join(summary.conflicts) or "none",
    }
    return pairs_table(title, pairs)


def pairs_table(title: str, pairs: Mapping[str, object]) -> Table:
    """Names and values."""
    table = Table(title=title, show_header=False)
    table.add_column("name")
    table.add_column("value")
    for name, value in pairs.items():
        table.add_row(name, str(value))
    return table


def show(table: Table) -> None:
    """Print to standard output, plain and unwrapped when it is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200, no_color=True)
    console.print(table)
