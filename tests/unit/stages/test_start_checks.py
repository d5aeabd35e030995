"""What a run says at its start about prompts and projectors that are not there."""

import json
import logging

import pytest

from lrscale.config.recipe import Recipe
from lrscale.stages.parts import build_parts


def _build(tmp_path, stages, *, rows=8):
    for split in ("train", "eval"):
        lines = [json.dumps({"prompt": f"{number} + 1?"}) + "\n" for number in range(rows)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    (tmp_path / "reward.py").write_text(
        "def reward(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n"
    )
    recipe = {
        "task": {"kind": "jsonl", "train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
        "reward": {"kind": "function", "path": str(tmp_path / "reward.py")},
        "projector": {"kind": "normalised"},
        "parallel": {"threads": 1},
        "stages": stages,
    }
    parts = build_parts(Recipe.model_validate(recipe), tmp_path)
    parts.log.close()


def test_fewer_prompts_than_asked_for_are_told_of(tmp_path, caplog):
    """Locks out an evaluation of 512 prompts, as the recipe says, that is one of 8."""
    with caplog.at_level(logging.WARNING, logger="lrscale"):
        _build(tmp_path, {"run": ["traces", "projector_sft", "evaluate"], "traces": {"prompts": 12}})
    assert [record.getMessage() for record in caplog.records] == [
        "stages.traces.prompts asks for 12, train.jsonl has 8: all 8 are used",
        "stages.evaluate.prompts asks for 512, eval.jsonl has 8: all 8 are used",
    ]


def test_an_rl_step_takes_no_prompt_twice(tmp_path):
    """Locks out two groups of one prompt in a step, each with a baseline of its own."""
    with pytest.raises(ValueError, match=r"stages.rl.prompts_per_step asks for 9, train.jsonl has 8: .*repeat"):
        _build(tmp_path, {"run": ["rl"], "rl": {"prompts_per_step": 9}})


@pytest.mark.parametrize(("arm", "warnings"), [("latent", 1), ("discrete", 0), ("zero_latent", 0)])
def test_untrained_projector_is_told_of(tmp_path, caplog, arm, warnings):
    """Locks out RL of a latent arm whose latents come from a clone of the last MLP, without a word."""
    with caplog.at_level(logging.WARNING, logger="lrscale"):
        _build(tmp_path, {"run": ["rl"], "rl": {"prompts_per_step": 8, "arms": [arm]}})
    assert ["the projector is untrained" in record.getMessage() for record in caplog.records] == [True] * warnings
