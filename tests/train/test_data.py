"""The corpus, the tokenizer and the batches: what goes in, what comes out, and that it can be repeated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clsa.errors import TrainError
from clsa.train import bpe, data
from clsa.train.sources import Document, find_files, read_documents, stdlib_files

CODE = '''def area_{i}(width, height):
    """Area {i} of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError(f"negative: {{width}} {{height}}")
    return width * height + {i}
'''


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "sources"
    (root / "pkg").mkdir(parents=True)
    for i in range(80):
        (root / "pkg" / f"mod_{i}.py").write_text(CODE.format(i=i) * 4)
    return root


def texts(root: Path, files: list[Path]) -> dict[str, str]:
    documents, _ = read_documents(root, files)
    return {d.path: d.text for d in documents}


def test_find_files_is_sorted_and_stays_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("b.py", "a/z.py", "a.py", ".hidden/x.py", "site-packages/y.py", "c.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x = 1\n")
    (tmp_path / "outside.py").write_text("secret = 1\n")
    (root / "link.py").symlink_to(tmp_path / "outside.py")
    found = [f.relative_to(root).as_posix() for f in find_files(root)]
    assert found == ["a.py", "a/z.py", "b.py"]
    assert [f.name for f in find_files(root, "*.txt")] == ["c.txt"]
    assert find_files(root, "../*.py") == []


@pytest.mark.parametrize("glob", ["", "/etc/*.py"])
def test_a_bad_glob_is_refused(tmp_path: Path, glob: str) -> None:
    with pytest.raises(TrainError, match="--glob must be a relative pattern"):
        find_files(tmp_path, glob)


def test_documents_are_normalised_and_filtered(tmp_path: Path) -> None:
    table = "TABLE = {\n" + "".join(f"    0x{i:02x}: '\\u{i:04x}',  # LETTER\n" for i in range(256)) + "}\n"
    contents = {
        "a.py": b"\xef\xbb\xbfif x:\r\n\ty = 1\r\n",
        "again.py": b"if x:\n    y = 1\n",
        "empty.py": b" \n",
        "latin.py": "# caf\u00e9\n".encode("latin-1"),
        "large.py": b"x = y\n" * 70_000,
        "table.py": table.encode(),
        "z.py": "# caf\u00e9\n".encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    documents, skipped = read_documents(tmp_path, find_files(tmp_path))
    assert [(d.path, d.text) for d in documents] == [
        ("a.py", "if x:\n    y = 1\n"),
        ("z.py", "# caf\u00e9\n"),
    ]
    assert skipped == {"duplicate": 1, "empty": 1, "not UTF-8": 1, "too large": 1, "table": 1}
    assert documents[0].render() == "# file: a.py\nif x:\n    y = 1\n"


def test_the_standard_library_is_code_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all of it parses, which takes half a minute, is left out: the next test has a file that does not."""
    monkeypatch.setattr("clsa.train.sources._parses", lambda _: True)
    root = Path(json.__file__).parents[1]
    names = {f.relative_to(root.resolve()).as_posix() for f in stdlib_files()}
    assert {"json/decoder.py", "argparse.py", "encodings/cp1252.py"} <= names
    assert not [n for n in names if "site-packages" in n or n.startswith(("lib2to3/tests/data", "_sysconfigdata"))]
    kept = texts(root, [root / n for n in ("argparse.py", "encodings/cp1252.py", "stringprep.py")])
    assert list(kept) == ["argparse.py"]


def test_stdlib_files_drops_what_does_not_parse(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "python2.py").write_text("print 'x'\n")
    assert [f.name for f in stdlib_files(tmp_path)] == ["good.py"]


def test_the_split_is_by_path_and_near_its_share() -> None:
    held = [i for i in range(10_000) if Document(f"pkg/m{i}.py", "").held_out]
    assert 300 < len(held) < 500
    assert held[:5] == [2, 24, 33, 62, 66]  # another rule would train on what earlier models held out


def test_build_corpus_writes_the_same_bytes_again(sources: Path, tmp_path: Path) -> None:
    report = data.build_corpus(tmp_path / "one", sources, vocab_size=320)
    data.build_corpus(tmp_path / "two", sources, vocab_size=320)
    names = {f.name for f in (tmp_path / "one").iterdir()}
    assert names == {
        "train.safetensors",
        "held_out.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "corpus.json",
    }
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert json.loads((tmp_path / "one" / "corpus.json").read_text()) == report
    train = {f["path"] for f in report["train"]["files"]}
    held = {f["path"] for f in report["held_out"]["files"]}
    assert len(train) + len(held) == 80 and not train & held


def test_the_tokens_decode_to_the_documents(sources: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    report = data.build_corpus(tmp_path / "out", sources, vocab_size=320)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for name in data.SPLITS:
        tokens, offsets = data.load_split(tmp_path / "out", name)
        assert tokens.dtype == np.uint16 and offsets.dtype == np.int64
        assert len(tokens) == report[name]["tokens"]
        for i, file in enumerate(report[name]["files"]):
            ids = tokens[offsets[i] : offsets[i + 1]].tolist()
            text = f"# file: {file['path']}\n" + (sources / file["path"]).read_text()
            assert tokenizer.decode(ids, skip_special_tokens=False) == f"{bpe.BOS}{text}{bpe.EOS}"
            assert len(ids) == file["tokens"]


def test_pieces_of_code() -> None:
    sample = "def f(self):\n    x_1 = self._names[2026]\n\n        return   x_1  \n" * 50
    tokenizer = bpe.train_tokenizer([sample], 285)
    ids = tokenizer.encode("        return self.x = 2026\n").ids
    assert ids[0] == 0
    pieces = [tokenizer.decode([i]) for i in ids[1:]]
    assert pieces[0] == " " * 8
    assert [p.strip() for p in pieces if p.strip().isdigit()] == ["2", "0", "2", "6"]
    assert [tokenizer.token_to_id(t) for t in bpe.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    odd = "\u00e9\u4e2d\U0001f600\x00\x0c\t \u00a0\n \n"
    assert tokenizer.decode(tokenizer.encode(odd).ids) == odd


@pytest.mark.parametrize("end", ["A:", "A:\n", "A:\n    ", "def f(", "):", "):\n", "):\n        ", "self."])
def test_a_prompt_may_end_after_a_mark_a_newline_or_an_indentation(end: str) -> None:
    text = "class A:\n    def f(self):\n        return self.x\n"
    tokenizer = bpe.train_tokenizer([text] * 100, 275)
    whole = tokenizer.encode(text).ids
    prompt = tokenizer.encode(text[: text.index(end) + len(end)]).ids
    assert whole[: len(prompt)] == prompt


def test_special_tokens_in_a_source_are_plain_text() -> None:
    tokenizer = bpe.train_tokenizer(["a = 1\n"], bpe.MIN_VOCAB)
    source = "EOS = '<|eos|>'\n"
    tokens, offsets = bpe.encode_documents(tokenizer, [source, "b"])
    assert tokens[0] == 0 and np.flatnonzero(tokens == 1).tolist() == [offsets[1] - 1, offsets[2] - 1]
    assert tokenizer.decode(tokens[1 : offsets[1] - 1].tolist()) == source


def test_the_chat_template_extends_itself(tmp_path: Path) -> None:
    import jinja2

    bpe.save_tokenizer(bpe.train_tokenizer(["a = 1\n"], bpe.MIN_VOCAB), tmp_path)
    template = jinja2.Template((tmp_path / "chat_template.jinja").read_text())
    turns = [("user", "def f("), ("assistant", "x):\n"), ("user", "    return")]
    messages = [{"role": role, "content": content} for role, content in turns]
    first = template.render(messages=messages[:1], add_generation_prompt=True)
    assert first == "<|bos|>def f("
    assert template.render(messages=messages, add_generation_prompt=True) == first + "x):\n" + "    return"


@pytest.mark.parametrize("vocab", [0, bpe.MIN_VOCAB - 1, bpe.MAX_VOCAB + 1, 5000])
def test_a_vocabulary_that_cannot_be_is_refused(sources: Path, tmp_path: Path, vocab: int) -> None:
    with pytest.raises(TrainError, match="vocab"):
        data.build_corpus(tmp_path / "out", sources, vocab_size=vocab)
    assert not (tmp_path / "out").exists()


def corpus(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return np.arange(offsets[-1], dtype=np.uint16), offsets


def test_batches_cover_an_epoch_once_in_shuffled_documents() -> None:
    tokens, offsets = corpus([7, 50, 1, 33, 120, 64])
    batches = data.Batches(tokens, offsets, seq_len=8, batch=3, seed=5)
    border = {int(o) - 1 for o in offsets[1:]}
    seen: list[int] = []
    crossings = 0
    while batches.state()["epoch"] == 0:
        inputs, targets = next(batches)
        assert inputs.shape == targets.shape == (3, 8)
        assert inputs.dtype == targets.dtype == np.int32
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])
        inside = ~np.isin(inputs, list(border))
        assert np.array_equal(targets[inside], inputs[inside] + 1)
        crossings += int(np.sum(targets[~inside] != inputs[~inside] + 1))
        if batches.state()["epoch"] == 0:
            seen += inputs.ravel().tolist()
    assert crossings > 0
    assert len(seen) == len(set(seen)) >= len(tokens) - 8 - 8 * 3


def test_epochs_and_seeds_differ() -> None:
    tokens, offsets = corpus([40] * 20)
    make = lambda seed: data.Batches(tokens, offsets, seq_len=16, batch=4, seed=seed)  # noqa: E731
    one, same, other = make(1), make(1), make(2)
    first = second = next(one)[0]
    assert np.array_equal(first, next(same)[0])
    assert not np.array_equal(first, next(other)[0])
    while one.state()["epoch"] == 0:
        second = next(one)[0]
    assert not np.array_equal(first, second)


def test_batches_resume_exactly_anywhere() -> None:
    tokens, offsets = corpus([40, 3, 77, 150, 11])
    batches = data.Batches(tokens, offsets, seq_len=9, batch=2, seed=3)
    states, rows = [], []
    for _ in range(40):
        states.append(json.dumps(batches.state()))
        rows.append(next(batches)[0])
    assert json.loads(states[-1])["epoch"] >= 2
    for i, state in enumerate(states):
        again = data.Batches(tokens, offsets, seq_len=9, batch=2, seed=3)
        again.restore(json.loads(state))
        for row in rows[i : i + 3]:
            assert np.array_equal(next(again)[0], row)


def test_a_state_of_another_run_is_refused() -> None:
    tokens, offsets = corpus([40] * 20)
    batches = data.Batches(tokens, offsets, seq_len=16, batch=4, seed=1)
    for name, value in [
        ("seed", 2),
        ("seq_len", 8),
        ("batch", 2),
        ("tokens", 5),
        ("index", 10**6),
        ("epoch", -1),
    ]:
        with pytest.raises(TrainError, match=name):
            batches.restore({**batches.state(), name: value})
    with pytest.raises(TrainError, match="seed"):
        batches.restore({})


def test_the_smallest_corpus_gives_a_batch_and_one_token_less_is_refused() -> None:
    tokens, offsets = corpus([32])
    for seed in range(50):
        assert next(data.Batches(tokens, offsets, seq_len=8, batch=3, seed=seed))[0].shape == (3, 8)
    with pytest.raises(TrainError, match="needs 32 tokens, the corpus has 31"):
        data.Batches(tokens[:31], np.array([0, 31]), seq_len=8, batch=3, seed=0)


@pytest.mark.parametrize("offsets", [[0], [1, 32], [0, 31], [0, 9, 9, 32], [0, 20, 10, 32]])
def test_bad_offsets_are_refused(offsets: list[int]) -> None:
    with pytest.raises(TrainError, match="offsets must rise"):
        data.Batches(np.zeros(32, np.uint16), np.array(offsets), seq_len=4, batch=1, seed=0)


def test_load_split_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"cannot read .*train\.safetensors"):
        data.load_split(tmp_path, "train")
    (tmp_path / "train.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(TrainError, match=r"cannot read .*train\.safetensors"):
        data.load_split(tmp_path, "train")


def test_the_command(sources: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clsa.train.data", "--out", str(tmp_path / "out")]
    good = subprocess.run(
        [*command, "--root", str(sources), "--vocab", "320"], capture_output=True, text=True, check=True
    )
    assert json.loads(good.stdout)["train"]["documents"] > 70 and good.stderr == ""
    bad = subprocess.run([*command, "--root", str(tmp_path / "none")], capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1 and "does not exist" in bad.stderr
    assert subprocess.run([*command, "--glob", "*.md"], capture_output=True).returncode == 2
