"""Images of which a bright third says the class."""

import torch

from bdutils.roles import Images
from bdutils.training import ImageTrainConfig

NAMES = ("left", "middle", "right")
TRAINING = ImageTrainConfig(epochs=4, batch_size=32, lr=0.05, pad=1, flip=False)


def thirds(role, n, seed):
    """A bright third says the class."""
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 90, (n, 1, 12, 12), generator=rng, dtype=torch.uint8)
    labels = tuple(i % 3 for i in range(n))
    for i, label in enumerate(labels):
        pixels[i, :, 1:-3, 4 * label:4 * label + 4] += 110
    return role(Images(pixels), labels, NAMES)
