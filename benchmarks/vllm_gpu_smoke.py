"""Latent steps in vLLM on a GPU: bfloat16, CUDA graphs, two GPUs where there are two; tokens against the local engine.

    python -m benchmarks.vllm_gpu_smoke [--policy FOLDER]

Without a policy a random one is made. For each way of decoding it prints how many greedy tokens are the local
engine's and the largest gap of their log-probs: bfloat16 rounds differently in the two, so tokens may part where
two are nearly as likely, but not from the first one on. Exit code 0 if they agree, 1 if not, 3 without a GPU or vLLM.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

NO_GPU = 3
WAYS = ("FULL_AND_PIECEWISE", "PIECEWISE")
NEW = 64
AGREE = 0.8
"""Share of tokens in front of the first difference that is asked for."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, help="a folder that LatentPolicy.save_pretrained wrote")
    parser.add_argument("--engine", nargs=3, metavar=("WAY", "GPUS", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        way, gpus, folder = options.engine
        return run_engine(way, int(gpus), Path(folder))
    import torch

    if not torch.cuda.is_available():
        print("error: no NVIDIA GPU is visible to torch; this check needs one", file=sys.stderr)
        return NO_GPU
    if importlib.util.find_spec("vllm") is None:
        print("error: vLLM is not installed\n  help: make vllm", file=sys.stderr)
        return NO_GPU
    with tempfile.TemporaryDirectory(prefix="lrscale-smoke-") as name:
        folder = Path(name)
        prepare_case(folder, options.policy)
        bad = 0
        for gpus in (1, 2)[: torch.cuda.device_count()]:
            for way in WAYS:  # a process each: an engine gives its GPU back with its process
                command = [sys.executable, "-m", "benchmarks.vllm_gpu_smoke", "--engine", way, str(gpus), str(folder)]
                done = subprocess.run(["env", "VLLM_USE_V2_MODEL_RUNNER=0", *command], check=False)
                bad += done.returncode != 0
        return int(bad > 0)


def prepare_case(folder: Path, policy_folder: Path | None) -> None:
    """The served model, and what the local engine writes with it."""
    import torch

    from benchmarks.models import random_policy
    from lrscale.latent import LatentPolicy
    from lrscale.rollout.vllm.model_folder import prepare
    from lrscale.rollout.vllm.stream import prompt_positions

    source = policy_folder or folder / "policy"
    if policy_folder is None:
        random_policy(hidden=512).to(torch.bfloat16).save_pretrained(source)
    policy = LatentPolicy.from_pretrained(source, dtype="bfloat16").to("cuda")
    model = prepare(source, folder / "served")
    prompts = [
        [*policy.encode(f"Story number {number}. "), *(policy.marker_ids(number) if number else [])]
        for number in range(6)
    ]
    rollouts = policy.generate(prompts, max_new_tokens=NEW, temperature=0)
    detector = policy.detector
    cases = [
        {
            "prompt": prompt_positions(rollout.prompt_ids, detector, model.latent_token_id),
            "completion": rollout.completion_ids,
            "logprobs": rollout.logprobs_T.tolist(),
        }
        for rollout in rollouts
    ]
    facts = {"cases": cases, "latent_token_id": model.latent_token_id, "stop_ids": policy.stop_ids}
    (folder / "cases.json").write_text(json.dumps(facts), encoding="utf-8")


def run_engine(way: str, gpus: int, folder: Path) -> int:
    """One engine; 0 if it writes what the local one does."""
    from lrscale.rollout.vllm.plugin import register
    from lrscale.rollout.vllm.stream import split

    register()
    from vllm import LLM, SamplingParams

    facts = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    llm = LLM(
        str(folder / "served"),
        dtype="bfloat16",
        tensor_parallel_size=gpus,
        max_model_len=1024,
        gpu_memory_utilization=0.5,
        compilation_config={"cudagraph_mode": way},
        worker_extension_cls="lrscale.rollout.vllm.worker.LatentWorker",
    )
    llm.collective_rpc("check_latent_steps")
    params = SamplingParams(
        temperature=0.0, max_tokens=NEW, logprobs=0, stop_token_ids=list(facts["stop_ids"]), ignore_eos=True
    )
    outputs = llm.generate([{"prompt_token_ids": case["prompt"]} for case in facts["cases"]], params, use_tqdm=False)
    same = total = 0
    gap = 0.0
    for case, output in zip(facts["cases"], outputs, strict=True):
        (answer,) = output.outputs
        ids = list(answer.token_ids)
        found = [entry[token].logprob for token, entry in zip(ids, answer.logprobs, strict=True)]
        completion, logprobs, _ = split(ids, found, facts["latent_token_id"])
        total += len(case["completion"])
        for ours, theirs, a, b in zip(case["completion"], completion, case["logprobs"], logprobs, strict=False):
            if ours != theirs:
                break
            same += 1
            gap = max(gap, abs(a - b))
    print(f"{way:20} {gpus} GPU(s): {same} of {total} tokens before a difference, log-prob gap {gap:.1e}", flush=True)
    return int(same < AGREE * total)


if __name__ == "__main__":
    sys.exit(main())
