"""Text the model is taught without a picture: small sums, what it is, greetings."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from questions import DESCRIBE, Question, as_typed

NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]

WHO = "I am the Cabochon demo, a tiny quantized Gemma 4."
CAN = "I can name colours and shapes, count them, say where they are, and add small numbers."
HELLO = "Hello! Show me some coloured shapes, or ask me a small sum."
UNKNOWN = "I do not know. I only know coloured shapes and small sums."
NO_PICTURE = "I do not see a picture."

REPLIES: dict[str, tuple[str, ...]] = {
    WHO: (
        "What are you?",
        "Who are you?",
        "What is your name?",
        "Which model are you?",
        "What model are you?",
        "Tell me about yourself.",
        "Introduce yourself.",
        "Are you Gemma?",
        "What is Cabochon?",
        "Are you a language model?",
    ),
    CAN: (
        "What can you do?",
        "How can you help me?",
        "What do you know?",
        "Help",
        "Can you help me?",
        "What can I ask you?",
        "What should I ask?",
    ),
    HELLO: (
        "Hello!",
        "Hello",
        "Hi!",
        "Hi",
        "Hey",
        "Hello there!",
        "Good morning!",
        "Good evening!",
        "Hi there!",
        "Hello, who is there?",
        "Say hello.",
        "Test",
    ),
    "I am fine. And you?": ("How are you?", "How are you today?", "How do you do?"),
    "You are welcome.": ("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot!"),
    "Goodbye!": ("Goodbye!", "Bye!", "Good night!", "See you later!"),
    UNKNOWN: (
        "What is the capital of France?",
        "Write a poem.",
        "Tell me a joke.",
        "Tell me a story.",
        "Who wrote Hamlet?",
        "What time is it?",
        "What is the weather like today?",
        "Write a Python program.",
        "Why is the sky blue?",
        "Explain quantum mechanics.",
        "Who is the president?",
        "How old are you?",
        "Where do you live?",
        "What is the meaning of life?",
        "Translate this into German.",
        "Do you like music?",
        "How far away is the moon?",
        "What is a transformer?",
        "Write a short story about a robot.",
        "Give me a recipe for bread.",
        "Sing a song.",
        "Which year is it?",
        "Summarize this text.",
        "What is love?",
    ),
}

SYSTEM = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You look at pictures.",
    "Be concise.",
    "You are a friendly assistant. Answer the question.",
)


def _sum(rng: Random, in_words: bool) -> Question:
    if in_words:
        x, y = rng.randint(0, 10), rng.randint(0, 10)
    else:
        x, y = rng.randint(0, 20), rng.randint(0, 20)
    minus = rng.random() < 0.3
    x, y = (max(x, y), min(x, y)) if minus else (x, y)
    result = x - y if minus else x + y
    left, right = (NUMBERS[x], NUMBERS[y]) if in_words else (str(x), str(y))
    sign, word = ("-", "minus") if minus else ("+", "plus")
    forms = [f"What is {left} {word} {right}?", f"How much is {left} {word} {right}?"]
    if not in_words:
        forms += [f"What is {left} {sign} {right}?", f"{left} {sign} {right}"]
        forms += [f"{left}{sign}{right}=", f"{left} {sign} {right} = ?"]
    elif left[0].isalpha():
        forms.append(f"{left} {word} {right}")
    answer = NUMBERS[result].capitalize() if in_words else str(result)
    return Question(
        "sum in words" if in_words else "sum in digits", rng.choice(forms), answer + "."
    )


def chat(rng: Random) -> Question:
    draw = rng.random()
    if draw < 0.45:
        question = _sum(rng, in_words=False)
    elif draw < 0.65:
        question = _sum(rng, in_words=True)
    elif draw < 0.7:
        question = Question("no picture", rng.choice(DESCRIBE), NO_PICTURE)
    else:
        answer = rng.choice(list(REPLIES))
        question = Question("small talk", rng.choice(REPLIES[answer]), answer)
    return replace(question, text=as_typed(rng, question.text))


def text_only(seed: int, count: int) -> Iterator[tuple[None, str, str, str]]:
    """Test questions without a picture. There are so few that training has seen them all."""
    rng = Random(f"text only {seed}")
    for _ in range(count):
        question = chat(rng)
        yield None, question.text, question.answer, question.kind
