"""One prompt, one completion, latent steps shown as dots.

    python -m lrscale.stages.generate [--temperature T] [--max-new-tokens N] [--seed S] [--chat-template] MODEL PROMPT

The text goes to stdout, how long it was to stderr.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lrscale.config.model import ModelConfig
from lrscale.latent import LatentPolicy
from lrscale.parallel.loading import checkpoint_projector, load_policy
from lrscale.records import Rollout
from lrscale.stages.rollout_io import segments

DOT, PLAIN_DOT = "\N{MIDDLE DOT}", "."


def with_dots(policy: LatentPolicy, rollout: Rollout, dot: str = DOT) -> str:
    """The completion with one dot a latent step."""
    return "".join(part.get("text", dot * part.get("latent_steps", 0)) for part in segments(policy, rollout))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 3 the model does not fit, 6 decoding failed, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m lrscale.stages.generate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", help="model folder, hub id or builtin:tiny")
    parser.add_argument("prompt", help="what the model reads")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens and latent steps together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat-template", action="store_true", help="wrap the prompt as one user message")
    options = parser.parse_args(arguments)
    try:
        policy, rollout = generate(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        # The model names the key of a run's recipe; here it is an option.
        print(f"error: {error}".replace("rollout.max_new_tokens", "--max-new-tokens"), file=sys.stderr)
        return 3 if isinstance(error, ValueError) else 6
    print(with_dots(policy, rollout, _printable_dot()))
    print(
        f"{len(rollout.completion_ids)} tokens, {rollout.completion_latent_steps} latent steps, "
        f"{'ended by itself' if rollout.stop_reason == 'stop' else 'cut at --max-new-tokens'}",
        file=sys.stderr,
    )
    return 0


def generate(options: Any) -> tuple[LatentPolicy, Rollout]:
    """Load the model and decode the prompt; ValueError where something does not fit."""
    config = ModelConfig(path=options.model, chat_template=options.chat_template)
    policy = load_policy(config, checkpoint_projector(config))
    prompt_ids = policy.encode(options.prompt, chat_template=options.chat_template)
    rollouts = policy.generate(
        [prompt_ids],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    return policy, rollouts[0]


def _printable_dot() -> str:
    """The middle dot where stdout can say it."""
    try:
        DOT.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return PLAIN_DOT
    return DOT


if __name__ == "__main__":
    sys.exit(main())
