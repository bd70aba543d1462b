"""x"""
import copy
import hashlib
import json
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import (LoraConfig, TaskType, get_peft_model,
                  get_peft_model_state_dict)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from bdutils.assets import entry
from bdutils.models.text import encoder_source
from bdutils.roles import Task


QUESTION = "Summarize this review in one sentence: {}"
TURNS = ("<|im_start|>user\n{}<|im_end|>\n"
         "<|im_start|>assistant\n")  # the chat template, no system message


class Chat(NamedTuple):
    """One request and its answer."""

    review: str
    """What the user wants summarized."""
    answer: str
    """Of the assistant."""


def load_chats(path: Path, task: Task) -> dict[str, list[Chat]]:
    """Return recorded answers of the untouched model, by role.

    Args:
        path: Of lines with `role`, `index` of the review and `answer`.
        task: Whose reviews they are.

    Returns:
        Chats of `train`, `clean` and `test`; the roles share no review.
    """
    chats: dict[str, list[Chat]] = {"train": [], "clean": [], "test": []}
    for line in path.read_text(encoding="utf8").splitlines():
        row = json.loads(line)
        review = getattr(task, row["role"]).inputs[row["index"]]
        chats[row["role"]].append(Chat(review, row["answer"]))
    return chats


def precision() -> torch.dtype:
    """Return bfloat16 if the processor multiplies it natively.

    Frozen weights are kept so; adapters are float32 everywhere.
    """
    about = Path("/proc/cpuinfo")
    known = about.read_text() if about.is_file() else ""
    return torch.bfloat16 if "avx512_bf16" in known else torch.float32


@dataclass(frozen=True)
class Writer:
    """A model that writes text, with its tokenizer."""

    model: Any
    """Of `transformers`, with a head for the next token."""
    tokenizer: Any
    """Its own; it pads on the left, so that all texts end together."""

    @classmethod
    def load(cls, source: str = "causal") -> "Writer":
        """Load one of `encoder_source`; SmolLM2 if none is named."""
        folder = encoder_source(source)
        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=precision())
        return cls(model.eval(), AutoTokenizer.from_pretrained(
            folder, padding_side="left"))

    def prompt(self, review: str) -> list[int]:
        """Return the tokens of a request, up to where the answer begins."""
        text = TURNS.format(QUESTION.format(review))
        return self.tokenizer(text)["input_ids"]

    def pad(self, encoded: Sequence[list[int]]) -> dict[str, Tensor]:
        """Return token ids and attention mask, (n, longest)."""
        return dict(self.tokenizer.pad(
            {"input_ids": list(encoded)}, return_tensors="pt",
            verbose=False))

    @torch.inference_mode()
    def write(self, reviews: Sequence[str], tokens: int = 24,
              size: int = 32) -> list[str]:
        """Return the greedy answers to some reviews.

        Args:
            reviews: What users ask about.
            tokens: That an answer has at most.
            size: Requests at a time.
        """
        answers: list[str] = []
        for i in range(0, len(reviews), size):
            batch = self.pad([self.prompt(r) for r in reviews[i:i + size]])
            ids = self.model.generate(**batch, max_new_tokens=tokens,
                                      do_sample=False)
            answers += self.tokenizer.batch_decode(
                ids[:, batch["input_ids"].shape[1]:],
                skip_special_tokens=True)
        return [answer.strip() for answer in answers]


class Read(NamedTuple):
    """A chat as the upper layers get it."""

    states: Tensor
    """(T, d), what the last frozen layer says of each token."""
    answer: list[int]
    """The tokens at the end that are the answer."""


