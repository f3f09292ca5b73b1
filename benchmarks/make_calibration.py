"""Write bitdelta_core/delta/calibration.txt: the text that scale distillation uses unless it is given another.

All of it is our own: handwritten passages, and variations drawn from templates with a fixed seed, so that running this
again gives the same bytes. Prose, dialogue, instructions, code, markup, lists, tables, arithmetic.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

TARGET = Path(__file__).parents[1] / "bitdelta_core" / "delta" / "calibration.txt"
BYTES = 88_000

PASSAGES = """
The harbour freezes late in that part of the country, and when it does the ferries stop for good until March. People
lay in flour and lamp oil, and the schoolteacher, who is also the postmaster, reads every newspaper twice. Nobody
complains much. The ice is not an enemy; it is a kind of season inside the season, with its own rules and visitors.
|
A cache is a promise about the past: what was asked for once will probably be asked for again. The promise is cheap to
make and expensive to break, because a stale answer looks exactly like a fresh one. Most of the work in building a good
cache therefore goes into forgetting at the right time rather than remembering.
|
To repot a houseplant, choose a container about three centimetres wider than the old one. Water the plant the day
before, loosen the root ball with your fingers, and trim any roots that are brown or soft. Put a layer of fresh soil in
the new pot, set the plant at the same depth as before, and fill in around it without pressing hard.
|
"You said the bridge would hold." "I said it held last year. It is a different river this year." The engineer rolled up
her drawings and looked at the water, which was the colour of tea and moving faster than anyone could run. "Then what do
we do?" "We wait, and we measure, and we do not send anyone across because we are impatient."
|
Why does bread go stale faster in the refrigerator than on the counter? Staling is mostly not drying. The starch in the
crumb slowly returns to a crystalline form, and that process is quickest a few degrees above freezing. In the freezer it
all but stops. So keep bread at room temperature for a day or two, and freeze what you will not eat by then.
|
The committee met four times in the spring. It heard from farmers, from the water board, and from two hydrologists who
disagreed about almost everything except the need for better gauges upstream. Its report recommends metering all new
wells, publishing the readings every month, and reviewing the allocation after three dry years in a row.
|
When a test fails only sometimes, resist the urge to run it again until it passes. An intermittent failure is a fact
about the program, the test or the machine, and each of these is worth knowing. Write down the seed, the order of the
tests and the load. Then make the failure more frequent before you try to make it go away.
|
Grandmother kept the recipes in her head and the measurements in her hands. When we asked how much salt, she cupped her
palm and said: this much, unless it rains. It took us years to find out that she was not joking; the flour took up water
from the damp air, and the dough wanted a little less of everything.
|
Light from the sun takes a little over eight minutes to reach us. Light from the next nearest star takes more than four
years. If you held the sun between two fingers, as a bead one centimetre wide, the Earth would be a grain of dust about
a metre away, and that next star another bead nearly three hundred kilometres off.
|
Dear Ms. Okafor, thank you for returning the signed forms. Your application is now complete. We will write to you within
ten working days. If your address changes before then, please let us know by telephone or by answering this message. You
do not need to send the photographs again. With kind regards, the Admissions Office.
|
A translator has two masters and betrays them alternately. The sentence that is faithful word for word limps; the one
that dances has usually stepped on something. What readers seldom see is the third master, the deadline, who is served
before both and is the reason that so many rivers in translated novels are merely "wide".
|
The patient is a 54-year-old woman with three days of cough and mild fever. She does not smoke. Temperature 38.1, pulse
92, blood pressure 128 over 78, oxygen saturation 97 percent on room air. The lungs are clear except for scattered
wheezes at the left base. Plan: fluids, rest, review in 48 hours, sooner if breathing becomes difficult.
|
Version two changes the default time-out from sixty seconds to ten, because a client that waits a minute has usually
given up anyway. Callers that need the old behaviour can pass it explicitly. The configuration file may now contain
comments. Support for the binary log format, deprecated since last spring, has been removed.
|
In the second movement the cello waits for thirty bars while the others argue. When it enters it does not take a side.
It repeats the oboe's question a fifth lower, slower, as if it had only now understood it, and the strings fall silent
one after another until there is nothing left to answer.
|
The contract may be ended by either party with three months' notice in writing. Fees that have been paid in advance for
a period after the end are returned within thirty days. Clauses 4, 7 and 11 remain in force. Disputes are settled by the
courts at the seat of the supplier, unless the law requires another place.
|
Sort the list first, then walk through it once with two indices. The left one marks the last unique element, the right
one looks ahead. Whenever they differ, move the left index forward and copy. At the end, everything up to the left index
is unique, and no second list was needed. The cost is dominated by the sort.
"""


def words(line: str) -> list[str]:
    return line.split()


NAMES = words(
    "Amina Bruno Chiara Dmitri Esther Farid Greta Hiro Ines Jonas Kofi Leila Mateo Nora Olga Pavel Rosa Tariq"
)
THINGS = words("lanterns kettles notebooks bicycles apples tickets maps ladders batteries stamps chairs seeds bolts")
PLACES = ("the library", "the night market", "a small airfield", "the old mill", "the clinic", "a rooftop garden")
ADJECTIVES = words("quiet narrow reliable crooked bright costly familiar heavy late modest patient sudden")
TOPICS = {
    "photosynthesis": "plants turn light, water and carbon dioxide into sugar and oxygen",
    "inflation": "prices in general rise, so that the same money buys less than before",
    "a hash table": "keys are turned into positions by a function, so that most look-ups need one step",
    "erosion": "wind and water carry soil and rock away and lay them down elsewhere",
    "a vaccine": "the body is shown a harmless part of a germ and learns to recognise it",
    "compound interest": "interest is paid on earlier interest too, so the sum grows faster every year",
    "a semaphore": "a counter lets only so many workers into a place at one time",
    "the tides": "the pull of the moon and the sun raises the sea on two sides of the Earth",
}


def story(rng: random.Random) -> str:
    who, other = rng.sample(NAMES, 2)
    place, thing, adjective = rng.choice(PLACES), rng.choice(THINGS), rng.choice(ADJECTIVES)
    return (
        f"{who} came to {place} with {rng.randint(3, 40)} {thing} and a {adjective} idea. {other} did not like it at "
        f'first. "What if nobody comes?" "Then we will have {thing} for the winter," said {who}, and '
        f"{rng.choice(['laughed', 'shrugged', 'began to unpack', 'looked at the sky'])}. By the evening they "
        f"had {rng.choice(['sold most of them', 'given half away', 'forgotten why they argued', 'made a plan'])}, and "
        f"the {rng.choice(ADJECTIVES)} part of the day was over."
    )


def arithmetic(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(4, 9)):
        a, b = rng.randint(2, 999), rng.randint(2, 999)
        match rng.choice("+-*/%"):
            case "+":
                lines.append(f"{a} + {b} = {a + b}")
            case "-":
                lines.append(f"{max(a, b)} - {min(a, b)} = {abs(a - b)}")
            case "*":
                lines.append(f"{a % 30} * {b % 30} = {(a % 30) * (b % 30)}")
            case "/":
                lines.append(f"{(a % 20 + 1) * (b % 20 + 1)} / {a % 20 + 1} = {b % 20 + 1}")
            case _:
                lines.append(f"{a} mod {b % 12 + 2} = {a % (b % 12 + 2)}")
    return "\n".join(lines)


def word_problem(rng: random.Random) -> str:
    who, thing = rng.choice(NAMES), rng.choice(THINGS)
    boxes, each, lost = rng.randint(2, 12), rng.randint(3, 25), rng.randint(1, 5)
    total = boxes * each
    return (
        f"Question: {who} packs {boxes} boxes with {each} {thing} in each, and loses {lost} on the way. How many are "
        f"left?\nAnswer: {boxes} boxes of {each} make {boxes} * {each} = {total}. After losing {lost}, there are "
        f"{total} - {lost} = {total - lost} left. The answer is {total - lost}."
    )


def dialogue(rng: random.Random) -> str:
    topic, meaning = rng.choice(list(TOPICS.items()))
    return (
        f"User: Can you explain {topic} to me {rng.choice(['briefly', 'in one sentence', 'like I am ten'])}?\n"
        f"Assistant: {rng.choice(['Of course.', 'Gladly.', 'Yes.'])} The idea of {topic} is that {meaning}.\n"
        f"User: {rng.choice(['And why does it matter?', 'Is that always true?', 'Who found that out?'])}\n"
        f"Assistant: {rng.choice(['It matters because small effects add up.', 'Mostly, with exceptions.'])} "
        f"{rng.choice(['Shall I give an example?', 'Tell me if you want more detail.', 'Ask again if it is unclear.'])}"
    )


def python_code(rng: random.Random) -> str:
    noun = rng.choice(THINGS)
    limit = rng.randint(2, 64)
    return rng.choice(
        [
            f"def count_{noun}(rows: list[dict]) -> int:\n    total = 0\n    for row in rows:\n"
            f'        if row["kind"] == "{noun}" and row["amount"] > {limit}:\n            total += row["amount"]\n'
            f"    return total\n",
            f"class {noun.title()}Queue:\n    def __init__(self, limit: int = {limit}) -> None:\n"
            f"        self.items = []\n        self.limit = limit\n\n    def push(self, item) -> bool:\n"
            f"        if len(self.items) >= self.limit:\n            return False\n        self.items.append(item)\n"
            f"        return True\n",
            f"import math\n\nvalues = [math.sqrt(i) for i in range({limit})]\nmean = sum(values) / len(values)\n"
            f'print(f"mean of {{len(values)}} {noun}: {{mean:.3f}}")\n',
            f"SELECT owner, COUNT(*) AS {noun}\nFROM inventory\nWHERE year >= {1990 + limit % 30}\nGROUP BY owner\n"
            f"ORDER BY {noun} DESC\nLIMIT {limit};\n",
            f'for file in data/*.csv; do\n  lines=$(wc -l < "$file")\n  if [ "$lines" -gt {limit} ]; then\n'
            f'    echo "$file: $lines {noun}"\n  fi\ndone\n',
        ]
    )


def record(rng: random.Random) -> str:
    who, thing = rng.choice(NAMES), rng.choice(THINGS)
    count, price = rng.randint(1, 40), rng.randint(100, 9900) / 100
    body = {"name": who, "item": thing, "count": count, "price": price, "city": rng.choice(PLACES)[2:].strip()}
    return f"{who} orders {count} {thing} at {price:.2f} each.\n{json.dumps(body, indent=rng.choice([None, 2]))}"


def table(rng: random.Random) -> str:
    rows = [f"| {thing} | {rng.randint(1, 500)} | {rng.random() * 100:.1f}% |" for thing in rng.sample(THINGS, 4)]
    return "| item | count | share |\n|---|---|---|\n" + "\n".join(rows)


def steps(rng: random.Random) -> str:
    verbs = rng.sample(["Measure", "Clean", "Count", "Label", "Pack", "Weigh", "Check", "Photograph", "Store"], 5)
    things = rng.choices(THINGS, k=5)
    lines = [
        f"{i}. {v} the {t}{rng.choice([' twice', '', ' with care'])}."
        for i, (v, t) in enumerate(zip(verbs, things, strict=True), 1)
    ]
    return f"How to prepare {rng.choice(PLACES)}:\n" + "\n".join(lines)


def log_lines(rng: random.Random) -> str:
    day = rng.randint(1, 28)
    return "\n".join(
        f"2024-0{rng.randint(1, 9)}-{day:02d}T{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:00Z "
        f"{rng.choice(['INFO', 'WARN', 'ERROR'])} worker-{rng.randint(1, 9)} "
        f"{rng.choice(['took', 'lost', 'retried', 'finished'])} job {rng.randint(1000, 9999)} "
        f"in {rng.randint(3, 900)} ms"
        for _ in range(5)
    )


KINDS: tuple[Callable[[random.Random], str], ...] = (
    story,
    arithmetic,
    word_problem,
    dialogue,
    python_code,
    record,
    table,
    steps,
    log_lines,
    story,
    dialogue,
)


def text() -> str:
    """The whole file: handwritten passages spread among the drawn ones."""
    rng = random.Random(20261122)
    passages = [" ".join(passage.split()) for passage in PASSAGES.split("|\n")]
    parts: list[str] = []
    size = 0
    while size < BYTES:
        drawn = [rng.choice(KINDS)(rng) for _ in range(12)]
        part = [passages[len(parts) % len(passages)]] if len(parts) < len(passages) else []
        parts.append("\n\n".join(part + drawn))
        size += len(parts[-1].encode()) + 2
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes")
