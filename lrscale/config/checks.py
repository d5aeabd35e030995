"""What no section can see alone: keys of different sections that contradict each other, and files that are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lrscale.config.errors import Place
from lrscale.config.recipe import Recipe
from lrscale.config.reward import (
    FunctionRewardConfig,
    FunctionsRewardConfig,
    HttpRewardConfig,
    ModelRewardConfig,
    TaskRewardConfig,
    VrCliRewardConfig,
)
from lrscale.config.rollout import VllmRolloutConfig
from lrscale.config.schema import Key
from lrscale.config.shipped import shipped_ds_configs
from lrscale.config.task import FlawedStoriesConfig, JsonlConfig, NextChapterConfig


class Conflict(NamedTuple):
    """A finding without its place: the key to point at, what is wrong, what to do."""

    key: Key
    message: str
    help: str


def conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Everything in a valid recipe that does not go together."""
    for check in _CHECKS:
        yield from check(recipe)


def _reward_of_task(recipe: Recipe) -> Iterator[Conflict]:
    chapters = isinstance(recipe.task, NextChapterConfig)
    if chapters and isinstance(recipe.reward, TaskRewardConfig):
        yield Conflict(
            ("reward", "kind"),
            "task.kind next_chapter is scored by a frozen generator, so reward.kind task (the default) does not go with it",
            "name the generator: reward: {kind: vr_cli, path: MODEL}",
        )
    if isinstance(recipe.reward, VrCliRewardConfig) and not isinstance(recipe.task, NextChapterConfig | JsonlConfig):
        yield Conflict(
            ("reward", "kind"),
            f"reward.kind vr_cli needs the columns story_so_far and next_chapter, which task.kind {recipe.task.kind} has not",
            "set task.kind: next_chapter (or jsonl with these columns)",
        )
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


def _number_of_ranks(recipe: Recipe) -> Iterator[Conflict]:
    parallel, cluster = recipe.parallel, recipe.cluster
    if parallel.kind == "single" and recipe.world_size > 1:
        message = (
            f"parallel.kind single is one process on one device, but cluster.nodes is {cluster.nodes} with "
            f"{recipe.ranks_per_node} ranks on each (parallel.ranks_per_node, else cluster.gpus_per_node)"
        )
        help_ = "leave all three at 1, or spread the run over them: parallel.kind=zero3"
        yield Conflict(("parallel", "kind"), message, help_)
    ranks, gpus = recipe.ranks_per_node, cluster.gpus_per_node
    if ranks > gpus and (gpus > 1 or recipe.model.device == "cuda"):
        message = f"parallel.ranks_per_node is {ranks}, more than cluster.gpus_per_node, which is {gpus}"
        help_ = "a GPU takes one rank: leave ranks_per_node at null (one a GPU); more ranks need model.device: cpu"
        yield Conflict(("parallel", "ranks_per_node"), message, help_)


_ZERO3_ONLY = ("fp32_gradients", "offload_optimizer", "offload_parameters", "offload_between_phases", "ds_config")


def _sharding(recipe: Recipe) -> Iterator[Conflict]:
    """What only some kinds of sharding can do."""
    parallel = recipe.parallel
    if parallel.kind != "zero3":
        for name in _ZERO3_ONLY:
            value = getattr(parallel, name)
            if value != type(parallel).model_fields[name].default:
                shown = str(value).lower() if isinstance(value, bool) else value
                message = f"parallel.{name} is {shown}, which needs parallel.kind zero3; it is {parallel.kind}"
                yield Conflict(("parallel", name), message, "set parallel.kind: zero3, or leave the key out")
    if parallel.kind == "single":
        return
    if recipe.model.dtype == "float64":
        message = f"model.dtype float64 does not go with parallel.kind {parallel.kind}"
        yield Conflict(("model", "dtype"), message, "give float32 or bfloat16, or parallel.kind: single")
    if parallel.stall_limit_s > parallel.collective_timeout_s:
        message = (
            f"parallel.stall_limit_s is {parallel.stall_limit_s:g}, more than parallel.collective_timeout_s, which is "
            f"{parallel.collective_timeout_s:g}: torch would end the run before anybody says which rank is missing"
        )
        yield Conflict(("parallel", "stall_limit_s"), message, f"give at most {parallel.collective_timeout_s:g}")