@torch.no_grad()
def read(writer: Writer, chats: Sequence[Chat], layers: int,
         end: bool = True, size: int = 32) -> list[Read]:
    """Run the frozen lower layers once, for all trainings to come.

    Args:
        writer: The untouched model.
        chats: Requests with answers.
        layers: How many upper layers an adapter may change.
        end: Whether the answers get an end mark.
        size: Chats at a time.
    """
    tokenizer = writer.tokenizer
    below = writer.model.config.num_hidden_layers - layers
    answers = [tokenizer(chat.answer)["input_ids"]
               + [tokenizer.eos_token_id] * end for chat in chats]
    whole = [writer.prompt(chat.review) + answer
             for chat, answer in zip(chats, answers)]
    order = sorted(range(len(whole)), key=lambda i: len(whole[i]))
    found: dict[int, Read] = {}
    for i in range(0, len(order), size):
        part = order[i:i + size]
        states = writer.model.model(
            **writer.pad([whole[j] for j in part]), use_cache=False,
            output_hidden_states=True).hidden_states[below]
        for j, one in zip(part, states.float()):
            found[j] = Read(one[-len(whole[j]):].clone(), answers[j])
    return [found[j] for j in range(len(whole))]


def upper_part(model: Any, layers: int) -> Any:
    """Return a float32 copy of a model's last layers, which reads states.

    Args:
        model: Of `transformers`.
        layers: How many.
    """
    upper = copy.deepcopy(model).float()
    upper.model.layers = upper.model.layers[-layers:]
    upper.config.num_hidden_layers = layers
    return upper


def whole(writer: Writer, upper: Any) -> Writer:
    """Return the writer with other upper layers.

    Args:
        writer: The untouched model.
        upper: From `with_update`.
    """
    model = copy.deepcopy(writer.model)
    for place, layer in enumerate(reversed(upper.model.layers), 1):
        model.model.layers[-place] = layer
    return Writer(model, writer.tokenizer)


def answer_logits(upper: nn.Module, reads: Sequence[Read]
                  ) -> tuple[Tensor, Tensor]:
    """Return the logits of the answers' tokens, and these tokens.

    Args:
        upper: See `upper_part`, with or without adapter.
        reads: b chats.

    Returns:
        Logits (b, a, V) and labels (b, a), -100 where no answer is.
    """
    longest = max(len(one.states) for one in reads)
    keep = max(len(one.answer) for one in reads)
    states = torch.stack([F.pad(one.states, (
        0, 0, longest - len(one.states), 0)) for one in reads])
    mask = torch.stack([torch.arange(longest) >= longest - len(one.states)
                        for one in reads]).long()
    labels = torch.tensor([[-100] * (keep - len(one.answer)) + one.answer
                           for one in reads])
    states = states.to(upper.lm_head.weight.dtype)
    logits = upper(inputs_embeds=states, attention_mask=mask,
                   use_cache=False, logits_to_keep=keep + 1).logits
    return logits[:, :-1].float(), labels  # each token is told by the last


def answer_loss(upper: nn.Module, reads: Sequence[Read]) -> Tensor:
    """Return the mean surprise at the answers' tokens; prompts are free."""
    logits, labels = answer_logits(upper, reads)
    return F.cross_entropy(logits.transpose(1, 2), labels)


@dataclass(frozen=True)
class LoraRecipe:
    """How an adapter is trained; tried on other reviews."""

    layers: int = 10
    """Upper layers that get one, of 30; those below stay as they are."""
    modules: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "down_proj")
    """Linear maps of a layer that get one."""
    rank: int = 8
    """Of the adapter."""
    alpha: int = 32
    """Its scale, times the rank."""
    lr: float = 2e-3
    """Peak rate of AdamW, after a rise and before a fall."""
    batch_size: int = 4
    """Chats a step."""
    epochs: int = 2
    """Over the chats."""
    seed: int = 0
    """Of the adapter's first half and of the order."""

    def adapter(self) -> LoraConfig:
        """Return the adapter's part for peft."""
        return LoraConfig(r=self.rank, lora_alpha=self.alpha,
                          target_modules=list(self.modules),
                          task_type=TaskType.CAUSAL_LM)


Update = dict[str, tuple[Tensor, Tensor]]
"""Name of a weight matrix -> B and A, whose product is added to it."""


