"""What it costs to hand weights to a rollout engine: buckets against one parameter at a time, projector against all.

    python -m benchmarks.publish [--rounds N]

For policies of about 1, 25 and 120 million parameters, on this machine's CPU. A message is one file and one request:
the publication is written, announced, checked and read as an engine's worker does it, into tensors that stand for
the engine's weights; vLLM's own loading comes on top and is the same for both ways. Medians of N rounds, ways by turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lrscale.keeper import SHARED_MEMORY
from lrscale.rollout.vllm.client import ask
from lrscale.rollout.weights import Manifest, check_publication, publication, read_publication

SIZES = {"tiny": (128, 4, 512), "25M": (384, 8, 8192), "120M": (768, 12, 16384)}
"""Width, layers, vocabulary."""
PROJECTOR_BLOCKS = 3


class Receiver:
    """The worker's part: checks a publication and copies it into its own weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.held = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                outer.receive(Path(json.loads(self.rfile.read(int(self.headers["content-length"])))["manifest"]))
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(b"{}")

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def receive(self, path: Path) -> None:
        manifest = Manifest.read(path)
        check_publication(manifest, path.parent)
        for name, tensor in read_publication(manifest, path.parent):
            self.held[name].copy_(tensor)


def weights_of(width: int, layers: int, vocabulary: int) -> dict[str, Tensor]:
    """A Llama of these dimensions with a projector."""
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 64, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    last = f"model.layers.{layers - 1}.mlp."
    for block in range(PROJECTOR_BLOCKS):
        for name in ("gate_proj", "up_proj", "down_proj"):
            weights[f"reasoning_projector.{block}.{name}.weight"] = weights[f"{last}{name}.weight"].clone()
    return weights


def publish(receiver: Receiver, parameters: Iterable[tuple[str, Tensor]], folder: Path) -> int:
    """One publication; the messages it took."""
    with publication(parameters, folder, version=1) as path:
        if not isinstance(path, Path):
            raise SystemExit(f"no publication: {path}")
        ask(receiver.url, "/weights", {"manifest": str(path)}, timeout_s=600)
        return len(Manifest.read(path).buckets)


def one_by_one(receiver: Receiver, weights: dict[str, Tensor], folder: Path) -> int:
    return sum(publish(receiver, [pair], folder) for pair in weights.items())


def measure(weights: dict[str, Tensor], folder: Path, rounds: int) -> Iterator[tuple[str, float, int]]:
    """(way, median seconds, messages); what arrived is compared with what was sent."""
    receiver = Receiver(weights)
    projector = {name: tensor for name, tensor in weights.items() if name.startswith("reasoning_projector.")}
    ways = {
        "buckets": lambda: publish(receiver, weights.items(), folder),
        "one by one": lambda: one_by_one(receiver, weights, folder),
        "projector": lambda: publish(receiver, projector.items(), folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    messages: dict[str, int] = {}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            messages[name] = run()
            seconds[name].append(time.perf_counter() - started)
    if not all(torch.equal(receiver.held[name], tensor) for name, tensor in weights.items()):
        raise SystemExit("the weights did not arrive")
    receiver.server.shutdown()
    for name in ways:
        yield name, statistics.median(seconds[name][1:]), messages[name]  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| policy | MB | buckets | one by one | ratio | projector alone | its share of bytes | of time |")
    print("|---|---|---|---|---|---|---|---|")
    root = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    for name, dimensions in SIZES.items():
        weights = weights_of(*dimensions)
        size = sum(tensor.nbytes for tensor in weights.values())
        part = sum(tensor.nbytes for key, tensor in weights.items() if key.startswith("reasoning_projector."))
        with tempfile.TemporaryDirectory(dir=root, prefix="lrscale-benchmark-") as folder:
            found = {way: (s, n) for way, s, n in measure(weights, Path(folder) / "weights", rounds)}
        (whole_s, whole_n), (single_s, single_n), (own_s, _) = (found[way] for way in found)
        count = sum(tensor.numel() for tensor in weights.values()) / 1e6
        print(
            f"| {name} ({count:.1f} M) | {size / 1e6:.0f} | {whole_s:.3f} s, {whole_n} messages | {single_s:.3f} s, "
            f"{single_n} messages | {single_s / whole_s:.1f} | {own_s:.3f} s | {part / size:.0%} | {own_s / whole_s:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
