"""The tokenizer of tiny checkpoints: a small but real BPE in Gemma's manner, which can encode anything."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ltx2_pool.tools.drawing import clips


def write(root: Path) -> Any:
    """Write the tokenizer where the pipeline and where Gemma look for it, below the checkpoint `root`; returns it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    special = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    ]
    corpus = [
        "a red fox runs through fresh snow at dawn while the camera follows close to the ground",
        "slow aerial view over a harbour town, warm evening light, boats, gulls, cinematic, highly detailed",
        "a potter shapes wet clay on a wheel, shallow depth of field, the sound of rain outside 0123456789",
    ]
    corpus += sorted(
        scene.caption(phrase) for scene in clips.scenes() if scene.top == scene.bottom for phrase in (0, 1)
    )
    corpus += ["a shape over black fading into navy"] * 100
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # so that no token is of two words
    initial = special + [f"<0x{byte:02X}>" for byte in range(256)]
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=576, special_tokens=initial, show_progress=False))
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = GemmaTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=131072)
    tokenizer.save_pretrained(root / "tokenizer")
    tokenizer.save_pretrained(root / "text_encoder" / "gemma")
    return tokenizer


def digest(tokenizer: Any) -> str:
    """Of which number each token has: weights that were trained with one vocabulary read another as nonsense."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
