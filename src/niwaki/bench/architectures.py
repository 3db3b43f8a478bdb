"""Architectures to try things on: the project's own, torch's, and those of transformers and timm where these are installed.

Those of transformers are small configurations of the real classes, those of timm the real networks; all have random weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.dependency import Example
from niwaki.tasks import networks
from niwaki.tasks.text_networks import Encoder


@dataclass(frozen=True)
class Architecture:
    """A network, and what it can run on.

    Attributes:
        source: ``niwaki``, ``torch``, ``transformers`` or ``timm``.
        build: returns the network; its weights depend on torch's random state.
        inputs: returns arguments for a batch of two; they depend on torch's random state.
        dtype: that everything in it can compute with.
    """

    source: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Example]
    dtype: torch.dtype = torch.float64


def _images(size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size)


def _tokens(length: int = 12) -> Tensor:
    return torch.randint(2, VOCABULARY - 1, (2, length))


VOCABULARY = 99


# ---------------------------------------------------------------- torch's own modules


class _Recurrent(nn.Module):
    """Embedding, recurrent layers, and a classifier of the last state."""

    def __init__(self, kind: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.recurrent = kind(16, 24, num_layers=2, batch_first=True, **options)
        width = (options.get("proj_size") or 24) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.recurrent(self.embedding(tokens))[0][:, -1])
        return outputs


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class _UNet(nn.Module):
    """Two levels down and up again (Ronneberger et al. 2015), with concatenated skips and transposed convolutions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.ModuleList([_twice(3, width), _twice(width, 2 * width)])
        self.bottom = _twice(2 * width, 4 * width)
        self.up = nn.ModuleList([nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)])
        self.merge = nn.ModuleList([_twice(4 * width, 2 * width), _twice(2 * width, width)])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], dim=1))
        outputs: Tensor = self.head(x)
        return outputs


class _SuperResolution(nn.Module):
    """Convolutions, a pixel shuffle, and a long skip (Shi et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.PReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.grow = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        outputs: Tensor = self.grow(x + self.body(x))
        return outputs


class _Translator(nn.Module):
    """``nn.Transformer`` between embeddings and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.transformer(self.embedding(source), self.embedding(target)))
        return outputs


_PLAIN: Mapping[str, Architecture] = {
    "lenet-300-100": Architecture("niwaki", networks.Perceptron, lambda: torch.randn(2, 64)),
    "lenet-5": Architecture("niwaki", networks.LeNet5, lambda: _images(28, 1)),
    "convnet": Architecture("niwaki", networks.Convnet, lambda: _images(8, 1)),
    "vgg-small": Architecture("niwaki", partial(networks.VGG, width=32), lambda: _images(32)),
    "resnet-20": Architecture("niwaki", networks.ResNet, lambda: _images(32)),
    "decoder": Architecture("niwaki", partial(networks.Transformer, VOCABULARY, 16, width=48, layers=2, heads=4), _tokens),
    "encoder": Architecture("niwaki", partial(Encoder, VOCABULARY, 16), _tokens),
    "lstm": Architecture("torch", partial(_Recurrent, nn.LSTM), _tokens),
    "lstm, bidirectional": Architecture("torch", partial(_Recurrent, nn.LSTM, bidirectional=True), _tokens),
    "lstm, projected": Architecture("torch", partial(_Recurrent, nn.LSTM, proj_size=8), _tokens),
    "gru, bidirectional": Architecture("torch", partial(_Recurrent, nn.GRU, bidirectional=True), _tokens),
    "rnn": Architecture("torch", partial(_Recurrent, nn.RNN), _tokens),
    "nn.Transformer": Architecture("torch", _Translator, lambda: (_tokens(), _tokens(7))),
    "u-net": Architecture("torch", _UNet, lambda: _images(16)),
    "super-resolution": Architecture("torch", _SuperResolution, lambda: _images(12)),
}


# ---------------------------------------------------------------- transformers

