"""Reports, plans and inspections as tables on a terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.checkpoint.summary import Summary
from pipeline.hybrid.generate import Generated
from pipeline.plan import Plan
from pipeline.progress import duration, size
from pipeline.report.roads import by_layer, by_road

BAR_WIDTH = 40
"""Characters of the longest bar."""


def result_table(report: Mapping[str, Any]) -> Table:
    """The figures of a report.json, best known first."""
    table = Table(title=str(report.get("model", "result")), show_header=True)
    table.add_column("measure")
    table.add_column("value", justify="right")
    low, high = report["perplexity_ratio_interval"]
    rows = [
        ("source", str(report.get("baseline", "not known"))),
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
    reference = report.get("reference")
    if reference:
        low, high = reference["perplexity_ratio_interval"]
        rows += [
            ("reference", str(reference["name"])),
            ("reference perplexity", f"{reference['perplexity']:.4f}"),
            ("source / reference perplexity", f"{reference['source_perplexity_ratio']:.4f}"),
            (
                "quantised / reference perplexity",
                f"{reference['perplexity_ratio']:.4f}  [{low:.4f}, {high:.4f}]",
            ),
            ("KL divergence from reference", f"{reference['kl_divergence']:.5f}"),
            ("top-1 agreement with reference", f"{reference['top1_agreement']:.2%}"),
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
        odd = (
            ("Hessians damped more than asked", "raised_damping"),
            ("groups on the smallest scale (zeros, or tiny)", "smallest_scales"),
        )
        rows += [(what, f"{experts[key]:,}") for what, key in odd if experts.get(key)]
    verdict = "passed" if report["passed"] else "FAILED: " + "; ".join(report["failures"])
    for name, value in [*rows, ("verdict", verdict)]:
        table.add_row(name, value)
    return table


def coverage_table(report: Mapping[str, Any]) -> Table | None:
    """How many experts saw how many tokens, over all layers, by powers of two; None: not known."""
    layers = (report.get("experts") or {}).get("coverage") or []
    counts = [count for layer in layers for count in layer["tokens"]]
    if not counts:
        return None
    ranks = [rank for layer in layers for rank in layer["effective_rank"]]
    table = Table(title=f"tokens that {len(counts):,} experts saw in calibration")
    table.add_column("tokens", justify="right")
    table.add_column("experts", justify="right")
    if ranks:
        table.add_column("effective rank, median", justify="right")
    table.add_column("")
    bins = [count.bit_length() for count in counts]  # 0; 1; 2 to 3; 4 to 7; ...
    largest = max(bins.count(bits) for bits in bins)
    for bits in range(min(bins), max(bins) + 1):
        low, high = (1 << bits) >> 1, max((1 << bits) - 1, 0)
        members = [i for i, found in enumerate(bins) if found == bits]
        cells = [f"{low:,}" if low == high else f"{low:,} to {high:,}", f"{len(members):,}"]
        if ranks:
            inside = [ranks[i] for i in members]
            cells.append(f"{statistics.median(inside):.1f}" if inside else "")
        table.add_row(*cells, "#" * math.ceil(BAR_WIDTH * len(members) / largest))
    return table


def plan_verdict(plan: Plan) -> str:
    """One line: what is left to do, and how long it may take."""
    left = sum(map(plan.job_seconds, plan.left))
    if plan.have.state == "other":
        return f"a run would refuse: {plan.have.reason}"
    if not plan.left:
        return "everything is done: a run would only judge the thresholds again"
    if plan.have.state == "new":
        return f"nothing is done yet: about {duration(left)} on {plan.device}"
    stages = ", ".join(dict.fromkeys(job.stage for job in plan.left))
    done = len(plan.jobs) - len(plan.left)
    what = "the model is made" if plan.have.state == "finished" else "unfinished work is there"
    return (
        f"{what}: {done} of {len(plan.jobs)} units are done; about {duration(left)} on"
        f" {plan.device} are left ({stages})"
    )


def plan_table(plan: Plan) -> Table:
    """Jobs summed by stage, and what the machine must have."""
    table = Table(title=f"plan for {plan.device}")
    table.add_column("stage")
    for name in ("units", "done", "reads", "writes", "time", "host memory", "device memory"):
        table.add_column(name, justify="right")
    for stage in dict.fromkeys(job.stage for job in plan.jobs):
        jobs = [job for job in plan.jobs if job.stage == stage]
        done = sum(job.unit in plan.have.done for job in jobs)
        table.add_row(
            stage,
            str(len(jobs)),
            "all" if done == len(jobs) else str(done or ""),
            size(sum(job.bytes_read for job in jobs)),
            size(sum(job.bytes_written for job in jobs)),
            duration(sum(plan.job_seconds(job) for job in jobs)),
            size(max(job.host_bytes for job in jobs)),
            size(max(job.device_bytes for job in jobs)),
        )
    table.add_section()
    table.add_row(
        "needs, for all",
        str(len(plan.jobs)),
        str(len(plan.jobs) - len(plan.left) or ""),
        "",
        f"{size(plan.disk_bytes)} disk",
        duration(plan.seconds),
        size(plan.host_bytes),
        size(plan.device_bytes),
    )
    return table


def summary_table(title: str, summary: Summary) -> Table:
    """What `requant inspect` found."""
    pairs: dict[str, object] = {
        "weights": f"{size(summary.nbytes)}, {size(summary.expert_nbytes)} of it routed experts",
        "parameters": _count(summary.elements),
        "experts": f"{summary.experts} in each of {len(summary.layers)} layers,"
        f" {summary.expert_layout}",
    }
    shares = sorted(summary.formats.items(), key=lambda item: -item[1].nbytes)
    for name, share in shares:
        pairs[name] = f"{size(share.nbytes)}, {share.count:,} tensors, {_count(share.elements)}"
    pairs |= {
        "router": summary.router,
        "config.json says": summary.quant_method or "not quantised",
        "files": f"{summary.files}{', headers only' if summary.headers_only else ''}",
        "oddities": "; ".join(summary.oddities) or "none",
        "conflicts": "; ".join(summary.conflicts) or "none",
    }
    return pairs_table(title, pairs)


def _count(elements: int) -> str:
    """Parameters for people: 79.7 billion."""
    for unit, word in ((10**9, "billion"), (10**6, "million")):
        if elements >= unit:
            return f"{elements / unit:.1f} {word}"
    return f"{elements:,}"


def stats_tables(made: Generated) -> list[Table]:
    """Where the experts of a model were while it generated, the speed, and, where there is more
    than one road, the part of every layer's calls that each took."""
    placed = made.placement
    pairs: dict[str, object] = {
        "placement": f"{placed['request']}; all but the experts on {placed['device']}",
        "loaded in": duration(placed["load_seconds"]),
        "prefill": f"{made.prompt_tokens:,} tokens, {made.prefill_rate:.1f} tokens/s to the first",
        "decode": f"{made.new_tokens:,} tokens, {made.decode_rate:.1f} tokens/s",
    }
    roads = by_road(placed["expert_bytes"], made.decode_use)
    for road, place, nbytes, calls in roads:
        of_calls = f"; {calls} of the calls in decoding" if calls else ""
        pairs[f"experts, {road}"] = f"{nbytes} ({place}){of_calls}"
    if placed["prompts"]:
        pairs["experts, cpu, in prompts"] = f"computed by {placed['prompts']}"
    if some := placed["cpu_calls"]:
        most = "at most " if any(road == "resident" for road, *_ in roads) else ""
        pairs["calls divided"] = f"in decoding, the CPU computes {most}{some} of a token's a layer"
    pairs["experts by"] = ", ".join(placed["backends"]["experts"])
    tables = [pairs_table("generated", pairs)]
    if counted := placed["ledger"]:
        sizes = {name: size(nbytes) for name, nbytes in counted.items()}
        whole = {"all": size(sum(counted.values()))}
        tables.append(pairs_table("GPU memory, as counted before loading", sizes | whole))
    if len(roads) == 1:
        return tables
    head, rows = by_layer(
        placed["experts"], {"prefill": made.prefill_use, "decode": made.decode_use}
    )
    table = Table(title="experts of each layer, and the part of its calls by road")
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return [*tables, table]


def pairs_table(title: str, pairs: Mapping[str, object]) -> Table:
    """Names and values."""
    table = Table(title=title, show_header=False)
    table.add_column("name")
    table.add_column("value")
    for name, value in pairs.items():
        table.add_row(name, str(value))
    return table


def show(table: Table, err: bool = False) -> None:
    """Print to standard output, or error output; plain and unwrapped when it is not a terminal."""
    console = Console(stderr=err)
    if not console.is_terminal:
        console = Console(width=200, no_color=True, stderr=err)
    console.print(table)
