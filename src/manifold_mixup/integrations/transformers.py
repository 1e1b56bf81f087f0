"""Manifold mixup in the Hugging Face Trainer: one callback; model, arguments and loss stay as they are.

::

    trainer = Trainer(model, args, train_dataset=..., callbacks=[ManifoldMixupCallback(alpha=2.0)])
    trainer.train()

A callback sees neither batches nor losses. While a training runs, this one therefore stands in front of the trainer's
``compute_loss``, where the batch of one forward (a micro-batch, on its device) meets the model: it draws for it and
puts a :class:`~manifold_mixup.MixedTarget` in place of the labels. Evaluation takes the same path and is let through as
it is, because the model is in eval mode. When the training ends, or raises, everything is as it was.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_mixup.errors import LayerNotReached, UnsupportedModel
from manifold_mixup.mixup import ManifoldMixup
from manifold_mixup.pairing import Pairing
from manifold_mixup.target import MixedTarget
from manifold_mixup.validation import Layers, validate

try:
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    if error.name not in ("safetensors", "transformers"):
        raise
    raise ImportError(
        "manifold_mixup.integrations.transformers needs transformers: pip install 'manifold-mixup[text]'"
    ) from error

__all__ = ["ManifoldMixupCallback"]


class ManifoldMixupCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Manifold mixup (Verma et al., ICML 2019, section 2) for ``transformers.Trainer`` and its subclasses.

    It is attached when ``train()`` begins and detached when ``train()`` ends or raises. Partners are found inside the
    batch of one forward; with gradient accumulation every micro-batch has a draw of its own. The state of the draws is
    written to every checkpoint (one file per process), so that ``train(resume_from_checkpoint=...)`` draws what the
    uninterrupted training would have drawn.

    Losses inside the model, label smoothing, ``compute_loss_func`` and a ``compute_loss`` of a subclass are all given
    the mixed labels; evaluation is given the ordinary ones.

    Args:
        alpha: λ ~ Beta(α, α); 0 means no mixing.
        layers: the eligible set S as in :class:`~manifold_mixup.ManifoldMixup`. Token ids cannot be mixed, so for text
            "auto" takes inner layers alone.
        per: "batch", or "example" for one draw per pair; that needs a loss that is not reduced inside the model, from
            ``compute_loss_func`` or a ``compute_loss`` of your own.
        pairing: "random", "halves" or a callable ``(labels, generator) -> partner indices``. "two-batches" is refused:
            the Trainer normalises losses by the items of the whole batch, of which half would come out.
        probability: share of the batches that are mixed.
        seed: of the draws; None takes ``TrainingArguments.seed``. Processes of a group draw differently.
        check: prove that S consists of cut points, as in :class:`~manifold_mixup.ManifoldMixup`.

    Attributes:
        mixup: the :class:`~manifold_mixup.ManifoldMixup` of the training that runs, or ran last: ``mixup.layers``
            is S, ``mixup.last`` the last draw. None before the first.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        layers: Layers = "auto",
        *,
        per: Literal["batch", "example"] = "batch",
        pairing: Pairing = "random",
        probability: float = 1.0,
        seed: int | None = None,
        check: bool = True,
    ) -> None:
        validate(alpha, layers, per, pairing, probability, seed, check)
        if pairing == "two-batches":
            raise ValueError(
                "pairing='two-batches' returns half of the rows, but the Trainer normalises the loss by all of them. "
                "Use pairing='random' or 'halves' with half the batch size."
            )
        self._options: dict[str, Any] = {
            "alpha": alpha,
            "layers": layers,
            "per": per,
            "pairing": pairing,
            "probability": probability,
            "seed": seed,
            "check": check,
        }
        self.mixup: ManifoldMixup | None = None
        self._undo = ExitStack()
        self._drew = False

    def __repr__(self) -> str:
        return f"ManifoldMixupCallback({', '.join(f'{key}={value!r}' for key, value in self._options.items())})"

    # ---------------------------------------------------------------- what the Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach: the model is placed and wrapped, no batch has been drawn.

        Raises:
            UnsupportedModel: one batch is spread over several devices, which would have to draw alike.
            AlreadyAttached: the model has a mixer of its own.
        """
        trainer, model = _calling_trainer(), kwargs["model"]
        _refuse_split_batches(trainer)
        self.detach()  # of an attempt with a larger batch (auto_find_batch_size)
        if args.torch_compile:
            torch.compiler.reset()  # what an earlier training compiled knows nothing of the new hooks
        seed = args.seed if self._options["seed"] is None else self._options["seed"]
        self.mixup = ManifoldMixup(model, **{**self._options, "seed": seed})
        self._undo.callback(self.mixup.remove)
        self._stand_before(trainer, model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse a training step that went past the mixing.

        Raises:
            LayerNotReached: ``training_step`` never called ``compute_loss``.
        """
        if not self._drew:
            raise LayerNotReached(
                "This Trainer's training_step did not call compute_loss, where batches get mixed, so the step was an "
                "unmixed one. Compute the loss in compute_loss, or use manifold_mixup.ManifoldMixup in training_step."
            )
        self._drew = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach."""
        self.detach()

    def detach(self) -> None:
        """Take the hooks off the model and step out of the trainer's way. Calling it again does nothing."""
        self._undo.close()
        self._drew = False

    # ---------------------------------------------------------------- how it is done

    def _stand_before(self, trainer: Trainer, model: nn.Module) -> None:
        """Shadow what a mixed batch passes through, and what ends a training early."""
        loss, smoother, criterion = trainer.compute_loss, trainer.label_smoother, trainer.compute_loss_func
        mixed_loss = functools.partial(self._compute_loss, loss, trainer.label_names, _taken_by(model))
        self._shadow(trainer, "compute_loss", mixed_loss)
        if smoother is not None:
            self._shadow(trainer, "label_smoother", functools.partial(_on_both_labels, smoother))
        if criterion is not None:
            self._shadow(trainer, "compute_loss_func", functools.partial(_on_both_labels, criterion))
        # Next to the states of the other random numbers: one file per process, in the folder that is being saved.
        save, load, args = trainer._save_rng_state, trainer._load_rng_state, trainer.args
        self._shadow(trainer, "_save_rng_state", functools.partial(self._save, save, args))
        self._shadow(trainer, "_load_rng_state", functools.partial(self._load, load, args))
        # No callback is told of an exception. Versions differ in the parts that train() consists of.
        for part in ("training_step", "_run_epoch", "_evaluate", "_finalize_training"):
            if hasattr(trainer, part):
                self._shadow(trainer, part, functools.partial(self._or_detach, getattr(trainer, part)))

    def _shadow(self, trainer: Trainer, name: str, stand_in: Callable[..., Any]) -> None:
        """Put ``stand_in`` before an attribute of this one trainer, until ``detach``."""
        own = vars(trainer)
        if name in own:
            self._undo.callback(setattr, trainer, name, own[name])
        else:
            self._undo.callback(delattr, trainer, name)
        setattr(trainer, name, stand_in)

    def _or_detach(self, part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return part(*args, **kwargs)
        except BaseException:  # an interrupted notebook, too, gets its model back as it was
            self.detach()
            raise

    def _compute_loss(
        self,
        compute_loss: Callable[..., Any],
        label_names: list[str],
        taken: Callable[[str], bool],
        model: nn.Module,
        inputs: Mapping[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """``compute_loss`` of the trainer; in training with mixed labels."""
        if not model.training:
            return compute_loss(model, inputs, *args, **kwargs)
        assert self.mixup is not None
        names = [name for name in label_names if inputs.get(name) is not None]
        if not names:
            raise ValueError(
                f"Labels are mixed with the features, but the training batch holds none of the labels {label_names} "
                f"(it holds {sorted(inputs)}). Name yours in TrainingArguments(label_names=[...])."
            )
        labels = inputs[names[0]] if len(names) == 1 else {name: inputs[name] for name in names}
        features = {key: value for key, value in inputs.items() if key not in label_names and taken(key)}
        _, target = self.mixup(features, labels)
        self._drew = True
        if target.mixed:
            inputs = copy.copy(inputs)
            for name in names:
                inputs[name] = target if len(names) == 1 else target[name]  # type: ignore[index]
        return compute_loss(model, inputs, *args, **kwargs)

    def _save(self, save: Callable[[str], None], args: TrainingArguments, folder: str) -> None:
        save(folder)
        assert self.mixup is not None
        state = self.mixup.state_dict()
        save_file({"generator": state["generator"]}, _file(args, folder), {"layers": json.dumps(state["layers"])})

    def _load(self, load: Callable[[str | None], None], args: TrainingArguments, folder: str | None) -> None:
        load(folder)
        assert self.mixup is not None
        if folder is None:
            return
        file = _file(args, folder)
        if not file.is_file():
            warnings.warn(
                f"{file} does not exist, so the draws of manifold mixup begin anew: the checkpoint is of a training "
                "without mixing, or of another number of processes.",
                stacklevel=2,
            )
            return
        with safe_open(file, "pt") as saved:
            state = {"generator": saved.get_tensor("generator"), "layers": json.loads(saved.metadata()["layers"])}
        if not (isinstance(self._options["layers"], str) or callable(self._options["layers"])):
            state["layers"] = None  # S is what the arguments say now
        self.mixup.load_state_dict(state)


def _file(args: TrainingArguments, folder: str) -> Path:
    rank = f"_{args.process_index}" if args.world_size > 1 else ""
    return Path(folder, f"manifold_mixup{rank}.safetensors")


def _calling_trainer() -> Trainer:
    """The Trainer that is calling. Callbacks are handed its parts, but not itself."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
    raise RuntimeError(
        "ManifoldMixupCallback works inside the train() of a transformers.Trainer. In a loop of your own, use "
        "manifold_mixup.ManifoldMixup."
    )


def _refuse_split_batches(trainer: Trainer) -> None:
    """One batch on several devices: each would draw other partners, layers and λ for its part of it."""
    if trainer.args.n_gpu > 1:
        raise UnsupportedModel(
            f"The Trainer would spread every batch over {trainer.args.n_gpu} devices with nn.DataParallel, after it "
            "was paired. Start one process per device (torchrun, accelerate launch), or show it one device "
            "(CUDA_VISIBLE_DEVICES=0)."
        )
    for kind, name in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        size = getattr(trainer, f"get_{kind}_size", lambda: 1)()
        if size > 1:
            raise UnsupportedModel(
                f"With {name} parallelism {size} processes share one batch, but every process draws its own layer, λ "
                "and partners. Use data parallelism (DDP, FSDP)."
            )


def _taken_by(model: nn.Module) -> Callable[[str], bool]:
    """Which columns the model takes, and not a ``compute_loss`` of the user before it calls the model."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return lambda column: True
    return parameters.__contains__


def _on_both_labels(criterion: Callable[..., Tensor], outputs: Any, labels: Any, *args: Any, **kwargs: Any) -> Any:
    """The loss of mixed labels, λ·ℓ(outputs, y) + (1 - λ)·ℓ(outputs, y'), for a criterion that takes plain ones.

    With one λ per example the criterion reduces what has to be weighted before, so it is given the target itself.
    """
    if isinstance(labels, MixedTarget) and not isinstance(labels.lam, Tensor):
        return labels.loss(lambda output, half: criterion(output, half, *args, **kwargs), outputs)
    return criterion(outputs, labels, *args, **kwargs)
