"""The units of requantize: their names, their files, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.checkpoint.reader import Checkpoint
from pipeline.checkpoint.split import experts_file
from pipeline.quantize.methods import QUANTIZERS
from pipeline.quantize.rows import ROW_BLOCKS
from pipeline.quantize.scaling import EXPONENTS, SEARCH_ROWS
from pipeline.quantize.tensor import AffineScheme
from pipeline.stages.context import Context, Job
from pipeline.stages.formats import output_format
from pipeline.stages.nonexpert import PATTERN
from pipeline.stages.placement import place, stream_tokens
from pipeline.stages.stream import TOKENS_PER_BATCH
from pipeline.stages.texts import planned_windows
from pipeline.stages.tiling import TILE_EXPERTS, tiles

REFERENCE_FILE = "validation_reference.safetensors"
ORIGINAL_FILE = "validation_original.safetensors"
"""As REFERENCE_FILE, of the original that the recipe names as `source.reference`."""


def dense_file(layer: int) -> str:
    """Intermediate name of a layer's other tensors."""
    return f".work/dense-{layer:03d}.safetensors"


def streams_file(layer: int) -> str:
    """Intermediate name of the streams as they leave a layer."""
    return f".work/streams-{layer:03d}.safetensors"


def layer_unit(layer: int) -> str:
    """Name of a layer's unit."""
    return f"requantize-layer-{layer:03d}"


REFERENCE_UNIT = "requantize-reference"
ORIGINAL_UNIT = "requantize-original"


