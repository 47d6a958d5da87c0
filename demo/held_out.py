"""Write the demo's test questions as files that `cabochon eval --task questions` reads.

python demo/held_out.py FOLDER [--count 1200] [--seed 1]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from questions import held_out, red_or_blue
from smalltalk import text_only

Item = tuple[Image.Image | None, str, str, str]


def write(items: Iterable[Item], folder: Path, name: str) -> Path:
    """`name`.jsonl in `folder`, with its pictures beside it; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for index, (picture, question, answer, kind) in enumerate(items):
            row = {"question": question, "answer": answer, "kind": kind}
            if picture is not None:
                row["image"] = f"{name}-{index:05}.png"
                picture.save(folder / row["image"])
            file.write(json.dumps(row) + "\n")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(write(held_out(options.seed, options.count), options.folder, "pictures"))
    print(write(red_or_blue(options.seed, options.count // 6), options.folder, "red-or-blue"))
    print(write(text_only(options.seed, options.count // 3), options.folder, "text"))


if __name__ == "__main__":
    main()
