"""Sounds: the features that upstream's extractors compute, resampling, and bad files refused."""

from __future__ import annotations

import base64
import json
import struct
import sys
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.audio_utils import load_audio
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import (
    Gemma4UnifiedAudioFeatureExtractor,
)

from cabochon.config import AudioConfig, FrameConfig
from cabochon.errors import ConfigError, RequestError
from cabochon.gemma4.sounds import (
    FrameProcessor,
    MelProcessor,
    Sound,
    SoundProcessor,
    Wave,
    decode_sound,
    parse_frames,
    parse_mel,
)

LENGTHS = [
    1, 2, 100, 127, 128, 129, 160, 161, 162, 320, 321, 479, 480, 481, 640, 641, 801, 1280, 1281,
    5_000, 16_000, 99_999, 479_999, 480_000, 480_001, 500_000,
]  # fmt: skip
KINDS = ["silence", "noise", "quiet", "loud", "sine", "click"]


def wave(kind: str, length: int) -> Wave:
    rng = np.random.default_rng(length)
    match kind:
        case "silence":
            made = np.zeros(length)
        case "sine":
            made = np.sin(np.arange(length) * 0.1)
        case "click":
            made = np.zeros(length)
            made[length // 2] = 1.0
        case _:
            made = rng.standard_normal(length) * {"noise": 0.3, "quiet": 1e-5, "loud": 50.0}[kind]
    return made.astype(np.float32)


def upstream(samples: Wave, **config: Any) -> Sound:
    """The same sound by transformers, its padding taken off, and its placeholders counted."""
    out = Gemma4AudioFeatureExtractor(**config)([samples], return_tensors="np")
    mask = out["input_features_mask"][0]
    assert not out["input_features"][0, ~mask].any()
    assert mask[: mask.sum()].all()

    class Tokens:
        boa_token, audio_token, eoa_token = "", "x", ""

    text = Gemma4Processor.replace_audio_token(Tokens(), out, 0)
    return Sound(out["input_features"][0, mask], len(text))


def assert_same(found: Sound, expected: Sound) -> None:
    assert found.features.dtype == np.float32
    assert found.soft_tokens == expected.soft_tokens
    np.testing.assert_array_equal(found.features, expected.features)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_mel_frames_equal_upstream(length: int, kind: str) -> None:
    """Bit for bit: the order and the precision of every step are upstream's."""
    samples = wave(kind, length)
    assert_same(MelProcessor()(samples), upstream(samples))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 20_000), kind=st.sampled_from(KINDS))
def test_mel_frames_equal_upstream_for_any_length(length: int, kind: str) -> None:
    samples = wave(kind, length)
    assert_same(MelProcessor()(samples), upstream(samples))


@pytest.mark.parametrize(
    "config",
    [
        {"feature_size": 80},
        {"frame_length_ms": 25.0},
        {"frame_length_ms": 32.0, "hop_length_ms": 8.0},
        {"min_frequency": 125.0, "max_frequency": 7600.0},
        {"mel_floor": 1e-5},
    ],
)
def test_settings_equal_upstream(config: dict[str, Any]) -> None:
    samples = wave("noise", 12_345)
    assert_same(parse_mel(config)(samples), upstream(samples, **config))


def test_a_sound_shorter_than_a_frame_has_no_soft_tokens() -> None:
    sound = MelProcessor()(wave("noise", 160))
    assert sound.features.shape == (0, 128)
    assert sound.soft_tokens == 0
    assert MelProcessor()(wave("noise", 161)).soft_tokens == 1


def test_thirty_seconds_are_what_the_tower_hears() -> None:
    sound = MelProcessor()(wave("noise", 600_000))
    assert sound.features.shape == (2999, 128)
    assert sound.soft_tokens == 750


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("samples", [640, 320])
def test_frames_of_the_wave_equal_upstream(length: int, kind: str, samples: int) -> None:
    made = wave(kind, length)
    config = {"feature_size": samples, "audio_samples_per_token": samples}
    out = Gemma4UnifiedAudioFeatureExtractor(**config)([made], return_tensors="np")
    assert out["input_features_mask"].all()
    sound = parse_frames(config)(made)
    assert_same(sound, Sound(out["input_features"][0], out["input_features_mask"][0].sum()))


