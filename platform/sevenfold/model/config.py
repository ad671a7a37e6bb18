"""The transformers config of a recipe's model."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from sevenfold import storage
from sevenfold.engine.positions import position_offset
from sevenfold.errors import InputError, RunError, first_line
from sevenfold.model import gguf, hub, remote_code
from sevenfold.model.files import check_files
from sevenfold.recipe import Recipe
from sevenfold.run_folder import RunFolder

# fields that are positive wherever a config has them as a number
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_decoder_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_MAX_SIZE = 2**24  # larger ones would fill any memory
_MAX_OFFSET = 8  # no model reserves as many positions
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # how a model of the hub is called
Family = Literal["decoder", "encoder", "encoder-decoder"]


def model_path(path: str) -> str:
    """Returns the Hugging Face directory or the GGUF file of a model, or its pinned hub name.

    Args:
        path: One of them, or the folder of a sevenfold run, which has a directory `model`.

    Raises:
        InputError: The path is none of them, or the hub does not give the model.
    """
    if hub.is_hub(path):
        return hub.pinned(path)
    folder = storage.resolve_input(path)
    if folder.endswith(gguf.SUFFIX) and storage.exists(folder):
        return folder
    run_model = RunFolder(folder).model
    if storage.exists(storage.join(run_model, "config.json")):
        return run_model
    if storage.exists(storage.join(folder, "config.json")):
        return folder
    hint = ""
    if _REPOSITORY.fullmatch(path) and not storage.exists(folder):
        hint = (
            f"; for the model {path} of the hub, give {hub.PREFIX}{path}, or get it with: hf "
            f"download {path} --local-dir FOLDER, then give FOLDER"
        )
    raise InputError(
        f"{folder}: expected a run, a Hugging Face directory (config.json), a GGUF file (.gguf) or "
        f"the name of a model of the hub (hf://ORGANIZATION/NAME), found none of them{hint}"
    )


def local_model(path: str, *, weights: bool = True) -> str:
    """Returns a local Hugging Face directory with the files of a model.

    Args:
        path: As for `model_path`. Remote files are copied, and GGUF files unpacked, once per
            machine.
        weights: Whether the weights are needed. Without them nothing large is downloaded from the
            hub, and the checksum of the weights is not verified.

    Raises:
        InputError: There is no such model, or a file of it is damaged.
    """
    location = model_path(path)
    if hub.is_hub(location):
        location = hub.local_folder(location, weights=weights)
    elif location.endswith(gguf.SUFFIX):
        location = gguf.unpacked(location)
    return local_folder(location, weights=weights)


def runs_own_code(recipe: Recipe) -> bool:
    """Returns whether the Python code of the recipe's base may run, see `remote_code`."""
    if not recipe.trusted_code or recipe.model.path is None:
        return False
    return remote_code.is_allowed(recipe, local_model(recipe.model.path, weights=False))


def local_folder(location: str, *, weights: bool = True) -> str:
    """Returns a local copy of a Hugging Face directory, after a check of its files.

    Args:
        location: The directory, a path or a URL. A local one is not copied.
        weights: Whether to check the weights too.

    Raises:
        InputError: A file is damaged, or differs from the checksums of the export.
    """
    folder = storage.local_copy(location)
    storage.verify_checksums(folder, weights=weights)
    check_files(folder, weights)
    return folder


def config_of(recipe: Recipe, vocab_size: int, tokenizer: Any = None) -> PreTrainedConfig:
    """Returns the transformers config of the recipe's model.

    Args:
        recipe: The recipe.
        vocab_size: The size of the tokenizer's vocabulary.
        tokenizer: If given, the config of a new model gets its special tokens.

    Raises:
        InputError: The model type or a field is unknown, or the model's vocabulary or context is
            too small for the data.
    """
    where = "model.config"
    try:
        if recipe.model.path is not None:
            folder = local_model(recipe.model.path, weights=False)
            where = os.path.join(folder, "config.json")
            config = AutoConfig.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=remote_code.is_allowed(recipe, folder),
            )
        else:
            config = _new_config(recipe, vocab_size, tokenizer)
        if recipe.objective == "classify":
            _set_classes(config, recipe.data.classes, tokenizer)
    except (InputError, RunError):
        raise
    except Exception as e:  # a config's own code raises anything for values it does not expect
        if "trust_remote_code" in str(e):
            raise remote_code.refusal(folder) from None
        raise InputError(f"{where}: {first_line(e)}") from None
    check_values(config, where)
    if recipe.train.dropout is not None:
        _set_dropout(config, recipe.train.dropout)
    if not hasattr(config, "vocab_size"):
        parts = [type(v).model_type for v in vars(config).values() if hasattr(v, "vocab_size")]
        part = f": choose {parts[0]}, its part for text" if parts else ": choose another model"
        raise InputError(
            f"{recipe.model.path or 'model.config'}: expected a model of text alone, found "
            f"{config.model_type}, which has no vocabulary of its own{part}"
        )
    _check_sizes(config, vocab_size, recipe.data.sequence_length)
    return config


