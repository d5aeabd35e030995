"""Recipes: what is read, what is refused, and what a refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrscale.config.errors import Problem, RecipeError
from lrscale.config.load import DEFAULT_RECIPE, dump_recipe, flatten, load_recipe, read_recipe
from lrscale.config.recipe import Recipe
from lrscale.config.shipped import shipped_recipes


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(*arguments: object, **keywords: object) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(*arguments, **keywords)  # type: ignore[arg-type]
    return caught.value.problems


SHIPPED = ["tiny-cpu", "tiny-short", "smoke-1gpu", "qwen3-4b-1gpu", "llama3-70b-8n8g", "llama3-70b-split"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid_and_named_after_their_file(name: str) -> None:
    """Locks out a shipped recipe that the code has left behind."""
    assert load_recipe([name]).recipe.name == name


def test_nothing_shipped_escapes_the_test_above() -> None:
    assert set(shipped_recipes()) == set(SHIPPED)


def test_no_recipe_means_the_demo() -> None:
    assert load_recipe().recipe == load_recipe([DEFAULT_RECIPE]).recipe


def test_the_large_recipe_holds_the_papers_rl_settings() -> None:
    """Locks out drift from the published settings while recipes are tuned."""
    rl = load_recipe(["llama3-70b-8n8g"]).recipe.stages.rl
    assert (rl.prompts_per_step, rl.group_size, rl.learning_rate) == (48, 16, 5e-7)
    assert (rl.kl.coefficient, rl.refresh.share, rl.refresh.learning_rate) == (0.0, 0.1, 1e-4)


def test_every_problem_is_named_at_once_with_its_line(tmp_path: Path) -> None:
    """Locks out the one-error-a-try recipe, and places that point at the section instead of the key."""
    path = write(tmp_path, "seed: -1\nmodel:\n  dtype: float16\nstages:\n  rl:\n    group_size: '4'\n    stps: 3\n")
    found = problems([path])
    assert [(problem.key, problem.place.line) for problem in found] == [
        ("seed", 1),
        ("model.dtype", 3),
        ("stages.rl.group_size", 6),
        ("stages.rl.stps", 7),
    ]
    text = "\n".join(map(str, found))
    assert "seed is -1; allowed: a whole number, at least 0" in text
    assert 'model.dtype is "float16"; allowed: one of: float32, bfloat16, float64' in text
    assert 'group_size is "4"; allowed: a whole number, at least 2' in text
    assert "did you mean stages.rl.steps?" in text
    assert f"{path}:3 model.dtype" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning_rate: 1", "stages.projector_sft"),
        ("rl: {steps: 3}", "did you mean stages.rl?"),
        ("model: {group_size: 3}", "did you mean stages.rl.group_size?"),
        ("task: {train: x}", "it goes with task.kind: jsonl"),
        ("zzzz: 1", ""),
    ],
)
def test_unknown_keys_are_answered_with_the_key_that_was_meant(tmp_path: Path, text: str, expected: str) -> None:
    """Locks out a suggestion that knows only the section at hand."""
    (problem,) = problems([write(tmp_path, text)])
    assert problem.message.startswith("unknown key ")
    assert (expected in problem.help) if expected else problem.help == ""


def test_wrong_element_of_a_list_is_pointed_at(tmp_path: Path) -> None:
    (problem,) = problems([write(tmp_path, "stages:\n  rl:\n    arms:\n      - latent\n      - lol\n")])
    assert (problem.key, problem.place.line) == ("stages.rl.arms[1]", 5)


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("stages.rl.steps=1.5", "a whole number"),
        ("stages.rl.steps=true", "a whole number"),
        ("stages.rl.steps=null", "a whole number"),
        ("stages.rl.steps=[1]", "a whole number"),
        ("stages.rl.learning_rate=.nan", "a number, above 0"),
        ("stages.rl.learning_rate=.inf", "a number, above 0"),
        ("rollout.max_new_tokens=-1", "a whole number, at least 1"),
        ("model.gradient_checkpointing=yes", "true or false"),
        ("stages=3", "a section of keys"),
        ("task=3", "a section (kind: flawed_stories, flawed_fictions, jsonl, next_chapter)"),
        ("task.kind=lol", "one of: flawed_stories, flawed_fictions, jsonl"),
        ("task.events=[1]", "a list of 2"),
        ("name=a b", "matching"),
        ("cluster.time_limit=soon", "matching"),
    ],
)
def test_wrong_values_are_answered_with_what_is_allowed(override: str, allowed: str) -> None:
    """Locks out coercion (true is no 1, "4" no 4) and messages without the range."""
    (problem,) = problems((), [override])
    assert allowed in problem.message
    assert problem.place.source == f"--set {override}"


SHARDED = ["parallel.kind=zero3", "parallel.ranks_per_node=2"]
NODES = [*SHARDED, "cluster.nodes=2", "cluster.gpus_per_node=2", "model.device=cuda"]
NODES += ["rollout.kind=vllm", "rollout.other_modes=local"]
BROADCAST = ["rollout.kind=vllm", "rollout.transport=broadcast", "rollout.other_modes=local"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.run=[rl, traces]"], "in this order"),
        (["task.events=[9, 2]"], "fewest (9) is more than most (2)"),
        (["stages.rl.importance.correction_cap=2"], "correction_cap needs old_logprobs: recomputed"),
        (["rollout.min_new_tokens=999"], "more than rollout.max_new_tokens"),
        (["stages.traces.max_steps=99"], "more than projector.max_latent_steps"),
        (["stages.evaluate.prompts=99999"], "more than task.eval_prompts"),
        (["stages.run=[]"], "nothing to do"),
        (["rollout.temperature=0"], "all of a group would be the same"),
        (["stages.rl.minibatches=99999"], "sequences of a step"),
        (["stages.rl.arms=[shuffled_latent]", "rollout.batch_rows=1"], "decoded side by side"),
        (["stages.rl.arms=[shuffled_latent]", "stages.evaluate.prompts=1"], "decodes one sequence"),
        (["cluster.nodes=2"], "one process on one device, but cluster.nodes is 2"),
        (["parallel.ranks_per_node=2"], "with 2 ranks on each"),
        (["parallel.offload_optimizer=true"], "parallel.offload_optimizer is true, which needs parallel.kind zero3"),
        (["parallel.ds_config=zero3_offload"], "parallel.ds_config is zero3_offload, which needs parallel.kind zero3"),
        ([*SHARDED, "parallel.kind=fsdp2", "parallel.fp32_gradients=true"], "needs parallel.kind zero3; it is fsdp2"),
        ([*SHARDED, "model.dtype=float64"], "float64 does not go with parallel.kind zero3"),
        ([*SHARDED, "cluster.gpus_per_node=4", "parallel.ranks_per_node=8"], "more than cluster.gpus_per_node"),
        ([*SHARDED, "model.device=cuda"], "parallel.ranks_per_node is 2, more than cluster.gpus_per_node, which is 1"),
        ([*SHARDED, "parallel.stall_limit_s=9999"], "more than parallel.collective_timeout_s"),
        ([*SHARDED, "parallel.ds_config=zero4"], "allowed: zero2, zero3, zero3_offload, or a path"),
        ([*SHARDED, "parallel.ds_config=./mine.json"], "no such file: /"),
        ([*NODES, "rollout.engines=3"], "as many engines on each node, but rollout.engines is 3"),
        ([*NODES, "rollout.engines=8"], "comes to 4 a node, more than cluster.gpus_per_node, which is 2"),
        ([*BROADCAST, "model.device=cuda"], "NCCL takes no GPU twice into a group"),
    ],
)
def test_keys_that_contradict_each_other(overrides: list[str], message: str) -> None:
    """Locks out runs that fail, or quietly do less, hours after the launch."""
    found = problems((), overrides)
    assert message in found[0].message


def test_broadcast_is_taken_where_trainer_and_engines_share_no_gpu() -> None:
    """Locks out a refusal of what works: CPUs in any placement, GPUs of different nodes."""
    for overrides in (["model.device=cpu"], ["model.device=cuda", "rollout.placement=separate"]):
        assert load_recipe((), [*BROADCAST, *overrides]).recipe.rollout.transport == "broadcast"


def test_world_size_is_ranks_by_nodes() -> None:
    """Locks out a CPU run on 2 ranks that counts GPUs, and a cluster run that starts one rank a node."""
    assert load_recipe((), SHARDED).recipe.world_size == 2
    large = load_recipe(["llama3-70b-8n8g"]).recipe
    assert (large.ranks_per_node, large.world_size) == (8, 64)


def test_a_ds_config_of_ones_own_is_found_beside_the_recipe(tmp_path: Path) -> None:
    """Locks out a worker that looks for the file in its own folder, and a folder that hides a shipped name."""
    write(tmp_path, "{}", "mine.json")
    (tmp_path / "zero3").mkdir()
    path = write(tmp_path, "parallel: {kind: zero3, ranks_per_node: 2, ds_config: mine.json}\n")
    assert load_recipe([path]).recipe.parallel.ds_config == str(tmp_path / "mine.json")
    path = write(tmp_path, "parallel: {kind: zero3, ranks_per_node: 2, ds_config: zero3}\n")
    assert load_recipe([path]).recipe.parallel.ds_config == "zero3"


def test_jsonl_needs_a_reward_function(tmp_path: Path) -> None:
    """Locks out a bring-your-own task that has nothing to score with."""
    for name in ("train.jsonl", "eval.jsonl", "reward.py"):
        write(tmp_path, "", name)
    path = write(tmp_path, "task: {kind: jsonl, train: train.jsonl, eval: eval.jsonl}\n")
    (problem,) = problems([path])
    assert problem.key == "reward.kind" and "kind: function" in problem.help
    reward = write(tmp_path, "reward: {kind: function, path: reward.py}", "reward.yaml")
    recipe = load_recipe([path, reward]).recipe
    assert recipe.reward.path == str(tmp_path / "reward.py")  # type: ignore[union-attr]
    assert recipe.task.train == str(tmp_path / "train.jsonl")  # type: ignore[union-attr]


def test_missing_files_are_named_before_anything_starts(tmp_path: Path) -> None:
    text = "model: {path: ./nowhere}\ntask: {kind: jsonl, train: t.jsonl, eval: e.jsonl}\nreward: {kind: function, path: r.py}\n"
    assert [problem.key for problem in problems([write(tmp_path, text)])] == [
        "task.train",
        "task.eval",
        "reward.path",
        "model.path",
    ]


def test_local_models_are_found_beside_the_recipe_and_hub_ids_stay(tmp_path: Path) -> None:
    """Locks out a worker that looks for the model in its own working directory."""
    (tmp_path / "tiny").mkdir()
    assert load_recipe([write(tmp_path, "model: {path: tiny}")]).recipe.model.path == str(tmp_path / "tiny")
    assert load_recipe([write(tmp_path, "model: {path: Qwen/Qwen3-4B}")]).recipe.model.path == "Qwen/Qwen3-4B"


def test_a_section_written_in_part_keeps_the_rest_of_its_default(tmp_path: Path) -> None:
    """Locks out a cosine that turns constant because its warm-up was changed."""
    path = write(
        tmp_path,
        "stages: {projector_sft: {schedule: {warmup_share: 0.3}}}\nreward: {length_penalty: {price_per_100: 1}}",
    )
    recipe = load_recipe([path]).recipe
    schedule = recipe.stages.projector_sft.schedule
    assert (schedule.kind, schedule.warmup_share) == ("cosine", 0.3)
    assert (recipe.reward.kind, recipe.reward.length_penalty.price_per_100) == ("task", 1.0)


def test_places_name_the_file_that_won(tmp_path: Path) -> None:
    """Locks out provenance of a value that a later recipe replaced."""
    first, second = write(tmp_path, "seed: 1\nname: x\n"), write(tmp_path, "\nseed: 2\n", "b.yaml")
    places = load_recipe([first, second], ["name=y"]).places
    assert {key: str(place) for key, place in places.items()} == {"seed": f"{second}:2", "name": "--set name=y"}


def test_recipe_json_is_a_recipe_too(tmp_path: Path) -> None:
    loaded = load_recipe(["tiny-cpu"], ["seed=5"]).recipe
    path = write(tmp_path, dump_recipe(loaded), "recipe.json")
    assert load_recipe([path]).recipe == loaded == read_recipe(path)


OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63),
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True).map(lambda text: f"'{text}'"),
        "stages.rl.learning_rate": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        "stages.rl.arms": st.permutations(["latent", "discrete", "zero_latent"]).map(
            lambda arms: f"[{', '.join(arms)}]"
        ),
        "task.flawed_share": st.floats(0, 1),
        "task.prompt_style": st.sampled_from(["paper", "brief"]),
        "stages.traces.replace_ratios": st.lists(st.floats(0, 1, exclude_min=True), max_size=4),
        "stages.projector_sft.schedule": st.sampled_from(["{kind: constant}", "{warmup_share: 0.5}"]),
        "model.path": st.text("abc/äß\"' \\", max_size=8).map(lambda text: "'" + text.replace("'", "''") + "'"),
        "parallel.stall_limit_s": st.floats(min_value=0, max_value=3600, exclude_min=True),
        "parallel.check_order": st.sampled_from(["true", "false"]),
        "checkpoints.keep_best": st.integers(0, 9),
        "cluster.partition": st.sampled_from(["null", '"a\'; echo foo"']),
    },
)


@settings(max_examples=60, deadline=None)
@given(OVERRIDES)
def test_resolved_form_round_trips_exactly(values: dict[str, object]) -> None:
    """Locks out a resume that is refused because a float or a name came back changed."""
    try:
        recipe = load_recipe((), [f"{key}={value}" for key, value in values.items()]).recipe
    except RecipeError as error:
        assert "no such file" in str(error)  # a random model path that starts with a slash
        return
    text = dump_recipe(recipe)
    assert Recipe.model_validate_json(text, strict=True) == recipe
    assert dump_recipe(Recipe.model_validate_json(text)) == text
    assert flatten(Recipe.model_validate_json(text)) == flatten(recipe)
