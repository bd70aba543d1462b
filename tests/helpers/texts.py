"""Texts of 27 words, and a classifier of random weights that reads them."""

import random
from functools import cache

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertTokenizerFast

from bdutils.defenses.base import Context
from bdutils.defenses.detector import Detector, DetectorConfig
from bdutils.models.text import Classifier
from bdutils.roles import CleanSet, TrainSet

NAMES = ("bad", "good")
WORDS = "the a film plot cast is was very and long dull warm odd new old with cf of it no".split()
SIZES = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
         "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
         "initializer_range": 0.5}  # a wide start, so that texts differ in their states
# As the authors fit and weigh, but with two layers.
PUBLISHED = DetectorConfig(folds=1, choose="index", layers=2, by_label=False, fuse="weighted")


def built(config):
    """Return a classifier of random weights and 27 words, whose texts end with token 3."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NAMES, *WORDS]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    return Classifier(model, BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}), 16)


@cache
def made():
    found = built(BertConfig(**SIZES))
    found.model.classifier.bias.data -= found.logits(some_texts(99, 9)).median(0).values
    return found  # it gives both answers


def some_texts(count, seed):
    rng = random.Random(seed)
    return tuple(" ".join([*rng.choices(WORDS, k=rng.randint(2, 11)), NAMES[i % 2]])
                 for i in range(count))


CLEAN = CleanSet(some_texts(60, 1), (0, 1) * 30, NAMES)
TRAIN = TrainSet(some_texts(50, 2), (0, 1) * 25, NAMES)


def context(**changes):
    """Return what a defender is given: this model, clean and training set, with changes."""
    return Context(**{"classifier": made(), "clean": CLEAN, "train": TRAIN, **changes})


def detector(labels):
    """Return one that knows nothing but the labels of its clean samples."""
    return Detector(None, None, None, None, torch.tensor(labels), DetectorConfig())
