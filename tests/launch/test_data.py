"""Token files, the built-in text, and the order of samples."""

from __future__ import annotations

import os
import resource
import shutil
import threading
from pathlib import Path

import download_tokens
import huggingface_hub
import numpy as np
import prepare_data
import pytest
from data import (
    HEADER_BYTES,
    MAGIC,
    BatchPlan,
    Tokens,
    builtin_text,
    find_files,
    read_tokens,
    write_tokens,
)
from feed import Feed


def header(magic: int, version: int, count: int) -> bytes:
    values = np.zeros(256, dtype="<i4")
    values[:3] = magic, version, count
    return values.tobytes()


def test_round_trip_with_header(tmp_path: Path) -> None:
    tokens = np.array([0, 1, 50256, 65535])
    write_tokens(tmp_path / "a.bin", tokens)
    raw = (tmp_path / "a.bin").read_bytes()
    assert raw == header(20240520, 1, 4) + tokens.astype("<u2").tobytes()
    assert read_tokens(tmp_path / "a.bin").tolist() == tokens.tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_headerless_tokens(tmp_path: Path) -> None:
    tokens = np.arange(3000, dtype="<u2")
    (tmp_path / "a.bin").write_bytes(tokens.tobytes())
    assert read_tokens(tmp_path / "a.bin").tolist() == tokens.tolist()


def test_tokens_outside_uint16_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="from 5 to 65536 came"):
        write_tokens(tmp_path / "a.bin", np.array([5, 65536]))
    assert not list(tmp_path.iterdir())


