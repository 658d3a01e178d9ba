"""kill -9 in the middle of a batch, again and again: every id has one result in the end, and every line is whole."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from clsa_cli.key_table import KeyTable
from tests.cli.conftest import Start

LINES, KILLS = 2000, 20


@pytest.mark.parametrize("order", [[], ["--ordered"]], ids=["as-they-finish", "ordered"])
def test_kill_9_twenty_times(start: Start, tmp_path: Path, order: list[str]) -> None:
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ids = [f"request {i}" for i in range(LINES)]
    requests.write_text("".join(json.dumps({"custom_id": i, "body": {"prompt": "x"}}) + "\n" for i in ids))
    rng = random.Random(0)
    command = ["generate", "--input", str(requests), "--output", str(results), *order]
    for kill in range(KILLS):
        size = results.stat().st_size if results.exists() else 0
        goal = size + rng.randrange(1, 30_000)  # bytes, of about 380 per line
        process = start(*command, fake="FakeLLM(delay=0.0005)")
        deadline = time.monotonic() + 30
        while not results.exists() or results.stat().st_size < goal:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.communicate()
        if kill % 2:  # as if the last write had not come to its end
            data = results.read_bytes()
            last = data.rstrip(b"\n").rfind(b"\n") + 1
            results.write_bytes(data[: last + rng.randrange(1, len(data) - last)])
    before = results.read_bytes().count(b"\n")
    assert KILLS <= before < LINES, "the kills came in the middle"
    process = start(*command)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert sorted(line["custom_id"] for line in found) == sorted(ids)
    assert all(line["response"]["status_code"] == 200 for line in found)
    if order:
        assert [line["custom_id"] for line in found] == ids
    assert f"{LINES - before:,} answers, 0 errors, {before:,} there before" in stderr.decode()


def test_a_key_table_is_a_set_with_flags() -> None:
    table, flags = KeyTable(), dict[str, int]()
    rng = random.Random(0)
    for _ in range(20_000):
        key, flag = f"key {rng.randrange(5000)} \ud800", rng.choice((1, 2))
        assert table.mark(key, flag) == flags.get(key, 0)
        flags[key] = flags.get(key, 0) | flag
    assert len(table) == len(flags)
    assert len(table._digests) + len(table._flags) <= 68 * len(table)
