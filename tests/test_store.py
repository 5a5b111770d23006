"""The content-addressed store: whole entries or none, verified, and safe with kills and with two processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import store as store_module
from compress.store import Store, key_of

INPUTS = {"model": "ab" * 32, "pass": "quantize", "options": {"scheme": "int8-w8a8"}}


def write_text(text: str, calls: list[str] | None = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        if calls is not None:
            calls.append(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "value.txt").write_text(text)

    return make


def read_text(folder: Path) -> str:
    return (folder / "sub" / "value.txt").read_text()


def never(folder: Path) -> None:
    raise AssertionError("the result was there and must not be computed again")


def the_entry(store: Store) -> Path:
    (entry,) = store._entries()
    return entry


def test_a_result_is_computed_once(tmp_path: Path) -> None:
    calls: list[str] = []
    for _ in range(2):
        assert Store(tmp_path).fetch(INPUTS, write_text("one", calls), read_text) == "one"
    assert calls == ["one"]
    assert Store(tmp_path).has(INPUTS)
    assert not Store(tmp_path).has({**INPUTS, "pass": "cache"})


def test_the_key_depends_on_content_and_versions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_of(INPUTS) == key_of(dict(reversed(INPUTS.items())))
    before = key_of(INPUTS)
    assert key_of({**INPUTS, "options": {"scheme": "bf16"}}) != before
    monkeypatch.setattr(store_module, "versions", lambda: {"torch": "0.0"})
    assert key_of(INPUTS) != before


def test_inputs_that_are_no_plain_data_are_refused() -> None:
    with pytest.raises(TypeError):
        key_of({"model": object()})
    with pytest.raises(ValueError, match="JSON"):
        key_of({"scale": float("nan")})


def flip_a_byte(entry: Path) -> None:
    raw = bytearray((entry / "sub" / "value.txt").read_bytes())
    raw[0] ^= 1
    (entry / "sub" / "value.txt").write_bytes(bytes(raw))


def change_the_record(entry: Path) -> None:
    record = json.loads((entry / "entry.json").read_text())
    record["inputs"]["pass"] = "cache"
    (entry / "entry.json").write_text(json.dumps(record))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_a_byte,
    "a truncated file": lambda entry: (entry / "sub" / "value.txt").write_text(""),
    "a missing file": lambda entry: (entry / "sub" / "value.txt").unlink(),
    "another file": lambda entry: (entry / "extra").write_text("x"),
    "a link": lambda entry: (entry / "link").symlink_to("/etc/hostname"),
    "no record": lambda entry: (entry / "entry.json").unlink(),
    "an empty record": lambda entry: (entry / "entry.json").write_text(""),
    "a record that is a list": lambda entry: (entry / "entry.json").write_text("[]"),
    "an edited record": change_the_record,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_removed_reported_and_computed_again(tmp_path: Path, damage: str) -> None:
    reports: list[str] = []
    store = Store(tmp_path, reports.append)
    store.fetch(INPUTS, write_text("one"), read_text)
    DAMAGES[damage](the_entry(store))
    assert store.fetch(INPUTS, write_text("two"), read_text) == "two"
    assert len(reports) == 1
    assert "damaged" in reports[0]
    assert store.fetch(INPUTS, never, read_text) == "two"
    assert not list((tmp_path / "tmp").iterdir())


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("no space left")

    store = Store(tmp_path)
    with pytest.raises(OSError, match="no space"):
        store.fetch(INPUTS, fail, read_text)
    assert not list((tmp_path / "tmp").iterdir())
    assert store.usage().entries == 0
    assert store.fetch(INPUTS, write_text("one"), read_text) == "one"


def test_prune_deletes_what_was_used_longest_ago(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for index in range(3):
        store.fetch({"index": index}, write_text("x" * 1000), read_text)
        os.utime(store._entry(key_of({"index": index})) / "entry.json", (1000 + index, 1000 + index))
    store.fetch({"index": 0}, never, read_text)  # used last now
    size = store.usage().bytes
    gone = store.prune(keep_bytes=size // 2)
    assert gone.entries == 2
    assert store.usage().bytes == size - gone.bytes
    assert store.has({"index": 0})
    assert not store.has({"index": 1})


SLOW_WRITER = """
import sys, time
from pathlib import Path
from compress.store import Store

def make(folder):
    (folder / "big").write_bytes(b"x" * 100_000)
    print("writing", flush=True)
    time.sleep(float(sys.argv[2]))
    with (Path(sys.argv[1]).parent / "calls").open("a") as calls:
        calls.write("made\\n")

print(Store(sys.argv[1]).fetch({"slow": 1}, make, lambda folder: len((folder / "big").read_bytes())), flush=True)
"""


def start_writer(store: Path, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", SLOW_WRITER, str(store), str(seconds)]
    root = Path(__file__).parent.parent
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=root)


def test_two_processes_do_the_work_once(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path / "store", 0.5) for _ in range(2)]
    outputs = [writer.communicate(timeout=60)[0] for writer in writers]
    assert all(output.endswith("100000\n") for output in outputs)
    assert (tmp_path / "calls").read_text() == "made\n"


def test_a_killed_writer_leaves_no_entry_and_the_next_one_sweeps(tmp_path: Path) -> None:
    writer = start_writer(tmp_path / "store", 60.0)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    store = Store(tmp_path / "store")
    assert store.prune().entries == 0  # it is alive, so its files stay
    assert len(list((tmp_path / "store" / "tmp").iterdir())) == 1
    writer.send_signal(signal.SIGKILL)
    writer.communicate(timeout=60)
    assert store.usage().entries == 0
    assert len(list((tmp_path / "store" / "tmp").iterdir())) == 1
    began = time.monotonic()
    assert store.fetch({"slow": 1}, lambda folder: (folder / "big").write_bytes(b"y"), lambda f: 1) == 1
    assert time.monotonic() - began < 5.0  # the dead process holds no lock
    assert not list((tmp_path / "store" / "tmp").iterdir())


def stopped(store: Store) -> None:
    """Begin work and fail."""
    with contextlib.suppress(KeyboardInterrupt), store.workspace(INPUTS) as folder:
        (folder / "half").write_text("done")
        raise KeyboardInterrupt


def test_unfinished_work_goes_on_and_finished_work_is_gone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    stopped(store)
    with store.workspace(INPUTS) as folder:
        assert (folder / "half").read_text() == "done"
    assert not folder.exists()
    stopped(store)
    assert folder.exists()
    store.prune()
    assert not folder.exists()
