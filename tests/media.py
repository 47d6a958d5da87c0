"""Media made up for tests, the same on every machine: pictures, frames, video files, waves."""

from __future__ import annotations

from fractions import Fraction
from io import BytesIO
from typing import Any

import av
import numpy as np
import numpy.typing as npt

Levels = npt.NDArray[np.uint8]

PICTURE_SIZES = [
    (1, 1), (1, 2), (47, 48), (48, 48), (100, 1), (1, 1000), (3000, 2), (640, 480), (333, 777),
    (1023, 769), (768, 768), (816, 768),
]  # fmt: skip
FRAME_SIZES = [(64, 48), (160, 120), (1, 300), (640, 360), (405, 720), (480, 336), (384, 384)]
PICTURE_SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_soft_tokens": 70},
    {"max_soft_tokens": 1120, "resample": 2},
    {"max_soft_tokens": 140, "patch_size": 8, "pooling_kernel_size": 2, "rescale_factor": 0.003},
    {"do_normalize": True},
    {"do_normalize": True, "rescale_factor": 0.003},
    {"do_normalize": False},
]


def noise(width: int, height: int, frame: int = 0) -> Levels:
    """Something different in every pixel: `[height, width, 3]`."""
    rng = np.random.default_rng((width * 10_000 + height) * 100 + frame)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def film(
    codec: str = "libx264",
    container: str = "mp4",
    *,
    frames: int = 100,
    rate: Fraction = Fraction(30),
    size: tuple[int, int] = (64, 48),
    rotation: int = 0,
    options: dict[str, str] | None = None,
) -> bytes:
    """A video file. A bar grows from the left, and white marks the upper left corner."""
    width, height = size
    file = BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            levels = np.zeros((height, width, 3), dtype=np.uint8)
            levels[:, : (i + 1) * width // frames] = (200, 40, 90)
            levels[: height // 4, : width // 4] = 255
            output.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()
