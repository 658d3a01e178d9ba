"""A result file says where it comes from, in a checkout and in an archive of one."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from clsa.bench.report import Report, archived, commit, provenance, result

ROOT = Path(__file__).resolve().parents[2]


def test_result_has_its_origin_before_its_facts() -> None:
    found = result(Report("ops", (), {"dtype": "float32"}, rows=[{"ms": 1}]), ["clsa", "bench", "ops"])
    assert found["command"] == "clsa bench ops"
    assert list(found) == ["benchmark", *provenance(), "dtype", "rows"]
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize("text", ["$Format:%H$", "", "0123", "g" * 40])
def test_a_text_that_is_no_commit_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / ".git_archival.txt").write_text(text + "\n")
    assert archived(tmp_path) is None


def test_no_file_is_no_commit(tmp_path: Path) -> None:
    assert archived(tmp_path) is None


def test_an_archive_knows_its_commit(tmp_path: Path) -> None:
    """The same commit that the checkout names, which may have changed since."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD"], capture_output=True)
    if archive.returncode:
        pytest.skip("not a git checkout")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(tmp_path, filter="data")
    assert archived(tmp_path) == str(commit()).removesuffix("+")
    code = "from clsa.bench.report import commit; print(commit())"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": "."}, capture_output=True)
    assert run.stdout.decode().strip() == archived(tmp_path)
