"""What happens around requests: clients that leave, variants that change, stores that fail, replicas that die."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from deployments.client import APP
from deployments.gateway import REPLICAS
from deployments.metrics import SERIES
from tests.integration.serve_harness import VARIANTS, Server, texts, wait_for

pytestmark = pytest.mark.ray
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
ENDLESS: dict[str, Any] = {"max_tokens": 8000, "temperature": 0, "extra_body": {"ignore_eos": True}}
"""Many seconds of work: whoever stops early has been stopped."""


@pytest.fixture(autouse=True)
def nothing_is_left_behind(server: Server) -> Iterator[None]:
    yield
    wait_for("blocks, pins and queues to be free again", server.idle)


def generated(server: Server) -> int:
    return sum(stats.generation_tokens_total for stats in server.stats())


def busy(server: Server) -> bool:
    return any(stats.running for stats in server.stats())


def test_a_client_that_leaves_a_stream_frees_its_blocks_and_pins(server: Server) -> None:
    before = generated(server)
    stream = server.client().completions.create(model="acme/plain", prompt="Hello", stream=True, **ENDLESS)
    for _ in range(3):
        next(iter(stream))
    assert any(stats.pinned and stats.kv_blocks_used for stats in server.stats())
    stream.close()
    wait_for("the request to be aborted", server.idle, timeout_s=5)
    assert generated(server) - before < 8000


def test_a_client_that_gives_up_waiting_frees_them_too(server: Server) -> None:
    before = generated(server)
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=0.5).completions.create(model="acme/plain", prompt="Hello", **ENDLESS)
    wait_for("the request to be aborted", server.idle, timeout_s=5)
    assert generated(server) - before < 8000


def test_a_variant_pushed_while_the_server_runs(server: Server, tmp_path: Path) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="acme/new", prompt="Hello", **GREEDY)
    first = server.models.delta("acme/new-1", seed=11)
    server.push("acme/new", first)

    def answer(model: str = "acme/new") -> str | None:
        try:
            return texts(client.completions.create(model=model, prompt="Hello", **GREEDY))[0]
        except openai.NotFoundError:
            return None

    assert wait_for("the new variant", answer) == server.models.answer(first, "Hello", 12)
    assert "acme/new" in {card.id for card in wait_for("a fresh list", lambda: list(client.models.list()))}

    second = server.models.delta("acme/new-2", seed=12)
    server.push("acme/new", second)
    expected = server.models.answer(second, "Hello", 12)
    wait_for("the new version", lambda: answer() == expected)
    assert answer("acme/new@1") == server.models.answer(first, "Hello", 12)


def test_an_alias_that_moves(server: Server) -> None:
    client = server.client()
    old, new = (server.models.delta(f"zeta/moving-{i}", seed=20 + i) for i in (1, 2))
    server.push("zeta/moving", old)
    server.push("zeta/moving", new)
    for version, delta in [(1, old), (2, new), (1, old)]:
        server.catalog.set_alias(f"zeta/moving@{version}", "live")
        expected = server.models.answer(delta, "Hello", 12)

        def served(expected: str = expected) -> bool:
            try:
                answer = client.completions.create(model="zeta/moving:live", prompt="Hello", **GREEDY)
            except openai.NotFoundError:
                return False
            return texts(answer)[0] == expected

        wait_for(f"version {version}", served)


def test_a_corrupt_delta_hurts_nobody_else(server: Server) -> None:
    manifest = server.push("zeta/broken", server.models.delta("zeta/broken", seed=31))
    entry = next(e for e in manifest.files if e.path.endswith(".safetensors"))
    blob = server.repo / "blobs" / "sha256" / entry.sha256
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x00")
    client = server.client()
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(client.completions.create, model="acme/plain", prompt="Hello", **GREEDY) for _ in range(3)]
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model="zeta/broken", prompt="Hello", **GREEDY)
        answers = {texts(future.result())[0] for future in good}
    assert caught.value.code == "delta_corrupt"
    assert "zeta/broken@1" in caught.value.message
    assert answers == {server.models.answer(server.deltas["acme/plain"], "Hello", 12)}


def test_a_variant_of_another_base_is_refused(server: Server) -> None:
    server.catalog.publish(server.deltas["acme/plain"], "zeta/foreign", base_sha256="0" * 64)
    with pytest.raises(openai.ConflictError) as caught:
        server.client().completions.create(model="zeta/foreign", prompt="Hello")
    assert caught.value.code == "base_mismatch"


def test_while_the_store_is_down_resident_variants_are_served_and_cold_ones_are_503(server: Server) -> None:
    client = server.client()
    cold = server.push("zeta/cold", server.models.delta("zeta/cold", seed=41))
    assert client.models.retrieve("zeta/cold").id == "zeta/cold"  # so that its name is known, but none of its bytes
    warm = texts(client.completions.create(model="acme/plain", prompt="Hello", **GREEDY))
    with server.store_down():
        for _ in range(3):
            assert texts(client.completions.create(model="acme/plain", prompt="Hello", **GREEDY)) == warm
        for name in ("zeta/cold", "zeta/never-asked-for"):
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model=name, prompt="Hello", **GREEDY)
            assert (caught.value.status_code, caught.value.code) == (503, "delta_unavailable")
            assert int(caught.value.response.headers["retry-after"]) >= 1

    def back() -> bool:
        try:
            return bool(texts(client.completions.create(model=cold.model_id, prompt="Hello", **GREEDY)))
        except openai.InternalServerError:
            return False

    wait_for("the store to be used again", back)


def test_each_variant_stays_on_one_replica(server: Server) -> None:
    client = server.client()
    names = [f"acme/affine-{i}" for i in range(6)]
    manifests = [server.push(name, server.models.delta(name, seed=50 + i)) for i, name in enumerate(names)]
    for _ in range(4):
        for manifest in manifests:
            assert client.completions.create(model=manifest.model_id, prompt="Hello", max_tokens=1).choices
    resident = [stats.resident for stats in server.stats()]
    holders = {m.model_id: sum(m.delta_sha256 in held for held in resident) for m in manifests}
    assert holders == {m.model_id: 1 for m in manifests}


def test_metrics(server: Server) -> None:
    client = server.client()
    client.completions.create(model="acme/plain", prompt="Hello", **GREEDY)

    def text() -> str:
        with server.http(None) as http:
            answer = http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        return answer.text if "ray_bitdelta_time_to_first_token_seconds_count" in answer.text else ""

    found = wait_for("Ray to export what was counted", text)
    names = {line.split("{")[0] for line in found.splitlines() if not line.startswith("#")}
    known = {f"ray_bitdelta_{name}" for name in SERIES}
    assert all(name in known or name.rpartition("_")[0] in known for name in names)
    assert {"ray_bitdelta_deltas_resident", "ray_bitdelta_generation_tokens_total"} <= names
    assert not any(owner in found for owner in ("acme/plain", "tenant="))


def replicas() -> list[Any]:
    """The actors of our model replicas."""
    import ray

    names = [found["name"] for found in ray.util.list_named_actors(all_namespaces=True)]
    return [ray.get_actor(name, namespace="serve") for name in names if f"{APP}#{REPLICAS}#" in name]


def test_a_replica_that_dies_ends_its_streams_with_an_error_and_is_replaced(server: Server) -> None:
    import ray

    client = server.client()
    before = replicas()
    stream = iter(client.completions.create(model="acme/plain", prompt="Hello", stream=True, **ENDLESS))
    next(stream)
    ongoing = ray.get([actor.get_num_ongoing_requests.remote() for actor in before])
    assert sorted(ongoing) == [0, 1]
    ray.kill(before[ongoing.index(1)])
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pass
    assert caught.value.code == "replica_lost"
    for name in ("base", *VARIANTS):
        answer = client.completions.create(model=name, prompt="Hello", **GREEDY)
        assert texts(answer)[0] == server.models.answer(server.deltas.get(name), "Hello", 12)

    def whole() -> bool:
        return len(replicas()) == len(before) and len(server.stats()) == len(before)

    wait_for("the replacement", whole, timeout_s=90)