def _new_config(recipe: Recipe, vocab_size: int, tokenizer: Any) -> PreTrainedConfig:
    """Builds the config of a new model from the recipe's fields; sizes default to the data's."""
    fields = recipe.model.config or {}
    length = recipe.data.sequence_length
    known = AutoConfig.for_model(fields["model_type"]).to_dict().keys()
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise InputError(f"model.config: {fields['model_type']} has no field {unknown[0]!r}")
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": length, "n_positions": length}
    defaults = {name: size for name, size in sizes.items() if name in known}
    config = AutoConfig.for_model(**(defaults | fields))
    if "max_position_embeddings" in defaults.keys() - fields.keys():
        config.max_position_embeddings += first_position(config)
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        if config.is_encoder_decoder:
            config.decoder_start_token_id = config.pad_token_id
    return config


def check_values(config: PreTrainedConfig, where: str) -> None:
    """Checks values of a config that transformers uses without a look at them.

    Args:
        config: The config.
        where: The file or key that errors name.

    Raises:
        InputError: A size is not a positive integer, heads cannot be shared, or a dropout is not a
            probability.
    """
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(type(n) is str for n in names)):
        raise InputError(f"{where}: architectures: expected a list of names, found {names!r}")
    fields = config.to_dict()
    # not getattr, which fails for a size that layers of their own have (Gemma 4)
    sizes = {name: fields.get(config.attribute_map.get(name, name)) for name in _SIZES}
    for name, size in sizes.items():
        if isinstance(size, int) and not 1 <= size <= _MAX_SIZE:
            raise InputError(f"{where}: {name}: expected 1 to {_MAX_SIZE:,}, found {size:,}")
    heads, shared = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise InputError(
            f"{where}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads "
            f"({shared})"
        )
    for name, value in fields.items():
        if re.search("dropout|pdrop", name) and type(value) in (int, float) and not 0 <= value <= 1:
            raise InputError(f"{where}: {name}: expected a probability, found {value}")


def _set_classes(config: PreTrainedConfig, classes: list[str], tokenizer: Any) -> None:
    """Sets the fields of a config that a classifier needs."""
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    # a decoder uses the padding token to find the last token of a text
    if getattr(config, "pad_token_id", None) is None:
        # any token will do for `sevenfold plan`, which has no tokenizer
        candidates = (getattr(tokenizer, "pad_token_id", 0), getattr(tokenizer, "eos_token_id", 0))
        config.pad_token_id = next((i for i in candidates if i is not None), None)


def _set_dropout(config: PreTrainedConfig, probability: float) -> None:
    """Sets all dropout probabilities of a config."""
    names = dropouts(config)
    if not names:
        raise InputError(
            f"train.dropout: {config.model_type} has no dropout: remove the setting, or choose "
            "another model"
        )
    for name in names:
        setattr(config, name, probability)


def _check_sizes(config: PreTrainedConfig, vocab_size: int, length: int) -> None:
    """Raises InputError if the vocabulary or the context is too small for the data."""
    if config.vocab_size < vocab_size:
        raise InputError(
            f"model: vocab_size {config.vocab_size} is below the tokenizer's {vocab_size}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    # -1 says that there is no limit (XLNet)
    if positions is None or positions < 0 or positions > length + _MAX_OFFSET:
        return
    first = first_position(config)
    if positions - first < length:
        reserved = f", of which the first {first} are for no token" if first else ""
        raise InputError(
            f"data.sequence_length {length} is above the model's {positions - first} positions "
            f"(max_position_embeddings {positions}{reserved})"
        )


def first_position(config: PreTrainedConfig) -> int:
    """Returns the position of a text's first token, see `position_offset`; 0 for most models.

    A model with one layer is built on the meta device, which allocates no memory.
    """
    if family(config) != "encoder":
        return 0
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    with torch.device("meta"), contextlib.suppress(Exception):  # reported when the model is built
        return position_offset(AutoModel.from_config(small))
    return 0


def family(config: PreTrainedConfig) -> Family:
    """Returns the architecture of a model: decoder, encoder or encoder-decoder.

    Some model types, such as BERT, can be an encoder or a decoder; the config's `is_decoder` and
    the class that was saved decide.
    """
    if config.is_encoder_decoder:
        return "encoder-decoder"
    is_decoder = getattr(config, "is_decoder", False) or re.search(
        "CausalLM|LMHead", " ".join(config.architectures or [])
    )
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder:
        return "encoder"
    return "decoder"


def dropouts(config: PreTrainedConfig) -> list[str]:
    """Returns the names of a config's fields that are dropout probabilities.

    A value of None is included: it means the value of another such field. LayerDrop is not.
    """
    fields = {k: v for k, v in config.to_dict().items() if re.search("dropout|pdrop", k)}
    return [k for k, v in fields.items() if v is None or (type(v) in (int, float) and 0 <= v < 1)]