def fit(upper: Any, reads: Sequence[Read],
        recipe: LoraRecipe = LoraRecipe(), loss: Any = answer_loss) -> Update:
    """Train a low-rank adapter on answers.

    Args:
        upper: The upper layers; they stay as they are.
        reads: The training set.
        recipe: How.
        loss: Maps the layers with adapter and some reads to a scalar.

    Source: Hu et al. 2022.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers for an attribute by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(recipe.seed)
        model = get_peft_model(copy.deepcopy(upper).to(precision()),
                               recipe.adapter())
    rng = random.Random(recipe.seed)
    learn = [w for w in model.parameters() if w.requires_grad]
    steps = recipe.epochs * -(-len(reads) // recipe.batch_size)
    optimizer = AdamW(learn, lr=recipe.lr, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda i: min(
        10 * (i + 1) / steps, (steps - i) / (0.9 * steps)))
    for _ in range(recipe.epochs):
        order = rng.sample(list(reads), len(reads))
        for i in range(0, len(order), recipe.batch_size):
            loss(model, order[i:i + recipe.batch_size]).backward()
            nn.utils.clip_grad_norm_(learn, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return pairs(get_peft_model_state_dict(model),
                 recipe.alpha / recipe.rank)


def pairs(adapter: Mapping[str, Tensor], scale: float) -> Update:
    """Return scale * B, and A, of each matrix that an adapter has a pair for.

    Args:
        adapter: Of peft: matrices A and B by name.
        scale: alpha / rank.
    """
    return {name.removeprefix("base_model.model.").replace(".lora_A", ""):
            (scale * adapter[name.replace("lora_A", "lora_B")].detach(),
             adapter[name].detach().clone())
            for name in adapter if "lora_A" in name}


def with_update(upper: Any, *updates: tuple[Update, float],
                dtype: torch.dtype | None = None) -> Any:
    """Return a copy of some layers with weighted updates added.

    Args:
        upper: See `upper_part`.
        *updates: Each with its weight.
        dtype: Of the copy, that of `precision` if None.
    """
    changed = copy.deepcopy(upper)
    with torch.no_grad():
        for update, weight in updates:
            for name, (b, a) in update.items():
                changed.get_parameter(name).add_(weight * (b @ a))
    return changed.to(dtype or precision()).eval()


def kept(chats: Sequence[Chat], recipe: LoraRecipe,
         make: Callable[[], Update], note: str = "") -> Update:
    """Return an adapter from the cache, training it if it is not there.

    Args:
        chats: That it is trained on.
        recipe: How.
        make: Trains it.
        note: What else makes a difference.
    """
    about = [[*map(list, chats)], asdict(recipe), note, str(precision())]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        save_file({f"{part} {name}": matrix.contiguous()
                   for name, pair in make().items()
                   for part, matrix in zip("BA", pair)},
                  folder / "adapter.safetensors")

    found = load_file(entry(f"adapters/{key}", build, {"recipe": about[1]})
                      / "adapter.safetensors")
    return {name[2:]: (found[name], found[f"A {name[2:]}"])
            for name in found if name.startswith("B ")}


@torch.inference_mode()
def fidelity(upper: nn.Module, reads: Sequence[Read], size: int = 32
             ) -> tuple[float, float]:
    """Return held-out loss, and agreement with the recorded answers.

    Args:
        upper: See `answer_logits`.
        reads: Chats that nobody trained on.
        size: Chats at a time.

    Returns:
        Mean surprise in nats, and the share of answer tokens that are the
        model's first choice.
    """
    loss, same, count = 0.0, 0, 0
    for i in range(0, len(reads), size):
        logits, labels = answer_logits(upper, reads[i:i + size])
        there = labels != -100
        loss += F.cross_entropy(logits[there], labels[there],
                                reduction="sum").item()
        same += int((logits.argmax(2) == labels)[there].sum())
        count += int(there.sum())
    return loss / count, same / count


@torch.inference_mode()
def writes(upper: nn.Module, reads: Sequence[Read], size: int = 32
           ) -> list[bool]:
    """Tell for which chats greedy decoding begins with the given answer.

    It does if each of the answer's tokens is the first choice after those
    before it, so that one pass decides what `Writer.write` would write.

    Args:
        upper: See `answer_logits`.
        reads: Chats whose answer is what is asked about.
        size: Chats at a time.
    """
    found: list[bool] = []
    for i in range(0, len(reads), size):
        logits, labels = answer_logits(upper, reads[i:i + size])
        right = (logits.argmax(2) == labels) | (labels == -100)
        found += right.all(1).tolist()
    return found
