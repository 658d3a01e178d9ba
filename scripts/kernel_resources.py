"""What the compiler makes of the CUDA kernels, on a machine without a GPU: registers, spills, shared memory.

    PYTHONPATH=.:backends/cuda python scripts/kernel_resources.py [--capability 90] [--only attend]

Compiles each kernel as a decode step of the 4B sizes launches it and prints one line for each: the resource report
of ptxas, how many instructions and how wide the loads are. Ends with 1 if a kernel does not compile.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from clsa.config import PAGE_SIZE
from clsa_cuda.kernels import (
    attend,
    attend_float8,
    attend_pages,
    causal_prefill,
    gather_attention,
    linear,
    ring_product,
    score_many,
    select,
    sliding_prefill,
    write_memory,
)
from clsa_cuda.kernels import pick as picking
from clsa_cuda.kernels.float8_product import float8_tiles
from clsa_cuda.kernels.launch import jit_function
from clsa_cuda.kernels.merge import merged
from clsa_cuda.kernels.prefill import prefill_tiles
from clsa_cuda.kernels.product import product_tiles
from clsa_cuda.kernels.ring_tiles import BLOCK_N, RingTiles, block_of_rows, ring_tiles
from clsa_cuda.kernels.tiles import Limits, attention_tiles, cdiv, context_tiles, next_power_of_2, select_tiles

TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
H200 = Limits(132, 227 << 10, early_launch=True, hopper=True)
# batch, context, k
PICKS: tuple[tuple[int, int, int], ...] = (
    (1, 1 << 17, 2048),
    (32, 1 << 17, 2048),
    (32, 1 << 13, 2048),
    (1, 1 << 20, 2048),
)
PICKS += ((1, 1 << 17, 8192), (32, 1 << 17, 8192), (1, 1 << 20, 8192))


def cases() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Name -> kernel, types of its arguments, its constants, launch options."""
    out = {}
    for dtype in TYPES:
        out[f"score {dtype}"] = score(dtype)
    for batch, context, k in PICKS:
        out[f"pick {batch} {context} {k}"] = pick(batch, context, k)
    for dtype in TYPES:
        for source in ("list", "block", "ring"):
            out[f"attend {source} {dtype}"] = attention(source, dtype, 128, 5, 32)
        out[f"attend pages {dtype}"] = pages(dtype, 32)
    for head_dim in (64, 80, 96, 256):
        out[f"attend list bfloat16 D={head_dim}"] = attention("list", "bfloat16", head_dim, 5, 32)
    for source, batch in (("list", 1), ("list", 32), ("block", 32)):
        out[f"attend {source} float8 {batch}"] = attention_float8(source, batch)
    for batch in (1, 32, 512):
        out[f"attend pages float8 {batch}"] = pages("float8", batch)
        out[f"attend pages bfloat16 {batch}"] = pages("bfloat16", batch)
    out["attend list bfloat16 16 heads"] = attention("list", "bfloat16", 128, 16, 32)
    out["attend list bfloat16 one query"] = attention("list", "bfloat16", 128, 5, 1)
    for dtype in TYPES:
        out[f"score many {dtype}"] = scores_of_many(dtype)
        for kind in ("sliding", "causal"):
            out[f"prefill {kind} {dtype}"] = prefill(kind, dtype, 128)
    out["prefill causal bfloat16 marked"] = prefill("causal", "bfloat16", 128, marked=True)
    for head_dim in (64, 80, 256):
        out[f"prefill causal bfloat16 D={head_dim}"] = prefill("causal", "bfloat16", head_dim)
    for rows in (1, 32):
        for weights in ("bfloat16", "float8"):
            out[f"qkv {weights} {rows}"] = linear_of(rows, 3584, 2560, True, False, weights)
            out[f"output {weights} {rows}"] = linear_of(rows, 2560, 2560, False, False, weights)
            out[f"gate and up {weights} {rows}"] = linear_of(rows, 7680, 2560, True, True, weights)
            out[f"down {weights} {rows}"] = linear_of(rows, 2560, 7680, False, False, weights)
        out[f"head {rows}"] = linear_of(rows, 151936, 2560, True, False)
    pointers = dict.fromkeys(("k", "v", "k_out", "v_out"), "*bf16") | dict.fromkeys(("rows", "lengths"), "*i32")
    integers = dict.fromkeys(("k_stride", "v_stride", "K"), "i32")
    constants = {"E": 512, "BLOCK_E": 512, "BLOCK": 16}
    out["compact bfloat16"] = (
        jit_function(gather_attention._compact_kernel),
        pointers | integers,
        constants,
        {"num_warps": 4},
    )
    names = ("k", "v", "k_idx", "to_k", "to_v", "to_k_idx")
    types = (
        dict.fromkeys(names, "*bf16")
        | {"mapping": "*i32"}
        | dict.fromkeys(("k_stride", "v_stride", "k_idx_stride"), "i32")
    )
    constants = {"E": 512, "BLOCK_E": 512, "I": 128, "BLOCK_I": 128}
    out["write bfloat16"] = (jit_function(write_memory._write_kernel), types, constants, {"num_warps": 2})
    return out


