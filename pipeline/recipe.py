"""What the user asked for: a recipe, frozen, with unknown keys refused.

A recipe is a small YAML file (see recipes/).  Every key has a default but `source.model` and
`output.path`.  Relative paths are relative to the directory the command runs in.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from pipeline.errors import RecipeError
from pipeline.plain_yaml import parse_yaml, read_yaml

OVERRIDDEN = "# with --set "
"""Begins the line of comment that `load_recipe` puts before a text that does not say all."""

MESSAGES = {
    "byte_size": "give a size such as 10GiB",
    "model_type": "this is a section: give it keys of its own",
    "none_required": "this key is reserved for later; leave it out",
    "tuple_type": "give a list, such as [a, b]",
    "too_short": "give at least one",
    "string_too_short": "must not be empty",
}
"""What a person needs to read, in place of pydantic's words for the same error."""


class Section(BaseModel):
    """Base of all recipe sections: immutable, no unknown keys, no silent type changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _byte_size(value: object) -> object:
    # ByteSize in strict mode takes integers alone; recipes say "24GiB".
    if isinstance(value, str):
        return ByteSize._validate(value, None)  # type: ignore[arg-type]
    if isinstance(value, int) and not isinstance(value, bool):
        return ByteSize(value)
    raise ValueError("give a size such as 10GiB")


Size = Annotated[ByteSize, BeforeValidator(_byte_size)]


class Source(Section):
    """The checkpoint to convert."""

    model: str = Field(min_length=1)
    """A directory, or a Hub id, which is downloaded into the Hub's local cache."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); only with a Hub id."""
    reference: str | None = Field(default=None, min_length=1)
    """The original that the source was quantised from, only to measure against."""


class Output(Section):
    """Where the result goes."""

    path: str = Field(min_length=1)


class Dequantize(Section):
    """Stage 1."""

    write: bool = False
    """Also write a bf16 checkpoint of its own, to `<output.path>-bf16`."""


class Requantize(Section):
    """Stage 2: what is quantised, and how."""

    method: str = "gptq"
    """A quantiser by name (`pipeline.quantize.methods`); checked when the plan is made."""
    format: str | None = None
    """How results are stored, gptq or awq; null: as the method's name says, else gptq."""
    bits: Literal[4, 8] = 4
    group_size: Literal[32, 64, 128, -1] = 128
    symmetric: bool = True
    modules: tuple[str, ...] = Field(default=("experts",), min_length=1, strict=False)
    """Module classes by the names that the model's architecture gives them; checked likewise."""
    damping: float = Field(default=0.1, gt=0, le=1)
    """Added to the Hessian's diagonal, as a fraction of the diagonal's mean."""
    activation_order: bool = True
    """Solve columns by decreasing activation energy; groups stay static and g_idx trivial."""
    error_correction: bool = True
    """Let the experts make up for what earlier layers lost (GPTAQ); needs the calibration text to
    go through the source too.  Without meaning for methods that use no statistics."""
    router_weighted: bool = False
    """Weight an expert's tokens by the square of what the router gives them."""
    scale_search: bool = True
    """Search scales for the least squared error; false: from the minimum and maximum."""
    negative_scales: bool = True
    """Let symmetric groups have scales below 0, which fit better; false: for some readers."""
    refinement_passes: int = Field(default=2, ge=0, le=20)
    """GPTQ: passes over the codes after the first, scales refitted in between; 0: as published."""
    output_weighting: bool = True
    """GPTQ: weigh errors of the experts' outputs by what the rest of the model listens to."""


class CalibrationSource(Section):
    """Where calibration text comes from; docs/calibration.md has an example of each kind."""

    builtin: str | None = Field(default=None, min_length=1)
    """A text of the repository's calibration/, by its name without .txt."""
    file: str | None = Field(default=None, min_length=1)
    """A text, or records in .jsonl or .parquet."""
    dataset: str | None = Field(default=None, min_length=1)
    """A data set on the Hub, streamed."""
    config: str | None = Field(default=None, min_length=1)
    split: str | None = Field(default=None, min_length=1)
    """Null: train."""
    revision: str | None = Field(default=None, min_length=1)
    column: str | None = Field(default=None, min_length=1)
    """Column or field; null: `messages` of a chat, `text` otherwise."""
    chat: bool = False
    """The column holds a list of {role, content}, for the tokenizer's chat template."""
    weight: float | None = Field(default=None, ge=0)
    """Share of the sequences, relative to the other sources'."""

    @model_validator(mode="after")
    def _one_kind(self) -> CalibrationSource:
        if sum(kind is not None for kind in (self.builtin, self.file, self.dataset)) != 1:
            raise ValueError("give one of builtin, file and dataset")
        if self.dataset is None:
            for key in ("config", "split", "revision"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} goes with dataset only")
        return self

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only what was given, so that a resolved recipe stays readable."""
        return {k: v for k, v in handler(self).items() if v is not None and v is not False}


def _source(value: object) -> object:
    # A plain string is a file's path.
    return {"file": value} if isinstance(value, str) else value


class Calibration(Section):
    """Text that the Hessians are measured on."""

    sources: tuple[Annotated[CalibrationSource, BeforeValidator(_source)], ...] = Field(
        default=(CalibrationSource(file="calibration/docs-calib.txt"),), min_length=1, strict=False
    )
    samples: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=2048, ge=16)
    packing: bool = True
    """Records follow one another; false: a record gives the sequence it begins with."""
    seed: int = Field(default=0, ge=0)


class Thresholds(Section):
    """Bounds that turn the measurement into pass or fail; null: not judged."""

    perplexity_ratio: float | None = Field(default=1.03, gt=0)
    kl_divergence: float | None = Field(default=None, gt=0)
    top1_agreement: float | None = Field(default=None, gt=0, le=1)
    decode_tokens_per_second: float | None = Field(default=None, gt=0)


class Validate(Section):
    """Stage 4: what the result is measured on."""

    text: str = "calibration/docs-eval.txt"
    window: int = Field(default=1024, ge=16)
    """Tokens a window holds."""
    stride: int = Field(default=512, ge=1)
    """Tokens from one window's start to the next; window - stride are context only."""
    max_windows: int | None = Field(default=64, ge=1)
    device_memory: Size = ByteSize(10 << 30)
    thresholds: Thresholds = Thresholds()


