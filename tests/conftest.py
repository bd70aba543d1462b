"""Shared pieces of the tests: a tiny model and small data, made here to take seconds."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("book", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("book")
# Two threads do not help models as small as these; `tools.processors` tries them all the same.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.register_assert_rewrite("helpers")  # an assertion in there says what it compared


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("BDUTILS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A two-layer BERT with random weights and the vocabulary of the real encoder."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from bdutils.assets import asset

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=64, num_labels=2)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(asset("minilm")).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder):
    """A new tiny classifier."""
    from bdutils.models.text import Classifier

    return Classifier.new(2, source=str(tiny_folder), max_length=24)


@pytest.fixture
def toy_task():
    """Sixty easy sentences in the three roles."""
    from bdutils.roles import CleanSet, Task, TestSet, TrainSet

    names = ("negative", "positive")
    good, bad = ("good", "fine", "lovely"), ("bad", "poor", "awful")

    def samples(role, tag):
        texts, labels = [], []
        for i in range(20):
            word = (good if i % 2 else bad)[i % 3]
            texts.append(f"the {tag} film number {i} is {word} indeed")
            labels.append(i % 2)
        return role(tuple(texts), tuple(labels), names)

    return Task("toy", samples(TrainSet, "first"), samples(CleanSet, "second"),
                samples(TestSet, "third"), "made here")
