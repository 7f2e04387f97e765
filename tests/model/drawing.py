"""Has the engine make clips with the tiny checkpoint, and prints what is seen in them as JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np

from ltx2_pool.tools.drawing import clips
from ltx2_pool.words.pictures import Picture
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Shape

SHAPE = Shape(64, 64, 9)
STEPS = 2


def main() -> None:
    checkpoint, prompts, quantization = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None
    recipe = Recipe(model_path=checkpoint, compile=False, quantization=quantization)
    os.environ.update(recipe.environment())
    from ltx2_pool.model import engine
    from ltx2_pool.tools.drawing import exam

    generator = engine.build_generator(recipe)
    made = exam.examine(generator, SHAPE, STEPS, clips.held_out(prompts, seed=7))
    others = [clip.scene for clip in made[1:] + made[:1]]
    mixed_up = sum(clip.seen.agrees(scene) for clip, scene in zip(made, others, strict=True)) / prompts
    found = {**exam.score(made), "mixed_up": mixed_up, "from_pictures": from_pictures(generator)}
    if not quantization:
        found["apart"] = apart(generator)
    print(json.dumps(found))


def from_pictures(generator: Any) -> list[tuple[float, bool]]:
    """dB of first frames to what the autoencoder has of the pictures that they are to be, and whether the clips show
    what was asked for.
    """
    from ltx2_pool.tools.drawing import exam, recogniser

    found = []
    for number, scene in enumerate(clips.held_out(8, seed=8)):
        first = clips.render(scene, SHAPE.width, SHAPE.height, SHAPE.num_frames, 0.8, 0.3)[0]
        picture = Picture("0" * 64)
        job = Job("p", SHAPE, scene.caption(), number, STEPS, 1.0, 24, pictures=(picture,))
        generator.generate(job, sink := exam.Sink(), pixels=[memoryview(first.tobytes())])
        error = np.mean((sink.video[0] - recogniser.softened(first.astype(np.float32))) ** 2)
        found.append((10 * float(np.log10(255**2 / error)), recogniser.recognise(sink.video).agrees(scene)))
    return found


def apart(generator: Any) -> float:
    """How far what the training computes, with whole captions, is from what the engine does, of the first step of one
    clip. In parts of its deviation.
    """
    import torch

    from ltx2_pool.tools.drawing import denoiser, exam

    transformer, seen = generator.modules["transformer"], []
    hook = transformer.register_forward_hook(lambda _, __, asked, made: seen.append((asked, made[0])), with_kwargs=True)
    job = Job("a", SHAPE, "a red ball moves up over navy", 7, STEPS, 1.0, 24)
    generator.generate(job, exam.Sink())
    hook.remove()
    asked, made = seen[0]
    of = denoiser.Denoiser(generator.modules)
    with torch.no_grad():
        read = of.read([job.prompt], whole=True)
        latents, sound = (asked[name].float() for name in ("hidden_states", "audio_hidden_states"))
        same, _ = of.denoise(latents, sound, read, torch.ones(1))
    return float((same - made.float()).square().mean().sqrt() / made.float().std())


if __name__ == "__main__":
    main()
