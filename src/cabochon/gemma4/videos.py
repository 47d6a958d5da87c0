"""From a video to frames with timestamps: which frames upstream takes, and what becomes of them.

A frame is a picture with fewer soft tokens, and torch's arithmetic for every model. Videos are
untrusted bytes, so that decoding is bounded and open to a few containers and codecs only: FFmpeg
knows formats that read other files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from cabochon.config import PatchConfig, VisionConfig
from cabochon.errors import RequestError
from cabochon.gemma4.pictures import Levels, Picture, PictureProcessor, read_patching
from cabochon.gemma4.processors import Settings, read_settings

PROCESSOR_TYPES = ("Gemma4VideoProcessor",)
UNIFIED_PROCESSOR_TYPES = ("Gemma4UnifiedVideoProcessor",)

MAX_VIDEO_BYTES = 100_000_000
MAX_VIDEO_SECONDS = 600.0
MAX_VIDEO_PIXELS = 4096 * 2304  # of one frame
MAX_VIDEO_FRAMES = 256  # that a model sees

_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"
_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4")


_FRAMES = PictureProcessor(max_soft_tokens=70, normalize=True, arithmetic="torch")


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """Frames of one video, preprocessed, and the second at which each of them stands."""

    frames: tuple[Picture, ...]
    seconds: tuple[float, ...]

    @property
    def timestamps(self) -> tuple[str, ...]:
        """What the prompt says before each frame: minutes and whole seconds, `07:04`."""
        return tuple(f"{int(s // 60):02d}:{int(s % 60):02d}" for s in self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoProcessor:
    """Samples frames of a video evenly and preprocesses each; upstream's defaults."""

    num_frames: int | None = 32  # either this, or
    fps: float | None = None  # this many a second
    frames: PictureProcessor = _FRAMES

    @classmethod
    def open(cls, folder: Path, vision: VisionConfig | PatchConfig | None = None) -> VideoProcessor:
        """Read the checkpoint's video settings; upstream's defaults where it has none.

        `vision` is the model's own configuration, by which the settings are checked; `None` stands
        for a tower of which nothing is known.

        Raises:
            ConfigError: an unreadable file, a setting that this version does not compute, or one
                that contradicts the model.
        """
        older = ("video_preprocessor_config.json", "preprocessor_config.json")
        settings = read_settings(folder, "video_processor", *older)
        processor = parse_videos(settings, unified=isinstance(vision, PatchConfig))
        processor.frames.check(vision)
        return processor

    def __call__(
        self,
        data: bytes,
        check: Callable[[], None] | None = None,
        *,
        max_bytes: int = MAX_VIDEO_BYTES,
        max_seconds: float = MAX_VIDEO_SECONDS,
        max_pixels: int = MAX_VIDEO_PIXELS,
    ) -> Video:
        """Decode and preprocess one untrusted MP4, QuickTime, Matroska or WebM file.

        Limits hold before a frame is decoded. `max_pixels` are of one frame. `check` is called for
        each packet and frame, and may raise to end it.

        Raises:
            RequestError: not such a file, damaged, larger than a limit, without a frame rate, or
                the `video` extra is not installed.
        """
        with _opened(data, max_bytes) as (container, stream):
            rate = _frame_rate(stream)
            _check_size(stream.width, stream.height, max_pixels)
            check = check or _go_on
            total = _count_frames(container, stream, check)
            if total > max_seconds * rate:
                raise RequestError(
                    f"a video of {total / rate:.0f} seconds is too long;"
                    f" at most {max_seconds:g} are accepted"
                )
            indices = self.sample(total, rate)
            pictures, shown = self._take(container, stream, indices, max_pixels, check)
            if len(pictures) < len(indices):  # packets that show nothing, at a cut
                indices = self.sample(shown, rate)
                pictures, shown = self._take(container, stream, indices, max_pixels, check)
        return Video(tuple(pictures), tuple(index / rate for index in indices))

    def _take(
        self,
        container: Any,
        stream: Any,
        indices: Sequence[int],
        max_pixels: int,
        check: Callable[[], None],
    ) -> tuple[list[Picture], int]:
        """The frames at `indices` that there are, and how many frames were decoded for them."""
        pictures: list[Picture] = []
        shown = 0
        container.seek(0)
        for frame in container.decode(stream):
            check()
            shown += 1
            if shown - 1 == indices[len(pictures)]:
                _check_size(frame.width, frame.height, max_pixels)
                pictures.append(self.frames.cut(_upright(frame)))
                if len(pictures) == len(indices):
                    break
        if not shown:
            raise _unreadable()
        return pictures, shown

    def sample(self, total: int, rate: float) -> list[int]:
        """Which of `total` frames, at `rate` a second, the model sees.

        Upstream fails on a video with fewer frames than it wants; here all of them are taken.

        Raises:
            RequestError: more than `MAX_VIDEO_FRAMES`.
        """
        wanted = self.num_frames
        if wanted is None:
            wanted = max(1, int(total / rate * (self.fps or 0.0)))
        wanted = min(wanted, total)
        if wanted > MAX_VIDEO_FRAMES:
            raise RequestError(
                f"a video gives {wanted} frames at this checkpoint's {self.fps:g} a second;"
                f" at most {MAX_VIDEO_FRAMES} are accepted"
            )
        return [i * total // wanted for i in range(wanted)]


def parse_videos(settings: Mapping[str, Any], *, unified: bool = False) -> VideoProcessor:
    """The processor that a checkpoint's `video_processor` settings describe.

    Raises:
        ConfigError: a setting that this version does not compute.
    """
    reader = Settings(settings, "video processor")
    types = UNIFIED_PROCESSOR_TYPES if unified else PROCESSOR_TYPES
    reader.choice("video_processor_type", types[0], types)
    reader.choice("do_sample_frames", True, (True,))
    defaults = VideoProcessor()
    frames = read_patching(reader, replace(_FRAMES, merged=unified))
    fps = reader.maybe("fps", None)
    num_frames: int | None = None
    if fps is None:
        num_frames = reader.size("num_frames", defaults.num_frames or 0)
    else:  # upstream takes either, and has a default for the other
        reader.choice("num_frames", defaults.num_frames, (None,))
    return VideoProcessor(num_frames=num_frames, fps=fps, frames=frames)


def check_video(data: bytes) -> None:
    """Open a video without decoding a frame, for an error before there is a model to see it.

    Raises:
        RequestError: not such a file, too large, or the `video` extra is not installed.
    """
    with _opened(data, MAX_VIDEO_BYTES):
        pass


@contextmanager
def _opened(data: bytes, max_bytes: int) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream. Errors are put into our own words, those inside too."""
    if len(data) > max_bytes:
        raise RequestError(f"a video has {len(data):,} bytes; at most {max_bytes:,} are accepted")
    av = _library()
    options = {"format_whitelist": _CONTAINERS, "codec_whitelist": ",".join(_CODECS)}
    try:
        with av.open(BytesIO(data), container_options=options, metadata_errors="replace") as file:
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in file.streams.video if cover not in s.disposition]
            if not streams or streams[0].codec_context.name not in _CODECS:
                raise _unreadable()
            streams[0].thread_type = "AUTO"
            yield file, streams[0]
    except RequestError:
        raise
    except Exception:
        raise _unreadable() from None


def _library() -> Any:
    try:
        import av
    except ImportError:
        raise RequestError(
            "this installation does not decode video; pip install 'cabochon[video]' adds that"
        ) from None
    return av


def _frame_rate(stream: Any) -> float:
    if not stream.average_rate:
        raise RequestError("a video does not say how many frames a second it has")
    return float(stream.average_rate)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise RequestError(
            f"a video of {width}x{height} is too large; at most {max_pixels:,} pixels a frame are"
            " accepted"
        )


def _go_on() -> None:
    """Nobody has asked to be asked."""


def _count_frames(container: Any, stream: Any, check: Callable[[], None]) -> int:
    """Frames by their packets: many containers do not say how many there are, and any may lie."""
    total = 0
    for packet in container.demux(stream):
        check()
        if packet.is_corrupt:
            raise _unreadable()
        total += packet.size > 0 and not packet.is_discard
    if not total:
        raise _unreadable()
    return total


def _upright(frame: Any) -> Levels:
    levels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(levels, round(frame.rotation / 90)))


def _unreadable() -> RequestError:
    return RequestError(
        "a video cannot be read: expected an undamaged MP4, QuickTime, Matroska or WebM file with"
        " H.264, H.265, VP8, VP9, AV1 or MPEG-4 video"
    )
