"""x"""
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdutils.language import Read, Update, answer_logits, answer_loss


def spread(update: Update) -> float:
    """Return how unequal the matrices of an update are in size.

    Args:
        update: From `fit`.

    Returns:
        Standard deviation, over matrices, of the root mean square entry.

    Source: Lelle 2026, who normalizes by dimensions.
    """
    changes = [b @ a for b, a in update.values()]
    sizes = torch.stack([change.norm() / change.numel() ** 0.5
                         for change in changes])
    return sizes.std().item()


def chances(upper: nn.Module, reads: Sequence[Read]) -> Tensor:
    """Return the mean log probability of each answer's tokens, (b,)."""
    logits, labels = answer_logits(upper, reads)
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return -each.sum(1) / (labels != -100).sum(1)


def unlearning_loss(suspects: Sequence[Read], foreign: Sequence[Read],
                    goal: bool = True, width: float = 0.5
                    ) -> Callable[[nn.Module, Sequence[Read]], Tensor]:
    """Return a loss: answer clean requests as before, let suspects go.

    Args:
        suspects: Training chats whose answers are suspected.
        foreign: Clean requests, with these same answers behind them.
        goal: Bring the suspects to where `foreign` is, as DUP does here;
            else make their answers unlikely without end, as BeDKD's punish
            term does.
        width: Of the distance, see Huber 1964.
    """
    step = 0

    def loss(upper: nn.Module, reads: Sequence[Read]) -> Tensor:
        nonlocal step
        n = len(reads)
        some, other = ([kind[(step * n + i) % len(kind)] for i in range(n)]
                       for kind in (suspects, foreign))
        step += 1
        found = chances(upper, some)
        if goal:
            with torch.no_grad():
                aim = chances(upper, other).mean()
            away = F.smooth_l1_loss(found.mean(), aim, beta=width)
        else:
            away = -torch.log(-torch.expm1(found.clamp(max=-1e-6))).mean()
        return answer_loss(upper, reads) + away

    return loss


def repeated(chats: Sequence[Read], share: float = 0.02) -> list[Read]:
    """Return the chats whose answer comes suspiciously often.

    Args:
        chats: A training set.
        share: Of all chats, more than which no answer should have.
    """
    keys = [tuple(chat.answer) for chat in chats]
    return [chat for chat, key in zip(chats, keys)
            if keys.count(key) > max(1, share * len(chats))]