_WIDTHS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_TEXT = {**_WIDTHS, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_CAUSAL = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_GPT = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1}
_T5 = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
_BART = {
    **{"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": VOCABULARY, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1, "forced_eos_token_id": None},
}
_PATCHES = {**_WIDTHS, "image_size": 32, "patch_size": 8}
_WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_PYRAMID = {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 8]}
_SPEECH = {
    **{**_WIDTHS, "conv_dim": [32] * 3, "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3], "vocab_size": 32},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
}

_TRANSFORMERS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "bert": ("BertForSequenceClassification", _TEXT, "text"),
    "roberta": ("RobertaForMaskedLM", _TEXT, "text"),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": VOCABULARY, "max_position_embeddings": 64},
        "text",
    ),
    "albert": ("AlbertForSequenceClassification", {**_TEXT, "embedding_size": 24}, "text"),
    "electra": ("ElectraForPreTraining", {**_TEXT, "embedding_size": 24}, "text"),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "text",
    ),
    "mpnet": ("MPNetForSequenceClassification", _TEXT, "text"),
    "mobilebert": (
        "MobileBertForSequenceClassification",
        {**_TEXT, "true_hidden_size": 24, "intra_bottleneck_size": 24, "embedding_size": 24, "num_feedforward_networks": 2},
        "text",
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        {**_TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1},
        "text",
    ),
    "xlnet": ("XLNetForSequenceClassification", {"d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 96, "vocab_size": 99}, "text"),
    "funnel": (
        "FunnelForSequenceClassification",
        {"d_model": 48, "n_head": 4, "d_head": 12, "d_inner": 96, "vocab_size": VOCABULARY, "block_sizes": [1, 1]},
        "text",
    ),
    "gpt-2": ("GPT2LMHeadModel", _GPT, "text"),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        {
            **{"hidden_size": 48, "num_layers": 2, "num_heads": 4, "intermediate_size": 96, "vocab_size": VOCABULARY},
            **{"max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]], "bos_token_id": 1, "eos_token_id": 1},
        },
        "text",
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", {**_TEXT, "bos_token_id": 1, "eos_token_id": 1}, "text"),
    "gpt-j": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 4}, "text"),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", _GPT, "text"),
    "opt": (
        "OPTForCausalLM",
        {
            **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96, "vocab_size": VOCABULARY},
            **{"max_position_embeddings": 64, "word_embed_proj_dim": 48},
        },
        "text",
    ),
    "bloom": ("BloomForCausalLM", {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}, "text"),
    "falcon": (
        "FalconForCausalLM",
        {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY, "multi_query": True},
        "text",
    ),
    "falcon, grouped": (
        "FalconForCausalLM",
        {
            **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY},
            **{"num_kv_heads": 2, "new_decoder_architecture": True},
        },
        "text",
    ),
    "mpt": ("MptForCausalLM", {"d_model": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY, "max_seq_len": 64}, "text"),
    "llama": ("LlamaForCausalLM", _CAUSAL, "text"),
    "mistral": ("MistralForCausalLM", _CAUSAL, "text"),
    "mixtral": ("MixtralForCausalLM", {**_CAUSAL, "num_local_experts": 4}, "text"),
    "qwen2": ("Qwen2ForCausalLM", _CAUSAL, "text"),
    "qwen3": ("Qwen3ForCausalLM", {**_CAUSAL, "head_dim": 16}, "text"),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {**_CAUSAL, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
        "text",
    ),
    "gemma2": ("Gemma2ForCausalLM", {**_CAUSAL, "head_dim": 16}, "text"),
    "phi": ("PhiForCausalLM", {**_CAUSAL, "num_key_value_heads": 4}, "text"),
    "phi3": ("Phi3ForCausalLM", _CAUSAL, "text"),
    "olmo2": ("Olmo2ForCausalLM", _CAUSAL, "text"),
    "cohere": ("CohereForCausalLM", _CAUSAL, "text"),
    "starcoder2": ("Starcoder2ForCausalLM", _CAUSAL, "text"),
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 8}, "text"),
    "rwkv": ("RwkvForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "context_length": 32}, "text"),
    "t5": ("T5ForConditionalGeneration", _T5, "translation"),
    "switch": ("SwitchTransformersForConditionalGeneration", {**_T5, "num_experts": 4}, "translation"),
    "bart": ("BartForConditionalGeneration", _BART, "translation"),
    "pegasus": ("PegasusForConditionalGeneration", _BART, "translation"),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_BART, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32},
        "spectrogram",
    ),
    "vit": ("ViTForImageClassification", _PATCHES, "32"),
    "deit": ("DeiTForImageClassification", _PATCHES, "32"),
    "beit": ("BeitForImageClassification", {**_PATCHES, "use_relative_position_bias": True}, "32"),
    "dinov2": ("Dinov2ForImageClassification", _PATCHES, "32"),
    "yolos": ("YolosForObjectDetection", {**_PATCHES, "image_size": [32, 32], "num_detection_tokens": 5}, "32"),
    "swin": ("SwinForImageClassification", _WINDOWS, "32"),
    "swinv2": ("Swinv2ForImageClassification", _WINDOWS, "32"),
    "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}, "64"),
    "convnextv2": ("ConvNextV2ForImageClassification", {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}, "64"),
    "segformer": ("SegformerForSemanticSegmentation", {**_PYRAMID, "decoder_hidden_size": 32}, "64"),
    "pvt": ("PvtForImageClassification", {**_PYRAMID, "image_size": 64}, "64"),
    "poolformer": ("PoolFormerForImageClassification", {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]}, "64"),
    "mobilevit": (
        "MobileViTForImageClassification",
        {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [16, 32, 64, 96, 128, 160, 320]},
        "64",
    ),
    "levit": (
        "LevitForImageClassification",
        {
            **{"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 4, 6], "depths": [1, 1, 1]},
            **{"key_dim": [8, 8, 8], "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2]},
        },
        "64",
    ),
    "mobilenet-v1": ("MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}, "64"),
    "mobilenet-v2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35}, "64"),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]}, "64"),
    "regnet": ("RegNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "groups_width": 8}, "64"),
    "efficientnet": (
        "EfficientNetForImageClassification",
        {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640, "image_size": 64},
        "64",
    ),
    "clip": ("CLIPModel", {"text_config": {**_TEXT, "eos_token_id": 98}, "vision_config": _PATCHES, "projection_dim": 32}, "pairs"),
    "siglip": ("SiglipModel", {"text_config": {**_TEXT, "eos_token_id": 98}, "vision_config": _PATCHES}, "pairs"),
    "wav2vec2": ("Wav2Vec2ForCTC", _SPEECH, "sound"),
    "hubert": ("HubertForCTC", _SPEECH, "sound"),
    "ast": ("ASTForAudioClassification", {**_WIDTHS, "max_length": 64, "num_mel_bins": 32}, "mel"),
}

_INPUTS: Mapping[str, Callable[[], dict[str, Tensor]]] = {
    "text": lambda: {"input_ids": _tokens()},
    "translation": lambda: {"input_ids": _tokens(), "decoder_input_ids": _tokens(7)},
    "spectrogram": lambda: {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": _tokens(7)},
    "pairs": lambda: {"input_ids": torch.cat([_tokens(), torch.full((2, 1), 98)], 1), "pixel_values": _images(32)},
    "sound": lambda: {"input_values": torch.randn(2, 1600)},
    "mel": lambda: {"input_values": torch.randn(2, 64, 32)},
    "32": lambda: {"pixel_values": _images(32)},
    "64": lambda: {"pixel_values": _images(64)},
}

_SINGLE = ("mixtral", "qwen3-moe", "switch")
"""Models with experts: torch multiplies groups of matrices in single precision at most, and one routes in single precision."""


def _of_transformers(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, _TRANSFORMERS[name][0])
        config = kind.config_class(**_TRANSFORMERS[name][1])
        config.use_cache = False
        model: nn.Module = kind(config)
        return model

    return build


# ---------------------------------------------------------------- timm

_TIMM: Mapping[str, int] = {
    **dict.fromkeys(("resnet18", "resnet50", "resnext50_32x4d", "seresnet50", "densenet121", "mobilenetv3_small_100"), 64),
    **dict.fromkeys(("efficientnet_b0", "convnext_atto", "regnety_002", "ghostnet_100", "dla34"), 64),
    **dict.fromkeys(("hrnet_w18_small", "repvgg_a0", "poolformer_s12", "dm_nfnet_f0", "vgg11_bn", "mobileone_s0"), 64),
    **dict.fromkeys(("fastvit_t8", "edgenext_xx_small", "mobilevit_xs", "davit_tiny", "res2net50_26w_4s", "vovnet39a"), 64),
    **dict.fromkeys(("cspdarknet53", "rexnet_100", "xception41", "hgnet_tiny", "focalnet_tiny_srf", "inception_next_tiny"), 64),
    **dict.fromkeys(("repvit_m0_9", "resnetv2_50", "gcresnet33ts", "pvt_v2_b0"), 64),
    "inception_v4": 96,
    **dict.fromkeys(
        ("vit_tiny_patch16_224", "mixer_s16_224", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224", "levit_128s", "nest_tiny"), 224
    ),
    **dict.fromkeys(("cait_xxs24_224", "eva02_tiny_patch14_224", "twins_svt_small", "visformer_tiny", "tiny_vit_5m_224"), 224),
}
"""Network -> size of its images."""


def _of_timm(name: str) -> nn.Module:
    import timm  # type: ignore[import-not-found,import-untyped,unused-ignore]

    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    model: nn.Module = timm.create_model(name, num_classes=10, **({"img_size": 224} if fixed and _TIMM[name] != 224 else {}))
    return model


def architectures() -> dict[str, Architecture]:
    """Return all architectures whose libraries are installed, by name; those of timm are called ``timm:...``."""
    found = dict(_PLAIN)
    if importlib.util.find_spec("transformers"):
        for name, (_, _, kind) in _TRANSFORMERS.items():
            dtype = torch.float32 if name in _SINGLE else torch.float64
            found[name] = Architecture("transformers", _of_transformers(name), _INPUTS[kind], dtype)
    if importlib.util.find_spec("timm"):
        for name, size in _TIMM.items():
            found[f"timm:{name}"] = Architecture("timm", partial(_of_timm, name), partial(_images, size))
    return found
