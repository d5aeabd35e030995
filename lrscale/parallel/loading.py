"""From a recipe's model section to a policy on its device, with errors that say what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from lrscale.config.model import ModelConfig, ProjectorConfig
from lrscale.latent import LatentPolicy
from lrscale.latent.backbone import Backbone
from lrscale.latent.hf_layout import ProjectorFields
from lrscale.latent.projector_folder import ProjectorFolder, load_projector
from lrscale.parallel.ranks import Ranks

BUILTIN_TINY = "builtin:tiny"
_TINY_FOLDER = "tasks/assets/tiny_base"
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError)
"""What transformers raises for files that are missing, broken, or of another shape."""
# httpx or httpx2, whichever this huggingface_hub speaks through; the base of a failed connection's error.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """No line a retry from huggingface_hub: what it could not get in the end comes as an error."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@_quiet_hub()
def load_policy(model: ModelConfig, projector: ProjectorConfig) -> LatentPolicy:
    """The policy of a recipe, on its device and in its dtype.

    A plain model gets a projector cloned from its last MLP. A LiteReason checkpoint brings its
    own, which must be the one that the recipe describes.

    Raises ValueError for a path that is missing or no model folder, a hub id that cannot be had,
    a tokenizer that is missing or fits the model badly, broken weights, a model without an MLP to
    clone, a projector other than the recipe's, and a device that is not there.
    """
    source, tokenizer, device = checked_source(model, projector)
    config = _load_config(source, model.path)
    try:
        policy = LatentPolicy.from_pretrained(
            source,
            tokenizer,
            projector.layers,
            projector.max_latent_steps,
            projector_kind=projector.kind,
            dtype=model.dtype,
            attention=model.attention,
            add_marker_tokens=model.add_marker_tokens,
        )
    except SafetensorError as error:
        raise ValueError(
            f"model.path {model.path}: the weights in {source} are damaged or cut short ({_short(error)}); "
            "copy or download the folder again"
        ) from error
    except _LOAD_ERRORS as error:
        raise ValueError(f"model.path {model.path}: {_no_sdpa(error, config) or _short(error)}") from error
    rows = policy.model.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values()) >= rows:
        raise ValueError(
            f"model.path {model.path}: the tokenizer has ids up to {max(tokenizer.get_vocab().values())}, the model's "
            f"embedding {rows} rows; resize the embedding, or take the tokenizer that the model was trained with"
        )
    if projector.path:
        load_projector(policy.projector, Path(projector.path))
    policy.logits_mib = model.logits_mib
    if model.gradient_checkpointing:
        policy.enable_checkpointing()
    return policy.to(device)


@_quiet_hub()
def checked_source(model: ModelConfig, projector: ProjectorConfig) -> tuple[str, PreTrainedTokenizerBase, torch.device]:
    """What transformers is given for a recipe's model, its tokenizer, and its device. ValueError as `load_policy`."""
    device = _device(model.device)
    source = model_source(model.path)
    config = _load_config(source, model.path)
    _check_projector(ProjectorFields.read(config), projector, f"model.path {model.path} is a LiteReason checkpoint")
    if projector.path:
        _check_projector_folder(ProjectorFolder.read(Path(projector.path)), config, projector)
    return source, _load_tokenizer(source, model.path), device


@_quiet_hub()
def checkpoint_projector(model: ModelConfig) -> ProjectorConfig:
    """The projector that a LiteReason checkpoint brings; the defaults for a plain model. ValueError as `load_policy`."""
    fields = ProjectorFields.read(_load_config(model_source(model.path), model.path))
    if fields is None:
        return ProjectorConfig()
    return ProjectorConfig(kind=fields.kind, layers=fields.layers, max_latent_steps=fields.max_latent_steps)


def _device(wanted: str) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"model.device is {wanted}, but torch {torch.__version__} sees no GPU here; set model.device: auto or cpu, "
            "or install a CUDA build of torch and check nvidia-smi"
        )
    return torch.device("cuda", Ranks.from_environment().local_rank)


def model_source(path: str) -> str:
    """What transformers is given: a folder that exists, or a hub id."""
    if path == BUILTIN_TINY:
        folder = Path(str(resources.files("lrscale"))) / _TINY_FOLDER
        if not (folder / "config.json").is_file():
            raise ValueError(f"{BUILTIN_TINY} is missing from this installation ({folder}); install lrscale again")
        return str(folder)
    if path.startswith("builtin:"):
        raise ValueError(f"model.path is {path}; the only packaged model is {BUILTIN_TINY}")
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ValueError(f"model.path {path} is a file; needed a folder in the Hugging Face layout, or a hub id")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.path {path} is no model folder: it has no config.json")
        return str(folder)
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ValueError(f"model.path {path}: no such folder (from {Path.cwd()})")
    return path


