"""How many tokens a step draws when guesses are looked up, on texts that people wrote.

    python bench/drafts.py [REPOSITORY] [--most 6]

Three kinds of answers, token by token as they stand (no model writes them): the new version of a
file after a prompt that holds the old one, from the history of a git repository; the second half of
a page of its documentation after the first; and the second half of a file of code. The tokenizer is
a BPE of 32,768 tokens, trained on Python's own library.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cabochon.engine.drafts import Drafter

ROWS = 8  # texts shorter than so many tokens say nothing
EDITS = 120


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32768, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library = Path(sysconfig.get_paths()["stdlib"])
    tokenizer.train([str(path) for path in sorted(library.glob("*.py"))], trainer)
    return tokenizer


def git(repository: Path, *args: str) -> str:
    return subprocess.run(
        ["git", "-C", str(repository), *args], capture_output=True, text=True, check=True
    ).stdout


def edits(repository: Path) -> Iterator[tuple[str, str]]:
    """Old and new versions of files that commits changed, the latest first."""
    found = 0
    for commit in git(repository, "log", "--format=%h", "--no-merges").split():
        changed = git(
            repository,
            "diff-tree",
            "-r",
            "--no-commit-id",
            "--diff-filter=M",
            "--name-only",
            commit,
        ).splitlines()
        for name in changed:
            if name.endswith((".py", ".md", ".h", ".cpp")) and found < EDITS:
                found += 1
                yield (
                    git(repository, "show", f"{commit}~:{name}"),
                    git(repository, "show", f"{commit}:{name}"),
                )


def halves(repository: Path, *endings: str) -> Iterator[tuple[str, str]]:
    for name in git(repository, "ls-files").splitlines():
        if name.endswith(endings) and not name.startswith("tests/fixtures"):
            text = (repository / name).read_text(encoding="utf-8")
            yield text[: len(text) // 2], text[len(text) // 2 :]


def draw(prompt: list[int], answer: list[int], most: int) -> tuple[int, int]:
    """Steps that an answer takes, and the rows that they compute."""
    drafter, tokens = Drafter(), [*prompt, answer[0]]
    steps = rows = done = 1
    while done < len(answer):
        guesses = drafter.guess(tokens, min(most, len(answer) - done - 1))
        right = 0
        while right < len(guesses) and guesses[right] == answer[done + right]:
            right += 1
        if guesses:
            drafter.judge(len(guesses), right)
        tokens += answer[done : done + right + 1]
        done += right + 1
        steps, rows = steps + 1, rows + 1 + len(guesses)
    return steps, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--most", type=int, default=6, help="guesses a step")
    args = parser.parse_args()
    tokenizer = train()
    for name, texts in (
        ("a file with a change", edits(args.repository)),
        ("the second half of a page", halves(args.repository, ".md")),
        ("the second half of a file of code", halves(args.repository, ".py")),
    ):
        gains, total, steps, rows = [], 0, 0, 0
        for prompt, answer in texts:
            one, other = tokenizer.encode(prompt).ids, tokenizer.encode(answer).ids
            if min(len(one), len(other)) < ROWS:
                continue
            took, computed = draw(one, other, args.most)
            gains.append(len(other) / took)
            total, steps, rows = total + len(other), steps + took, rows + computed
        print(
            f"{name}: {len(gains)} texts, {total:,} tokens, {total / steps:.2f} a step (median text"
            f" {statistics.median(gains):.2f}), {rows / steps:.2f} rows a step"
        )


if __name__ == "__main__":
    main()
