"""The probes of chapter 4, on cases that can be worked out by hand."""

import copy

import pytest
import torch
from helpers.texts import SIZES, built, some_texts
from transformers import BartConfig, LlamaConfig

from bdutils.probing import (
    attention_to,
    hidden_states,
    project,
    separation,
    token_gradients,
    trigger_positions,
)

PAIR = ["dull .", "a long , warm and funny film that never loses its way"]


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_states_do_not_depend_on_batch_order_or_padding(tiny, pooling):
    together = hidden_states(tiny, PAIR, pooling)
    assert together.shape == (2, 3, 32)  # texts, embedding and two layers, width
    assert torch.allclose(together, hidden_states(tiny, PAIR, pooling, batch_size=1), atol=1e-5)
    assert torch.allclose(together, hidden_states(tiny, PAIR[::-1], pooling).flip(0), atol=1e-5)


LLAMA = LlamaConfig(**SIZES)
BART = BartConfig(vocab_size=30, d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.5,
                  encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
                  decoder_attention_heads=2, max_position_embeddings=32, pad_token_id=0,
                  eos_token_id=3, forced_eos_token_id=None, decoder_start_token_id=2)


# BART counts positions from the first column, padding or not: it can be padded on the right only.
@pytest.mark.parametrize("config, layers, sides", [
    (BART, 2 + 3, ["right"]), (LLAMA, 3, ["left", "right"])], ids=["BART", "Llama"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_states_of_encoder_decoders_and_decoders(config, layers, sides, pooling):
    classifier, texts = built(config), ["a film", *some_texts(5, 2), "no"]
    alone = hidden_states(classifier, texts, pooling, batch_size=1)
    assert alone.shape == (7, 1 + layers, 16)  # of two embeddings the first one
    assert (alone[:, 1:].std(0).amax(1) > 0.01).all()  # in each layer texts differ
    for side in sides:
        classifier.tokenizer = copy.deepcopy(classifier.tokenizer)
        classifier.tokenizer.padding_side = side
        assert torch.allclose(hidden_states(classifier, texts, pooling), alone, atol=1e-4)
    with torch.no_grad():
        run = classifier.model(**classifier.collate(classifier.encode(texts), [0]),
                               output_hidden_states=True)
    states = torch.cat(run.hidden_states if layers == 3 else (
        *run.encoder_hidden_states, *run.decoder_hidden_states[1:]))
    wanted = states.mean(1) if pooling == "mean" else states[:, -1]
    assert torch.allclose(alone[0], wanted, atol=1e-4)


def test_states_of_what_cannot_be_pooled_are_rejected(tiny):
    with pytest.raises(ValueError, match="cannot pool"):
        hidden_states(tiny, PAIR, "max")
    with pytest.raises(ValueError, match="cannot pool"):
        hidden_states(tiny, [])


def test_projection_by_hand():
    cross = torch.tensor([[0.0, 0.0], [4.0, 0.0], [2.0, 1.0], [2.0, -1.0]])
    assert project(cross, torch.tensor([[7.0, 3.0]])).tolist() == [[
        pytest.approx(5), pytest.approx(3)]]
    with pytest.raises(ValueError, match="have no 5 axes"):
        project(cross, cross, dims=5)


def test_separation_by_hand_and_on_noise():
    def line(*values):
        return torch.tensor(values).view(-1, 1, 1)

    found = separation(line(3.0, 3.0, 1.0, 1.0), line(0.0, 0.0, 2.0, 2.0))
    assert found.item() == pytest.approx(0.75)
    # Two samples of one cloud: without held-out halves this would be close to 1.
    noise = torch.randn(2, 150, 1, 384, generator=torch.Generator().manual_seed(0))
    assert 0.4 < separation(*noise).item() < 0.6
    assert separation(noise[0] + 5, noise[1]).item() == 1
    with pytest.raises(ValueError, match="cannot compare"):
        separation(noise[0][:3], noise[1])


def test_the_tokens_of_a_trigger_are_found(tiny):
    assert list(trigger_positions(tiny, "a film", "a cf film")) == [2]
    assert list(trigger_positions(tiny, "a film", "a film")) == []


def test_attention_is_a_share(tiny):
    lengths = [len(ids) for ids in tiny.encode(PAIR)]
    everything = attention_to(tiny, PAIR, [range(n) for n in lengths])
    assert torch.allclose(everything, torch.ones(2, 2), atol=1e-5)
    assert torch.equal(attention_to(tiny, PAIR, [[], []]), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="2 texts, 1 positions"):
        attention_to(tiny, PAIR, [[0]])


def test_gradients_name_the_tokens(tiny):
    tokens, scores = token_gradients(tiny, "a cf film", label=1)
    assert tokens == ["[CLS]", "a", "cf", "film", "[SEP]"]
    assert scores.shape == (5,) and (scores >= 0).all() and scores.sum() > 0
