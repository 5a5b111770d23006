"""The house rules: floors, no circles, a sentence in every file, honest words, and documents that run."""

from __future__ import annotations

import ast
import functools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compress.cli import main
from compress.passes import PASSES
from export.backends import BACKENDS
from recipes.benchmarks import tables

ROOT = Path(__file__).parent.parent
FLOORS = ("kernels", "export", "serve", "compress")  # an import goes to the same floor or to one further left
PACKAGED = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

# The files of the distribution of Hugging Face that owns the import name `kernels`: ours must be called otherwise.
TAKEN = (
    "archs backends benchmark benchmarks cli compat deps hf_hub importer install layer load locking python_deps "
    "resolver status validate variants verify"
).split()
HEAVY = ("torch", "diffusers", "transformers", "brevitas", "onnx", "onnxscript", "compress")
VAGUE = ("utils", "util", "helpers", "helper", "common", "misc")


def tracked() -> list[Path]:
    """List the files of the repository, those not committed yet included; in an unpacked archive, all but caches."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        paths = [path for path in ROOT.rglob("*") if not {".venv", "build", "__pycache__"} & set(path.parts)]
    return [path for path in paths if path.is_file()]


def python_files() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Name every module that a file imports anywhere, but for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    ]
    hidden = {inner for node in for_types for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return frozenset(found)


def own_imports(path: Path) -> set[str]:
    """Keep of the imports those of files of this project."""
    modules = {module_name(file) for file in PACKAGED}
    return {name for name in imports(path) if name in modules} - {module_name(path)}


def room_of(module: str) -> str:
    """Name the folder of a floor, or the file directly in it, that a module belongs to."""
    return ".".join(module.split(".")[:2])


def ids(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


@pytest.mark.parametrize("path", PACKAGED, ids=ids(PACKAGED))
def test_imports_go_down_only(path: Path) -> None:
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    above = [name for name in imports(path) if name.partition(".")[0] in (*FLOORS[floor + 1 :], "recipes", "tests")]
    assert not above


def test_no_file_imports_itself_in_a_circle() -> None:
    graph = {module_name(path): own_imports(path) for path in PACKAGED}
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' -> '.join((*trail[trail.index(module) :], module))}"
        if module not in done:
            for name in sorted(graph[module]):
                walk(name, (*trail, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_no_folder_of_a_floor_imports_itself_in_a_circle() -> None:
    """A file that lies directly in a floor stands for itself; a folder stands for all its files."""
    graph: dict[str, set[str]] = {}
    for path in PACKAGED:
        room, others = room_of(module_name(path)), {room_of(name) for name in own_imports(path)}
        graph.setdefault(room, set()).update(others - {room})

    def walk(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, f"a circle: {' -> '.join((*trail[trail.index(room) :], room))}"
        for name in sorted(graph.get(room, ())):
            walk(name, (*trail, room))

    for room in graph:
        walk(room, ())


def test_what_runs_an_engine_needs_no_training_framework() -> None:
    by_name = {module_name(path): path for path in PACKAGED}
    theirs = {row.module for row in BACKENDS.values() if row.package in HEAVY}  # a runtime of its own
    waiting = ["export.engine", *(name for name in by_name if name.startswith(("export.backends.", "serve.")))]
    waiting, seen = [name for name in waiting if name not in theirs], set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            heavy = {imported for imported in imports(by_name[name]) if imported.partition(".")[0] in HEAVY}
            assert not heavy, f"{name} is needed to run an engine and imports {sorted(heavy)}"
            waiting += own_imports(by_name[name])
    assert "export.runtime" in seen
    assert theirs == {"export.backends.aotinductor"}
    assert not seen & theirs


def test_passes_know_neither_each_other_nor_the_recipe() -> None:
    passes = [path for path in PACKAGED if module_name(path).startswith("compress.passes.")]
    others = {module_name(path) for path in passes} - {"compress.passes.base"}
    assert len(passes) >= 3
    for path in passes:
        known = own_imports(path)
        family = module_name(path).removeprefix("compress.passes.").partition("_")[0]
        rivals = {name for name in known & others if not name.startswith(f"compress.passes.{family}")}
        assert not rivals
        assert not {name for name in known if name.startswith(("compress.recipe", "compress.compiler", "compress.cli"))}


def test_kernels_stays_a_namespace_package() -> None:
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not {path.stem for path in (ROOT / "kernels").iterdir() if path.suffix in ("", ".py")} & set(TAKEN)


def test_every_package_is_in_the_distribution() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in PACKAGED}
    assert set(listed) == folders | {"kernels"}


@pytest.mark.parametrize("path", python_files(), ids=ids(python_files()))
def test_every_file_opens_with_one_sentence(path: Path) -> None:
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert said, "no docstring"
    first = said.partition("\n\n")[0]
    assert first[-1] in ".?!", f"not a sentence: {first!r}"
    assert len(re.findall(r"\w{2}[.!?] +[A-Z]", first)) == 0, f"more than one sentence: {first!r}"


def test_no_file_has_a_vague_name() -> None:
    assert not [path for path in python_files() if path.stem in VAGUE]


def sins(path: Path) -> Iterator[str]:
    """Find what the house does not do, in one packaged file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Assert) and not ast.unparse(node.test).endswith(" is not None"):
            yield f"{line}: an assert is no error message"
        if isinstance(node, ast.ExceptHandler):
            if all(isinstance(inner, ast.Pass) for inner in node.body):
                yield f"{line}: an exception is swallowed"
            if node.type is None:
                yield f"{line}: a bare except"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "torch.load" and "weights_only=True" not in ast.unparse(node):
                yield f"{line}: torch.load without weights_only=True runs what it reads"
            if called in ("eval", "exec", "os.system", "yaml.load", "pickle.load", "pickle.loads"):
                yield f"{line}: {called} runs what it reads"


