"""In which file a problem lies, where a checkpoint is in several: the one to fetch again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from cabochon.checkpoint.headers import TensorMeta
from cabochon.load.names import ancestors
from cabochon.load.plan import Problem

_OF_TENSORS = {"SHAPE", "DTYPE", "SCHEME", "UNUSED"}  # that are stored


def in_their_files(
    problems: Iterable[Problem], stored: Mapping[str, TensorMeta]
) -> Iterator[Problem]:
    """`problems`, with the files of the tensors of each; those of a matrix may lie in two.

    `stored` is by canonical name.
    """
    homes: dict[str, set[Path]] = {}
    if len({meta.file for meta in stored.values()}) > 1:
        for canonical, meta in stored.items():
            for name in {canonical, meta.name}:
                for part in ancestors(name):
                    homes.setdefault(part, set()).add(meta.file)
    for problem in problems:
        files = homes.get(problem.where.removesuffix(".*"), ())
        if problem.kind in _OF_TENSORS and 0 < len(files) <= 2:
            names = " and ".join(sorted(file.name for file in files))
            problem = replace(problem, detail=f"{problem.detail}; in {names}")
        yield problem