class Publish(Section):
    """Stage 5: where the result goes on the Hub; only with a repo."""

    repo: str | None = Field(default=None, min_length=1)
    """ORG/NAME; null: nothing is published."""
    private: bool = False
    """For a repository that is made; one that exists keeps what it is."""
    revision: str | None = Field(default=None, min_length=1)
    """A branch; null: main."""
    license: str | None = Field(default=None, min_length=1)
    """As the Hub spells it; null: the source's."""


class Limits(Section):
    """What the conversion may use."""

    device_memory: Size = ByteSize(24 << 30)
    host_memory: Size = ByteSize(24 << 30)
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; null: one per physical core.  Part of the result's fingerprint."""


class Recipe(Section):
    """All of it."""

    source: Source
    output: Output
    dequantize: Dequantize = Dequantize()
    requantize: Requantize = Requantize()
    calibration: Calibration = Calibration()
    validate_: Validate = Field(default=Validate(), alias="validate")
    publish: Publish = Publish()
    limits: Limits = Limits()

    def resolved(self) -> dict[str, Any]:
        """All keys with their values, defaults filled in, as plain YAML/JSON types."""
        return self.model_dump(mode="json", by_alias=True)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, str]:
    """Read a recipe and apply `a.b=c` overrides; returns it with its text as written, below a line
    of comment that names those overrides which change more than where the output goes.

    Raises RecipeError, in one line, for what cannot be read, parsed or understood.
    """
    data, text = read_yaml(path)
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no recipe: the top level must be a mapping of sections")
    overridden = [_apply(data, override) for override in overrides]
    recipe = parse_recipe(data, str(path), overridden)
    told = [shlex.quote(o) for o in overrides if not o.startswith("output.")]
    if told:
        line = " ".join(f"{OVERRIDDEN}{' --set '.join(told)}".split())  # whatever ends a line
        text = f"{line}\n{text}"
    return recipe, text


def parse_recipe(
    data: dict[str, Any], where: str, overridden: Collection[tuple[str, ...]] = ()
) -> Recipe:
    """Check a recipe given as plain data.

    `where` names it in messages; of the keys `overridden` they say that --set gave them.
    """
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        place = "--set" if _given(_first(error)["loc"], overridden) else where
        raise RecipeError(f"{place}: {first_error(error)}") from None
    validate = recipe.validate_
    if validate.stride > validate.window:
        either = (("validate", "stride"), ("validate", "window"))
        place = "--set" if any(_given(key, overridden) for key in either) else where
        raise RecipeError(
            f"{place}: validate.stride {validate.stride} is larger than"
            f" validate.window {validate.window}, which would skip text"
        )
    return recipe


def _given(location: tuple[int | str, ...], overridden: Collection[tuple[str, ...]]) -> bool:
    """Whether --set gave what lies at a location, something inside it, or what it lies in."""
    return any(all(a == b for a, b in zip(location, key, strict=False)) for key in overridden)


def _apply(data: dict[str, Any], override: str) -> tuple[str, ...]:
    """Give one key of `data` its value; returns where it is."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"--set takes key=value, such as requantize.group_size=32; got {override!r}"
        )
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {override}: {parent} is not a section")
    try:
        node[last] = parse_yaml(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: the value is not YAML") from None
    return (*parents, last)


def first_error(error: ValidationError, root: type[Section] = Recipe) -> str:
    """What is wrong first, in one line, with the nearest key of `root` for an unknown one."""
    first = _first(error)
    location = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(root, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "known here: " + ", ".join(known)
        return f"unknown key {location!r}; {hint}"
    if first["type"] == "missing":
        return f"{location} is missing"
    message = MESSAGES.get(first["type"], str(first["msg"]).removeprefix("Value error, "))
    given = repr(first["input"])
    given = given if len(given) <= 60 else f"{given[:57]}..."
    return f"{location}: {message[0].lower()}{message[1:]} (got {given})"


def _first(error: ValidationError) -> ErrorDetails:
    """An unknown key comes before a missing one, since it may be the missing one misspelt."""
    errors = error.errors()
    return next((e for e in errors if e["type"] in {"extra_forbidden", "invalid_key"}), errors[0])


def _keys_at(root: type[Section], location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = root
    for part in location:
        if isinstance(part, int):  # a place in a list; its members' section is chosen already
            continue
        by_name = {f.alias or name: f for name, f in section.model_fields.items()}
        annotation = by_name[str(part)].annotation
        candidates = [annotation, *get_args(annotation)]
        candidates += [inner for c in candidates for inner in get_args(c)]  # tuple[Annotated[...]]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return sorted(f.alias or name for name, f in section.model_fields.items())
