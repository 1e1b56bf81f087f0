"""What the methods for images share."""

from __future__ import annotations

from torch import Tensor

from manifold_mixup.lab.errors import UsageError

__all__ = ["image_size"]


def image_size(method: str, x: Tensor) -> tuple[int, int]:
    """Height and width of a batch of images.

    Args:
        method: Name of the method that asks, for the error.
        x: The batch.

    Raises:
        UsageError: It holds no images.
    """
    if x.dim() != 4:
        raise UsageError(
            f"method {method!r} reads images, batches of shape (n, channels, height, width), not {tuple(x.shape)}; "
            "leave it out for such data"
        )
    return x.shape[2], x.shape[3]