@pytest.mark.parametrize("processor", [MelProcessor(), FrameProcessor()])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (np.zeros((2, 9), dtype=np.float32), r"shape \[2, 9\]"),
        (np.zeros(9, dtype=np.int16), "array of int16"),
        (np.array([0.0, np.nan], dtype=np.float32), "not finite"),
        (np.array([0.0, np.inf]), "not finite"),
        (np.array([0.0, 1e300]), "not finite"),
    ],
)
def test_what_is_no_wave_is_refused(processor: SoundProcessor, bad: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        processor(bad)


def audio_config(channels: int = 128) -> AudioConfig:
    return AudioConfig(
        hidden_size=8, num_layers=1, num_heads=1, conv_channels=(channels, 32), conv_kernel=5,
        residual_weight=0.5, chunk=12, left=13, right=0, logit_cap=50.0, eps=1e-6,
        gradient_clipping=1e10, output_size=8, clipped=False,
    )  # fmt: skip


FRAMES = FrameConfig(samples=640, eps=1e-6)


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def test_the_model_decides_what_it_hears(tmp_path: Path) -> None:
    assert SoundProcessor.open(tmp_path, audio_config()) == MelProcessor()
    assert SoundProcessor.open(tmp_path, FRAMES) == FrameProcessor()


def test_the_files_that_upstream_writes_are_read(tmp_path: Path) -> None:
    config = {"feature_size": 126, "frame_length_ms": 25.0, "mel_floor": 1e-4}
    Gemma4AudioFeatureExtractor(**config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="frame_length is 400; this version computes 320 only"):
        SoundProcessor.open(tmp_path, audio_config())  # upstream forgets it, and hears otherwise
    del config["frame_length_ms"]
    Gemma4AudioFeatureExtractor(**config).save_pretrained(tmp_path)
    theirs = Gemma4AudioFeatureExtractor.from_pretrained(tmp_path)
    ours = SoundProcessor.open(tmp_path, audio_config())
    assert ours == MelProcessor(bins=126, floor=1e-4)
    assert (theirs.feature_size, float(theirs.mel_floor)) == (126, 1e-4)
    Gemma4UnifiedAudioFeatureExtractor().save_pretrained(tmp_path)
    assert SoundProcessor.open(tmp_path, FRAMES) == FrameProcessor()


def test_the_newer_file_comes_first(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {"mel_floor": 0.5})
    assert SoundProcessor.open(tmp_path, audio_config()) == MelProcessor(floor=0.5)
    write(tmp_path, "processor_config.json", {"feature_extractor": {"mel_floor": "0.25"}})
    assert SoundProcessor.open(tmp_path, audio_config()) == MelProcessor(floor=0.25)
    assert SoundProcessor.open(tmp_path, None) == MelProcessor()


@pytest.mark.parametrize(
    "config",
    [
        {"feature_extractor_type": "WhisperFeatureExtractor"},
        {"feature_extractor_type": "Gemma4UnifiedAudioFeatureExtractor"},
        {"sampling_rate": 8_000},
        {"padding_side": "left"},
        {"preemphasis": 0.97},
        {"dither": 1e-4},
        {"input_scale_factor": 32768.0},
        {"fft_overdrive": True},
        {"fft_length": 1024},
        {"hop_length": 80},
        {"per_bin_mean": [0.0] * 128},
        {"per_bin_stddev": [1.0] * 128},
        {"feature_size": 0},
        {"mel_floor": "little"},
        {"mel_floor": 0.0},
        {"min_frequency": -1.0},
        {"min_frequency": 4000.0, "max_frequency": 4000.0},
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(config)[-1]):
        parse_mel(config)


def test_settings_that_contradict_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="feature_size is 128, but the model takes 64"):
        SoundProcessor.open(tmp_path, audio_config(64))
    with pytest.raises(ConfigError, match="feature_size is 128; this version computes 640"):
        parse_frames({"feature_size": 128})
    with pytest.raises(ConfigError, match="per_token is 640, but the model takes 320"):
        SoundProcessor.open(tmp_path, FrameConfig(samples=320, eps=1e-6))


def encoded(samples: Any, rate: int, kind: str, subtype: str | None = None) -> bytes:
    file = BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def stereo(rate: int, seconds: float = 0.5, channels: int = 2) -> Any:
    t = np.arange(int(rate * seconds)) / rate
    tones = [0.4 * np.sin(2 * np.pi * 440 * (i + 1) * t) for i in range(channels)]
    return np.stack(tones, axis=1).astype(np.float32)


FILES = [
    ("WAV", "PCM_U8"), ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"),
    ("WAV", "ULAW"), ("WAVEX", "PCM_16"), ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "subtype"), FILES)
