"""The backend "cuda": what it lists, what it opens, what it says when it cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest

import clsa_cuda
from clsa.errors import BackendError


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, clsa_cuda; print('torch' in sys.modules)"
    path = {"PYTHONPATH": ":".join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_devices_say_what_they_are_or_what_would_help() -> None:
    devices = clsa_cuda.backend.devices()
    assert [d.name for d in devices][-1] == "cpu" and {d.kind for d in devices} == {"nvidia", "cpu"}
    assert all(d.reason for d in devices)
    assert all(d.name.startswith("cuda") == (d.kind == "nvidia") for d in devices)


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "", "CPU", "cuda:9999", "cpu:0", " cpu"])
def test_unknown_device(device: str) -> None:
    with pytest.raises(BackendError, match="must be 'cpu', 'cuda' or 'cuda:N', got"):
        clsa_cuda.backend.open(device)


def test_absent_gpu() -> None:
    with pytest.raises(BackendError, match=r"cannot run on cuda:777 here \(.+\)"):
        clsa_cuda.backend.open("cuda:777")


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clsa_cuda.importlib.util, "find_spec", lambda name: None)
    devices = clsa_cuda.backend.devices()
    assert [(d.name, d.usable) for d in devices] == [("cuda", False), ("cpu", False)]
    for device in (None, "cpu", "cuda"):
        with pytest.raises(BackendError, match=r'torch is not installed; pip install "clsa\[cuda\]" would help'):
            clsa_cuda.backend.open(device)


def test_a_broken_torch_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` raise
    monkeypatch.setattr(clsa_cuda.importlib.util, "find_spec", lambda name: object())
    devices = clsa_cuda.backend.devices()
    assert not any(d.usable for d in devices) and all("cannot be imported" in d.reason for d in devices)


class _Gpu:
    name, total_memory, major, minor = "Some GPU", 16 << 30, 7, 5


@pytest.mark.parametrize(
    "error, help_text",
    [
        (
            "The NVIDIA driver on your system is too old (found version 11040).",
            "updating the driver would help",
        ),
        ("Found no NVIDIA driver on your system.", "device 'cpu' would work"),
        ("No CUDA GPUs are available", "device 'cpu' would work"),
        ("something else", "CUDA does not start: something else"),
    ],
)
def test_cuda_that_does_not_start(monkeypatch: pytest.MonkeyPatch, error: str, help_text: str) -> None:
    torch = pytest.importorskip("torch")

    def fail() -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fail)
    gpu, cpu = clsa_cuda.backend.devices()
    assert not gpu.usable and help_text in gpu.reason and cpu.usable


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: _Gpu)
    gpu, _ = clsa_cuda.backend.devices()
    assert not gpu.usable and "compute capability 7.5" in gpu.reason and "8.0" in gpu.reason
    with pytest.raises(BackendError, match="Some GPU"):
        clsa_cuda.backend.open("cuda:0")


def test_threefry_known_answers_in_torch() -> None:
    torch = pytest.importorskip("torch")
    from clsa_cuda.sample import threefry2x32
    from tests.ops.test_sample import RANDOM_BITS

    for key, counter, want in RANDOM_BITS:
        words = [torch.tensor([x]) for x in (*key, *counter)]
        got = threefry2x32((words[0], words[1]), (words[2], words[3]))
        assert tuple(int(x) for x in got) == want


@pytest.mark.cuda
def test_a_second_gpu_and_a_thread_of_its_own() -> None:
    """Kernels run where the arrays are, whatever GPU the thread has had before."""
    import threading

    import torch

    import clsa

    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    params, texts = clsa.SamplingParams(max_tokens=40), []
    models = [clsa.load("demo", backend="cuda", device=f"cuda:{i}", dtype="float32") for i in (0, 1)]
    for llm in models:
        thread = threading.Thread(target=lambda llm=llm: texts.append(llm.generate(["def f("], params)[0].text))
        thread.start()
        thread.join()
    texts += [llm.generate(["def f("], params)[0].text for llm in models]
    assert len(set(texts)) == 1 and texts[0]
