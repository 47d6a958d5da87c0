"""The tokenizer and the other small files of the checkpoint, as a Gemma 4 download has them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

from model import VOCABULARY
from questions import ask
from scenes import MAX_SOFT_TOKENS, random_scene
from smalltalk import CAN, HELLO, NO_PICTURE, REPLIES, SYSTEM, UNKNOWN, WHO, chat
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

SPECIAL = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<channel|>",
    "<|think|>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
    "<|image>",
    "<|image|>",
    "<image|>",
    "<|audio>",
    "<|audio|>",
    "<audio|>",
    "<|video|>",
]

# A message's pictures come before its text whatever the order of its parts: the model was
# trained on pictures first only.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'image' -%}
            {{- '<|image|>' -}}
        {%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {{- part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def _corpus() -> Iterator[str]:
    rng = Random("tokenizer")
    pairs = [ask(rng, random_scene(rng)) for _ in range(4000)] + [chat(rng) for _ in range(2000)]
    lines = [f"{pair.text}\n {pair.answer}" for pair in pairs]
    lines += 20 * [WHO, CAN, HELLO, UNKNOWN, NO_PICTURE, *REPLIES, *SYSTEM]
    lines += 500 * ["user\nmodel\nsystem\n"]
    for line in lines:
        yield from re.findall(r" ?[A-Za-z]+|\d|[^A-Za-z\d ]| ", line)


def train_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """BPE with byte fallback over text whose spaces are written as U+2581; digits stay single."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw_bytes = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[*SPECIAL, *raw_bytes], show_progress=False
        ),
    )
    # The trainer can only reserve the byte tokens as special ones; Gemma's are ordinary.
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in SPECIAL]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
            "sot_token": "<|turn>",
            "eot_token": "<turn|>",
        },
        chat_template=CHAT_TEMPLATE,
    )


def save_side_files(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Everything a checkpoint holds besides its weights and config.json."""
    tokenizer.save_pretrained(folder)
    # Whether this tokenizer was itself loaded from a folder is nobody's business.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {k: v for k, v in settings.items() if k not in ("is_local", "local_files_only")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    image = Gemma4ImageProcessorPil(max_soft_tokens=MAX_SOFT_TOKENS).to_dict()
    video = {**image, "video_processor_type": "Gemma4VideoProcessor"}
    del video["image_processor_type"]
    processor = {
        "processor_class": "Gemma4Processor",
        "image_seq_length": MAX_SOFT_TOKENS,
        "audio_seq_length": 750,
        "audio_ms_per_token": 40,
        "image_processor": {**image, "image_processor_type": "Gemma4ImageProcessor"},
        "video_processor": video,
        "feature_extractor": Gemma4AudioFeatureExtractor().to_dict(),
    }
    generation = {
        "bos_token_id": 2,
        "eos_token_id": [1, 5],
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }
    for name, content in (("processor", processor), ("generation", generation)):
        text = json.dumps(content, indent=2, default=str) + "\n"
        (folder / f"{name}_config.json").write_text(text)
