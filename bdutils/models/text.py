"""Text classifiers: any sequence-classification model of `transformers`, plus its tokenizer."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging

from .. import scale as current_scale
from ..assets import AssetError, asset, entry
from ..distributed import pick_device
from .adopt import head_modules, longest, ready, reorder, set_dropout
from .base import BaseClassifier

# Any of them tells that a tokenizer was saved beside the model.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab*", "*.model", "merges.txt")


def encoder_source(encoder: str | None = None) -> str:
    """Return what `from_pretrained` takes for an encoder.

    Args:
        encoder: `small` (MiniLM, 22.7 M weights, from a package registry) or `full`
            (bert-base-uncased, from the hub); the scale in force if None. Or, also from a
            registry, `mpnet` (MPNet, 109.5 M weights), which is as large as BERT and needs no
            hub, or `causal` (SmolLM2, 134.5 M weights), a decoder. Or the reader's own: a folder
            or a hub id.

    Returns:
        A folder or a hub id.

    Raises:
        ValueError: If it is none of them.
    """
    chosen = str(encoder or current_scale())
    if chosen == "causal":
        return str(entry("assets/smollm2-safetensors", _from_gguf))
    if chosen in ("small", "mpnet"):
        return str(asset({"small": "minilm"}.get(chosen, chosen)))
    if chosen in ("full", "bert-base-uncased"):
        return "bert-base-uncased"
    if Path(chosen).expanduser().is_dir():
        return str(Path(chosen).expanduser())
    if is_hub_id(chosen):
        return chosen
    raise ValueError(f"unknown encoder {chosen!r}: use small, full, mpnet, causal, a folder that "
                     "exists or a hub id such as ORG/NAME")


def is_hub_id(name: str) -> bool:
    """Tell whether a name has the form ORG/NAME of a model on the hub."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name))


