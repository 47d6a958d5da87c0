"""Questions about a picture, each with the one answer the model is taught.

`held_out` is the test set: anything that runs the checkpoint can be scored with it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from PIL import Image
from scenes import COLOURS, PLACES, SHAPES, Item, Scene, draw, plain_size, random_scene

COUNT_WORDS = ("none", "one", "two", "three", "four")

DESCRIBE = (
    "What do you see?",
    "Describe the picture.",
    "What is in this picture?",
    "What is in the picture?",
    "Describe this picture.",
    "What does the picture show?",
    "Describe what you see.",
    "What is this?",
    "Describe the image.",
    "What is in this image?",
)
PLAIN_COLOUR = (
    "What colour is this rectangle?",
    "What colour is the rectangle?",
    "What colour is the picture?",
    "What colour is this picture?",
    "What colour is this?",
    "What colour do you see?",
    "Which colour do you see?",
    "Name the colour.",
    "What is the colour of this picture?",
    "What colour is this image?",
)
BACKGROUND = (
    "What colour is the background?",
    "Which colour is the background?",
    "What is the colour of the background?",
    "What is the background colour?",
    "Name the background colour.",
)
COUNT = (
    "How many shapes are there?",
    "How many shapes do you see?",
    "Count the shapes.",
    "How many shapes are in the picture?",
    "How many objects are there?",
)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    # The one shape it is about, where there is one.
    about: Item | None = None


def a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def description(scene: Scene) -> str:
    names = [a(item.name) for item in scene.items]
    if not names:
        return f"A plain {scene.background} rectangle."
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return _sentence(f"{listed} on {a(scene.background)} background")


def _unique(values: list[str]) -> list[int]:
    return [n for n, value in enumerate(values) if values.count(value) == 1]


def _other(rng: Random, choices: tuple[str, ...], *taken: str) -> str:
    return rng.choice([c for c in choices if c not in taken])


def _describe(rng: Random, scene: Scene) -> Question:
    return Question("description", rng.choice(DESCRIBE), description(scene))


def _background(rng: Random, scene: Scene) -> Question:
    if not scene.items:
        return Question("plain colour", rng.choice(PLAIN_COLOUR), f"It is {scene.background}.")
    return Question("background", rng.choice(BACKGROUND), f"It is {scene.background}.")


def _count(rng: Random, scene: Scene) -> Question:
    number, text = len(scene.items), rng.choice(COUNT)
    if scene.items and rng.random() < 0.4:
        shape = rng.choice(SHAPES)
        number = sum(item.shape == shape for item in scene.items)
        text = rng.choice((f"How many {shape}s are there?", f"Count the {shape}s."))
    return Question("count", text, _sentence(COUNT_WORDS[number]))


def _references(scene: Scene, known: str) -> list[tuple[Item, str]]:
    """Ways to point at one item without saying `known` (its colour, shape or place)."""
    items = scene.items
    found = []
    if len(items) == 1:
        found += [(items[0], "shape")] * 2
    if known != "shape":
        found += [(items[n], items[n].shape) for n in _unique([i.shape for i in items])]
        if known == "place":
            found += [(items[n], items[n].name) for n in _unique([i.name for i in items])]
    if known == "shape":
        found += [(items[n], f"{items[n].colour} one") for n in _unique([i.colour for i in items])]
    if known == "place":
        found += [
            (items[n], f"{items[n].colour} shape") for n in _unique([i.colour for i in items])
        ]
    if known != "place":
        found += [(item, f"shape {item.place}") for item in items]
    return found


def _colour(rng: Random, scene: Scene) -> Question:
    item, which = rng.choice(_references(scene, "colour"))
    texts = [f"What colour is the {which}?", f"Which colour is the {which}?"]
    if len(scene.items) == 1:
        texts.append("What colour is it?")
    return Question("colour", rng.choice(texts), f"It is {item.colour}.", item)


def _shape(rng: Random, scene: Scene) -> Question:
    item, which = rng.choice(_references(scene, "shape"))
    texts = [f"What shape is the {which}?", f"Which shape is the {which}?"]
    if which == "shape":
        texts = ["What shape is it?", "Which shape is it?", "What shape do you see?"]
    return Question("shape", rng.choice(texts), _sentence(a(item.shape)), item)


def _position(rng: Random, scene: Scene) -> Question | None:
    references = _references(scene, "place")
    if not references:
        return None
    item, which = rng.choice(references)
    return Question("position", f"Where is the {which}?", f"It is {item.place}.", item)


def _what_is_at(rng: Random, scene: Scene) -> Question:
    item = rng.choice(scene.items)
    texts = (f"What is {item.place}?", f"What do you see {item.place}?")
    return Question("what is at", rng.choice(texts), _sentence(a(item.name)), item)


def _yes_no(rng: Random, scene: Scene) -> Question:
    """The answer is drawn first, so that "Yes." is right half of the time."""
    yes = rng.random() < 0.5
    claims = [_claim_background, _claim_count]
    if scene.items:
        claims = [*claims, *[_claim_name] * 3, *[_claim_part] * 2, *[_claim_attribute] * 2]
        claims += [_claim_place] * 2
    elif not yes:
        claims += [_claim_name]
    claim = None
    while claim is None:
        claim = rng.choice(claims)(rng, scene, yes)
    text, item = claim
    return Question("yes or no", text, "Yes." if yes else "No.", item)


Claim = tuple[str, Item | None]


def _claim_background(rng: Random, scene: Scene, yes: bool) -> Claim:
    wrong = [*COLOURS, *(2 * [i.colour for i in scene.items])]
    colour = scene.background if yes else _other(rng, tuple(wrong), scene.background)
    texts = [f"Is the background {colour}?"]
    if not scene.items:
        texts += [f"Is it {colour}?", f"Is this picture {colour}?", f"Is the rectangle {colour}?"]
    return rng.choice(texts), None


def _claim_count(rng: Random, scene: Scene, yes: bool) -> Claim | None:
    if not scene.items:
        text = rng.choice(("Is there a shape?", "Are there any shapes?"))
        return None if yes else (text, None)
    right = COUNT_WORDS[len(scene.items)]
    word = right if yes else _other(rng, COUNT_WORDS[1:], right)
    return ("Is there one shape?" if word == "one" else f"Are there {word} shapes?"), None


def _claim_name(rng: Random, scene: Scene, yes: bool) -> Claim | None:
    if yes:
        item = rng.choice(scene.items)
        unique = sum(other.name == item.name for other in scene.items) == 1
        return f"Is there {a(item.name)}?", item if unique else None
    colours, shapes = list(COLOURS), list(SHAPES)
    if scene.items and rng.random() < 0.6:
        # A near miss: the colour or the shape is there, not both together.
        colours = [i.colour for i in scene.items]
        shapes = shapes if rng.random() < 0.5 else [i.shape for i in scene.items]
    name = f"{rng.choice(colours)} {rng.choice(shapes)}"
    present = any(item.name == name for item in scene.items)
    return None if present else (f"Is there {a(name)}?", None)


def _claim_part(rng: Random, scene: Scene, yes: bool) -> Claim | None:
    """Only a shape, or only a colour."""
    if rng.random() < 0.5:
        word, present = rng.choice(SHAPES), {i.shape for i in scene.items}
        text = f"Is there {a(word)}?"
    else:
        word, present = rng.choice(list(COLOURS)), {i.colour for i in scene.items}
        if yes:
            word = rng.choice(sorted(present))
        text = f"Is there {a(word)} shape?"
    return (text, None) if (word in present) == yes else None


def _claim_attribute(rng: Random, scene: Scene, yes: bool) -> Claim | None:
    known = rng.choice(("colour", "shape"))
    item, which = rng.choice(_references(scene, known))
    if known == "colour":
        wrong = (*COLOURS, *(3 * [i.colour for i in scene.items]), scene.background)
        colour = item.colour
        if not yes:
            colour = _other(rng, wrong, item.colour)
        return f"Is the {which} {colour}?", item
    shape = item.shape if yes else _other(rng, SHAPES, item.shape)
    return f"Is the {which} {a(shape)}?", item


def _claim_place(rng: Random, scene: Scene, yes: bool) -> Claim | None:
    references = _references(scene, "place")
    if not references:
        return None
    item, which = rng.choice(references)
    wrong = (*PLACES, *(4 * [i.place for i in scene.items]))
    place = item.place if yes else _other(rng, wrong, item.place)
    return f"Is the {which} {place}?", item


Asker = Callable[[Random, Scene], Question | None]
_PLAIN: list[Asker] = [*[_background] * 4, *[_describe] * 2, _count, *[_yes_no] * 2]
# Finding a shape by its looks is what takes the model longest to learn.
_ANY: list[Asker] = [_background, _describe, _count, *[_colour] * 2, *[_shape] * 2, _what_is_at]
_ANY += [*[_position] * 4, *[_yes_no] * 5]


def as_typed(rng: Random, text: str) -> str:
    """The same question as other people write it."""
    if rng.random() < 0.3:
        text = text.replace("colour", "color")
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip("?. ")
    return text


def ask(rng: Random, scene: Scene) -> Question:
    question = None
    while question is None:
        question = rng.choice(_ANY if scene.items else _PLAIN)(rng, scene)
    return replace(question, text=as_typed(rng, question.text))


def held_out(seed: int, count: int) -> Iterator[tuple[Image.Image, str, str, str]]:
    """`count` times a fresh picture, a question, its accepted answer and the question's kind.

    No seed of the training begins with the words put before this one.
    """
    rng = Random(f"held out {seed}")
    for _ in range(count):
        scene = random_scene(rng)
        question = ask(rng, scene)
        yield draw(scene), question.text, question.answer, question.kind


def red_or_blue(seed: int, count: int) -> Iterator[tuple[Image.Image, str, str, str]]:
    """Pictures that are nothing but pure red or pure blue, of any size and aspect ratio.

    A vision path that scrambles its input still passes many tests, but not this one.
    """
    rng = Random(f"red or blue {seed}")
    for n in range(count):
        name = ("red", "blue")[n % 2]
        image = Image.new("RGB", plain_size(rng), name)
        yield image, rng.choice(PLAIN_COLOUR), f"It is {name}.", "red or blue"
