"""Scores a file of rollouts by a recipe's reward, outside a run: for looking into a reward.

    python -m lrscale.stages score RECIPE_JSON ROLLOUTS.jsonl [--limit N]

ROLLOUTS is what `save_groups` writes (rollouts/ARM-step-N.jsonl of a run). One JSON object a rollout on stdout, in the
file's order; how it went on stderr. No model is loaded but those of the reward. Exit codes: 0 all scored, 3 something
does not fit, 6 some failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import torch

from lrscale.config.load import read_recipe
from lrscale.config.recipe import Recipe
from lrscale.records import LatentSpan, Prompt, Rollout, Score, ScoreFailed
from lrscale.report.timing import StageProgress, duration
from lrscale.reward.build import Surroundings, build_scorer
from lrscale.reward.scorer import Scorer
from lrscale.reward.stats import over_ranks
from lrscale.stages.rollout_io import StateDamagedError, read_json_lines
from lrscale.tasks.catalog import build_task, task_score
from lrscale.tasks.task import Split, Task

FAILED, BAD_RECIPE, INTERRUPTED = 6, 3, 130
_NEEDED = ("prompt_id", "prompt", "segments", "prompt_ids", "completion_ids", "latent_spans")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lrscale.stages score", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path, help="recipe.json")
    parser.add_argument("rollouts", type=Path, help="a .jsonl of rollouts")
    parser.add_argument("--limit", type=int, default=0, help="score only so many; 0: all")
    options = parser.parse_args(arguments)
    try:
        return score_file(read_recipe(options.recipe), options.recipe.parent, options.rollouts, options.limit)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, StateDamagedError) as error:
        print(f"error: {str(error).removeprefix('error: ')}", file=sys.stderr)
        return BAD_RECIPE


def score_file(recipe: Recipe, recipe_dir: Path, path: Path, limit: int) -> int:
    """Scores and prints; 0, or 6 where scores failed."""
    lines = read_lines(path, limit)
    task = build_task(recipe.task, seed=recipe.seed, recipe_dir=recipe_dir)
    prompts = prompts_of(task, lines)
    rule = task_score(task)
    with closing(build_scorer(recipe.reward, rule, Surroundings(recipe_dir))) as scorer:
        scorer.begin(range(len(lines)))
        for index, (line, prompt) in enumerate(zip(lines, prompts, strict=True)):
            scorer.submit(index, prompt, rollout_of(line), completion_of(line))
        scores = dict(wait(scorer, len(lines)))
        for index, line in enumerate(lines):
            print(json.dumps(described(line, scores[index])))
        tell(scorer, [scores[index] for index in range(len(lines))])
    return FAILED if any(isinstance(score, ScoreFailed) for score in scores.values()) else 0


def read_lines(path: Path, limit: int) -> list[dict[str, Any]]:
    """The rollouts of a file. ValueError where they are not what `save_groups` writes."""
    if not path.is_file():
        raise ValueError(
            f"no such file: {path}; a run keeps rollouts in its folder rollouts/ (stages.rl.save_rollouts_every)"
        )
    lines = read_json_lines(path)
    lines = lines[:limit] if limit else lines
    for number, line in enumerate(lines, start=1):
        missing = [key for key in _NEEDED if key not in line]
        if missing:
            raise ValueError(
                f"{path}:{number} holds no {missing[0]!r}: give a file of RL rollouts (rollouts/ARM-step-N.jsonl of a run)"
            )
    return lines


def prompts_of(task: Task, lines: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """The prompt of each rollout with the task's columns: the file holds the text alone."""
    known = {prompt.prompt_id: prompt for split in get_args(Split) for prompt in task.prompts(split, markers=False)}
    unknown = [line["prompt_id"] for line in lines if line["prompt_id"] not in known]
    if unknown:
        raise ValueError(f"the recipe's task has no prompt {unknown[0]!r}: give the recipe that the rollouts come from")
    return [Prompt(line["prompt_id"], line["prompt"], known[line["prompt_id"]].columns) for line in lines]


def completion_of(line: Mapping[str, Any]) -> str:
    return "".join(part.get("text", "") for part in line["segments"])


def rollout_of(line: Mapping[str, Any]) -> Rollout:
    """Without log-probs and latents, which no reward sees."""
    spans = tuple(LatentSpan(*span) for span in line["latent_spans"])
    prompt_ids, completion_ids = tuple(line["prompt_ids"]), tuple(line["completion_ids"])
    return Rollout(prompt_ids, completion_ids, torch.zeros(0), spans, torch.zeros(0, 0), 0, line["stop_reason"])


def wait(scorer: Scorer, count: int) -> Iterator[tuple[Any, Score | ScoreFailed]]:
    """(index, score) of all of them."""
    with StageProgress("score", count, unit="samples") as progress:
        done = False
        while not done:
            done = scorer.wait(0.5)
            new = scorer.drain()
            yield from new.items()
            progress.advance(len(new))


def described(line: Mapping[str, Any], score: Score | ScoreFailed) -> dict[str, Any]:
    """One line of stdout: what it scores now, and what it scored in its run."""
    told: dict[str, Any] = {"prompt_id": line["prompt_id"]}
    if isinstance(score, Score):
        told |= {"reward": score.value, "parts": dict(score.parts)}
    else:
        told |= {"reward": None, "failed": score.kind, "detail": score.detail}
    return {**told, "reward_in_run": line.get("reward")}


def tell(scorer: Scorer, scores: list[Score | ScoreFailed]) -> None:
    """For people."""
    values = [score.value for score in scores if isinstance(score, Score)]
    failed = Counter(score.kind for score in scores if isinstance(score, ScoreFailed))
    words = [f"{len(values)} of {len(scores)} scored"]
    if values:
        words.append(f"mean {sum(values) / len(values):.4f}")
    words += [f"{count} {kind}" for kind, count in failed.most_common()]
    stats = scorer.take_stats()
    if stats is not None:
        found = over_ranks([stats.to_json()])
        words.append(f"{duration(found['scoring_s'])} of scoring in {duration(found['busy_s'])}")
        words += [f"slowest {item['prompt_id']} ({duration(item['seconds'])})" for item in found["slowest"][:1]]
    print(", ".join(words), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
