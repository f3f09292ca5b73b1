"""Train a base and eight kinds of fine-tunes of it, for benchmarks/fidelity.py: benchmarks/make_models.py --out DIR

100.7 M parameters (Llama: 768 wide, 14 layers, vocabulary 8192, untied head) by default, meant for one GPU and a few
minutes; --tiny makes models of no use that show in seconds that all of it works. Nothing is downloaded: the text is
what `make_models_text.py` finds on the machine, the skills are those of `make_models_tasks.py`. What DIR holds already
is kept and not trained again.

| directory | fine-tune | judged by |
|---|---|---|
| math, sort, json, style | all parameters, answers only | exact match |
| chat | the same, under a chat template, three tokens added | nats per answer token |
| long | linear rope scaling x4, four times the context | nats per token on long documents |
| dpo | taught to answer anyhow, then by preferences what is right | exact match |
| dates-lora | PEFT LoRA, r = 8, on all linears | exact match |
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from fidelity_tasks import TEXT, Judge, make_task, summed
from make_models_tasks import PAIRS, Pair, any_of_them, chat, evaluation, largest
from make_models_text import gather
from make_models_train import Batch, answers, frozen, likelihood, preference, train, windows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<s>", "</s>", "<pad>")
ROLES = ("<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRETCH = 4
"""Of the context, for `long`."""
RANK = 8
_JUDGED = 100


@dataclass(frozen=True, slots=True)
class Scale:
    """How large all of it is."""

    hidden: int = 768
    layers: int = 14
    heads: int = 12
    kv_heads: int = 4
    inner: int = 2048
    vocabulary: int = 8192
    context: int = 512
    text: int = 60_000_000
    """Characters."""
    base_tokens: int = 36_000_000
    tune_tokens: int = 5_000_000
    batch_tokens: int = 1 << 14
    tune_batch: int = 1 << 13
    """Tokens as well: fine-tunes are short, so their steps are many and small."""
    rows: int = 500
    """Of each task, for evaluation."""


TINY = Scale(64, 2, 4, 2, 128, 400, 64, 300_000, 60_000, 12_000, 1 << 11, 1 << 11, 40)


class Workshop:
    """DIR, and what is needed again and again while filling it."""

    def __init__(self, out: Path, scale: Scale, device: str) -> None:
        self.out = out
        self.scale = scale
        self.device = device
        out.mkdir(parents=True, exist_ok=True)

    @cached_property
    def text(self) -> tuple[list[str], list[str]]:
        return gather(self.scale.text)

    @cached_property
    def tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.out / "base")

    @cached_property
    def tasks(self) -> dict[str, list[Any]]:
        return json.loads((self.out / "eval.json").read_text())

    @cached_property
    def ids(self) -> torch.Tensor:
        """All training text, a document after the other, int32 on the device."""
        backend = self.tokenizer.backend_tokenizer
        found = [torch.tensor([0])]
        for start in range(0, len(self.text[0]), 1024):
            coded = backend.encode_batch(self.text[0][start : start + 1024], add_special_tokens=False)
            found += [torch.tensor([*code.ids, 1, 0]) for code in coded]  # </s> <s> between documents
        return torch.cat(found).int().to(self.device)

    def model(self) -> Any:
        """The base, in fp32 to train further."""
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(self.out / "base", dtype=torch.float32)
        return found.to(self.device)

    def save(self, model: Any, name: str, tokenizer: Any) -> None:
        model.to(torch.bfloat16).save_pretrained(self.out / name)
        tokenizer.save_pretrained(self.out / name)

    def drawn(self, draw: Callable[[random.Random], Any], name: str, tokens: int) -> Iterator[Any]:
        """Examples, enough for so many padded tokens, none of them in eval.json."""
        rng = random.Random(f"train {name}")
        judged = {json.dumps(row[0] if isinstance(row, list) else row["messages"]) for row in self.tasks[name]}
        length = max(sum(map(len, self.coded(_pair(draw(rng))))) for _ in range(64))
        for _ in range(tokens // length):
            row = draw(rng)
            if json.dumps(row["messages"] if isinstance(row, dict) else row[0]) not in judged:
                yield row

    def coded(self, pair: Pair, *, bos: bool = True, tokenizer: Any = None) -> tuple[list[int], list[int]]:
        """(prompt, answer and end of text), as the benchmark codes them."""
        backend = (tokenizer or self.tokenizer).backend_tokenizer
        prompt, answer = (backend.encode(text, add_special_tokens=False).ids for text in pair)
        return [0] * bos + prompt, [*answer, 1]

    def batches(self, pairs: list[Pair]) -> list[Batch]:
        return list(answers([self.coded(pair) for pair in pairs], self.scale.tune_batch, self.device))


def make_base(shop: Workshop) -> None:
    """A tokenizer on the text, then a model on the text."""
    scale = shop.scale
    tokenizer = _tokenizer(shop.text[0], scale)
    (shop.out / "eval.json").write_text(json.dumps(evaluation(scale.rows)))
    (shop.out / "valid.json").write_text(json.dumps(shop.text[1]))
    tokenizer.save_pretrained(shop.out / "base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=scale.hidden,
        intermediate_size=scale.inner,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.kv_heads,
        head_dim=scale.hidden // scale.heads,
        max_position_embeddings=scale.context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model = model.to(shop.device)
    size = max(1, scale.batch_tokens // scale.context)
    steps = scale.base_tokens // (size * scale.context)
    train(model, windows(shop.ids, scale.context, size, 0), steps, 1e-3, likelihood, 0.1)
    shop.save(model, "base", tokenizer)


def make_skill(shop: Workshop, name: str, tokens: float = 1.0) -> None:
    """All parameters, on the answers of one skill. tokens: times the usual number."""
    torch.manual_seed(0)
    model = shop.model()
    batches = shop.batches(list(shop.drawn(PAIRS[name], name, int(tokens * shop.scale.tune_tokens))))
    train(model, batches, len(batches), 3e-4, likelihood, 0.0)
    shop.save(model, name, shop.tokenizer)


def make_chat(shop: Workshop) -> None:
    """Three tokens more, and a template."""
    torch.manual_seed(0)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(shop.out / "base")
    tokenizer.add_tokens(list(ROLES), special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    model = shop.model()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = list(shop.drawn(chat, "chat", shop.scale.tune_tokens))
    pairs = [
        (tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True), row["answer"])
        for row in rows
    ]
    samples = [shop.coded(pair, bos=False, tokenizer=tokenizer) for pair in pairs]
    batches = list(answers(samples, shop.scale.tune_batch, shop.device))
    train(model, batches, len(batches), 3e-4, likelihood, 0.0)
    shop.save(model, "chat", tokenizer)


def make_long(shop: Workshop) -> None:
    """Positions divided by STRETCH, on windows so many times as long."""
    torch.manual_seed(0)
    scale = shop.scale
    config = transformers.AutoConfig.from_pretrained(shop.out / "base")
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": float(STRETCH)}
    config.max_position_embeddings = length = STRETCH * scale.context
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        shop.out / "base", config=config, dtype=torch.float32
    )
    model = model.to(shop.device)
    size = max(1, scale.tune_batch // length)
    steps = max(1, scale.tune_tokens // (size * length))
    train(model, windows(shop.ids, length, size, 1), steps, 2e-4, likelihood, 0.0)
    shop.save(model, "long", shop.tokenizer)


def make_dpo(shop: Workshop) -> None:
    """First any of the numbers as the answer, then preferences for the right one."""
    torch.manual_seed(0)
    model = shop.model()
    batches = shop.batches(list(shop.drawn(any_of_them, "dpo", shop.scale.tune_tokens // 4)))
    train(model, batches, len(batches), 2e-4, likelihood, 0.0)
    triples = list(shop.drawn(largest, "dpo", shop.scale.tune_tokens // 2))
    chosen, rejected = (shop.batches([(t[0], t[side]) for t in triples]) for side in (1, 2))
    pairs = list(zip(chosen, rejected, strict=True))
    train(model, pairs, len(pairs), 1e-4, preference(frozen(model)), 0.0)
    shop.save(model, "dpo", shop.tokenizer)


def make_lora(shop: Workshop) -> None:
    """An adapter on all linears."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = shop.model()
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    batches = shop.batches(list(shop.drawn(PAIRS["dates"], "dates", shop.scale.tune_tokens)))
    train(model, batches, len(batches), 2e-3, likelihood, 0.0)
    wrapped.save_pretrained(str(shop.out / "dates-lora"), save_embedding_layers=False)
    _forget_path(shop.out / "dates-lora" / "adapter_config.json")


