"""From a picture to patches: what the vision tower sees.

The arithmetic is that of upstream's Pillow back end, and tests hold it to that bit for bit. Getting
an image out of untrusted bytes is the business of `decode_picture`, at the end.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from cabochon.errors import ConfigError, RequestError
from cabochon.files import read_json_object

SOFT_TOKEN_BUDGETS = (70, 140, 280, 560, 1120)
PROCESSOR_TYPES = ("Gemma4ImageProcessor", "Gemma4ImageProcessorPil", "Gemma4ImageProcessorFast")
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

MAX_PICTURE_BYTES = 20_000_000
MAX_PICTURE_PIXELS = 64_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One preprocessed picture.

    `patches` [patches, patch * patch * 3] float32, row by row, channels last within a patch;
    `positions` [patches, 2] int64, the (x, y) of each patch in the grid of patches;
    `soft_tokens`, how many places the picture takes in the prompt.
    """

    patches: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int64]
    soft_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureProcessor:
    """Resize within the budget of patches, scale to 0..1, cut into patches; upstream's defaults."""

    patch_size: int = 16
    pooling: int = 3  # patches per soft token and direction
    max_soft_tokens: int = 280
    resample: Image.Resampling = Image.Resampling.BICUBIC
    rescale_factor: float = 1 / 255

    @classmethod
    def open(cls, folder: Path) -> PictureProcessor:
        """Read the checkpoint's picture settings; upstream's defaults where it has none.

        Raises:
            ConfigError: an unreadable file, or a setting that this version does not compute.
        """
        return parse_processor(_image_settings(folder))

    def __call__(self, image: Image.Image) -> Picture:
        """Preprocess one picture of any mode and size.

        Raises:
            RequestError: the picture has no pixels, or its sides cannot be fitted into the budget.
        """
        width, height = self.fitted_size(*image.size)
        rgb = _rgb(image)
        if rgb.size != (width, height):
            rgb = rgb.resize((width, height), resample=self.resample)
        levels = np.arange(256, dtype=np.float64) * self.rescale_factor
        pixels = levels.astype(np.float32)[np.asarray(rgb)]  # [height, width, 3]

        patch = self.patch_size
        rows, columns = height // patch, width // patch
        grid = pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
        y, x = np.indices((rows, columns), dtype=np.int64)
        return Picture(
            patches=grid.reshape(rows * columns, patch * patch * 3),
            positions=np.stack((x, y), axis=-1).reshape(-1, 2),
            soft_tokens=rows * columns // self.pooling**2,
        )

    def fitted_size(self, width: int, height: int) -> tuple[int, int]:
        """The width and height that a picture is resized to.

        Both are multiples of a soft token's side, the aspect ratio is kept as well as that allows,
        and the area is at most `max_soft_tokens` soft tokens.

        Raises:
            RequestError: there is no such size.
        """
        if width < 1 or height < 1:
            raise RequestError(f"a picture of {width}x{height} has no pixels")
        side = self.patch_size * self.pooling
        area = self.max_soft_tokens * side * side
        factor = math.sqrt(area / (width * height))
        across = math.floor(factor * width / side)
        down = math.floor(factor * height / side)
        # A ratio so extreme that one side rounds to nothing: that side gets one soft token.
        if across == 0:
            across, down = 1, min(height // width, self.max_soft_tokens)
        elif down == 0:
            across, down = min(width // height, self.max_soft_tokens), 1
        if across * down > self.max_soft_tokens:
            raise RequestError(
                f"a picture of {width}x{height} does not fit {self.max_soft_tokens} soft tokens"
            )
        return across * side, down * side


def parse_processor(settings: Mapping[str, Any]) -> PictureProcessor:
    """The processor that a checkpoint's `image_processor` settings describe.

    Raises:
        ConfigError: a setting that this version does not compute.
    """
    reader = _Settings(settings)
    reader.choice("image_processor_type", PROCESSOR_TYPES[0], PROCESSOR_TYPES)
    for switch in ("do_convert_rgb", "do_resize", "do_rescale"):
        reader.choice(switch, True, (True,))
    if reader.choice("do_normalize", False, (False, True, None)):
        reader.choice("image_mean", [0.0, 0.0, 0.0], ([0.0, 0.0, 0.0],))
        reader.choice("image_std", [1.0, 1.0, 1.0], ([1.0, 1.0, 1.0],))
    defaults = PictureProcessor()
    return PictureProcessor(
        patch_size=reader.size("patch_size", defaults.patch_size),
        pooling=reader.size("pooling_kernel_size", defaults.pooling),
        max_soft_tokens=reader.choice(
            "max_soft_tokens", defaults.max_soft_tokens, SOFT_TOKEN_BUDGETS
        ),
        resample=Image.Resampling(
            reader.choice("resample", defaults.resample, tuple(Image.Resampling))
        ),
        rescale_factor=reader.factor("rescale_factor", defaults.rescale_factor),
    )


class _Settings:
    """Picture settings, read by type and named in errors. Upstream takes a null for "no"."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def choice(self, key: str, default: Any, allowed: Sequence[Any]) -> Any:
        value = self._values.get(key, default)
        # `1 == True` in Python; a switch that is a number is still a mistake.
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            wanted = " or ".join(str(a) for a in allowed)
            raise _unsupported(key, value, f"computes {wanted} only")
        return value

    def size(self, key: str, default: int) -> int:
        value = self._values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _unsupported(key, value, "expects a positive integer")
        return value

    def factor(self, key: str, default: float) -> float:
        value = self._values.get(key, default)
        if not isinstance(value, float) or not 0.0 < value < math.inf:
            raise _unsupported(key, value, "expects a positive number, usually 1/255")
        return value


def _unsupported(key: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"the picture processor's {key} is {value!r}; this version {wanted}")


def _image_settings(folder: Path) -> Mapping[str, Any]:
    """The raw settings, from the newer file if it has them, else from the older one."""
    nested = read_json_object(folder / "processor_config.json").get("image_processor")
    if nested is None:
        return read_json_object(folder / "preprocessor_config.json")
    if not isinstance(nested, dict):
        raise ConfigError(f"processor_config.json: image_processor is {nested!r}, not an object")
    return nested


def _rgb(image: Image.Image) -> Image.Image:
    """Eight-bit RGB; what is transparent shows white, as upstream composes it.

    Raises:
        RequestError: no way from its mode to RGB, or a damaged file that was not decoded yet.
    """
    try:
        if "A" not in image.getbands() and image.info.get("transparency") is None:
            return image.convert("RGB")
        layered = image.convert("RGBA")
    except (ValueError, OSError, SyntaxError):
        raise RequestError(f"a picture of mode {image.mode} cannot be converted to RGB") from None
    white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layered).convert("RGB")


def decode_picture(
    data: bytes, *, max_bytes: int = MAX_PICTURE_BYTES, max_pixels: int = MAX_PICTURE_PIXELS
) -> Image.Image:
    """Decode one untrusted PNG, JPEG, WebP, GIF (its first frame) or BMP file, and turn it upright.

    Both limits hold before a pixel is decoded: the size is read from the file's header.
    Transparency is kept, for the processor to compose. A decoder's own error text, which may hold
    addresses of memory, goes to nobody.

    Raises:
        RequestError: not such a file, damaged, or larger than a limit.
    """
    if len(data) > max_bytes:
        raise RequestError(f"a picture has {len(data):,} bytes; at most {max_bytes:,} are accepted")
    image = _open_picture(data)
    width, height = image.size
    if width * height > max_pixels:
        raise RequestError(
            f"a picture of {width}x{height} is too large; at most {max_pixels:,} pixels are taken"
        )
    try:
        image.load()
        with _no_warnings():
            ImageOps.exif_transpose(image, in_place=True)
    except Exception:
        raise RequestError("a picture is truncated or damaged and cannot be decoded") from None
    return _eight_bit(image) if image.mode.startswith("I;16") else image


def _open_picture(data: bytes) -> Image.Image:
    """Identify the format and read the header; no pixel is decoded yet."""
    try:
        with _no_warnings():
            return Image.open(BytesIO(data), formats=PICTURE_FORMATS)
    except Image.DecompressionBombError:
        raise RequestError("a picture has too many pixels") from None
    except Exception:
        kinds = ", ".join(PICTURE_FORMATS)
        raise RequestError(
            f"a picture cannot be read: expected an undamaged file of one of {kinds}"
        ) from None


def _eight_bit(image: Image.Image) -> Image.Image:
    """The high byte of a 16-bit greyscale picture; Pillow's own conversion clips it to white."""
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


_warnings_lock = threading.Lock()


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence Pillow's remarks on odd files. Warning filters are global state, hence the lock."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