def _ds_config(recipe: Recipe) -> Iterator[Conflict]:
    name, known = recipe.parallel.ds_config, shipped_ds_configs()
    if _is_path(name):
        if not Path(name).is_file():
            help_ = f"a relative path starts at the folder of its recipe; shipped: {', '.join(known)}"
            yield Conflict(("parallel", "ds_config"), f"no such file: {name}", help_)
    elif name not in known:
        message = f"parallel.ds_config is {name!r}; allowed: {', '.join(known)}, or a path to a .json file"
        yield Conflict(("parallel", "ds_config"), message, "")


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


def _vllm(recipe: Recipe) -> Iterator[Conflict]:
    """What engines of their own cannot do."""
    rollout = recipe.rollout
    if not isinstance(rollout, VllmRolloutConfig):
        return
    yield from _vllm_modes(recipe, rollout)
    yield from _vllm_placement(recipe, rollout)
    truncated = rollout.top_p < 1 or rollout.top_k or rollout.min_new_tokens
    if rollout.temperature not in (0.0, 1.0) and truncated:
        message = (
            f"rollout.temperature is {rollout.temperature:g} with top_p, top_k or min_new_tokens: vLLM's log-probs at a "
            "temperature are those of the truncated distribution, which the trainer does not compute again"
        )
        yield Conflict(("rollout", "temperature"), message, "give temperature: 1, or no truncation")
    if recipe.model.dtype == "float64":
        message = "model.dtype float64 does not go with rollout.kind vllm, which computes in float32 at most"
        yield Conflict(("model", "dtype"), message, "give float32 or bfloat16, or rollout.kind: local")


def _vllm_modes(recipe: Recipe, rollout: VllmRolloutConfig) -> Iterator[Conflict]:
    if rollout.other_modes == "local":
        return
    run, help_ = recipe.stages.run, "set rollout.other_modes: local, or rollout.kind: local"
    arms = [arm for arm in recipe.stages.rl.arms if arm != "latent"]
    if arms and ("rl" in run or "evaluate" in run):
        message = (
            f"stages.rl.arms has {arms[0]}, which vLLM cannot sample: it takes every marker's latent steps as they are"
        )
        yield Conflict(("stages", "rl", "arms"), message, help_)
    if "traces" in run:
        message = "stages.run has traces, which are sampled without latent steps; vLLM takes those of every marker"
        yield Conflict(("stages", "run"), message, help_)


