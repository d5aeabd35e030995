"""What machines can do: the shipped constants, a file of the user's own on top, single values on top of that."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from lrscale.config.base import PositiveFloat, PositiveInt, Section
from lrscale.config.errors import Place, Problem, RecipeError
from lrscale.config.shipped import plan_data
from lrscale.config.source import parse_value, read_file

DEFAULT_GPU, DEFAULT_FABRIC = "h100-80", "ndr-400"


class Gpu(Section):
    """One kind of GPU, as its data sheet has it."""

    name: str
    bf16_tflops: PositiveFloat
    """Peak of dense bf16 products, in 1e12 floating point operations a second."""
    fp32_tflops: PositiveFloat
    """Of float32 products without TF32, which torch does not use by itself."""
    memory_gib: PositiveFloat
    memory_tb_s: PositiveFloat
    """Bandwidth of its memory, in 1e12 bytes a second."""
    link_gb_s: PositiveFloat
    """To the other GPUs of its node, one direction, in 1e9 bytes a second."""
    power_w: PositiveFloat
    source: str


class Fabric(Section):
    """The network between nodes."""

    gb_s: PositiveFloat
    """Of one adapter, one direction, in 1e9 bytes a second."""
    adapters: PositiveInt | None = None
    """A node; None: each GPU has its own."""
    source: str


class Efficiency(Section):
    """The share of a peak that programs reach."""

    value: Annotated[float, Field(gt=0, le=1)]
    source: str


class Overhead(Section):
    """A constant in the unit that its name ends with."""

    value: PositiveFloat
    source: str


class Spread(Section):
    """Standard deviation of a logarithm; with more, a mean says nothing."""

    value: Annotated[float, Field(gt=0.0, le=3.0)]
    source: str


class PartialShare(Section):
    """A share that is never all."""

    value: Annotated[float, Field(ge=0.0, lt=1.0)]
    source: str


class Efficiencies(Section):
    """Shares of peaks."""

    training: Efficiency
    prefill: Efficiency
    decode_bandwidth: Efficiency
    link: Efficiency
    fabric: Efficiency
    overlap: Efficiency
    memory_step: Efficiency


class Overheads(Section):
    """What does not follow from peaks."""

    decode_step_ms: Overhead
    all_reduce_us: Overhead
    eager_layer_us: Overhead
    collective_us: Overhead
    hop_us: Overhead
    node_hop_us: Overhead
    fragmentation_gib: Overhead
    engine_gib: Overhead
    engine_memory_share: Overhead
    engine_colocated_share: Overhead
    publish_gb_s: Overhead
    publish_s: Overhead
    files_gb_s: Overhead
    host_gb_s: Overhead
    host_memory_gb_s: Overhead
    checksum_gb_s: Overhead
    start_s: Overhead
    engine_start_s: Overhead
    node_power_factor: Overhead


class SequenceConstants(Section):
    """What a plan assumes of prompts and completions where neither options nor a run tell."""

    prompt_share: Efficiency
    completion_share: Efficiency
    prompt_tokens: Overhead
    length_spread: Spread
    latent_share: PartialShare
    positive_share: Efficiency
    scoring_s: Overhead


class RunConstants(Section):
    """What `lrscale plan --simulate` assumes of a run where neither options nor another run tell."""

    failures_per_node_day: Overhead
    detect_s: Overhead
    requeue_s: Overhead
    score_spread: Spread
    sentence_tokens: Overhead
    marker_tokens: Overhead


class HardwareData(Section):
    """All constants of a plan."""

    gpus: dict[str, Gpu]
    fabrics: dict[str, Fabric]
    efficiencies: Efficiencies
    overheads: Overheads
    sequences: SequenceConstants
    runs: RunConstants


class Machine(Section):
    """The GPU and fabric that a plan is for, and what programs make of them."""

    gpu_name: str
    gpu: Gpu
    fabric_name: str
    fabric: Fabric
    efficiencies: Efficiencies
    overheads: Overheads
    sequences: SequenceConstants
    runs: RunConstants


def load_machine(
    gpu: str = DEFAULT_GPU, fabric: str = DEFAULT_FABRIC, *, file: Path | None = None, constants: Sequence[str] = ()
) -> Machine:
    """The machine by its names.

    Args:
        gpu: A name in `gpus`.
        fabric: A name in `fabrics`.
        file: YAML of the shipped file's form, in part; it may name GPUs of its own.
        constants: `efficiencies.training=0.5`, on top of everything.

    Raises:
        RecipeError: an unknown GPU, fabric or constant (with the nearest name), or a value out of its range.
    """
    shipped = plan_data() / "hardware.yaml"
    values = dict(read_file(shipped).values)
    if file is not None:
        if not file.is_file():
            raise RecipeError([Problem(Place(str(file)), "", f"no such file: {file}", "give a YAML file")])
        values = _merged(values, read_file(file).values, str(file))
    for constant in constants:
        values = _with_constant(values, constant)
    data = _validated(values, str(file or shipped))
    return Machine(
        gpu_name=gpu,
        gpu=data.gpus[_known(gpu, data.gpus, "--gpu", "GPU")],
        fabric_name=fabric,
        fabric=data.fabrics[_known(fabric, data.fabrics, "--fabric", "fabric")],
        efficiencies=data.efficiencies,
        overheads=data.overheads,
        sequences=data.sequences,
        runs=data.runs,
    )


def _known(name: str, there: Iterable[str], option: str, what: str) -> str:
    names = list(there)
    if name not in names:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        help_ = f"{hint}known: {', '.join(names)}; another one goes into a file (--hardware)"
        raise RecipeError([Problem(Place(f"{option} {name}"), "", f"unknown {what}: {name}", help_)])
    return name


def _merged(base: Mapping[str, Any], over: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Mappings key by key; a bare number in place of a constant with its source is that constant's value."""
    merged = dict(base)
    for name, value in over.items():
        former = merged.get(name)
        if isinstance(former, Mapping) and isinstance(value, Mapping):
            merged[name] = _merged(former, value, source)
        elif isinstance(former, Mapping) and "value" in former:
            merged[name] = {"value": value, "source": source}
        else:
            merged[name] = value
    return merged


def _with_constant(values: Mapping[str, Any], constant: str) -> dict[str, Any]:
    name, equals, text = constant.partition("=")
    place = Place(f"--constant {constant}")
    known = list(_leaves(values))
    if not equals or name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        message = f"unknown constant: {name}" if equals else f"a constant is written key=value; {constant!r} is not"
        help_ = f"did you mean {near[0]}?" if near else "for example --constant efficiencies.training=0.5"
        raise RecipeError([Problem(place, "", message, help_)])
    nested = parse_value(text, place.source, tuple(name.split("."))).values
    return _merged(values, nested, str(place))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for name, value in values.items():
        if isinstance(value, Mapping) and "value" not in value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _validated(values: Mapping[str, Any], source: str) -> HardwareData:
    try:
        return HardwareData.model_validate(values)
    except ValidationError as error:
        problems = []
        for details in error.errors(include_url=False):
            key = ".".join(str(part) for part in details["loc"])
            problems.append(Problem(Place(source), key, f"{key}: {details['msg']}"))
        raise RecipeError(problems) from error
