"""From a picture to patches: what a vision tower, or the embedder of a model without one, sees.

The arithmetic is upstream's, and tests hold it to that bit for bit: Pillow's for pictures that go
to a tower, torch's for pictures of the Unified model and for frames of videos. The two resize and
scale with different rounding. Getting an image out of untrusted bytes is the business of
`decode_picture`, at the end.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from cabochon.config import PatchConfig, VisionConfig
from cabochon.errors import ConfigError, RequestError
from cabochon.gemma4.processors import Settings, read_settings

SOFT_TOKEN_BUDGETS = (70, 140, 280, 560, 1120)
PROCESSOR_TYPES = ("Gemma4ImageProcessor", "Gemma4ImageProcessorPil", "Gemma4ImageProcessorFast")
UNIFIED_PROCESSOR_TYPES = ("Gemma4UnifiedImageProcessor", "Gemma4UnifiedImageProcessorFast")
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

MAX_PICTURE_BYTES = 20_000_000
MAX_PICTURE_PIXELS = 64_000_000

Levels = npt.NDArray[np.uint8]  # [height, width, 3], RGB


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One preprocessed picture.

    `patches` [patches, side * side * 3] float32, row by row, channels last within a patch;
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
    normalize: bool = False  # by mean 0 and deviation 1, which still changes torch's rounding
    arithmetic: Literal["pillow", "torch"] = "pillow"
    merged: bool = False  # each soft token's patches as one: for models without a tower

    @classmethod
    def open(
        cls, folder: Path, vision: VisionConfig | PatchConfig | None = None
    ) -> PictureProcessor:
        """Read the checkpoint's picture settings; upstream's defaults where it has none.

        `vision` is the model's own configuration, by which the settings are checked; `None` stands
        for a tower of which nothing is known.

        Raises:
            ConfigError: an unreadable file, a setting that this version does not compute, or one
                that contradicts the model.
        """
        settings = read_settings(folder, "image_processor", "preprocessor_config.json")
        processor = parse_processor(settings, unified=isinstance(vision, PatchConfig))
        processor.check(vision)
        return processor

    def __call__(self, image: Image.Image) -> Picture:
        """Preprocess one picture of any mode and size.

        Raises:
            RequestError: the picture has no pixels, or its sides cannot be fitted into the budget.
        """
        self.fitted_size(*image.size)  # refuses before anything is converted
        return self.cut(np.asarray(_rgb(image)))

    def cut(self, levels: Levels) -> Picture:
        """Preprocess pixels that are RGB already, `[height, width, 3]`.

        Raises:
            RequestError: no pixels, or sides that cannot be fitted into the budget.
        """
        width, height = self.fitted_size(levels.shape[1], levels.shape[0])
        if levels.shape[:2] != (height, width):
            resize = _resize_by_pillow if self.arithmetic == "pillow" else _resize_by_torch
            levels = resize(levels, (width, height), self.resample)
        pixels = self._scale()[levels]

        side = self.patch_size * (self.pooling if self.merged else 1)
        rows, columns = height // side, width // side
        grid = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        y, x = np.indices((rows, columns), dtype=np.int64)
        return Picture(
            patches=grid.reshape(rows * columns, side * side * 3),
            positions=np.stack((x, y), axis=-1).reshape(-1, 2),
            soft_tokens=rows * columns // (1 if self.merged else self.pooling**2),
        )

    def _scale(self) -> npt.NDArray[np.float32]:
        """What each of the 256 levels becomes, in the rounding of upstream's back end."""
        if self.arithmetic == "pillow":
            return (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        levels = np.arange(256, dtype=np.float32)
        if self.normalize:
            return levels / np.float32(1 / self.rescale_factor)
        return levels * np.float32(self.rescale_factor)

    def check(self, vision: VisionConfig | PatchConfig | None) -> None:
        """Refuse settings whose patches are not those of the model.

        Raises:
            ConfigError: naming both values.
        """
        if vision is None:
            return
        for key, ours, model in (
            ("patch_size", self.patch_size, vision.patch_size),
            ("pooling_kernel_size", self.pooling, vision.pooling),
        ):
            if ours != model:
                raise ConfigError(
                    f"the processor's {key} is {ours}, but the model's is {model} (config.json);"
                    " the two files are not of one checkpoint"
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


def parse_processor(settings: Mapping[str, Any], *, unified: bool = False) -> PictureProcessor:
    """The processor that a checkpoint's `image_processor` settings describe.

    Raises:
        ConfigError: a setting that this version does not compute.
    """
    reader = Settings(settings, "picture processor")
    types = UNIFIED_PROCESSOR_TYPES if unified else PROCESSOR_TYPES
    reader.choice("image_processor_type", types[0], types)
    if unified:
        return read_patching(reader, PictureProcessor(arithmetic="torch", merged=True))
    return read_patching(reader, PictureProcessor())


def read_patching(reader: Settings, defaults: PictureProcessor) -> PictureProcessor:
    """`defaults` with what `reader` says of resizing, scaling and patches, of a picture or a frame.

    Raises:
        ConfigError: a setting that this version does not compute.
    """
    for switch in ("do_convert_rgb", "do_resize", "do_rescale"):
        reader.choice(switch, True, (True,))
    normalize = bool(reader.choice("do_normalize", defaults.normalize, (False, True, None)))
    if normalize:
        reader.choice("image_mean", [0.0, 0.0, 0.0], ([0.0, 0.0, 0.0],))
        reader.choice("image_std", [1.0, 1.0, 1.0], ([1.0, 1.0, 1.0],))
    filters = tuple(Image.Resampling) if defaults.arithmetic == "pillow" else tuple(_TORCH_FILTERS)
    return replace(
        defaults,
        patch_size=reader.size("patch_size", defaults.patch_size),
        pooling=reader.size("pooling_kernel_size", defaults.pooling),
        max_soft_tokens=reader.choice(
            "max_soft_tokens", defaults.max_soft_tokens, SOFT_TOKEN_BUDGETS
        ),
        resample=Image.Resampling(reader.choice("resample", defaults.resample, filters)),
        rescale_factor=reader.number(
            "rescale_factor", defaults.rescale_factor, hint=", usually 1/255"
        ),
        normalize=normalize,
    )


_TORCH_FILTERS = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}


def _resize_by_pillow(levels: Levels, size: tuple[int, int], resample: Image.Resampling) -> Levels:
    return np.asarray(Image.fromarray(levels).resize(size, resample=resample))


def _resize_by_torch(levels: Levels, size: tuple[int, int], resample: Image.Resampling) -> Levels:
    """Up to two levels off Pillow's: torch keeps its weights in 16 bits."""
    import torch  # here, because nothing else about pictures needs it

    width, height = size
    image = torch.tensor(levels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        image, size=(height, width), mode=_TORCH_FILTERS[resample], antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


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
