"""The looks of the preflight one by one: each is shown something broken, and something whole as its control."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from importlib import resources
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lrscale.config.diagnosis import Check, bad_nodes, described
from lrscale.config.load import load_recipe
from lrscale.config.recipe import Recipe
from lrscale.parallel.ranks import Ranks
from lrscale.stages.preflight.files import check_files
from lrscale.stages.preflight.gpus import check_gpus, memory_errors
from lrscale.stages.preflight.meeting import Meeting
from lrscale.stages.preflight.memory import available_bytes, check_memory
from lrscale.stages.preflight.model_size import ModelSize, host_bytes, measure
from lrscale.stages.preflight.network import listening, own_address, reach_checks, unreachable
from lrscale.stages.preflight.rendezvous import Place, meet
from lrscale.stages.preflight.reward import check_reward
from lrscale.stages.preflight.storage import Canary, check_room, file_system
from lrscale.stages.preflight.tokens import check_markers, check_tokenizer
from lrscale.stages.preflight.verdict import add_bad_nodes
from tests.unit.latent import trained_tokenizers

TINY = Path(str(resources.files("lrscale"))) / "tasks" / "assets" / "tiny_base"
SMALL = ModelSize(parameters=1000, weight_bytes=4000, state_bytes=12000, largest_bytes=400)


def recipe(*overrides: str) -> Recipe:
    return load_recipe((), overrides).recipe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def of(model: Path) -> Recipe:
    return recipe(f"model.path={json.dumps(str(model))}")


def test_what_fails_on_some_nodes_blames_them_and_what_fails_on_all_blames_none() -> None:
    """Locks out a requeue that excludes every node because of a typing error in the recipe."""
    nodes = ("n1", "n2", "n3")
    fine = [Check("GPUs", "ok", "8", node=node) for node in nodes]
    one = Check("ECC", "failed", "GPU 3: 2 errors", needed="none", node="n2", blames_node=True)
    everywhere = [Check("model files", "failed", "gone", node=node, blames_node=True) for node in nodes]
    of_recipe = Check("reward", "failed", "KeyError", node="n1")
    assert bad_nodes([*fine, one, *everywhere, of_recipe]) == {"n2": "ECC: GPU 3: 2 errors; needed none"}
    assert list(bad_nodes([one])) == ["n2"]


def test_findings_alike_are_told_once_and_failures_say_what_to_do() -> None:
    checks = [Check("GPUs", "ok", "8 x H100", node=node) for node in ("n1", "n2")]
    text = described([*checks, Check("disk", "failed", "1 GiB", needed="2 GiB", help="make room")])
    assert text.splitlines()[0].split() == ["ok", "GPUs", "n1,", "n2:", "8", "x", "H100"]
    assert "needed: 2 GiB" in text and "help: make room" in text and len(text.splitlines()) == 4


def test_bad_nodes_keep_those_of_former_attempts_and_their_newest_reason(tmp_path: Path) -> None:
    path = tmp_path / "bad_nodes.txt"
    add_bad_nodes(path, {"n1": "old", "n2": "GPU 3\nis broken"})
    add_bad_nodes(path, {"n1": "new"})
    assert path.read_text() == "n2 GPU 3 is broken\nn1 new\n"


def test_missing_weights_are_found_before_they_are_loaded(model: Path) -> None:
    """Locks out a copy of a sharded model that broke off, noticed after an hour in the queue."""
    assert [check.state for check in check_files(of(model), "n1")] == ["ok"]
    weights = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (check,) = check_files(of(model), "n1")
    assert (check.state, check.node, check.blames_node) == ("failed", "n1", True)
    assert "lacks 1 of 2 weight files, model-2.safetensors" in check.found and check.needed and check.help


def test_missing_data_is_named_by_its_key(tmp_path: Path) -> None:
    for name in ("train.jsonl", "reward.py"):
        (tmp_path / name).touch()
    (tmp_path / "eval.jsonl").touch()
    task = f"task={{kind: jsonl, train: {tmp_path}/train.jsonl, eval: {tmp_path}/eval.jsonl}}"
    made = recipe(task, f"reward={{kind: function, path: {tmp_path}/reward.py}}")
    assert check_files(made, "")[-1].state == "ok"
    (tmp_path / "eval.jsonl").unlink()
    check = check_files(made, "")[-1]
    assert check.state == "failed" and "task.eval" in check.found and "train.jsonl" not in check.found


def test_a_tokenizer_without_an_end_is_found(model: Path) -> None:
    assert [check.state for check in check_tokenizer(of(model), str(model))] == ["ok", "ok"]
    for name in ("tokenizer_config.json",):
        config = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(config | {"eos_token": None}))
    check = check_tokenizer(of(model), str(model))[0]
    assert check.state == "failed" and "no eos token" in check.found and check.help


def test_markers_that_a_vocabulary_cannot_write_are_found(model: Path) -> None:
    """Locks out a run in which no marker is ever seen, and nothing says so."""
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for path in model.glob("tokenizer*"):
        path.unlink()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(model)
    check = check_tokenizer(of(model), str(model))[1]
    assert (check.name, check.state) == ("markers", "failed") and check.help


def test_the_size_of_a_model_is_measured_without_loading_it(model: Path) -> None:
    """Locks out an estimate that is off by the projector or by tied embeddings: compared with the real policy."""
    from lrscale.parallel.loading import load_policy

    made = of(model)
    (model / "model.safetensors").rename(model / "elsewhere")
    size = measure(made, str(model))
    (model / "elsewhere").rename(model / "model.safetensors")
    policy = load_policy(made.model, made.projector)
    parameters = sum(p.numel() for name, p in policy.named_parameters() if not name.endswith("gain"))
    gain = 128  # of the normalised kind
    assert size.parameters in (parameters, parameters + gain)
    assert (size.weight_bytes, size.state_bytes) == (4 * size.parameters, 12 * size.parameters)


def test_a_disk_that_is_too_small_says_how_much_is_needed(tmp_path: Path) -> None:
    assert check_room(recipe(), tmp_path, SMALL).state == "ok"
    check = check_room(recipe("checkpoints.keep_last=1000000000000"), tmp_path, SMALL)
    assert check.state == "failed" and "GiB more" in check.needed and "keep_last" in check.help
    assert check_room(recipe(), tmp_path / "none", SMALL).state == "not checked"


def test_the_file_system_of_a_folder_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"d / ext4 rw 0 0\ns:/x {tmp_path} lustre rw 0 0\nd {tmp_path}-other nfs4 rw 0 0\n")
    (tmp_path / "runs").mkdir()
    assert file_system(tmp_path / "runs", mounts) == "lustre"
    assert file_system(Path("/"), mounts) == "ext4"


def test_a_canary_tells_an_old_file_from_the_new_one(tmp_path: Path) -> None:
    """Locks out a check that is content with a file of the same name on another file system."""
    canary = Canary(tmp_path, Canary.fresh_word())
    canary.put("n1")
    assert canary.problem_with("n1") == ""
    assert "No such file" in canary.problem_with("n2", patience_s=0.0)
    (canary.folder / "n1").write_text("another word\n")
    assert "another word" in canary.problem_with("n1", patience_s=0.0)
    canary.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_limit_on_memory_counts(tmp_path: Path) -> None:
    """Locks out 2 TiB of a machine of which SLURM gives this job 64 GiB."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    job, step = groups / "slurm" / "job_7", groups / "slurm" / "job_7" / "step_0"
    (proc / "self").mkdir(parents=True)
    step.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 2000000 kB\nMemAvailable: 1000000 kB\n")
    (proc / "self" / "cgroup").write_text("1:cpu:/old\n0::/slurm/job_7/step_0\n")
    assert available_bytes(proc, groups) == (1_000_000 * 1024, "of the machine")
    for folder, most in ((job, "600000"), (step, "max")):
        (folder / "memory.max").write_text(most)
        (folder / "memory.current").write_text("500000\n")
        (folder / "memory.stat").write_text("anon 100\ninactive_file 400000\n")
    assert available_bytes(proc, groups) == (500_000, "of the cgroup job_7")
    assert available_bytes(tmp_path / "nothing") is None


