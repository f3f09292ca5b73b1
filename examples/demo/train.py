"""Trains the demo's base and its fine-tunes: `python examples/demo/train.py OUT [--device cuda] [--quick]`.

The checkpoints in `examples/demo/models` came from this script (one H200, nine minutes). The base learns from the
source text of Python's standard library; each fine-tune starts from it and learns one task of `tasks.py`. Nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sysconfig
import time
from itertools import count, islice
from pathlib import Path

import torch
from tasks import CHAT_TEMPLATE, CHAT_TOKENS, TASKS, Example, held_out
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256
PAD = -100
HELD_OUT = 400


def corpus() -> str:
    """The standard library's own source: technical English and Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for f in root.rglob("*.py") if not {"site-packages", "dist-packages", "test"} & set(f.parts))
    random.Random(0).shuffle(files)
    text = [f.read_text(errors="ignore") for f in files]
    return "\n".join(t for t in text if t.isascii())[:24_000_000]


def train_tokenizer(text: str, path: Path) -> PreTrainedTokenizerFast:
    """512 byte-level pieces; digits and lone letters stay apart, so that tasks on them can be learnt."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text[i : i + 4000] for i in range(0, 4_000_000, 4000)), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(path)
    return tokenizer


def new_model(vocab: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def fit(model, batches, steps: int, lr: float, label: str, parameters=None) -> None:
    """AdamW with a linear warm-up and a cosine decay; prints the loss now and then."""
    parameters = list(parameters or model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.05)
    started = time.monotonic()
    model.train()
    for step in range(steps):
        ids, labels = next(batches)
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 500 == 0 or step == steps - 1:
            print(f"{label}: step {step}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


def text_batches(ids: torch.Tensor, batch: int, device: str):
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(ids) - CONTEXT, (batch,), generator=generator)
        rows = torch.stack([ids[s : s + CONTEXT] for s in starts]).to(device)
        yield rows, rows


def encode(tokenizer, examples: list[Example]) -> list[tuple[list[int], list[int]]]:
    """Ids of each prompt as the server makes them, and of its answer with its end."""
    if examples[0].chat and tokenizer.chat_template:
        messages = [[{"role": "user", "content": e.prompt}] for e in examples]
        prompts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        prompts = tokenizer([e.prompt for e in examples]).input_ids
    answers = tokenizer([e.answer for e in examples], add_special_tokens=False).input_ids
    return [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in zip(prompts, answers, strict=True)]


def task_batches(task: str, tokenizer, batch: int, device: str):
    """Fresh examples, the held-out ones left out; the loss is on the answer only."""
    rng = random.Random(f"train {task}")
    forbidden = {e.prompt for e in held_out(task, HELD_OUT)}
    while True:
        examples = (TASKS[task](rng) for _ in count())
        fresh = (e for e in examples if e.prompt not in forbidden)
        rows = encode(tokenizer, list(islice(fresh, batch)))
        width = max(len(p) + len(a) for p, a in rows)
        ids = torch.zeros(batch, width, dtype=torch.long)
        labels = torch.full((batch, width), PAD)
        for i, (prompt, answer) in enumerate(rows):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        yield ids.to(device), labels.to(device)


@torch.inference_mode()
def score(model, tokenizer, task: str, device: str, number: int = 200) -> float:
    """Exact match of greedy answers on held-out examples."""
    examples = held_out(task, number)
    prompts = [prompt for prompt, _ in encode(tokenizer, examples)]
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=48, do_sample=False, pad_token_id=1)
    answers = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return sum(a == e.answer for a, e in zip(answers, examples, strict=True)) / number


def chat_tokenizer(base: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHAT_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def fine_tune(task: str, base: Path, out: Path, steps: int, device: str) -> None:
    """All parameters, or a LoRA where the task's name says so."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    tokenizer = chat_tokenizer(base) if task == "chat" else PreTrainedTokenizerFast.from_pretrained(base)
    print(f"{task}: base scores {score(model, PreTrainedTokenizerFast.from_pretrained(base), task, device):.3f}")
    lr = 1e-3
    if task == "chat":
        model.resize_token_embeddings(model.config.vocab_size + len(CHAT_TOKENS), mean_resizing=False)
    if task.endswith("lora"):
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
        model.peft_config["default"].base_model_name_or_path = "base"
        lr = 3e-3
    trainable = [p for p in model.parameters() if p.requires_grad]
    fit(model, task_batches(task, tokenizer, 256, device), steps, lr, task, trainable)
    model = model.to(torch.bfloat16)
    print(f"{task}: fine-tune scores {score(model, tokenizer, task, device):.3f}")
    model.save_pretrained(out)
    if not task.endswith("lora"):
        tokenizer.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs")
    args = parser.parse_args()
    scale = 0.001 if args.quick else 1.0
    shutil.rmtree(args.out, ignore_errors=True)
    base = args.out / "base"
    text = corpus()
    tokenizer = train_tokenizer(text, base)
    # One encoding call per slice keeps memory small; the model never sees more than CONTEXT tokens at once.
    pieces = [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
    ids = torch.cat([torch.tensor(e) for e in tokenizer(pieces).input_ids])
    print(f"{len(text) / 1e6:.1f} MB of text, {len(ids) / 1e6:.1f} M tokens")
    model = new_model(len(tokenizer)).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    fit(model, text_batches(ids, 64, args.device), int(4000 * scale), 3e-3, "base")
    model.to(torch.bfloat16).save_pretrained(base)
    for task, steps in {"add": 5000, "sort": 2500, "chat": 2500, "json-lora": 800}.items():
        fine_tune(task, base, args.out / task, max(2, int(steps * scale)), args.device)


if __name__ == "__main__":
    main()
