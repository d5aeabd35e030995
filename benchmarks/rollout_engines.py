"""Positions a second of the local engine and of vLLM, and what a latent position costs beside a discrete one.

    python -m benchmarks.rollout_engines [--rows 64] [--positions 32] [--hidden 256] [--layers 4]

Each engine samples the same number of positions twice: behind plain prompts (all positions are tokens), and behind
prompts that end with a marker of as many steps (all are latent). Whatever else a request costs is in both. Medians
of several runs, taken in turns; the vLLM engine runs in this process, with the dtype and device of the machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.models import random_policy
from lrscale.latent import LatentPolicy
from lrscale.rollout.vllm.model_folder import prepare
from lrscale.rollout.vllm.plugin import register


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def vllm_generate(policy: LatentPolicy, folder: Path, positions: int) -> Callable[[list[list[int]]], object]:
    """A function that samples with vLLM."""
    policy.save_pretrained(folder / "policy")
    model = prepare(folder / "policy", folder / "served")
    register()
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model.path),
        dtype="float32" if policy.device.type == "cpu" else "bfloat16",
        enforce_eager=policy.device.type == "cpu",
        max_model_len=1024,
        gpu_memory_utilization=0.3,  # on a CPU: of the machine's memory, all of which vLLM would want
        enable_prefix_caching=False,
        worker_extension_cls="lrscale.rollout.vllm.worker.LatentWorker",
    )
    llm.collective_rpc("check_latent_steps")
    params = SamplingParams(temperature=1.0, max_tokens=positions, ignore_eos=True, logprobs=0, detokenize=False)
    return lambda prompts: llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def prompts(policy: LatentPolicy, rows: int, *, steps: int) -> list[list[int]]:
    """Of one length, with or without a marker at the end."""
    marker = policy.marker_ids(steps)
    letters = torch.randint(60, 90, (rows, 48), generator=torch.Generator().manual_seed(0)).tolist()
    return [[*row, *marker] for row in letters]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("rows", 64), ("positions", 32), ("hidden", 256), ("layers", 4), ("runs", 5), ("threads", 1))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    positions = min(options.positions, 32)  # the longest run there is
    policy = random_policy(options.hidden, options.layers)
    latent = prompts(policy, options.rows, steps=positions)
    discrete = [[*row[:-1], row[0]] for row in latent]  # the marker's last token replaced: plain text
    with tempfile.TemporaryDirectory(prefix="lrscale-engines-") as name, torch.no_grad():
        engines: dict[str, Callable[[list[list[int]]], object]] = {
            "local": lambda rows: policy.generate(rows, max_new_tokens=positions, stop_ids=()),
            "vllm": vllm_generate(policy, Path(name), positions),
        }
        cases = [(engine, kind) for engine in engines for kind in ("discrete", "latent")]
        rows_of = {"discrete": discrete, "latent": latent}
        taken: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
        for run in range(options.runs + 1):
            for engine, kind in cases:
                spent = seconds(lambda engine=engine, kind=kind: engines[engine](rows_of[kind]))
                if run:  # the first one warms up
                    taken[engine, kind].append(spent)
    made = options.rows * positions
    print(f"{options.rows} rows, {positions} positions each, {options.layers} x {options.hidden}, {policy.device}")
    print("engine   tokens/s   latents/s   a latent position beside a token")
    for engine in engines:
        rates = {kind: made / statistics.median(taken[engine, kind]) for kind in ("discrete", "latent")}
        pairs = zip(taken[engine, "latent"], taken[engine, "discrete"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{engine:6} {rates['discrete']:10.0f} {rates['latent']:11.0f} {ratio:12.2f} x")


if __name__ == "__main__":
    main()
