"""The device decoder's logits are those of each variant restored and run by transformers: every kind, in any company.

On a CPU the kernels run in the interpreter of Triton in float32, with signs unpacked, or in an emulation of the binary
tensor core. On a GPU the same tests run in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from bitdelta_core.delta.format import open_delta
from bitdelta_core.models.device import layout
from tests.engine.engine_zoo import KINDS, Zoo
from tests.kernels.b1 import emulated
from tests.unit.device_stepper import DEVICE, DeviceStepper, Rig, Running, error, pretend_b1

ALL = (None, *KINDS, "lora")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
}


@pytest.fixture(scope="module", autouse=True)
def few_extra_tokens() -> Iterator[None]:
    """Every row has logits for them, which the interpreter computes block by block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "EXTRA_TOKENS", 6)
        yield


class Variants:
    """A rig with variants of a zoo: slot i has kind ALL[i + 1]."""

    def __init__(self, zoo: Zoo) -> None:
        self.zoo = zoo
        self.rig = Rig(zoo.base)
        for slot, kind in enumerate(ALL[1:]):
            reader = open_delta(zoo.deltas[str(kind)])
            self.rig.add(slot, reader.config, reader)

    def sequences(self, kinds: Sequence[str | None], length: int, seed: int = 1) -> list[Running]:
        """Sorted by slot. Each ends with the last id of its own vocabulary."""
        gen = torch.Generator().manual_seed(seed)
        slots = sorted(ALL.index(kind) - 1 for kind in kinds)
        drawn = [torch.randint(0, 256, (length - 1,), generator=gen).tolist() for _ in slots]
        return [Running(s, [*t, self.rig.vocabulary(s) - 1]) for s, t in zip(slots, drawn, strict=True)]

    def check(self, sequences: Sequence[Running], logits: Sequence[torch.Tensor]) -> None:
        for sequence, rows in zip(sequences, logits, strict=True):
            with torch.no_grad():
                model = self.zoo.reference(ALL[sequence.slot + 1])
                expected = model(torch.tensor(sequence.tokens)[None]).logits[0]
            own = expected.shape[1]
            assert own == self.rig.vocabulary(sequence.slot)
            assert (rows[:, own:] == -torch.inf).all()
            off = error(rows[:, :own], expected)
            assert off < (2e-3 if DEVICE.type == "cpu" else 0.06), f"{ALL[sequence.slot + 1]}: off by {off:.1e} of rms"


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Variants:
    return Variants(Zoo(tmp_path_factory.mktemp("zoo"), config=SMALL))


def test_every_kind_at_once(variants: Variants) -> None:
    """Chunks and single rows of all variants and the base side by side."""
    sequences = variants.sequences(ALL, 3)
    variants.check(sequences, DeviceStepper(variants.rig).run(sequences, (2, 1)))
    variants.rig.tables.check_integrity()


MIXES: dict[str, list[str | None]] = {
    "identical": ["bitdelta-row-col-int8"] * 3,
    "zipf": [None, "three-bits-int2", "three-bits-int2", "three-bits-int2", "lora", "more-vocabulary"],
    "base": [None] * 3,
    "integers": ["auto-low-rank", "auto-low-rank", "auto-dense", "lora", None],
}


def test_auto_keeps_its_integers(variants: Variants) -> None:
    """Layers, embedding and head. In 16 bits, differences of so narrow a model may take less than padding."""
    for kind in ("auto-low-rank", "auto-dense"):
        kinds = variants.rig.layouts[ALL.index(kind) - 1].kinds
        for part in (kinds.layers, kinds.embed, kinds.head):
            assert part.byte_rank > 0
            assert part.rank == 0
            assert not part.dense or DEVICE.type == "cuda"


@pytest.mark.parametrize("mix", MIXES)
def test_company(variants: Variants, mix: str) -> None:
    sequences = variants.sequences(MIXES[mix], 4)
    variants.check(sequences, DeviceStepper(variants.rig).run(sequences, (3, 1)))


def test_single_rows_in_wide_steps(variants: Variants) -> None:
    sequences = variants.sequences([None, "bitdelta-row-col-int8", "more-rows", "lora"], 2)
    variants.check(sequences, DeviceStepper(variants.rig, alone=False).run(sequences, (1,)))


def test_binary_tensor_core(variants: Variants, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes written by norm, attention and SiLU, multiplied with signs as they lie in memory."""
    pretend_b1(monkeypatch)
    sequences = variants.sequences(["bitdelta-row-col-int8", "three-bits-int2", "dropout"], 1)
    with emulated():
        variants.check(sequences, DeviceStepper(variants.rig).run(sequences, (1,)))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_cleared_slot_gives_no_answer(variants: Variants) -> None:
    """Not the base's, nor that of who was there before."""
    rig, slot = variants.rig, ALL.index("bitdelta-row") - 1
    sequences = variants.sequences([None, "bitdelta-row"], 2)
    rig.tables.clear(slot)
    base, cleared = DeviceStepper(rig).run(sequences, (1,))
    variants.check(sequences[:1], [base])
    assert (cleared == -torch.inf).all()
    rig.tables.publish(slot, rig.layouts[slot], rig.starts[slot])
    again = variants.sequences(["bitdelta-row"], 2)
    variants.check(again, DeviceStepper(rig).run(again, (1,)))
