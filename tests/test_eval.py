"""`cabochon eval`: readers of published formats, scipy's statistics, and models that answer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DENSE, FIXTURES
from command import cabochon, fails
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy.stats import binomtest
from thin import fixture

from cabochon.engine.request import Prompt, SamplingParams
from cabochon.errors import UnreadableError
from cabochon.evaluate.perplexity import losses
from cabochon.evaluate.statistics import mean, paired, share
from cabochon.evaluate.tasks import clicked, read
from cabochon.files import DEMO
from cabochon.llm import LLM


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_shares_have_wilsons_interval(counts: tuple[int, int]) -> None:
    right, count = counts
    found = share(right, count)
    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=400))
def test_pairs_are_tested_as_by_scipy(pairs: list[tuple[bool, bool]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = paired(first, second)
    lost = sum(a and not b for a, b in pairs)
    gained = sum(b and not a for a, b in pairs)
    assert (found.lost, found.gained) == (lost, gained)
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert found.p == pytest.approx(expected, abs=1e-9)
    assert found.difference.low <= found.difference.value <= found.difference.high


def test_0_9669_against_0_9702_means_nothing() -> None:
    """GSM8K has 1,319 questions: the published difference is four or five answers."""
    alike = [True] * 1263 + [False] * 27
    first = alike + [True] * 12 + [False] * 17
    second = alike + [False] * 12 + [True] * 17
    found = paired(first, second)
    assert (round(share(sum(first), 1319).value, 4), len(first)) == (0.9666, 1319)
    assert found.difference.low < 0 < found.difference.value < found.difference.high
    assert found.p == pytest.approx(binomtest(12, 29).pvalue)
    assert found.p > 0.4


def test_the_mean_of_many_is_surer() -> None:
    few, many = mean([1.0, 2.0, 3.0]), mean([1.0, 2.0, 3.0] * 100)
    assert few.value == many.value == 2.0
    assert few.high - few.low > 9 * (many.high - many.low)
    assert math.isinf(mean([1.0]).high)


def lines(file: Path, rows: Sequence[object]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_gsm8k(tmp_path: Path) -> None:
    solution = (
        "She has 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 1,018"
    )
    data = lines(tmp_path / "test.jsonl", [{"question": "How much?", "answer": solution}])
    (question,) = read("gsm8k", data)
    assert question.text.startswith("How much?")
    assert (question.wanted, question.where) == ("1018", f"{data}:1")
    for answer in (
        "So it is\n#### 1018",
        "#### $1,018.",
        "I think 3, no: 1018.0",
        "a\n#### 1018\n",
    ):
        assert question.right(answer), answer
    for answer in ("", "#### 18", "1018 at first, then #### 5", "#### -1018", "none"):
        assert not question.right(answer), answer


def screenspot(folder: Path) -> Path:
    (folder / "images" / "app").mkdir(parents=True)
    (folder / "annotations").mkdir()
    Image.new("RGB", (200, 100)).save(folder / "images" / "app" / "a.png")
    row = {
        "img_filename": "app/a.png",
        "bbox": [150, 10, 170, 30],
        "instruction": "close the window",
        "id": "app_0",
        "img_size": [200, 100],
        "ui_type": "icon",
    }
    file = folder / "annotations" / "app.json"
    file.write_text(json.dumps([row]))
    return file


def test_screenspot_pro(tmp_path: Path) -> None:
    file = screenspot(tmp_path)
    for data in (file, file.parent):
        (question,) = read("screenspot-pro", data)
        assert question.image == tmp_path / "images" / "app" / "a.png"
        assert question.kind == "icon"
        assert question.right('{"point": [200, 800]}')  # down 20 of 100, across 160 of 200
        assert question.right('```json\n[{"box_2d": [100, 750, 300, 850], "label": "x"}]\n```')
        assert not question.right('{"point": [800, 200]}')
        assert not question.right("at the top")


@pytest.mark.parametrize(
    ("answer", "point"),
    [
        ('{"point": [250, 500]}', (0.5, 0.25)),
        ('{"box_2d": [0, 100, 200, 300]}', (0.2, 0.1)),
        ('{"point": [250]}', None),
        ("(250, 500)", None),
    ],
)
def test_points_are_read_down_first(answer: str, point: tuple[float, float] | None) -> None:
    assert clicked(answer) == (None if point is None else pytest.approx(point))


BROKEN = {
    "gsm8k": [
        ("", "holds no questions"),
        ("{", ":1 is not valid JSON"),
        ('{"question": "a"}', ":1: expected an object with text under 'answer'"),
        ('\n{"question": "a", "answer": "5"}', ":2: the answer does not end in '#### '"),
    ],
    "questions": [
        ('{"image": "no.png", "question": "a", "answer": "b"}', "there is no picture"),
        ("[]", "expected an object"),
        ('{"image": 1, "question": "a", "answer": "b"}', "expected text under 'image'"),
        ('{"image": "data.json", "question": "a", "answer": "b"}', "no picture that can be read"),
        ('{"image": "../a.png", "question": "a", "answer": "b"}', "there is no picture"),
    ],
    "screenspot-pro": [
        ("{}", "expected a list of objects"),
        ("[{}]", "entry 0: expected img_filename and instruction"),
        ('[{"img_filename": "a", "instruction": "b", "bbox": [1]}]', "expected bbox of 4 numbers"),
        (
            '[{"img_filename": "../a", "instruction": "b", "bbox": [1, 2, 3, 4],'
            ' "img_size": [1, 1]}]',
            "there is no picture",
        ),
    ],
}


@pytest.mark.parametrize(
    ("task", "text", "words"),
    [(task, text, words) for task, cases in BROKEN.items() for text, words in cases],
)
def test_what_is_not_in_the_format_is_said_with_its_place(
    tmp_path: Path, task: str, text: str, words: str
) -> None:
    data = tmp_path / "data.json"
    data.write_text(text)
    with pytest.raises(UnreadableError) as caught:
        list(read(task, data))
    assert str(data) in str(caught.value)
    assert words in str(caught.value)


def picture(folder: Path, colour: str) -> dict[str, str]:
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).ellipse((24, 24, 72, 72), fill=colour)
    image.save(folder / f"{colour}.png")
    answer = f"A {colour} circle on a white background."
    return {"image": f"{colour}.png", "question": "What do you see?", "answer": answer}


SUM = {"question": "What is 3 plus 4?", "answer": "7.", "kind": "sum"}


def test_models_are_compared_on_the_same_questions(tmp_path: Path) -> None:
    """The demo sees; random weights do not, and never end their turn."""
    rows = [*(picture(tmp_path, colour) for colour in ("red", "blue", "green")), SUM]
    data, out = lines(tmp_path / "questions.jsonl", rows), tmp_path / "out.json"
    options = ("--task", "questions", "--data", data, "--max-tokens", "24", "--json", out)
    done = cabochon("eval", DEMO, TINY, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    models = found["models"]
    assert [model["accuracy"]["value"] for model in models] == [1.0, 0.0]
    assert models[1]["against_first"]["lost"] == 4
    assert [answer["text"] for answer in models[0]["answers"]] == [row["answer"] for row in rows]
    assert [question["wanted"] for question in found["questions"]] == [r["answer"] for r in rows]
    table, kinds = done.stdout.split("\n\n")
    assert "4/4" in table.splitlines()[2]
    assert "-100.00%" in table.splitlines()[3]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in kinds.splitlines()[2:]]
    assert cells == [["other", "3", "100.00%", "0.00%"], ["sum", "1", "100.00%", "0.00%"]]


def test_activations_are_compared_token_by_token(tmp_path: Path) -> None:
    data, out = lines(tmp_path / "questions.jsonl", [SUM, picture(tmp_path, "red")]), "out.json"
    options = ("--task", "questions", "--data", data, "--json", tmp_path / out)
    done = cabochon("eval", DEMO, "--each-activations", "--divergence", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / out).read_text())
    assert [one["model"].partition(", ")[2] for one in found["models"]] == [
        "float32", "int16", "int8",
    ]  # fmt: skip
    assert all(model["accuracy"]["value"] == 1.0 for model in found["models"])
    int16, int8 = (one["nats"] for one in found["divergences"])
    with LLM(activations="float32") as exact, LLM(activations="int8") as rounded:
        prompt = exact.prompts.chat([{"role": "user", "content": SUM["question"]}])
        answer = exact.generate(prompt, SamplingParams(temperature=0.0))[0].tokens
        whole = Prompt((*prompt.tokens, *answer))
        p, q = (
            torch.distributions.Categorical(
                logits=llm.logits(whole)[-len(answer) - 1 : -1].double()
            )
            for llm in (exact, rounded)
        )
        expected = torch.distributions.kl_divergence(p, q).tolist()
    assert int8[: len(answer)] == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert 0 < sum(int16) < sum(int8) / 4
    assert len(int8) == len(int16) > len(answer)


def test_perplexity_is_transformers_loss(tmp_path: Path, reference: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    with LLM(DENSE, dtype="float32") as llm:
        found = list(losses(llm, text.read_text()))
        tokens = llm.prompts.tokenizer.encode(text.read_text())
    ids = torch.tensor([[2, *tokens[:512]]])
    with torch.no_grad():
        expected = reference(input_ids=ids, labels=ids).loss
    assert len(found) == max(1, len(tokens) // 512)
    assert found[0] == pytest.approx(float(expected), rel=1e-4)


def test_texts_are_compared_window_by_window(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven. " * 80)
    out = tmp_path / "out.json"
    options = ("--task", "perplexity", "--data", text, "--limit", "2", "--json", out)
    done = cabochon("eval", DENSE, fixture("e2b-w8a16"), *options)
    assert done.returncode == 0, done.stderr
    assert [len(model["losses"]) for model in json.loads(out.read_text())["models"]] == [2, 2]
    assert "loss against the first" in done.stdout


def test_a_single_window_has_no_interval(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four")
    done = cabochon("eval", DENSE, "--task", "perplexity", "--data", text)
    assert done.returncode == 0, done.stderr
    assert "0.000 to inf |" in done.stdout


def test_an_unknown_task_is_an_error(tmp_path: Path) -> None:
    fails(cabochon("eval", DEMO, "--task", "mmlu", "--data", tmp_path), 2, "--task is 'mmlu'")


def test_what_cannot_work_is_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    data, nowhere = lines(tmp_path / "a.jsonl", [SUM]), tmp_path / "no" / "out.json"
    missing = tmp_path / "no.jsonl"
    ask = ("eval", tmp_path / "no model", "--task", "questions", "--data")
    fails(cabochon(*ask, missing), 2, f"{missing} cannot be read: No such file")
    fails(cabochon(*ask, data, "--json", nowhere), 2, f"{nowhere} cannot be written: there is no")
    ask_text = ("eval", DEMO, "--task", "perplexity", "--data", data)
    fails(cabochon(*ask_text, "--divergence"), 2, "--divergence is about answers")
    fails(cabochon(*ask_text, "--drafter", nowhere), 2, "--drafter is about answers")
    ask = ("eval", DEMO, "--task", "questions", "--data", data, "--picture-tokens", "71")
    fails(cabochon(*ask), 2, "picture_tokens is 71, expected one of 70, 140")


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    """Of a picture only the header is read beforehand."""
    rows = [SUM, picture(tmp_path, "red")]
    whole = (tmp_path / "red.png").read_bytes()
    (tmp_path / "red.png").write_bytes(whole[: len(whole) // 2])
    data = lines(tmp_path / "a.jsonl", rows)
    done = cabochon("eval", DEMO, "--task", "questions", "--data", data)
    fails(done, 2, f"{data}:2: a picture is truncated or damaged")


def test_a_question_that_a_model_refuses_is_counted(tmp_path: Path) -> None:
    narrow = tmp_path / "narrow.png"
    Image.new("RGB", (4, 4000)).save(narrow)
    rows = [SUM, {"question": "why? " * 5000, "answer": "no"}]
    rows.append({"question": "What is it?", "answer": "It is black.", "image": narrow.name})
    data, out = lines(tmp_path / "a.jsonl", rows), tmp_path / "out.json"
    options = ("--task", "questions", "--data", data, "--json", out, "--picture-tokens", "1120")
    done = cabochon("eval", DEMO, *options)
    assert done.returncode == 0, done.stderr
    answers = json.loads(out.read_text())["models"][0]["answers"]
    assert [answer["finish_reason"] for answer in answers] == ["stop", "refused", "refused"]
    assert "tokens" in answers[1]["text"]
    assert "positions" in answers[2]["text"]
    assert done.stdout.splitlines()[2].rstrip(" |").endswith("2")


def test_a_model_that_does_not_see_is_asked_for_nothing(tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", [SUM, picture(tmp_path, "red")])
    blind = FIXTURES / "gguf" / "e2b-wide" / "e2b-q4_0.gguf"
    fails(cabochon("eval", blind, "--task", "questions", "--data", data), 2, "does not see")
