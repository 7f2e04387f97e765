"""Trains the transformer and what reads its captions: by flow matching, at the noise levels of the distilled schedule.

What a caption leaves open (:func:`ltx2_pool.tools.drawing.clips.render`: `aside` and `size`) is decided by the noise
that a clip is made from, so that there is one clip for each noise, and few steps lead to it. Everything runs in
FastVideo's modules, as they run in LTX2DenoisingStage.forward (pipelines/basic/ltx2/stages/ltx2_denoising.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ltx2_pool.tools.drawing import clips

if TYPE_CHECKING:
    import torch

FPS = 24
SIGMAS = {1.0: 0.4, 0.9875: 0.1, 0.975: 0.05, 0.909375: 0.12, 0.725: 0.15, 0.421875: 0.18}
"""Noise levels of the distilled schedule, and how often each is trained."""
TEXT = 1024
"""Tokens that FastVideo fills a caption up to."""
_SHORT = 16
"""Tokens that captions are filled up to at first, where each of those that fill up counts for many. Six times as fast
on a CPU, and near enough to learn what captions mean; what has only seen these is not good with whole ones.
"""
_TOGETHER = 32
"""Clips that are encoded at once."""
_PICTURE = 0.2
"""How often a clip starts from a picture."""
_GEMMA_UNUSED = ("vision", "multi_modal", "lm_head")
"""Parts of Gemma that LTX-2 does not use, or that are others again."""
_AUDIO_WEIGHT = 0.05


@dataclass(frozen=True)
class Bank:
    """Clips of one size, encoded."""

    frames: int
    latents: torch.Tensor
    """[clips, channels, latent frames, rows, columns]"""
    scenes: list[clips.Scene]
    chance: torch.Tensor
    """[clips, 2]: `aside` and `size` of each."""


def bank(encoder: Any, width: int, height: int, frames: int, count: int, seed: int) -> Bank:
    """Clips of scenes that are trained on. Latent frame k is what the encoder makes of frame 8 k alone."""
    import torch

    rng = np.random.default_rng(seed)
    device = next(encoder.parameters()).device
    scenes = [scene for scene in clips.scenes() if not scene.held_out]
    chosen = [scenes[rng.integers(len(scenes))] for _ in range(count)]
    chance = rng.random((count, 2))
    latents = []
    with torch.no_grad():
        for begin in range(0, count, _TOGETHER):
            part = range(begin, min(begin + _TOGETHER, count))
            drawn = np.stack([clips.render(chosen[n], width, height, frames, *chance[n])[::8] for n in part])
            pictures = torch.from_numpy(drawn).to(device).flatten(0, 1).permute(0, 3, 1, 2)[:, :, None] / 127.5 - 1
            latents.append(encoder(pictures)[:, :, 0].unflatten(0, drawn.shape[:2]).transpose(1, 2))
    return Bank(frames, torch.cat(latents), chosen, torch.from_numpy(chance).float().to(device))


def fitting_noise(like: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Normal noise that decides as `chance` has it: by the mean, over the first frame, of its first two channels."""
    import torch

    noise = torch.randn_like(like)
    wanted = math.sqrt(2) * torch.erfinv((2 * chance - 1).clamp(-0.999, 0.999))
    count = like.shape[3] * like.shape[4]
    first = noise[:, :2, 0]
    first += (wanted / math.sqrt(count) - first.mean(dim=(2, 3)))[..., None, None]
    return noise


