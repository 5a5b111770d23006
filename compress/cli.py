"""The command line: `compress RECIPE` and the commands run, serve, package, bench, verify, inspect, doctor, store."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from compress import commands
from compress.errors import RecipeError
from compress.terminal import Terminal

INTERRUPTED = 130
DESCRIPTION = "A compiler for trained latent diffusion models: from a recipe to a measured engine."
EXIT_CODES = "exit codes: 0 done, 1 our fault, 2 a wrong recipe or command line, 3 refused, 4 a gate was not met"

# Libraries speak when asked (--debug), and never report home.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, raised."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message.rstrip('.')}; `{self.prog} --help` shows what there is")


class _RecentRecords(logging.Handler):
    """Keeps the last log records of all libraries, for the log that is written when something breaks."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=400)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `compress`; None takes those of this process.

    Returns:
        The exit code: 0 done, 1 our fault, 2 recipe, 3 refused, 4 gate, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    terminal = Terminal(as_json="--json" in words)
    records = _RecentRecords()
    root = logging.getLogger()
    try:
        arguments = parse(words)
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        with warnings.catch_warnings(), terminal.clean_stdout():
            if not debug:
                warnings.simplefilter("ignore")
                root.addHandler(records)
            result = commands.load(arguments.command).execute(arguments, terminal)
        terminal.finish({"ok": True, "exit_code": 0, **result})
        return 0
    except KeyboardInterrupt:
        return _fail(terminal, INTERRUPTED, "stopped; the same command goes on where this one was")
    except BrokenPipeError:
        # Whoever read our output has enough of it; leave nothing for the interpreter to flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code = exit_code(error)
        if debug:
            traceback.print_exc()
        if code is not None:
            return _fail(terminal, code, _sentence(error), getattr(error, "details", None))
        where = _write_log(words, records.lines)
        return _fail(terminal, 1, f"{type(error).__name__}: {_sentence(error)} ({where})")
    finally:
        terminal.close()
        root.removeHandler(records)


def exit_code(error: BaseException) -> int | None:
    """Return the exit code of an error that is meant for the user, or None for one that should not have happened."""
    if type(error).__module__.partition(".")[0] not in ("compress", "export", "serve"):
        return None
    code = getattr(error, "exit_code", None)
    if code is not None:
        return int(code)
    # What the runtime raises under its own names is about the engine or the request it was given.
    return 3 if isinstance(error, ValueError) else None


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `compress x.yaml` needs no command word.

    Raises:
        RecipeError: it is wrong; one sentence.
        SystemExit: `--help` or `--version` was asked for and is printed.
    """
    if not words:
        raise RecipeError(f"name a recipe (x.yaml) or a command ({', '.join(commands.COMMANDS)}); --help shows more")
    rest = list(words)
    position = next((index for index, word in enumerate(rest) if word not in ("--json", "--debug")), 0)
    name = rest.pop(position) if rest[position] in commands.COMMANDS else "build"
    parser = _parser(name)
    arguments, left = parser.parse_known_args(rest)
    arguments.command = name
    if name == "build":
        _check_recipe(arguments.recipe)
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return arguments


def _check_recipe(word: str) -> None:
    """Tell a misspelt command from a recipe that is not there."""
    from compress.nearest import nearest

    if Path(word).suffix not in (".yaml", ".yml") and not Path(word).exists():
        close = nearest(word, commands.COMMANDS)
        hint = "" if close is None else f" (did you mean {close!r}?)"
        names = ", ".join(commands.COMMANDS)
        raise RecipeError(f"{word!r} is neither a recipe file nor a command; the commands are {names}{hint}")


def _parser(name: str) -> argparse.ArgumentParser:
    if name == "build":
        listing = "\n".join(f"  {word:9} {what}" for word, what in commands.COMMANDS.items())
        epilog = f"commands:\n{listing}\n\n`compress COMMAND --help` tells more\n{EXIT_CODES}"
        parser = _Parser("compress", "%(prog)s RECIPE [options] | COMMAND ...", DESCRIPTION, epilog)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("--version", action=_Version)
    else:
        parser = _Parser(f"compress {name}", description=f"{commands.COMMANDS[name].capitalize()}.", epilog=EXIT_CODES)
    commands.load(name).arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the warnings of libraries")
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from compress import __version__

        print(f"latent-compress {__version__}")
        parser.exit()


def _sentence(error: BaseException) -> str:
    """Put an error's text on one line."""
    text = " ".join(str(error).split()) or "no message"
    return text if len(text) <= 1000 else f"{text[:997]}..."


def _fail(terminal: Terminal, code: int, sentence: str, details: dict[str, Any] | None = None) -> int:
    terminal.close()
    print(f"compress: {sentence}", file=sys.stderr, flush=True)
    terminal.finish({"ok": False, "exit_code": code, "error": sentence, **(details or {})})
    return code


def _write_log(words: Sequence[str], lines: Sequence[str]) -> str:
    """Write the traceback being handled and the recent log records to a file; returns where, as words."""
    from compress.store import cache_folder

    path = cache_folder() / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    text = [f"command: compress {' '.join(words)}", f"python: {sys.version}", traceback.format_exc(), *lines]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(text) + "\n", encoding="utf-8")
    except OSError as error:
        return f"its traceback could not be written to {path}: {error.strerror}; --debug shows it"
    return f"the traceback is in {path}"


if __name__ == "__main__":
    sys.exit(main())
