"""Score a checkpoint on questions it was not trained on: `python demo/evaluate.py DIR`.

An answer counts only when greedy decoding gives exactly the accepted one and then ends the turn.
Whether it does is read from a single pass over question and answer: greedy decoding repeats the
answer if, and only if, each of its tokens is the likeliest after the ones before.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from PIL import Image
from questions import held_out, red_or_blue
from smalltalk import text_only
from transformers import AutoTokenizer, Gemma4ForConditionalGeneration
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

Item = tuple[Image.Image | None, str, str, str]


class Judge:
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
        self.processor = Gemma4ImageProcessorPil(max_soft_tokens=settings["max_soft_tokens"])
        self.model = Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()

    def _encode(self, item: Item, soft_tokens: int) -> tuple[list[int], list[int]]:
        image, question, answer, _ = item
        content = [{"type": "text", "text": question}]
        if image is not None:
            content.insert(0, {"type": "image"})
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        prompt = prompt.replace("<|image|>", "<|image>" + "<|image|>" * soft_tokens + "<image|>")
        ids = [
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt, answer + "<turn|>")
        ]
        return ids[0], ids[1]

    @torch.no_grad()
    def right(self, items: list[Item]) -> list[bool]:
        images = [item[0] for item in items if item[0] is not None]
        seen = self.processor(images=images, return_tensors="pt") if images else {}
        soft_tokens = iter(torch.as_tensor(seen.pop("num_soft_tokens_per_image", [])).tolist())
        pairs = [self._encode(i, next(soft_tokens) if i[0] is not None else 0) for i in items]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.zeros(len(items), longest, dtype=torch.long)
        for row, (prompt, answer) in zip(ids, pairs, strict=True):
            row[: len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        logits = self.model(input_ids=ids, attention_mask=(ids != 0).long(), **seen).logits
        best = logits.argmax(-1)
        return [
            best[n, len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist() == answer
            for n, (prompt, answer) in enumerate(pairs)
        ]


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=1200, help="picture questions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", type=int, default=0, help="wrong ones to print")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    judge = Judge(args.checkpoint, getattr(torch, args.dtype))
    print(f"{args.checkpoint}, {args.dtype}, seed {args.seed}")
    for title, items in (
        ("pictures", held_out(args.seed, args.count)),
        ("red or blue", red_or_blue(args.seed, args.count // 6)),
        ("text", text_only(args.seed, args.count // 3)),
    ):
        score: dict[str, list[bool]] = defaultdict(list)
        for chunk in in_batches(items, 12):
            for item, good in zip(chunk, judge.right(chunk), strict=True):
                score[item[3]].append(good)
                if not good and args.show:
                    args.show -= 1
                    print(f"  wrong: {item[1]!r}, expected {item[2]!r}")
        print(f"\n| {title} | questions | exact |\n|---|---|---|")
        everything = list(chain.from_iterable(score.values()))
        for kind, good in [*sorted(score.items()), ("all", everything)]:
            print(f"| {kind} | {len(good)} | {100 * sum(good) / len(good):.1f} % |")


if __name__ == "__main__":
    main()