@pytest.mark.parametrize("path", PACKAGED, ids=ids(PACKAGED))
def test_no_file_swallows_errors_or_runs_what_it_reads(path: Path) -> None:
    assert not list(sins(path))


def test_tests_use_no_mocks() -> None:
    assert not [path for path in (ROOT / "tests").glob("*.py") if {"unittest.mock", "mock"} & imports(path)]


UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
SOMEBODYS_MACHINE = re.compile(r"(?<![\w.~/$}])/(?:tmp|home|root|mnt|opt|Users|work)/[\w.]")
TEXTS = (".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".html", ".jinja", ".cfg", "")


def test_nothing_is_unfinished_or_bound_to_one_machine() -> None:
    found = []
    for path in tracked():
        if path.suffix in TEXTS and path.name != "LICENSE" and path.stat().st_size < 1 << 20:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if UNFINISHED.search(line) or SOMEBODYS_MACHINE.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


def test_no_dependency_replaces_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    names = {re.match(r"[\w.-]+", text).group() for text in asked}  # type: ignore[union-attr]
    assert not names & {"torchvision", "torchaudio", "xformers", "onnxruntime-gpu"}
    assert project["name"] not in ("compress", "export", "kernels")
    assert {"gpu", "tensorrt", "openvino", "server"} <= set(project["optional-dependencies"])
    assert "torch>=2.13" in project["dependencies"]


BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(language: str) -> list[str]:
    """Extract from the README the lines (bash) or blocks (python) that are not marked as too long to run."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [block for marked, kind, block in BLOCK.findall(text) if kind == language and not marked]
    return [line for block in blocks for line in block.splitlines() if line] if language == "bash" else blocks


def test_most_of_the_readme_is_run() -> None:
    assert len(snippets("bash")) >= 8
    assert len(snippets("python")) >= 1
    assert (ROOT / "README.md").read_text().count("<!-- not run: ") <= 4


@pytest.mark.parametrize("line", snippets("bash"))
def test_every_command_of_the_readme_runs(
    line: str,
    request: pytest.FixtureRequest,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    assert words[0] == "compress"
    if words[1] == "bench":
        words += ["--model", str(tiny_folder("unet"))]
    # The engine of the README takes minutes to build; a toy one, whose words are fewer, stands in for it.
    written = ("build/circle.png", "build/engine.tar.gz", "build/triton.tar.gz")
    stand_in = {path: str(tmp_path / Path(path).name) for path in written}
    if "build/quickstart" in words:
        stand_in["build/quickstart"] = str(request.getfixturevalue("tiny_engine"))
    try:
        code = main([stand_in.get(word, word) for word in words[1:]])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out


@pytest.mark.parametrize("block", snippets("python"))
def test_every_python_block_of_the_readme_runs(block: str, tiny_engine: Path) -> None:
    code = block.replace('"build/quickstart"', repr(str(tiny_engine))).replace("(1, 64, 64, 3)", "(1, 16, 16, 3)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", RECIPES, ids=ids(RECIPES))
def test_every_recipe_parses_and_plans(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    comments = path.read_text(encoding="utf-8").splitlines()[:3]
    assert [line.partition(":")[0] for line in comments] == ["# Model", "# Device", "# Measured gain"]
    monkeypatch.chdir(ROOT)
    code = main([path.relative_to(ROOT).as_posix(), "--dry-run", "--json", "--cache", str(tmp_path)])
    answer = json.loads(capsys.readouterr().out)
    assert code == 0, answer
    assert {edit["pass_name"] for edit in answer["edits"]} == {
        name for name in PASSES if f"- {name}:" in path.read_text(encoding="utf-8")
    }


def test_the_tables_of_the_readme_are_those_of_the_newest_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.BEGIN in text
    assert tables.with_tables(text) == text, "run python -m recipes.benchmarks.tables"
