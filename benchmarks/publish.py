"""What it costs to hand weights to a rollout engine: buckets in files, broadcast, one by one; projector against all.

    python -m benchmarks.publish [--rounds N]

For policies of about 1, 25 and 120 million parameters, on this machine's CPU. A message is one file and one request:
the publication is written, announced, checked and read as an engine's worker does it, into tensors that stand for
the engine's weights; vLLM's own loading comes on top and is the same for all ways. Broadcast is by gloo between two
threads of one machine: what it saves in files it pays in copies; between nodes the network decides. Medians of N rounds,
ways by turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from lrscale.keeper import SHARED_MEMORY
from lrscale.rollout.vllm.client import ask
from lrscale.rollout.weight_files import Manifest, ReadFiles, WrittenFiles
from lrscale.rollout.weight_group import Meeting, WeightGroup
from lrscale.rollout.weight_stream import ReceivedStream, SentStream
from lrscale.rollout.weights import Incoming

CPU = torch.device("cpu")
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
        meeting = Meeting([("127.0.0.1", self.server.server_address[1])], 1, CPU, 600)
        with ThreadPoolExecutor(1) as threads:
            joining = threads.submit(WeightGroup.join, meeting.invitation("benchmark", 0), 0, CPU)
            while meeting.absent("benchmark"):
                time.sleep(0.001)
            self.sender = meeting.join("benchmark")
            self.member = joining.result()

    def receive(self, path: Path) -> None:
        self.load(ReadFiles(path))

    def forget(self) -> None:
        for tensor in self.held.values():
            tensor.fill_(torch.nan)

    def load(self, incoming: Incoming) -> None:
        incoming.expect(1, projector_only=False)
        for name, tensor in incoming.tensors():
            self.held[name].copy_(tensor)
        incoming.finish()


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
    """One publication in files; the messages it took."""
    files = WrittenFiles(folder, version=1)
    try:
        for name, tensor in parameters:
            files.add(name, tensor)
        path = files.finish()
        ask(receiver.url, "/weights", {"manifest": str(path)}, timeout_s=600)
        return len(Manifest.read(path).buckets)
    finally:
        files.drop()


def broadcast(receiver: Receiver, parameters: Iterable[tuple[str, Tensor]]) -> int:
    """One publication by broadcast; the messages it took."""
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(receiver.load, ReceivedStream(receiver.member))
        stream = SentStream(receiver.sender, version=1)
        for name, tensor in parameters:
            stream.add(name, tensor)
        stream.finish()
        loading.result()
    stream.forget()
    return len(stream.sent)


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
        "broadcast": lambda: broadcast(receiver, weights.items()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    messages: dict[str, int] = {}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            receiver.forget()
            started = time.perf_counter()
            messages[name] = run()
            seconds[name].append(time.perf_counter() - started)
            expected = projector if name == "projector" else weights
            if not all(torch.equal(receiver.held[key], tensor) for key, tensor in expected.items()):
                raise SystemExit(f"{name}: the weights did not arrive")
    receiver.server.shutdown()
    for name in ways:
        yield name, statistics.median(seconds[name][1:]), messages[name]  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| policy | MB | buckets | broadcast | one by one | ratio | projector alone | its share of bytes | of time |")
    print("|---|---|---|---|---|---|---|---|---|")
    root = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    for name, dimensions in SIZES.items():
        weights = weights_of(*dimensions)
        size = sum(tensor.nbytes for tensor in weights.values())
        part = sum(tensor.nbytes for key, tensor in weights.items() if key.startswith("reasoning_projector."))
        with tempfile.TemporaryDirectory(dir=root, prefix="lrscale-benchmark-") as folder:
            found = {way: (s, n) for way, s, n in measure(weights, Path(folder) / "weights", rounds)}
        (whole_s, whole_n), (single_s, single_n), (own_s, _), (broadcast_s, _) = (found[way] for way in found)
        count = sum(tensor.numel() for tensor in weights.values()) / 1e6
        print(
            f"| {name} ({count:.1f} M) | {size / 1e6:.0f} | {whole_s:.3f} s, {whole_n} messages | {broadcast_s:.3f} s | {single_s:.3f} s, "
            f"{single_n} messages | {single_s / whole_s:.1f} | {own_s:.3f} s | {part / size:.0%} | {own_s / whole_s:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
