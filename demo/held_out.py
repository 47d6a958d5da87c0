"""Write the demo's held-out questions as files that `cabochon eval --task pictures` reads.

python demo/held_out.py FOLDER [--count 1200] [--seed 1]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from questions import held_out, red_or_blue


def write(items: Iterable[tuple[Image.Image, str, str, str]], folder: Path, name: str) -> Path:
    """Pictures and `name`.jsonl in `folder`; returns the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for index, (picture, question, answer, kind) in enumerate(items):
            image = f"{name}-{index:05}.png"
            picture.save(folder / image)
            row = {"image": image, "question": question, "answer": answer, "kind": kind}
            file.write(json.dumps(row) + "\n")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(write(held_out(options.seed, options.count), options.folder, "pictures"))
    print(write(red_or_blue(options.seed, 200), options.folder, "red-or-blue"))


if __name__ == "__main__":
    main()