def score(dtype: str) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    tiles = select_tiles(32, 2048, 2048, H200)
    types = dict.fromkeys(("q_idx", "k_idx"), TYPES[dtype])
    types |= dict.fromkeys(("positions", "sequence", "block_table", "keys", "maxima"), "*i32")
    types |= dict.fromkeys(("q_stride", "k_stride", "table_stride", "capacity", "max_groups"), "i32")
    constants = {
        "I": 128,
        "BLOCK_I": 128,
        "PAGE": PAGE_SIZE,
        "PAGES": tiles.score_pages,
        "OVERLAP": True,
        "GROUP": tiles.group,
        "STAGES": tiles.score_stages,
    }
    return jit_function(select._score_kernel), types, constants, {"num_warps": tiles.score_warps}


def pick(batch: int, context: int, k: int) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    tiles = select_tiles(batch, context // PAGE_SIZE, k, H200)
    names = (
        "keys",
        "maxima",
        "listed_keys",
        "listed",
        "counts",
        "arrived",
        "positions",
        "sequence",
        "block_table",
        "chosen_positions",
        "chosen_rows",
        "lengths",
    )
    types = dict.fromkeys(names, "*i32")
    types |= dict.fromkeys(("table_stride", "capacity", "max_groups", "K", "splits"), "i32")
    whole = context <= tiles.search_tile
    constants = {
        "BLOCK_K": next_power_of_2(k),
        "PAGE": PAGE_SIZE,
        "GROUP": tiles.group,
        "SEARCH_TILE": min(tiles.search_tile, context // tiles.group),
        "LIST_TILE": tiles.list_tile,
        "CHOSEN_TILE": context if whole else tiles.chosen_tile,
        "ROWS": 1 if whole else tiles.pick_splits,
        "WHOLE": whole,
        "OVERLAP": True,
    }
    return jit_function(picking._pick_kernel), types, constants, {"num_warps": tiles.pick_warps}


def attention(
    source: str, dtype: str, head_dim: int, repeat: int, batch: int
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    max_keys = 512 if source == "ring" else 2048
    tiles = attention_tiles(batch, 4, max_keys, head_dim, getattr(torch, dtype).itemsize, H200)
    types = dict.fromkeys(("q", "k", "v", "own_k", "own_v", "out"), TYPES[dtype])
    types |= dict.fromkeys(("rows", "lengths", "arrived"), "*i32")
    types |= dict.fromkeys(("partial", "sums"), "*fp32")
    types |= dict.fromkeys(
        ("H", "q_stride", "k_stride", "v_stride", "own_k_stride", "own_v_stride", "rows_stride"), "i32"
    )
    types |= {"scale": "fp32", "splits": "i32"}
    window = source == "ring"
    types |= {"eps": "fp32"} if window else {}
    types |= dict.fromkeys(("q_norm", "k_norm"), TYPES[dtype]) if window else {}
    types |= {"frequencies": "*fp32", "mapping": "*i32"} if window else {}
    constants = {
        "WINDOW": window,
        "FRESH": False,
        "LAST": tiles.last,
        "D": head_dim,
        "BLOCK_D": next_power_of_2(head_dim),
        "REPEAT": repeat,
        "KV_HEADS": 4,
        "BLOCK_H": max(16, next_power_of_2(repeat)),
        "BLOCK_N": tiles.block_n,
        "SPLIT": tiles.splits > 1,
        "SOURCE": source,
        "SIZE": max_keys,
        "STAGES": tiles.num_stages,
        "MERGED": merged(tiles.splits, 4 * batch * tiles.splits, repeat, head_dim, tiles.num_warps, H200.sm_count),
        "OVERLAP": True,
    }
    return jit_function(attend._attend_kernel), types, constants, {"num_warps": tiles.num_warps}


def attention_float8(source: str, batch: int) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    _, types, constants, options = attention(source, "bfloat16", 128, 5, batch)
    kernel = jit_function(attend_float8._attend_float8_kernel)
    constants |= {"KV_HEADS": 4, "NATIVE": True}
    types, constants = ({n: v for n, v in found.items() if n in kernel.arg_names} for found in (types, constants))
    return kernel, types | {"k": "*i16", "v": "*i16"}, constants, options


def pages(dtype: str, batch: int) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    """Whole contexts; `dtype` is that of the memory, and queries are in bfloat16 where it is float8."""
    words, own = dtype == "float8", TYPES.get(dtype, "*bf16")
    tiles = context_tiles(4 * batch, 128, 1 if words else getattr(torch, dtype).itemsize, H200)
    types = dict.fromkeys(("q", "out"), own) | dict.fromkeys(("k", "v"), "*i16" if words else own)
    types |= dict.fromkeys(("block_table", "positions", "sequence", "arrived"), "*i32")
    types |= dict.fromkeys(("partial", "sums"), "*fp32")
    types |= dict.fromkeys(("num_queries", "H", "q_stride", "k_stride", "v_stride", "table_stride"), "i32")
    constants = {
        "D": 128,
        "BLOCK_D": 128,
        "REPEAT": 5,
        "KV_HEADS": 4,
        "BLOCK_H": 16,
        "BLOCK_N": tiles.block_n,
        "BLOCK_T": next_power_of_2(batch),
        "PAGE": PAGE_SIZE,
        "STAGES": tiles.num_stages,
        "MERGED": merged(cdiv(tiles.programs, 4 * batch), tiles.programs, 5, 128, tiles.num_warps, H200.sm_count),
        "WORDS": words,
        "NATIVE": True,
        "OVERLAP": True,
    }
    kernel = jit_function(attend_pages._attend_pages_kernel)
    return kernel, types | {"scale": "fp32"}, constants, {"num_warps": tiles.num_warps}


def prefill(
    kind: str, dtype: str, head_dim: int, marked: bool = False
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    tiles = prefill_tiles(head_dim, getattr(torch, dtype).itemsize, H200, window=kind != "causal")
    types = dict.fromkeys(("q", "k", "v", "ring_k", "ring_v", "out"), TYPES[dtype])
    types |= dict.fromkeys(("slots", "block_table", "positions", "tiles"), "*i32")
    strides = ("q_stride", "k_stride", "v_stride", "ring_stride", "table_stride", "marks_stride")
    types |= dict.fromkeys(("H", "W", *strides), "i32") | {"marks": "*i8"}
    constants = {
        "D": head_dim,
        "BLOCK_D": next_power_of_2(head_dim),
        "REPEAT": 5,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "STAGES": tiles.num_stages,
    }
    kernel = jit_function(sliding_prefill._sliding_kernel)
    if kind == "causal":
        kernel = jit_function(causal_prefill._causal_kernel)
        constants |= {"PAGE": PAGE_SIZE, "MARKED": marked}
    types = {name: t for name, t in (types | {"scale": "fp32"}).items() if name in kernel.arg_names}
    return kernel, types, constants, {"num_warps": tiles.num_warps}


def linear_of(
    rows: int, out_size: int, in_size: int, norm: bool, swiglu: bool, weights: str = "bfloat16"
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    """A product of a 4B layer: with a norm before it, or a residual behind it."""
    tiles = product_tiles(rows, out_size, in_size, swiglu, norm, H200)
    types = dict.fromkeys(("x", "w", "norm", "residual", "out"), "*bf16")
    if weights == "float8":
        tiles = float8_tiles(rows, out_size, in_size, swiglu, H200)
        types |= {"w": "*i32", "norm": "*i32"}
    types |= {"scales": "*fp32", "partial": "*fp32", "arrived": "*i32", "eps": "fp32"}
    types |= dict.fromkeys(("M", "N", "x_stride", "residual_stride"), "i32")
    ring = ring_tiles(rows, out_size, in_size, swiglu, norm, H200, 1 if weights == "float8" else 2)
    if ring is not None:
        constants = ring_constants(rows, in_size, ring, norm, swiglu) | {"SCALED": weights == "float8"}
        return (
            jit_function(ring_product._ring_kernel),
            types | {"norm": "*bf16", "w": "*fp8e4nv" if weights == "float8" else "*bf16"},
            constants,
            {"num_warps": 4},
        )
    constants = {
        "K": in_size,
        "BLOCK_M": max(16, next_power_of_2(rows)),
        "ROWS": tiles.rows,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "SPLITS": tiles.splits,
        "STAGES": tiles.num_stages,
        "SCALED": weights == "float8",
        "NORM": norm,
        "SWIGLU": swiglu,
        "ADD": not norm,
        "OVERLAP": True,
    }
    limit = {"maxnreg": tiles.max_registers} if tiles.max_registers else {}
    return jit_function(linear._linear_kernel), types, constants, {"num_warps": tiles.num_warps} | limit


def ring_constants(rows: int, in_size: int, tiles: RingTiles, norm: bool, swiglu: bool) -> dict[str, Any]:
    return {
        "K": in_size,
        "BLOCK_M": block_of_rows(rows),
        "ROWS": tiles.rows,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": tiles.block_k,
        "SPLITS": tiles.splits,
        "STAGES": tiles.num_stages,
        "NORM": norm,
        "SWIGLU": swiglu,
        "ADD": not norm,
        "OVERLAP": True,
    }


def scores_of_many(dtype: str) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    block_m, num_warps, num_stages = score_many.shape_of(getattr(torch, dtype).itemsize)
    types = dict.fromkeys(("q_idx", "k_idx"), TYPES[dtype])
    types |= dict.fromkeys(("positions", "block_table", "tiles", "keys", "maxima"), "*i32")
    types |= dict.fromkeys(("q_stride", "k_stride", "table_stride", "capacity", "max_groups"), "i32")
    group = select_tiles(512, 2048, 2048, H200).group
    constants = {"I": 128, "PAGE": PAGE_SIZE, "GROUP": group, "BLOCK_M": block_m, "STAGES": num_stages}
    return jit_function(score_many._score_kernel), types, constants, {"num_warps": num_warps}


def report(
    capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int]
) -> str:
    aligned = [name for name, kind in types.items() if kind != "fp32" and name not in ("H", "splits", "num_queries")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    if "OVERLAP" in constants:
        constants["OVERLAP"] = capability >= 90
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    kind = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = kind(kernel, signature, constexprs=constants, attrs=attributes)
    start = time.monotonic()
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    seconds = time.monotonic() - start
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage, sass = (
            subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}  # type: ignore[index]
    kinds = Counter(
        re.findall(r"\b(LDG\.E\S*|LDGSTS\S*|HMMA\.\d+|[HQ]GMMA\.\S+|LDL|STL|ATOMG\S*|RED\.\S*|BAR\.SYNC|SHFL)", sass)
    )
    short: Counter[str] = Counter()
    for name, count in kinds.items():
        width = re.search(r"\.(64|128|256)\b", name)
        short[name.split(".")[0] + (width[0] if width else "")] += count
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M))
    parts = [f"{name} {count}" for name, count in sorted(short.items())]
    return (
        f"{found['REG']:4d} regs {found['STACK']:5d} stack {compiled.metadata.shared / 1024:6.1f} KB "
        f"{options['num_warps']:3d} warps {instructions:6d} instr {seconds:5.1f} s  {', '.join(parts)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    failed = 0
    for name, case in cases().items():
        if args.only not in name:
            continue
        try:
            line = report(args.capability, *case)
        except Exception as error:
            failed += 1
            line = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{name:36s} {line}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
