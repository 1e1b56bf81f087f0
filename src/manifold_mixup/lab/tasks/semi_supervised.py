"""Semi-supervised classification: few training examples with labels, many without.

As in Oliver et al. 2018 (arXiv 1804.09170) the labels of most training examples are taken away. ``train_examples`` of
the data keep them; the unlabelled pool is everything that the validation split leaves, the labelled ones included, as
in the code of Manifold Mixup's authors. Methods that look at labels alone are the supervised controls.
"""

from __future__ import annotations

from pydantic import Field

from manifold_mixup.lab.config import Component, TrainConfig
from manifold_mixup.lab.data import DataInfo, DataSplits, Places, Unlabelled, get_dataset, load_data
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.models import ModelEntry
from manifold_mixup.lab.tasks.base import ChoiceOptions, Task

__all__ = ["SemiSupervised", "SemiSupervisedOptions"]


class SemiSupervisedOptions(ChoiceOptions):
    """What a step is given, and how the best weights are chosen."""

    batch_size: int = Field(default=100, ge=1, description="unlabelled examples of a step")
    unlabelled_examples: int | None = Field(
        default=None, ge=1, description="size of the unlabelled pool, drawn balanced by class; unset: all there are"
    )


class SemiSupervised(Task[SemiSupervisedOptions]):
    """Few training examples have labels; all of them may be looked at."""

    name = "semi_supervised"
    title = "classification with few labels and an unlabelled pool"
    Options = SemiSupervisedOptions

    def problems(self, data: Component, info: DataInfo, model: ModelEntry, train: TrainConfig | None) -> list[str]:
        """Data whose labels are all needed, or that have no pool."""
        problems = super().problems(data, info, model, train)
        if "train_examples" not in get_dataset(data.name).options.model_fields:
            problems.append(f"data: {data.name!r} has no option train_examples, so no labels can be taken away")
        elif data.options.get("train_examples") is None:
            problems.append("data.options.train_examples: say how many training examples keep their labels")
        return problems

    def splits(self, data: Component, seed: int, places: Places | None) -> DataSplits:
        """The labelled split, and the pool that it was drawn from.

        Raises:
            UsageError: A class has no labelled example, or the pool is smaller than a batch of it.
        """
        labelled = load_data(data.name, data.options, seed, places)
        wanted = {key: value for key, value in data.options.items() if key != "train_examples"}  # all, unless said
        if self.options.unlabelled_examples is not None:
            wanted["train_examples"] = self.options.unlabelled_examples
        pool = load_data(data.name, wanted, seed, places).train.x
        lacking = sorted(set(range(len(labelled.info.classes))) - set(labelled.train.y.tolist()))
        if lacking:
            raise UsageError(
                f"no labelled example of class {labelled.info.classes[lacking[0]]!r} among the {len(labelled.train)}: "
                "raise data.options.train_examples"
            )
        if len(pool) < self.options.batch_size:
            raise UsageError(
                f"task.options.batch_size {self.options.batch_size} is more than the {len(pool)} unlabelled examples"
            )
        labelled.unlabelled = Unlabelled(pool, self.options.batch_size)
        return labelled
