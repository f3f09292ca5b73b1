"""Whole decode steps of others: transformers with a static cache and torch.compile, and PEFT's mixed-adapter batch.

Both get a Llama of random weights in the same shape and dtype, and a cache that is filled to the same context.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import gpu_timing
import torch
from synthetic import Shape
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

Step = Callable[[], torch.Tensor]
ROOM = 64
"""Tokens of a cache beyond the context: more than a measurement takes steps."""


def model_of(shape: Shape) -> Any:
    """A LlamaForCausalLM of random weights, made on the device; its values are small, so that nothing overflows."""
    config = LlamaConfig(**{k: v for k, v in shape.config().items() if k not in ("architectures", "model_type")})
    device = gpu_timing.device()
    with torch.device(device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(previous)
    return model.eval().requires_grad_(False)


def step_of(model: Any, shape: Shape, *, batch: int, context: int, adapters: list[str] | None = None) -> Step:
    """One decode step of `batch` rows after `context` tokens. The cache counts its tokens itself: each call adds one,
    and there is room for ROOM calls."""
    device, dtype = model.device, model.dtype
    cache = StaticCache(config=model.config, max_cache_len=context + ROOM)
    kv = torch.randn(batch, shape.kv_heads, context, shape.hidden // shape.heads, device=device, dtype=dtype)
    for layer in range(shape.layers):
        cache.update(kv, kv, layer)
    token = torch.randint(3, shape.vocabulary, (batch, 1), device=device)
    position = torch.full((batch, 1), context, device=device)
    arguments: dict[str, Any] = {
        "input_ids": token,
        "position_ids": position,
        "past_key_values": cache,
        "use_cache": True,
        "return_dict": True,
    }
    if adapters is not None:
        arguments["adapter_names"] = adapters

    @torch.inference_mode()
    def step() -> torch.Tensor:
        return model(**arguments).logits[:, -1].argmax(-1)

    return step


def transformers_us(shape: Shape, *, batch: int, context: int, compiled: bool = True) -> float:
    """Microseconds of one step on the bare base."""
    model = model_of(shape)
    if compiled and gpu_timing.device().type == "cuda":
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    step = step_of(model, shape, batch=batch, context=context)
    for _ in range(4):  # compiles, and records its graphs
        step()
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    if skips:
        print(f"torch.compile recorded no CUDA graph, {skips} times", flush=True)
    return gpu_timing.stream_us(step, repeats=15)


def peft_us(shape: Shape, *, batch: int, context: int, rank: int = 16) -> float:
    """Microseconds of one step in which every row has a LoRA of its own on all linears."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    # adapters in the base's dtype: PEFT makes them float32 for training otherwise
    with torch.device(gpu_timing.device()):  # thousands of small matrices: made where they will be
        model = get_peft_model(model_of(shape), config, adapter_name="variant-0", autocast_adapter_dtype=False)
        for i in range(1, batch):
            model.add_adapter(f"variant-{i}", config, autocast_adapter_dtype=False)
    model = model.eval()
    step = step_of(model, shape, batch=batch, context=context, adapters=[f"variant-{i}" for i in range(batch)])
    for _ in range(2):
        step()
    return gpu_timing.stream_us(step, repeats=5)


def free() -> None:
    """What a peer has left on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.compiler.reset()
        torch.cuda.empty_cache()