def _load_config(source: str, path: str) -> PreTrainedConfig:
    if not Path(source).is_dir():
        _check_hub(source)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        hint = "" if Path(source).is_dir() else f"; {_no_folder(source)}, and as a hub id it could not be had"
        raise ValueError(f"model.path {path}{hint}: {_short(error)}") from None


def _check_hub(hub_id: str) -> None:
    """ValueError where a model is not in the hub's cache and the hub cannot be reached.

    Asked once, since transformers asks six times for each file, half a minute in all.
    """
    try:
        if try_to_load_from_cache(hub_id, "config.json") is None:
            get_hf_file_metadata(hf_hub_url(hub_id, "config.json"))
    except (HfHubHTTPError, HFValidationError):
        return  # the hub has an answer, or this is no hub id: transformers finds the words
    except OfflineModeIsEnabled as error:
        raise ValueError(
            f"model.path {hub_id}: {_no_folder(hub_id)}, nor is it in the hub's cache, and HF_HUB_OFFLINE is set: "
            "give a local folder, or download the model first"
        ) from error
    except (_HTTP_ERROR, OSError) as error:
        raise ValueError(
            f"model.path {hub_id}: {_no_folder(hub_id)}, and the hub cannot be reached ({_short(error)}): give a local "
            "folder, or download the model where there is a network, copy the cache and set HF_HUB_OFFLINE=1"
        ) from error


def _no_folder(path: str) -> str:
    return "not a folder here" if "/" in path else f"no such folder (from {Path.cwd()})"


def _no_sdpa(error: Exception, config: PreTrainedConfig) -> str:
    """Our own words for an architecture that transformers has no SDPA for; empty for any other error."""
    if "scaled_dot_product_attention" not in str(error):
        return ""
    try:
        with torch.device("meta"):
            Backbone(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).last_mlp()
    except (ValueError, AttributeError):
        return (
            f"the architecture {config.model_type} is not supported: it has no plain or gated MLP to clone a Reasoning "
            "Projector from; use one in the style of Llama, Qwen, Mistral, Gemma or GPT-2"
        )
    return f"the architecture {config.model_type} has no SDPA attention in transformers; set model.attention: eager"


def _check_projector(fields: ProjectorFields | None, projector: ProjectorConfig, what: str) -> None:
    if fields is not None and (fields.layers, fields.kind) != (projector.layers, projector.kind):
        raise ValueError(
            f"{what} with projector.kind {fields.kind} and projector.layers {fields.layers}; the recipe says "
            f"{projector.kind} and {projector.layers}: make them agree"
        )


def _check_projector_folder(found: ProjectorFolder, config: PreTrainedConfig, projector: ProjectorConfig) -> None:
    _check_projector(found.fields, projector, f"projector.path {projector.path} holds a projector")
    if ProjectorFields.read(config) is not None:
        raise ValueError(
            f"projector.path is {projector.path}, but the model brings a projector of its own: leave one of them out"
        )
    if found.hidden_size != config.get_text_config().hidden_size:
        raise ValueError(
            f"projector.path {projector.path} was made for a model of width {found.hidden_size}, model.path has "
            f"{config.get_text_config().hidden_size}: take the projector of a run with this base"
        )


def _load_tokenizer(source: str, path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise ValueError(
            f"model.path {path} has no tokenizer that can be loaded ({_short(error)}); "
            "save the model's tokenizer beside it: tokenizer.save_pretrained(folder)"
        ) from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of model.path {path} has neither a pad nor an eos token; "
                "give it one: tokenizer.pad_token = ..., then tokenizer.save_pretrained(folder)"
            )
        tokenizer.pad_token = tokenizer.eos_token  # harmless: what is padding is told by masks, never by ids
    return tokenizer


def _short(error: Exception) -> str:
    """The first line of a library's message: the rest is advice about that library."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")


@_quiet_hub()
def hidden_size_of(model: ModelConfig) -> int:
    """A model's width, from its configuration. ValueError as `load_policy`."""
    return int(_load_config(model_source(model.path), model.path).get_text_config().hidden_size)