@pytest.mark.parametrize(("rate", "channels"), [(48_000, 2), (16_000, 1), (8_000, 2)])
def test_decoded_waves_are_those_of_upstream(
    kind: str, subtype: str, rate: int, channels: int
) -> None:
    data = encoded(stereo(rate, channels=channels), rate, kind, subtype)
    expected = load_audio(base64.b64encode(data).decode(), backend="soundfile")
    found = decode_sound(data)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 192_000])
@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8])
def test_all_rates_and_channels_equal_upstream(rate: int, channels: int) -> None:
    """Also over the edge of a block, 65,536 samples."""
    data = encoded(stereo(rate, 70_000 / rate, channels), rate, "WAV", "FLOAT")
    expected = load_audio(base64.b64encode(data).decode(), backend="soundfile")
    np.testing.assert_array_equal(decode_sound(data), expected)


def sweep(rate: int, low: float, high: float, seconds: float) -> Any:
    """A sine whose frequency grows exponentially, from its formula."""
    t = np.arange(round(rate * seconds)) / rate
    growth = np.log(high / low) / seconds
    return 0.5 * np.sin(2 * np.pi * low / growth * np.expm1(growth * t))


def decibels(found: Any, expected: Any) -> float:
    """Signal over error, away from the ends, where the filter rings."""
    inner = slice(800, -800)
    error = np.mean((found[inner] - expected[inner]) ** 2)
    return float(10 * np.log10(np.mean(expected[inner] ** 2) / error))


@pytest.mark.parametrize(("rate", "bound"), [(44_100, 85.0), (48_000, 120.0), (22_050, 85.0)])
def test_the_error_of_resampling_a_sweep(rate: int, bound: float) -> None:
    """A stereo sweep of 50 Hz to 6.5 kHz, against the same sweep written at 16 kHz, in decibels."""
    made = sweep(rate, 50.0, 6_500.0, 4.0)
    found = decode_sound(encoded(np.stack((made, made), axis=1), rate, "WAV", "FLOAT"))
    expected = sweep(16_000, 50.0, 6_500.0, 4.0)
    assert len(found) == len(expected)
    assert decibels(found, expected) > bound


@pytest.mark.parametrize(
    ("rate", "frequency", "bound"),
    [(44_100, 3_600, 115.0), (44_100, 5_000, 85.0), (44_100, 7_000, 60.0), (48_000, 7_200, 120.0)],
)
def test_the_error_of_resampling_a_tone(rate: int, frequency: int, bound: float) -> None:
    """Ratios that are not small, as of 44.1 kHz, cost soxr accuracy at high frequencies."""

    def tone(rate: int) -> Any:
        return 0.5 * np.sin(2 * np.pi * frequency * np.arange(rate) / rate)

    found = decode_sound(encoded(tone(rate), rate, "WAV", "FLOAT"))
    assert decibels(found, tone(16_000)) > bound


