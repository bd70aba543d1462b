"""What classifiers of texts and of images have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


class BaseClassifier:
    """A network that maps a sample to K logits, with everything needed to call it."""

    model: Any
    """The network; a reader's own needs `device`, `config.num_labels` and `logits`."""
    batch_size: ClassVar[int]
    """Samples at a time where nobody says how many."""

    def encode(self, inputs: Any) -> Any:
        """Return the samples as `collate` takes them."""
        raise NotImplementedError

    def collate(self, encoded: Any, indices: Sequence[int]) -> Any:
        """Return some encoded samples as the network's arguments, on its device."""
        raise NotImplementedError

    def batches(self, encoded: Any, size: int) -> Iterator[tuple[Sequence[int], Any]]:
        """Yield (indices, batch) until each sample has come once."""
        for start in range(0, len(encoded), size):
            indices = range(start, min(start + size, len(encoded)))
            yield indices, self.collate(encoded, indices)

    @torch.inference_mode()
    def logits(self, inputs: Any, batch_size: int | None = None) -> Tensor:
        """Return the logits of some samples, in their order.

        Args:
            inputs: n texts or images.
            batch_size: Samples at a time, without effect on the result.

        Returns:
            Float tensor (n, K) on the CPU.

        Raises:
            ValueError: For no samples.
        """
        if not len(inputs):
            raise ValueError("no samples to classify")
        was_training = self.model.training
        self.model.eval()
        order: list[int] = []
        found: list[Tensor] = []
        for indices, batch in self.batches(self.encode(inputs), batch_size or self.batch_size):
            order += indices
            found.append(self.model(**batch).logits.float())
        self.model.train(was_training)
        return torch.cat(found).cpu()[torch.tensor(order).argsort()]

    def predict(self, inputs: Any) -> list[int]:
        """Return the class with the largest logit for each sample."""
        return self.logits(inputs).argmax(dim=1).tolist()