BROKEN = {
    "empty": (b"", "is empty"),
    "odd": (b"abc", "3 bytes found, an even number wanted"),
    "magic": (header(20240801, 1, 10) + bytes(40), f"magic 20240801 found, {MAGIC} wanted"),
    "version": (header(MAGIC, 2, 4) + bytes(8), "version 2 found, 1 wanted"),
    "count": (header(MAGIC, 1, 5) + bytes(8), "counts 5 tokens, the file holds 4"),
    "negative count": (header(MAGIC, 1, -1) + bytes(8), "counts -1 tokens"),
    "no tokens": (header(MAGIC, 1, 0), "a header and no tokens"),
    "cut header": (
        header(MAGIC, 1, 5)[:100],
        f"ends inside its header, 100 of {HEADER_BYTES} bytes",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    content, words = BROKEN[case]
    path = tmp_path / "broken.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_tokens(path)
    assert str(path) in str(caught.value)


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_tokens(tmp_path / "gone.bin")
    (tmp_path / "book.txt").write_text("once")
    with pytest.raises(ValueError, match=r"\.txt found, a \.bin file of tokens wanted"):
        read_tokens(tmp_path / "book.txt")
    with pytest.raises(ValueError, match=r"no \*val\*\.bin"):
        find_files(tmp_path, "val")


def pool(*sizes: int, block_size: int = 8, vocab_size: int = 65536) -> Tokens:
    """Files whose tokens count on from file to file, so that a token tells its place."""
    ends = np.cumsum(sizes)
    arrays = tuple(np.arange(e - n, e).astype(np.uint16) for e, n in zip(ends, sizes, strict=True))
    return Tokens(tuple(f"file{i}" for i in range(len(sizes))), arrays, block_size, vocab_size)


def test_windows_in_order_lie_end_to_end() -> None:
    # 2, 1 and 3 windows of 8, each with the token after it; one token of the last file is left over
    tokens = pool(17, 9, 26)
    windows = tokens.read(tokens.in_order(0, 6))
    assert windows[:, 0].tolist() == [0, 8, 17, 26, 34, 42]
    assert (np.diff(windows, axis=1) == 1).all()  # none crosses files
    # from anywhere, and round
    assert tokens.read(tokens.in_order(4, 5))[:, 0].tolist() == [34, 42, 0, 8, 17]
    in_parts = np.concatenate([tokens.in_order(first, 3) for first in range(0, 60, 3)])
    assert in_parts.tolist() == tokens.in_order(0, 60).tolist()


def saved(folder: Path, **files: int) -> Path:
    """Token files as prepare_data.py writes them, counting on from file to file."""
    arrays, first = [], 0
    for name, size in files.items():
        arrays.append(folder / f"{name}.npy")
        np.save(arrays[-1], np.arange(first, first + size).astype(np.uint16))
        first += size
    assert prepare_data.main([*map(str, arrays), "--out", str(folder / "tokens")]) == 0
    return folder / "tokens"


def test_arrays_become_files_that_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path, set_train_0=40, set_train_1=20, set_val_0=30)
    sizes = {"block_size": 8, "vocab_size": 65536}
    assert Tokens.from_path(folder, "train", **sizes).num_tokens == 60
    assert read_tokens(folder / "set_train_1.bin").tolist() == list(range(40, 60))
    assert prepare_data.main(["--check", str(folder)]) == 0
    assert "3 file(s), 90 tokens, as they were written" in capsys.readouterr().out

    # one flipped bit, which only the hash sees; a cut file, another one in its place, and none,
    # which the length tells
    path = folder / "set_train_1.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert Tokens.from_path(folder, "train", **sizes).num_tokens == 60
    assert prepare_data.main(["--check", str(folder)]) == 2
    assert "set_train_1.bin: missing, cut or damaged" in one_line(capsys)
    path.write_bytes(whole[:-4])
    with pytest.raises(
        ValueError, match=r"set_train_1\.bin: the header counts 20 tokens, the file holds 18"
    ):
        Tokens.from_path(folder, "train", **sizes)
    write_tokens(path, np.arange(19))
    with pytest.raises(
        ValueError, match=r"set_train_1\.bin: 19 tokens found, 20 wanted by tokens\.json"
    ):
        Tokens.from_path(folder, "train", **sizes)
    path.unlink()
    with pytest.raises(ValueError, match=r"set_train_1\.bin: no such file, 20 wanted"):
        Tokens.from_path(folder, "train", **sizes)
    (folder / "tokens.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokens\.json cannot be read"):
        Tokens.from_path(folder, "train", **sizes)

    for content, words in (
        (np.zeros((2, 2), np.uint16), "one-dimensional"),
        (np.array([70000]), "from 70000 to 70000"),
    ):
        np.save(tmp_path / "x_train.npy", content)
        assert prepare_data.main([str(tmp_path / "x_train.npy"), "--out", str(tmp_path / "x")]) == 2
        assert words in one_line(capsys)
    (tmp_path / "other.npy").write_bytes(b"no array")
    for name, words in (
        ("other.npy", 'neither "train" nor "val"'),
        ("gone_train.npy", "cannot be read"),
    ):
        assert prepare_data.main([str(tmp_path / name), "--out", str(tmp_path / "x")]) == 2
        assert words in one_line(capsys)


def test_a_file_that_is_cut_during_a_run_is_named(tmp_path: Path) -> None:
    """Reading mapped memory beyond its end would kill the process without a word."""
    folder = saved(tmp_path, train_0=9_000, train_1=9_000)
    tokens = Tokens.from_path(folder, "train", block_size=8, vocab_size=65536)
    with Feed(
        tokens, lambda step: tokens.in_order(100 * step, 4), [slice(0, 2), slice(2, 4)], range(40)
    ) as feed:
        assert [part[:, 0].tolist() for part in feed.next()] == [[0, 8], [16, 24]]
        (folder / "train_1.bin").write_bytes(b"")
        with pytest.raises(
            ValueError,
            match=r"train_1\.bin: 0 bytes found, 19024 when the run began; the file was cut",
        ):
            [feed.next() for _ in range(39)]
    with pytest.raises(ValueError, match=r"train_1\.bin"):
        tokens.read(np.array([12_000]))
    assert tokens.read(np.array([0]))[0].tolist() == list(range(9))


def test_the_feed_reads_ahead_and_ends() -> None:
    tokens, asked = pool(1000), []

    def places(step: int) -> np.ndarray:
        asked.append(step)
        return tokens.windows(0, 0, step, 6)

    rows = BatchPlan(6, 1, 2).rows(0)
    with Feed(tokens, places, rows, range(1, 100)) as feed:
        for step in range(1, 6):
            parts = feed.next()
            assert np.array_equal(np.concatenate(parts), tokens.read(tokens.windows(0, 0, step, 6)))
            assert [len(part) for part in parts] == [2, 2, 2]
        assert "feed" in {thread.name for thread in threading.enumerate()}
    assert asked == list(range(1, len(asked) + 1))
    assert 6 <= len(asked) + 1 <= 12
    # also with much left to read
    assert "feed" not in {thread.name for thread in threading.enumerate()}


def test_a_download_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, asked, broken = tmp_path / "hub", [], ["set_train_10.npy"]
    hub.mkdir()
    for name in ("set_train_0", "set_train_2", "set_train_10", "set_val_0", "set_val_1"):
        np.save(hub / f"{name}.npy", np.full(100, 7, np.uint16))

    def fetch(repo: str, name: str, *, repo_type: str, local_dir: Path) -> str:
        asked.append(name)
        if name in broken:
            raise ConnectionError("no route to host")
        (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(hub / name, local_dir / name)

    monkeypatch.setattr(
        huggingface_hub,
        "list_repo_files",
        lambda repo, repo_type: sorted(p.name for p in hub.iterdir()),
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    out = tmp_path / "tokens"
    command = ["org/set", "--out", str(out), "--tokens", "250"]
    assert download_tokens.main(command) == 1
    assert (
        "set_train_10.npy of org/set cannot be had from the Hub (ConnectionError: no route to host)"
        in one_line(capsys)
    )
    # by number, and no more than needed
    assert asked == [
        "set_val_0.npy",
        "set_train_0.npy",
        "set_train_2.npy",
        "set_train_10.npy",
    ]
    asked.clear()
    broken.clear()
    assert download_tokens.main(command) == 0
    assert asked == ["set_train_10.npy"]
    assert Tokens.from_path(out, "train", block_size=8, vocab_size=256).num_tokens == 300
    assert not list(out.glob(".download/*.npy"))  # twice the room is not taken
    assert prepare_data.main(["--check", str(out)]) == 0
    assert download_tokens.main([*command[:-1], "1e3"]) == 2
    assert "holds 300 training tokens, 1,000 were wanted" in one_line(capsys)
    for name in ("train/0", "train/1", "val/0"):  # the folder tells the split
        (hub / name).parent.mkdir(exist_ok=True)
        np.save(hub / f"{name}.npy", np.full(100, 7, np.uint16))
    names = ["train/0.npy", "train/../x.npy", "/train.npy", "train/1.npy", "val/0.npy"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, repo_type: names)
    out = tmp_path / "in folders"
    assert download_tokens.main(["org/set", "--out", str(out), "--tokens", "200"]) == 0
    assert sorted(path.name for path in out.glob("*.bin")) == [
        "train-0.bin",
        "train-1.bin",
        "val-0.bin",
    ]
    (out / "tokens.json").write_text("{")
    assert prepare_data.main([str(hub / "train" / "0.npy"), "--out", str(tmp_path / "x")]) == 2
    assert prepare_data.main([str(hub / "set_train_0.npy"), "--out", str(out)]) == 2
    assert "tokens.json cannot be read" in capsys.readouterr().err


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one that is mapped stays open: the soft limit is raised; and where there is no room, the
    folder is named.
    """
    for i in range(40):
        write_tokens(tmp_path / f"train_{i}.bin", np.arange(20, dtype=np.uint16))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 10, before[1]))
        assert len(Tokens.from_path(tmp_path, "train", block_size=8, vocab_size=256).arrays) == 40
        resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 10, before[1]))
        monkeypatch.setattr("data.make_room", lambda count: None)
        with pytest.raises(ValueError, match=r"40 file\(s\) cannot be mapped .*ulimit -n"):
            Tokens.from_path(tmp_path, "train", block_size=8, vocab_size=256)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_too_few_tokens_and_too_small_a_vocabulary_are_refused() -> None:
    pool(9)  # exactly one window
    with pytest.raises(ValueError, match="file1: 8 tokens found, 9 or more wanted"):
        pool(9, 8)
    with pytest.raises(
        ValueError, match=r"file0: token 99 found, tokens below 99 wanted.*--vocab-size 100"
    ):
        pool(100, vocab_size=99)


def test_a_token_that_the_scan_missed_is_refused_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.SCANNED_TOKENS", 1)  # the first 2**20 tokens only
    array = np.zeros(2**20 + 10, np.uint16)
    array[-1] = 300
    tokens = Tokens(("late",), (array,), 8, 256)
    with pytest.raises(ValueError, match="late: token 300 found"):
        tokens.read(np.array([array.size - 9]))


def test_every_window_of_every_file_is_reached_and_none_crosses_files() -> None:
    tokens = pool(10, 9, 12)
    windows = tokens.read(np.arange(2 + 1 + 4))
    assert windows[:, 0].tolist() == [0, 1, 10, 19, 20, 21, 22]
    assert (np.diff(windows, axis=1) == 1).all()
    drawn = tokens.windows(seed=0, stream=0, step=1, global_batch=500)
    assert set(drawn.tolist()) == set(range(7))


def test_samples_depend_on_seed_stream_step_and_batch_alone() -> None:
    tokens = pool(5000)
    one = tokens.windows(0, 0, 7, 24)
    tokens.windows(0, 0, 8, 24)  # what is drawn in between does not matter
    assert one.tolist() == pool(5000).windows(0, 0, 7, 24).tolist()
    others = [tokens.windows(1, 0, 7, 24), tokens.windows(0, 1, 7, 24), tokens.windows(0, 0, 8, 24)]
    assert all(one.tolist() != other.tolist() for other in others)
    # numpy keeps Philox's words the same in every version; a change here changes everyone's runs.
    assert one[:4].tolist() == PINNED


PINNED = [2039, 9, 4511, 130]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 24), (1, 6), (2, 4), (3, 8), (3, 1), (8, 3)])
def test_ranks_and_accumulation_see_the_same_samples(world_size: int, micro: int) -> None:
    plan = BatchPlan(24, world_size, micro)
    rows = [plan.rows(rank) for rank in range(world_size)]
    assert all(len(own) == plan.accumulation for own in rows)
    seen = [i for own in rows for part in own for i in range(24)[part]]
    assert seen == list(range(24))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ((16, 3, 1), "multiple of 3, such as 15 or 18"),
        ((2, 3, 1), "such as 3"),
        ((12, 2, 4), "one of 1, 2, 3, 6"),
    ],
)
def test_uneven_batches_are_refused(plan: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BatchPlan(*plan)


def test_builtin_text_is_split_by_module() -> None:
    train, validation = builtin_text()
    assert 1_000_000 < len(train) < 5_000_000
    assert 0.05 < len(validation) / (len(train) + len(validation)) < 0.2
    assert not set(validation.split(b"\n\n\n")) & set(train.split(b"\n\n\n")) - {b""}
    builtin_text.cache_clear()
    assert builtin_text() == (train, validation)


def test_prepare_data_writes_both_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_bytes(bytes(range(200)))
    texts[1].write_bytes(b"x" * 100)
    out = tmp_path / "out"
    command = [*map(str, texts), "--out", str(out), "--val-fraction", "0.25"]
    assert prepare_data.main(command) == 0
    assert "--data" in capsys.readouterr().out
    assert read_tokens(out / "train.bin").tolist() == [*range(150), *b"x" * 75]
    assert read_tokens(out / "val.bin").tolist() == [*range(150, 200), *b"x" * 25]
    assert prepare_data.main(command) == 2
    assert "pass --overwrite" in one_line(capsys)
    assert prepare_data.main([*command, "--overwrite"]) == 0


def test_prepare_data_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("abc")
    for arguments, words in (
        ([str(tmp_path / "gone.txt"), "--out", str(tmp_path / "o")], "no such text file"),
        ([str(text), "--out", str(tmp_path / "o")], "both need some"),
        ([str(text), "--out", str(text)], "is a file"),
        ([str(text), "--out", str(tmp_path / "o"), "--val-fraction", "1"], "between 0 and 1"),
        ([str(text), "--out", str(tmp_path / "o"), "--tokenizer", "words"], "invalid choice"),
        ([str(text)], "--out"),
    ):
        assert prepare_data.main(arguments) == 2
        assert words in one_line(capsys)
    assert not (tmp_path / "o").exists()


def test_gpt2_tokens_without_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiktoken = pytest.importorskip("tiktoken")

    def unreachable(name: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    text = tmp_path / "a.txt"
    text.write_text("abc")
    assert prepare_data.main([str(text), "--out", str(tmp_path / "o"), "--tokenizer", "gpt2"]) == 2
    assert "TIKTOKEN_CACHE_DIR" in one_line(capsys)


def test_gpt2_tokens_open_each_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    # A real encoding with GPT-2's end token and no merges, since GPT-2's own files are a download.
    encoding = tiktoken.Encoding(
        "plain", pat_str=r".", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 50256},
    )  # fmt: skip
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": encoding}[name])
    text = tmp_path / "a.txt"
    text.write_text("ab cd")
    arguments = [
        str(text),
        "--out",
        str(tmp_path / "o"),
        "--tokenizer",
        "gpt2",
        "--val-fraction",
        "0.5",
    ]
    assert prepare_data.main(arguments) == 0
    assert read_tokens(tmp_path / "o" / "train.bin").tolist() == [50256, *b"ab"]
    assert read_tokens(tmp_path / "o" / "val.bin").tolist() == [*b" cd"]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]
