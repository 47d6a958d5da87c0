"""`LLM`: a checkpoint, loaded and ready. What the command line, the server and Python callers share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from cabochon.config import Gemma4Config
from cabochon.engine.cache import CachePlan, Chunk, PagedCache
from cabochon.engine.engine import Engine
from cabochon.engine.request import Completion, Prompt, SamplingParams
from cabochon.engine.runner import Runner, check_pictures
from cabochon.engine.scheduler import Scheduled, TokenSequence
from cabochon.engine.stream import Stream
from cabochon.errors import ConfigError, RequestError
from cabochon.gemma4.pictures import Picture, PictureProcessor
from cabochon.load.execute import load_model
from cabochon.text.chat import ChatTemplate
from cabochon.text.tokenizer import Tokenizer

Dtype = Literal["auto", "float32", "bfloat16"]
Message = Mapping[str, Any]

DEMO_NAME = "cabochon-demo"


def default_model() -> Path:
    """The folder of the demo checkpoint that comes with the package."""
    return Path(__file__).parent / "demo"


class LLM:
    """A Gemma 4 checkpoint behind an engine.

    Args:
        model: A checkpoint folder; None for the demo.
        dtype: What activations are computed in. "auto" is float32, the faster and exacter one on
            processors without bfloat16 arithmetic.
        threads: Of torch; None leaves its own choice.
        kv_cache_bytes: For keys and values; None takes at most an eighth of the machine's memory.
        max_batch: Requests computed together.
        prefill_chunk: Prompt tokens computed in one step, among all requests.
        max_context: Tokens of prompt and answer; None takes what model and cache allow.
        progress: Called while loading with bytes done and bytes in all.

    Raises:
        UnreadableError, ConfigError: the folder is no readable Gemma 4 checkpoint.
        LoadError: the checkpoint would not load exactly right; the text is the plan's report.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: Dtype = "auto",
        threads: int | None = None,
        kv_cache_bytes: int | None = None,
        max_batch: int = 16,
        prefill_chunk: int = 512,
        max_context: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        folder = default_model() if model is None else Path(model)
        self.name = DEMO_NAME if model is None else folder.resolve().name
        if threads is not None:
            torch.set_num_threads(threads)
        compute = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        gemma, self.report = load_model(folder, dtype=compute, progress=progress)
        self.config: Gemma4Config = gemma.config
        self.tokenizer = Tokenizer.open(folder)
        self.template = ChatTemplate.open(folder)
        self.pictures = PictureProcessor.open(folder)
        self.defaults, ends = _generation_defaults(folder)
        self.prefill_chunk = prefill_chunk
        self.runner = Runner(gemma, compute, torch.device("cpu"))
        budget = kv_cache_bytes or _memory() // 8
        plan = CachePlan.fit(
            self.config.text, compute, budget, max_batch, prefill_chunk, max_context
        )
        self.max_context = plan.max_context
        self.engine = Engine(
            self.runner, plan, self.tokenizer, ends=ends, prefill_chunk=prefill_chunk
        )

    def prompt(
        self, prompt: str | Sequence[int], images: Sequence[Image.Image] = ()
    ) -> Prompt:
        """Tokens of `prompt`, exactly as written, with each image token expanded to its picture.

        Special tokens stand in the text by their names: `<bos>`, one `<|image|>` a picture.
        Token ids may also bring each picture expanded, as upstream's processor does.

        Raises:
            RequestError: the pictures and the image tokens differ in number.
        """
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if images and self.config.vision is None:
            raise RequestError("this model does not see pictures: it has no vision tower", "messages")
        pictures = tuple(self.pictures(image) for image in images)
        return Prompt(tuple(self._expand(tokens, pictures)), pictures)

    def chat_prompt(self, messages: Sequence[Message], **template: Any) -> Prompt:
        """The prompt that the checkpoint's chat template makes of `messages`.

        A message has a `role` and a `content`: a string, or a list of parts
        `{"type": "text", "text": str}` and `{"type": "image", "image": PIL.Image.Image}`.
        `template` goes to the template (`enable_thinking=True`, for example).

        Raises:
            RequestError: no messages, or the template refuses them.
        """
        if not messages:
            raise RequestError("messages is empty; give at least one", "messages")
        parts = [
            part
            for message in messages
            if isinstance(message.get("content"), list)
            for part in message["content"]
        ]
        images = [part["image"] for part in parts if part.get("type") == "image"]
        text = self.template.render(messages, add_generation_prompt=True, **template)
        return self.prompt(text, images)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Deltas as they come. Closing the stream cancels the request.

        Raises:
            RequestError: the request is refused; the stream itself raises if it fails on the way.
        """
        return Stream(self.engine, prompt, params or self.defaults)

    def generate(
        self, prompts: str | Sequence[int] | Prompt | Sequence[str | Prompt],
        params: SamplingParams | None = None,
    ) -> list[Completion]:
        """Answers to one or several prompts, computed together, in order.

        Text that does not start with the beginning-of-sequence token gets it: Gemma repeats itself
        without. Token ids and `Prompt`s are taken as they are.
        """
        many = [self._generation_prompt(p) for p in _as_list(prompts)]
        with ExitStack() as stack:  # an error in one cancels those that still run
            streams = [stack.enter_context(self.stream(prompt, params)) for prompt in many]
            return [stream.collect() for stream in streams]

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **template: Any
    ) -> Completion:
        """The answer to a conversation; see `chat_prompt` for the messages."""
        return self.generate(self.chat_prompt(messages, **template), params)[0]

    @torch.inference_mode()
    def logits(
        self, prompt: str | Sequence[int], images: Sequence[Image.Image] = ()
    ) -> Tensor:
        """Logits after the soft-cap at every position of `prompt`: `[tokens, vocab_size]`, float32.

        The prompt goes through a cache of its own, in the chunks in which serving would compute it.
        """
        full = self.prompt(prompt, images)
        length = len(full.tokens)
        plan = CachePlan.single(self.config.text, length, self.prefill_chunk)
        cache = PagedCache(plan, self.runner.dtype, self.runner.device)
        sequence = TokenSequence(full, cache.new_table(), list(full.tokens))
        check_pictures(self.runner.model, sequence)
        self.runner.see(sequence)
        parts = []
        for start in range(0, length, self.prefill_chunk):
            chunk = Chunk(sequence.table, start, min(start + self.prefill_chunk, length))
            assert cache.reserve(chunk)
            parts.append(self.runner.run(cache, [Scheduled(sequence, chunk)], every=True))
        return torch.cat(parts)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _generation_prompt(self, prompt: str | Sequence[int] | Prompt) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str) and not prompt.startswith("<bos>"):
            prompt = "<bos>" + prompt
        return self.prompt(prompt)

    def _expand(self, tokens: Sequence[int], pictures: Sequence[Picture]) -> list[int]:
        config = self.config
        found = tokens.count(config.image_token_id)
        if pictures and found == sum(picture.soft_tokens for picture in pictures):
            return list(tokens)
        if found != len(pictures):
            raise RequestError(
                f"the prompt has {found} image tokens for {len(pictures)} pictures;"
                " write one <|image|> for each picture",
                "messages",
            )
        following = iter(pictures)
        expanded: list[int] = []
        for token in tokens:
            if token == config.image_token_id:
                soft = [token] * next(following).soft_tokens
                expanded += [config.boi_token_id, *soft, config.eoi_token_id]
            else:
                expanded.append(token)
        return expanded


def _as_list(
    prompts: str | Sequence[int] | Prompt | Sequence[str | Prompt],
) -> list[str | Sequence[int] | Prompt]:
    if isinstance(prompts, str | Prompt):
        return [prompts]
    if all(isinstance(p, int) for p in prompts):
        return [[p for p in prompts if isinstance(p, int)]]
    return [p for p in prompts if not isinstance(p, int)]


def _generation_defaults(folder: Path) -> tuple[SamplingParams, frozenset[int]]:
    """Sampling defaults and end tokens of `generation_config.json`, which may be absent."""
    path = folder / "generation_config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        ends = raw.get("eos_token_id", 1)
        defaults = SamplingParams(
            temperature=float(raw.get("temperature") or 1.0),
            top_k=int(raw.get("top_k") or 0),
            top_p=float(raw.get("top_p") or 1.0),
        )
        if raw.get("do_sample") is False:
            defaults = replace(defaults, temperature=0.0)
        return defaults, frozenset([ends] if isinstance(ends, int) else map(int, ends))
    except (OSError, ValueError, TypeError, AttributeError, RequestError) as error:
        raise ConfigError(f"{path} cannot be used: {error}") from None


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
