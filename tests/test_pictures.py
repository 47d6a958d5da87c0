"""Pictures: what upstream's Pillow processor computes, bit for bit, and bad files refused."""

from __future__ import annotations

import json
import struct
import warnings
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from media import noise as media_noise
from media_goldens import digest
from PIL import Image, ImageOps
from transformers.image_utils import load_image
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from cabochon.assembly import open_text
from cabochon.config import PatchConfig, VisionConfig
from cabochon.errors import CabochonError, ConfigError, RequestError
from cabochon.gemma4.pictures import (
    SOFT_TOKEN_BUDGETS,
    Picture,
    PictureProcessor,
    decode_picture,
    parse_processor,
)
from cabochon.load.report import plan_checkpoint

SIZES = [
    (1, 1), (1, 2), (2, 1), (3, 3), (16, 16), (47, 48), (48, 48), (49, 47), (100, 1), (1, 1000),
    (3000, 2), (2, 3000), (640, 480), (333, 777), (1023, 769), (768, 768), (960, 672),
]  # fmt: skip


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture of any mode with something different in every pixel."""
    rng = np.random.default_rng(width * 10_000 + height)
    match mode:
        case "RGB":
            return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        case "RGBA":
            return Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
        case "I;16":
            return Image.fromarray(rng.integers(0, 65_536, (height, width), dtype=np.uint16))
        case "I" | "F":
            array = rng.integers(-100, 400, (height, width))
            return Image.fromarray(array.astype(np.int32 if mode == "I" else np.float32))
        case "LA" | "PA" | "RGBa":
            return noise(width, height, "RGBA").convert(mode)
        case _:
            return noise(width, height).convert(mode)


def upstream(image: Image.Image, **config: Any) -> Picture:
    """The same picture by transformers, its padding taken off."""
    out = Gemma4ImageProcessorPil(**config)(image, return_tensors="np")
    real = out["image_position_ids"][0, :, 0] >= 0
    assert not out["pixel_values"][0, ~real].any()
    return Picture(
        patches=out["pixel_values"][0, real],
        positions=out["image_position_ids"][0, real],
        soft_tokens=int(out["num_soft_tokens_per_image"][0]),
    )


def assert_same(found: Picture, expected: Picture) -> None:
    assert found.patches.dtype == np.float32
    assert found.positions.dtype == np.int64
    assert found.soft_tokens == expected.soft_tokens
    np.testing.assert_array_equal(found.patches, expected.patches)
    np.testing.assert_array_equal(found.positions, expected.positions)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("budget", [70, 280])
def test_patches_equal_upstream_for_all_sizes(size: tuple[int, int], budget: int) -> None:
    image = noise(*size)
    processor = PictureProcessor(max_soft_tokens=budget)
    assert_same(processor(image), upstream(image, max_soft_tokens=budget))


def test_a_user_may_choose_how_many_tokens_a_picture_takes() -> None:
    """A GGUF does not say it."""
    image = noise(640, 480)
    prompts, _ = open_text(plan_checkpoint(FIXTURES / "gguf" / "e2b"))
    assert_same(prompts.picture(image), upstream(image))
    prompts.limit_pictures(70)
    assert_same(prompts.picture(image), upstream(image, max_soft_tokens=70))
    with pytest.raises(CabochonError, match="picture_tokens is 71, expected one of 70, 140"):
        prompts.limit_pictures(71)


@pytest.mark.parametrize(
    "mode",
    ["RGB", "1", "L", "LA", "P", "PA", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "I;16",
     "I", "F"],
)  # fmt: skip
def test_patches_equal_upstream_for_all_modes(mode: str) -> None:
    image = noise(61, 45, mode)
    assert image.mode == mode
    assert_same(PictureProcessor(max_soft_tokens=70)(image), upstream(image, max_soft_tokens=70))


@pytest.mark.parametrize("transparency", [3, b"\x00\x80\xff" * 20])
def test_palette_transparency_equals_upstream(transparency: int | bytes) -> None:
    file = BytesIO()
    image = noise(50, 50).quantize(64)
    image.save(file, "PNG", transparency=transparency)
    with Image.open(file) as image:
        assert "transparency" in image.info
        assert_same(
            PictureProcessor(max_soft_tokens=70)(image), upstream(image, max_soft_tokens=70)
        )


@pytest.mark.parametrize("budget", SOFT_TOKEN_BUDGETS)
@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_settings_equal_upstream(budget: int, resample: Image.Resampling) -> None:
    config = {
        "max_soft_tokens": budget,
        "resample": int(resample),
        "patch_size": 8,
        "pooling_kernel_size": 2,
        "rescale_factor": 0.003,
        "do_normalize": True,
    }
    image = noise(123, 77)
    assert_same(parse_processor(config)(image), upstream(image, **config))


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 200_000),
    height=st.integers(1, 200_000),
    budget=st.sampled_from(SOFT_TOKEN_BUDGETS),
    patch=st.sampled_from([14, 16]),
    pooling=st.integers(1, 4),
)
def test_fitted_size_equals_upstream(
    width: int, height: int, budget: int, patch: int, pooling: int
) -> None:
    from transformers.models.gemma4.image_processing_pil_gemma4 import (
        get_aspect_ratio_preserving_size,
    )

    ours = PictureProcessor(patch_size=patch, pooling=pooling, max_soft_tokens=budget)
    try:
        expected = get_aspect_ratio_preserving_size(
            height, width, patch, budget * pooling**2, pooling
        )
    except ValueError:
        with pytest.raises(RequestError, match="does not fit"):
            ours.fitted_size(width, height)
    else:
        assert ours.fitted_size(width, height) == expected[::-1]


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_patches_equal_upstream_for_any_size(width: int, height: int) -> None:
    image = noise(width, height)
    assert_same(PictureProcessor(max_soft_tokens=70)(image), upstream(image, max_soft_tokens=70))


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(RequestError, match="0x5 has no pixels"):
        PictureProcessor()(Image.new("RGB", (0, 5)))


def test_a_mode_without_way_to_rgb_is_refused() -> None:
    with pytest.raises(RequestError, match="mode La "):
        PictureProcessor()(Image.new("La", (5, 5)))


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_settings_are_read_from_the_file_that_upstream_reads(tmp_path: Path) -> None:
    assert PictureProcessor.open(tmp_path) == PictureProcessor()
    write(tmp_path, "preprocessor_config.json", {"max_soft_tokens": 70, "patch_size": 14})
    write(tmp_path, "processor_config.json", {"image_seq_length": 70})
    theirs = Gemma4ImageProcessorPil.from_pretrained(tmp_path)
    ours = PictureProcessor.open(tmp_path)
    assert (ours.max_soft_tokens, ours.patch_size) == (70, 14)
    assert (theirs.max_soft_tokens, theirs.patch_size) == (70, 14)
    write(tmp_path, "processor_config.json", {"image_processor": {"max_soft_tokens": 140}})
    theirs = Gemma4ImageProcessorPil.from_pretrained(tmp_path)
    ours = PictureProcessor.open(tmp_path)
    assert (ours.max_soft_tokens, ours.patch_size) == (140, 16)
    assert (theirs.max_soft_tokens, theirs.patch_size) == (140, 16)


def test_the_file_that_upstream_writes_is_read(tmp_path: Path) -> None:
    Gemma4ImageProcessorPil(max_soft_tokens=560).save_pretrained(tmp_path)
    assert PictureProcessor.open(tmp_path) == PictureProcessor(max_soft_tokens=560)


@pytest.mark.parametrize(
    "config",
    [
        {"image_processor_type": "Gemma3ImageProcessor"},
        {"max_soft_tokens": 100},
        {"max_soft_tokens": "280"},
        {"do_resize": False},
        {"do_rescale": 0},
        {"do_convert_rgb": None},
        {"do_normalize": True, "image_mean": [0.5, 0.5, 0.5]},
        {"do_normalize": True, "image_std": [0.5, 0.5, 0.5]},
        {"do_normalize": 1},
        {"resample": 99},
        {"resample": None},
        {"patch_size": 0},
        {"pooling_kernel_size": 3.0},
        {"rescale_factor": 0.0},
        {"rescale_factor": "1/255"},
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(config)[-1]):
        parse_processor(config)


@pytest.mark.parametrize("content", ["{", "[]", {"image_processor": []}])
def test_unreadable_settings_are_refused(tmp_path: Path, content: Any) -> None:
    write(tmp_path, "processor_config.json", content)
    with pytest.raises(ConfigError, match=r"processor_config\.json"):
        PictureProcessor.open(tmp_path)


GOLDENS = json.loads((Path(__file__).parent / "data" / "media.json").read_text())


@pytest.mark.parametrize("golden", GOLDENS["unified_pictures"])
def test_pictures_without_a_tower_equal_upstream(golden: dict[str, Any]) -> None:
    processor = parse_processor(golden["settings"], unified=True)
    picture = processor(Image.fromarray(media_noise(*golden["size"])))
    assert len(picture.patches) == picture.soft_tokens == golden["soft_tokens"]
    assert digest(picture.patches, picture.positions) == golden["digest"]


def test_the_two_arithmetics_differ_by_little() -> None:
    """A mistaken choice between them would not be seen in an answer, so that it has a test."""
    image = noise(200, 150)
    towered = PictureProcessor(max_soft_tokens=70)(image)
    merged = PictureProcessor(max_soft_tokens=70, arithmetic="torch", merged=True)(image)
    side = PictureProcessor().patch_size * PictureProcessor().pooling
    columns = int(merged.positions[:, 0].max()) + 1
    whole = merged.patches.reshape(-1, columns, side, side, 3).swapaxes(1, 2)
    small = towered.patches.reshape(-1, columns * 3, 16, 16, 3).swapaxes(1, 2)
    difference = whole.reshape(-1, columns * side, 3) - small.reshape(-1, columns * side, 3)
    assert 0 < np.abs(difference).max() < 2.01 / 255


def vision(patch: int, pooling: int) -> VisionConfig:
    return VisionConfig(
        hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, head_dim=8, eps=1e-6,
        rope_theta=100.0, patch_size=patch, pooling=pooling, position_table_size=8, clipped=False,
        standardize=False,
    )  # fmt: skip


def patches(patch: int, pooling: int) -> PatchConfig:
    return PatchConfig(
        patch_size=patch, pooling=pooling, hidden_size=8, position_table_size=8, eps=1e-6
    )


def test_the_model_decides_whether_patches_are_merged(tmp_path: Path) -> None:
    assert not PictureProcessor.open(tmp_path, vision(16, 3)).merged
    unified = PictureProcessor.open(tmp_path, patches(16, 3))
    assert (unified.merged, unified.arithmetic) == (True, "torch")


@pytest.mark.parametrize("model", [vision(14, 3), vision(16, 2), patches(14, 3), patches(16, 2)])
def test_settings_that_contradict_the_model_are_refused(
    tmp_path: Path, model: VisionConfig | PatchConfig
) -> None:
    with pytest.raises(ConfigError, match=r"is (16|3), but the model's is (14|2)"):
        PictureProcessor.open(tmp_path, model)


@pytest.mark.parametrize(
    ("kind", "model"),
    [("Gemma4ImageProcessor", patches(16, 3)), ("Gemma4UnifiedImageProcessor", vision(16, 3))],
)
def test_the_processor_of_the_other_architecture_is_refused(
    tmp_path: Path, kind: str, model: VisionConfig | PatchConfig
) -> None:
    write(tmp_path, "preprocessor_config.json", {"image_processor_type": kind})
    with pytest.raises(ConfigError, match="image_processor_type"):
        PictureProcessor.open(tmp_path, model)


def test_a_filter_that_torch_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="resample is 4"):
        parse_processor({"resample": 4}, unified=True)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "PNG"), ("P", "PNG"), ("L", "PNG"), ("1", "PNG"),
        ("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"),
        ("RGB", "WEBP"), ("RGB", "GIF"), ("P", "GIF"), ("RGB", "BMP"), ("1", "BMP"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_decoded_pixels_are_those_of_upstream(
    tmp_path: Path, mode: str, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} if kind in {"PNG", "JPEG", "WEBP"} else {}
    data = encoded(noise(40, 30, mode), kind, **options)
    (tmp_path / "picture").write_bytes(data)
    expected = load_image(str(tmp_path / "picture"))
    found = decode_picture(data)
    assert expected.size == ((30, 40) if options and orientation > 4 else (40, 30))
    np.testing.assert_array_equal(np.asarray(found.convert("RGB")), np.asarray(expected))


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_transparency_of_a_file_shows_white_as_in_the_processor_of_upstream(
    mode: str, kind: str
) -> None:
    data = encoded(noise(40, 30, mode), kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = upstream(ImageOps.exif_transpose(Image.open(BytesIO(data))), max_soft_tokens=70)
    assert_same(PictureProcessor(max_soft_tokens=70)(decode_picture(data)), expected)


def test_only_the_first_frame_of_an_animation_counts() -> None:
    frames = [noise(20, 20), noise(20, 20).rotate(90), Image.new("RGB", (20, 20))]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, lossless=True, save_all=True, append_images=frames[1:])
        alone = encoded(frames[0], kind, lossless=True)
        found, expected = (np.asarray(decode_picture(d).convert("RGB")) for d in (data, alone))
        np.testing.assert_array_equal(found, expected)


def test_sixteen_bits_of_grey_become_eight_and_not_white() -> None:
    image = noise(20, 20, "I;16")
    found = np.asarray(decode_picture(encoded(image, "PNG")))
    np.testing.assert_array_equal(found, np.asarray(image) >> 8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes) -> bytes:
    """A greyscale PNG that claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def webp(width: int, height: int) -> bytes:
    """A WebP header that claims any size up to 2**24 a side."""
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides
    return b"RIFF" + struct.pack("<I", len(body)) + body


