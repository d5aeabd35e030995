"""load_policy: the right device and dtype, and errors that a user can act on."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BloomConfig, MambaConfig

from lrscale.config.model import ModelConfig, ProjectorConfig
from lrscale.parallel.loading import load_policy
from tests.unit.latent.tiny_models import live_policy, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model("llama", len(tokenizer), torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def load(path: Path | str, projector: ProjectorConfig | None = None, **model):
    return load_policy(ModelConfig(path=str(path), device="cpu", **model), projector or ProjectorConfig())


def test_recipe_values_arrive(folder):
    """Locks out sections of the recipe that are parsed and then forgotten."""
    policy = load(
        folder,
        ProjectorConfig(kind="normalised", layers=2, max_latent_steps=7),
        dtype="bfloat16",
        attention="eager",
        gradient_checkpointing=True,
        logits_mib=3,
    )
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert (policy.projector.kind, len(policy.projector), policy.max_latent_steps) == ("normalised", 2, 7)
    assert policy.model.is_gradient_checkpointing and policy.logits_mib == 3
    assert policy.model.config._attn_implementation == "eager"
    assert load(folder).device == torch.device("cpu")


def test_packaged_model():
    """Locks out a wheel or checkout without the model that the demo starts from."""
    if not (Path(__file__).parents[3] / "lrscale/tasks/assets/tiny_base/config.json").is_file():
        pytest.skip("lrscale/tasks/assets/tiny_base is not made yet (python -m lrscale.tasks.tiny_base)")
    assert load("builtin:tiny").tokenizer.eos_token_id is not None
    with pytest.raises(ValueError, match="only packaged model is builtin:tiny"):
        load("builtin:large")


def test_tokenizer_without_pad(folder):
    """Locks out a crash of every tokenizer without pad; eos stands in, since masks tell what is padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    policy = load(folder)
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id is not None
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="neither a pad nor an eos token"):
        load(folder)


def test_checkpoint_projector_must_be_the_recipes(tmp_path):
    """Locks out a recipe that says one projector while another one is trained."""
    live_policy(dtype=torch.float32).save_pretrained(tmp_path)
    policy = load(tmp_path, ProjectorConfig(layers=3, max_latent_steps=9))
    assert policy.max_latent_steps == 9
    with pytest.raises(ValueError, match=r"projector.layers 3; the recipe says paper and 2"):
        load(tmp_path, ProjectorConfig(layers=2))


def test_missing_and_wrong_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all"):
        with pytest.raises(ValueError, match="no such folder"):
            load(path)
    with pytest.raises(ValueError, match=r"no config.json"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        load(tmp_path / "file")


def test_hub_id_that_cannot_be_had():
    """Locks out sixty lines of traceback for a typo: one line that names key and value."""
    with pytest.raises(
        ValueError, match=r"model.path not a hub id; no such folder .*hub id it could not be had"
    ) as caught:
        load("not a hub id")
    assert len(str(caught.value).splitlines()) == 1


def test_broken_folders(folder):
    """Locks out a library's bare exception for a half-copied model."""
    (folder / "tokenizer.json").rename(folder / "kept.json")
    with pytest.raises(ValueError, match=r"no tokenizer that can be loaded.*save_pretrained"):
        load(folder)
    (folder / "kept.json").rename(folder / "tokenizer.json")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.path .*the weights in .* are damaged.*copy or download"):
        load(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"no file named model.safetensors"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a valid JSON file"):
        load(folder)


def test_hub_out_of_reach(monkeypatch, caplog):
    """Locks out half a minute of retries, a line each, before a message that does not say what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    with pytest.raises(ValueError, match=r"not a folder here, and the hub cannot be reached .*HF_HUB_OFFLINE"):
        load("nobody/no-such-model-of-ours")
    with pytest.raises(ValueError, match=r"no such folder \(from .*\), and the hub cannot be reached"):
        load("no-such-model-of-ours")
    assert not caplog.records


@pytest.mark.parametrize(
    ("config", "answer"),
    [
        (MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=4, vocab_size=300), "mamba is not supported"),
        (BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=300), "set model.attention: eager"),
    ],
)
def test_architectures_without_sdpa(tmp_path, config, answer):
    """Locks out transformers' request to open an issue there, as the answer to a model without MLPs."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=answer) as caught:
        load(tmp_path)
    assert "issue" not in str(caught.value)


def test_not_a_causal_model(tmp_path):
    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32).save_pretrained(
        tmp_path
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.path"):
        load(tmp_path)


def test_tokenizer_larger_than_the_embedding(folder):
    """Locks out an index error deep in the first forward."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one-more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"ids up to \d+.*embedding \d+ rows"):
        load(folder)


def test_gpu_asked_for_and_absent(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"model.device is cuda.*auto or cpu"):
        load_policy(ModelConfig(path=str(folder), device="cuda"), ProjectorConfig())
    assert load_policy(ModelConfig(path=str(folder)), ProjectorConfig()).device.type == "cpu"


def test_remote_code_stays_off(folder):
    """Locks out a model folder that runs its own Python on load."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    load(folder)
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model.path"):
        load(folder)
    assert not (folder / "ran").exists()
