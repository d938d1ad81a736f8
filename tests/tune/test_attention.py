"""Which attention is taken: what is tried, and what is said where it does not run."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is tuned")
pytest.importorskip("transformers", reason="transformers is not installed, so nothing is tuned")
pytest.importorskip("peft", reason="PEFT is not installed, so nothing is tuned with PyTorch")

import peft
import torch
import transformers

from swaa_local import LayerMode, Schedule
from swaa_local.tune import varlen
from swaa_local.tune.attention import choose_attention, why_no_flash
from swaa_local.tune.examples import Example
from swaa_local.tune.masks import ATTENTION, Masks
from swaa_local.tune.model import plan_memory
from swaa_local.tune.request import TuneError
from swaa_local.tune.rows import answer_logits, loss_of, row_tensors
from tests.support.live_memory import LiveMemory
from tests.support.plain_varlen import PlainKernel

CONFIG = transformers.Qwen2Config(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def plain(monkeypatch) -> PlainKernel:
    kernel = PlainKernel()
    monkeypatch.setattr(varlen, "_forward", kernel.forward)
    monkeypatch.setattr(varlen, "_backward", kernel.backward)
    return kernel


@pytest.mark.parametrize(("n_head", "n_head_kv", "head_dim"), [(14, 2, 64), (16, 8, 128), (4, 4, 96)])
def test_a_kernel_that_gives_what_the_mask_gives_is_taken(plain, n_head, n_head_kv, head_dim):
    assert why_no_flash("cpu", n_head, n_head_kv, head_dim) is None


@pytest.mark.parametrize("wrong", ["output", "sum", "gradient"])
def test_a_kernel_that_gives_something_else_is_not_taken(plain, monkeypatch, wrong):
    def forward(*args):
        out, lse = plain.forward(*args)
        return (out * 1.2 if wrong == "output" else out), (lse + 1 if wrong == "sum" else lse)

    def backward(*args):
        return tuple(grad * (1.2 if wrong == "gradient" else 1) for grad in plain.backward(*args))

    monkeypatch.setattr(varlen, "_forward", forward)
    monkeypatch.setattr(varlen, "_backward", backward)
    assert "other results than under a mask" in (why_no_flash("cpu", 4, 2, 64) or "")


def test_a_build_without_the_kernel_says_so():
    """PyTorch's own, on a device that has none."""
    why = why_no_flash("cpu", 4, 2, 64) or ""
    assert "cannot run it: " in why
    assert "_flash_attention_forward" in why


def a_gpu(monkeypatch, capability: tuple[int, int], why_not: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr("swaa_local.tune.attention.why_no_flash", lambda *_args: why_not)


@pytest.mark.parametrize(
    ("device", "capability", "why_not", "kind"),
    [
        ("cpu", (0, 0), None, "sdpa"),
        ("mps", (0, 0), None, "sdpa"),
        ("cuda", (7, 5), None, "sdpa"),
        ("cuda", (8, 0), None, "flash"),
        ("cuda", (12, 0), None, "flash"),
        ("cuda", (9, 0), "PyTorch 2.6 cannot run it", "sdpa"),
    ],
)
def test_auto_is_what_runs_fastest(monkeypatch, device, capability, why_not, kind):
    a_gpu(monkeypatch, capability, why_not)
    notes: list[str] = []
    assert choose_attention("auto", device, CONFIG, notes.append) == kind
    assert bool(notes) == (device == "cuda" and kind != "flash")
    assert why_not is None or why_not in notes[0]


@pytest.mark.parametrize(
    ("device", "capability", "why_not", "said"),
    [
        ("cpu", (0, 0), None, "it needs a CUDA GPU, and the device is cpu"),
        ("cuda", (7, 5), None, "compute capability 8.0 or newer, and this one has 7.5"),
        ("cuda", (9, 0), "PyTorch 2.6 cannot run it", "PyTorch 2.6 cannot run it"),
    ],
)
def test_flash_is_an_error_where_it_does_not_run(monkeypatch, device, capability, why_not, said):
    a_gpu(monkeypatch, capability, why_not)
    with pytest.raises(TuneError, match=f"{said}; pass --attention auto"):
        choose_attention("flash", device, CONFIG, lambda _note: None)


SHAPES = {
    "Qwen2.5-0.5B": transformers.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2, vocab_size=151936
    ),
    "Qwen3-4B, wider in its heads": transformers.Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8, vocab_size=151936
    ),
    "few between the layers": transformers.Qwen3Config(
        hidden_size=512, intermediate_size=512, num_attention_heads=16, num_key_value_heads=16, vocab_size=1000
    ),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("n_answer", [64, 2048])
@pytest.mark.parametrize("teacher", [False, True])
def test_the_plan_has_room_for_a_step(monkeypatch, shape, n_answer, teacher):
    """Forward and backward through flash attention; what its operators hold inside is put beside."""
    n, n_layer = 16384, 6
    config = type(shape)(
        **shape.to_dict() | {"num_hidden_layers": n_layer, "layer_types": ["full_attention"] * n_layer}
    )
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=ATTENTION, dtype=torch.bfloat16
        )
        masks = Masks("flash")
        masks.attach(base)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
        model = peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"])).train()
    row = row_tensors([Example((0,) * n, n - n_answer, "text")]).to("meta")
    backward = varlen._backward

    def with_its_own(grad, query, key, *rest):
        own = [query.new_empty(query.shape, dtype=torch.float32), *(key.new_empty(len(key), *query.shape[1:]),) * 2]
        found = backward(grad, query, key, *rest)
        del own
        return found

    monkeypatch.setattr(varlen, "_backward", with_its_own)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device="cpu": False)  # knows no meta device
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _positions: None)
    schedule = Schedule(2048, 100, (LayerMode.PREFILL,) * n_layer, tail=128)
    with LiveMemory([*model.parameters(), *model.buffers()]) as live:
        target = None
        if teacher:
            with torch.no_grad():
                target = answer_logits(model, masks, row, schedule)
        loss_of(answer_logits(model, masks, row, schedule), row, target).backward()
    plan = plan_memory(model, [(n, n_answer)], schedule, "cpu", dense=False, teacher=teacher)
    assert live.peak_bytes < plan.total - plan.weights - plan.adapter < 2 * live.peak_bytes
