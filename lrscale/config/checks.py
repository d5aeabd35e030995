"""What no section can see alone: keys of different sections that contradict each other, and files that are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lrscale.config.errors import Place
from lrscale.config.recipe import Recipe
from lrscale.config.rollout import FunctionRewardConfig, TaskRewardConfig
from lrscale.config.schema import Key
from lrscale.config.task import FlawedStoriesConfig, JsonlConfig


class Conflict(NamedTuple):
    """A finding without its place: the key to point at, what is wrong, what to do."""

    key: Key
    message: str
    help: str


def conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Everything in a valid recipe that does not go together."""
    for check in _CHECKS:
        yield from check(recipe)


def _reward_of_jsonl(recipe: Recipe) -> Iterator[Conflict]:
    if isinstance(recipe.task, JsonlConfig) and isinstance(recipe.reward, TaskRewardConfig):
        yield Conflict(
            ("reward", "kind"),
            "task.kind jsonl has no rule of its own to score by, so reward.kind task (the default) does not go with it",
            "write a reward function: reward: {kind: function, path: reward.py}",
        )


def _lengths(recipe: Recipe) -> Iterator[Conflict]:
    low, high = recipe.rollout.min_new_tokens, recipe.rollout.max_new_tokens
    if low > high:
        message = f"rollout.min_new_tokens is {low}, more than rollout.max_new_tokens, which is {high}"
        yield Conflict(("rollout", "min_new_tokens"), message, f"give at most {high}")
    steps, limit = recipe.stages.traces.max_steps, recipe.projector.max_latent_steps
    if steps > limit:
        message = f"stages.traces.max_steps is {steps}, more than projector.max_latent_steps, which is {limit}"
        yield Conflict(("stages", "traces", "max_steps"), message, f"give at most {limit}")


def _prompts_there_are(recipe: Recipe) -> Iterator[Conflict]:
    if not isinstance(recipe.task, FlawedStoriesConfig):
        return
    task, stages = recipe.task, recipe.stages
    wanted = (
        (("stages", "traces", "prompts"), stages.traces.prompts, "task.train_prompts", task.train_prompts),
        (("stages", "rl", "prompts_per_step"), stages.rl.prompts_per_step, "task.train_prompts", task.train_prompts),
        (("stages", "evaluate", "prompts"), stages.evaluate.prompts, "task.eval_prompts", task.eval_prompts),
    )
    for key, count, source, there in wanted:
        if count > there:
            message = f"{'.'.join(key)} is {count}, more than {source}, which is {there}"
            yield Conflict(key, message, f"give at most {there}, or raise {source} (stories are generated)")


def _stages_to_run(recipe: Recipe) -> Iterator[Conflict]:
    if not recipe.stages.run:
        message = "stages.run is empty: there is nothing to do"
        yield Conflict(("stages", "run"), message, "name one stage at least: traces, projector_sft, rl, evaluate")


def _sampling_of_groups(recipe: Recipe) -> Iterator[Conflict]:
    if "rl" in recipe.stages.run and recipe.stages.rl.steps and not recipe.rollout.temperature:
        message = (
            "rollout.temperature is 0, but RL learns from differences between the samples of a prompt: "
            "all of a group would be the same"
        )
        yield Conflict(
            ("rollout", "temperature"), message, "give more than 0 (1.0 is usual), or take rl off stages.run"
        )


def _minibatches(recipe: Recipe) -> Iterator[Conflict]:
    rl = recipe.stages.rl
    rows = rl.prompts_per_step * rl.group_size
    if rl.minibatches > rows:
        message = f"stages.rl.minibatches is {rl.minibatches}, more than the {rows} sequences of a step"
        yield Conflict(("stages", "rl", "minibatches"), message, f"give at most {rows} (prompts_per_step x group_size)")


def _one_process(recipe: Recipe) -> Iterator[Conflict]:
    gpus = recipe.cluster.nodes * recipe.cluster.gpus_per_node
    if recipe.parallel.kind == "single" and gpus > 1:
        message = f"parallel.kind single is one process on one GPU, cluster.nodes x cluster.gpus_per_node is {gpus}"
        yield Conflict(("parallel", "kind"), message, "leave cluster.nodes and cluster.gpus_per_node at 1")


def _shuffling(recipe: Recipe) -> Iterator[Conflict]:
    """Latents are shuffled over the rows that are decoded side by side: a row alone would keep its own."""
    if "shuffled_latent" not in recipe.stages.rl.arms:
        return
    why = "the arm shuffled_latent swaps latents between sequences that are decoded side by side"
    if recipe.rollout.batch_rows < 2:
        message = f"rollout.batch_rows is {recipe.rollout.batch_rows}, but {why}"
        yield Conflict(
            ("rollout", "batch_rows"), message, "give at least 2, or take shuffled_latent off stages.rl.arms"
        )
    evaluate = recipe.stages.evaluate
    if "evaluate" in recipe.stages.run and evaluate.prompts * evaluate.samples_per_prompt < 2:
        message = f"stages.evaluate decodes one sequence, but {why}"
        help_text = "give stages.evaluate.prompts at least 2, or take shuffled_latent off stages.rl.arms"
        yield Conflict(("stages", "evaluate", "prompts"), message, help_text)


_CHECKS: tuple[Callable[[Recipe], Iterator[Conflict]], ...] = (
    _reward_of_jsonl,
    _lengths,
    _prompts_there_are,
    _stages_to_run,
    _sampling_of_groups,
    _minibatches,
    _one_process,
    _shuffling,
)


def files_of(values: Mapping[str, Any]) -> Iterator[tuple[Key, bool]]:
    """Keys that name a file or folder, and whether it has to be there (else it may also be a hub id)."""
    for key, needed in (
        (("model", "path"), False),
        (("task", "path"), False),
        (("task", "train"), True),
        (("task", "eval"), True),
        (("reward", "path"), True),
    ):
        section = values.get(key[0])
        if isinstance(section, Mapping) and isinstance(section.get(key[1]), str):
            yield key, needed


def absolute(text: str, place: Place, *, needed: bool) -> str:
    """A path as it is meant: relative to the file it was written in, or to here on the command line.

    What may be a hub id as well (`needed` false) stays as it is, unless there is such a file or it starts like a path.
    """
    folder = Path(place.source).parent if place.line else Path()
    path = (folder / Path(text).expanduser()).absolute()
    looks_like_path = text.startswith(("/", "./", "../", "~"))
    return str(path) if needed or looks_like_path or (text and path.exists()) else text


def missing_files(recipe: Recipe) -> Iterator[Conflict]:
    """Files that the recipe names and that are not there."""
    named: list[tuple[Key, str]] = []
    if isinstance(recipe.task, JsonlConfig):
        named += [(("task", "train"), recipe.task.train), (("task", "eval"), recipe.task.eval)]
    if isinstance(recipe.reward, FunctionRewardConfig):
        named.append((("reward", "path"), recipe.reward.path))
    for key, path in named:
        if not Path(path).is_file():
            yield Conflict(key, f"no such file: {path}", "a relative path starts at the folder of its recipe")
    for key, path in ((("model", "path"), recipe.model.path), (("task", "path"), getattr(recipe.task, "path", ""))):
        if path.startswith("/") and not Path(path).exists():
            yield Conflict(
                key, f"no such file or folder: {path}", "give a hub id (organisation/name) or a folder that is there"
            )
