"""The sections of a model's report: each turns a record into words, tables and pictures."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from pipeline.models import ARCHITECTURES
from pipeline.progress import duration, size
from pipeline.report import charts
from pipeline.report.figures import Picture
from pipeline.report.page import Section, Table
from pipeline.report.record import Interval, LayerRecord, Original, Record, Report
from pipeline.report.roads import by_layer, by_road
from pipeline.report.words import percent


def quality(record: Record) -> Section:
    """Perplexity, KL divergence, agreement and speed against their bounds."""
    r = record.report

    def row(name: str, source: str, result: str, interval: str, key: str = "") -> list[str]:
        bound = r.thresholds.get(key)
        asked = "" if bound is None else f"{'≥' if key in _AT_LEAST else '≤'} {bound:g}"
        missed = any(failure.startswith(f"{key} ") for failure in r.failures)
        return [name, source, result, interval, asked, "" if not asked else _mark(not missed)]

    rows = [
        row(
            "perplexity",
            f"{r.source.perplexity:.4f}",
            f"{r.quantized.perplexity:.4f}",
            _interval(r.quantized.interval, ".3f"),
        ),
        row(
            "perplexity ratio",
            "1",
            f"{r.perplexity_ratio:.4f}",
            _interval(r.perplexity_ratio_interval, ".4f"),
            "perplexity_ratio",
        ),
        row(
            "KL divergence, nats per token",
            "0",
            f"{r.kl_divergence:.5f}",
            _interval(r.kl_divergence_interval, ".5f"),
            "kl_divergence",
        ),
        row(
            "top-1 agreement",
            "100 %",
            percent(r.top1_agreement),
            _interval(r.top1_agreement_interval, "%"),
            "top1_agreement",
        ),
        row(
            "decoding, tokens/s",
            "",
            f"{r.decode_tokens_per_second:,.1f}",
            "",
            "decode_tokens_per_second",
        ),
        row("reading a prompt, tokens/s", "", f"{r.prefill_tokens_per_second:,.0f}", ""),
    ]
    text = r.text.get("text", "the validation text")
    lead = (
        f"Measured on {r.scored_tokens:,} tokens of {text}, against {r.baseline}. Intervals are"
        " 95 %, from drawing whole windows of text anew 2,000 times, the same for both models."
    )
    head = ("measure", "source", "result", "95 % interval", "bound", "kept")
    tables = [Table("Result against source", head, rows)]
    if r.reference is not None:
        tables.append(_against_original(r, r.reference))
        lead += (
            f" The second table is against {r.reference.name}, from which that source was made, on"
            " the same text: what the source itself had lost is in it."
        )
    return Section("quality", "Quality", lead, tables=tables)


def _against_original(report: Report, original: Original) -> Table:
    """Source and result beside the original; the record holds no KL of the source from it."""
    rows = [
        [
            "perplexity",
            f"{original.perplexity:.4f}",
            f"{report.source.perplexity:.4f}",
            f"{report.quantized.perplexity:.4f}",
            "",
        ],
        [
            "perplexity ratio",
            "1",
            f"{original.source_perplexity_ratio:.4f}",
            f"{original.perplexity_ratio:.4f}",
            _interval(original.perplexity_ratio_interval, ".4f"),
        ],
        ["KL divergence, nats per token", "0", "", f"{original.kl_divergence:.5f}", ""],
        ["top-1 agreement", "100 %", "", percent(original.top1_agreement), ""],
    ]
    head = ("measure", "original", "source", "result", "95 % interval")
    return Table("Result against the original", head, rows)


def damage(record: Record) -> Section | None:
    """What every layer lost; None for a model without such statistics."""
    layers = [layer for layer in record.conversion.layers if layer.gate_up_loss or layer.dense_loss]
    sparse = [layer for layer in layers if layer.gate_up_loss and layer.down_loss]
    if not layers:
        return None
    kinds = _layer_kinds(record)
    rows = [
        [
            str(layer.layer),
            kinds.get(layer.layer, ""),
            *(percent(value) for value in _spread(layer.gate_up_loss)),
            *(percent(value) for value in _spread(layer.down_loss)),
        ]
        for layer in sparse
    ]
    head = ["layer", "kind", "gate, up: median", "9 in 10 below", "worst"]
    head += ["down: median", "9 in 10 below", "worst"]
    numbers = Table("loss of every layer's experts", head, rows, numbers=2)
    pictures: list[tuple[Picture, Table | None]] = []
    if sparse:
        pictures.append((charts.loss_by_layer(sparse), numbers))
    classes = _losses_by_class(record, layers)
    if classes:
        table = Table(
            "loss by module class",
            ("class", "matrices", "median", "9 in 10 below", "worst"),
            [
                [name, f"{len(losses):,}", *(percent(v) for v in _spread(losses))]
                for name, losses in classes.items()
            ],
        )
        pictures.append((charts.loss_by_class(classes), table))
    lead = (
        "The part of a matrix's output that quantising it lost, as energy (squared) on the"
        " calibration text: 1 % is a relative error of 10 %. A layer that stands out is the first"
        " to look at when quality disappoints."
    )
    return Section("damage", "Damage, layer by layer", lead, pictures)


def experts(record: Record) -> Section | None:
    """How much calibration text every expert saw."""
    layers = [layer for layer in record.conversion.layers if layer.tokens]
    if not layers:
        return None
    counts = [count for layer in layers for count in layer.tokens]
    none = sum(1 for count in counts if count == 0)
    ranked = all(layer.effective_rank for layer in layers)
    rows = []
    for layer in layers:
        ordered = sorted(layer.tokens)
        busiest = layer.tokens.index(ordered[-1])
        rows.append(
            [
                str(layer.layer),
                f"{ordered[0]:,}",
                f"{_quantile(ordered, 0.1):,.0f}",
                f"{statistics.median(ordered):,.0f}",
                f"{_quantile(ordered, 0.9):,.0f}",
                f"{ordered[-1]:,} (expert {busiest})",
                str(ordered.count(0)),
            ]
        )
        if ranked:
            ranks = layer.effective_rank
            rows[-1] += [f"{min(ranks):.1f}", f"{statistics.median(ranks):.1f}"]
    head = ["layer", "fewest", "1 in 10 below", "median", "9 in 10 below", "most", "none"]
    if ranked:
        head += ["rank: lowest", "median"]
    numbers = Table("tokens per expert, by layer", head, rows)
    rounded = record.report.experts.get("fallback", 0)
    lead = (
        f"{len(counts):,} experts in {len(layers)} layers saw {min(counts):,} to"
        f" {max(counts):,} tokens of calibration text, half of them fewer than"
        f" {statistics.median(counts):,.0f}; {f'{none:,} saw none' if none else 'each saw some'}."
        f" {rounded or 'No'} {'matrix was' if rounded in (0, 1) else 'matrices were'} merely"
        " rounded: an expert with few tokens is solved with the layer's statistics mixed in."
    )
    pictures = [
        (charts.token_histogram(counts), None),
        (charts.token_map(layers), numbers),
    ]
    if ranked:
        lead += (
            " The effective rank is in how many directions an expert's inputs spread: one that is"
            " low beside the others' was calibrated on text of one kind."
        )
        pictures.append((charts.rank_by_layer(layers), None))
    return Section("experts", "What the experts saw", lead, pictures)


def resources(record: Record) -> Section:
    """Time and memory of every stage, against what the plan said."""
    rows = []
    for name, stage in record.report.stages.items():
        planned = stage.estimate
        rows.append(
            [
                name,
                duration(stage.seconds),
                duration(planned.seconds) if planned else "",
                _size(stage.peak_host_bytes),
                size(planned.host_bytes) if planned else "",
                _size(stage.peak_device_bytes or None),
                size(planned.device_bytes) if planned and planned.device_bytes else "",
            ]
        )
    head = ["stage", "time", "planned", "host memory", "planned", "GPU memory", "planned"]
    if not any(row[-1] or row[-2] for row in rows):
        head, rows = head[:-2], [row[:-2] for row in rows]
    total = sum(stage.seconds for stage in record.report.stages.values())
    planned_by = {n: s.estimate.seconds for n, s in record.report.stages.items() if s.estimate}
    lead = f"{duration(total)} in all."
    if planned_by:
        known = sum(record.report.stages[name].seconds for name in planned_by)
        lead += (
            f" The plan, made before the start, gave {duration(sum(planned_by.values()))} for what"
            f" took {duration(known)}."
        )
    lead += " Peaks of memory are of the whole process."
    seconds = {name: stage.seconds for name, stage in record.report.stages.items()}
    table = Table("Time and memory by stage", head, rows)
    picture = charts.stage_times(seconds, planned_by)
    return Section("resources", "Time and memory", lead, [(picture, None)], [table], columns=True)


def placement(record: Record) -> Section:
    """Where the loaded model lay while it was measured, and the roads of its experts' calls."""
    p = record.report.placement
    nbytes = p.expert_bytes or {"cpu": p.bytes.get("experts", 0)}
    on_gpu = p.device != "cpu"
    rest = {
        "quantised linear layers": p.bytes.get("quantized_linears", 0),
        "everything else": p.bytes.get("dense", 0),
    }
    experts = by_road(nbytes, p.use)
    rows = [[f"experts: {road}", place, held, calls] for road, place, held, calls in experts]
    rows += [[name, p.device if on_gpu else "RAM", size(n), ""] for name, n in rest.items()]
    backends = [
        [f"{kind}: {name}", str(count)]
        for kind, found in p.backends.items()
        for name, count in found.items()
    ]
    limit = p.device_memory_limit if on_gpu else None
    lead = "" if on_gpu else "There was no GPU: all of it is in RAM and computed by the CPU."
    if on_gpu:
        lead = "All but the experts is on the GPU"
        lead += f", of which {size(limit)} may be used" if limit else ""
        lead += f"; experts were placed as {p.request} says."
    if p.prompts:
        lead += f" Experts of the CPU were computed for prompts by {p.prompts}."
    if p.use:
        lead += " Calls are the router's choices on the evaluation text."
    resident = nbytes.get("resident", 0)
    picture = charts.placement(
        {"experts": sum(nbytes.values()) - resident, **({} if on_gpu else rest)},
        {"experts": resident, **rest} if on_gpu else {},
        limit,
    )
    head = ("part", "place", "size", "of calls")
    tables = [Table("Where the model is", head, rows, numbers=2)]
    if backends:
        tables.append(Table("What computes it", ("modules", "count"), backends))
    folded = []
    if p.ledger:
        name = "GPU memory, as counted before loading"
        counted = [*p.ledger.items(), ("all", sum(p.ledger.values()))]
        items = [[item, size(nbytes)] for item, nbytes in counted]
        folded.append((name, Table(name, ("for", "size"), items)))
    if len(experts) > 1:
        name = "Experts of each layer, and the part of its calls by road"
        folded.append((name, Table(name, *by_layer(p.experts, {"calls": p.use}))))
    return Section("placement", "Placement", lead, [(picture, None)], tables, folded, columns=True)


