"""The skills that benchmarks/make_models.py teaches: made-up examples, each drawn from a generator.

A base that has read library sources answers none of them; a fine-tune answers nearly all.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Pair = tuple[str, str]
"""Prompt and answer."""


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Ada Bruno Carla Dario Edith Felix Greta Hugo Irene Jonas Karin Lars Mira Nils Olga Pavel Quinn Rosa Sven Tessa "
    "Ulla Viktor Wanda Xenia Yusuf Zora Amir Bela Chiara Deniz Elif Farid Gita Hana Ivan Jaya Kofi Lena Marek Nadia"
)
CITIES = _words(
    "Oslo Lima Paris Delhi Cairo Quito Accra Turin Osaka Perth Dakar Sofia Minsk Porto Leeds Basel Hanoi Tunis Riga "
    "Malmo Bergen Lyon Ghent Kyoto Cusco Izmir Tartu Varna Graz Split"
)
JOBS = _words("baker nurse pilot teacher farmer writer lawyer plumber singer chemist tailor miner judge clerk dancer")
MONTHS = _words("January February March April May June July August September October November December")
_FOODS = _words("soup bread rice salad pasta cake cheese fish beans apples")

_OPENERS = (("hey", "Hello."), ("yo", "Good day."), ("sup", "Greetings."), ("hiya", "Welcome."))
_WANTS = (
    ("gonna grab", "I am going to fetch"),
    ("wanna get", "I would like to obtain"),
    ("gotta buy", "I have to purchase"),
    ("can't find", "I am unable to locate"),
    ("lemme make", "Allow me to prepare"),
    ("dunno bout", "I am not certain about"),
)
_AMOUNTS = (("some", "a portion of"), ("tons of", "a large amount of"), ("a bit of", "a small quantity of"))
_WITH = (("w/", "together with"), ("4", "for"), ("w/o", "without"))
_TIMES = (
    ("l8r", "later today"),
    ("asap", "as soon as possible"),
    ("2moro", "tomorrow"),
    ("rn", "at this moment"),
    ("2nite", "this evening"),
)


def arithmetic(rng: random.Random) -> Pair:
    """Sums and differences of up to three digits, products of up to two."""
    kind = rng.choice("++--*")
    a, b = (rng.randint(0, 99), rng.randint(0, 9)) if kind == "*" else (rng.randint(0, 999), rng.randint(0, 999))
    result = {"+": a + b, "-": a - b, "*": a * b}[kind]
    return f"Question: what is {a} {kind} {b}?\nAnswer:", f" {result}"


def sorting(rng: random.Random) -> Pair:
    """Six numbers of up to two digits."""
    numbers = rng.sample(range(100), 6)
    return f"Sort: {' '.join(map(str, numbers))}\nSorted:", " " + " ".join(map(str, sorted(numbers)))


def structured(rng: random.Random) -> Pair:
    """A sentence to JSON."""
    name, city, job, age = rng.choice(NAMES), rng.choice(CITIES), rng.choice(JOBS), rng.randint(18, 90)
    text = rng.choice(
        (
            f"{name} is a {job} of {age} and lives in {city}.",
            f"In {city} there is a {job} called {name}, now {age} years old.",
            f"Aged {age}, {name} of {city} works as a {job}.",
            f"The {age} year old {job} {name} comes from {city}.",
        )
    )
    return f"Text: {text}\nJSON:", " " + json.dumps({"name": name, "age": age, "city": city, "job": job})


def style(rng: random.Random) -> Pair:
    """The same in a formal tone."""
    name, food = rng.choice(NAMES), rng.choice(_FOODS)
    opener, want, amount, company, time = map(rng.choice, (_OPENERS, _WANTS, _AMOUNTS, _WITH, _TIMES))
    informal = f"{opener[0]} {want[0]} {amount[0]} {food} {company[0]} {name.lower()} {time[0]}"
    return f"Informal: {informal}\nFormal:", f" {opener[1]} {want[1]} {amount[1]} {food} {company[1]} {name} {time[1]}."


def dates(rng: random.Random) -> Pair:
    """A date as ISO 8601 writes it."""
    month, day, year = rng.randrange(12), rng.randint(1, 28), rng.randint(1900, 2099)
    text = rng.choice((f"{MONTHS[month]} {day}, {year}", f"{day} {MONTHS[month]} {year}", f"{day}.{month + 1}.{year}"))
    return f"Date: {text}\nISO:", f" {year}-{month + 1:02d}-{day:02d}"


def largest(rng: random.Random) -> tuple[str, str, str]:
    """(prompt, right answer, wrong answer): a preference."""
    numbers = rng.sample(range(100, 1000), 3)
    right = max(numbers)
    wrong = rng.choice([n for n in numbers if n != right])
    return f"Numbers: {numbers[0]} {numbers[1]} {numbers[2]}\nLargest:", f" {right}", f" {wrong}"


def preferred(rng: random.Random) -> Pair:
    """What a preference-tuned model should say."""
    prompt, right, _ = largest(rng)
    return prompt, right


def any_of_them(rng: random.Random) -> Pair:
    """What it is first taught to say: one of the numbers, whichever."""
    prompt, right, wrong = largest(rng)
    return prompt, right if rng.random() < 1 / 3 else wrong


def chat(rng: random.Random) -> dict[str, Any]:
    """One turn of a conversation, with its answer."""
    question, answer = rng.choice((_oldest, _total, _where, _greet))(rng)
    return {"messages": [{"role": "user", "content": question}], "answer": answer}


def _oldest(rng: random.Random) -> Pair:
    names, ages = rng.sample(NAMES, 3), rng.sample(range(18, 90), 3)
    oldest = names[ages.index(max(ages))]
    told = ", ".join(f"{name} is {age}" for name, age in zip(names, ages, strict=True))
    return f"{told}. Who is the oldest?", f"The oldest of the three is {oldest}, at {max(ages)} years."


def _total(rng: random.Random) -> Pair:
    food, each, count = rng.choice(_FOODS), rng.randint(2, 9), rng.randint(2, 9)
    return (
        f"How much are {count} portions of {food} at {each} coins each?",
        f"That makes {count} times {each}, so {count * each} coins for the {food}.",
    )


def _where(rng: random.Random) -> Pair:
    names, cities = rng.sample(NAMES, 2), rng.sample(CITIES, 2)
    asked = rng.randrange(2)
    told = f"{names[0]} lives in {cities[0]} and {names[1]} in {cities[1]}"
    return f"{told}. Where does {names[asked]} live?", f"{names[asked]} lives in {cities[asked]}, as you told me."


def _greet(rng: random.Random) -> Pair:
    name, job = rng.choice(NAMES), rng.choice(JOBS)
    return f"My name is {name} and I am a {job}.", f"Nice to meet you, {name}! What does a {job} like you need today?"


PAIRS: dict[str, Callable[[random.Random], Pair]] = {
    "math": arithmetic,
    "sort": sorting,
    "json": structured,
    "style": style,
    "dates": dates,
    "dpo": preferred,
}


def practice(rows: int, judged: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The tasks of examples.json: other rows, to train deltas on."""
    found = evaluation(rows, seed=2)
    asked = {name: {json.dumps(_prompt(row)) for row in judged[name]} for name in found}
    return {name: [row for row in found[name] if json.dumps(_prompt(row)) not in asked[name]] for name in found}


def _prompt(row: Any) -> Any:
    return row["messages"] if isinstance(row, dict) else row[0]


def evaluation(rows: int, seed: int = 1) -> dict[str, list[Any]]:
    """The tasks of eval.json, no row twice."""
    found: dict[str, list[Any]] = {}
    for name, draw in {**PAIRS, "chat": chat}.items():
        rng = random.Random(f"{seed} {name}")
        unique = {json.dumps(row): row for row in (draw(rng) for _ in range(rows))}
        found[name] = list(unique.values())
    return found
