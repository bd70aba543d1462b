"""Folders and hub ids of models: what is wrong with one is said in a sentence."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .. import scale as current_scale
from .adopt import head_modules, set_dropout

# Any of them tells that a tokenizer was saved beside the model.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab*", "*.model", "merges.txt")
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def fresh_model(source: str, num_labels: int, dropout: float) -> Loaded:
    """Load a pretrained encoder under a fresh head.

    Args:
        source: Folder or hub id; a head that it has is not used.
        num_labels: K.
        dropout: For every dropout that the configuration has.

    Raises:
        ConnectionError: If a hub model cannot be loaded.
        FileNotFoundError: If a folder lacks a file.
        ValueError: If what is there is no model of texts.
    """
    def prepare(config: PretrainedConfig) -> None:
        set_dropout(config, dropout)

    model, tokenizer, lacks = _load(source, prepare, num_labels=num_labels)
    for name in head_modules(model):
        part = model.get_submodule(name)
        if not any(key.startswith(f"{name}.") for key in lacks):
            _initialize(model, part)
    return model, tokenizer


def finished_model(source: str) -> Loaded:
    """Load a model with a trained classification head.

    Args:
        source: Folder or hub id.

    Raises:
        ConnectionError: If a hub model cannot be loaded.
        FileNotFoundError: If a folder lacks a file.
        ValueError: If what is there is no finished classifier.
    """
    def prepare(config: PretrainedConfig) -> None:
        kinds = config.architectures or []
        if kinds and not any("SequenceClassification" in kind for kind in kinds):
            raise _NoClassifier(f"it is a {kinds[0]}")
        written, _ = PretrainedConfig.get_config_dict(source)
        if not {"id2label", "num_labels"} & written.keys():
            config.num_labels = 2  # the usual number is not written, and BART's own default is 3
        if config.num_labels < 2:
            raise _NoClassifier("it gives one number and no classes")

    model, tokenizer, lacks = _load(source, prepare)
    if lacks:
        raise ValueError(_no_classifier(source, f"it lacks {sorted(lacks)[0]}"))
    return model, tokenizer


class _NoClassifier(Exception):
    """Says what a model is instead of a finished classifier."""


def _no_classifier(source: str, why: str) -> str:
    return (f"{source} is no finished classifier ({why}), its head would be random: train one "
            "with `Classifier.new(K, source=...)`")


def _load(source: str, prepare, **options) -> tuple:
    """Return model, tokenizer and the names of the weights that the source lacks."""
    if Path(source).is_dir():
        _check_folder(Path(source))
    # A fresh head is what we may ask for, so the report about missing weights would only alarm.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # Code that comes with a model is never run, and nobody is asked whether it may be.
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        prepare(config)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source, config=config, use_safetensors=True, trust_remote_code=False,
            dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except _NoClassifier as error:
        raise ValueError(_no_classifier(source, str(error))) from None
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise _told(source, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"the tokenizer of {source} knows no words: save the right one there "
                         "with `tokenizer.save_pretrained`")
    return model, tokenizer, {*report["missing_keys"],
                              *(name for name, *_ in report["mismatched_keys"])}


def _check_folder(folder: Path) -> None:
    """Refuse a folder that lacks what every model has."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{folder} holds an adapter and no model: save the result of "
                             "`merge_and_unload()` with its tokenizer")
        inside = [part.parent.name for part in sorted(folder.glob("*/config.json"))]
        hint = f", perhaps {folder / inside[-1]}" if inside else ""
        raise FileNotFoundError(f"{folder} holds no config.json: give the folder that "
                                f"`save_pretrained` wrote{hint}")
    if not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} holds no .safetensors file: pickled checkpoints can "
                                "run code and are never loaded here, save it again with "
                                "`save_pretrained`")
    if not any(list(folder.glob(name)) for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{folder} holds no tokenizer: save it beside the model with "
                                "`tokenizer.save_pretrained`")


def _told(source: str, error: Exception) -> Exception:
    """Return what to raise in place of a library's error."""
    cause = " ".join(str(error).split())
    short = cause if len(cause) <= 80 else f"{cause[:77]}..."
    if isinstance(error, SafetensorError):
        return ValueError(f"the weights of {source} are damaged or cut short ({short}): copy "
                          "them again")
    if "Unrecognized configuration class" in cause:
        kind = cause.split("'")[1].split(".")[-1] if "'" in cause else "other model"
        return ValueError(f"{source} is a {kind.removesuffix('Config')}, which `transformers` "
                          "does not know as a classifier of texts")
    if "custom code" in cause:
        return ValueError(f"{source} needs code of its own, which is never run here: take a "
                          "model that `transformers` knows")
    if Path(source).is_dir():
        return ValueError(f"{source} does not open as a classifier of texts ({short}): write it "
                          "with `save_pretrained`, the tokenizer too")
    if "safetensors" in cause:
        return ValueError(f"{source} has no .safetensors weights on the hub: pickled ones can "
                          "run code and are never loaded here")
    remedy = ("give no encoder: that of BDUTILS_SCALE=small, which needs no hub, is then taken"
              if current_scale() == "small" else
              "stay at BDUTILS_SCALE=small, which needs no hub")
    return ConnectionError(f"the model {source} could not be loaded from the hub ({short}): check "
                           f"the network and the name, give a folder, or {remedy}")


def _initialize(model: PreTrainedModel, part: torch.nn.Module) -> None:
    """Draw the weights of a part anew, as its architecture does."""
    for weight in part.parameters():
        weight._is_hf_initialized = False
    part.apply(model._init_weights)
