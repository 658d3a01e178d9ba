"""`clsa info`: what a checkpoint is, what its state costs, and what each backend would do here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clsa import BackendError, CheckpointError, ConfigError, EngineConfig, ModelConfig, __version__
from clsa_cli import options, output

if TYPE_CHECKING:
    from clsa.backend import BackendInfo
    from clsa.checkpoint import Checkpoint
    from clsa.config import MemoryDtypes
    from clsa.ops import Ops


def info(
    model: Annotated[
        str | None, typer.Option(help="A bundled name, a folder, or a hub id (org/name).  [default: demo]")
    ] = None,
    backend: options.Backend = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    max_num_seqs: options.MaxNumSeqs = None,
    max_tokens_per_step: options.MaxTokensPerStep = None,
    max_memory: options.MaxTokensInMemory = None,
    kv_dtype: options.KvDtype = None,
    index_dtype: options.IndexDtype = None,
    weight_dtype: options.WeightDtype = None,
) -> None:
    """Show a model's sizes and what its state costs, and what each backend would do on this machine."""
    engine = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_tokens_per_step=max_tokens_per_step,
        max_tokens_in_memory=max_memory,
        kv_dtype=kv_dtype,
        index_dtype=index_dtype,
        weight_dtype=weight_dtype,
    )
    checkpoint, described = _model(model, engine.memory_dtypes)
    ops, found = _backends(backend)
    facts = {"version": __version__, "model": described, **found, "plan": _plan(ops, checkpoint, engine)}
    if json:
        output.write_json(facts)
    else:
        _show(facts)


def _model(name: str | None, stored: MemoryDtypes) -> tuple[Checkpoint | None, dict[str, Any] | None]:
    from clsa.checkpoint import open_checkpoint
    from clsa.hub import resolve

    try:
        folder = resolve(name or "demo")
    except CheckpointError as error:
        if name is not None:
            raise
        output.note(f"no model: {error}")
        return None, None
    checkpoint = open_checkpoint(folder)
    return checkpoint, _sizes(name or "demo", folder, checkpoint, stored)


def _sizes(name: str, folder: Path, checkpoint: Checkpoint, stored: MemoryDtypes) -> dict[str, Any]:
    from clsa import params

    config = checkpoint.config
    dtype = config.torch_dtype
    return {
        "name": name,
        "folder": str(folder),
        "config": config.to_dict(),
        "parameters": params.num_parameters(config),
        "weight_bytes": checkpoint.num_bytes,
        "dtype": dtype,
        "state_bytes_per_token": params.state_bytes_per_token(config, dtype, stored),
        "transformer_bytes_per_token": params.transformer_bytes_per_token(config, dtype),
        "window_bytes_per_sequence": params.window_bytes(config, dtype),
        "context": config.max_position_embeddings,
    }


def _backends(name: str) -> tuple[Ops | None, dict[str, Any]]:
    from clsa.backend import backends, load_backend

    found = backends()
    if name != "auto" and name not in {b.name for b in found}:
        raise BackendError(f"backend must be 'auto' or one of {', '.join(b.name for b in found)}, got {name!r}")
    listed = [_backend(b) for b in found if name in ("auto", b.name)]
    try:
        ops, choice = load_backend(name)
        return ops, {"backends": listed, "choice": choice, "refusal": None}
    except BackendError as error:
        return None, {"backends": listed, "choice": None, "refusal": str(error)}


def _plan(ops: Ops | None, checkpoint: Checkpoint | None, engine: EngineConfig) -> dict[str, Any] | None:
    """How the engine would use the memory of the chosen backend's device, or why it cannot."""
    if ops is None or checkpoint is None:
        return None
    from clsa.llm import default_dtype
    from clsa.plan import make_plan
    from clsa.sizing import plan_sizes
    from clsa.weights import check_float8

    dtype = default_dtype(ops, checkpoint.config)
    try:
        check_float8(ops, checkpoint.config, engine)
        sizes = plan_sizes(ops, make_plan(checkpoint.config), dtype, engine)
    except (BackendError, ConfigError) as error:
        return {"refusal": str(error)}
    counts = {"pages": sizes.num_pages, "slots": sizes.num_slots, "snapshots": sizes.num_snapshots}
    return {"dtype": dtype, **counts, **sizes.stats(), "refusal": None}


def _backend(found: BackendInfo) -> dict[str, Any]:
    devices = [{"name": d.name, "kind": d.kind, "usable": d.usable, "reason": d.reason} for d in found.devices]
    return {"name": found.name, "devices": devices, "error": found.error}


def _show(facts: dict[str, Any]) -> None:
    from rich.table import Table

    if facts["model"] is not None:
        output.facts(_model_rows(facts["model"]))
        output.write("\n")
    table = Table(
        "backend", "device", "usable", "what it is, or why not", box=None, header_style="bold", pad_edge=False
    )
    for found in facts["backends"]:
        for device in found["devices"]:
            usable = "yes" if device["usable"] else "no"
            table.add_row(found["name"], device["name"], usable, output.one_line(device["reason"]))
        if found["error"] is not None:
            table.add_row(found["name"], "-", "no", output.one_line(found["error"]))
    output.console().print(table)
    if facts["choice"] is not None:
        output.write(f"\nwould run: {output.one_line(facts['choice'])}\n")
    else:
        output.error(facts["refusal"])
    if facts["plan"] is not None:
        output.facts(_plan_rows(facts["plan"]))


def _plan_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    if plan["refusal"] is not None:
        return [("memory", plan["refusal"])]
    weights, state, step = (output.size(plan[name]) for name in ("weight_bytes", "state_bytes", "step_bytes"))
    return [
        ("memory", f"{weights} of weights, {state} of state ({plan['dtype']}), up to {step} for a step"),
        (
            "holds",
            f"{output.count(plan['max_tokens_in_memory'], 'token')} in {output.count(plan['pages'], 'page')}, "
            f"{plan['max_tokens_cached']:,} of them for prefixes; {output.count(plan['slots'], 'sequence')} at a time, "
            f"{output.count(plan['max_tokens_per_step'], 'token')} a step, "
            f"{output.count(plan['snapshots'], 'snapshot')} of windows",
        ),
    ]


def _model_rows(model: dict[str, Any]) -> list[tuple[str, str]]:
    config = ModelConfig.from_dict(model["config"])
    state, other = model["state_bytes_per_token"], model["transformer_bytes_per_token"]
    kinds = [f"{config.layer_types.count(kind)} {kind}" for kind in dict.fromkeys(config.layer_types)]
    index = f"best {config.index_topk:,} tokens, index width {config.index_head_dim}"
    if config.index_block_size > 1:
        index += f", in blocks of {config.index_block_size}"
    return [
        ("model", model["name"]),
        ("folder", model["folder"]),
        ("parameters", f"{model['parameters']:,}"),
        ("weights", output.weights(config, model["weight_bytes"])),
        ("context", output.count(model["context"], "token")),
        ("layers", f"{config.num_hidden_layers}: {', '.join(kinds)}"),
        ("routing", f"{config.index_topk_pattern or 'none'}; {index}"),
        ("width", f"{config.hidden_size:,}, feed-forward {config.intermediate_size:,}"),
        (
            "heads",
            f"{config.num_attention_heads} query, {config.num_key_value_heads} key-value, "
            f"{config.head_dim} wide; window {config.sliding_window:,}",
        ),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("state", f"{state:,} bytes per token; a Transformer of these sizes keeps {other:,}"),
        ("windows", f"{output.size(model['window_bytes_per_sequence'])} per sequence, however long it is"),
    ]
