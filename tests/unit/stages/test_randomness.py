"""Random streams named by counters."""

from __future__ import annotations

from lrscale.stages.randomness import shuffled, stream_seed, take_cyclic


def test_streams_differ_by_every_name():
    """Two purposes that share a stream would draw the same numbers."""
    seeds = [stream_seed(0, "rl", 1), stream_seed(0, "rl", 2), stream_seed(1, "rl", 1), stream_seed(0, "traces", 1)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_steps_of_an_epoch_take_every_prompt_once():
    """A resume that drew anew would skip prompts (675 were, in one public report)."""
    items = list(range(10))
    epoch = [item for step in range(5) for item in take_cyclic(items, 2 * step, 2, 0, "rl")]
    assert sorted(epoch) == items
    assert epoch != items


def test_a_step_is_the_same_wherever_the_run_started():
    items = list(range(7))
    whole = take_cyclic(items, 0, 70, 3, "rl")
    assert [take_cyclic(items, 4 * step, 4, 3, "rl") for step in range(17)] == [
        whole[4 * step : 4 * step + 4] for step in range(17)
    ]


def test_epochs_are_permuted_anew():
    items = list(range(20))
    assert take_cyclic(items, 0, 20, 0, "rl") != take_cyclic(items, 20, 20, 0, "rl")


def test_more_prompts_a_step_than_there_are():
    assert sorted(take_cyclic([1, 2, 3], 0, 7, 0, "rl")[:3]) == [1, 2, 3]


def test_shuffling_leaves_the_items_alone():
    items = (3, 1, 2)
    assert sorted(shuffled(items, 0, "x")) == [1, 2, 3]
    assert items == (3, 1, 2)
