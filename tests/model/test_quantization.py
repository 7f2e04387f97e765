"""FP8 layers compute what FastVideo's do."""

from __future__ import annotations

import pytest
import torch

from ltx2_pool.model import engine, quantization  # noqa: F401 - the engine before FastVideo: it keeps its kernels out


@pytest.mark.parametrize("shared", [True, False], ids=["quantized before", "quantized there"])
@pytest.mark.parametrize("biased", [True, False])
def test_an_fp8_layer_computes_what_fastvideos_does(monkeypatch, shared, biased):
    from fastvideo.layers.quantization import fp8_config

    monkeypatch.setattr(fp8_config, "_supports_fp8_compute", lambda: True)
    torch.manual_seed(0)
    method = fp8_config.FP8QuantizeMethod()
    layer = torch.nn.Module()
    layer.quant_method = method
    layer.weight = torch.nn.Parameter(torch.randn(48, 32, dtype=torch.bfloat16), requires_grad=False)
    fp8_config.convert_model_to_fp8(layer)
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    bias = torch.randn(48, dtype=torch.bfloat16) if biased else None
    given = method.quantize_input(x) if shared else None
    expected = quantization._stock(method, layer, x, bias, given)
    found = quantization._apply(method, layer, x, bias, given)
    assert expected.shape == found.shape == (2, 5, 48)
    assert torch.equal(expected, found)
