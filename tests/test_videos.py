"""Videos: the frames, times and pixels that upstream takes, and bad files refused."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media import film, noise
from media_goldens import digest
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, read_video_pyav

from cabochon.config import PatchConfig
from cabochon.errors import ConfigError, RequestError
from cabochon.gemma4.videos import MAX_VIDEO_FRAMES, Video, VideoProcessor, parse_videos

GOLDENS = json.loads((Path(__file__).parent / "data" / "media.json").read_text())
MP4 = film()
WEBM = film("libvpx-vp9", "webm", options={"deadline": "realtime"})


@pytest.mark.parametrize("unified", [False, True])
def test_patches_of_frames_equal_upstream(unified: bool) -> None:
    for golden in GOLDENS["unified_videos" if unified else "videos"]:
        processor = parse_videos(golden["settings"], unified=unified)
        for frame, expected in enumerate(golden["digests"]):
            picture = processor.frames.cut(noise(*golden["size"], frame))
            assert picture.soft_tokens == golden["soft_tokens"]
            assert digest(picture.patches, picture.positions) == expected, golden


@pytest.mark.parametrize(
    ("codec", "container"),
    [("libx264", "mp4"), ("libx264", "mov"), ("mpeg4", "mp4"), ("libsvtav1", "mp4")],
)
@pytest.mark.parametrize("rate", [Fraction(30), Fraction(30_000, 1001), Fraction(7)])
def test_frames_and_times_are_those_of_upstream(
    tmp_path: Path, codec: str, container: str, rate: Fraction
) -> None:
    data = film(codec, container, rate=rate)
    (tmp_path / "video").write_bytes(data)
    levels, metadata = read_video_pyav(
        str(tmp_path / "video"),
        lambda metadata: default_sample_indices_fn(metadata, num_frames=32),
    )
    processor = VideoProcessor()
    video = processor(data)
    assert video.seconds == tuple(metadata.timestamps)
    assert len(video.frames) == len(levels) == 32
    for found, expected in zip(video.frames, levels, strict=True):
        np.testing.assert_array_equal(found.patches, processor.frames.cut(expected).patches)


@settings(max_examples=300, deadline=None)
@given(
    total=st.integers(1, 20_000),
    rate=st.sampled_from([Fraction(30), Fraction(24_000, 1001), Fraction(1, 3), Fraction(120)]),
    num_frames=st.integers(1, 64),
    fps=st.floats(0.01, 60.0),
)
def test_sampling_equals_upstream(total: int, rate: Fraction, num_frames: int, fps: float) -> None:
    metadata = VideoMetadata(total_num_frames=total, fps=float(rate))
    for ours, theirs in (
        (VideoProcessor(num_frames=num_frames), {"num_frames": num_frames}),
        (VideoProcessor(num_frames=None, fps=fps), {"fps": fps}),
    ):
        try:
            expected = default_sample_indices_fn(metadata, **theirs).tolist()
        except ValueError:
            expected = list(range(total))  # the departure: upstream wants more than there are
        if len(expected) > MAX_VIDEO_FRAMES:
            with pytest.raises(RequestError, match=f"at most {MAX_VIDEO_FRAMES} are accepted"):
                ours.sample(total, float(rate))
        else:
            assert ours.sample(total, float(rate)) == expected


@given(
    total=st.integers(1, 400_000),
    rate=st.sampled_from([Fraction(30), Fraction(24_000, 1001), Fraction(1, 3)]),
)
def test_the_times_in_the_prompt_are_written_as_upstream_writes_them(
    total: int, rate: Fraction
) -> None:
    indices = VideoProcessor().sample(total, float(rate))
    metadata = VideoMetadata(total_num_frames=total, fps=float(rate), frames_indices=indices)
    tokens = SimpleNamespace(boi_token="<|image>", eoi_token="<image|>", video_token="<|video|>")
    inputs = {"num_soft_tokens_per_video": [2], "video_metadata": [metadata]}
    expected = Gemma4Processor.replace_video_token(tokens, inputs, 0)
    video = Video((), tuple(index / float(rate) for index in indices))
    found = (f"{time} <|image><|video|><|video|><image|>" for time in video.timestamps)
    assert " ".join(found) == expected


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libvpx-vp9", "webm", {"deadline": "realtime"}),
        ("libvpx", "webm", {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "16"}),
        ("libx264", "matroska", {"bf": "3"}),
    ],
)
def test_containers_that_do_not_say_how_many_frames_they_hold(
    codec: str, container: str, options: dict[str, str]
) -> None:
    video = VideoProcessor()(film(codec, container, options=options))
    assert video.seconds == pytest.approx([i * 100 // 32 / 30 for i in range(32)], abs=1e-3)
    assert len(video.frames) == 32


def test_the_bar_grows_as_it_does_in_the_video() -> None:
    """Frame for frame, by what is seen in it and not by what a container says."""
    for data in (MP4, WEBM, film("libvpx", "webm", options={"lag-in-frames": "16"})):
        video = VideoProcessor()(data)
        for frame, second in zip(video.frames, video.seconds, strict=True):
            columns = int(frame.positions[:, 0].max()) + 1
            last_row = frame.patches[-columns:].reshape(columns, 16, 16, 3)[:, -1, :, 0]
            share = (last_row > 100 / 255).mean()
            assert share == pytest.approx((round(second * 30) + 1) / 100, abs=0.03)


def test_packets_that_show_nothing_are_not_counted() -> None:
    """A cut that begins between key frames: what comes before the first of them cannot be shown."""
    cut = BytesIO()
    whole = BytesIO(film(options={"g": "20", "bf": "0", "sc_threshold": "0"}))
    with av.open(whole) as source, av.open(cut, "w", format="matroska") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in list(source.demux(video=0))[1:-1]:
            packet.stream = stream
            output.mux(packet)
    with av.open(BytesIO(cut.getvalue())) as file:
        levels = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(levels) == 80
    processor = VideoProcessor()
    video = processor(cut.getvalue())
    for i, frame in enumerate(video.frames):
        expected = processor.frames.cut(levels[i * 80 // 32])
        np.testing.assert_array_equal(frame.patches, expected.patches)
    assert video.seconds == pytest.approx([i * 80 // 32 / 30 for i in range(32)], abs=1e-3)


def test_a_sound_track_does_not_matter() -> None:
    file = BytesIO()
    with av.open(BytesIO(MP4)) as source, av.open(file, "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=48_000)
        stream = output.add_stream_from_template(source.streams.video[0])
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 48_000), np.float32), format="fltp")
        silence.rate = 48_000
        output.mux(sound.encode(silence))
        output.mux(sound.encode())
        for packet in list(source.demux(video=0))[:-1]:
            packet.stream = stream
            output.mux(packet)
    with_sound, without = VideoProcessor()(file.getvalue()), VideoProcessor()(MP4)
    assert with_sound.seconds == without.seconds
    for one, other in zip(with_sound.frames, without.frames, strict=True):
        np.testing.assert_array_equal(one.patches, other.patches)


def test_a_short_video_is_seen_whole() -> None:
    video = VideoProcessor()(film(frames=5))
    assert video.seconds == tuple(i / 30 for i in range(5))
    assert VideoProcessor()(film(frames=1)).timestamps == ("00:00",)


@pytest.mark.parametrize(
    ("rotation", "size", "corner"),
    [(0, (64, 48), (0, 0)), (90, (48, 64), (-1, 0)), (180, (64, 48), (-1, -1)),
     (-90, (48, 64), (0, -1))],
)  # fmt: skip
def test_a_video_is_turned_upright(
    rotation: int, size: tuple[int, int], corner: tuple[int, int]
) -> None:
    """The corner in which OpenCV 5.0.0 shows the white mark; it turns videos as players do."""
    video = VideoProcessor()(film(frames=2, rotation=rotation))
    frame = video.frames[0]
    columns, rows = frame.positions.max(axis=0) + 1
    assert (columns > rows) == (size[0] > size[1])
    grid = frame.patches.mean(axis=1).reshape(rows, columns)
    assert grid[corner] == grid.max() > 0.9


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def test_settings_are_read_from_the_file_that_upstream_reads(tmp_path: Path) -> None:
    assert VideoProcessor.open(tmp_path) == VideoProcessor()
    write(tmp_path, "preprocessor_config.json", {"max_soft_tokens": 280})
    assert VideoProcessor.open(tmp_path).frames.max_soft_tokens == 280
    write(tmp_path, "video_preprocessor_config.json", {"num_frames": 8})
    assert VideoProcessor.open(tmp_path) == VideoProcessor(num_frames=8)
    write(tmp_path, "processor_config.json", {"video_processor": {"num_frames": 16}})
    assert VideoProcessor.open(tmp_path) == VideoProcessor(num_frames=16)
    write(tmp_path, "processor_config.json", {"video_processor": {"num_frames": None, "fps": 2}})
    assert VideoProcessor.open(tmp_path) == VideoProcessor(num_frames=None, fps=2.0)


def test_frames_for_a_model_without_a_tower_are_merged(tmp_path: Path) -> None:
    model = PatchConfig(patch_size=16, pooling=3, hidden_size=8, position_table_size=8, eps=1e-6)
    video = VideoProcessor.open(tmp_path, model)(MP4)
    assert video.frames[0].patches.shape == (video.frames[0].soft_tokens, 3 * 48 * 48)
    write(tmp_path, "video_preprocessor_config.json", {"patch_size": 14})
    with pytest.raises(ConfigError, match="patch_size is 14, but the model's is 16"):
        VideoProcessor.open(tmp_path, model)


@pytest.mark.parametrize(
    "config",
    [
        {"video_processor_type": "Gemma3VideoProcessor"},
        {"video_processor_type": "Gemma4UnifiedVideoProcessor"},
        {"do_sample_frames": False},
        {"num_frames": 0},
        {"num_frames": None},
        {"fps": 2.0, "num_frames": 32},
        {"num_frames": None, "fps": -1},
        {"max_soft_tokens": 71},
        {"image_mean": [0.5, 0.5, 0.5]},
        {"resample": 0},
        {"do_resize": False},
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(config)[-1]):
        parse_videos(config)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 1000,
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'/>",
        b"RIFF\x00\x00\x00\x00WAVEfmt ",
        MP4[:200],
        MP4[: len(MP4) // 2],
        WEBM[:100],
        film("mpeg2video", "mpegts", rate=Fraction(25)),
        film("mpeg4", "avi"),
        film("ffv1", "matroska"),
    ],
    ids=range(12),
)
def test_bad_files_are_refused_in_our_own_words(data: bytes) -> None:
    with pytest.raises(RequestError, match=r"^a video cannot be read: expected") as caught:
        VideoProcessor()(data)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@settings(max_examples=60, deadline=None)
@given(whole=st.sampled_from([MP4, WEBM]), data=st.data())
def test_damage_raises_nothing_else(whole: bytes, data: st.DataObject) -> None:
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(RequestError):
        VideoProcessor(num_frames=2)(bytes(damaged), max_pixels=100_000)


def test_limits_hold_and_can_be_set() -> None:
    processor = VideoProcessor()
    with pytest.raises(RequestError, match="at most 100 are accepted"):
        processor(MP4, max_bytes=100)
    with pytest.raises(RequestError, match="of 3 seconds is too long; at most 2 are"):
        processor(MP4, max_seconds=2)
    with pytest.raises(RequestError, match="64x48 is too large; at most 3,071 pixels"):
        processor(MP4, max_pixels=64 * 48 - 1)
    assert len(processor(MP4, max_seconds=4, max_pixels=64 * 48).frames) == 32


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RequestError, match=r"pip install 'cabochon\[video\]'"):
        VideoProcessor()(MP4)