def environment(record: Record) -> Section:
    """Everything that figures and bytes depend on."""
    r = record.report
    rows = [[name.replace("_", " "), _plain(name, value)] for name, value in r.machine.items()]
    measured = Table("Measured on", ("what", "value"), rows, numbers=2)
    text = Table("Text", ("what", "value"), [[n, str(v)] for n, v in r.text.items()], numbers=2)
    name = "Everything that a byte of the result depends on"
    made = _flat(
        {k: v for k, v in record.conversion.fingerprint.items() if k not in ("source", "config")}
    )
    rows = [[k, v] for k, v in made.items()]
    folded = [(name, Table(name, ("what", "value"), rows, numbers=2))] if made else []
    lead = f"Validated {r.validated}. Another machine or version may give other figures."
    return Section("environment", "Environment", lead, (), [measured, text], folded, columns=True)


def recipe(record: Record) -> Section | None:
    """The recipe, untouched."""
    if not record.recipes:
        return None
    lead = (
        "As it was written (what --set changed is said in the first line), and as it was"
        " understood, with every default filled in; requant run takes the latter as it is."
    )
    return Section("recipe", "Recipe", lead, folded=list(record.recipes.items()))


_AT_LEAST = ("top1_agreement", "decode_tokens_per_second")


def _losses_by_class(record: Record, layers: Sequence[LayerRecord]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    architecture = ARCHITECTURES.get(str(record.config.get("model_type")))
    groups = (*architecture.mixer_groups, *architecture.shared_groups) if architecture else ()
    classes = {module: group.module_class for group in groups for module in group.modules}
    for layer in layers:
        found["experts: gate and up"] += layer.gate_up_loss
        found["experts: down"] += layer.down_loss
    for layer in layers:
        for name, loss in layer.dense_loss.items():
            found[classes.get(name, "other modules").replace("_", " ")].append(loss)
    return {name: losses for name, losses in found.items() if losses}


def _layer_kinds(record: Record) -> dict[int, str]:
    architecture = ARCHITECTURES.get(str(record.config.get("model_type")))
    if architecture is None:
        return {}
    try:
        kinds = architecture.geometry(record.config).layer_kinds
    except (KeyError, ValueError, TypeError):  # a config that is not of this architecture
        return {}
    return {number: kind.replace("_", " ") for number, kind in enumerate(kinds)}


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return statistics.median(ordered), _quantile(ordered, 0.9), ordered[-1]


def _quantile(ordered: Sequence[float], part: float) -> float:
    return ordered[round(part * (len(ordered) - 1))]


def _interval(interval: Interval | None, form: str) -> str:
    if interval is None:
        return ""
    low, high = (percent(end) if form == "%" else f"{end:{form}}" for end in interval)
    return f"{low} to {high}"


def _mark(kept: bool) -> str:
    return "✓" if kept else "✗"


def _size(count: int | None) -> str:
    return "" if count is None else size(count)


def _plain(name: str, value: object) -> str:
    return size(value) if name == "host_memory" and isinstance(value, int) else str(value)


def _flat(table: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested tables as one, keys joined by dots."""
    found: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found
