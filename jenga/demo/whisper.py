"""A Whisper of random weights: an encoder-decoder, whose cross-attention keeps keys and values of the audio.

Whisper's embedding is also its output matrix, so a loud embedding says the last token again for ever.  Here it is
quiet, and queries are sharp, so that what is said depends on the audio and on every token so far.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jenga.demo.tokenizer import BOS, END, PAD, vocabulary

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, WhisperConfig

CONTEXT = 448
RATE = 16_000
"""Samples per second."""
SECONDS = 2
"""Length of the audio that the encoder takes; shorter ones are padded."""
ENCODER_TOKENS = 50 * SECONDS


def config() -> WhisperConfig:
    """One encoder and four decoder layers; a decoder layer has self-attention and cross-attention."""
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=len(vocabulary()),
        num_mel_bins=80,
        d_model=128,
        encoder_layers=1,
        decoder_layers=4,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_source_positions=ENCODER_TOKENS,
        max_target_positions=CONTEXT,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END,
        decoder_start_token_id=BOS,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def random_model(seed: int) -> PreTrainedModel:
    """A bfloat16 model; the same seed gives the same weights."""
    import torch
    from transformers import WhisperForConditionalGeneration

    model: PreTrainedModel = WhisperForConditionalGeneration(config())
    generator = torch.Generator().manual_seed(seed)
    loud = {"self_attn.out_proj": 4.0, "encoder_attn.out_proj": 2.0, "q_proj": 6.0, "fc2": 2.0}
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "encoder.embed_positions" in name or weight.ndim < 2:
                continue  # sinusoids; biases and norms
            if "embed" in name:
                weight.normal_(0.0, 0.3, generator=generator)
                continue
            weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)
            weight.mul_(next((scale for part, scale in loud.items() if part in name), 1.0))
    for name, bias in model.named_parameters():
        if bias.ndim < 2:
            torch.nn.init.constant_(bias, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
    model.to(torch.bfloat16).eval()  # type: ignore[arg-type]
    return model


def save_feature_extractor(folder: Path) -> None:
    """What turns audio into the encoder's input."""
    from transformers import WhisperFeatureExtractor

    WhisperFeatureExtractor(feature_size=80, chunk_length=SECONDS, sampling_rate=RATE).save_pretrained(folder)  # type: ignore[no-untyped-call]


def melody(seed: int) -> np.ndarray:
    """`SECONDS` of audio: sixteen tones drawn from `seed`."""
    import numpy as np

    rng = np.random.default_rng(seed)
    time = np.arange(RATE * SECONDS // 16) / RATE
    waves = [np.sin(2 * np.pi * tone * time) for tone in rng.uniform(100, 4000, 16)]
    return np.asarray(np.concatenate(waves), dtype=np.float32)
