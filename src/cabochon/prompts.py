"""From text, messages and media to the prompt that the engine runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from cabochon.config import Gemma4Config
from cabochon.engine.request import Prompt
from cabochon.errors import CabochonError, RequestError
from cabochon.gemma4.pictures import (
    SOFT_TOKEN_BUDGETS,
    Picture,
    PictureProcessor,
    decode_picture,
)
from cabochon.gemma4.sounds import SAMPLE_RATE, Sound, SoundProcessor, Wave, decode_sound
from cabochon.gemma4.videos import Video, VideoProcessor
from cabochon.text.chat import ChatTemplate
from cabochon.text.gguf import read_template, read_tokenizer
from cabochon.text.guard import Guard
from cabochon.text.tokenizer import Tokenizer

AnyPrompt = str | Sequence[int] | Prompt
Message = Mapping[str, Any]
MediaKind = Literal["image", "audio", "video"]

_VIDEO = "<|video|>"
_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one kind of media stands in a prompt: its token, those around it, and its name."""

    token: int
    start: int
    end: int
    name: str


_PARTS = ("text", "image", "audio", "video")


class Prompts:
    """Makes prompts for one checkpoint, with its own tokenizer, template and preprocessing."""

    def __init__(
        self, folder: Path, config: Gemma4Config, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Read what lies in `folder`, or stands in the `metadata` of a GGUF model.

        Raises:
            ConfigError: something is missing, malformed, or not what this version computes.
        """
        self.config = config
        if metadata is None:
            self.tokenizer = Tokenizer.open(folder)
            self.template = ChatTemplate.open(folder)
        else:
            self.tokenizer = read_tokenizer(metadata)
            self.template = read_template(metadata)
        self.pictures = PictureProcessor.open(folder, config.vision)
        self.sounds = SoundProcessor.open(folder, config.audio)
        self.videos = VideoProcessor.open(folder, config.vision)
        ids = config.tokens
        self._kinds = (
            _Kind(ids.image, ids.image_start, ids.image_end, "image"),
            _Kind(ids.audio, ids.audio_start, ids.audio_end, "audio"),
            _Kind(ids.video, ids.image_start, ids.image_end, "video"),
        )

    def limit_pictures(self, soft_tokens: int) -> None:
        """Let a picture take this many soft tokens instead of what the checkpoint says.

        Raises:
            CabochonError: not one of the numbers that Gemma 4 was trained with.
        """
        if soft_tokens not in SOFT_TOKEN_BUDGETS:
            expected = ", ".join(map(str, SOFT_TOKEN_BUDGETS))
            raise CabochonError(f"picture_tokens is {soft_tokens}, expected one of {expected}")
        self.pictures = replace(self.pictures, max_soft_tokens=soft_tokens)
        self.pictures.check(self.config.vision)

    def picture(self, image: Image.Image | bytes) -> Picture:
        """What the model sees of a picture, or of the bytes of an untrusted file of one.

        Raises:
            RequestError: the model does not see, the file cannot be decoded, or the picture has a
                shape that the model has no positions for.
        """
        self.check_sense("image")
        if not isinstance(image, Image.Image | bytes):
            raise RequestError(
                f"a picture is a PIL image or the bytes of a file, not a {type(image).__name__}"
            )
        if isinstance(image, bytes):
            image = decode_picture(image)
        return self._within_table(self.pictures(image))

    def sound(self, wave: Wave | bytes) -> Sound:
        """What the model hears of a wave, or of the bytes of an untrusted file of sound.

        Upstream cuts a sound that is too long, and gives one that is too short no place in the
        prompt. Nothing is dropped here in silence.

        Raises:
            RequestError: the model does not hear, the file cannot be decoded, or the sound is
                longer or shorter than what the model hears.
        """
        self.check_sense("audio")
        if isinstance(wave, bytes):
            wave = decode_sound(wave)
        sound, longest = self.sounds(wave), self.sounds.longest
        seconds = len(wave) / SAMPLE_RATE
        if longest is not None and len(wave) > longest:
            raise RequestError(
                f"a sound of {seconds:.2f} seconds is longer than the {longest / SAMPLE_RATE:g}"
                " that this model hears; send it in pieces"
            )
        if not sound.soft_tokens:
            raise RequestError(
                f"a sound of {len(wave)} samples ({seconds:.3f} seconds at 16 kHz) is too short for"
                " this model to hear"
            )
        return sound

    def video(self, data: bytes, check: Callable[[], None] | None = None) -> Video:
        """What the model sees of the bytes of an untrusted video file.

        `check` is called for each packet and frame; what it raises ends the decoding.

        Raises:
            RequestError: the model does not see, the file cannot be decoded, or its frames have a
                shape that the model has no positions for.
        """
        self.check_sense("video")
        video = self.videos(data, check)
        for frame in video.frames:
            self._within_table(frame)
        return video

    @property
    def longest_picture(self) -> int:
        """Soft tokens of the largest picture or frame."""
        return max(self.pictures.max_soft_tokens, self.videos.frames.max_soft_tokens)

    def close(self) -> None:
        """End the template's process; it comes back if it is needed after all."""
        self.template.close()

    def check_sense(self, kind: MediaKind) -> None:
        """Say what the model lacks, before anything is decoded or counted.

        Raises:
            RequestError: the model takes no media of this kind.
        """
        if kind == "audio":
            if self.config.audio is None:
                raise RequestError(
                    "this model does not hear: its checkpoint has no audio", "messages"
                )
        elif self.config.vision is None:
            raise RequestError("this model does not see: its checkpoint has no vision", "messages")

    def complete(self, prompts: AnyPrompt | Sequence[AnyPrompt]) -> list[Prompt]:
        """What the model is to go on with: one prompt, or several.

        Text that does not start with the beginning-of-sequence token gets it: Gemma repeats itself
        without. Token ids and `Prompt`s are taken as they are.
        """
        return [self.raw(_begun(prompt)) for prompt in _as_list(prompts)]

    def raw(
        self,
        prompt: AnyPrompt,
        images: Sequence[Image.Image | Picture] = (),
        sounds: Sequence[Wave | Sound] = (),
        videos: Sequence[bytes | Video] = (),
    ) -> Prompt:
        """Tokens of `prompt` exactly as written, with each media token expanded to its soft tokens.

        Special tokens stand in the text by their names: `<bos>`, one `<|image|>`, `<|audio|>` or
        `<|video|>` for each of the media, in order. Token ids may also bring media expanded
        already, as upstream's processor does. Media may come as `picture`, `sound` and `video`
        made them. A `Prompt` is one already.

        Raises:
            RequestError: media and their tokens differ in number, or the model cannot take them.
        """
        if isinstance(prompt, Prompt):
            assert not any((images, sounds, videos))
            return prompt
        films = self._films(videos)
        if isinstance(prompt, str):
            prompt = _with_timestamps(prompt, films)
        return self._filled(self._tokens(prompt), images, sounds, films)

    def _films(self, videos: Sequence[bytes | Video]) -> list[Video]:
        return [v if isinstance(v, Video) else self.video(v) for v in videos]

    def _filled(
        self,
        tokens: list[int],
        images: Sequence[Image.Image | Picture],
        sounds: Sequence[Wave | Sound],
        films: Sequence[Video],
    ) -> Prompt:
        """A prompt of `tokens` with the soft tokens of its media."""
        made: tuple[Sequence[Picture | Sound], ...] = (
            [i if isinstance(i, Picture) else self.picture(i) for i in images],
            [w if isinstance(w, Sound) else self.sound(w) for w in sounds],
            [frame for film in films for frame in film.frames],
        )
        for kind, items in zip(self._kinds, made, strict=True):
            tokens = _expand(tokens, kind, items)
        media = tuple(self._placed(tokens, made)) if any(made) else ()
        return Prompt(tuple(tokens), media)

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        try:
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise RequestError("a prompt is a string or a row of token ids", "prompt") from None

    def chat(self, messages: Sequence[Message], **template: Any) -> Prompt:
        """The prompt that the checkpoint's chat template makes of `messages`.

        A message has a `role` and a `content`: a string, or a list of parts
        `{"type": "text", "text": str}`, `{"type": "image", "image": PIL.Image.Image}`,
        `{"type": "audio", "audio": float32 wave, mono, 16 kHz}`,
        `{"type": "video", "video": bytes}`; media also as `picture`, `sound` and `video` make them.
        `template` goes to the template (`enable_thinking=True`, for example).

        Raises:
            RequestError: no messages, or the template refuses them.
        """
        if not messages:
            raise RequestError("messages is empty; give at least one", "messages")
        own = {"messages", "add_generation_prompt"} & set(template)
        if own:
            raise RequestError(f"{', '.join(sorted(own))} cannot be set from outside")
        parts = [part for message in messages for part in _parts(message)]
        messages = [_plain_system(message, i) for i, message in enumerate(messages)]
        guard = Guard(self.tokenizer, messages, template)
        text = self.template.render(
            guard.protect(messages), add_generation_prompt=True, **guard.protect(template)
        )
        images, sounds, videos = (
            [part[kind] for part in parts if part.get("type") == kind]
            for kind in ("image", "audio", "video")
        )
        films = self._films(videos)
        tokens = guard.encode(_with_timestamps(text, films))
        return replace(self._filled(tokens, images, sounds, films), turn=True)

    def _within_table(self, picture: Picture) -> Picture:
        """`picture`, if the model has learnt a position for each of its patches."""
        assert self.config.vision is not None
        known = self.config.vision.position_table_size
        across, down = (int(most) + 1 for most in picture.positions.max(axis=0))
        if max(across, down) > known:
            raise RequestError(
                f"a picture of this shape becomes {across} x {down} patches, but the model has"
                f" positions for {known} either way; send one that is less long and narrow"
            )
        return picture

    def _placed(
        self, tokens: list[int], made: Sequence[Sequence[Picture | Sound]]
    ) -> Iterator[tuple[int, Picture | Sound]]:
        """Each medium with the position of its first soft token, in the order of the prompt."""
        kinds = {kind.token: iter(items) for kind, items in zip(self._kinds, made, strict=True)}
        position = 0
        while position < len(tokens):
            following = kinds.get(tokens[position])
            if following is None:
                position += 1
            else:
                item = next(following, None)
                length = 0 if item is None else item.soft_tokens
                run = tokens[position : position + length]
                if item is None or run != [tokens[position]] * length:
                    raise RequestError(
                        f"the soft tokens from place {position} on are not those of the media in"
                        " their order",
                        "messages",
                    )
                yield position, item
                position += length


def _begun(prompt: AnyPrompt) -> AnyPrompt:
    bare = isinstance(prompt, str) and not prompt.startswith("<bos>")
    return f"<bos>{prompt}" if bare else prompt


def _as_list(prompts: AnyPrompt | Sequence[AnyPrompt]) -> list[AnyPrompt]:
    """Several prompts, also where one was given: text, a `Prompt`, or a row of token ids."""
    if isinstance(prompts, str | Prompt):
        return [prompts]
    many: list[Any] = list(prompts)
    row = many and not isinstance(many[0], str | Prompt) and np.ndim(many[0]) == 0
    return [many] if row else many


def _parts(message: Message) -> list[Mapping[str, Any]]:
    """The parts of a message; none where its content is a string.

    Raises:
        RequestError: not a message, or a part that is not understood. Templates write nothing for
            what they do not know.
    """
    if not isinstance(message, Mapping):
        raise RequestError(
            f"a message is a mapping with role and content, not a {type(message).__name__}",
            "messages",
        )
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _PARTS or kind not in part:
            keys = sorted(map(str, part)) if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(
                f"a part of a message is of type {kind!r} with the keys {keys}; expected one of"
                f" {', '.join(_PARTS)} under a key of that name",
                "messages",
            )
    return parts


def _plain_system(message: Message, index: int) -> Message:
    """A system message's parts as one string: Gemma's own template takes no list there.

    Raises:
        RequestError: there is something else than text among them.
    """
    content = message.get("content")
    if message.get("role") not in _SYSTEM or not isinstance(content, list):
        return message
    if any(part.get("type") != "text" for part in content):
        raise RequestError(
            f"a message of role {message['role']!r} is of text alone; media belong to a user",
            f"messages[{index}].content",
        )
    return {**message, "content": "".join(part["text"] for part in content)}


def _with_timestamps(prompt: str, videos: Sequence[Video]) -> str:
    """`prompt` with a video token for each frame, behind its time of the form 00:07."""
    if not videos:
        return prompt
    pieces = prompt.split(_VIDEO)
    if len(pieces) - 1 != len(videos):
        raise _count_error("video", len(pieces) - 1, len(videos))
    films = (" ".join(f"{time} {_VIDEO}" for time in video.timestamps) for video in videos)
    return "".join(chain.from_iterable(zip(pieces, chain(films, [""]), strict=True)))


def _expand(tokens: list[int], kind: _Kind, items: Sequence[Picture | Sound]) -> list[int]:
    """Each token of `kind` as many times as its medium has soft tokens, between start and end."""
    found = tokens.count(kind.token)
    if not found and not items:
        return tokens
    whole = found == sum(item.soft_tokens for item in items)
    # One token may stand for a short sound, or be the whole of it: then its start is before it.
    if whole and tokens[tokens.index(kind.token) - 1] == kind.start:
        return tokens
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
