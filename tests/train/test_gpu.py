"""What only a GPU can tell, for `make gpu-check`: the parts agree with the CPU there, and speed and memory are what was foretold.

Invariant: every test leaves a row in the table that is printed at the end. (NaN in each backend of attention: test_model_attention.py.)
"""

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from attending import LENGTHS, dense_attention, inputs, segments_of
from batches import IMAGE_SIZE, IMAGE_TOKENS, batch_of, mixed_segments, text, tiny_config, tiny_model

from train import memory
from train.config import Checkpointing, Config, GroupRule, Recompute, TrainConfig
from train.flops import Shape, StepCost, peak_flops
from train.model.attention import varlen_attention
from train.model.xcomposer2 import XComposer2
from train.model_config import DecoderConfig
from train.optim import adamw, resolve, set_lr
from train.rehearsal import heaviest_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BACKENDS = ("flash", "torch_varlen", "sdpa")
SHAPES = {
    "small": DecoderConfig(vocab=32000, hidden=1024, layers=8, heads=16, kv_heads=8, ffn=4096),
    "two layers of the 7B": DecoderConfig(layers=2),
}

Row = Callable[[str, str], None]


@pytest.fixture(scope="module")
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """Notes a check and what came out."""
    rows: list[tuple[str, str]] = []
    yield lambda check, found: rows.append((check, found))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
        print("\n".join(f"{check:60} {found}" for check, found in rows))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", Recompute)
def test_losses_and_gradients_are_those_of_the_cpu(kind: Recompute, compiled: bool, row: Row) -> None:
    batch = batch_of(mixed_segments())
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_model().to(device)
        if device == "cuda":
            model.apply_cost_settings(Checkpointing(kind), compiled)
        losses = model(batch.to(device))
        losses.loss_sum.backward()
        results.append([losses.per_target_L.cpu(), *(p.grad.cpu() for p in model.parameters())])
    apart = max(float((ours - reference).abs().max() / reference.abs().max()) for reference, ours in zip(*results, strict=True))
    row(f"losses and gradients by the CPU's: {kind.value}, {'compiled' if compiled else 'eager'}", f"{apart:.1e} apart")
    assert apart < 2e-3  # fp32 without TF32, summed in another order


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_attention_backend_attends_as_under_a_dense_mask(backend: str, row: Row) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn")
    qkv = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in inputs(LENGTHS, 8, 2, size=64)]
    exact = [x.detach().float().requires_grad_() for x in qkv]
    out = varlen_attention(*qkv, segments_of(LENGTHS, torch.bfloat16, "cuda", backend))
    expected = dense_attention(*exact, LENGTHS)
    row(f"attention by a dense mask in fp32: {backend}", f"{float((out - expected).abs().max()):.1e} apart")
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0)
    grads = torch.autograd.grad(out.float().square().sum(), qkv)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        torch.testing.assert_close(grad.float(), expected_grad, atol=0.2, rtol=0.05)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bf16_the_model_loses_with_each_attention_backend_what_it_does_in_fp32_on_the_cpu(
    backend: str, compiled: bool, row: Row
) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn")
    batch, model = batch_of(mixed_segments()), tiny_model()
    with torch.no_grad():
        exact = model(batch).per_target_L
    model.to("cuda", torch.bfloat16).apply_cost_settings(Checkpointing(), compiled, backend)
    losses = model(batch.to("cuda"))
    losses.loss_sum.backward()
    apart = float((losses.per_target_L.float().cpu() - exact).abs().max() / exact.mean())
    row(f"bf16 losses by the CPU's in fp32: {backend}, {'compiled' if compiled else 'eager'}", f"{apart:.1e} apart")
    assert apart < 0.05
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("segments", [[], [[text(9, 0)], [text(14, 1)]]], ids=["empty pack", "text only"])
def test_a_dummy_image_gives_finite_gradients_in_bf16(segments: list, row: Row) -> None:
    model = tiny_model().to("cuda", torch.bfloat16)
    model(batch_of(segments).to("cuda")).loss_sum.backward()
    bad = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    row(f"bf16 gradients without an image: {'text only' if segments else 'empty pack'}", f"{len(bad)} not finite")
    assert not bad


def test_plora_takes_no_rows_at_all(row: Row) -> None:
    linear = tiny_model().decoder.layers[0].feed_forward.w1.to("cuda", torch.bfloat16)
    x = torch.randn(16, linear.weight.shape[1], device="cuda", dtype=torch.bfloat16)
    linear(x, torch.empty(0, dtype=torch.int64, device="cuda")).sum().backward()
    row("PLoRA on no rows", f"gradient {float(linear.plora_b.grad.abs().max())}")
    assert not linear.plora_b.grad.any()


def test_fused_adamw_is_the_plain_one(row: Row) -> None:
    config = TrainConfig(steps=1, lr=1e-3, groups=[GroupRule(".*")])
    models = [tiny_model().to("cuda") for _ in range(2)]
    optimizers = [adamw(resolve(model, config)[0], model, config) for model in models]
    for group in optimizers[1].param_groups:
        group["fused"] = False
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            for number, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
            set_lr(optimizer, 1e-3)
            optimizer.step()
    apart = max(float((a - b).abs().max()) for a, b in zip(*(model.parameters() for model in models), strict=True))
    row("fused AdamW by the plain one, three steps", f"{apart:.1e} apart")
    assert apart < 1e-6


@pytest.mark.parametrize("kind", Recompute)
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_of_the_heaviest_pack_is_what_was_foretold(shape: str, kind: Recompute, row: Row) -> None:
    """MFU is shown and not asserted."""
    model_config = tiny_config()
    model_config.decoder = SHAPES[shape]
    model = XComposer2(model_config, IMAGE_SIZE)
    model.init_weights(0)
    model.to("cuda", torch.bfloat16)
    checkpointing = Checkpointing(kind)
    model.apply_cost_settings(checkpointing)
    data = Config().data
    data.images.size, data.images.tokens, data.images_per_pack, data.context = IMAGE_SIZE, IMAGE_TOKENS, 32, 4096
    batch = heaviest_batch(data, with_images=True).to("cuda")
    model(batch).loss_sum.backward()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    for _ in range(5):
        model(batch).loss_sum.backward()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / 5
    gradients = sum(p.numel() * p.itemsize for p in model.parameters())
    measured = torch.cuda.max_memory_allocated() - before - gradients
    foretold = memory.activations(model, Shape.of(batch), checkpointing, torch.bfloat16)
    rate = StepCost.of(model, checkpointing).total(Shape.of(batch)).model / seconds
    peak = peak_flops(torch.cuda.get_device_name())
    share = f", MFU {rate / peak:.1%}" if peak else ""
    row(f"{shape}, {kind.value}: memory, speed", f"{measured >> 20} of {foretold >> 20} MiB foretold; {rate / 1e12:.0f} TFLOP/s{share}")
    assert measured == pytest.approx(foretold, rel=0.25)
