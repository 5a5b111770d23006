"""`python -m recipes.reference.train`: trains the reference models from nothing, stage by stage, and scores them."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from recipes.reference.checkpoint import read_checkpoint
from recipes.reference.denoisers import build_mmdit, build_unet
from recipes.reference.folders import read_text_encoder, read_vae, write_mmdit_folder, write_unet_folder
from recipes.reference.latents import LATENT_COUNT, cached_latents
from recipes.reference.objectives import LatentBatches, mmdit_objective, unet_objective
from recipes.reference.prompts import write_prompts
from recipes.reference.recogniser import RECOGNISER_BUDGET, train_recogniser, write_scorer
from recipes.reference.score import score_folder
from recipes.reference.text import TEXT_BUDGET, tokenise, train_text_encoder, write_tokenizer
from recipes.reference.trainer import Budget, train
from recipes.reference.vae import VAE_BUDGET, train_vae

STAGES = ("prompts", "text", "vae", "recogniser", "latents", "unet", "mmdit", "export", "score")
#: Budget of each stage by device: what two CPU cores learn in two hours; and what the shipped denoisers were trained
#: with, side by side on one H200 in six minutes, the other parts reused.
BUDGETS: dict[str, dict[str, Budget]] = {
    "cpu": {
        "text": TEXT_BUDGET,
        "vae": VAE_BUDGET,
        "recogniser": RECOGNISER_BUDGET,
        "unet": Budget(steps=2050, rate=8e-4, warmup=200, decay=700),
        "mmdit": Budget(steps=2200, rate=8e-4, warmup=200, decay=700),
    },
    "cuda": {
        "text": TEXT_BUDGET,
        "vae": VAE_BUDGET,
        "recogniser": RECOGNISER_BUDGET,
        "unet": Budget(steps=4269, rate=1e-3, batch=512, warmup=500, decay=2561, average=0.9995),
        "mmdit": Budget(steps=5319, rate=1e-3, batch=512, warmup=500, decay=3191, average=0.9995),
    },
}


@dataclass(frozen=True)
class Plan:
    """Where a run keeps checkpoints (`work`) and results (`output`), on what it runs, and the budget of each stage.

    With `reuse` the text encoder, the autoencoder and the recogniser are those of `output`, not trained anew.
    """

    work: Path = Path("build/reference")
    output: Path = Path(__file__).resolve().parent
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    budgets: Mapping[str, Budget] = field(default_factory=lambda: BUDGETS["cpu"])
    latents: int = LATENT_COUNT["cpu"]
    reuse: bool = False
    prompts: int = 512
    steps: int = 50
    guidance: float = 3.0


def say(line: str) -> None:
    """Print one progress line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


