"""README.md: the model card, made from what lies in a finished directory.

A card is no part of what SHA256SUMS seals, since it may be edited and the model validated again.
It carries a digest of itself in its last line: one that still fits was not edited, and is made anew
whenever there is something new to say; an edited one is left alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pipeline import __version__
from pipeline.checkpoint.index import read_json
from pipeline.checkpoint.seal import is_sealed, sealed
from pipeline.checkpoint.writer import write_bytes
from pipeline.errors import CheckpointError
from pipeline.hub.cache import refuse_hub_cache
from pipeline.plain_yaml import parse_yaml
from pipeline.recipe import OVERRIDDEN
from pipeline.report.build import existing_report

CARD_FILE = "README.md"
CONVERSION_FILE = "conversion.json"

_LEADING = re.compile(r"^(\d*)([-=.)])")
"""What makes a list or a heading at the beginning of a line."""
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$<>&])")


@dataclass(frozen=True)
class Wishes:
    """What the directory itself does not tell."""

    repo: str | None = None
    """Where it is published; None: the card names the directory."""
    license: str | None = None
    """Overrides the source's."""


def write_card(model: Path, wishes: Wishes = Wishes()) -> bool:
    """Write the card into a finished directory; false when an edited one is there and stays."""
    path = model / CARD_FILE
    refuse_hub_cache(path)
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    if before is not None and not is_sealed(before):
        return False
    text = make_card(model, wishes)
    if text != before:
        write_bytes(path, text.encode())
    return True


def make_card(model: Path, wishes: Wishes = Wishes()) -> str:
    """The card's text.  Whatever comes from files of the model is escaped."""
    conversion, resolved = _table(model / CONVERSION_FILE), _table(model / "recipe.resolved.yaml")
    report = existing_report(model)
    source = conversion.get("source") or {}
    config = read_json(model, "config.json")
    settings = config.get("quantization_config") or {}
    name = wishes.repo or model.name
    state = validation_state(model)
    recipe = _fenced(model / "recipe.yaml")
    environment = jinja2.Environment(
        autoescape=False,  # Markdown, not HTML; `plain` and `code` below escape for it
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": plain, "code": _code}
    template = (Path(__file__).parent / "templates" / "card.md").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        name=name,
        repo=name,
        version=__version__,
        scheme=plain(_scheme(settings)),
        source=source.get("model") or source.get("named") or "a model that was quantised already",
        commit=source.get("commit"),
        validated=state is None,
        unvalidated=state or "",
        facts=_facts(config, settings, conversion, resolved),
        report=report,
        machine=_machine(report),
        text=(report or {}).get("text", {}).get("text", "unknown"),
        results=_results(report),
        calibration=_calibration(conversion, resolved),
        recipe=recipe,
        overridden=recipe is not None and OVERRIDDEN in recipe,
    )
    card = ModelCard(f"---\n{_metadata(name, wishes, source, config, settings, report)}\n---\n")
    card.text = text
    return sealed(f"{card}".rstrip("\n") + "\n\n")


def validation_state(model: Path) -> str | None:
    """None for a model whose report is of these very weights and passed; else what is missing."""
    report = existing_report(model)
    if report is None:
        return "It was not validated."
    sums = model / "SHA256SUMS"
    identity = hashlib.sha256(sums.read_bytes()).hexdigest() if sums.is_file() else None
    if (report.get("question") or {}).get("sums") != identity:
        return "It has changed since it was validated."
    if not report.get("passed"):
        return f"It misses its thresholds: {'; '.join(report.get('failures') or ['?'])}."
    return None


def plain(value: object) -> str:
    """Any text as one line of Markdown that means nothing but itself.

    What cannot be seen (directions of writing, controls) is shown as a replacement character.
    """
    text = " ".join(str(value).split())
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return _LEADING.sub(r"\1\\\2", _SPECIAL.sub(r"\\\1", text))


def _code(value: object) -> str:
    """Any text inside a code span, a code block or quotes in one: what could end them is gone."""
    return re.sub(r"[^\w./@:+ -]", "", str(value))