def jobs(context: Context) -> list[Job]:
    """One unit a layer, and one for the reference and the tensors outside all layers."""
    recipe, geometry = context.recipe, context.geometry
    calibration = recipe.calibration.samples * recipe.calibration.sequence_length
    evaluation = planned_windows(recipe) * recipe.validate_.window
    quantizer = QUANTIZERS[recipe.requantize.method]
    tokens = stream_tokens(context)
    streams = 2 * tokens * geometry.hidden
    by_layer, outer = _source_bytes(context)
    placement = place(context)
    on_gpu = context.device.type == "cuda"
    listed = []
    for layer in range(geometry.layers):
        sparse = layer in geometry.moe_layers
        experts = _packed_expert_bytes(context) * geometry.experts if sparse else 0
        dense_elements = by_layer[layer].dense_elements
        active = dense_elements
        active += geometry.top_k * 3 * geometry.hidden * geometry.inner if sparse else 0
        passes = 2 if quantizer.folds else 1  # of the calibration text, besides its last
        exact, half = 0.0, 2.0 * active * (passes * calibration + tokens)
        read = by_layer[layer].nbytes
        if sparse:
            solved, summed = _solve_flops(context, calibration)
            exact += solved
            # On a GPU the sums over tokens are products of bfloat16, elsewhere of float32.
            half, exact = (half + summed, exact) if on_gpu else (half, exact + summed)
            read *= 2 if quantizer.folds else 1  # the experts once more, for the search
        listed.append(
            Job(
                stage="requantize",
                unit=layer_unit(layer),
                inputs=tuple(sorted(by_layer[layer].files)),
                outputs=(dense_file(layer), *([experts_file(layer)] if sparse else [])),
                bytes_read=read,
                bytes_written=experts + 2 * dense_elements,
                bytes_scratch=2 * streams,  # those saved before are deleted last
                flops=exact,
                half_flops=half,
                steps=_steps(context) if sparse else 0,
                host_bytes=placement.host_bytes,
                device_bytes=placement.device_bytes,
                layer=layer,
            )
        )
    left = 2 * sum(its.dense_elements for its in by_layer)
    logits = 8 * max(TOKENS_PER_BATCH // 4, recipe.validate_.window) * geometry.vocabulary
    listed.append(
        Job(
            stage="requantize",
            unit=REFERENCE_UNIT,
            inputs=tuple(sorted(outer.files)),
            outputs=(REFERENCE_FILE, PATTERN),
            bytes_read=outer.nbytes + left,
            bytes_written=left + 2 * outer.dense_elements + 150 * evaluation,
            half_flops=2.0 * evaluation * geometry.hidden * geometry.vocabulary,
            host_bytes=4 * outer.dense_elements + streams + logits,
        )
    )
    if context.original is not None:
        listed.append(_original_job(context, context.original, evaluation, logits))
    return listed


def _original_job(context: Context, original: Checkpoint, evaluation: int, logits: int) -> Job:
    """The validation text through the original, layer by layer."""
    g = context.geometry
    elements = sum(weight.elements for weight in original.weights.values())
    experts = len(g.moe_layers) * g.experts * 3 * g.hidden * g.inner
    active = elements - experts + experts * g.top_k // g.experts
    tile = 2 * 2 * min(TILE_EXPERTS, g.experts) * 3 * g.inner * g.hidden
    dense = 2 * 2 * (elements - experts) // g.layers
    # The stream as it enters the layer, without its experts, and their inputs (bf16); the experts'
    # sums (float32); the routing of each pair.
    layer = evaluation * (g.hidden * (2 + 2 + 2 + 4) + g.top_k * 28)
    peak = layer + tile + dense + logits
    on_cpu = context.device.type == "cpu"
    return Job(
        stage="requantize",
        unit=ORIGINAL_UNIT,
        inputs=tuple(sorted(original.headers)),
        outputs=(ORIGINAL_FILE,),
        bytes_read=sum(weight.nbytes for weight in original.weights.values()),
        bytes_written=150 * evaluation,
        half_flops=2.0 * evaluation * active,
        host_bytes=peak if on_cpu else tile,
        device_bytes=0 if on_cpu else peak,
    )


@dataclass
class _Bytes:
    """What the source holds for one layer, or outside all layers."""

    nbytes: int = 0
    dense_elements: int = 0
    """Elements outside the routed experts; kept in bf16 unless the recipe says otherwise."""
    files: set[str] = field(default_factory=set)


def _source_bytes(context: Context) -> tuple[list[_Bytes], _Bytes]:
    architecture = context.architecture
    layers = [_Bytes() for _ in range(context.geometry.layers)]
    outer = _Bytes()
    owners = {architecture.layer_prefix(i): (layers[i], i) for i in range(len(layers))}
    depth = architecture.layer.count(".") + 1
    for name, weight in context.checkpoint.weights.items():
        prefix = ".".join(name.split(".")[:depth]) + "."
        owner = owners[prefix][0] if prefix in owners else outer
        owner.nbytes += weight.nbytes
        owner.files |= {part.file for part in weight.parts.values()}
        if not name.startswith(f"{prefix}{architecture.experts}."):
            owner.dense_elements += weight.elements
    return layers, outer


def _packed_expert_bytes(context: Context) -> int:
    """Stored bytes of one quantised expert: three matrices with all their parts."""
    recipe, geometry = context.recipe.requantize, context.geometry
    scheme = AffineScheme(recipe.bits, recipe.group_size, recipe.symmetric)
    written = output_format(recipe)
    wide = written.packed_bytes(scheme, geometry.inner, geometry.hidden)
    return 2 * wide + written.packed_bytes(scheme, geometry.hidden, geometry.inner)


def _solve_flops(context: Context, calibration: int) -> tuple[float, float]:
    """Operations for a layer's experts: of all else, and of the sums over tokens.

    The sums are Hessians and drift.  All else is searches, factorisations, the correction, and what
    the quantiser does with every weight and a Hessian, in units of a product of the two.
    """
    recipe = context.recipe.requantize
    quantizer = QUANTIZERS[recipe.method]
    if not quantizer.needs_hessian:
        return 0.0, 0.0
    g = context.geometry
    pairs = calibration * g.top_k
    sums = hessians = 2.0 * pairs * (g.hidden**2 + g.inner**2)
    search = 0.0
    if quantizer.folds:
        rows = min(2 * g.inner, SEARCH_ROWS) * g.hidden**2 + min(g.hidden, SEARCH_ROWS) * g.inner**2
        search = g.experts * len(EXPONENTS) * 2.0 * rows
        sums += hessians  # once more
    product = g.experts * 2.0 * (2 * g.inner * g.hidden**2 + g.hidden * g.inner**2)
    factor = g.experts * (g.hidden**3 + g.inner**3) / 3
    products, factors = 2.5, 1  # half a one for the column loop, one for each of two losses
    if recipe.refinement_passes:
        products += 2 * recipe.refinement_passes - 1  # a descent each, scales between two
    if recipe.error_correction:
        products += 2  # the drift's, and two halves for the triangular solves
        factors += 1
        sums += hessians
    return search + products * product + factors * factor, sums


def _steps(context: Context) -> int:
    """Columns that a layer's tiles go through: rounding with what it causes, then each descent."""
    recipe, g = context.recipe.requantize, context.geometry
    if not QUANTIZERS[recipe.method].needs_hessian:
        return 0
    solved = len(tiles(g.experts, context.tile_experts))
    weighs = recipe.output_weighting and QUANTIZERS[recipe.method].weighs_outputs
    columns = g.hidden + g.inner * (ROW_BLOCKS if weighs else 1)  # down is solved by blocks of rows
    return solved * columns * (1 + recipe.refinement_passes)
