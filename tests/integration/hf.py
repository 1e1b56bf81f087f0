"""Hugging Face networks from tiny configurations, with random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 3
WORDS = 40
PAD = 0


def _text(**extra: Any) -> dict[str, Any]:
    return {
        "vocab_size": WORDS,
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": 32,
        "num_labels": CLASSES,
        "pad_token_id": PAD,
        **extra,
    }


def _image(**extra: Any) -> dict[str, Any]:
    return {
        "image_size": 16,
        "patch_size": 4,
        "num_channels": 3,
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "num_labels": CLASSES,
        **extra,
    }


# ---------------------------------------------------------------- text


class MeanPool(nn.Module):
    """Average of the states of the attended tokens, and a linear layer: a head that reads the mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None:
            return self.classifier(states.mean(1))
        weights = attention_mask.to(states.dtype).unsqueeze(-1)
        return self.classifier((states * weights).sum(1) / weights.sum(1))


class LastToken(nn.Module):
    """State of the last attended token, found with the mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None:
            return self.classifier(states[:, -1])
        places = torch.arange(states.shape[1]) * attention_mask.long()
        return self.classifier(states[torch.arange(len(states)), places.argmax(1)])


class WithHead(nn.Module):
    """A bare encoder and a head of one's own, as people write them."""

    def __init__(self, encoder: nn.Module, head: type[nn.Module], **arguments: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head(encoder.config.hidden_size)
        self.arguments = arguments

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.encoder(input_ids, attention_mask=attention_mask, **self.arguments).last_hidden_state
        return self.head(states, attention_mask)


def bert(**extra: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_text(**extra)))


def bert_mean() -> nn.Module:
    from transformers import BertConfig, BertModel

    return WithHead(BertModel(BertConfig(**_text()), add_pooling_layer=False), MeanPool)


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(**_text()))


def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    return AlbertForSequenceClassification(AlbertConfig(**_text(embedding_size=8)))


def _distilbert_config() -> Any:
    from transformers import DistilBertConfig

    return DistilBertConfig(
        vocab_size=WORDS,
        dim=12,
        n_layers=3,
        n_heads=2,
        hidden_dim=20,
        max_position_embeddings=32,
        num_labels=CLASSES,
        pad_token_id=PAD,
    )


def distilbert() -> nn.Module:
    from transformers import DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(_distilbert_config())


def _gpt2_config() -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=WORDS,
        n_embd=12,
        n_layer=3,
        n_head=2,
        n_positions=32,
        num_labels=CLASSES,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=1,
    )


def gpt2_classifier() -> nn.Module:
    from transformers import GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(_gpt2_config())


def gpt2_last() -> nn.Module:
    from transformers import GPT2Model

    return WithHead(GPT2Model(_gpt2_config()), LastToken, use_cache=False)


def gpt2_mean() -> nn.Module:
    from transformers import GPT2Model

    return WithHead(GPT2Model(_gpt2_config()), MeanPool, use_cache=False)


def bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForSequenceClassification

    config = BloomConfig(
        vocab_size=WORDS, hidden_size=12, n_layer=3, n_head=2, num_labels=CLASSES, pad_token_id=PAD, use_cache=False
    )
    return BloomForSequenceClassification(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(LlamaConfig(**_text(num_key_value_heads=2, use_cache=False)))


def t5_encoder() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=WORDS, d_model=12, num_layers=3, num_heads=2, d_kv=6, d_ff=20, pad_token_id=PAD)
    return WithHead(T5EncoderModel(config), MeanPool)


TEXT = {
    "bert": bert,
    "bert, eager attention": lambda: bert(attn_implementation="eager"),
    "bert, mean of tokens": bert_mean,
    "roberta": roberta,
    "distilbert": distilbert,
    "albert": albert,
    "gpt2, last token": gpt2_last,
    "gpt2, mean of tokens": gpt2_mean,
    "t5 encoder": t5_encoder,
}


def padded_tokens(n: int, length: int, side: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, one length per row; none is full, one is a single token shorter than another."""
    generator = torch.Generator().manual_seed(1)
    lengths = [length - 1 - i for i in range(n)]
    ids = torch.randint(2, WORDS, (n, length), generator=generator)
    place = torch.arange(length)
    limits = torch.tensor(lengths).unsqueeze(1)
    mask = place < limits if side == "right" else place >= length - limits
    return torch.where(mask, ids, PAD), mask.long()


# ---------------------------------------------------------------- images


def vit(**extra: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_image(**extra)))


def deit() -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(DeiTConfig(**_image()))


def beit() -> nn.Module:
    from transformers import BeitConfig, BeitForImageClassification

    return BeitForImageClassification(BeitConfig(**_image(out_indices=None, use_relative_position_bias=True)))


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 12], depths=[2, 2], num_labels=CLASSES, image_size=32, num_stages=2)
    return ConvNextForImageClassification(config)


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, num_labels=CLASSES
    )
    return SwinForImageClassification(config)


IMAGES = {
    "vit": (vit, 16),
    "deit": (deit, 16),
    "beit": (beit, 16),
    "convnext": (convnext, 32),
    "swin": (swin, 32),
}

# ---------------------------------------------------------------- sound


def wav2vec2(**extra: Any) -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    settings = {
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "conv_dim": (8, 8),
        "conv_stride": (4, 2),
        "conv_kernel": (6, 3),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 12,
        "num_labels": CLASSES,
        "mask_time_prob": 0.0,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        **extra,
    }
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**settings))


def _whisper_config() -> Any:
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=WORDS,
        num_mel_bins=8,
        d_model=12,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=20,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=20,
        max_source_positions=10,
        max_target_positions=8,
        num_labels=CLASSES,
        classifier_proj_size=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )


def whisper() -> nn.Module:
    from transformers import WhisperForAudioClassification

    return WhisperForAudioClassification(_whisper_config())


class WhisperPooled(nn.Module):
    """The bare encoder under a head of one's own."""

    def __init__(self) -> None:
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        super().__init__()
        self.encoder = WhisperEncoder(_whisper_config())
        self.head = nn.Linear(12, CLASSES)

    def forward(self, input_features: Tensor) -> Tensor:
        return self.head(self.encoder(input_features).last_hidden_state.mean(1))


def ast() -> nn.Module:
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=20,
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=16,
        num_mel_bins=8,
        num_labels=CLASSES,
    )
    return ASTForAudioClassification(config)


SOUNDS = {
    "wav2vec2": (wav2vec2, (90,)),
    "whisper": (whisper, (8, 20)),
    "whisper encoder": (WhisperPooled, (8, 20)),
    "ast": (ast, (16, 8)),
}