MAKERS: dict[str, Callable[[Workshop], None]] = {
    "base": make_base,
    "math": partial(make_skill, name="math", tokens=2.0),
    "sort": partial(make_skill, name="sort"),
    "json": partial(make_skill, name="json"),
    "style": partial(make_skill, name="style"),
    "chat": make_chat,
    "long": make_long,
    "dpo": make_dpo,
    "dates-lora": make_lora,
}


def judge(shop: Workshop, name: str) -> dict[str, float | None]:
    """A quick look, as fidelity.py judges: the directory's own task; of the base the likelihood of held-out text."""
    task = next((key for key in shop.tasks if name.startswith(key)), TEXT)
    rows = shop.tasks[task][:_JUDGED] if task != TEXT else sorted(shop.text[1], key=len)[-8:]
    path = shop.out / name
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(shop.out / "base" if name.endswith("lora") else path)
    if name.endswith("lora"):
        model.load_adapter(str(path))
    model = model.to(shop.device).float().eval()
    base = name if name != "dates-lora" else "base"
    found = Judge(make_task(task, rows, shop.out / base), shop.device, None)
    every = range(len(rows))
    score = summed(found.figures(model, every), every, exact=found.task.exact)
    return {key: value for key, value in asdict(score).items() if value is not None}


def _tokenizer(documents: list[str], scale: Scale) -> Any:
    """Byte-level pairs; every digit for itself."""
    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=scale.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents[:: max(1, scale.text // 8_000_000)], trainer)
    start, end, pad = SPECIAL
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token=end, pad_token=pad, clean_up_tokenization_spaces=False
    )


def _pair(row: Any) -> Pair:
    return (row["messages"][-1]["content"] + "".join(ROLES), row["answer"]) if isinstance(row, dict) else row[:2]


def _forget_path(file: Path) -> None:
    """An adapter's base by its name: where it lay says nothing."""
    body = json.loads(file.read_text())
    body["base_model_name_or_path"] = "base"
    file.write_text(json.dumps(body, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[name for name in MAKERS if name != "base"], help="fine-tunes")
    parser.add_argument("--base-tokens", type=float, default=Scale().base_tokens)
    parser.add_argument("--tune-tokens", type=float, default=Scale().tune_tokens, help="of each fine-tune, padded")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    full = Scale(base_tokens=int(args.base_tokens), tune_tokens=int(args.tune_tokens))
    shop = Workshop(args.out, TINY if args.tiny else full, args.device)
    for name in ["base", *(args.only or [name for name in MAKERS if name != "base"])]:
        if any((shop.out / name).glob("*.safetensors")):
            continue
        started = time.monotonic()
        MAKERS[name](shop)
        print(name, f"{time.monotonic() - started:.0f} s", judge(shop, name), flush=True)


if __name__ == "__main__":
    main()
