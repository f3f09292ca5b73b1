"""The application's configuration: flags, environment, YAML, keys."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from bitdelta_core.engine.config import EngineConfig
from bitdelta_core.errors import InvalidRequest
from deployments.auth import ANYBODY, authenticate
from deployments.commands.serving import config_of
from deployments.config import ApiKey, AppConfig
from deployments.errors import Unauthorized

BASE = Path("/models/some-base")


def test_environment_fills_what_flags_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITDELTA_REPO", "s3://b/p")
    monkeypatch.setenv("BITDELTA_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("BITDELTA_SLAB_BYTES", "1GiB")
    config = config_of({"base": BASE, "max_num_seqs": 9})
    assert (config.repo, config.max_num_seqs, config.slab_bytes) == ("s3://b/p", 9, 2**30)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_num_seq\n"):
        AppConfig(base=BASE, max_num_seq=3)  # pyright: ignore[reportCallIssue]


def test_errors_name_the_flag() -> None:
    with pytest.raises(InvalidRequest, match=r"--num-replicas: .*greater than or equal to 1"):
        config_of({"base": BASE, "num_replicas": 0})
    with pytest.raises(InvalidRequest, match="--base: Field required"):
        config_of({})


def test_the_base_is_called_like_its_directory() -> None:
    assert AppConfig(base=BASE).base_name == "some-base"
    assert AppConfig(base=BASE, served_model_name="x").base_name == "x"


def test_an_ingress_for_three_replicas() -> None:
    found = [AppConfig(base=BASE, num_replicas=n).ingresses for n in (1, 3, 4, 6, 7)]
    assert found == [1, 1, 2, 2, 3]


def test_engine_options_are_what_the_engine_takes() -> None:
    config = AppConfig(base=BASE, device="cpu", dtype="float32", max_model_len=99, max_num_seqs=3, block_size=8, seed=4)
    made = EngineConfig(**config.engine_options())
    assert (made.device, made.dtype, made.max_model_len, made.max_num_seqs) == ("cpu", "float32", 99, 3)
    assert EngineConfig(**AppConfig(base=BASE).engine_options()) == EngineConfig()
    given = config_of({"base": BASE, "cuda_graph_deltas": [Path("/deltas/some")]})
    assert given.engine_options()["cuda_graph_deltas"] == ("/deltas/some",)


def test_it_travels_to_replicas_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AppConfig(base=BASE, api_key="k")  # pyright: ignore[reportArgumentType]
    sent = pickle.dumps(config)
    monkeypatch.setenv("BITDELTA_REPO", "another")
    assert pickle.loads(sent) == config


def test_secrets_are_not_printed() -> None:
    config = AppConfig(base=BASE, api_key="topsecret", api_keys=[{"key": "hidden"}])  # pyright: ignore[reportArgumentType]
    assert "topsecret" not in repr(config)
    assert "hidden" not in repr(config)


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITDELTA_API_KEY", "from-env")
    keys = AppConfig(base=BASE).keys()
    assert authenticate(keys, "Bearer from-env").owners is None


def test_an_api_key_has_one_form() -> None:
    for given in ({}, {"key": "a", "sha256": "0" * 64}, {"key": "  "}, {"sha256": "xyz"}):
        with pytest.raises(ValidationError):
            ApiKey.model_validate(given)


def test_authentication() -> None:
    digest = hashlib.sha256(b"k2").hexdigest()
    body = {"api_key": ["k1"], "api_keys": [{"tenant": "acme", "sha256": digest, "owners": ["acme"]}]}
    keys = AppConfig(base=BASE, **body).keys()
    assert authenticate(keys, "Bearer k1").owners is None
    account = authenticate(keys, "bearer  k2")
    assert (account.tenant, account.owners) == ("acme", frozenset({"acme"}))
    for header in (None, "", "Bearer", "Bearer ", "Bearer k3", "Basic k1", "k1", f"Bearer {digest}"):
        with pytest.raises(Unauthorized):
            authenticate(keys, header)
    assert authenticate((), None) is ANYBODY
