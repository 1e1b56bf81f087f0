"""Networks of Hugging Face transformers: a model class, built from its configuration with random weights."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_mixup.lab.errors import StorageError, UsageError
from manifold_mixup.lab.networks.base import Network, Request, refuse_weights, require, unknown
from manifold_mixup.lab.networks.inputs import ROWS, Input, random_tensor

__all__ = ["build"]

TOKENS = 32  # length of a text
FRAMES = 128  # of a spectrogram
SAMPLES = 16_000  # of a sound: one second


def build(request: Request) -> Network:
    """``CLASS(config_class(**options))``, with the inputs that its main input and its configuration ask for.

    Raises:
        LabError: transformers is missing, has no such class, or the configuration is wrong.
    """
    transformers = require("transformers", "text")
    with _silent(transformers):
        if request.name.startswith("Auto"):
            raise UsageError(f"hf:{request.name} reads off saved weights which model it is: name the model's own class")
        made = getattr(transformers, request.name, None) if request.name.isidentifier() else None
        if getattr(made, "config_class", None) is None or not hasattr(made, "main_input_name"):
            classes = [n for n in dir(transformers) if "For" in n or (n.endswith("Model") and "PreTrained" not in n)]
            raise unknown("transformers model class", request.name, classes, "dir(transformers)")
        assert made is not None
        config = _configure(made.config_class, request)
        inputs = _Examples(request, made, config).make()
        return Network(made(config), (), inputs)


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """No advice in the log: nothing here is going to be trained."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _configure(config_class: Any, request: Request) -> Any:
    """The saved configuration if there is one, changed by the options; unknown keys are refused."""
    refuse_weights(request, ("use_pretrained_backbone",))
    saved = _read(request) if request.config is not None else {}
    kind = saved.get("model_type", config_class.model_type)
    if kind != config_class.model_type:
        raise UsageError(f"{request.config} describes a network of type {kind!r}, not {config_class.model_type!r}")
    default = config_class()
    keys = {*default.to_dict(), *config_class.attribute_map, "num_labels"}
    for key in request.options:
        if key not in keys:
            raise unknown(f"option of {config_class.__name__}", key, keys, f"{config_class.__name__}().to_dict()")
    config = config_class.from_dict({**saved, **request.options})
    text = config.get_text_config()
    padding = getattr(text, "pad_token_id", None)
    if "pad_token_id" not in request.options and (padding is None or padding >= (getattr(text, "vocab_size", 0) or 0)):
        text.pad_token_id = 0  # it is None for decoders, and beyond the vocabulary where options made that smaller
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = text.pad_token_id
    return config


def _read(request: Request) -> dict[str, Any]:
    assert request.config is not None
    try:
        values = json.loads(request.config.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(request.config, error, "read") from error
    except ValueError as error:
        raise UsageError(f"--config {request.config} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {request.config} should hold a JSON object, such as a saved config.json")
    return values


class _Examples:
    """Two rows for a model class, by keyword.

    Args:
        request: Its inputs come first; one without a name is the main input (for text: its length).
        made: The model class.
        config: Its configuration.
    """

    def __init__(self, request: Request, made: Any, config: Any) -> None:
        self.main: str = made.main_input_name
        self.parameters: Mapping[str, Any] = inspect.signature(made.forward).parameters
        self.config = config
        self.text = config.get_text_config()
        self.vision = getattr(config, "vision_config", None) or config
        self.title = f"hf:{request.name}"
        self.generates = not request.name.endswith(("Classification", "QuestionAnswering"))
        self.given = self._by_name(request.inputs)

    def _by_name(self, inputs: Sequence[Input]) -> dict[str, Input]:
        found: dict[str, Input] = {}
        for given in inputs:
            name = given.name or self.main
            if name in found:
                raise UsageError(f"--input: {self.title} gets {name!r} twice; write NAME=SHAPE for the other inputs")
            if name not in self.parameters:
                raise unknown(f"input of {self.title}", name, self.parameters, f"{self.title[3:]}.forward")
            found[name] = given
        return found

    def make(self) -> dict[str, Tensor]:
        """The inputs, those that were given and those that the model cannot do without."""
        made = {name: self._named(given) for name, given in self.given.items()}
        if self.main in made:
            pass
        elif self.main == "input_ids":
            limit = getattr(self.text, "max_position_embeddings", None) or TOKENS
            made[self.main] = self._tokens(min(TOKENS, limit))
        elif (shape := self._shape(self.main)) is not None:
            made[self.main] = random_tensor(Input(shape))
        else:
            raise UsageError(
                f"{self.title} reads {self.main!r}: give the shape of one example as --input {self.main}=..."
            )
        if self.main == "input_ids":
            length = made[self.main].shape[1]
            if "attention_mask" in self.parameters:
                made.setdefault("attention_mask", torch.ones(ROWS, length, dtype=torch.long))
            if "pixel_values" in self.parameters and self.vision is not self.config:
                made.setdefault("pixel_values", random_tensor(Input(self._shape("pixel_values") or ())))
            if "decoder_input_ids" in self.parameters and self.generates:
                made.setdefault("decoder_input_ids", self._tokens(length))
        return made

    def _named(self, given: Input) -> Tensor:
        name = given.name or self.main
        if name in ("input_ids", "decoder_input_ids") and len(given.shape) == 1:
            return self._tokens(given.shape[0])
        if name.endswith("mask"):
            return torch.ones(ROWS, *given.shape, dtype=torch.long)
        return random_tensor(Input(given.shape, name, given.kind or ("int" if name.endswith("_ids") else None)))

    def _tokens(self, length: int) -> Tensor:
        """Ordinary tokens, and the one at the end that marks it."""
        special = {v for key, v in self.text.to_dict().items() if key.endswith("_token_id") and isinstance(v, int)}
        words = [i for i in range(min(self.text.vocab_size, 1000)) if i not in special] or [0]
        tokens = torch.tensor(words)[torch.randint(len(words), (ROWS, length))]
        end = getattr(self.text, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < self.text.vocab_size:
            tokens[:, -1] = end
        return tokens

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of one example of an input, as the configuration tells it."""

        def told(part: Any, *keys: str) -> Any:
            return next((v for key in keys if (v := getattr(part, key, None)) is not None), None)

        if name.startswith("pixel_values"):
            size = told(self.vision, "image_size", "crop_size") or 224
            sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
            frames = told(self.vision, "num_frames", "frames_per_clip")
            return (*((frames,) if frames else ()), told(self.vision, "num_channels", "in_chans") or 3, *sides)
        mels = told(self.config, "num_mel_bins")
        if name == "input_values":
            return (told(self.config, "max_length") or FRAMES, mels) if mels else (SAMPLES,)
        if name == "input_features":
            if mels and (positions := told(self.config, "max_source_positions")):
                return (mels, 2 * positions)  # as Whisper: a convolution of stride two comes first
            width = told(self.config, "feature_projection_input_dim", "input_feat_per_channel")
            return (FRAMES, width) if width else None
        return None
