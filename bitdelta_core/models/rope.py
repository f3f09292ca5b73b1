"""Rotary position embeddings: inverse frequencies of each variant of the method, and cos / sin of a step's rows.

Agrees with transformers' `modeling_rope_utils` for default, linear, llama3 and yarn. `dynamic` (NTK by length) is where
a KV cache forces a choice. transformers recomputes the frequencies from the longest position that it has seen, so keys
in its cache were rotated with several sets, and a prompt longer than max_position_embeddings is rotated with the set of
its whole length. Here the row at position p always uses the set of length max(p + 1, max_position_embeddings): equal to
transformers' `generate` for every prompt within max_position_embeddings, however far it then grows; different for
longer prompts. In return a row's keys depend on its position alone: not on chunking, prefix-cache hits or neighbours.

Not covered: longrope, partial rotary factors, per-layer rope parameters; `from_hf` refuses them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch

from bitdelta_core.errors import CheckpointError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Hashable, so that rows with equal settings share their frequencies."""

    kind: RopeKind
    theta: float
    dim: int
    max_positions: int
    """max_position_embeddings; only `dynamic` uses it."""
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    """What cos and sin are multiplied with (yarn)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, head_dim: int, max_positions: int) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (before).

        Raises:
            CheckpointError: a kind or a setting that is not supported, or a missing one.
        """
        fields = _fields(raw)
        kind = fields.get("rope_type", fields.get("type", "default"))
        if kind not in get_args(RopeKind):
            raise CheckpointError(
                f"config.json: rope_type {kind!r} is not supported, only {', '.join(get_args(RopeKind))}"
            )
        if fields.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
            raise CheckpointError("config.json: partial_rotary_factor other than 1 is not supported")
        theta = _positive(fields, "rope_theta", raw.get("rope_theta") or 10000.0)
        common = {"kind": kind, "theta": theta, "dim": head_dim, "max_positions": max_positions}
        if kind == "default":
            return cls(**common)
        # As transformers does: the top-level spelling, where there is one, wins.
        original = raw.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")
        common["original_positions"] = int(original or max_positions)
        match kind:
            case "llama3":
                low, high = _positive(fields, "low_freq_factor"), _positive(fields, "high_freq_factor")
                if high <= low:
                    raise CheckpointError(f"config.json: high_freq_factor={high} must be above low_freq_factor={low}")
                return cls(**common, factor=_positive(fields, "factor"), low_freq_factor=low, high_freq_factor=high)
            case "yarn":
                return cls(**common, **_yarn_fields(fields, max_positions / common["original_positions"]))
            case _:
                return cls(**common, factor=_positive(fields, "factor"))


def _fields(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    fields = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"config.json: rope parameters must be an object, got {fields!r}")
    if any(isinstance(value, Mapping) for value in fields.values()):
        raise CheckpointError("config.json: rope_parameters per layer type are not supported")
    return fields


def _yarn_fields(fields: Mapping[str, Any], inferred_factor: float) -> dict[str, Any]:
    factor = _positive(fields, "factor", inferred_factor)
    attention = fields.get("attention_factor")
    if attention is None:
        mscale, all_dim = fields.get("mscale"), fields.get("mscale_all_dim")
        attention = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1)
    return {
        "factor": factor,
        "attention_factor": float(attention),
        "beta_fast": _positive(fields, "beta_fast", 32.0),
        "beta_slow": _positive(fields, "beta_slow", 1.0),
        "truncate": bool(fields.get("truncate", True)),
    }


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _positive(fields: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: rope setting {name} must be a positive number, got {value!r}")
    return float(value)


def cos_sin(
    configs: tuple[RopeConfig, ...], config_of_row_T: torch.Tensor | None, positions_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, dim] float32, both halves, times the attention factor.

    `config_of_row_T` indexes `configs`; None: all rows have configs[0].
    """
    if config_of_row_T is None:
        angles = positions_T[:, None].float() * _frequencies(configs[0], positions_T)
        scale: float | torch.Tensor = configs[0].attention_factor
    else:
        per_config = [_frequencies(c, positions_T).expand(positions_T.shape[0], -1) for c in configs]
        rows = torch.arange(positions_T.shape[0], device=positions_T.device)
        angles = positions_T[:, None].float() * torch.stack(per_config)[config_of_row_T, rows]
        factors = torch.tensor([c.attention_factor for c in configs], device=positions_T.device)
        scale = factors[config_of_row_T][:, None]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().mul_(scale), angles.sin().mul_(scale)


def _frequencies(config: RopeConfig, positions_T: torch.Tensor) -> torch.Tensor:
    """[1, dim/2], or [T, dim/2] where they depend on the position."""
    if config.kind == "dynamic":
        return _dynamic(config, positions_T)
    return inv_freq(config, positions_T.device)[None]


@lru_cache(maxsize=1024)
def inv_freq(config: RopeConfig, device: torch.device) -> torch.Tensor:
    """Inverse frequencies [dim/2], float32. `dynamic`: those within max_position_embeddings."""
    exponents = torch.arange(0, config.dim, 2, dtype=torch.float) / config.dim
    powers = config.theta**exponents
    plain = 1.0 / powers
    match config.kind:
        case "linear":
            plain = plain / config.factor
        case "llama3":
            plain = _llama3(config, plain)
        case "yarn":
            plain = _yarn(config, powers)
    return plain.to(device)


def _dynamic(config: RopeConfig, positions_T: torch.Tensor) -> torch.Tensor:
    """NTK scaling of theta by each row's length so far."""
    lengths = (positions_T + 1).clamp(min=config.max_positions)
    stretch = (config.factor * lengths / config.max_positions) - (config.factor - 1)
    theta_T = config.theta * stretch ** (config.dim / (config.dim - 2))
    exponents = torch.arange(0, config.dim, 2, dtype=torch.float, device=positions_T.device) / config.dim
    return 1.0 / (theta_T[:, None] ** exponents)


def _llama3(config: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Long waves are slowed down by the factor, short ones kept, those between interpolated (Llama 3.1)."""
    low, high, old = config.low_freq_factor, config.high_freq_factor, config.original_positions
    wavelength = 2 * math.pi / plain
    smooth = (old / wavelength - low) / (high - low)
    slowed = torch.where(wavelength > old / low, plain / config.factor, plain)
    between = ~(wavelength < old / high) & ~(wavelength > old / low)
    return torch.where(between, (1 - smooth) * slowed / config.factor + smooth * slowed, slowed)


def _yarn(config: RopeConfig, powers: torch.Tensor) -> torch.Tensor:
    """Interpolate the slow dimensions, keep the fast ones, ramp between (YaRN, section 3.2)."""
    low, high = (_yarn_dimension(config, beta) for beta in (config.beta_fast, config.beta_slow))
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(config.dim // 2, dtype=torch.float) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (config.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _yarn_dimension(config: RopeConfig, rotations: float) -> float:
    """The dimension that turns `rotations` times within the original context."""
    return config.dim * math.log(config.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))
