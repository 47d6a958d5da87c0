"""Draw the example pictures: `python demo/pictures.py`."""

from pathlib import Path

from scenes import COLOURS, PLACES, Item, Scene, draw

EXAMPLES: dict[str, tuple[tuple[int, int], str, tuple[tuple[str, str, str], ...]]] = {
    "plain-red": ((320, 200), "red", ()),
    "plain-blue": ((200, 320), "blue", ()),
    "red-circle": ((240, 240), "white", (("red", "circle", "in the centre"),)),
    "green-triangle": ((200, 280), "yellow", (("green", "triangle", "at the bottom"),)),
    "two-shapes": (
        (320, 200),
        "white",
        (("blue", "square", "on the left"), ("orange", "triangle", "on the right")),
    ),
    "three-shapes": (
        (256, 256),
        "black",
        (
            ("yellow", "circle", "at the top left"),
            ("red", "square", "at the top right"),
            ("green", "triangle", "at the bottom left"),
        ),
    ),
    "four-shapes": (
        (300, 240),
        "white",
        (
            ("purple", "square", "at the top left"),
            ("green", "circle", "at the top right"),
            ("red", "triangle", "at the bottom left"),
            ("blue", "circle", "at the bottom right"),
        ),
    ),
}


def main() -> None:
    folder = Path(__file__).parent / "pictures"
    folder.mkdir(exist_ok=True)
    for name, ((width, height), background, shapes) in EXAMPLES.items():
        items = tuple(
            Item(shape, colour, COLOURS[colour][0], place, *PLACES[place], 0.22)
            for colour, shape, place in shapes
        )
        scene = Scene(width, height, background, COLOURS[background][0], items, smooth=True)
        draw(scene).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
