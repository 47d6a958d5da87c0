"""How many tokens a step draws with guesses, and how fast that is.

    python bench/guesses.py [REPOSITORY] [--most 15] [--model MODEL [--drafter DRAFTER]]

Looked up, in three kinds of answers, token by token as they stand (no model writes them): the new
version of a file after a prompt that holds the old one, from the history of a git repository; the
second half of a page of its documentation after the first; and the second half of a file of code.
The tokenizer is a BPE of 32,768 tokens, trained on Python's own library.

With a model, its answers are drawn with as many guesses in each step, and as many right ones, as in
the text of each kind that is in the middle: what it says itself does not matter for its speed.
With a drafter too, that one guesses, and as many of its guesses are put right as `--right` says: a
drafter of random weights takes as long as a trained one.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cabochon import LLM, SamplingParams
from cabochon.assembly import DRAFT_TOKENS
from cabochon.engine.drafts import Drafts
from cabochon.engine.guesses import Guesser, Guesses, Reach
from cabochon.engine.scheduler import TokenSequence
from cabochon.kernels.arena import settled

LEAST = 8  # texts shorter than so many tokens say nothing
EDITS = 120
LENGTH, ROUNDS = 300, 3  # of what a model says


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


Trace = list[tuple[int, int]]  # of each step: guesses, and right ones


def follow(prompt: list[int], answer: list[int], most: int) -> Trace:
    """The steps that draw `answer`."""
    guesses, tokens = Guesses(), [*prompt, answer[0]]
    trace, done = [(0, 0)], 1
    while done < len(answer):
        guesses.find(tokens, min(most, len(answer) - done - 1))
        guessed, right = guesses.tokens, 0
        while right < len(guessed) and guessed[right] == answer[done + right]:
            right += 1
        guesses.judge(right)
        tokens += answer[done : done + right + 1]
        done += right + 1
        trace.append((len(guessed), right))
    return trace


def imagined(rates: Sequence[float], most: int, length: int) -> Trace:
    """Steps of a drafter of whose guesses such shares are right, the first, the second, ...

    Behind the last that is known, shares go on falling as they did.
    """
    reach, rng, rates = Reach(), random.Random(1), list(rates)
    while len(rates) < most:
        rates.append(rates[-1] * rates[-1] / rates[-2])
    trace, done = [(0, 0)], 1
    while done < length:
        guessed = min(most, reach.now(), length - done - 1)
        luck = rng.random()
        right = sum(luck < rate for rate in rates[:guessed])
        if guessed:
            reach.judge(guessed, right)
        done += right + 1
        trace.append((guessed, right))
    return trace


class Replay(Guesser):
    """Guesses as right and as wrong as in `trace`, knowing the answer; a drafter works in vain."""

    def __init__(
        self, trace: Trace, prompt: int, answer: Sequence[int], drafts: Drafts | None
    ) -> None:
        super().__init__(max((guessed for guessed, _ in trace), default=0))
        self._steps = iter(trace)
        self._prompt, self._answer = prompt, answer
        self._work = drafts

    def __call__(self, sequences: Sequence[TokenSequence]) -> None:
        for sequence in sequences:
            guessed, right = next(self._steps, (0, 0))
            if self._work is not None and guessed:
                self._work([sequence], guessed)
            at = len(sequence.tokens) - self._prompt
            true = list(self._answer[at : at + right])
            wrong = [self._answer[at + right] ^ 1] if at + right < len(self._answer) else []
            most = sequence.limit - len(sequence.tokens) - 1
            sequence.guesses.tokens = [*true, *wrong * (guessed - right)][:most]


def replay(llm: LLM, trace: Trace, drafts: Drafts | None = None) -> tuple[float, float]:
    """Tokens a second with such guesses, and without any."""
    length = min(LENGTH, sum(right + 1 for _, right in trace))
    prompt = [2, *(random.Random(0).randrange(1000, 200_000) for _ in range(511))]
    params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    answer: tuple[int, ...] = ()
    speeds: dict[bool, list[float]] = {False: [], True: []}
    for guessing in (False, *[False, True] * ROUNDS):  # the first says what the answer is
        steps = trace[1:] if guessing else []
        llm.engine.scheduler.guesser = Replay(steps, len(prompt), answer, drafts)
        clock, tokens = [], []
        for delta in llm.stream(llm.prompts.raw(prompt), params):
            tokens += delta.tokens
            clock.append(time.perf_counter())
        assert not answer or answer == tuple(tokens), "guesses change nothing"
        answer = tuple(tokens)
        speeds[guessing].append((len(tokens) - 1) / (clock[-1] - clock[0]))
    return statistics.median(speeds[True]), statistics.median(speeds[False][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--most", type=int, default=DRAFT_TOKENS, help="guesses a step")
    parser.add_argument("--model", help="whose speed is measured")
    parser.add_argument("--drafter", help="that guesses for the model")
    parser.add_argument(
        "--right", default="0.92,0.78,0.67,0.57", help="share of its guesses, by their place"
    )
    args = parser.parse_args()
    llm = None
    if args.model:
        llm = LLM(args.model, max_context=2048, drafter=args.drafter, draft_tokens=args.most)
        settled()
    if llm is not None and args.drafter:
        drafts = llm.engine.scheduler.guesser.drafts
        assert drafts is not None
        rates = [float(rate) for rate in args.right.split(",")]
        tell("a drafter", [imagined(rates, args.most, LENGTH)], llm, drafts)
        return
    tokenizer = train()
    for name, texts in (
        ("a file with a change", edits(args.repository)),
        ("the second half of a page", halves(args.repository, ".md")),
        ("the second half of a file of code", halves(args.repository, ".py")),
    ):
        traces = []
        for prompt, answer in texts:
            one, other = tokenizer.encode(prompt).ids, tokenizer.encode(answer).ids
            if min(len(one), len(other)) >= LEAST:
                traces.append(follow(one, other, args.most))
        tell(name, traces, llm)


def tell(name: str, traces: list[Trace], llm: LLM | None, drafts: Drafts | None = None) -> None:
    """How many tokens steps draw in all of `traces`, and how fast the one in the middle is."""
    total = sum(right + 1 for trace in traces for _, right in trace)
    steps = sum(map(len, traces))
    rows = sum(guessed + 1 for trace in traces for guessed, _ in trace)
    print(
        f"{name}: {len(traces)} texts, {total:,} tokens, {total / steps:.2f} a step,"
        f" {rows / steps:.2f} rows a step",
        flush=True,
    )
    if llm is not None:
        long = [trace for trace in traces if sum(r + 1 for _, r in trace) >= LENGTH]
        long.sort(key=lambda trace: sum(r + 1 for _, r in trace) / len(trace))
        fast, plain = replay(llm, long[len(long) // 2], drafts)
        print(f"  {fast:.1f} tokens/s, {plain:.1f} without guesses: {fast / plain:.2f} times")


if __name__ == "__main__":
    main()
