"""What a run would take, before anything is started."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lrscale.cli import simulation
from lrscale.cli.app import Overrides, app, say
from lrscale.cli.number import number


class _Engine(StrEnum):
    """What decodes."""

    local = "local"
    vllm = "vllm"


@app.command()
def plan(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE]...", help="Files or names; none: tiny-cpu.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option("--nodes", "-N", min=1, help="Nodes of the trainer.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option("--gpus-per-node", min=1, help="GPUs of each.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Kind of GPU, e.g. h100-80, h200-141, a100-80, mi300x-192.")] = None,
    fabric: Annotated[str | None, typer.Option(help="Network between nodes, e.g. ndr-400, hdr-200.")] = None,
    engine: Annotated[_Engine | None, typer.Option(help="What decodes; default: the recipe's.")] = None,
    rollout_nodes: Annotated[
        int | None, typer.Option("--rollout-nodes", min=0, help="Further nodes that only generate; 0: colocated.")
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", min=1, help="GPUs an engine spans; default: the recipe's, or 1.")
    ] = None,
    one_step_off: Annotated[bool, typer.Option("--one-step-off", help="Generate while training.")] = False,
    prompt_tokens: Annotated[float | None, number(help="Mean length of prompts.")] = None,
    mean_new_tokens: Annotated[float | None, number(least=1, help="Mean positions of completions.")] = None,
    spread: Annotated[float | None, number(most=3, help="Of their log-normal lengths, 0 to 3.")] = None,
    latent_share: Annotated[float | None, number(below=1, help="Share of latent positions, below 1.")] = None,
    scoring_s: Annotated[
        float | None,
        number("--scoring-s", "--reward-s", help="Mean seconds that a score takes; workers score while others decode."),
    ] = None,
    price: Annotated[float | None, number(help="Of a GPU-hour, in any currency.")] = None,
    hardware: Annotated[Path | None, typer.Option(help="YAML with constants of your own.")] = None,
    constants: Annotated[
        list[str] | None,
        typer.Option("--constant", metavar="KEY=VALUE", help="One constant, e.g. efficiencies.training=0.5."),
    ] = None,
    lengths_from: simulation.LengthsFrom = None,
    simulate: simulation.Simulate = False,
    steps: simulation.Steps = None,
    seeds: simulation.Seeds = None,
    failures_per_node_day: simulation.FailuresPerNodeDay = None,
    requeue_s: simulation.RequeueS = None,
    charts: simulation.Charts = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: JSON on stdout.")] = False,
) -> None:
    """Memory, time and cost of a run before a GPU-hour is spent.

    Memory a GPU and a node by phase, what runs out first and what would help; the seconds of an RL step by a roofline;
    GPU-hours, energy and price. From the recipe and the model's dimensions alone: neither GPUs nor weights are needed.
    With --simulate the whole run as a simulation: time to the last step with its spread, what each role waits for, the
    best split of nodes and checkpoint interval, latents against words. The exit code is 0 whether it fits or not:
    `fits` of --json tells.
    """
    from lrscale.config.compose import Option
    from lrscale.config.hardware import DEFAULT_FABRIC, DEFAULT_GPU, load_machine
    from lrscale.config.load import load_recipe
    from lrscale.launch.plan_file import plan_json
    from lrscale.launch.planning import plan_of
    from lrscale.plan.run_text import assumptions, run_lines, run_values

    of_simulation = {
        "steps": steps,
        "seeds": seeds,
        "failures_per_node_day": failures_per_node_day,
        "requeue_s": requeue_s,
    }
    if not simulate:
        simulation.refuse_without_simulation(**of_simulation)
    machine = load_machine(gpu or DEFAULT_GPU, fabric or DEFAULT_FABRIC, file=hardware, constants=constants or ())
    wanted = {
        "--nodes": ("cluster.nodes", nodes),
        "--gpus-per-node": ("cluster.gpus_per_node", gpus_per_node),
        "--gpu": ("cluster.gpu_memory_gib", machine.gpu.memory_gib if gpu else None),
    }
    options = [Option(name, key, value) for name, (key, value) in wanted.items() if value is not None]
    loaded = load_recipe(recipes or (), overrides or (), options)
    lengths = {
        "prompt_tokens": prompt_tokens,
        "mean_new_tokens": mean_new_tokens,
        "spread": spread,
        "latent_share": latent_share,
    }
    told = {name: value for name, value in lengths.items() if value is not None}
    measured = simulation.lengths_of(lengths_from, loaded.recipe, machine, told) if lengths_from is not None else None
    planned = plan_of(
        loaded,
        machine,
        engine=engine.value if engine else None,
        rollout_nodes=rollout_nodes,
        tensor_parallel=tensor_parallel,
        one_step_off=one_step_off,
        lengths=told,
        measured=measured,
        scoring_s=scoring_s,
        price=price,
    )
    for line in assumptions(planned, told if measured is None else lengths):
        say(line)
    values = run_values(planned)
    if not as_json:
        typer.echo("\n".join(run_lines(planned)))
    if simulate:
        from lrscale.launch.simulating import SimulationOptions
        from lrscale.plan.simulation.findings import study_lines

        found = simulation.simulated(planned, SimulationOptions(**of_simulation, price=price), measured)
        values["simulation"] = found.to_json()
        if not as_json:
            typer.echo("\n".join(["", *study_lines(found, planned)]))
    if as_json:
        typer.echo(plan_json(values))
    if charts is not None:
        simulation.draw(planned, values.get("simulation"), charts)
