"""A file of requests in the OpenAI batch form, answered as a stream; results survive an interruption.

A result is appended as one whole line as soon as it is there. Going on after an interruption, of whatever kind, cuts
off a last line that is torn, and runs what has no result. What is wrong with a line becomes its result; only what is
wrong with a file stops the run. Memory does not grow with the files, but for a few bytes per line.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clsa import ClsaError, RequestError
from clsa.config import SamplingParams, show
from clsa_cli import output
from clsa_cli.batch_line import DUPLICATE, ID_PREFIX, Job, Summary, read_job, result_of
from clsa_cli.key_table import KeyTable

if TYPE_CHECKING:
    from clsa.llm import LLM
    from clsa.tokenizer import Tokenizer

MAX_LINE_BYTES = 1 << 26
SYNC_SECONDS = 1.0  # at most so much work is lost with the power
_HEAD = b'{"id": "' + ID_PREFIX.encode()  # how every result line begins
_DONE, _SEEN = 1, 2  # flags of a key: it has a result; its line was met in this run


class Batch:
    """A file of requests and the file of its results, which belongs to one run at a time."""

    def __init__(self, requests: Path, results: Path) -> None:
        """Look at both files, and cut off a result that an interrupted run left half written.

        Raises ClsaError if they are one file, if `results` holds something else than results, or if another process
        is writing to it.
        """
        if results.exists() and results.samefile(requests):
            raise RequestError(f"--input and --output are the same file, {requests}; give results a file of their own")
        if not results.absolute().parent.is_dir():
            raise RequestError(f"there is no folder {results.absolute().parent} for --output")
        self.requests, self.results = requests, results
        self._keys = KeyTable()
        self._out = results.open("ab")
        try:
            fcntl.flock(self._out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read_results()
        except BlockingIOError:
            self._out.close()
            raise ClsaError(
                f"another process is writing to {results}; wait for it, or choose another --output"
            ) from None
        except BaseException:
            self._out.close()
            raise

    def run(self, llm: LLM, model: str, defaults: SamplingParams, *, ordered: bool = False, salt: str = "") -> Summary:
        """Run what has no result yet. `defaults` holds for whatever a body leaves out.

        Results come as they finish, or with `ordered` in the order of the requests.
        """
        summary = Summary()
        with self._out, self._progress() as advance:
            jobs = ((job, job.prompt, job.params) for job in self._jobs(llm.tokenizer, defaults, summary))
            synced = time.monotonic()
            with closing(llm.run(jobs, ordered=ordered, salt=salt)) as answers:
                for job, answer in answers:
                    result = result_of(job, answer, model)
                    now = time.monotonic()
                    self._append(result, sync=now - synced > SYNC_SECONDS)
                    synced = now if now - synced > SYNC_SECONDS else synced
                    summary.add(result)
                    advance(summary)
            self._append(None, sync=True)
            advance(summary)
        return summary

    def _jobs(self, tokenizer: Tokenizer, defaults: SamplingParams, summary: Summary) -> Iterator[Job]:
        for number, line in _lines(self.requests):
            if not line.strip():
                continue
            job = read_job(number, line, tokenizer, defaults)
            flags = self._keys.mark(_key(job.custom_id, job.id), _SEEN)
            if flags & _SEEN:
                problem = f"custom_id {show(job.custom_id)} occurs twice; every line needs its own"
                job = replace(job, prompt=RequestError(problem), twice=True)
                flags = self._keys.mark(_key(None, job.id), _SEEN)
            if flags & _DONE:
                summary.skipped += 1
            else:
                yield job

    def _append(self, result: Mapping[str, Any] | None, *, sync: bool) -> None:
        try:
            if result is not None:
                self._out.write(output.json_line(result).encode())
                self._out.flush()
            if sync:
                os.fsync(self._out.fileno())
        except OSError as error:
            raise ClsaError(
                f"{self.results} cannot be written: {error.strerror}; the same command goes on from here"
            ) from None

    def _read_results(self) -> None:
        """Mark the lines that have a result. A last line without its end is cut off, if it began as a result."""
        start = 0
        for number, line in _lines(self.results):
            whole = line.endswith(b"\n")
            key = _result_key(line) if whole else None
            if key is not None:
                self._keys.mark(key, _DONE)
            elif not whole and line[: len(_HEAD)] == _HEAD[: len(line)]:
                os.truncate(self.results, start)
            else:
                raise ClsaError(f"{self.results} line {number} is no batch result; choose another --output")
            start += len(line)

    @contextmanager
    def _progress(self) -> Iterator[Callable[[Summary], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        total = sum(1 for _, line in _lines(self.requests) if line.strip())
        columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=output.console(stderr=True), redirect_stdout=False) as progress:
            task = progress.add_task("requests", total=total)
            yield lambda done: progress.update(task, completed=done.completed + done.failed + done.skipped)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ClsaError(f"{path} line {number} is longer than {MAX_LINE_BYTES} bytes; split the request")
            yield number, line


def _key(custom_id: str | None, line_id: str) -> str:
    """What names a line in both files: its custom_id, or its number where it has none that is valid and its own."""
    return f"line {line_id}" if custom_id is None else f"id {custom_id}"


def _result_key(line: bytes) -> str | None:
    try:
        result = json.loads(line)
        custom_id, line_id, error = result["custom_id"], result["id"], result["error"]
        if "response" not in result or not isinstance(line_id, str) or not isinstance(custom_id, (str, type(None))):
            return None
        is_twice = error is not None and error["code"] == DUPLICATE
        return _key(None if is_twice else custom_id, line_id)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
