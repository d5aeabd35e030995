"""What can be asked of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrscale.cli.app import Overrides, app, say


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Run directory, model folder or hub id.")],
    recipes: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="Task and sampling; a run has its own, a model takes tiny-cpu's."),
    ] = None,
    overrides: Overrides = None,
    engine: Annotated[str, typer.Option(metavar="local|vllm", help="What samples.")] = "local",
) -> None:
    """Accuracy and length of a run's arms, or of any model, on held-out prompts."""
    from lrscale.launch.local import run_module
    from lrscale.launch.targets import evaluation_arguments

    with evaluation_arguments(target, recipes or [], overrides or []) as arguments:
        options = [] if engine == "local" else [f"--engine={engine}"]
        code = run_module("lrscale.stages", ["evaluate", *options, *arguments], say=say)
    raise typer.Exit(code)


@app.command()
def generate(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Run directory, model folder or hub id.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model reads.")],
    arm: Annotated[str | None, typer.Option(help="Which arm of a run; default: latent.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens and latent steps together.")] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Wrap the prompt as a user message.")] = False,
) -> None:
    """Answer one prompt; latent steps are shown as dots."""
    from lrscale.launch.local import run_module
    from lrscale.launch.targets import model_of

    options = [f"--temperature={temperature}", f"--max-new-tokens={max_new_tokens}", f"--seed={seed}"]
    options += ["--chat-template"] if chat_template else []
    model = model_of(target, arm)
    raise typer.Exit(run_module("lrscale.stages", ["generate", *options, "--", model, prompt], say=say))


@app.command()
def serve(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Run directory or model folder.")],
    arm: Annotated[str | None, typer.Option(help="Which arm of a run; default: latent.")] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs.")] = 1,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest sequence; default: the model's.")] = None,
    eager: Annotated[bool, typer.Option("--eager", help="No torch.compile: starts faster, answers slower.")] = False,
) -> None:
    """An OpenAI-compatible server of a finished model, latent steps on (needs vLLM). Prints its URL once it answers."""
    from lrscale.launch.local import run_module
    from lrscale.launch.targets import model_of

    options = [
        f"--host={host}",
        f"--port={port}",
        f"--tensor-parallel={tensor_parallel}",
        f"--served-name={arm or Path(target).name}",
    ]
    options += [f"--max-model-len={max_model_len}"] if max_model_len else []
    options += ["--eager"] if eager else []
    raise typer.Exit(run_module("lrscale.stages", ["serve", *options, "--", model_of(target, arm)], say=say))


@app.command("serve-rollouts")
def serve_rollouts(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "0.0.0.0",
) -> None:
    """The rollout engines of one node, for a role of cluster.split (rollout.placement: separate)."""
    from lrscale.launch.local import run_module

    raise typer.Exit(run_module("lrscale.stages", ["serve-rollouts", f"--host={host}", "--", str(run)], say=say))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    arm: Annotated[str | None, typer.Option(help="Arm, or projector_sft; default: latent, or what there is.")] = None,
    projector_only: Annotated[
        bool, typer.Option("--projector-only", help="The projector alone, for projector.path of another recipe.")
    ] = False,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest file, in GB.")] = 5.0,
) -> None:
    """Write a run's newest policy as Hugging Face safetensors, without ever holding it whole. Prints the folder."""
    from lrscale.launch.local import run_module
    from lrscale.launch.targets import require_export

    require_export(run, out)
    options = ["--arm", arm] if arm else []
    options += ["--projector-only"] if projector_only else []
    options += [f"--max-shard-bytes={round(max_shard_gb * 1e9)}"]
    raise typer.Exit(run_module("lrscale.stages", ["export", *options, "--", str(run), str(out)], say=say))