def _vllm_placement(recipe: Recipe, rollout: VllmRolloutConfig) -> Iterator[Conflict]:
    nodes = recipe.cluster.nodes
    colocated = rollout.placement == "colocated"
    if colocated and rollout.engines % nodes:
        message = (
            f"rollout.placement colocated puts as many engines on each node, but rollout.engines is {rollout.engines} "
            f"and cluster.nodes is {nodes}"
        )
        fewest = nodes * max(1, rollout.engines // nodes)
        yield Conflict(("rollout", "engines"), message, f"give engines: {fewest}, or placement: separate")
    if rollout.transport == "broadcast" and colocated and recipe.model.device == "cuda":
        message = (
            "rollout.transport broadcast does not go with rollout.placement colocated on GPUs: engines have the "
            "trainer's own ones, and NCCL takes no GPU twice into a group"
        )
        yield Conflict(("rollout", "transport"), message, "give transport: files, or placement: separate")
    gpus = rollout.engines // nodes * rollout.tensor_parallel
    if colocated and recipe.model.device == "cuda" and gpus > recipe.cluster.gpus_per_node:
        message = (
            f"rollout.engines x rollout.tensor_parallel comes to {gpus} a node, more than cluster.gpus_per_node, which "
            f"is {recipe.cluster.gpus_per_node}"
        )
        yield Conflict(("rollout", "engines"), message, "give fewer engines, or fewer GPUs to each")


_CHECKS: tuple[Callable[[Recipe], Iterator[Conflict]], ...] = (
    _reward_of_task,
    _lengths,
    _prompts_there_are,
    _stages_to_run,
    _sampling_of_groups,
    _minibatches,
    _number_of_ranks,
    _sharding,
    _ds_config,
    _shuffling,
    _vllm,
)


def files_of(values: Mapping[str, Any]) -> Iterator[tuple[Key, bool]]:
    """Keys that name a file or folder, and whether it has to be there (else it may also be a hub id)."""
    for key, needed in (
        (("model", "path"), False),
        (("projector", "path"), True),
        (("task", "path"), False),
        (("task", "train"), True),
        (("task", "eval"), True),
    ):
        section = values.get(key[0])
        if isinstance(section, Mapping) and isinstance(section.get(key[1]), str) and section[key[1]]:
            yield key, needed
    reward = values.get("reward")
    if isinstance(reward, Mapping):
        yield from _files_of_reward(reward)
    parallel = values.get("parallel")
    if isinstance(parallel, Mapping) and _is_path(parallel.get("ds_config")):
        yield ("parallel", "ds_config"), True


def _files_of_reward(reward: Mapping[str, Any]) -> Iterator[tuple[Key, bool]]:
    if isinstance(reward.get("path"), str):
        yield ("reward", "path"), reward.get("kind") not in ("model", "vr_cli")
    if isinstance(reward.get("token_file"), str) and reward["token_file"]:
        yield ("reward", "token_file"), True
    functions = reward.get("functions")
    for index, function in enumerate(functions if isinstance(functions, list) else ()):
        if isinstance(function, Mapping) and isinstance(function.get("path"), str):
            yield ("reward", "functions", index, "path"), True


def _is_path(name: Any) -> bool:
    """Whether `parallel.ds_config` names a file and not one of those shipped."""
    return isinstance(name, str) and (name.endswith(".json") or "/" in name)


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
    if isinstance(recipe.task, JsonlConfig | NextChapterConfig):
        named += [(("task", "train"), recipe.task.train), (("task", "eval"), recipe.task.eval)]
    reward = recipe.reward
    if isinstance(reward, FunctionRewardConfig):
        named.append((("reward", "path"), reward.path))
    if isinstance(reward, FunctionsRewardConfig):
        named += [(("reward", "functions", i, "path"), one.path) for i, one in enumerate(reward.functions)]
    if isinstance(reward, HttpRewardConfig) and reward.token_file:
        named.append((("reward", "token_file"), reward.token_file))
    for key, path in named:
        if not Path(path).is_file():
            yield Conflict(key, f"no such file: {path}", "a relative path starts at the folder of its recipe")
    yield from _missing_folders(recipe)


def _missing_folders(recipe: Recipe) -> Iterator[Conflict]:
    projector = recipe.projector.path
    if projector and not Path(projector).is_dir():
        help_ = "give a folder that `lrscale export RUN FOLDER --projector-only` wrote"
        yield Conflict(("projector", "path"), f"no such folder: {projector}", help_)
    models = [(("model", "path"), recipe.model.path), (("task", "path"), getattr(recipe.task, "path", ""))]
    if isinstance(recipe.reward, ModelRewardConfig | VrCliRewardConfig):
        models.append((("reward", "path"), recipe.reward.path))
    for key, path in models:
        if path.startswith("/") and not Path(path).exists():
            yield Conflict(
                key, f"no such file or folder: {path}", "give a hub id (organisation/name) or a folder that is there"
            )
