"""The command line: fast, one sentence for every error, JSON and nothing else where JSON is asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress import commands, store
from compress.cli import exit_code, main, parse
from compress.errors import CompressError, GateError, PassError, RecipeError, RefusedError
from compress.terminal import Terminal
from export.errors import EngineError, ExportError

ROOT = Path(__file__).parent.parent

WATCHED = """
import sys, time
began = time.process_time()
from compress.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
seconds = time.process_time() - began
heavy = {"torch", "diffusers", "numpy", "onnx", "pydantic", "rich", "yaml"} & set(sys.modules)
print(seconds, sorted(heavy), code or 0, file=sys.stderr)
"""


def start(*words: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "compress", *words]
    return subprocess.Popen(
        command,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in background jobs
    )


@pytest.mark.parametrize("words", [("--help",), ("--version",), *((word, "--help") for word in commands.COMMANDS)])
def test_help_is_instant(words: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", WATCHED, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, _, rest = done.stderr.partition(" ")
    assert rest.strip() == "[] 0"  # nothing heavy is imported, which is what keeps it instant on any machine
    assert float(seconds) < 0.5
    assert done.stdout


def test_the_module_runs_as_a_program_and_lists_every_command() -> None:
    done = start("--help")
    out, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (0, "")
    assert all(f"  {word} " in out for word in commands.COMMANDS)
    assert "exit codes" in out


def test_every_command_file_is_in_the_table() -> None:
    files = {path.stem for path in (ROOT / "compress" / "commands").glob("*.py")} - {"__init__"}
    assert files == {*commands.COMMANDS, "build"}


LINES = {
    "nothing": ((), "name a recipe (x.yaml) or a command (run, serve, "),
    "a misspelt command": (("inspct", "x"), "'inspct' is neither a recipe"),
    "its nearest name": (("benchh",), "(did you mean 'bench'?)"),
    "an unknown option": (("x.yaml", "--fast"), "unrecognized arguments: --fast"),
    "a missing operand": (("inspect",), "the following arguments are required: FOLDER"),
    "a missing value": (("x.yaml", "--set"), "argument --set: expected one argument"),
    "not a number": (("store", "--prune", "much"), "argument --prune: invalid float value: 'much'"),
    "a negative size": (("store", "--prune", "-1"), "--prune"),
    "not a finite size": (("store", "--prune", "nan"), "--prune takes a number of MiB"),
    "a recipe that is not there": (("nowhere.yaml",), "nowhere.yaml: there is no such file"),
    "two recipes": (("a.yaml", "b.yaml"), "unrecognized arguments: b.yaml"),
}


@pytest.mark.parametrize("what", LINES)
def test_a_wrong_command_line_is_one_sentence(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = LINES[what]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("compress: ")
    assert err.count("\n") == 1
    assert expected in err


def test_errors_are_json_too_where_json_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.yaml", "--json"]) == 2
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer == {"ok": False, "exit_code": 2, "error": "nowhere.yaml: there is no such file"}
    assert err == "compress: nowhere.yaml: there is no such file\n"


def test_a_recipe_needs_no_command_word_and_options_may_come_first() -> None:
    arguments = parse(["--set", "seed=1", "recipes/quickstart.yaml", "--dry-run"])
    assert (arguments.command, arguments.recipe, arguments.set) == ("build", "recipes/quickstart.yaml", ["seed=1"])
    assert parse(["--json", "inspect", "x"]).command == "inspect"


def test_a_recipe_called_like_a_command_has_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").write_text("schema_version: 1\n")
    assert parse(["./run"]).command == "build"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CompressError("x"), 1),
        (PassError("x"), 1),
        (ExportError("x"), 1),
        (RecipeError("x"), 2),
        (RefusedError("x"), 3),
        (EngineError("x"), 3),
        (GateError("x"), 4),
        (ValueError("x"), None),
        (OSError("x"), None),
    ],
)
def test_every_error_has_its_exit_code(error: Exception, code: int | None) -> None:
    assert exit_code(error) == code


def broken_store(folder: Path) -> list[str]:
    """Make a store whose locks cannot be taken; returns the words that open it."""
    (folder / "store" / "ab" / ("ab" * 32)).mkdir(parents=True)
    (folder / "store" / "ab" / ("ab" * 32) / "file").write_text("content")
    (folder / "store" / "locks").write_text("a file where a folder should be")
    return ["store", "--cache", str(folder)]


def test_what_should_not_happen_is_one_sentence_and_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    assert main([*broken_store(tmp_path / "broken"), "--prune", "0"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    (log,) = (tmp_path / "logs").iterdir()
    assert str(log) in err
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert "command: compress store --cache" in text


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.yaml", "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "file"))
    assert main([*broken_store(tmp_path / "broken"), "--prune", "0"]) == 1
    assert "could not be written" in capsys.readouterr().err


def test_the_store_is_shown_and_pruned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = store.Store(tmp_path / "store")
    for index in range(2):
        kept.fetch({"index": index}, lambda folder: None, lambda folder: None)
    assert main(["store", "--json", "--cache", str(tmp_path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["entries"]) == (True, 2)
    assert main(["store", "--prune", "0", "--cache", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("deleted 2 results")
    assert "0 results, 0.0 MiB" in out


def test_the_doctor_examines_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["targets"]["onnxruntime-cpu"] is True
    rows = {row["what"]: row["found"] for row in answer["rows"]}
    assert "cores" in rows["processor"]
    assert "2." in rows["torch"]
    assert main(["doctor"]) == 0
    assert "target onnxruntime-cpu" in capsys.readouterr().out


def test_tables_show_what_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table("how", "module", box=None)
    table.add_row("pip install 'latent-compress[openvino]'", "transformer_blocks.0." * 20)
    Terminal().say(table)
    out = capsys.readouterr().out
    assert "latent-compress[openvino]" in out
    assert "transformer_blocks.0." * 20 in out


def test_an_interrupt_is_one_line(tmp_path: Path) -> None:
    recipe = tmp_path / "x.yaml"
    os.mkfifo(recipe)  # the program waits for somebody to write into it
    process = start(str(recipe))
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err == "compress: stopped; the same command goes on where this one was\n"


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start("store", stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(as_json=True)
    for done in range(4):
        terminal.progress("calibrate", done, 3)
    terminal.note("a sentence")
    terminal.say("not in JSON")
    terminal.finish({"a": 1})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1}
    assert err.splitlines() == ["calibrate ...", "calibrate: done in 0 s", "a sentence"]


def test_progress_on_a_terminal_is_a_bar_with_the_time_left() -> None:
    script = (
        "from compress.terminal import Terminal; t = Terminal()\n"
        "for i in range(4): t.progress('calibrate', i, 4)\n"
        "t.note('a sentence'); t.close()"
    )
    import pty

    child, descriptor = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, "-c", script], {**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    shown = b""
    try:
        while block := os.read(descriptor, 4096):
            shown += block
    except OSError:
        os.close(descriptor)  # the child has closed its end
    assert os.waitpid(child, 0)[1] == 0
    assert b"calibrate" in shown
    assert b"3/4" in shown
    assert b"a sentence" in shown
