"""Things in a checkpoint that other programs would run. Here none of them is: they are only told.

Code in a repository is what `trust_remote_code` runs elsewhere; a pickle runs code when it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cabochon.errors import ConfigError
from cabochon.files import read_json_object

_CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
_KINDS: Mapping[str, str] = {
    **dict.fromkeys((".py", ".pyc", ".ipynb"), "Python code"),
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"), "a pickle"),
    **dict.fromkeys((".so", ".dll", ".dylib", ".exe", ".pyd", ".whl"), "machine code or a package"),
    **dict.fromkeys((".sh", ".bat", ".ps1", ".js"), "a script"),
}


@dataclass(frozen=True, slots=True)
class Executable:
    """`where` is a file of the checkpoint, or a key in one."""

    where: str
    what: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def executables(folder: Path, files: Collection[str]) -> tuple[Executable, ...]:
    """What in `folder`, whose files have these names, some program might run."""
    return (*_keys(folder), *_files(files))


def _files(files: Collection[str]) -> Iterator[Executable]:
    for name in sorted(files):
        kind = _KINDS.get(PurePosixPath(name).suffix.lower())
        if kind is not None:
            yield Executable(name, kind)


def _keys(folder: Path) -> Iterator[Executable]:
    for name in _CONFIGS:
        try:
            config = read_json_object(folder / name)
        except ConfigError:
            continue  # told where the file is needed
        for key in _KEYS:
            if config.get(key):
                yield Executable(f"{name}: {key}", f"names code to load: {_short(config[key])}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."
