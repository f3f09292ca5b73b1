"""Commands: serve, check-config."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

Engine = "Engine"


def serve(
    base: Annotated[Path | None, typer.Option(help="Directory of the base checkpoint.")] = None,
    repo: Annotated[str | None, typer.Option(help="Repository: a path, file:// or s3://bucket/prefix.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the base.")] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="Ask clients for this key; may be repeated.")] = None,
    direct_streaming: Annotated[
        bool | None, typer.Option("--direct-streaming", help="Replicas answer HTTP themselves, behind HAProxy.")
    ] = None,
    num_replicas: Annotated[int | None, typer.Option(help="Model replicas.")] = None,
    num_gpus: Annotated[float | None, typer.Option(help="GPUs per replica.")] = None,
    num_cpus: Annotated[float | None, typer.Option(help="CPUs (and threads) per replica.")] = None,
    generation_config: Annotated[
        str | None, typer.Option(help="auto: defaults from each variant's generation_config.json; none: the API's.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to join, or auto.", envvar="RAY_ADDRESS")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda", rich_help_panel=Engine)] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16", rich_help_panel=Engine)] = None,
    decoder: Annotated[str | None, typer.Option(help="auto, device, torch", rich_help_panel=Engine)] = None,
    enforce_eager: Annotated[bool | None, typer.Option(help="No CUDA graphs.", rich_help_panel=Engine)] = None,
    cuda_graph_sizes: Annotated[
        list[int] | None, typer.Option(help="Sequences of captured steps; may be repeated.", rich_help_panel=Engine)
    ] = None,
    cuda_graph_deltas: Annotated[
        list[Path] | None,
        typer.Option(
            help="A delta like those to come: its steps are captured at the start. Else like what is published.",
            rich_help_panel=Engine,
        ),
    ] = None,
    async_scheduling: Annotated[
        bool | None, typer.Option(help="Launch steps while one runs.", rich_help_panel=Engine)
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of a GPU's memory: 0.9", rich_help_panel=Engine)
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest context.", rich_help_panel=Engine)] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences per step.", rich_help_panel=Engine)] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Rows per step.", rich_help_panel=Engine)] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per KV block.", rich_help_panel=Engine)] = None,
    slab_bytes: Annotated[str | None, typer.Option(help="Memory for deltas: 2GiB", rich_help_panel=Engine)] = None,
    max_resident_variants: Annotated[
        int | None, typer.Option(help="Deltas in the slab at most.", rich_help_panel=Engine)
    ] = None,
    host_cache_bytes: Annotated[
        str | None, typer.Option(help="Host memory for deltas: 8GiB", rich_help_panel=Engine)
    ] = None,
    loader: Annotated[
        str | None, typer.Option(help="What reads deltas: auto, thread, process", rich_help_panel=Engine)
    ] = None,
    kv_cache_bytes: Annotated[str | None, typer.Option(help="Memory for KV: 4GiB", rich_help_panel=Engine)] = None,
    seed: Annotated[int | None, typer.Option(help="Of requests without one.", rich_help_panel=Engine)] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where fetched deltas are kept.")] = None,
    cache_bytes: Annotated[str | None, typer.Option(help="How much of them: 50GB")] = None,
    catalog_ttl_s: Annotated[float | None, typer.Option(help="How long a name keeps its meaning.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's and the replicas' logs.")] = False,
) -> None:
    """Serve a base and every variant of it in a repository behind one OpenAI-compatible endpoint."""
    given = {name: value for name, value in locals().items() if value is not None}
    listen = {name: given.pop(name) for name in ("host", "port", "address", "verbose") if name in given}
    config = config_of(given)
    if config.direct_streaming:
        from deployments.config import direct_environment

        os.environ.update(direct_environment())  # Ray reads it when it is imported
    from deployments import launch

    launch.run(config, launch.Listen(**listen), say=lambda text: print(text, flush=True))


def check_config(
    files: Annotated[list[Path], typer.Argument(help="Serve config or RayService files.")],
) -> None:
    """Check Serve config files; unlike Ray, refuse keys that mean nothing."""
    from deployments.check import check_file

    found = {file: check_file(file) for file in files}
    for file, lines in found.items():
        print("\n".join(f"{file}: {line}" for line in lines) or f"{file}: ok")
    if any(found.values()):
        raise typer.Exit(1)


def config_of(given: dict[str, Any]) -> Any:
    """An AppConfig from flags, and BITDELTA_* for the rest.

    Raises:
        InvalidRequest: naming the flag that is wrong or missing.
    """
    from pydantic import ValidationError

    from bitdelta_core.errors import InvalidRequest
    from deployments.config import AppConfig

    try:
        return AppConfig(**given)
    except ValidationError as error:
        lines = [f"--{str(e['loc'][0]).replace('_', '-')}: {e['msg']}" for e in error.errors(include_url=False)]
        raise InvalidRequest("; ".join(lines)) from None


def register(app: typer.Typer) -> None:
    """Add this module's commands to the `bitdelta` app."""
    app.command()(serve)
    app.command("check-config")(check_config)
