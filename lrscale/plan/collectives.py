"""Seconds of collectives over the links of a node and the fabric between nodes.

The alpha-beta model of Thakur, Rabenseifner and Gropp (Int. J. of High Performance Computing Applications 19(1), 2005)
for rings, as NCCL tunes them (src/graph/tuning.cc): a start-up that grows with the ranks, and bytes over the bandwidth of
what is slowest.
"""

from __future__ import annotations

from lrscale.config.hardware import Machine


def gather_s(machine: Machine, size: float, *, nodes: int, gpus_per_node: int, messages: int = 1) -> float:
    """Every rank ends with all `size` bytes (all-gather), or starts with them and ends with its sum (reduce-scatter).

    NCCL's rings pass each byte once into every node, over all adapters of the node side by side, and once past every
    GPU in it; both run at the same time. `messages` collectives make up the `size` bytes.
    """
    ranks = nodes * gpus_per_node
    if ranks == 1:
        return 0.0
    efficiencies = machine.efficiencies
    within_s = size * (gpus_per_node - 1) / gpus_per_node / (machine.gpu.link_gb_s * 1e9 * efficiencies.link.value)
    adapters = machine.fabric.adapters or gpus_per_node
    between_s = size * (nodes - 1) / nodes / (machine.fabric.gb_s * 1e9 * adapters * efficiencies.fabric.value)
    return max(within_s, between_s) + messages * start_up_s(machine, nodes, gpus_per_node)


def all_reduce_s(machine: Machine, size: float, gpus: int) -> float:
    """Within a node: 2 (n-1)/n of the bytes past every GPU, and an engine's own start-up."""
    if gpus == 1:
        return 0.0
    moved = 2 * size * (gpus - 1) / gpus
    return machine.overheads.all_reduce_us.value * 1e-6 + moved / (
        machine.gpu.link_gb_s * 1e9 * machine.efficiencies.link.value
    )


def start_up_s(machine: Machine, nodes: int, gpus_per_node: int) -> float:
    """Of one collective: a ring passes every GPU of a node, and every node."""
    overheads = machine.overheads
    within = nodes * (gpus_per_node - 1) * overheads.hop_us.value
    return 1e-6 * (overheads.collective_us.value + within + (nodes - 1) * overheads.node_hop_us.value)
