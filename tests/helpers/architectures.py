"""Tiny models with random weights, one of each architecture that the book is tried on."""

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bdutils.assets import asset

TEXTS = ("the film is good and warm", "a bad and long story", "nobody laughs at this one")
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2}
COMMON = {"pad_token_id": 0, "num_labels": 2, "max_position_embeddings": 40}
PAIRED = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
ENDS = {"bos_token_id": 101, "eos_token_id": 102}
DECODERS = ("gpt2", "llama")


def config_of(name, vocabulary):
    """Return the configuration of a tiny model of this architecture."""
    std, v = {"vocab_size": vocabulary, **COMMON}, {"vocab_size": vocabulary}
    seq = {"pad_token_id": 0, "num_labels": 2, **v}
    return {
        "bert": lambda: t.BertConfig(**std, **SIZES),
        "roberta": lambda: t.RobertaConfig(**std, **SIZES),
        "distilbert": lambda: t.DistilBertConfig(**std, dim=16, hidden_dim=32, n_layers=2,
                                                 n_heads=2),
        "deberta": lambda: t.DebertaV2Config(**std, **SIZES, relative_attention=True,
                                             pos_att_type=["p2c", "c2p"]),
        "electra": lambda: t.ElectraConfig(embedding_size=16, **std, **SIZES),
        "albert": lambda: t.AlbertConfig(embedding_size=16, **std, **SIZES),
        "mpnet": lambda: t.MPNetConfig(**{**std, "pad_token_id": 1}, **SIZES),
        "modernbert": lambda: t.ModernBertConfig(**std, **SIZES, cls_token_id=101,
                                                 sep_token_id=102, **ENDS),
        "bart": lambda: t.BartConfig(**std, **PAIRED, **ENDS, decoder_start_token_id=102),
        "t5": lambda: t.T5Config(**seq, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                                 eos_token_id=102, decoder_start_token_id=0),
        "xlnet": lambda: t.XLNetConfig(**seq, d_model=16, n_layer=2, n_head=2, d_inner=32),
        "gpt2": lambda: t.GPT2Config(**v, num_labels=2, n_embd=16, n_layer=2, n_head=2,
                                     n_positions=40, bos_token_id=0, eos_token_id=0),
        "llama": lambda: t.LlamaConfig(**v, num_labels=2, max_position_embeddings=40, **SIZES,
                                       num_key_value_heads=2, bos_token_id=0, eos_token_id=0),
    }[name]()


NAMES = ("bert", "roberta", "distilbert", "deberta", "electra", "albert", "mpnet", "modernbert",
         "bart", "t5", "xlnet", "gpt2", "llama")


def byte_tokenizer():
    """Return a tokenizer like GPT-2's, which has no token for padding."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder, raw.post_processor = decoders.ByteLevel(), processors.ByteLevel()
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return t.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|endoftext|>",
                                     eos_token="<|endoftext|>")


def word_tokenizer():
    """Return the tokenizer of the small encoder, with the names that other models use."""
    made = t.AutoTokenizer.from_pretrained(asset("minilm"))
    made.eos_token, made.bos_token = "[SEP]", "[CLS]"
    return made


def save_tiny(name, folder, headless=False, dtype=torch.float32, **changes):
    """Write a tiny model and its tokenizer.

    Args:
        name: Of `NAMES`.
        folder: To write to.
        headless: Save the encoder alone, as the hub has them.
        dtype: Of the weights.
        **changes: Fields of the configuration.
    """
    tokenizer = byte_tokenizer() if name in DECODERS else word_tokenizer()
    config = config_of(name, len(tokenizer))
    for field, value in changes.items():
        setattr(config, field, value)
    kind = t.AutoModel if headless else t.AutoModelForSequenceClassification
    torch.manual_seed(0)
    kind.from_config(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