class Denoiser:
    """The modules that are trained, in float32, as :meth:`ltx2_pool.model.engine.Generator.modules` has them."""

    def __init__(self, modules: dict[str, Any]) -> None:
        self.tokenizer = modules["tokenizer"]
        self.text = modules["text_encoder"].float()
        self.gemma = self.text.gemma_model.float()
        self.transformer = modules["transformer"].float()
        self.device = next(self.transformer.parameters()).device
        """Tensors are made there when it is torch's default device, as it has to be for all that follows."""
        _place_as_served(self.transformer.model)
        self._known: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        """What Gemma makes of a caption that is filled up to so many tokens."""

    def start(self) -> None:
        """From random weights: at first, nothing is said about the noise."""
        import torch

        with torch.no_grad():
            for name in ("proj_out", "audio_proj_out"):
                getattr(self.transformer.model, name).weight.zero_()

    def weights(self) -> dict[str, torch.Tensor]:
        """All that is trained, in bfloat16, by the checkpoint's component and name (ltx2_pool/tools/tiny.py)."""
        import torch

        from ltx2_pool.tools.components import published_name

        named = {f"transformer.{name}": value for name, value in self.transformer.model.state_dict().items()}
        for name, value in self.text.state_dict().items():
            if not name.startswith("_gemma_model."):
                named[f"text_encoder.{published_name(name)}"] = value
        for name, value in self.gemma.state_dict().items():
            if not any(part in name for part in _GEMMA_UNUSED):
                named[f"gemma.{name}"] = value
        return {name: value.to(torch.bfloat16).cpu().contiguous() for name, value in named.items()}

    def save(self, path: Path) -> None:
        """Write :meth:`weights` as ltx2_pool/tools/tiny.py reads them; what was there before stays until then."""
        from safetensors.torch import save_file

        from ltx2_pool.tools import tokenizer

        partial = path.with_suffix(".partial")
        save_file(self.weights(), partial, metadata={"vocabulary": tokenizer.digest(self.tokenizer)})
        partial.replace(path)

    def parameters(self) -> list[Any]:
        """All that is trained."""
        own = [value for name, value in self.text.named_parameters() if not name.startswith("_gemma_model.")]
        return [*self.transformer.parameters(), *own]

    def read(self, captions: Sequence[str], whole: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The captions, as the transformer takes them for pictures and for sound, and what to add to its attention.

        Unless `whole`, they are filled up with few registers, and each of these counts for as many as it stands for.
        """
        import torch

        length = TEXT if whole else _SHORT
        hidden, mask = self._heard(captions, length)
        features = self.text._run_feature_extractor(hidden, mask, "left")
        additive = self.text._convert_to_additive_mask(mask, features[0].dtype)
        words = mask.sum(1, keepdim=True)
        filling = torch.arange(length)[None] >= words
        count = torch.log((TEXT - words) / (length - words).clamp(min=1))
        bias = torch.where(filling, count, torch.zeros(()))[:, None, None]
        read = []
        for name, of in zip(("embeddings_connector", "audio_embeddings_connector"), features, strict=True):
            connector = getattr(self.text, name)
            with _biased(connector, bias):
                read.append(connector(of, additive)[0])
        return read[0], read[1], None if whole else bias

    def _heard(self, captions: Sequence[str], length: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The hidden states of all layers of Gemma, which is not trained, and which of `length` tokens are words."""
        import torch

        unknown = list(dict.fromkeys(caption for caption in captions if (caption, length) not in self._known))
        if unknown:
            tokens = self.tokenizer(
                unknown, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).to(self.device)
            with torch.no_grad():
                hidden = self.gemma(**tokens, output_hidden_states=True, return_dict=True).hidden_states
            for caption, states, mask in zip(unknown, torch.stack(hidden, 1), tokens["attention_mask"], strict=True):
                self._known[caption, length] = states, mask
        known = [self._known[caption, length] for caption in captions]
        states, masks = (torch.stack(of) for of in zip(*known, strict=True))
        return states.unbind(1), masks

    def denoise(
        self,
        latents: torch.Tensor,
        audio: torch.Tensor,
        read: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        sigma: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What lies behind the noise, by the transformer. `sigma` [clips]; `mask` [clips, latent frames]: 0 where a
        frame is given.
        """
        import torch
        from fastvideo.forward_context import set_forward_context
        from fastvideo.pipelines import ForwardBatch

        clips_, _, frames, rows, columns = latents.shape
        times = sigma[:, None] * (torch.ones(clips_, frames) if mask is None else mask)
        batch = ForwardBatch(data_type="video", fps=FPS)
        with set_forward_context(current_timestep=0, attn_metadata=None, forward_batch=batch):
            pictures, sound = self.transformer(
                hidden_states=latents,
                encoder_hidden_states=read[0],
                encoder_attention_mask=read[2],
                timestep=times.repeat_interleave(rows * columns, dim=1)[..., None],
                audio_hidden_states=audio,
                audio_encoder_hidden_states=read[1],
                audio_encoder_attention_mask=read[2],
                audio_timestep=sigma[:, None, None].expand(-1, audio.shape[2], 1),
            )
        return pictures, sound


def _place_as_served(model: Any) -> None:
    """Have the rotary embeddings computed as of bfloat16 latents: the places in a video are then rounded as well."""
    import torch

    for owner, precision in (
        (model.video_args_preprocessor, torch.bfloat16),
        (model.audio_args_preprocessor, torch.float32),
    ):
        simple = getattr(owner, "simple_preprocessor", owner)
        simple._prepare_positional_embeddings = _rounding(simple._prepare_positional_embeddings, precision)


def _rounding(prepare: Callable[..., Any], precision: torch.dtype) -> Callable[..., Any]:
    import torch

    def prepared(positions: torch.Tensor, *, x_dtype: torch.dtype, **others: Any) -> tuple[torch.Tensor, ...]:
        tables = prepare(positions=positions.to(precision), x_dtype=torch.bfloat16, **others)
        return tuple(table.to(x_dtype) for table in tables)

    return prepared


@contextlib.contextmanager
def _biased(connector: Any, bias: torch.Tensor) -> Iterator[None]:
    """Inside, the connector's attention to the registers is as strong as `bias` says, for several captions at once."""
    from fastvideo.models.encoders import gemma

    tables, replace = gemma.precompute_ltx_freqs_cis, connector._replace_padded_with_learnable_registers

    def for_each(*args: Any, **kwargs: Any) -> tuple[Any, ...]:  # the tables' batch is taken for that of the captions
        return tuple(table.expand(len(bias), *table.shape[1:]) for table in tables(*args, **kwargs))

    connector._replace_padded_with_learnable_registers = lambda hidden, mask: (replace(hidden, mask)[0], bias)
    gemma.precompute_ltx_freqs_cis = for_each
    try:
        yield
    finally:
        gemma.precompute_ltx_freqs_cis = tables
        del connector._replace_padded_with_learnable_registers


def audio_frames(num_frames: int) -> int:
    """Latent frames of the sound of a video, as LTX2DenoisingStage has them: 25 in a second."""
    return round(num_frames / FPS * 25)


def audio_codes(seed: int = 0) -> torch.Tensor:
    """What is heard of each colour and motion, [colours, motions, 8 * 16]: latents, whose decoder is not trained."""
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    colours, motions = (
        torch.randn(len(names), 128, generator=generator, device="cpu") for names in (clips.COLOURS, clips.MOTIONS)
    )
    return (colours[:, None] + motions[None]) / math.sqrt(2)


def train(
    denoiser: Denoiser,
    banks: Sequence[Bank],
    often: Sequence[float],
    steps: int,
    batch: int,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    *,
    rate: float,
    whole: bool,
) -> None:
    """Train on clips of `banks`, each as often as said, with whole captions or short ones. `on_step` is told the loss.
    `rate`: of learning, at most.
    """
    import torch

    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    parameters = denoiser.parameters()
    for value in parameters:
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=1e-2)
    codes = audio_codes().to(denoiser.device)
    colours, motions = list(clips.COLOURS), list(clips.MOTIONS)
    levels, weights = torch.tensor(list(SIGMAS)), torch.tensor(list(SIGMAS.values()))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
            )
        of = banks[rng.choice(len(banks), p=often)]
        count = max(8, round(batch * 8 / of.latents[0, 0].numel()))
        chosen = rng.integers(len(of.scenes), size=count)
        scenes = [of.scenes[n] for n in chosen]
        clean = of.latents[chosen]
        read = denoiser.read([scene.caption(int(rng.integers(2))) for scene in scenes], whole)
        sigma = levels[torch.multinomial(weights, count, replacement=True)]
        mask = torch.ones(count, clean.shape[2])
        mask[:, 0] = (torch.rand(count) > _PICTURE).float()
        part = (sigma[:, None] * mask)[:, None, :, None, None]
        noise = fitting_noise(clean, of.chance[chosen])
        sound = torch.stack([codes[colours.index(s.colour), motions.index(s.motion)] for s in scenes])
        sound = sound.view(count, 8, 1, 16).expand(-1, -1, audio_frames(of.frames), -1)
        loud = sigma[:, None, None, None]
        noisy = sound * (1 - loud) + torch.randn(sound.shape) * loud
        found, heard = denoiser.denoise(clean * (1 - part) + noise * part, noisy, read, sigma, mask)
        error = ((found - clean) / sigma.view(-1, 1, 1, 1, 1)).square() * mask[:, None, :, None, None]
        loss = error.mean()
        (loss + _AUDIO_WEIGHT * ((heard - sound) / loud).square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(step, float(loss.detach()))
