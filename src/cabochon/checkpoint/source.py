"""What MODEL may be: a path on this machine, or the name of a repository on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_NAME}/{_NAME})((?:/[\w.-]+)+\.(?:gguf|safetensors))?(?:@([\w./-]+))?")
_FILES = (".gguf", ".safetensors", ".header", ".json", ".bin", ".pt")


@dataclass(frozen=True, slots=True)
class HubId:
    """`org/name`, `org/name@revision`, `org/name/file.gguf`: a model on the hub."""

    repo: str
    revision: str | None = None  # a branch, a tag or a commit; None: the repository's main branch
    file: str | None = None  # one file of it; None: what makes up the model in its folder

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{self.repo}{file}{f'@{self.revision}' if self.revision else ''}"


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint on this machine: its folder or file, and what to call it."""

    path: Path
    name: str
    shown: str  # in reports: the path as it was given, or the hub's id, with the commit if known


def hub_id(model: str | Path) -> HubId | None:
    """The repository that `model` names. None if it is a path: if there is one, or it looks so."""
    text = str(model)
    match = _ID.fullmatch(text)
    if match is None or Path(text).exists():
        return None
    repo, file, revision = match.groups()
    if file is None and repo.endswith(_FILES):  # a file that is not there
        return None
    return HubId(repo, revision, file[1:] if file else None)
