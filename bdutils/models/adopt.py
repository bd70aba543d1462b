"""The door for models of texts: whatever its architecture, one is made ready for the book here.

A sequence classifier of `transformers` says in its own words what dropout, padding, positions,
attention maps and head it has. This module reads them, so that no other has to know BERT's.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

# Query, key and value by architecture; deeper in a name the same words mean the same maps.
ATTENTION_MAPS = (
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA, ALBERT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("in_proj",),  # DeBERTa, first version
    ("q", "k", "v"),  # MPNet, T5
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q_proj", "k_proj", "v_proj"),  # BART, LLaMA
    ("c_attn",),  # GPT-2
    ("Wqkv",),  # ModernBERT
    ("query_key_value",),  # GPT-NeoX, Falcon
    ("qkv_proj",),  # Phi-3
)
LONGEST = 512  # tokens of a text where neither tokenizer nor model sets a bound; ours


def architecture(model: nn.Module) -> str:
    """Return the name by which messages call a model."""
    return type(model).__name__.removesuffix("ForSequenceClassification")


def set_dropout(config: PretrainedConfig, rate: float) -> None:
    """Set every dropout that a configuration has; one that is None follows another and stays."""
    for name, value in config.to_dict().items():
        is_rate = isinstance(value, int | float) and not isinstance(value, bool)
        if is_rate and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, rate)


def ready(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """Make a model and its tokenizer fit each other and the book.

    Args:
        model: Gets float32 weights and the tokenizer's padding token, in place.
        tokenizer: Gets a padding token if it has none, in place.
        max_length: Tokens that are wanted of a text.

    Returns:
        Tokens that can be had of a text.

    Raises:
        ValueError: If the two do not belong together.
    """
    if _half(model):
        model.float()
    _pad(model, tokenizer)
    _check_vocabulary(model, tokenizer)
    most = positions(model)
    if most is None or max_length <= most:
        return max_length
    warnings.warn(f"{architecture(model)} has {most} positions: texts are cut there, and not at "
                  f"the {max_length} tokens of max_length", stacklevel=4)
    return most


def positions(model: nn.Module) -> int | None:
    """Return how many tokens a model can read, None if it sets no bound."""
    tables = _position_tables(model)
    if tables:
        return min(tables)
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def longest(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens to keep of a text where nobody says how many."""
    named = tokenizer.model_max_length  # 1e30 means none
    return min(filter(None, (named if named < 10**9 else None, positions(model))),
               default=LONGEST)


def require_float32(model: nn.Module) -> None:
    """Reject a model that would be trained in half precision."""
    if found := _half(model):
        raise ValueError(f"the weights of {architecture(model)} are {found}, in which small steps "
                         "are lost: call `model.float()` before it is trained")


def layers_of(outputs: Any) -> tuple[Tensor, ...]:
    """Return the hidden states of a run, those of the encoder first, then the decoder's.

    Args:
        outputs: Of a model that was called with `output_hidden_states=True`.

    Returns:
        Tensors (b, T, d), or (b, C, H, W) for images; the first is the embedding.

    Raises:
        ValueError: If there are none.
    """
    states = getattr(outputs, "hidden_states", None)
    if states is None and getattr(outputs, "decoder_hidden_states", None):
        states = (*outputs.encoder_hidden_states, *outputs.decoder_hidden_states[1:])
    if not states:
        raise ValueError("the model gives no hidden states, which this method compares: its "
                         "forward must return them as `hidden_states`")
    return tuple(states)


@torch.inference_mode()
def first_token_is_blind(model: Any, ids: Sequence[int]) -> bool:
    """Tell whether the first token's states ignore what follows in a text, as in a decoder."""
    if len(ids) < 3:
        return False
    changed = [ids[0], next((i for i in ids if i != ids[1]), ids[1]), *ids[2:]]
    batch = torch.tensor([list(ids), changed], device=model.device)
    was_training = model.training
    outputs = model.eval()(input_ids=batch, attention_mask=torch.ones_like(batch),
                           output_hidden_states=True)
    model.train(was_training)
    one, other = layers_of(outputs)[-1][:, 0]
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def lora_targets(model: nn.Module, wanted: Sequence[str] | None,
                 default: Sequence[str] = ()) -> list[str]:
    """Return the maps that get an adapter.

    Args:
        model: Of `transformers`.
        wanted: Last parts of their names; None for the attention's query, key and value.
        default: Names that nobody chose: where the model lacks them they count as None.

    Raises:
        ValueError: If there are no such maps.
    """
    names = {name.split(".")[-1] for name, part in model.named_modules()
             if isinstance(part, nn.Linear | Conv1D)}
    lacks = [name for name in wanted or () if name not in names]
    if wanted and not lacks:
        return list(wanted)
    if wanted and lacks and tuple(wanted) != tuple(default):
        raise ValueError(f"the model has no maps named {lacks}: name its own with modules=(...), "
                         "or let them be found with modules=None")
    for maps in ATTENTION_MAPS:
        if names.issuperset(maps):
            return list(maps)
    head = {name.split(".")[-1] for part in head_modules(model)
            for name, _ in getattr(model, part).named_modules(prefix=part)}
    others = tuple(sorted(names - head)[:2])
    raise ValueError(f"{architecture(model)} has no linear maps of query, key and value that LoRA "
                     f"could adapt: name others, such as modules={others}")


