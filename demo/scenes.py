"""Pictures of coloured shapes: what is in them, how they are drawn, what each place shows."""

from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw

# Several hues go by the same name; a drawn colour is a random mix of two of them.
COLOURS: dict[str, list[tuple[int, int, int]]] = {
    "red": [(255, 0, 0), (225, 35, 30), (200, 15, 35)],
    "blue": [(0, 0, 255), (35, 60, 225), (20, 80, 200)],
    "green": [(0, 128, 0), (40, 165, 60), (0, 200, 40)],
    "yellow": [(255, 255, 0), (240, 215, 40), (255, 230, 60)],
    "purple": [(128, 0, 128), (140, 50, 170), (150, 40, 200)],
    "orange": [(255, 165, 0), (245, 140, 30), (255, 130, 0)],
    "black": [(0, 0, 0), (20, 20, 20), (30, 30, 35)],
    "white": [(255, 255, 255), (245, 245, 245), (250, 248, 240)],
}
SHAPES = ("circle", "square", "triangle")

# Centre of each place, as fractions of the width and of the height.
PLACES: dict[str, tuple[float, float]] = {
    "in the centre": (0.5, 0.5),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.26),
    "at the bottom": (0.5, 0.74),
    "at the top left": (0.25, 0.26),
    "at the top right": (0.75, 0.26),
    "at the bottom left": (0.25, 0.74),
    "at the bottom right": (0.75, 0.74),
}
_SIDES = ["on the left", "on the right"]
_ENDS = ["at the top", "at the bottom"]
_CORNERS = ["at the top left", "at the top right", "at the bottom left", "at the bottom right"]
_CENTRE = "in the centre"

# The processor turns a picture into at most 630 patches of 16 pixels, pooled three by three.
PATCH, POOL, MAX_SOFT_TOKENS = 16, 3, 70


@dataclass(frozen=True)
class Item:
    """One shape. `x` and `y` are fractions of the picture's sides, `radius` of its shorter one."""

    shape: str
    colour: str
    rgb: tuple[int, int, int]
    place: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background and at most four shapes, listed in reading order."""

    width: int
    height: int
    background: str
    background_rgb: tuple[int, int, int]
    items: tuple[Item, ...]
    smooth: bool


def _hue(rng: Random, colour: str) -> tuple[int, int, int]:
    a, b = rng.choice(COLOURS[colour]), rng.choice(COLOURS[colour])
    t = rng.random()
    mixed = (round(p + (q - p) * t + rng.uniform(-10, 10)) for p, q in zip(a, b, strict=True))
    red, green, blue = (max(0, min(255, v)) for v in mixed)
    return red, green, blue


def plain_size(rng: Random) -> tuple[int, int]:
    """Any size and any aspect ratio, up to far wider and far taller than photographs are."""
    spread = rng.choice([0.0, 0.3, 0.7, 1.5, 4.2])
    ratio = 2.718281828 ** rng.uniform(-spread, spread)
    side = 2.718281828 ** rng.uniform(1.5, 6.0)
    return max(1, round(side * ratio**0.5)), max(1, round(side / ratio**0.5))


def _places(rng: Random, count: int, ratio: float) -> list[str]:
    if count == 1:
        return [rng.choice(list(PLACES))]
    patterns = [rng.sample(_CORNERS, count)]
    if count == 2:
        patterns += [_SIDES, _ENDS]
    if count == 3 and ratio > 1.5:
        patterns += [[*_SIDES, _CENTRE]]
    if count == 3 and ratio < 1 / 1.5:
        patterns += [[*_ENDS, _CENTRE]]
    return rng.choice(patterns)


def _item(rng: Random, place: str, count: int, ratio: float, background: str) -> Item:
    colour = rng.choice([name for name in COLOURS if name != background])
    x, y = PLACES[place]
    if count == 3 and place in _SIDES:
        x = 0.18 if x < 0.5 else 0.82
    if count == 3 and place in _ENDS:
        y = 0.18 if y < 0.5 else 0.82
    largest = 0.225
    if count == 1:
        largest = 0.42 if place == _CENTRE else 0.3
    radius = rng.uniform(0.2, largest)
    # Keep the whole shape inside the picture, then move it a little along each side.
    margin_x, margin_y = radius / max(ratio, 1.0), radius * min(ratio, 1.0)
    x = min(max(x + rng.uniform(-0.02, 0.02), margin_x), 1 - margin_x)
    y = min(max(y + rng.uniform(-0.02, 0.02), margin_y), 1 - margin_y)
    return Item(rng.choice(SHAPES), colour, _hue(rng, colour), place, x, y, radius)


def random_scene(rng: Random, counts: tuple[int, ...] = (0, 1, 1, 1, 2, 2, 3, 4)) -> Scene:
    """Draw the number of shapes from `counts`, then everything else."""
    count = rng.choice(counts)
    background = rng.choice(list(COLOURS))
    if count == 0:
        width, height = plain_size(rng)
    else:
        ratio = 2.718281828 ** rng.choice([0.0, rng.uniform(-0.58, 0.58)])
        side = rng.uniform(90, 420)
        width, height = round(side * ratio**0.5), round(side / ratio**0.5)
    ratio = width / height
    places = _places(rng, count, ratio) if count else []
    items = [_item(rng, place, count, ratio, background) for place in places]
    items.sort(key=lambda item: (PLACES[item.place][1], PLACES[item.place][0]))
    smooth = rng.random() < 0.5
    return Scene(width, height, background, _hue(rng, background), tuple(items), smooth)


def _paint(image: Image.Image, item: Item, ratio: float, fill: tuple[int, int, int] | int) -> None:
    """Paint one shape into an image, which may be a squeezed one of a picture of that `ratio`."""
    pen = ImageDraw.Draw(image)
    x, y = item.x * image.width, item.y * image.height
    rx = item.radius * image.width * min(1.0, 1 / ratio)
    ry = item.radius * image.height * min(1.0, ratio)
    if item.shape == "triangle":
        pen.polygon([(x, y - ry), (x - rx, y + ry), (x + rx, y + ry)], fill=fill)
    elif item.shape == "square":
        pen.rectangle([x - rx, y - ry, x + rx, y + ry], fill=fill)
    else:
        pen.ellipse([x - rx, y - ry, x + rx, y + ry], fill=fill)


def draw(scene: Scene) -> Image.Image:
    scale = 3 if scene.smooth else 1
    size = (scene.width * scale, scene.height * scale)
    image = Image.new("RGB", size, scene.background_rgb)
    for item in scene.items:
        _paint(image, item, scene.width / scene.height, item.rgb)
    return image.reduce(scale) if scale > 1 else image


def item_labels(item: Item) -> dict[str, int]:
    """Class numbers of an item's shape, colour and place; 0 is for none."""
    return {
        "shape": 1 + SHAPES.index(item.shape),
        "colour": 1 + list(COLOURS).index(item.colour),
        "place": 1 + list(PLACES).index(item.place),
    }


