"""Which ranks there are, and how the sequences of an RL step come to lie on them."""

from __future__ import annotations

from dataclasses import dataclass

from lrscale.config.recipe import Recipe

_SAFETY = 2.0
_SETTLING_S = 600.0
"""Time for imports, process groups and the first collectives, whatever the model's size."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Nodes and ranks of a job."""

    nodes: int
    """Of the trainer."""
    ranks_per_node: int
    gpus_per_node: int
    """0 where the recipe runs on CPUs."""
    roles: tuple[tuple[str, int], ...] = ()
    """Name and nodes of what runs beside the trainer."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def other_nodes(self) -> int:
        return sum(nodes for _, nodes in self.roles)

    @property
    def gpus(self) -> int:
        return (self.nodes + self.other_nodes) * self.gpus_per_node


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The sequences of one optimizer step, shared out: micro x accumulation x ranks = sequences.

    Micro-batches are packed by tokens; `micro` is how many sequences of the longest kind go into one.
    """

    sequences: int
    micro: int
    accumulation: int
    ranks: int
    updates: int
    """Optimizer steps an RL step."""


def topology(recipe: Recipe) -> Topology:
    """The ranks that a recipe asks for."""
    cluster = recipe.cluster
    return Topology(
        nodes=cluster.nodes,
        ranks_per_node=recipe.ranks_per_node,
        gpus_per_node=0 if recipe.model.device == "cpu" else cluster.gpus_per_node,
        roles=tuple((role.name, role.nodes) for role in cluster.split.roles),
    )


def batch_plan(recipe: Recipe) -> BatchPlan:
    """How the sequences of an RL step are shared out.

    Raises:
        ValueError: they do not divide over the ranks; the message names every factor and what would divide.
    """
    rl, there = recipe.stages.rl, topology(recipe)
    sequences = rl.prompts_per_step * rl.group_size
    if sequences % there.world_size:
        raise ValueError(
            f"{sequences} sequences an RL step (stages.rl.prompts_per_step {rl.prompts_per_step} x group_size "
            f"{rl.group_size}) do not divide over {there.world_size} ranks (cluster.nodes {there.nodes} x "
            f"{there.ranks_per_node} a node): some would wait for others in every step"
        )
    of_rank = max(1, sequences // rl.minibatches // there.world_size)
    most = min(of_rank, max(1, recipe.optimisation.micro_batch_tokens // longest_sequence(recipe)))
    micro = max(count for count in range(1, most + 1) if of_rank % count == 0)
    return BatchPlan(
        sequences=of_rank * there.world_size,
        micro=micro,
        accumulation=of_rank // micro,
        ranks=there.world_size,
        updates=rl.minibatches * rl.passes,
    )


def dividing_nodes(recipe: Recipe) -> list[int]:
    """Numbers of nodes over which the sequences of an RL step divide, the nearest below and above first."""
    rl, ranks, wanted = recipe.stages.rl, recipe.ranks_per_node, recipe.cluster.nodes
    sequences = rl.prompts_per_step * rl.group_size
    fitting = [nodes for nodes in range(1, sequences // ranks + 1) if sequences % (nodes * ranks) == 0]
    below = [nodes for nodes in fitting if nodes < wanted][-1:]
    return below + [nodes for nodes in fitting if nodes > wanted][:1]


def longest_sequence(recipe: Recipe) -> int:
    """Positions of the longest prompt (where the task limits it) with the longest completion."""
    return longest_prompt(recipe) + recipe.rollout.max_new_tokens


def longest_prompt(recipe: Recipe) -> int:
    """Tokens of the longest prompt; 0 where the task does not limit it."""
    return int(getattr(recipe.task, "max_prompt_tokens", 0))


def collective_timeout_s(recipe: Recipe, weights_gib: float) -> float:
    """How long ranks have to wait for each other at most: while one of them reads the whole model.

    DeepSpeed's own ten minutes end the start of a large model from a slow file system. Never below the default.
    """
    reading_s = weights_gib / recipe.cluster.read_gib_s
    default = float(type(recipe.parallel).model_fields["collective_timeout_s"].default)
    return max(default, float(round(_SAFETY * reading_s + _SETTLING_S)))
