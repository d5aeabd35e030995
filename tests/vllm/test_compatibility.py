"""What is refused at the start of an engine, with the reason; and what CUDA graphs may record. No engine is started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: `make vllm` installs it")

from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from vllm import ModelRegistry
from vllm.config import CompilationConfig, CUDAGraphMode, ParallelConfig
from vllm.forward_context import ForwardContext

from lrscale.latent import MarkerDetector
from lrscale.rollout.vllm import compatibility
from lrscale.rollout.vllm.architectures import ARCHITECTURES
from lrscale.rollout.vllm.compatibility import IncompatibleVllm, check_config, check_interface, check_metadata
from lrscale.rollout.vllm.latent_steps import FORCED, LatentSteps
from lrscale.rollout.vllm.plugin import register
from lrscale.rollout.vllm.position_automaton import PositionAutomaton
from lrscale.rollout.vllm.side_buffers import SideBuffers
from lrscale.rollout.vllm.step import Step
from tests.unit.latent.tiny_models import tiny_tokenizer

BLOCK, BLOCKS, HIDDEN = 4, 6, 8


def test_the_plugin_registers_every_architecture() -> None:
    register()
    register()
    assert set(ARCHITECTURES.values()) <= set(ModelRegistry.get_supported_archs())


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("parallel_config", {"pipeline_parallel_size": 2}, "pipeline_parallel_size above 1: the projector"),
        ("parallel_config", {"data_parallel_size": 2}, "start one engine each"),
        ("parallel_config", {"decode_context_parallel_size": 2}, "context parallelism"),
        ("compilation_config", {"cudagraph_mode": CUDAGraphMode.FULL}, "set FULL_AND_PIECEWISE"),
        ("compilation_config", {"cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE}, "set cudagraph_mode to PIECEWISE"),
        ("", {"speculative_config": SimpleNamespace()}, "speculative decoding: drafted tokens"),
        ("", {"lora_config": SimpleNamespace()}, "LoRA"),
        ("", {"use_v2_model_runner": True}, "set VLLM_USE_V2_MODEL_RUNNER=0"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(section: str, changes: dict[str, Any], words: str) -> None:
    """Locks out an engine that starts and samples other sequences than the trainer thinks."""
    sections = {
        "parallel_config": ParallelConfig(),
        "compilation_config": CompilationConfig(cudagraph_mode=CUDAGraphMode.PIECEWISE),
        "model_config": SimpleNamespace(enable_prompt_embeds=False),
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
        "use_v2_model_runner": False,
    }
    check_config(SimpleNamespace(**sections), records=True)
    for name, value in changes.items():
        if section:
            setattr(sections[section], name, value)
        else:
            sections[name] = value
    with pytest.raises(ValueError, match=words):
        check_config(SimpleNamespace(**sections), records=True)


def test_a_vllm_that_has_changed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks out an AttributeError out of the middle of a rollout after vLLM's next release."""
    check_interface()
    fields = {name: field for name, field in ForwardContext.__dataclass_fields__.items() if name != "attn_metadata"}
    monkeypatch.setattr(ForwardContext, "__dataclass_fields__", fields)
    with pytest.raises(IncompatibleVllm, match=rf"attn_metadata.*Tested with vLLM {compatibility.TESTED[0]}"):
        check_interface()
    with pytest.raises(IncompatibleVllm, match="block_table"):
        check_metadata(SimpleNamespace(num_actual_tokens=1, max_query_len=1, query_start_loc=0, slot_mapping=0))


def steps(automaton: PositionAutomaton, buffers: SideBuffers) -> LatentSteps:
    embedding = torch.randn(400, HIDDEN)
    return LatentSteps(
        automaton, lambda ids: embedding[ids], lambda embeds, _: torch.tanh(embeds), lambda hidden: 2 * hidden, buffers
    )


def single_step(rows: list[tuple[int, int, int, int]]) -> Step:
    """Rows of (token, position, block of the position before, block); a block of -1 makes it padding."""
    ids, positions, before, blocks = (torch.tensor(column) for column in zip(*rows, strict=True))
    table = torch.zeros(len(rows), 4, dtype=torch.long)
    row = torch.arange(len(rows))
    table[row, (positions - 1).clamp(min=0) // BLOCK] = before
    live = blocks >= 0
    table[row[live], positions[live] // BLOCK] = blocks[live]
    slots = torch.where(live, blocks * BLOCK + positions % BLOCK, -1)
    return Step(positions, ids, positions, slots, torch.arange(len(rows) + 1), table, single=True, captured=True)


def machinery() -> tuple[PositionAutomaton, SideBuffers, list[int]]:
    detector = MarkerDetector(tiny_tokenizer())
    automaton = PositionAutomaton(detector, 300)
    marker = list(detector.marker_ids(6))
    return automaton, SideBuffers(BLOCKS, BLOCK, HIDDEN, torch.empty(0)), marker


def test_decoding_has_no_data_dependent_control_flow() -> None:
    """Locks out a branch on values in what a CUDA graph records: fake tensors have none, so any look at one raises."""
    automaton, buffers, _ = machinery()
    automaton.place_on(torch.device("cpu"))
    step = single_step([(5, 3, 1, 1), (300, 4, 1, 2), (0, 0, 0, -1)])
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        tensors = ("positions_N", "ids_T", "positions_T", "slots_T", "starts_R1", "block_table_RK")
        columns = {name: fake.from_tensor(getattr(step, name)) for name in tensors}
        hidden = steps(automaton, buffers).run(
            Step(**columns, single=True, captured=True), columns["ids_T"], fixed=True
        )
        assert hidden.shape == (3, HIDDEN)
        free = Step(**columns, single=True, captured=False)
        with pytest.raises(DataDependentOutputException):  # the way outside of graphs does look
            steps(automaton, buffers).run(free, columns["ids_T"], fixed=False)
    with pytest.raises(RuntimeError, match="several positions a sequence in a full CUDA graph"):
        many = Step(*[getattr(step, name) for name in tensors], single=False, captured=True)
        steps(automaton, buffers).run(many, step.ids_T, fixed=False)


def test_decoding_of_fixed_shape() -> None:
    """The branch for CUDA graphs, by itself: a marker that ends now, a latent step, padding, a block that is
    completed and read in one step; and the one case that it cannot do ends in NaN, never in a wrong latent.
    """
    automaton, buffers, marker = machinery()
    buffers.state[1] = int(automaton.along(0, np.array(marker[:-1]))[-1])
    run = steps(automaton, buffers)
    step = single_step([(marker[-1], 2, 1, 1), (0, 0, 0, -1), (7, 5, 2, 2)])
    hidden = run.run(step, step.ids_T, fixed=True)
    assert (hidden[0] == FORCED).all()
    assert not (hidden[1:] == FORCED).any()
    latent = buffers.latent[1].clone()
    assert latent.abs().sum() > 0
    step = single_step([(300, 3, 1, 1), (300, 4, 1, 3), (8, 6, 2, 2)])  # row 1 reads what row 0 computes just now
    hidden = run.run(step, step.ids_T, fixed=True)
    assert (hidden[0] == FORCED).all()
    torch.testing.assert_close(buffers.latent[1], 2 * torch.tanh(latent))
    assert hidden[1].isnan().all()
    assert hidden[2].isfinite().all()
    assert (buffers.finishing_row == -1).all()