def test_memory_is_counted_for_all_ranks_of_a_node() -> None:
    size = ModelSize(10**12, weight_bytes=10**14, state_bytes=10**15, largest_bytes=10**9)
    check = check_memory(recipe(), size, "n1")
    assert (check.state, check.blames_node) == ("failed", True) and "for one rank" in check.needed
    assert check_memory(recipe(), SMALL, "n1").state == "ok"
    sharded = ("parallel.kind=zero3", "cluster.gpus_per_node=4", "cluster.nodes=2", "model.device=cuda")
    plain = host_bytes(recipe(*sharded), SMALL)
    offloaded = host_bytes(recipe(*sharded, "parallel.offload_optimizer=true"), SMALL)
    assert (plain, offloaded) == (4 * 2 * 400, 4 * 2 * 400 + 12000 // 2)


REWARDS = {
    "raises": ("def reward(prompts, completions, **columns):\n    raise KeyError('level')\n", "KeyError"),
    "not a number": ("def reward(prompts, completions, **columns):\n    return [float('nan')]\n", "nan"),
    "unknown column": ("def reward(prompts, completions, level):\n    return [1.0]\n", "needs level"),
    "does not import": ("import nothing_of_that_name\n", "nothing_of_that_name"),
}


@pytest.mark.parametrize("case", REWARDS)
def test_a_reward_that_cannot_score_is_found_before_anything_is_sampled(tmp_path: Path, case: str) -> None:
    source, words = REWARDS[case]
    check = check_reward(with_reward(tmp_path, source), tmp_path)
    assert check.state == "failed" and words in check.found and check.needed and check.help


def test_a_reward_sees_the_right_answer_as_its_made_up_completion(tmp_path: Path) -> None:
    source = (
        "def reward(prompts, completions, answer):\n    return [float(a in c) for a, c in zip(answer, completions)]\n"
    )
    check = check_reward(with_reward(tmp_path, source), tmp_path)
    assert (check.state, check.found.split()[0]) == ("ok", "1")


def test_a_reward_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    source = "import time\ndef reward(prompts, completions, **columns):\n    time.sleep(60)\n"
    check = check_reward(with_reward(tmp_path, source), tmp_path, limit_s=0.5)
    assert check.state == "failed" and "no score after 0.5 s" in check.found


def with_reward(folder: Path, source: str) -> Recipe:
    (folder / "reward.py").write_text(source)
    (folder / "rows.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    task = f"{{kind: jsonl, train: {folder}/rows.jsonl, eval: {folder}/rows.jsonl, marker_paragraph: false}}"
    return recipe(f"task={task}", f"reward={{kind: function, path: {folder}/reward.py}}")


def test_what_cannot_be_looked_at_is_never_ok() -> None:
    """Locks out a green line for GPUs on a machine that has none."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert [check.state for check in check_gpus(recipe(), "n1")] == ["not checked"]
    (missing,) = check_gpus(recipe("model.device=cuda"), "n1")
    assert (missing.state, missing.blames_node) == ("failed", True) and "none" in missing.found
    assert [check.state for check in check_gpus(recipe("model.device=auto"), "n1")] == ["warning"]
    (ecc,) = memory_errors(0, "n1")  # NVML's library comes with the driver
    assert ecc.state == "not checked" and "NVML" in ecc.found


def test_a_port_that_answers_with_something_else_is_not_that_node() -> None:
    """Locks out two machines with one address, and a firewall that accepts and drops."""
    address = own_address("127.0.0.1")
    with listening(address, "the word") as port, listening(address, "other") as other:
        with socket.create_server((address, 0)) as closed:
            free = closed.getsockname()[1]
        peers = {"good": (address, port), "impostor": (address, other), "closed": (address, free)}
        problems = unreachable(peers, "the word")
    assert sorted(problems) == ["closed", "impostor"] and "something else" in problems["impostor"]


def test_the_node_with_most_broken_connections_is_the_one_to_blame() -> None:
    """Locks out a main node that is excluded because one other node is behind a firewall."""
    nodes = ["n1", "n2", "n3"]
    (check,) = reach_checks(nodes, {"n1": {"n3": "refused"}, "n2": {"n3": "timed out"}, "n3": {}})
    assert (check.node, check.state) == ("n3", "failed") and "n1, n2: refused" in check.found
    (check,) = reach_checks(nodes[:2], {"n1": {}, "n2": {"n1": "no route to host"}})
    assert check.node == "n2" and "no route to host" in check.found
    assert [check.state for check in reach_checks(nodes, {})] == ["ok"]
    assert [check.state for check in reach_checks(nodes[:1], {})] == ["not checked"]


def test_a_silent_rank_is_waited_for_no_longer_than_the_limit() -> None:
    store = dist.HashStore()
    main, other = (Meeting(Ranks(rank=rank, world_size=3), store) for rank in (0, 1))
    threading.Timer(0.3, lambda: other.tell("node", {"name": "n2"})).start()
    main.tell("node", {"name": "n1"})
    heard = main.hear("node", range(3), limit_s=1.5)
    assert heard == {0: {"name": "n1"}, 1: {"name": "n2"}}
    with pytest.raises(TimeoutError):
        other.hear_main("verdict", limit_s=0.1)


def test_a_node_that_cannot_reach_the_main_one_is_named_within_a_minute(tmp_path: Path) -> None:
    """Locks out ten minutes in which launchers wait for each other, and an end that names nobody."""
    found: dict[int, list[Check]] = {}

    def node(index: int, port: int, host: str = "127.0.0.1") -> threading.Thread:
        place = Place(tmp_path, f"n{index}", index, nodes=3, host=host, port=port, limit_s=2.0)
        thread = threading.Thread(target=lambda: found.update({index: meet(place)}))
        thread.start()
        return thread

    def three(*hosts: str) -> None:
        found.clear()
        for path in tmp_path.glob("meet-*"):
            path.unlink()
        with socket.create_server(("", 0)) as taken:
            port = taken.getsockname()[1]
        for thread in [node(index, port, host) for index, host in enumerate(hosts)]:
            thread.join(timeout=30)

    three("127.0.0.1", "127.0.0.1", "127.0.0.1")
    assert [check.state for check in found[0]] == ["ok"] and found[1] == found[2] == []
    three("127.0.0.1", "127.0.0.1", "no-such-host.invalid")
    assert [(check.node, check.state) for check in found[0]] == [("n2", "failed")]
    assert found[0][0].blames_node and "no-such-host.invalid" in found[0][0].found
    assert found[1] and found[2]  # nobody goes on alone


@pytest.mark.parametrize("name", trained_tokenizers.NAMES)
def test_tokenizers_of_every_family_pass(name: str) -> None:
    """Locks out a preflight that refuses a tokenizer on which the method works."""
    check = check_markers(trained_tokenizers.tokenizer_named(name), most=40)
    assert check.state == "ok", check.found