def test_what_is_above_half_the_rate_does_not_fold_back() -> None:
    t = np.arange(44_100) / 44_100
    for frequency in (9_000, 12_000, 20_000):
        tone = encoded(np.sin(2 * np.pi * frequency * t), 44_100, "WAV", "FLOAT")
        assert np.abs(decode_sound(tone)[800:-800]).max() < 1e-5


def wav(frames: int, rate: int = 16_000, channels: int = 1, bits: int = 16) -> bytes:
    """A WAV header that claims any size, and no samples."""
    size = frames * channels * bits // 8
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * block, block, bits)
    return (
        b"RIFF" + struct.pack("<I", min(size + 36, 2**32 - 1)) + b"WAVEfmt " + struct.pack("<I", 16)
        + form + b"data" + struct.pack("<I", size)
    )  # fmt: skip


WHOLE = {kind: encoded(stereo(16_000), 16_000, kind) for kind in ("WAV", "FLAC", "OGG", "MP3")}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 1000,
        b"RIFF\x00\x00\x00\x00AVI ",
        b"RIFF\x00\x00\x00\x00WAVE",
        b"fLaC" + b"\x00" * 50,
        b"OggS" + b"\xff" * 50,
        b"ID3" + b"\x00" * 50,
        b"\xff\xfb" + b"\x00" * 500,
        WHOLE["WAV"][:20],
        WHOLE["FLAC"][:60],
        WHOLE["FLAC"][: len(WHOLE["FLAC"]) // 2],
        WHOLE["OGG"][:60],
        wav(0),
        wav(100),
        encoded(np.array([0.0, np.nan]), 16_000, "WAV", "FLOAT"),
        encoded(stereo(16_000, channels=9), 16_000, "WAV"),
        encoded(stereo(16_000), 200_000, "WAV"),
        encoded(stereo(16_000), 16_000, "AIFF"),
        encoded(stereo(16_000), 16_000, "AU"),
        encoded(stereo(16_000), 16_000, "CAF"),
    ],
    ids=range(20),
)
def test_bad_files_are_refused_in_our_own_words(data: bytes) -> None:
    with pytest.raises(RequestError, match=r"^a sound ") as caught:
        decode_sound(data)
    text = str(caught.value)
    assert not any(word in text for word in ("0x", "BytesIO", "Error", "libsndfile", "object at"))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(WHOLE)), data=st.data())
def test_damage_raises_nothing_else(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, min(400, len(damaged) - 1)))] = data.draw(
            st.integers(0, 255)
        )
    with suppress(RequestError):
        assert np.isfinite(decode_sound(bytes(damaged), max_seconds=5)).all()


@pytest.mark.parametrize("kind", sorted(WHOLE))
def test_limits_hold_and_can_be_set(kind: str) -> None:
    with pytest.raises(RequestError, match="at most 100 are accepted"):
        decode_sound(WHOLE[kind], max_bytes=100)
    with pytest.raises(RequestError, match=r"too long; at most 0\.4 seconds are accepted"):
        decode_sound(WHOLE[kind], max_seconds=0.4)
    assert len(decode_sound(WHOLE[kind], max_seconds=0.6)) == pytest.approx(8_000, abs=1_200)


def test_a_long_sound_is_refused_before_it_is_decoded() -> None:
    """Ten minutes of silence in a few kilobytes end at the header."""
    import tracemalloc

    data = encoded(np.zeros(16_000 * 600, dtype=np.int16), 16_000, "FLAC")
    assert len(data) < 100_000
    tracemalloc.start()
    with pytest.raises(RequestError, match="too long; at most 300 seconds"):
        decode_sound(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("missing", ["soundfile", "soxr"])
def test_without_the_extra_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(RequestError, match=r"pip install 'cabochon\[audio\]'"):
        decode_sound(WHOLE["WAV"])