class Stages:
    """The stages of one run; each reads its inputs from checkpoints, so any one may be started by itself."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer; written once, being a pure function of the word list."""
        folder = self.plan.work / "tokenizer"
        if (folder / "tokenizer_config.json").exists():
            return CLIPTokenizer.from_pretrained(folder)
        return write_tokenizer(folder)

    def text(self) -> CLIPTextModelWithProjection:
        """The pretrained, frozen text encoder."""
        if self.plan.reuse:
            return read_text_encoder(self.plan.output / "mmdit", self.plan.device)
        return train_text_encoder(
            self.plan.work / "text.pt", self.tokenizer(), self.plan.device, self.plan.budgets["text"], say
        )

    def vae(self) -> AutoencoderKL:
        """The trained autoencoder."""
        if self.plan.reuse:
            return read_vae(self.plan.output / "unet", self.plan.device)
        return train_vae(self.plan.work / "vae.pt", self.plan.device, self.plan.budgets["vae"], say)

    def recogniser(self) -> None:
        """Train the recogniser and write the scorer folder."""
        if self.plan.reuse:
            return
        model = train_recogniser(
            self.plan.work / "recogniser.pt", self.vae(), self.plan.device, self.plan.budgets["recogniser"], say
        )
        write_scorer(model, self.plan.output / "recogniser")

    def prompts(self) -> None:
        """Write the prompt files."""
        write_prompts(self.plan.output / "prompts")

    def latents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The cached latents and token ids."""
        path = self.plan.work / "latents.pt"
        state = read_checkpoint(path)
        if state is not None and len(state["latents"]) >= self.plan.latents:
            return state["latents"][: self.plan.latents], state["tokens"][: self.plan.latents]
        return cached_latents(path, self.vae(), self.tokenizer(), self.plan.device, self.plan.latents, say)

    def _batches(self, stage: str) -> LatentBatches:
        latents, tokens = self.latents()
        empty = tokenise(self.tokenizer(), [""])[0]
        return LatentBatches(latents, tokens, empty, self.plan.device, self.plan.budgets[stage].batch)

    def unet(self) -> UNet2DConditionModel:
        """The UNet with averaged weights."""
        torch.manual_seed(4)
        model = build_unet().to(self.plan.device)
        loss_at = unet_objective(model, self.text(), self._batches("unet"))
        model.load_state_dict(train("unet", model, loss_at, self.plan.budgets["unet"], self.plan.work / "unet.pt", say))
        return model.eval()

    def mmdit(self) -> SD3Transformer2DModel:
        """The MMDiT with averaged weights."""
        torch.manual_seed(5)
        model = build_mmdit().to(self.plan.device)
        loss_at = mmdit_objective(model, self.text(), self._batches("mmdit"))
        model.load_state_dict(
            train("mmdit", model, loss_at, self.plan.budgets["mmdit"], self.plan.work / "mmdit.pt", say)
        )
        return model.eval()

    def export(self) -> None:
        """Write both model folders from the checkpoints as they are now, finished or not."""
        vae, text, tokenizer = self.vae(), self.text(), self.plan.work / "tokenizer"
        unet, mmdit = build_unet(), build_mmdit()
        step = self._load_average("unet", unet)
        write_unet_folder(self.plan.output / "unet", unet, vae, text, tokenizer)
        say(f"export: {self.plan.output / 'unet'} (step {step})")
        step = self._load_average("mmdit", mmdit)
        write_mmdit_folder(self.plan.output / "mmdit", mmdit, vae, text, tokenizer)
        say(f"export: {self.plan.output / 'mmdit'} (step {step})")

    def _load_average(self, name: str, module: torch.nn.Module) -> int:
        """Load the averaged weights of a stage's checkpoint into `module` and return their step."""
        path = self.plan.work / f"{name}.pt"
        state = read_checkpoint(path)
        if state is None:
            raise SystemExit(f"{path} does not exist: run --stage {name} first")
        module.load_state_dict(state["average"])
        module.eval()
        return int(state["step"])

    def score(self) -> None:
        """Print the attribute accuracy of both folders, and keep it in scores.json beside them."""
        found = {}
        for name in ("unet", "mmdit"):
            score = score_folder(
                self.plan.output / name,
                self.plan.output / "recogniser",
                self.plan.output / "prompts" / "heldout.jsonl",
                self.plan.prompts,
                self.plan.steps,
                self.plan.guidance,
                self.plan.device,
            )
            say(f"score: {name}: {score.line()}  ({self.plan.steps} steps, guidance {self.plan.guidance:g})")
            found[name] = {"steps": self.plan.steps, "guidance": self.plan.guidance, **asdict(score)}
        today = datetime.date.today().isoformat()
        (self.plan.output / "scores.json").write_text(json.dumps({"date": today, **found}, indent=1) + "\n")


def _train_side_by_side(arguments: list[str], threads: int) -> None:
    """Run the two denoiser stages as two processes that share the machine; raises SystemExit when one fails."""
    command = [sys.executable, "-m", "recipes.reference.train", *arguments, "--threads", str(max(1, threads // 2))]
    children = [subprocess.Popen([*command, "--stage", stage]) for stage in ("unet", "mmdit")]
    if any([child.wait() != 0 for child in children]):
        raise SystemExit("a denoiser did not finish; start the same command again to resume")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the stages asked for, all of them by default."""
    parser = argparse.ArgumentParser(prog="python -m recipes.reference.train", description=__doc__)
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone (earlier checkpoints are read)")
    parser.add_argument("--work", type=Path, default=Plan.work, help="checkpoints (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Plan.output, help="folders (default: beside this file)")
    parser.add_argument("--device", choices=tuple(BUDGETS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--reuse", action="store_true", help="train the denoisers alone, with the shipped other parts")
    for name in BUDGETS["cpu"]:
        parser.add_argument(f"--steps-{name}", type=int, help="updates (default: the budget of the device)")
    parser.add_argument("--latents", type=int, help="size of the training set (default: that of the device)")
    parser.add_argument("--prompts", type=int, default=Plan.prompts, help="held-out prompts to score")
    parser.add_argument("--guidance", type=float, default=Plan.guidance, help="guidance scale of the scores")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    budgets = BUDGETS[device.type]
    updates = {name: getattr(chosen, f"steps_{name}") for name in budgets}
    plan = Plan(
        work=chosen.work,
        output=chosen.output,
        device=device,
        budgets={name: replace(budget, steps=updates[name] or budget.steps) for name, budget in budgets.items()},
        latents=chosen.latents or LATENT_COUNT[device.type],
        reuse=chosen.reuse,
        prompts=chosen.prompts,
        guidance=chosen.guidance,
    )
    stages = Stages(plan)
    if chosen.stage is not None:
        getattr(stages, chosen.stage)()
        return
    for stage in ("prompts", "text", "vae", "recogniser", "latents"):
        getattr(stages, stage)()
    if chosen.threads >= 2:
        _train_side_by_side(list(sys.argv[1:] if arguments is None else arguments), chosen.threads)
    stages.unet()
    stages.mmdit()
    stages.export()
    stages.score()


if __name__ == "__main__":
    main()
