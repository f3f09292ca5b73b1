"""A tiny base with one variant of every kind, and what transformers answers for each once it is restored."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from bitdelta_core.delta import auto
from bitdelta_core.delta.auto_options import AutoOptions
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.dropout import DropoutOptions
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.delta.restore import restore
from tests.tiny import make_base, make_finetune

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROPE = {
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
}
KINDS: dict[str, tuple[CompressOptions | AutoOptions, dict[str, Any]]] = {
    "bitdelta-tensor": (CompressOptions(scale_layout="tensor", embeddings="exact"), {"only": "proj"}),
    "bitdelta-row": (CompressOptions(scale_layout="row"), {}),
    "bitdelta-row-col-int8": (CompressOptions(scale_layout="row_col", embeddings="int8"), {}),
    "three-bits-int2": (CompressOptions(bits=3, embeddings="int2"), {}),
    "dense": (CompressOptions(codec="dense", embeddings="exact"), {}),
    "more-vocabulary": (CompressOptions(embeddings="int4"), {"new_tokens": ("<|user|>", "<|end|>", "<|x|>")}),
    "more-rows": (CompressOptions(embeddings="exact"), {"only": "mlp", "new_tokens": ("<|user|>",)}),
    "rope": (CompressOptions(embeddings="exact"), {"only": "norm", "config": ROPE}),
    "dropout": (CompressOptions(codec="deltadq", dropout=DropoutOptions(alpha=4, mask_rows=16)), {}),
    "dropout-four-bits": (
        CompressOptions(codec="deltadq", dropout=DropoutOptions(alpha=2, value_bits=4, group=8, scale="tensor")),
        {"new_tokens": ("<|y|>",)},
    ),
    "auto-low-rank": (AutoOptions(bits=0.5, texts=4), {"new_tokens": ("<|z|>",)}),
    "auto-dense": (AutoOptions(bits=3.0, calibrate=False), {}),
    "empty": (CompressOptions(), {"only": "nothing"}),
}


@dataclass
class Zoo:
    root: Path
    family: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    """Overrides of the base's config"""

    @cached_property
    def base(self) -> Path:
        return make_base(self.root / "base", self.family, **self.config)

    @cached_property
    def deltas(self) -> dict[str, Path]:
        """Kind -> delta directory. Made on the CPU: on a GPU memcheck would watch thousands of kernels more."""
        found = {}
        for seed, (kind, (options, changes)) in enumerate(KINDS.items(), start=1):
            fine = make_finetune(self.base, self.root / f"fine-{kind}", seed=seed, scale=0.3, **changes)
            made = self.root / f"delta-{kind}"
            if isinstance(options, AutoOptions):
                found[kind] = auto.compress(self.base, fine, made, options, device="cpu")
            else:
                found[kind] = compress(self.base, fine, made, options, device="cpu")
        self._make_adapter(self.root / "adapter")
        found["lora"] = compress(self.base, self.root / "adapter", self.root / "delta-lora")
        return found

    def _make_adapter(self, path: Path) -> None:
        torch.manual_seed(4)
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, target_modules=LINEARS))
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) / max(parameter.shape) ** 0.5)
        wrapped.save_pretrained(str(path))

    def reference(self, kind: str | None) -> Any:
        """The restored variant in transformers, float32."""
        if kind not in self._references:
            if kind is not None:
                restore(self.base, self.deltas[kind], self._restored(kind), dtype=torch.float32)
            model = AutoModelForCausalLM.from_pretrained(self._restored(kind), dtype=torch.float32).eval()
            model.generation_config.eos_token_id = None
            self._references[kind] = model
        return self._references[kind]

    def logits(self, kind: str | None, tokens: Sequence[int]) -> torch.Tensor:
        """Of the reference, [len(tokens), its vocabulary]."""
        with torch.no_grad():
            return self.reference(kind)(torch.tensor([list(tokens)])).logits[0]

    def rounding(self, kind: str | None, dtype: torch.dtype) -> float:
        """How far this dtype moves a logit of transformers' restored variant, at worst in a text of 128 tokens, in
        units of the spread of the token's logits. Variants differ: what amplifies loses more."""
        if (kind, dtype) not in self._roundings:
            tokens = random.Random(0).choices(range(256), k=128)
            exact, device = self.logits(kind, tokens), "cuda" if torch.cuda.is_available() else "cpu"
            model: Any = AutoModelForCausalLM.from_pretrained(self._restored(kind), dtype=dtype)
            with torch.no_grad():
                rounded = model.eval().to(device)(torch.tensor([tokens], device=device)).logits[0].float().cpu()
            off = (rounded - exact).abs() / exact.std(dim=1, keepdim=True)
            self._roundings[kind, dtype] = float(off.max())
        return self._roundings[kind, dtype]

    def _restored(self, kind: str | None) -> Path:
        return self.base if kind is None else self.root / f"restored-{kind}"

    @cached_property
    def _roundings(self) -> dict[tuple[str | None, torch.dtype], float]:
        return {}

    @cached_property
    def _references(self) -> dict[str | None, Any]:
        return {}

    def answer(self, kind: str | None, prompt: Sequence[int], count: int) -> list[int]:
        """What transformers generates greedily."""
        ids = torch.tensor([list(prompt)])
        out = self.reference(kind).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return out[0, len(prompt) :].tolist()


def overwrite(file: Path, part_of_name: str, value: float) -> None:
    """Set one float32 tensor of a safetensors file to a value, in place."""
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:header])
    [entry] = [e for name, e in entries.items() if part_of_name in name]
    start, stop = (header + offset for offset in entry["data_offsets"])
    assert entry["dtype"] == "F32"
    data[start:stop] = struct.pack("<f", value) * ((stop - start) // 4)
    file.write_bytes(data)
