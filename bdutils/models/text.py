"""Text classifiers: any sequence-classification model of `transformers`, plus its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from .. import scale as current_scale
from ..assets import AssetError, asset, entry
from ..distributed import pick_device


def encoder_source(scale: str | None = None) -> str:
    """Return what `from_pretrained` takes for the encoder of a scale.

    Args:
        scale: `small` (MiniLM, 22.7 M weights, from a package registry) or `full`
            (bert-base-uncased, from the hub); the scale in force if None. Or `causal` (SmolLM2,
            134.5 M weights, also from a registry), a decoder.

    Returns:
        A folder or a hub id.
    """
    chosen = scale or current_scale()
    if chosen == "causal":
        return str(entry("assets/smollm2-safetensors", _from_gguf))
    return str(asset("minilm")) if chosen == "small" else "bert-base-uncased"


@dataclass
class Classifier:
    """A model that maps a text to K logits, with everything needed to call it."""

    model: torch.nn.Module
    """Of `transformers`, with a classification head."""
    tokenizer: object
    """Its own."""
    max_length: int = 48
    """Tokens that are kept of a text."""

    @classmethod
    def new(cls, num_labels: int, *, source: str | None = None, max_length: int = 48,
            dropout: float = 0.1, seed: int = 0) -> Classifier:
        """Make a classifier: pretrained encoder, fresh head.

        Args:
            num_labels: K.
            source: Folder or hub id, the encoder of the scale if None.
            max_length: In tokens.
            dropout: For hidden states and attention.
            seed: Of the head.

        Raises:
            ConnectionError: If a hub model cannot be loaded.
        """
        source = source or encoder_source()
        options = {"num_labels": num_labels}
        if not Path(source).is_dir() or "bert" in (Path(source) / "config.json").read_text():
            options |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, tokenizer = _from_pretrained(source, **options)
        return cls(model.to(pick_device()), tokenizer, max_length)

    @classmethod
    def load(cls, folder: str | Path) -> Classifier:
        """Load a classifier that `save` wrote, or any model folder in safetensors.

        Raises:
            FileNotFoundError: If the folder holds no safetensors weights.
        """
        folder = Path(folder)
        if not list(folder.glob("*.safetensors")):
            raise FileNotFoundError(f"{folder} holds no .safetensors file: pickled checkpoints "
                                    "can run code and are never loaded here")
        model, tokenizer = _from_pretrained(str(folder))
        return cls(model.to(pick_device()), tokenizer, tokenizer.model_max_length)

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer so that plain `transformers` can open them."""
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.model_max_length = self.max_length
        self.tokenizer.save_pretrained(folder)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize once: one list of token ids per text, cut at `max_length`, not padded."""
        return self.tokenizer(list(texts), truncation=True,
                              max_length=self.max_length)["input_ids"]

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


def _from_pretrained(source: str, **options):
    # A fresh head is what we ask for, so the report about missing weights would only alarm.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            source, use_safetensors=True, **options)
        return model, AutoTokenizer.from_pretrained(source)
    except OSError as error:
        if Path(source).is_dir():
            raise
        raise ConnectionError(f"the model {source} could not be loaded from the hub: check the "
                              "network and the name, or stay at BDUTILS_SCALE=small, which "
                              "needs no hub") from error