def _fenced(path: Path) -> str | None:
    """A file as a code block, with a fence longer than any in it."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}\n{fence}"


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.suffix == ".json":
        return read_json(path.parent, path.name)
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _scheme(settings: Mapping[str, Any]) -> str:
    method = str(settings.get("quant_method", "unknown")).upper()
    return f"{method}, {settings.get('bits')} bits, group {settings.get('group_size')}"


def _facts(
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    conversion: Mapping[str, Any],
    resolved: Mapping[str, Any],
) -> list[tuple[str, object]]:
    wanted = resolved.get("requantize") or {}
    layout = settings.get("checkpoint_format") or settings.get("version") or "not said"
    symmetric = settings.get("sym", not settings.get("zero_point", False))
    facts: list[tuple[str, object]] = [
        ("architecture", config.get("model_type", "unknown")),
        ("format", f"{settings.get('quant_method')}, layout {layout}"),
        ("bits, group size", f"{settings.get('bits')}, {settings.get('group_size')}"),
        ("zero points", "none (symmetric)" if symmetric else "one per group (asymmetric)"),
        ("quantised", ", ".join(wanted.get("modules", [])) or "as config.json says"),
        ("method", conversion.get("method") or f"kept as it was ({conversion.get('kind')})"),
    ]
    return facts


def _machine(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return ""
    m = report["machine"]
    where = f"{m.get('device')}, {m.get('threads')} CPU threads ({m.get('cpu_capability')})"
    return f"{where}, torch {m.get('torch')}, transformers {m.get('transformers')}"


def _results(report: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if report is None:
        return []
    low, high = report["perplexity_ratio_interval"]
    rows = [
        ("perplexity of the baseline", f"{report['source']['perplexity']:.4f}"),
        ("perplexity", f"{report['quantized']['perplexity']:.4f}"),
        ("ratio, 95 % interval", f"{report['perplexity_ratio']:.4f}, {low:.4f} to {high:.4f}"),
        ("KL divergence, nats per token", f"{report['kl_divergence']:.5f}"),
        ("same top token", f"{report['top1_agreement']:.2%}"),
        ("decode, tokens/s", f"{report['decode_tokens_per_second']:.1f}"),
        ("prefill, tokens/s", f"{report['prefill_tokens_per_second']:.0f}"),
        ("load time", f"{report['load_seconds']:.1f} s"),
    ]
    reference = report.get("reference")
    if reference:
        low, high = reference["perplexity_ratio_interval"]
        rows += [
            (f"perplexity of the original, {reference['name']}", f"{reference['perplexity']:.4f}"),
            (
                "ratio to the original, 95 % interval",
                f"{reference['perplexity_ratio']:.4f}, {low:.4f} to {high:.4f}",
            ),
            ("KL divergence from the original", f"{reference['kl_divergence']:.5f}"),
        ]
    experts = report.get("experts") or {}
    if experts:
        rows.append(("expert matrices solved by plain rounding", str(experts["fallback"])))
    return rows


def _calibration(conversion: Mapping[str, Any], resolved: Mapping[str, Any]) -> list[str]:
    wanted = resolved.get("calibration") or {}
    lines = []
    licences = conversion.get("text_licences") or {}
    for source in wanted.get("sources", []):
        given = {"file": source} if isinstance(source, str) else source
        name = given.get("dataset") or given.get("file") or given.get("builtin")
        known = licences.get(str(name))
        where = "see the data set's own card" if given.get("dataset") else "not stated"
        lines.append(f"{Path(str(name)).name if not given.get('dataset') else name}:"
                     f" licences {known or where}")  # fmt: skip
    if lines:
        lines.append(
            f"{wanted.get('samples')} sequences of {wanted.get('sequence_length')} tokens,"
            f" seed {wanted.get('seed')}"
        )
    return lines


def _metadata(
    name: str,
    wishes: Wishes,
    source: Mapping[str, Any],
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    report: Mapping[str, Any] | None,
) -> str:
    licence = wishes.license or source.get("license")
    own: dict[str, Any] = {}
    if not wishes.license:
        own = {k: source[k] for k in ("license_name", "license_link") if source.get(k)}
    base = source.get("model")
    tags = ["requant", "moe", str(settings.get("quant_method", "")), f"{settings.get('bits')}-bit"]
    data = ModelCardData(
        base_model=base,
        language=source.get("language"),
        library_name="transformers",
        license=licence,
        pipeline_tag=str(source.get("pipeline_tag", "text-generation")),
        tags=[tag for tag in (*tags, str(config.get("model_type", ""))) if tag],
        model_name=name.rpartition("/")[2] if report else None,
        eval_results=_eval_results(report),
        **own | ({"base_model_relation": "quantized"} if base else {}),
    )
    return data.to_yaml()


def _eval_results(report: Mapping[str, Any] | None) -> list[EvalResult] | None:
    if report is None:
        return None
    text = str(report.get("text", {}).get("text", "unknown"))
    where = {"machine": _machine(report)}
    figures = [
        ("perplexity", "perplexity", report["quantized"]["perplexity"], None),
        ("perplexity_ratio", "perplexity over the baseline's", report["perplexity_ratio"], None),
        ("kl_divergence", "KL divergence, nats per token", report["kl_divergence"], None),
        ("top1_agreement", "same top token", report["top1_agreement"], None),
        ("tokens_per_second", "decode, tokens/s", report["decode_tokens_per_second"], where),
    ]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w.-]", "-", Path(text).stem) or "text",
            dataset_name=text,
            metric_type=kind,
            metric_name=label,
            metric_value=round(float(value), 6),
            metric_args=arguments,
        )
        for kind, label, value, arguments in figures
    ]
