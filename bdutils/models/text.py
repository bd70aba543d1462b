"""Text classifiers: any sequence-classification model of `transformers`, plus its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from .. import scale as current_scale
from ..assets import AssetError, asset, entry
from ..distributed import pick_device
from .adopt import longest, ready, reorder
from .loading import finished_model, fresh_model


def encoder_source(encoder: str | None = None) -> str:
    """Return what `from_pretrained` takes for an encoder.

    Args:
        encoder: `small` (MiniLM, 22.7 M weights, from a package registry) or `full`
            (bert-base-uncased, from the hub); the scale in force if None. Or `causal` (SmolLM2,
            134.5 M weights, also from a registry), a decoder. Or the reader's own: a folder or a
            hub id.

    Returns:
        A folder or a hub id.

    Raises:
        ValueError: If it is none of them.
    """
    chosen = str(encoder or current_scale())
    if chosen == "causal":
        return str(entry("assets/smollm2-safetensors", _from_gguf))
    if chosen == "small":
        return str(asset("minilm"))
    if chosen in ("full", "bert-base-uncased"):
        return "bert-base-uncased"
    if Path(chosen).expanduser().is_dir():
        return str(Path(chosen).expanduser())
    if is_hub_id(chosen):
        return chosen
    raise ValueError(f"unknown encoder {chosen!r}: use small, full, causal, a folder that exists "
                     "or a hub id such as ORG/NAME")


def is_hub_id(name: str) -> bool:
    """Tell whether a name has the form ORG/NAME of a model on the hub."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name))


@dataclass
class Classifier:
    """A model that maps a text to K logits, with everything needed to call it."""

    model: torch.nn.Module
    """Of `transformers`, with a classification head; it gets float32 weights."""
    tokenizer: object
    """Its own; it gets a padding token if it has none."""
    max_length: int = 48
    """Tokens that are kept of a text, no more than the model has positions."""
    source: str | None = None
    """Of the pretrained encoder, for methods that train a new model; None if nobody knows it."""

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
            model, tokenizer = fresh_model(source, num_labels, dropout)
        return cls(model.to(pick_device()), tokenizer, max_length, source)

    @classmethod
    def load(cls, folder: str | Path, label_names: Sequence[str] | None = None) -> Classifier:
        """Load a classifier that `save` wrote, or any finished model in safetensors.

        Args:
            folder: Of the model, or its hub id.
            label_names: The data's classes, where the model has them in another order.

        Raises:
            ConnectionError: If a hub model cannot be loaded.
            FileNotFoundError: If there is no such folder, or one without safetensors weights.
            ValueError: If it holds no finished classifier, or one of other classes.
        """
        source = str(Path(folder).expanduser())
        if not Path(source).is_dir() and not is_hub_id(str(folder)):
            raise FileNotFoundError(f"there is no folder {folder}: give the one that "
                                    "`Classifier.save` wrote")
        model, tokenizer = finished_model(source)
        if label_names is not None:
            reorder(model, label_names)
        return cls(model.to(pick_device()), tokenizer, longest(model, tokenizer))

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer so that plain `transformers` can open them."""
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.model_max_length = self.max_length
        self.tokenizer.save_pretrained(folder)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize once: one list of token ids per text, cut at `max_length`, not padded."""
        encoded = self.tokenizer(list(texts), truncation=True,
                                 max_length=self.max_length)["input_ids"]
        config = getattr(self.model, "config", None)  # a reader's own network may have none
        if not getattr(config, "is_encoder_decoder", False):
            return encoded
        end = config.eos_token_id  # the answer is read there: once in every text
        return [[token for token in ids[:-1] if token != end] + ids[-1:] for ids in encoded]

    def collate(self, encoded: Sequence[list[int]], rows: Sequence[int]) -> dict[str, Tensor]:
        """Pad some encoded texts to the longest of them.

        Args:
            encoded: From `encode`.
            rows: Which of them.

        Returns:
            `input_ids` and `attention_mask`, (len(rows), longest), on the model's device.
        """
        chosen = [encoded[i] for i in rows]
        return self.tokenizer.pad({"input_ids": chosen}, return_tensors="pt",
                                  verbose=False).to(self.model.device)

    def batches(self, encoded: Sequence[list[int]], size: int) -> Iterator[tuple]:
        """Yield (rows, padded batch) over texts sorted by length, so that padding is short."""
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        for start in range(0, len(order), size):
            rows = order[start:start + size]
            yield rows, self.collate(encoded, rows)

    @torch.inference_mode()
    def logits(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Return the logits of some texts, in their order.

        Args:
            texts: n strings.
            batch_size: Texts at a time, without effect on the result.

        Returns:
            Float tensor (n, K) on the CPU.

        Raises:
            ValueError: For no texts.
        """
        if not len(texts):
            raise ValueError("no texts to classify")
        was_training = self.model.training
        self.model.eval()
        encoded = self.encode(texts)
        out = torch.empty(len(texts), self.model.config.num_labels)
        for rows, batch in self.batches(encoded, batch_size):
            out[rows] = self.model(**batch).logits.float().cpu()
        self.model.train(was_training)
        return out

    def predict(self, texts: Sequence[str]) -> list[int]:
        """Return the class with the largest logit for each text."""
        return self.logits(texts).argmax(dim=1).tolist()


def _from_gguf(folder: Path) -> None:
    """Write the decoder as everything else here is kept; its weights stay rounded to 4 bits."""
    source = {"pretrained_model_name_or_path": str(asset("smollm2")), "gguf_file": "smollm2.gguf"}
    try:
        rounded = AutoModel.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except ImportError as error:
        raise AssetError("the packed weights of SmolLM2 need a reader: run `pip install gguf`"
                         ) from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = type(rounded.config)(**{
        name: value for name, value in rounded.config.to_dict().items()
        if name != "quantization_config"} | {"pad_token_id": tokenizer.pad_token_id})
    model = type(rounded)(config)  # what was unpacked refuses to be saved
    model.load_state_dict(rounded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
