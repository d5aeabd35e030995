"""A run directory as the stages write it, with made-up but plausible figures (seeded)."""

import json
import math
import random
from pathlib import Path

from lrscale.report.metrics import wilson_interval

ARMS = {
    # accuracy before and after, tokens before and after, latent steps before and after, markers
    "latent": (0.62, 0.80, 52.0, 33.0, 6.2, 7.9, 2.6),
    "discrete": (0.70, 0.90, 78.0, 71.0, 0.0, 0.0, 0.0),
    "zero_latent": (0.54, 0.61, 52.0, 44.0, 0.0, 0.0, 2.6),
    "shuffled_latent": (0.52, 0.56, 53.0, 46.0, 6.2, 6.0, 2.6),
}


def recipe(name, arms, seed=0):
    stages = {
        "run": ["traces", "projector_sft", "rl", "evaluate"],
        "rl": {"arms": list(arms), "steps": 60, "prompts_per_step": 16, "group_size": 12},
        "evaluate": {"prompts": 512, "temperature": 1.0},
    }
    task = {"kind": "flawed_stories", "world": "ring"}
    return {
        "name": name,
        "seed": seed,
        "model": {"path": "builtin:tiny", "dtype": "float32"},
        "task": task,
        "stages": stages,
    }


def write_run(path: Path, arms=tuple(ARMS), *, seed=0, steps=60, stop_after=None, finished=True) -> Path:
    """`stop_after`: "traces", "projector_sft" or an arm whose RL is left half done."""
    rng = random.Random(seed)
    path.mkdir(parents=True)
    (path / "recipe.json").write_text(json.dumps(recipe(path.name, arms, seed), indent=2))
    (path / "manifest.json").write_text(
        json.dumps(
            {
                "versions": {"lrscale": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.19.0"},
                "git_revision": "eea39e2",
                "host": "laptop",
                "command": ["lrscale", "launch"],
                "seed": seed,
                "started": "2026-01-12T09:14:03+00:00",
            }
        )
    )
    lines = _traces(rng)
    if stop_after != "traces":
        lines += _projector_sft(rng, None, 0)
    if stop_after not in ("traces", "projector_sft"):
        for arm in arms:
            half = arm == stop_after
            lines += _arm(rng, arm, steps // 2 if half else steps, done=not half)
            _rollouts(path, rng, arm, ("before",) if half else ("before", "after"))
            if half:
                break
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished and stop_after is None:
        (path / "done.json").write_text("{}")
    return path


def _traces(rng):
    return [
        {
            "stage": "traces", "step": k, "prompts": 32 * k, "samples": 160 * k, "kept": int(160 * k * 0.7),
            "accuracy": 0.7 + rng.gauss(0, 0.1 / k), "tokens_mean": 78 + rng.gauss(0, 1), "rollout_s": 1.1 + rng.random() / 5,
        }
        for k in range(1, 17)
    ]  # fmt: skip


def _projector_sft(rng, arm, refresh):
    steps = 120 if arm is None else 12
    lines = [
        {
            "stage": "projector_sft", "arm": arm, "refresh": refresh, "step": k,
            "loss": (0.9 if arm else 0.95 + 1.6 * math.exp(-k / 25)) + rng.gauss(0, 0.03), "grad_norm": 0.3 + rng.random() / 5,
            "learning_rate": 1e-4 * (1 - k / (steps + 1)), "latent_scale": 1.02 + rng.gauss(0, 0.02), "step_s": 0.35 + rng.random() / 10,
        }
        for k in range(1, steps + 1)
    ]  # fmt: skip
    real = 1.02 - 0.03 * refresh + rng.gauss(0, 0.01)
    lines.append(
        {
            "stage": "heldout", "arm": arm, "refresh": refresh, "step": steps, "rows": 256, "loss_real": real,
            "loss_zero": real + 0.41, "loss_shuffled": real + 0.23, "loss_real_se": 0.021, "real_minus_zero": -0.41,
            "real_minus_zero_se": 0.024, "real_minus_shuffled": -0.23, "real_minus_shuffled_se": 0.019,
        }
    )  # fmt: skip
    return lines


def _arm(rng, arm, steps, *, done):
    acc0, acc1, tok0, tok1, lat0, lat1, markers = ARMS[arm]
    lines = [_evaluate(rng, arm, 0, "before", acc0, tok0, lat0, markers)]
    total = positions = 0
    for k in range(1, steps + 1):
        share = 1 - math.exp(-2.5 * k / 60)
        accuracy = acc0 + (acc1 - acc0) * share + rng.gauss(0, 0.025)
        tokens, latent = (
            tok0 + (tok1 - tok0) * share + rng.gauss(0, 1.5),
            max(0.0, lat0 + (lat1 - lat0) * share + (lat0 and rng.gauss(0, 0.3))),
        )
        total += int(192 * tokens)
        positions += int(192 * (tokens + latent))
        rollout, update, refresh = (
            1.5 + tokens / 60 + rng.random() / 4,
            1.1 + rng.random() / 4,
            4.5 if lat0 and k % 20 == 0 else 0.0,
        )
        lines.append(
            {
                "stage": "rl", "arm": arm, "step": k, "reward_mean": accuracy, "accuracy": accuracy, "tokens_mean": tokens,
                "latent_steps_mean": latent, "markers_mean": markers * (1 - 0.2 * share), "steps_per_marker_mean": 2.4,
                "no_answer_share": 0.02, "groups_without_signal": rng.randint(1, 6), "scores_failed": 0, "loss": rng.gauss(0, 0.01),
                "grad_norm": 0.4 + rng.random() / 3, "clip_share": 0.01, "kl": 0.0, "logprob_gap_mean": 2e-6, "logprob_gap_max": 4e-5,
                "learning_rate": 2e-4, "train_tokens_total": total, "train_positions_total": positions, "rollout_s": rollout,
                "rollout_cpu_s": rollout, "score_s": 0.05, "update_s": update, "refresh_s": refresh,
                "step_s": rollout + update + refresh + 0.08, "cpu_s": 2 * update,
            }
        )  # fmt: skip
        if arm == "discrete":
            lines.append(
                {
                    "stage": "reward", "arm": arm, "step": k, "samples": 192, "scoring_s": 6.0, "busy_s": 2.0, "waited_s": 0.5,
                    "hidden_share": 0.75, "queue_max": 12, "retries": 1, "workers_replaced": 0, "failed_timeout": k % 2,
                    "failed_error": 0, "failed_invalid": 0, "failed_unavailable": 0,
                    "slowest": [{"prompt_id": f"train-{k:06d}", "seconds": 14.0 if k == 3 else 2.0}],
                }
            )  # fmt: skip
        if k % 20 == 0:
            lines.append(
                {"stage": "audit", "arm": arm, "step": k, "latent_cosine_min": 0.99998, "latent_l2_max": 3e-4,
                 "logprob_gap_mean": 2e-6, "logprob_gap_max": 5e-5}
            )  # fmt: skip
            lines.append(_evaluate(rng, arm, k, "during", acc0 + (acc1 - acc0) * share, tokens, latent, markers))
            if lat0:
                lines += _projector_sft(rng, arm, k // 20)
    if done:
        lines.append(_evaluate(rng, arm, steps, "after", acc1 + rng.gauss(0, 0.01), tok1, lat1, markers * 0.8))
        lines.append(
            {"stage": "arm", "arm": arm, "step": steps, "minutes": 2.4 + tok1 / 60, "cpu_minutes": 4.1 + tok1 / 60}
        )
    return lines


def _evaluate(rng, arm, step, when, *means):
    accuracy, tokens, latent, markers = means
    right = round(512 * accuracy)
    low, high = wilson_interval(right, 512)
    counts = (
        {k: round(512 * math.exp(-markers) * markers**k / math.factorial(k)) for k in range(8)} if markers else {0: 512}
    )
    return {
        "stage": "evaluate", "arm": arm, "step": step, "when": when, "prompts": 512, "accuracy": right / 512, "accuracy_low": low,
        "accuracy_high": high, "tokens_mean": tokens, "latent_steps_mean": latent, "markers_mean": markers, "no_answer_share": 0.015,
        "marker_histogram": {str(k): n for k, n in counts.items() if n},
        "steps_histogram": {"1": 210, "2": 420 + rng.randint(0, 80), "3": 260, "4": 120, "5": 60} if markers else {},
        "evaluate_s": 6.0 + rng.random(),
    }  # fmt: skip


STORY = (
    "Mara walks around a ring of six places: the mill, the bridge, the well, the oak, the chapel and the gate. "
    "She starts at the mill. She walks two places on. She turns around and walks one place. "
    "Then she rests at the oak, and from the oak she walks three places on to the gate.\n\n"
    "Does this story hold a continuity error? Think, then answer with \\boxed{Yes} or \\boxed{No}."
)


def _rollouts(path, rng, arm, whens):
    folder = path / "rollouts"
    folder.mkdir(exist_ok=True)
    for when in whens:
        with (folder / f"evaluate-{arm}-{when}.jsonl").open("w") as file:
            for k in range(20):
                file.write(json.dumps(_rollout(rng, arm, when, k)) + "\n")


def _rollout(rng, arm, when, k):
    right = rng.random() < (0.6 if when == "before" else 0.8)
    segments, steps = [{"text": "Mara starts at the mill. Two places on is the well."}], 0
    if arm == "discrete":
        segments[0]["text"] += " One place back from the well is the bridge. The story says she rests at the oak."
    else:
        for number in (2, rng.randint(1, 5)):
            segments.append({"text": f" <implicit_thought>{number}</implicit_thought>"})
            if arm != "zero_latent":
                segments.append({"latent_steps": number})
                steps += number
            segments.append({"text": " So she cannot be at the oak."})
    segments.append({"text": f" \\boxed{{{'Yes' if right else 'No'}}}"})
    return {
        "arm": arm, "when": when, "prompt_id": f"eval-{k:04d}", "prompt": STORY, "segments": segments, "reward": float(right),
        "tokens": 30 + rng.randint(0, 20), "latent_steps": steps, "stop_reason": "stop" if rng.random() < 0.9 else "length",
    }  # fmt: skip
