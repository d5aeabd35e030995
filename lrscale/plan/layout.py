"""Which GPUs train and which generate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from lrscale.config.recipe import Recipe
from lrscale.plan.model_dims import ModelDims
from lrscale.plan.topology import topology

EngineKind = Literal["local", "vllm"]


class LayoutError(ValueError):
    """GPUs that cannot be shared out like that; `option` of the command line is the one to change."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


@dataclass(frozen=True, slots=True)
class Layout:
    """Placement of trainer and engines."""

    train_nodes: int
    gpus_per_node: int
    rollout_nodes: int = 0
    """Nodes that only generate; 0: trainer and engines share the GPUs by turns (colocated)."""
    engine: EngineKind = "local"
    """`local`: the training processes decode, with the trainer's weights; `vllm`: engines with weights of their own."""
    tensor_parallel: int = 1
    """GPUs that one engine spans."""
    engines_wanted: int | None = None
    """Engines where they are fewer than the GPUs have room for (rollout.engines); None: as many as these hold."""
    weight_files: bool = False
    """Whether engines get weights as files, and not by a collective or from the trainer's own memory."""
    one_step_off: bool = False
    """The next step's sequences are generated while this step's are trained on; needs GPUs that only generate."""

    def resized(self, **changes: Any) -> Layout:
        """Another number of nodes or GPUs an engine, with as many engines as these hold."""
        return replace(self, engines_wanted=None, **changes)

    @property
    def colocated(self) -> bool:
        return self.rollout_nodes == 0

    @property
    def train_gpus(self) -> int:
        return self.train_nodes * self.gpus_per_node

    @property
    def rollout_gpus(self) -> int:
        """GPUs that generate."""
        return (self.rollout_nodes or self.train_nodes) * self.gpus_per_node

    @property
    def engines(self) -> int:
        most = self.rollout_gpus // self.tensor_parallel
        return most if self.engines_wanted is None else min(most, self.engines_wanted)

    @property
    def nodes(self) -> int:
        return self.train_nodes + self.rollout_nodes

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


def layout_of(
    recipe: Recipe,
    *,
    engine: EngineKind | None = None,
    rollout_nodes: int | None = None,
    tensor_parallel: int | None = None,
    one_step_off: bool = False,
) -> Layout:
    """The recipe's own layout; None leaves to it what an option may decide.

    Nodes of `cluster.split` whose role is called rollout are the engines'. A run on CPUs is laid out as if each of
    its ranks had a GPU.
    """
    there = topology(recipe)
    of_role = dict(there.roles).get("rollout", 0)
    nodes = of_role if rollout_nodes is None else rollout_nodes
    engine = engine or ("vllm" if nodes else recipe.rollout.kind)
    own = engine == recipe.rollout.kind == "vllm" and rollout_nodes is None and tensor_parallel is None
    if tensor_parallel is None:
        rollout = recipe.rollout
        tensor_parallel = rollout.tensor_parallel if engine == rollout.kind == "vllm" else 1
    return Layout(
        train_nodes=there.nodes,
        gpus_per_node=there.ranks_per_node,
        rollout_nodes=nodes,
        engine=engine,
        tensor_parallel=tensor_parallel,
        engines_wanted=recipe.rollout.engines if own and recipe.rollout.kind == "vllm" else None,
        weight_files=recipe.rollout.kind == "vllm" and recipe.rollout.transport == "files",
        one_step_off=one_step_off,
    )


def require_layout(layout: Layout, dims: ModelDims) -> None:
    """Raises LayoutError, naming every factor, for a layout that nothing could run."""
    width = layout.tensor_parallel
    if min(layout.train_nodes, layout.gpus_per_node, width) < 1 or layout.rollout_nodes < 0:
        raise LayoutError(
            "--nodes",
            f"{layout.train_nodes} nodes of {layout.gpus_per_node} GPUs, {layout.rollout_nodes} nodes that generate, "
            f"engines of {width} GPUs: nodes, GPUs and GPUs an engine are at least 1",
        )
    if layout.engine == "local" and (width > 1 or layout.rollout_nodes):
        raise LayoutError(
            "--engine local",
            "the local engine decodes in the training processes: nodes that only generate and tensor parallelism need "
            "another engine (--engine vllm)",
        )
    if layout.one_step_off and layout.colocated:
        raise LayoutError(
            "--one-step-off",
            "one step off policy generates while it trains: it needs nodes that only generate (--rollout-nodes)",
        )
    option = f"--tensor-parallel {width}"
    if layout.rollout_gpus % width:
        raise LayoutError(
            option,
            f"tensor parallel {width} does not divide the {layout.rollout_gpus} GPUs that generate "
            f"({layout.rollout_nodes or layout.train_nodes} nodes of {layout.gpus_per_node})",
        )
    if layout.gpus_per_node % width:
        raise LayoutError(
            option,
            f"tensor parallel {width} does not divide the {layout.gpus_per_node} GPUs of a node: an engine's GPUs sum over "
            f"the links of one node; try {largest_divisor(layout.gpus_per_node, width)}",
        )
    for name, count in (("attention heads", dims.heads), ("width of the MLP", dims.intermediate)):
        if count % width:
            raise LayoutError(
                option,
                f"tensor parallel {width} does not divide the model's {name}, {count}, which an engine's GPUs share; "
                f"try {largest_divisor(count, width)}",
            )
    if max(dims.kv_heads, width) % min(dims.kv_heads, width):
        raise LayoutError(
            option,
            f"tensor parallel {width} neither divides the model's {dims.kv_heads} heads of keys and values nor is a "
            "multiple of them",
        )


def largest_divisor(count: int, most: int) -> int:
    """The largest number up to `most` that divides `count`."""
    return max(number for number in range(1, most + 1) if count % number == 0)