def soft_token_labels(scene: Scene, columns: int, rows: int) -> dict[str, np.ndarray]:
    """What each soft token of a `columns` x `rows` grid shows, for the auxiliary training loss.

    -100 marks what the loss should ignore: a token half covered by a shape is neither.
    """
    fine = 8
    cover = np.zeros((rows, columns), np.int64)
    unsure = np.zeros((rows, columns), bool)
    for number, item in enumerate(scene.items, 1):
        mask = Image.new("L", (columns * fine, rows * fine))
        _paint(mask, item, scene.width / scene.height, 1)
        part = np.asarray(mask, np.float32).reshape(rows, fine, columns, fine).mean((1, 3))
        cover[part > 0.5] = number
        unsure |= (part > 0.15) & (part < 0.6)
    labels = {}
    for name in ("shape", "colour", "place"):
        labels[name] = np.array([0, *(item_labels(item)[name] for item in scene.items)])[cover]
        labels[name][unsure] = -100
    labels["background"] = np.full((rows, columns), list(COLOURS).index(scene.background))
    labels["count"] = np.full((rows, columns), len(scene.items))
    centre = np.zeros((rows, columns), np.int64)
    for item in scene.items:
        centre[int(item.y * rows), int(item.x * columns)] = 1
    labels["centre"] = centre
    return {name: values.reshape(-1) for name, values in labels.items()}


LABEL_CLASSES = {
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "place": len(PLACES) + 1,
    "background": len(COLOURS),
    "count": 5,
    "centre": 2,
}


def grid(width: int, height: int) -> tuple[int, int]:
    """Columns and rows of soft tokens the Gemma 4 image processor makes of a picture."""
    cell = PATCH * POOL
    factor = (MAX_SOFT_TOKENS * cell * cell / (width * height)) ** 0.5
    columns, rows = int(factor * width / cell), int(factor * height / cell)
    if rows == 0:
        return min(width // height, MAX_SOFT_TOKENS), 1
    if columns == 0:
        return 1, min(height // width, MAX_SOFT_TOKENS)
    return columns, rows


def patches(image: Image.Image) -> tuple[np.ndarray, int, int]:
    """The processor's patches, still as bytes, and the size of the grid in soft tokens."""
    columns, rows = grid(*image.size)
    cell = PATCH * POOL
    pixels = np.asarray(image.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC))
    tall, wide = rows * POOL, columns * POOL
    split = pixels.reshape(tall, PATCH, wide, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(split).reshape(tall * wide, -1), columns, rows
