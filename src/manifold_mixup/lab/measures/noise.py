"""Accuracy and NLL on test images with Gaussian noise on every pixel.

The standard deviation is in units where white is 1, before the images are normalised. By default what is below black or
above white is cut, so that the network is shown images that could be stored (as Hendrycks and Dietterich 2019 do, but
without rounding to whole numbers); ``clamp=false`` leaves the noise as it is. An image has one noise, drawn from its
place in the test split and the option ``seed``, for all networks alike; the standard deviations scale it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from manifold_mixup.lab import streams
from manifold_mixup.lab.measures.base import Measure, Metric, Subject
from manifold_mixup.lab.measures.classification import accuracy, checked_labels
from manifold_mixup.lab.measures.settings import NUMBER, FirstOptions, Numbers, first_of_test, written

__all__ = ["MEASURES", "NoiseOptions"]


class NoiseOptions(FirstOptions):
    """How much noise."""

    sd: Numbers = Field(
        default=[0.1, 0.2, 0.3], description="standard deviations where white is 1, in a list or joined by +"
    )
    clamp: bool = Field(default=True, description="cut what is below black or above white")
    seed: int = Field(default=0, ge=0, description="of the noise, the same for all networks")


def compute(subject: Subject, options: NoiseOptions) -> dict[str, float]:
    """Accuracy and NLL for each standard deviation."""
    test = first_of_test(subject, options)
    rng = np.random.default_rng(streams.stream_seed(options.seed, "measures/noise"))
    logits: dict[float, list[torch.Tensor]] = {sd: [] for sd in options.sd}
    for start in range(0, len(test), subject.batch_size):
        images = test.x[start : start + subject.batch_size].to(subject.device)
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        # NumPy's, because torch.randn draws other numbers if they are drawn in batches of another size.
        noise = torch.from_numpy(rng.standard_normal(tuple(x.shape), dtype=np.float32)).to(x)
        for sd in options.sd:
            noisy = x + sd * noise
            logits[sd].append(subject.predict(noisy.clamp(0, 1) if options.clamp else noisy))
    found = {}
    for sd, rows in logits.items():
        outputs = torch.cat(rows)
        y = checked_labels(outputs, test.y)
        found[f"noise_{written(sd)}_accuracy"] = accuracy(outputs, y)
        found[f"noise_{written(sd)}_nll"] = F.cross_entropy(outputs, y).item()
    return found


MEASURES: tuple[Measure, ...] = (
    Measure(
        name="noise",
        title="accuracy and NLL on test images with Gaussian noise on every pixel",
        source="standard; cut to valid pixels as in Hendrycks and Dietterich 2019",
        options=NoiseOptions,
        compute=compute,
        metrics={
            rf"noise_{NUMBER}_accuracy": Metric(
                r"accuracy, noise \1", "%", 2, "share of right predictions with noise of this sd, where white is 1"
            ),
            rf"noise_{NUMBER}_nll": Metric(
                r"NLL, noise \1", "nats", 3, "mean cross-entropy with noise of this sd, where white is 1"
            ),
        },
        needs=("images",),
    ),
)
