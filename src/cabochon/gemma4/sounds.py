"""From a sound to what the model hears: mel frames for a tower, frames of the wave without one.

The arithmetic is that of upstream's extractors, in the same order and precision. Getting a wave out
of untrusted bytes is the business of `decode_sound`, at the end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cabochon.config import AudioConfig, FrameConfig
from cabochon.errors import ConfigError, RequestError
from cabochon.gemma4.processors import Settings, read_settings

SAMPLE_RATE = 16_000
SOUND_FORMATS = ("WAV", "WAVEX", "FLAC", "MP3", "OGG")

MAX_SOUND_BYTES = 50_000_000
MAX_SOUND_SECONDS = 300.0

Wave = npt.NDArray[np.float32]  # [samples], mono, 16 kHz, usually in -1..1


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """One preprocessed sound.

    `features` [frames, mel bins] for a tower, [frames, samples of a frame] without one, float32.
    Only frames that lie wholly within the sound: what upstream masks out does not exist here.
    `soft_tokens`, how many places the sound takes in the prompt; 0 if it is shorter than a frame.
    """

    features: npt.NDArray[np.float32]
    soft_tokens: int


class SoundProcessor(ABC):
    """Turns waves into sounds as one checkpoint's model hears them."""

    @staticmethod
    def open(folder: Path, audio: AudioConfig | FrameConfig | None) -> SoundProcessor:
        """Read the checkpoint's sound settings; upstream's defaults where it has none.

        `audio` is the model's own configuration. A model without one never hears, so that its
        settings do not matter and are not read.

        Raises:
            ConfigError: an unreadable file, a setting that this version does not compute, or one
                that contradicts the model.
        """
        if audio is None:
            return MelProcessor()
        settings = read_settings(folder, "feature_extractor", "preprocessor_config.json")
        if isinstance(audio, FrameConfig):
            return _checked_frames(parse_frames(settings), audio)
        return _checked_mel(parse_mel(settings), audio)

    @property
    @abstractmethod
    def longest(self) -> int | None:
        """Samples of the longest sound that is heard to its end; None if there is no such bound."""

    @abstractmethod
    def __call__(self, wave: Wave) -> Sound:
        """Preprocess one wave: `[samples]`, mono, 16 kHz.

        Raises:
            RequestError: not one row of finite floating point numbers.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class MelProcessor(SoundProcessor):
    """Logarithms of mel energies, for a tower that makes one soft token of four frames."""

    bins: int = 128
    frame: int = 320  # samples
    hop: int = 160  # samples
    min_frequency: float = 0.0
    max_frequency: float = 8000.0
    floor: float = 1e-3
    max_samples: int = 30 * SAMPLE_RATE  # upstream hears no more of a sound, and says nothing

    @property
    def longest(self) -> int:
        return self.max_samples

    def __call__(self, wave: Wave) -> Sound:
        wave = _checked_wave(wave)[: self.max_samples]
        wave = np.pad(wave, (self.frame // 2, 0))
        # A frame of upstream's is one sample longer than its window, for a filter that is off.
        if len(wave) <= self.frame:
            return Sound(np.zeros((0, self.bins), dtype=np.float32), 0)
        frames = np.lib.stride_tricks.sliding_window_view(wave, self.frame + 1)[:: self.hop, :-1]
        size = fft_size(self.frame)
        # Single precision up to the magnitudes, double from there on.
        spectrum = np.abs(np.fft.rfft(frames * hann_window(self.frame), n=size))
        filters = mel_filters(self.bins, size, self.min_frequency, self.max_frequency)
        mel = np.log(spectrum @ filters + self.floor)
        return Sound(mel.astype(np.float32), -(-len(mel) // 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameProcessor(SoundProcessor):
    """The wave itself, cut into frames, each of them a soft token; silence fills up the last."""

    samples: int = 640  # of a frame

    @property
    def longest(self) -> None:
        return None

    def __call__(self, wave: Wave) -> Sound:
        wave = _checked_wave(wave)
        wave = np.pad(wave, (0, -len(wave) % self.samples))
        frames = wave.reshape(-1, self.samples)
        return Sound(frames, len(frames))


def fft_size(frame: int) -> int:
    """The power of two that holds a frame."""
    return 1 << (frame - 1).bit_length()


@lru_cache(maxsize=4)
def hann_window(length: int) -> npt.NDArray[np.float32]:
    """The periodic Hann window."""
    return np.hanning(length + 1)[:-1].astype(np.float32)


@lru_cache(maxsize=4)
def mel_filters(bins: int, size: int, low: float, high: float) -> npt.NDArray[np.float64]:
    """Triangles between neighbours on the mel scale: `[size // 2 + 1, bins]`.

    The scale is HTK's: O'Shaughnessy, Speech Communication (1987), 2595 log10(1 + f / 700).
    """
    first, last = (2595.0 * np.log10(1.0 + frequency / 700.0) for frequency in (low, high))
    corners = 700.0 * (np.power(10.0, np.linspace(first, last, bins + 2) / 2595.0) - 1.0)
    frequencies = np.linspace(0, SAMPLE_RATE // 2, size // 2 + 1)
    distances = corners - frequencies[:, None]
    widths = np.diff(corners)
    rising = -distances[:, :-2] / widths[:-1]
    falling = distances[:, 2:] / widths[1:]
    filters: npt.NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
    return filters


def _checked_wave(wave: Wave) -> Wave:
    wave = np.asarray(wave)
    if wave.ndim != 1 or wave.dtype.kind != "f":
        raise RequestError(
            f"a sound is an array of {wave.dtype} and shape {list(wave.shape)};"
            " expected one row of floats, mono at 16 kHz"
        )
    with np.errstate(over="ignore"):
        wave = wave.astype(np.float32)
    if not np.isfinite(wave).all():
        raise RequestError("a sound has samples that are not finite numbers of 32 bits")
    return wave


def parse_mel(settings: Mapping[str, Any]) -> MelProcessor:
    """The processor that a checkpoint's `feature_extractor` settings describe, for a tower.

    Raises:
        ConfigError: a setting that this version does not compute.
    """
    reader = _reader(_numeric(settings, "mel_floor"), "Gemma4AudioFeatureExtractor")
    for key, off in (("preemphasis", 0.0), ("dither", 0.0), ("input_scale_factor", 1.0)):
        reader.choice(key, off, (off, int(off)))
    reader.choice("fft_overdrive", False, (False,))
    for key in ("per_bin_mean", "per_bin_stddev"):
        reader.choice(key, None, (None,))
    defaults = MelProcessor()
    frame = _samples(reader.number("frame_length_ms", 20.0))
    hop = _samples(reader.number("hop_length_ms", 10.0))
    # Upstream writes these, and works them out again when it reads the file.
    for key, value in (
        ("frame_length", frame),
        ("hop_length", hop),
        ("fft_length", fft_size(frame)),
    ):
        reader.choice(key, value, (value,))
    low = reader.number("min_frequency", defaults.min_frequency, least=-math.ulp(0.0))
    return MelProcessor(
        bins=reader.size("feature_size", defaults.bins),
        frame=frame,
        hop=hop,
        min_frequency=low,
        max_frequency=reader.number("max_frequency", defaults.max_frequency, least=low),
        floor=reader.number("mel_floor", defaults.floor),
    )


def parse_frames(settings: Mapping[str, Any]) -> FrameProcessor:
    """The processor that a checkpoint's `feature_extractor` settings describe, without a tower.

    Raises:
        ConfigError: a setting that this version does not compute.
    """
    reader = _reader(settings, "Gemma4UnifiedAudioFeatureExtractor")
    samples = reader.size("audio_samples_per_token", FrameProcessor().samples)
    reader.choice("feature_size", samples, (samples,))
    return FrameProcessor(samples=samples)


def _reader(settings: Mapping[str, Any], kind: str) -> Settings:
    reader = Settings(settings, "feature extractor")
    reader.choice("feature_extractor_type", kind, (kind,))
    reader.choice("sampling_rate", SAMPLE_RATE, (SAMPLE_RATE,))
    reader.choice("padding_side", "right", ("right",))
    return reader


def _numeric(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """`settings` with a number in place of its text: upstream writes some of them like that."""
    with suppress(KeyError, TypeError, ValueError):
        return {**settings, key: float(settings[key])}
    return settings


def _samples(milliseconds: float) -> int:
    return round(SAMPLE_RATE * milliseconds / 1000.0)


def _checked_mel(processor: MelProcessor, audio: AudioConfig) -> MelProcessor:
    """Halved twice, the bins must make the width of the tower's first matrix."""
    takes = audio.conv_channels[0] // 4
    if -(-processor.bins // 4) != takes:
        raise _contradiction("feature_size", processor.bins, 4 * takes)
    return processor


def _checked_frames(processor: FrameProcessor, audio: FrameConfig) -> FrameProcessor:
    if processor.samples != audio.samples:
        raise _contradiction("audio_samples_per_token", processor.samples, audio.samples)
    return processor


def _contradiction(key: str, found: int, wanted: int) -> ConfigError:
    return ConfigError(
        f"the feature extractor's {key} is {found}, but the model takes {wanted} (config.json);"
        " the two files are not of one checkpoint"
    )


_MAX_RATE = 192_000
_MAX_CHANNELS = 8
_BLOCK = 1 << 16


def decode_sound(
    data: bytes, *, max_bytes: int = MAX_SOUND_BYTES, max_seconds: float = MAX_SOUND_SECONDS
) -> Wave:
    """Decode one untrusted WAV, FLAC, MP3 or Ogg file to a wave: `[samples]`, mono, 16 kHz.

    Channels are averaged, then soxr converts the rate in its high quality, as upstream does. Both
    limits hold before a sample is decoded, and again while decoding, because a header may lie. What
    the conversion leaves of error, measured against the same tones written at 16 kHz: from 48 kHz
    -120 dB up to 7.2 kHz; from 44.1 kHz -115 dB up to 3.6 kHz, -85 dB at 5 kHz, -60 dB at 7 kHz.

    Raises:
        RequestError: not such a file, damaged, empty, larger than a limit, or the `audio` extra is
            not installed.
    """
    if len(data) > max_bytes:
        raise RequestError(f"a sound has {len(data):,} bytes; at most {max_bytes:,} are accepted")
    soundfile, soxr = _libraries()
    if not _known(data):
        raise _unreadable()
    with _our_words(), soundfile.SoundFile(BytesIO(data)) as file:
        rate = file.samplerate
        mono = np.concatenate([*_mono_blocks(file, max_seconds)])
        if rate != SAMPLE_RATE:
            length = math.ceil(len(mono) * SAMPLE_RATE / rate)
            mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
            mono = np.pad(mono, (0, max(0, length - len(mono))))[:length]
    return _checked_wave(mono)


def _libraries() -> tuple[Any, Any]:
    try:
        import soundfile
        import soxr
    except (ImportError, OSError):  # OSError: soundfile without its library
        raise RequestError(
            "this installation does not decode sound; pip install 'cabochon[audio]' adds that"
        ) from None
    return soundfile, soxr


def _known(data: bytes) -> bool:
    """Whether the file begins as one of ours: the library would try two dozen formats on it."""
    if data[:4] == b"RIFF":
        return data[8:12] == b"WAVE"
    mpeg = len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0
    return data[:4] in (b"fLaC", b"OggS") or data[:3] == b"ID3" or mpeg


def _mono_blocks(file: Any, max_seconds: float) -> Iterator[Wave]:
    """The channels' mean, block by block, so that many channels do not take much memory."""
    if file.format not in SOUND_FORMATS:
        raise _unreadable()
    if not 0 < file.samplerate <= _MAX_RATE or not 0 < file.channels <= _MAX_CHANNELS:
        raise RequestError(
            f"a sound has {file.channels} channels of {file.samplerate:,} Hz;"
            f" at most {_MAX_CHANNELS} of {_MAX_RATE:,} Hz are accepted"
        )
    most = max_seconds * file.samplerate
    claimed, decoded = file.frames, 0
    while claimed <= most and decoded <= most:
        block = file.read(_BLOCK, dtype="float32", always_2d=True)
        if not len(block):
            break
        decoded += len(block)
        yield block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]
    else:
        raise RequestError(f"a sound is too long; at most {max_seconds:g} seconds are accepted")
    if not decoded:
        raise RequestError("a sound has no samples")
    # The number of samples of an MP3 file is an estimate.
    if decoded < claimed and file.format != "MP3":
        raise _damaged()


@contextmanager
def _our_words() -> Iterator[None]:
    """A decoder's own error text, which may hold addresses of memory, goes to nobody."""
    try:
        yield
    except RequestError:
        raise
    except Exception:
        raise _damaged() from None


def _unreadable() -> RequestError:
    return RequestError("a sound cannot be read: expected a file of WAV, FLAC, MP3 or Ogg")


def _damaged() -> RequestError:
    return RequestError("a sound is truncated or damaged and cannot be decoded")