def head_modules(model: nn.Module) -> list[str]:
    """Return the parts that stand behind the encoder and hold weights: the head."""
    base = getattr(model, "base_model_prefix", "")
    return [name for name, part in model.named_children()
            if name != base and any(True for _ in part.parameters())]


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """Return the names that a model gives its classes, None if they say nothing."""
    by_number = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = tuple(str(by_number[i]) for i in sorted(by_number))
    bare = all(re.fullmatch(r"(label[ _-]?)?\d+", name.lower()) for name in names)
    return None if bare else names


def check_classes(model: object, names: Sequence[str]) -> None:
    """Reject a model whose classes are not those of the data, as far as names tell.

    It may be a classifier, or one behind an input filter; of others nothing is known.
    """
    network: Any = getattr(getattr(model, "classifier", model), "model", None)
    count = getattr(getattr(network, "config", None), "num_labels", len(names))
    if count != len(names):
        raise ValueError(f"the model gives {count} classes and the data has {len(names)}: use the "
                         "data that it was trained on, or train one on these")
    own = class_names(network)
    if own is None:
        return
    mine, theirs = ([name.strip().casefold() for name in side] for side in (own, names))
    if mine != theirs and sorted(mine) == sorted(theirs):
        raise ValueError(f"the model's classes are {list(own)}, the data's {list(names)}: load it "
                         "with `Classifier.load(folder, label_names=...)`, which puts them in "
                         "the data's order")


def reorder(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Put the classes of a finished model in the order of the data, in place."""
    own = class_names(model)
    mine, theirs = ([name.strip().casefold() for name in side] for side in (own or (), names))
    if sorted(mine) != sorted(theirs):
        raise ValueError(f"the model names its classes {list(own or ())}, not {list(names)}: "
                         "leave label_names out if the order is right")
    order = [mine.index(name) for name in theirs]
    layer = [part for part in model.modules() if isinstance(part, nn.Linear)
             and part.out_features == len(names)][-1]
    for weight in layer.parameters():
        weight.data = weight.data[order]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}


def _half(model: nn.Module) -> str | None:
    """Name the type of weights that are shorter than float32, if there are any."""
    for weight in model.parameters():
        if weight.is_floating_point() and weight.element_size() < 4:
            return str(weight.dtype).removeprefix("torch.")
    return None


def _position_tables(model: nn.Module) -> list[int]:
    """Return how many tokens each learned or fixed table of positions holds."""
    found = []
    for name, part in model.named_modules():
        last = name.split(".")[-1]
        if isinstance(part, nn.Embedding) and ("position" in last or last == "wpe"):
            # RoBERTa and MPNet count from the padding token on, BART from a fixed offset.
            before = 0 if part.padding_idx is None else part.padding_idx + 1
            found.append(part.num_embeddings - max(before, getattr(part, "offset", 0)))
    return found


def _pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Agree on a padding token, and on the side where positions stay what they are."""
    if tokenizer.pad_token_id is None:
        spare = tokenizer.eos_token or tokenizer.sep_token or tokenizer.unk_token
        if spare is None:
            raise ValueError("the tokenizer has no token to pad with: set `tokenizer.pad_token` "
                             "to one that texts do not hold")
        tokenizer.pad_token = spare
    # Decoders look for the last token that is no padding, by the number in the configuration.
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model.config, "summary_type", None) == "last":
        tokenizer.padding_side = "left"  # XLNet's answer is read at the last place
    elif _position_tables(model):
        tokenizer.padding_side = "right"


def _check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Reject a tokenizer that is not this model's."""
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ValueError(f"the tokenizer knows {len(tokenizer)} tokens and {architecture(model)} "
                         f"only {known}: take the tokenizer that it was trained with")
    end = model.config.eos_token_id
    if getattr(model.config, "is_encoder_decoder", False) and end not in tokenizer(
            "a")["input_ids"]:
        raise ValueError(f"{architecture(model)} reads its answer at the token {end}, with which "
                         "the tokenizer ends no text: set config.eos_token_id to its own")


def last_layer(model: nn.Module, num_labels: int) -> nn.Linear:
    """Return the layer that gives the K logits."""
    found = [part for part in model.modules()
             if isinstance(part, nn.Linear) and part.out_features == num_labels]
    if not found:
        raise ValueError(f"the model has no linear layer of {num_labels} outputs that could give "
                         "the logits")
    return found[-1]


@torch.no_grad()
def layer_inputs(classifier: Any, layer: nn.Linear, inputs: Sequence) -> Tensor:
    """Return what comes into a layer, one vector for each text or image.

    A decoder's last layer answers at every token, and one of them counts.

    Args:
        classifier: Whose layer it is.
        layer: Of its network.
        inputs: n texts or images.

    Returns:
        (n, d) on the layer's device.
    """
    given: list[tuple[Tensor, Tensor]] = []
    found = torch.empty(len(inputs), layer.in_features, device=layer.weight.device)
    classifier.model.eval()
    hook = layer.register_forward_hook(
        lambda _, arguments, answers: given.append((arguments[0], answers)))
    try:
        for indices, batch in classifier.batches(classifier.encode(inputs), 256):
            logits = classifier.model(**batch).logits
            features, answers = given.pop()
            if features.dim() == 3:  # (b, T, d)
                at = (answers - logits[:, None]).abs().sum(2).argmin(1)
                features = features[torch.arange(len(at)), at]
            found[indices] = features
    finally:
        hook.remove()
    return found