@dataclass
class Classifier(BaseClassifier):
    """A model that maps a text to K logits, with everything needed to call it."""

    model: Any
    """Of `transformers`, with a classification head; it gets float32 weights."""
    tokenizer: Any
    """Its own; it gets a padding token if it has none."""
    max_length: int = 48
    """Tokens that are kept of a text, no more than the model has positions."""
    source: str | None = None
    """Of the pretrained encoder, for methods that train a new model; None if nobody knows it."""
    batch_size: ClassVar[int] = 64

    def __post_init__(self) -> None:
        """Make model and tokenizer fit, once, where they enter."""
        if isinstance(self.model, PreTrainedModel):
            self.max_length = ready(self.model, self.tokenizer, self.max_length)

    @classmethod
    def new(cls, num_labels: int, *, source: str | None = None, max_length: int = 48,
            dropout: float = 0.1, seed: int = 0) -> Classifier:
        """Make a classifier: pretrained encoder, fresh head.

        Args:
            num_labels: K.
            source: See `encoder_source`, the encoder of the scale if None.
            max_length: In tokens.
            dropout: For every dropout that the encoder's configuration has.
            seed: Of the head.

        Raises:
            ConnectionError: If a hub model cannot be loaded.
            FileNotFoundError: If a folder lacks a file.
            ValueError: For an unknown encoder, or one that is no model of texts.
        """
        source = encoder_source(source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, tokenizer = _new_model(source, num_labels, dropout)
        return cls(model.to(pick_device()), tokenizer, max_length, source)

    @classmethod
    def load(cls, folder: str | Path, label_names: Sequence[str] | None = None,
             base: str | Path | None = None) -> Classifier:
        """Load a classifier that `save` wrote, or any finished model in safetensors.

        Args:
            folder: Of the model, or its hub id; or of an adapter by PEFT, which is merged into its
                base model.
            label_names: The data's classes, where the model has them in another order.
            base: Of an adapter, if not the model that its configuration names; folder or hub id.

        Raises:
            ConnectionError: If a hub model cannot be loaded.
            FileNotFoundError: If there is no such folder, or one without safetensors weights.
            ValueError: If it holds no finished classifier, or one of other classes.
        """
        source = str(Path(folder).expanduser())
        if not Path(source).is_dir() and not is_hub_id(str(folder)):
            raise FileNotFoundError(f"there is no folder {folder}: give the one that "
                                    "`Classifier.save` wrote")
        model, tokenizer = _finished_model(source, base)
        if label_names is not None:
            reorder(model, label_names)
        return cls(model.to(pick_device()), tokenizer, longest(model, tokenizer))

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer so that plain `transformers` can open them."""
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.model_max_length = self.max_length
        self.tokenizer.save_pretrained(folder)

    def encode(self, inputs: Sequence) -> list[list[int]]:
        """Tokenize once: one list of token ids per text, cut at `max_length`, not padded."""
        encoded = self.tokenizer(list(inputs), truncation=True,
                                 max_length=self.max_length)["input_ids"]
        config: Any = getattr(self.model, "config", None)  # a reader's own network may have none
        if not getattr(config, "is_encoder_decoder", False):
            return encoded
        end = config.eos_token_id  # the answer is read there: once in every text
        return [[token for token in ids[:-1] if token != end] + ids[-1:] for ids in encoded]

    def collate(self, encoded: Any, indices: Sequence[int]) -> Any:
        """Pad some encoded texts to the longest of them.

        Args:
            encoded: From `encode`.
            indices: Which of them.

        Returns:
            `input_ids` and `attention_mask`, (len(indices), longest), on the model's device.
        """
        chosen = [encoded[i] for i in indices]
        return self.tokenizer.pad({"input_ids": chosen}, return_tensors="pt",
                                  verbose=False).to(self.model.device, non_blocking=True)

    def batches(self, encoded: Any, size: int
                ) -> Iterator[tuple[Sequence[int], Any]]:
        """Yield (indices, padded batch) over texts sorted by length, so that padding is short."""
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        for start in range(0, len(order), size):
            indices = order[start:start + size]
            yield indices, self.collate(encoded, indices)


def _new_model(source: str, num_labels: int, dropout: float) -> tuple[Any, Any]:
    """Load a pretrained encoder under a fresh head; a head that it has is not used."""
    def prepare(config: PretrainedConfig) -> None:
        set_dropout(config, dropout)

    model, tokenizer, lacks = _load(source, prepare, num_labels=num_labels)
    for name in head_modules(model):
        part = model.get_submodule(name)
        if not any(key.startswith(f"{name}.") for key in lacks):
            _initialize(model, part)
    return model, tokenizer


def _finished_model(source: str, base: str | Path | None = None) -> tuple[Any, Any]:
    """Load a model with a trained classification head."""
    if _is_adapter(Path(source)):
        return _merged(Path(source), base)
    if base is not None:
        raise ValueError(f"{source} is no adapter and needs no base model: leave it out")

    def prepare(config: PretrainedConfig) -> None:
        kinds = config.architectures or []
        if kinds and not any("SequenceClassification" in kind for kind in kinds):
            raise _NoClassifier(f"it is a {kinds[0]}")
        written, _ = PretrainedConfig.get_config_dict(source)
        if not {"id2label", "num_labels"} & written.keys():
            config.num_labels = 2  # the usual number is not written, and BART's own default is 3
        if (config.num_labels or 0) < 2:
            raise _NoClassifier("it gives one number and no classes")

    model, tokenizer, lacks = _load(source, prepare)
    if lacks:
        raise ValueError(_no_classifier(source, f"it lacks {sorted(lacks)[0]}"))
    return model, tokenizer


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _merged(folder: Path, other: str | Path | None = None) -> tuple[Any, Any]:
    """Load an adapter of a classifier, and merge it into its base model."""
    about = json.loads((folder / "adapter_config.json").read_text(encoding="utf8"))
    if about.get("task_type") != "SEQ_CLS":
        raise ValueError(f"{folder} is an adapter for {about.get('task_type')} and no classifier "
                         "of texts: give one whose task_type is SEQ_CLS")
    if not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} holds no adapter_model.safetensors: pickled adapters "
                                "can run code and are never loaded here, save it again with "
                                "`save_pretrained`")
    base = str(about.get("base_model_name_or_path"))
    if other is not None:
        base = str(Path(other).expanduser())
    elif (folder / base).is_dir():  # beside the adapter; an absolute path stays what it is
        base = str(folder / base)
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            # What is no map of low rank was trained as it is: the head, whose answers are fewest.
            shapes = {name.removeprefix("base_model.model."): file.get_slice(name).get_shape()
                      for name in file.keys() if ".lora_" not in name}
        heads = [shape[0] for shape in shapes.values() if len(shape) == 2]
        model, tokenizer, lacks = _load(base, lambda _: None,
                                        **({"num_labels": min(heads)} if heads else {}))
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is an adapter of {base}, and the two do not open together "
                         f"({error}): put that model there, or name its place as "
                         "`base`, with the command --base") from error
    if missing := sorted(lacks - set(shapes)):
        raise ValueError(_no_classifier(str(folder), f"it lacks {missing[0]}"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{folder} does not open as an adapter of {base} "
                         f"({' '.join(str(error).split())[:80]}): write it anew with "
                         "`save_pretrained`") from error
    if any(list(folder.glob(name)) for name in TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return model.requires_grad_(True), tokenizer


class _NoClassifier(Exception):
    """Says what a model is instead of a finished classifier."""


def _no_classifier(source: str, why: str) -> str:
    return (f"{source} is no finished classifier ({why}), its head would be random: train one "
            "with `Classifier.new(K, source=...)`")


def _load(source: str, prepare: Callable[[PretrainedConfig], None], **options: Any
          ) -> tuple[Any, Any, set[str]]:
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
    """Reject a folder that lacks what every model has."""
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
        weight._is_hf_initialized = False  # type: ignore[attr-defined]
    part.apply(model._init_weights)


def _from_gguf(folder: Path) -> None:
    """Write the decoder as everything else here is kept; its weights stay rounded to 4 bits."""
    source = {"pretrained_model_name_or_path": str(asset("smollm2")), "gguf_file": "smollm2.gguf"}
    logging.disable_progress_bar()
    bar = modeling_gguf_pytorch_utils.tqdm  # the reader's own, which would stand in a page
    modeling_gguf_pytorch_utils.tqdm = partial(bar, disable=True)
    try:
        rounded = AutoModel.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except ImportError as error:
        raise AssetError("the packed weights of SmolLM2 need a reader: run `pip install gguf`"
                         ) from error
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = type(rounded.config)(**{
        name: value for name, value in rounded.config.to_dict().items()
        if name != "quantization_config"} | {"pad_token_id": tokenizer.pad_token_id})
    model = type(rounded)(config)  # what was unpacked refuses to be saved
    model.load_state_dict(rounded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
