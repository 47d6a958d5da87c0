"""From text, messages and media to the prompt that the engine runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from cabochon.config import Gemma4Config
from cabochon.engine.request import Prompt
from cabochon.errors import RequestError
from cabochon.gemma4.pictures import Picture, PictureProcessor
from cabochon.gemma4.sounds import Sound, SoundProcessor, Wave
from cabochon.gemma4.videos import Video, VideoProcessor
from cabochon.text.chat import ChatTemplate
from cabochon.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
_VIDEO = "<|video|>"


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one kind of media stands in a prompt: its token, those around it, and its name."""

    token: int
    start: int
    end: int
    name: str


class Prompts:
    """Makes prompts for one checkpoint, with its own tokenizer, template and preprocessing."""

    def __init__(self, folder: Path, config: Gemma4Config) -> None:
        self.config = config
        self.tokenizer = Tokenizer.open(folder)
        self.template = ChatTemplate.open(folder)
        self.pictures = PictureProcessor.open(folder, config.vision)
        self.sounds = SoundProcessor.open(folder, config.audio)
        self.videos = VideoProcessor.open(folder, config.vision)
        ids = config.tokens
        self._kinds = (
            _Kind(ids.image, ids.image_start, ids.image_end, "image"),
            _Kind(ids.audio, ids.audio_start, ids.audio_end, "audio"),
            _Kind(ids.video, ids.image_start, ids.image_end, "video"),
        )

    def raw(
        self,
        prompt: str | Sequence[int],
        images: Sequence[Image.Image] = (),
        sounds: Sequence[Wave] = (),
        videos: Sequence[bytes] = (),
    ) -> Prompt:
        """Tokens of `prompt` exactly as written, with each media token expanded to its soft tokens.

        Special tokens stand in the text by their names: `<bos>`, one `<|image|>`, `<|audio|>` or
        `<|video|>` for each of the media, in order. Token ids may also bring media expanded
        already, as upstream's processor does.

        Raises:
            RequestError: media and their tokens differ in number, or the model cannot take them.
        """
        self._check_senses(images, sounds, videos)
        frames: list[Picture] = []
        if videos:
            films = [self.videos(data) for data in videos]
            frames = [frame for film in films for frame in film.frames]
            if isinstance(prompt, str):
                prompt = _with_timestamps(prompt, films)
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        made: list[Sequence[Picture | Sound]] = [
            [self.pictures(image) for image in images],
            [self.sounds(wave) for wave in sounds],
            frames,
        ]
        for kind, items in zip(self._kinds, made, strict=True):
            tokens = _expand(tokens, kind, items)
        return Prompt(tuple(tokens), tuple(self._placed(tokens, made)))

    def chat(self, messages: Sequence[Message], **template: Any) -> Prompt:
        """The prompt that the checkpoint's chat template makes of `messages`.

        A message has a `role` and a `content`: a string, or a list of parts
        `{"type": "text", "text": str}`, `{"type": "image", "image": PIL.Image.Image}`,
        `{"type": "audio", "audio": float32 wave, mono, 16 kHz}`,
        `{"type": "video", "video": bytes}`.
        `template` goes to the template (`enable_thinking=True`, for example).

        Raises:
            RequestError: no messages, or the template refuses them.
        """
        if not messages:
            raise RequestError("messages is empty; give at least one", "messages")
        contents = (message.get("content") for message in messages)
        parts = list(chain.from_iterable(c for c in contents if isinstance(c, list)))
        text = self.template.render(messages, add_generation_prompt=True, **template)
        images, sounds, videos = (
            [part[kind] for part in parts if part.get("type") == kind]
            for kind in ("image", "audio", "video")
        )
        return self.raw(text, images, sounds, videos)

    def _check_senses(
        self, images: Sequence[Any], sounds: Sequence[Any], videos: Sequence[Any]
    ) -> None:
        """Say what the model lacks before anything is decoded or counted."""
        if (images or videos) and self.config.vision is None:
            raise RequestError("this model does not see: its checkpoint has no vision", "messages")
        if sounds and self.config.audio is None:
            raise RequestError("this model does not hear: its checkpoint has no audio", "messages")

    def _placed(
        self, tokens: Sequence[int], made: Sequence[Sequence[Picture | Sound]]
    ) -> Iterator[tuple[int, Picture | Sound]]:
        """Each medium with the position of its first soft token, in the order of the prompt."""
        kinds = {
            kind.token: (item for item in items if item.soft_tokens)  # a click may have none
            for kind, items in zip(self._kinds, made, strict=True)
        }
        position = 0
        while position < len(tokens):
            following = kinds.get(tokens[position])
            if following is None:
                position += 1
            else:
                item = next(following)
                yield position, item
                position += item.soft_tokens


def _with_timestamps(prompt: str, videos: Sequence[Video]) -> str:
    """`prompt` with a video token for each frame, behind its time of the form 00:07."""
    pieces = prompt.split(_VIDEO)
    if len(pieces) - 1 != len(videos):
        raise _count_error("video", len(pieces) - 1, len(videos))
    films = (" ".join(f"{time} {_VIDEO}" for time in video.timestamps) for video in videos)
    return "".join(chain.from_iterable(zip(pieces, chain(films, [""]), strict=True)))


def _expand(tokens: Sequence[int], kind: _Kind, items: Sequence[Picture | Sound]) -> list[int]:
    """Each token of `kind` as many times as its medium has soft tokens, between start and end."""
    found = tokens.count(kind.token)
    if items and found == sum(item.soft_tokens for item in items):
        return list(tokens)
    if found != len(items):
        raise _count_error(kind.name, found, len(items))
    following = iter(items)

    def expanded() -> Iterable[int]:
        for token in tokens:
            if token == kind.token:
                yield kind.start
                yield from [token] * next(following).soft_tokens
                yield kind.end
            else:
                yield token

    return list(expanded())


def _count_error(name: str, found: int, given: int) -> RequestError:
    return RequestError(
        f"the prompt has {found} {name} tokens for {given} of that kind;"
        f" write one <|{name}|> for each",
        "messages",
    )
