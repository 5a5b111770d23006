"""The training loop: what it minimises, what is averaged, and that a killed run ends with the same bits."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.errors import PassError, RefusedError
from compress.training.checkpoint import Checkpoint, read, write
from compress.training.randomness import generator
from compress.training.trainer import Schedule, train

UPDATES = 60


class Line:
    """A network learns a linear map from random vectors."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student

    def losses(self, random: torch.Generator, batch: int, parts: int) -> list[Callable[[], Tensor]]:
        given = torch.randn(batch, 8, generator=random)
        return [partial(self._loss, piece, batch) for piece in given.split(-(-batch // parts))]

    def _loss(self, given: Tensor, batch: int) -> Tensor:
        found: Tensor = (self.student(given) - given.flip(1)).square().mean(1).sum() / batch
        return found


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8))


def trained(folder: Path, **changes: object) -> tuple[nn.Module, dict[str, Tensor]]:
    student = network()
    schedule = Schedule(**({"updates": UPDATES, "rate": 1e-2, "batch": 12, "save_seconds": 0.0} | changes))  # type: ignore[arg-type]
    return student, train(student, Line(student), schedule, folder).average


def digest(student: nn.Module, average: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in [*student.state_dict().items(), *average.items()]:
        found.update(name.encode() + tensor.detach().numpy().tobytes())
    return found.hexdigest()


def main(folder: str) -> None:
    """What is killed: every update takes long enough to be hit."""
    student = network()
    schedule = Schedule(updates=UPDATES, rate=1e-2, batch=12, save_seconds=0.0)
    slow: Callable[[str, int, int], None] = lambda what, done, total: time.sleep(0.02)  # noqa: E731
    result = train(student, Line(student), schedule, Path(folder), slow)
    print(digest(student, result.average), flush=True)


def test_a_run_killed_at_random_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    expected = digest(*trained(tmp_path / "whole"))
    words = [sys.executable, "-c", f"from tests.test_trainer import main; main({str(tmp_path / 'killed')!r})"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    chance, seen = random.Random(7), set[int]()
    for _ in range(5):
        child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
        begun = _done(tmp_path / "killed")
        while child.poll() is None and _done(tmp_path / "killed") <= begun:
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.15))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        seen.add(_done(tmp_path / "killed"))
    assert len(seen) == 5
    assert max(seen) < UPDATES
    last = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert last.stdout.strip() == expected


def _done(folder: Path) -> int:
    return max((int(path.name[7:]) for path in folder.glob("update-????????")), default=0)


def test_it_learns_and_averages(tmp_path: Path) -> None:
    student, average = trained(tmp_path / "run", updates=300, average=0.9)
    given = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    averaged = network()
    averaged.load_state_dict(average)
    with torch.no_grad():
        for module in (student, averaged):
            assert float((module(given) - given.flip(1)).square().mean()) < 0.15
    assert any(not torch.equal(average[name], value) for name, value in student.state_dict().items())


def test_the_average_is_the_one_of_its_formula(tmp_path: Path) -> None:
    kept: list[dict[str, Tensor]] = []
    student = network()
    expected = {name: value.detach().clone().double() for name, value in student.named_parameters()}

    def watch(what: str, done: int, total: int) -> None:
        kept.append({name: value.detach().clone().double() for name, value in student.named_parameters()})

    schedule = Schedule(updates=20, rate=1e-2, batch=4, average=0.3)
    result = train(student, Line(student), schedule, tmp_path / "run", watch)
    for step, weights in enumerate(kept[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {name: decay * value + (1 - decay) * weights[name] for name, value in expected.items()}
    for name, value in expected.items():
        assert torch.allclose(result.average[name].double(), value, atol=1e-6)


def test_parts_of_a_batch_add_up_to_it(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole", updates=10)
    parts, _ = trained(tmp_path / "parts", updates=10, accumulate=3)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, atol=2e-5)


def test_random_numbers_follow_from_seed_update_and_process() -> None:
    def draw(*key: int) -> list[float]:
        found: list[float] = torch.randn(4, generator=generator(*key)).tolist()
        return found

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*key)) for key in [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (12, 3, 0), (1, 23, 0)]}) == 6


def test_a_rate_rises_and_falls() -> None:
    schedule = Schedule(updates=100, rate=1.0, batch=1, warmup=0.1)
    assert [schedule.rate_at(step) for step in (0, 9, 10, 55, 99)] == pytest.approx([0.1, 1.0, 1.0, 0.5, 1 / 90])


def test_an_unfinished_checkpoint_is_none(tmp_path: Path) -> None:
    write(tmp_path, Checkpoint(3, {"a": torch.ones(2)}, {"loss": 1.0}))
    (tmp_path / "update-00000009.part").mkdir()
    found = read(tmp_path)
    assert found is not None
    assert found.done == 3
    write(tmp_path, Checkpoint(4, {"a": torch.ones(2)}, {}))
    assert [path.name for path in tmp_path.glob("update-????????")] == ["update-00000004"]
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json"}


def test_what_is_not_this_run_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run", updates=4)
    with pytest.raises(RefusedError, match="holds the checkpoint of another run"):
        trained(tmp_path / "run", updates=5)
    (tmp_path / "run" / "update-00000004" / "facts.json").write_text("{")
    with pytest.raises(RefusedError, match=r"cannot be read: .* delete it to train from the start"):
        trained(tmp_path / "run", updates=4)


def test_a_loss_that_is_not_finite_stops_it(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"the loss is .* at update .* give a lower rate"):
        trained(tmp_path / "run", rate=1e30)
