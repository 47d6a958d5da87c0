"""Cost against context and against batch, drawn from what `cabochon bench --json` measured.

    cabochon bench MODEL --streams 1 --prompts 8,512,1024,2048,4096,8192 --json contexts.json
    cabochon bench MODEL --streams 1,2,4,8,16 --prompts 8,512 --json streams.json
    python bench/plot.py contexts.json streams.json docs/pictures/cost.svg

Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "cabochon"  # the same figures make the same file
matplotlib.rcParams["svg.fonttype"] = "none"
from matplotlib import pyplot  # noqa: E402

Rates = Sequence[Mapping[str, Any]]


def read(path: str) -> tuple[Rates, str]:
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    limits = found["limits"]["read"] / 1e9
    return found["rates"], f"{found['model']}, {found['threads']} threads, {limits:.0f} GB/s read"


def draw(
    axes: Any, rates: Rates, x: str, y: Callable[[Mapping[str, Any]], float], **texts: str
) -> None:
    points = sorted((rate[x], y(rate)) for rate in rates)
    axes.plot(*zip(*points, strict=True), marker="o", label=texts.pop("label", None))
    axes.set(**texts)
    axes.autoscale()
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def main() -> None:
    contexts, streams, out = sys.argv[1:]
    alone, about = read(contexts)
    together, _ = read(streams)
    figure, (prefill, decode, batch) = pyplot.subplots(1, 3, figsize=(13, 4))
    draw(
        prefill,
        alone,
        "prompt",
        lambda rate: float(rate["first"]),
        title="a prompt",
        xlabel="tokens of prompt",
        ylabel="seconds to the first token",
    )
    draw(
        decode,
        alone,
        "prompt",
        lambda rate: 1000 / rate["decode"],
        title="a token, by what stands before it",
        xlabel="tokens of context",
        ylabel="milliseconds",
    )
    for prompt in sorted({rate["prompt"] for rate in together}):
        own = [rate for rate in together if rate["prompt"] == prompt]
        draw(
            batch,
            own,
            "streams",
            lambda rate: 1000 * rate["streams"] / rate["decode"],
            label=f"after {prompt} tokens",
            title="a step, by its streams",
            xlabel="streams",
            ylabel="milliseconds",
        )
    batch.legend()
    figure.suptitle(about, fontsize=9)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
