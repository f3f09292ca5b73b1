"""One buffer tells the device all of a step; what a step does not use is padding."""

from __future__ import annotations

import pytest
import torch

from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.device.arena import WorkArena
from bitdelta_core.models.device.kv_cache import DeviceKVCache
from bitdelta_core.models.device.step import StepBuffers, StepSize
from bitdelta_core.models.kv_cache import kv_bytes_per_block
from tests.tiny import BASE_CONFIG

CPU = torch.device("cpu")
SIZE = StepSize(rows=6, sequences=3, segments=2, logits=4, blocks=5, tiles=2)


def test_a_step_is_padding_until_written() -> None:
    buffers = StepBuffers(SIZE, CPU)
    assert (buffers.rows.source_T == -1).all()
    for _ in range(3):
        host = buffers.begin()
        host.tokens_T[:] = 7
        host.source_T[:] = 7
        host.set_starts([0, 2])
    buffers.begin()
    buffers.upload()
    rows = buffers.rows
    assert rows.source_T.tolist() == [-1] * 6
    padding = (rows.tokens_T, rows.positions_T, rows.kv_slots_T, rows.entry_T, rows.context_lens_S)
    padding += (rows.segments_G4, rows.logit_rows_L, rows.logit_segments_G4, buffers.sampling.fields_SF)
    assert all((field == 0).all() for field in padding)
    assert rows.query_starts_S1.tolist() == [0] * 4


def test_what_is_written_arrives_in_its_place() -> None:
    buffers = StepBuffers(SIZE, CPU)
    host = buffers.begin()
    values = {}
    for i, name in enumerate(SIZE.shapes()):
        field = getattr(host, name)
        field[:] = 1000 * i + torch.arange(field.size).view(field.shape).numpy()
        values[name] = torch.from_numpy(field.copy())
    buffers.upload()
    for name, value in values.items():
        match name:
            case "sampling_LF":
                assert torch.equal(buffers.sampling.fields_SF, value)
            case "tiles_I4":
                assert torch.equal(buffers.tiles(2), value)
            case _:
                assert torch.equal(getattr(buffers.rows, name), value)


def test_host_can_write_the_next_step_before_the_last_has_been_copied() -> None:
    buffers = StepBuffers(SIZE, CPU)
    first, second, third = (buffers.begin() for _ in range(3))
    first.tokens_T[:], second.tokens_T[:] = 1, 2
    assert (third.tokens_T == 1).all()
    assert (second.tokens_T == 2).all()


def test_starts_of_fewer_sequences() -> None:
    buffers = StepBuffers(SIZE, CPU)
    buffers.begin().set_starts([0, 4, 5])
    buffers.upload()
    assert buffers.rows.query_starts_S1.tolist() == [0, 4, 5, 5]


def test_narrowed_views_are_contiguous_and_at_fixed_addresses() -> None:
    buffers = StepBuffers(SIZE, CPU)
    rows = buffers.narrowed(4, 2, 1, 3)
    assert rows.tokens_T.shape == (4,)
    assert rows.query_starts_S1.shape == (3,)
    assert rows.block_tables_SM.shape == (2, 5)
    for name in type(rows).__dataclass_fields__:
        assert getattr(rows, name).is_contiguous()
        assert getattr(rows, name).data_ptr() == getattr(buffers.rows, name).data_ptr()
    decode = StepSize.decode(8, 5)
    assert (decode.sequences, decode.segments, decode.logits, decode.tiles) == (8, 8, 8, 0)


def test_arena_reuses_what_is_not_alive_together() -> None:
    arena = WorkArena(torch.zeros(4096, dtype=torch.uint8))
    kept = arena.take((3,), torch.float32)
    with arena.reused():
        inside = arena.take((300,), torch.float32)
    after = arena.take((100,), torch.float32)
    assert after.data_ptr() == inside.data_ptr() == kept.data_ptr() + 256
    assert arena.peak == 256 + 1280
    with pytest.raises(AssertionError, match="planned for less"):
        arena.take((4096,), torch.uint8)
    counting = WorkArena(None)
    assert counting.take((5, 7), torch.int32).shape == (5, 7)
    assert counting.peak == 256


def test_kv_cache_takes_what_is_planned() -> None:
    config = ModelConfig.from_hf({"model_type": "llama", **BASE_CONFIG})
    cache = DeviceKVCache(config, 7, 16, device=CPU, dtype=torch.bfloat16)
    assert cache.nbytes == 7 * kv_bytes_per_block(config, 16, torch.bfloat16)
    assert [layer.shape for layer in cache.layers] == [(7, 2, 2, 16, 16)] * 2
