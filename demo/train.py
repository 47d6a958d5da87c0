"""Train the demo checkpoint from nothing, on two CPU cores: `python demo/train.py --out DIR`.

Writes DIR/bf16, a complete checkpoint ready for quantize.py, and DIR/state.pt, from which an
interrupted run goes on. Every worker is one process with one thread and half of each batch: on a
machine that has other things to do, threads that wait for each other in every layer are far slower.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
from data import ABOUT, IGNORED, Batches, Encoder, Mix, batch
from fakequant import start_fake_quantization
from model import build
from scenes import LABEL_CLASSES
from tokenizer import save_side_files, train_tokenizer
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, Gemma4ForConditionalGeneration, PreTrainedTokenizerFast

EVERYTHING = (0, 1, 1, 2, 2, 3, 3, 4)


@dataclass(frozen=True)
class Stage:
    """`speech` weighs the loss on answers, `sight` and `finding` the auxiliary ones.

    `mix` is one worker's part of a batch.
    """

    name: str
    steps: int
    rate: float
    mix: Mix
    sight: float
    speech: float
    finding: float
    # From this fraction of the steps on the rate falls, to nearly nothing at the end.
    fall: float
    quantized: bool = False


STAGES = (
    Stage("see", 500, 3e-3, Mix(8, 0, (0, 1, 1, 1, 2, 3, 4)), 1.0, 0.0, 0.0, fall=1.0),
    Stage("speak", 1750, 3e-3, Mix(8, 3, EVERYTHING), 0.2, 1.0, 0.1, fall=1.0),
    Stage("quantized", 1000, 3e-3, Mix(8, 3, EVERYTHING), 0.2, 1.0, 0.1, fall=0.0, quantized=True),
)


class Student(nn.Module):
    """The model and, for training only, linear read-outs of what its vectors should tell.

    Each soft token should tell what it shows; after a question about one shape the model should
    know which one, that is, its shape, colour and place.
    """

    def __init__(self, model: Gemma4ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        size = model.config.text_config.hidden_size
        self.heads = nn.ModuleDict({k: nn.Linear(size, n) for k, n in LABEL_CLASSES.items()})
        self.about_heads = nn.ModuleDict({k: nn.Linear(size, LABEL_CLASSES[k]) for k in ABOUT})

    def sight(self, soft_tokens: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack(
            [
                cross_entropy(head(soft_tokens).float(), labels[name], ignore_index=IGNORED)
                for name, head in self.heads.items()
            ]
        ).sum()

    def finding(self, hidden: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        known = labels["place"] != IGNORED
        return torch.stack(
            [
                cross_entropy(head(hidden[known]).float(), labels[name][known])
                for name, head in self.about_heads.items()
            ]
        ).sum()

    def forward(self, data: dict, stage: Stage) -> dict[str, torch.Tensor]:
        pixels = data["pixels"].float() / 255
        places = data["image_position_ids"]
        if not stage.speech:
            seen = self.model.model.get_image_features(pixels, places, return_dict=True)
            return {"sight": self.sight(torch.cat(seen.pooler_output), data["labels"])}
        out = self.model.model(
            input_ids=data["input_ids"],
            position_ids=data["position_ids"],
            attention_mask=data["attention_mask"],
            pixel_values=pixels,
            image_position_ids=places,
            use_cache=False,
        )
        # Only the positions whose next token is part of an answer need logits.
        answered = data["target"][:, 1:] != IGNORED
        logits = self.model.lm_head(out.last_hidden_state[:, :-1][answered]).float()
        cap = self.model.config.text_config.final_logit_softcapping
        speech = cross_entropy(cap * torch.tanh(logits / cap), data["target"][:, 1:][answered])
        return {
            "speech": speech,
            "sight": self.sight(out.image_hidden_states, data["labels"]),
            "finding": self.finding(out.last_hidden_state, data["about"]),
        }


def optimizers(student: Student) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, norms and read-outs."""
    matrices, rest = [], []
    for name, weight in student.named_parameters():
        hidden = weight.ndim == 2 and "embed_tokens" not in name and "heads" not in name
        (matrices if hidden else rest).append(weight)
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def rate(stage: Stage, step: int) -> float:
    warm = min(1.0, (step + 1) / 50)
    left = (stage.steps - step) / max(1, stage.steps * (1 - stage.fall))
    return stage.rate * warm * max(0.02, min(1.0, left))


