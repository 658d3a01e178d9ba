"""mlx-lm's own server on a CLSA checkpoint: completions, chats, several at once, and its prompt cache."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import clsa
from clsa import SamplingParams
from clsa.config import EngineConfig
from clsa.convert import convert

pytestmark = pytest.mark.mlx
pytest.importorskip("mlx_lm")

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "clsa" / "assets" / "demo"
CODE = "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in float32: in bfloat16 the company that a prompt has can decide between equally good tokens."""
    return convert(DEMO, tmp_path_factory.mktemp("demo") / "float32", dtype="float32").folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> clsa.LLM:
    return clsa.load(str(folder), backend="mlx", engine=EngineConfig(max_num_seqs=4))


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(ROOT / part) for part in (".", "backends/mlx")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "clsa_mlx.mlx_lm", "server", "--model", str(folder), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--temp", "0"], env=env, stdout=output, stderr=output)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(10)


def wait_for(health: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(health, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')}")


def post(url: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def shown(text: str) -> str:
    return text.removeprefix(" ")  # mlx-lm leaves out the first space of any text


def test_a_completion(url: str, llm: clsa.LLM) -> None:
    wanted = llm.generate([CODE], SamplingParams(max_tokens=20))[0]
    got = post(f"{url}/completions", prompt=CODE, max_tokens=20)
    assert got["choices"][0]["text"] == shown(wanted.text)
    assert got["usage"]["prompt_tokens"] == wanted.prompt_tokens


def test_several_at_once(url: str, llm: clsa.LLM) -> None:
    prompts = [CODE * n + f"x{n} = " for n in (1, 9, 3, 6)]
    outs = llm.generate(prompts, SamplingParams(max_tokens=16))
    with ThreadPoolExecutor(len(prompts)) as pool:
        got = pool.map(lambda prompt: post(f"{url}/completions", prompt=prompt, max_tokens=16), prompts)
        texts = [answer["choices"][0]["text"] for answer in got]
    assert texts == [shown(out.text) for out in outs]


def test_a_chat_whose_second_turn_finds_the_first(url: str, llm: clsa.LLM) -> None:
    messages = [{"role": "user", "content": CODE * 4}]
    for turn in range(2):
        prompt = llm.tokenizer.encode_chat(messages)
        wanted = llm.generate([prompt], SamplingParams(max_tokens=12))[0]
        got = post(f"{url}/chat/completions", messages=messages, max_tokens=12)
        answer = got["choices"][0]["message"]
        assert answer["content"] == shown(wanted.text)
        cached = got["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert (cached > 100) == (turn == 1)
        messages += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "go on"}]


def test_a_request_the_model_cannot_answer_leaves_the_server_alive(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError):
        post(f"{url}/completions", prompt=17, max_tokens=3)
    assert post(f"{url}/completions", prompt="a", max_tokens=3)["choices"]
