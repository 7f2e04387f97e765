"""Which attention kernel runs: the one that the recipe names, written into the traced graph.

torch chooses among its kernels by global switches, which no compile cache's key covers, and FastVideo turns cuDNN's off
(fastvideo/platforms/cuda.py). So the kernel is called by its name here: another kernel is another graph, with another
key, and what a baked cache holds can be read in it (:func:`ltx2_pool.caches.manifest.attention_kernels`).
"""

from __future__ import annotations

from typing import Any

import torch
from fastvideo.attention.backends import sdpa

from ltx2_pool.words.recipe import AttentionKernel

LONG = 1024
"""Tokens. cuDNN's kernel is the faster one for long sequences of queries and keys; there is little to win elsewhere."""


def use(kernel: AttentionKernel) -> None:
    """From now on, FastVideo's TORCH_SDPA backend runs this kernel. Call it before anything is traced."""
    stock = _stock

    def forward(self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, metadata: Any) -> torch.Tensor:
        if (
            query.shape[1] < LONG
            or key.shape[1] < LONG
            or query.shape[2] != key.shape[2]
            or getattr(metadata, "attn_mask", None) is not None
            or query.dtype not in (torch.bfloat16, torch.float16)
        ):
            return stock(self, query, key, value, metadata)
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, False, 0.0, self.causal, False, scale=self.softmax_scale
        )[0]
        return out.transpose(1, 2)

    sdpa.SDPAImpl.forward = forward if kernel == "cudnn" else stock


_stock = sdpa.SDPAImpl.forward