WHOLE_PNG = encoded(noise(64, 64), "PNG")
WHOLE_JPEG = encoded(noise(64, 64), "JPEG")
WHOLE_WEBP = encoded(noise(64, 64), "WEBP")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 100,
        b"GIF89a",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        WHOLE_PNG[:20],
        WHOLE_PNG[: len(WHOLE_PNG) // 2],
        WHOLE_JPEG[: len(WHOLE_JPEG) // 2],
        WHOLE_WEBP[: len(WHOLE_WEBP) // 2],
        WHOLE_PNG[:50] + b"\xff" * 30 + WHOLE_PNG[80:],
        encoded(noise(64, 64), "TIFF"),
        encoded(noise(64, 64), "PPM"),
        encoded(noise(64, 64), "ICO"),
        encoded(noise(64, 64), "JPEG2000"),
        png(0, 10, b""),
        png(10, 10, b"\x09" * 110),
        png(8_001, 8_001, b""),
        png(12_000, 12_000, b""),
        png(2**31 - 1, 2**31 - 1, b""),
        webp(16_000, 16_000),
        webp(2**24, 2**24),
    ],
    ids=range(21),
)
def test_bad_files_are_refused_in_our_own_words(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RequestError, match=r"^a picture ") as caught:
            decode_picture(data)
    text = str(caught.value)
    assert not any(word in text for word in ("0x7f", "BytesIO", "Error", "PIL", "object at"))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_the_pixels_of_a_bomb_are_not_decoded() -> None:
    """Sixty-four megapixels and a bit, of zeros that compress to nothing, end at the header."""
    import tracemalloc

    data = png(8_000, 8_001, bytes(8_001 * 8_001))
    tracemalloc.start()
    with pytest.raises(RequestError, match="8000x8001 is too large"):
        decode_picture(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_limits_can_be_set() -> None:
    with pytest.raises(RequestError, match="at most 100 are accepted"):
        decode_picture(WHOLE_PNG, max_bytes=100)
    with pytest.raises(RequestError, match="64x64 is too large; at most 4,095 pixels"):
        decode_picture(WHOLE_PNG, max_pixels=4095)
    assert decode_picture(WHOLE_PNG, max_pixels=4096).size == (64, 64)


@settings(max_examples=300, deadline=None)
@given(
    whole=st.sampled_from([WHOLE_PNG, WHOLE_JPEG, WHOLE_WEBP, encoded(noise(9, 9, "P"), "GIF")]),
    data=st.data(),
)
def test_damage_never_raises_anything_else(whole: bytes, data: st.DataObject) -> None:
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, min(200, len(whole) - 1)))] = data.draw(
            st.integers(0, 255)
        )
    with suppress(RequestError):
        PictureProcessor(max_soft_tokens=70)(decode_picture(bytes(damaged), max_pixels=100_000))


def test_odd_metadata_of_a_good_picture_is_no_news() -> None:
    exif = encoded(noise(8, 8), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x00")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_picture(exif).size == (8, 8)
