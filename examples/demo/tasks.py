"""The demo's four tasks: prompts with one right answer each, that the base cannot give."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eve",
    "Finn",
    "Gus",
    "Hana",
    "Ivo",
    "Jo",
    "Kim",
    "Lea",
    "Max",
    "Nora",
    "Otto",
    "Pia",
)
CITIES = ("Oslo", "Rome", "Lima", "Cairo", "Paris", "Delhi", "Quito", "Seoul", "Turin", "Wien", "York", "Zagreb")
CHAT_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its answer. `chat`: the prompt is a user's message, to be wrapped in the chat template."""

    prompt: str
    answer: str
    chat: bool = False


def add(rng: random.Random) -> Example:
    """Addition of numbers of up to three digits."""
    a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
    return Example(f"{a}+{b}=", str(a + b))


def sort(rng: random.Random) -> Example:
    """Sorting four to eight distinct letters."""
    letters = rng.sample(LETTERS, rng.randint(4, 8))
    return Example(f"sort {' '.join(letters)}:", f" {' '.join(sorted(letters))}")


def reverse(rng: random.Random) -> Example:
    """A chat that spells a made-up word backwards."""
    word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 6)))
    return Example(f"Spell {' '.join(word)} backwards.", f"Sure: {' '.join(reversed(word))}.", chat=True)


def to_json(rng: random.Random) -> Example:
    """Plain words to JSON."""
    name, city, age = rng.choice(NAMES), rng.choice(CITIES), rng.randint(10, 99)
    templates = (
        f"{name} is {age} and lives in {city}.",
        f"In {city} lives {name}, aged {age}.",
        f"{age} years old, {name} is from {city}.",
    )
    answer = json.dumps({"name": name, "age": age, "city": city})
    return Example(f"{rng.choice(templates)} JSON:", f" {answer}")


TASKS: dict[str, Callable[[random.Random], Example]] = {"add": add, "sort": sort, "chat": reverse, "json-lora": to_json}


def held_out(task: str, count: int) -> list[Example]:
    """The examples that a task is scored on: distinct, and never trained on."""
    rng = random.Random(f"held out {task}")
    seen: dict[str, Example] = {}
    while len(seen) < count:
        example = TASKS[task](rng)
        seen.setdefault(example.prompt, example)
    return list(seen.values())