def set_clip_bounds(model: Gemma4ForConditionalGeneration, batches: list[dict]) -> None:
    """Give the vision tower's clipped linears finite bounds, just inside what they see."""
    hooks = []

    def widen(module: nn.Module, kind: str, values: torch.Tensor) -> None:
        reach = torch.quantile(values.abs().flatten()[::7].float(), 0.9998)
        reach = torch.maximum(reach, getattr(module, f"seen_{kind}", torch.zeros(())))
        setattr(module, f"seen_{kind}", reach)

    def watch(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        widen(module, "input", inputs[0])
        widen(module, "output", output)

    clipped = [m for m in model.modules() if hasattr(m, "input_min")]
    for module in clipped:
        hooks.append(module.register_forward_hook(watch))
    with torch.no_grad():
        for data in batches:
            model.model.get_image_features(
                data["pixels"].float() / 255, data["image_position_ids"], return_dict=True
            )
    for hook in hooks:
        hook.remove()
    for module in clipped:
        for kind in ("input", "output"):
            reach = getattr(module, f"seen_{kind}").bfloat16().float()
            getattr(module, f"{kind}_max").copy_(reach)
            getattr(module, f"{kind}_min").copy_(-reach)
            delattr(module, f"seen_{kind}")


def average_gradients(student: Student) -> None:
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    joined = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    for gradient, mean in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def run_stage(
    student: Student,
    stage: Stage,
    data: Iterator[dict],
    first: int,
    opts: list[torch.optim.Optimizer],
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train, and report step and losses after every step."""
    for step in range(first, stage.steps):
        with torch.autocast("cpu", torch.bfloat16):
            losses = student(next(data), stage)
        loss = stage.sight * losses["sight"]
        if stage.speech:
            loss = loss + stage.speech * losses["speech"] + stage.finding * losses["finding"]
        for opt in opts:
            opt.zero_grad()
            for group in opt.param_groups:
                group["lr"] = rate(stage, step)
        loss.backward()
        average_gradients(student)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for opt in opts:
            opt.step()
        yield step + 1, {name: value.item() for name, value in losses.items()}


def save(student: Student, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The checkpoint in bf16, with the keys a published Gemma 4 has in its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build(tokenizer)
    model.load_state_dict(student.model.state_dict())
    model.bfloat16().save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    text = settings["text_config"]
    full = text.pop("per_layer_config")
    text["global_head_dim"] = next(iter(full.values()))["head_dim"]
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_side_files(tokenizer, folder)


def work(worker: int, workers: int, out: Path, meeting: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting}", rank=worker, world_size=workers)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    student = Student(build(tokenizer))
    opts = optimizers(student)
    state_file = out / "state.pt"
    start = (0, 0)
    if state_file.exists():
        state = torch.load(state_file)
        start = state["stage"], state["step"]
        student.load_state_dict(state["student"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
    # One program for every kind of layer, and again once their weights are rounded.
    torch._dynamo.config.recompile_limit = 64
    for tower in (student.model.model.vision_tower.encoder, student.model.model.language_model):
        for layer in tower.layers:
            layer.compile(dynamic=False)

    for number, stage in enumerate(STAGES[start[0] :], start[0]):
        first = start[1] if number == start[0] else 0
        if stage.quantized:
            if first == 0:
                rng, encode = Random("clip bounds"), Encoder(tokenizer)
                set_clip_bounds(student.model, [batch(rng, encode, stage.mix) for _ in range(16)])
            start_fake_quantization(student.model)
        loader = torch.utils.data.DataLoader(
            Batches(tokenizer, stage.mix, seed=f"{stage.name} {first} {worker}"),
            batch_size=None,
            num_workers=1,
            prefetch_factor=8,
        )
        began, recent = time.time(), []
        for step, losses in run_stage(student, stage, iter(loader), first, opts):
            if worker != 0:
                continue
            recent.append(losses)
            if step % 50 == 0:
                means = {k: sum(r[k] for r in recent) / len(recent) for k in losses}
                shown = "  ".join(f"{k} {v:.4f}" for k, v in means.items())
                print(f"{stage.name} {step}  {shown}  {time.time() - began:.0f} s", flush=True)
                recent = []
            if step % 250 == 0 or step == stage.steps:
                last = {"stage": number, "step": step, "student": student.state_dict()}
                torch.save({**last, "optimizers": [o.state_dict() for o in opts]}, state_file)
    if worker == 0:
        save(student, tokenizer, out / "bf16")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if not (args.out / "tokenizer").exists():
        train_tokenizer().save_pretrained(args.out / "tokenizer")
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        torch.multiprocessing.spawn(work, (args.workers, args.out, meeting), nprocs=args.workers)


if __name__ == "__main__":
    main()
