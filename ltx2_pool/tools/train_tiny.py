"""Trains the tiny LTX-2 that draws, and says how well it does: ``python -m ltx2_pool.tools.train_tiny OUT``.

OUT gets the weights, a picture of the loss, one of clips for prompts that were not trained on, and a table of how many
of these are recognised. The same seed gives the same weights on the same kind of device. Train twice: first with short
captions, half an hour on one core of a CPU; then, with --weights and --whole, with captions as they are served, minutes
on a GPU. To look takes a quarter of an hour of a core.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from ltx2_pool.words.extras import extra
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.shapes import Shape

with extra("tools"):
    from rich.progress import Progress

    from ltx2_pool.tools import terminal, tiny
    from ltx2_pool.tools.dimensions import DRAWING

CLIPS = dict.fromkeys((Shape(64, 64, 9), Shape(96, 64, 17), Shape(64, 96, 9)), 4000)
"""Sizes that are trained, and how many clips of each are drawn."""
LOOKED_AT = (2, 4, 8)
"""Steps with which clips are looked at: the menu's, and what the schedule has."""
_OFTEN = (0.25, 0.35, 0.4)
_SAVED = 250
"""Steps after which the weights are written, so that what is interrupted is not lost."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ltx2_pool.tools.train_tiny", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="directory for weights.safetensors and all else")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=8000, help="default %(default)s")
    parser.add_argument("--rate", type=float, default=2e-3, help="of learning, at most (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="clips of 64x64@9f in a step (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=200, help="to look at, of each shape (default %(default)s)")
    parser.add_argument("--weights", type=Path, help="go on from these; with --steps 0, only look")
    parser.add_argument("--whole", action="store_true", help="captions as they are served: slow on a CPU")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = terminal.console()
    trained = arguments.out / "weights.safetensors"
    with tempfile.TemporaryDirectory() as work:
        os.environ.update(Recipe(model_path=work, compile=False).environment())  # before torch is imported
        if arguments.steps:
            with console.status("writing a checkpoint of random weights"):
                tiny.write(Path(work) / "random", arguments.seed, DRAWING, weights=arguments.weights)
            with terminal.progress(console) as progress:
                losses = _train(Path(work) / "random", arguments, trained, progress)
            _draw_losses(arguments.out / "loss.png", losses)
        elif arguments.weights is None:
            parser.error("--steps 0 looks at what --weights names")
        weights = trained if arguments.steps else arguments.weights
        tiny.write(Path(work) / "trained", tiny.DEFAULT_SEED, DRAWING, weights=weights)
        with terminal.progress(console) as progress:
            table = _look(Path(work) / "trained", arguments.prompts, arguments.out / "samples.png", progress)
    (arguments.out / "recognised.md").write_text(table)
    console.print(table)
    return 0


def _train(checkpoint: Path, arguments: argparse.Namespace, out: Path, progress: Progress) -> list[float]:
    from ltx2_pool.model import engine  # before torch and FastVideo

    import torch  # isort: skip
    from ltx2_pool.tools.drawing import denoiser

    modules = engine.build_generator(Recipe(model_path=str(checkpoint), compile=False)).modules
    of = denoiser.Denoiser(modules)
    torch.set_default_device(of.device)
    encoder = modules["vae"].float().encoder
    if arguments.weights is None:
        of.start()
    banks = [
        denoiser.bank(encoder, shape.width, shape.height, shape.num_frames, count, arguments.seed + number)
        for number, (shape, count) in enumerate(progress.track(CLIPS.items(), description="drawing clips"))
    ]
    losses: list[float] = []
    task = progress.add_task("training", total=arguments.steps)

    def on_step(step: int, loss: float) -> None:
        losses.append(loss)
        progress.update(task, advance=1, description=f"training, loss {sum(losses[-50:]) / len(losses[-50:]):.4f}")
        if step % _SAVED == _SAVED - 1:
            of.save(out)

    denoiser.train(
        of,
        banks,
        _OFTEN,
        arguments.steps,
        arguments.batch,
        arguments.seed,
        on_step,
        rate=arguments.rate,
        whole=arguments.whole,
    )
    of.save(out)
    return losses


def _draw_losses(path: Path, losses: list[float]) -> None:
    """One point for each step, and the mean of fifty."""
    import matplotlib as mpl

    mpl.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    window = min(50, len(losses))
    figure, axis = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axis.semilogy(losses, linewidth=0.4, alpha=0.5, label="of each step")
    axis.semilogy(
        np.arange(window - 1, len(losses)), np.convolve(losses, np.ones(window) / window, "valid"), label="mean of 50"
    )
    axis.set(xlabel="step", ylabel="error of the velocity")
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _look(checkpoint: Path, prompts: int, picture: Path, progress: Progress) -> str:
    """Draws some of the clips, and returns a table in Markdown."""
    from ltx2_pool.model import engine
    from ltx2_pool.tools import contactsheet
    from ltx2_pool.tools.drawing import clips, exam

    generator = engine.build_generator(Recipe(model_path=str(checkpoint), compile=False))
    lines = ["| Shape | Steps | Colour | Kind | Motion | All three |", "|---|---|---|---|---|---|"]
    rows: list[tuple[str, Any]] = []
    for shape in CLIPS:
        for steps in LOOKED_AT:
            task = progress.add_task(f"{shape.key}, {steps} steps", total=prompts)
            scenes = clips.held_out(prompts, seed=shape.width + shape.height)
            made = exam.examine(generator, shape, steps, scenes, functools.partial(progress.advance, task))
            right = exam.score(made)
            lines.append(f"| {shape.key} | {steps} | " + " | ".join(f"{part:.1%}" for part in right.values()) + " |")
            if steps == LOOKED_AT[0]:
                rows += [
                    (f"{shape.key}: {clip.scene.caption(number)}", clip.frames) for number, clip in enumerate(made[:4])
                ]
    contactsheet.draw(picture, rows, f"Captions that were not trained on, {LOOKED_AT[0]} steps")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
