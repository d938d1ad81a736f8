"""The model to tune, in PyTorch: from a checkpoint, or from a GGUF that transformers can read, held against the engine.

Knows transformers and PEFT; nothing of data or training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from swaa_local.convert import checkpoint as hf
from swaa_local.convert.request import LocalCheckpoint, LocalGGUF, Request, resolve
from swaa_local.generation.template import CHATML, ChatTemplate
from swaa_local.model_file.adapter import base_sha256
from swaa_local.model_file.header import GGUFFile
from swaa_local.model_file.model_info import ModelInfo, model_info_of
from swaa_local.model_file.schedule_keys import stored_of
from swaa_local.model_file.split import open_gguf
from swaa_local.report.progress import Reporter
from swaa_local.schedule.choice import ScheduleOptions, StoredSchedule
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.model_layers import ModelLayers
from swaa_local.schedule.text import in_slides
from swaa_local.sources import hub
from swaa_local.text.units import format_bytes
from swaa_local.tune.attention import choose_attention, heads
from swaa_local.tune.examples import Renderer
from swaa_local.tune.gguf_loading import quick_gguf
from swaa_local.tune.masks import ATTENTION, Masks
from swaa_local.tune.request import Attention, TuneError, TuneRequest

# Modules by the letters of `--targets`; where a family has them fused, what they are fused into.
_MODULES = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_CHECK_TEXT = (
    "The quick brown fox jumps over the lazy dog, and 17 wizards quietly forge 3 golden boxes for it in July.\n"
)
_CHECK_MOST = 0.2  # of the logits' standard deviation; Q4_1 weights with the engine's 8-bit activations have 0.03


@dataclass(frozen=True)
class Source:
    """Where a model is. gguf: the file, if it is one; else `folder` is a checkpoint's."""

    label: str
    folder: Path
    gguf: Path | None
    n_layer: int
    n_ctx_train: int | None
    stored: StoredSchedule
    """What the file has."""


@dataclass(frozen=True)
class BaseModel:
    """A loaded model. base_sha256: see `model_file.adapter`. ends: tokens that end an answer."""

    model: Any
    tokenizer: Any
    masks: Masks
    source: Source
    base_sha256: str | None
    ends: tuple[int, ...]
    device: str


def find_source(name: str, output: Path, reporter: Reporter) -> Source:
    """A checkpoint's folder, a GGUF, or a model on a hub, which is fetched. Raises `SWAAError` for what no schedule can
    apply to."""
    found = resolve(Request(source=name, output=output))
    if not isinstance(found, (LocalGGUF, LocalCheckpoint)):
        reporter.note(f"downloading {found.size_text} to {hub.cache_folder(found.listing.hub_id)}")
        found = resolve(Request(source=str(hub.fetch(found)), output=output))
    if isinstance(found, LocalGGUF):
        with open_gguf(found.path) as file:
            info = model_info_of(file)
            _check_gguf(file, info)
            return Source(name, found.path.parent, found.path, info.n_layer, info.n_ctx_train, stored_of(file))
    assert isinstance(found, LocalCheckpoint)
    checkpoint = found.checkpoint
    settings = hf.read_settings(found.path)
    if settings.unsupported:
        raise TuneError(f"no schedule can apply: {settings.unsupported}")
    if settings.layers is not None:
        _check_layers(settings.layers)
    if checkpoint.n_layer is None:
        raise TuneError(f"{found.path}/config.json does not say how many layers the model has")
    config = json.loads((found.path / "config.json").read_bytes())
    return Source(name, found.path, None, checkpoint.n_layer, config.get("max_position_embeddings"), StoredSchedule())


def _check_layers(layers: ModelLayers) -> None:
    if not layers.all_slide:
        raise TuneError(
            "tune masks every layer by the schedule, and not every layer of this model can slide "
            f"({in_slides(layers)}); it runs with a schedule as it is"
        )


def _check_gguf(file: GGUFFile, info: ModelInfo) -> None:
    """What transformers' own loader does not read, and would leave out without a word."""
    if info.unsupported:
        raise TuneError(f"no schedule can apply: {info.unsupported}")
    _check_layers(info.layers)
    if info.n_split > 1:
        raise TuneError(f"{file.path} is split; make one file of it: swaa-local convert {file.path} -o WHOLE.gguf")
    scaling = file.get(f"{info.architecture}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name.startswith("rope_f") for tensor in file.tensors):
        raise TuneError(f"{file.path} scales RoPE, which transformers' GGUF loader does not read; take its checkpoint")


def choose_schedule(options: ScheduleOptions, source: Source) -> Schedule:
    """What was asked for, or what the file has. Raises `TuneError` where there is none."""
    choice = options.config(source.n_layer, lambda: source.stored)
    schedule = source.stored.schedule if choice is None else choice.schedule(source.n_layer) if choice else None
    if schedule is None or schedule.is_full:
        raise TuneError("there is no schedule to tune for; pass --preset NAME, or --window TOKENS and the rest")
    return schedule


def choose_device(wanted: str) -> str:
    """The name of PyTorch's device. Raises `TuneError` for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, is_there in there.items() if is_there)
    if not there[wanted]:
        raise TuneError(
            f"PyTorch sees no {wanted} device here; pass --device cpu, or install a build of it for {wanted}"
        )
    return wanted


def load_base(source: Source, device: str, attention: Attention, reporter: Reporter) -> BaseModel:
    """Weights and tokenizer; in bfloat16 on a GPU that has it, else in float32."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with reporter.step(f"loading {source.label}"), nullcontext() if source.gguf is None else quick_gguf(source.gguf):
        tokenizer = _load(transformers.AutoTokenizer, source)
        model = _load_weights(source)
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
        reporter.note("this model has no chat template, so ChatML is used, as chat does")
    masks = Masks(choose_attention(attention, device, model.config, reporter.note))
    masks.attach(model)
    if source.gguf is not None:
        _hold_against_engine(model, tokenizer, masks, source, reporter)
    base = _fingerprint(model, source)
    half = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    model.to(device=device, dtype=half)
    model.config.use_cache = False
    model.name_or_path = source.label  # PEFT writes it down
    return BaseModel(model, tokenizer, masks, source, base, _ends(model, tokenizer), device)


def _load(kind: Any, source: Source, **kwargs: Any) -> Any:
    if source.gguf is not None:
        kwargs["gguf_file"] = source.gguf.name
    try:
        return kind.from_pretrained(source.folder, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        what = f"transformers cannot read {source.gguf or source.folder}"
        raise TuneError(f"{what}: {' '.join(str(error).split())[:300]}") from error


def _load_weights(source: Source) -> Any:
    kwargs: dict[str, Any] = {"attn_implementation": ATTENTION, "dtype": "auto"}
    if source.gguf is not None:
        config = _load(transformers.AutoConfig, source)
        with open_gguf(source.gguf) as file:
            # transformers' table of keys lacks it for some families, which then take a default.
            head_dim = file.get(f"{file.get('general.architecture')}.attention.key_length")
        if head_dim is not None:
            config.head_dim = head_dim
        kwargs |= {"config": config, "dtype": torch.float32}
    model = _load(transformers.AutoModelForCausalLM, source, **kwargs)
    if source.gguf is not None:
        model.config.quantization_config = None
        model.hf_quantizer = None
        del model.config.quantization_config
        model.is_quantized = False
    return model.eval()


def _fingerprint(model: Any, source: Source) -> str | None:
    """Before the weights change their type."""
    if source.gguf is not None:
        with open_gguf(source.gguf) as file:
            return base_sha256(file)
    norm = getattr(getattr(model, "model", None), "norm", None)
    if norm is None:
        return None
    return hashlib.sha256(norm.weight.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def _ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    found: list[int] = []
    for value in (
        tokenizer.eos_token_id,
        getattr(model.generation_config, "eos_token_id", None),
        model.config.eos_token_id,
        *(tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|eot_id|>", "<|end|>")),
    ):
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and token not in found and token != tokenizer.unk_token_id:
                found.append(token)
    if not found:
        raise TuneError("the tokenizer names no token that ends an answer (eos_token), so none can be learned")
    return tuple(found)


def _hold_against_engine(model: Any, tokenizer: Any, masks: Masks, source: Source, reporter: Reporter) -> None:
    """Both must read text and weights of a GGUF alike. Raises `TuneError`; notes a template that they do not."""
    import numpy as np

    from swaa_local.llama import Llama

    tokens = tokenizer(_CHECK_TEXT, add_special_tokens=False).input_ids
    llm = Llama(
        str(source.gguf), swaa=False, n_ctx=512, logits_all=True, flash_attn=False, type_k=0, type_v=0, n_gpu_layers=0
    )
    try:
        if llm.tokenize(_CHECK_TEXT.encode(), add_bos=False, special=True) != tokens:
            raise TuneError(
                f"transformers does not read the tokenizer of {source.gguf} as llama.cpp does; take its checkpoint"
            )
        messages = [{"role": "user", "content": _CHECK_TEXT}]
        if tuple(ChatTemplate(llm).prompt(llm, messages).tokens) != Renderer(tokenizer, [0]).prompt(messages):
            reporter.note("transformers renders this model's prompts otherwise than chat and serve do")
        llm.eval(tokens)
        theirs = llm.scores[: len(tokens)].copy()
    finally:
        llm.close()
    masks.set([(len(tokens), len(tokens))], Schedule.full(source.n_layer))
    with torch.inference_mode():
        ours = model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()[:, : theirs.shape[1]]
    off = float(np.sqrt(((ours - theirs) ** 2).mean()) / theirs.std())
    if not off < _CHECK_MOST:
        raise TuneError(
            f"transformers does not read {source.gguf} as llama.cpp does: logits differ by {off:.2f} of their spread; "
            "take its checkpoint"
        )


# The adapter


def target_modules(model: Any, targets: str) -> list[str]:
    """Names of modules for `q,k,v,o,gate,up,down`, or modules' own. Raises `TuneError` for one that the model lacks."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = []
    for word in (word.strip() for word in targets.split(",")):
        name = _MODULES.get(word, word)
        name = _FUSED[name] if name not in names and _FUSED.get(name) in names else name
        if name not in names or name == "lm_head":
            raise TuneError(f"--targets names {word!r}; this model has {', '.join(sorted(names - {'lm_head'}))}")
        if name not in wanted:
            wanted.append(name)
    return wanted


def add_adapter(base: BaseModel, request: TuneRequest) -> Any:
    """The model with an untrained adapter, in float32, by PEFT."""
    import peft

    config = peft.LoraConfig(
        r=request.rank,
        lora_alpha=request.alpha,
        target_modules=target_modules(base.model, request.targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.source.label,
    )
    torch.manual_seed(request.seed)
    return peft.get_peft_model(base.model, config)


def n_trained(model: Any) -> int:
    """Parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextmanager
def precision(device: str) -> Iterator[None]:
    """How everything is computed: in bfloat16 where the weights are."""
    if device == "cuda" and torch.cuda.is_bf16_supported():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            yield
    else:
        yield


# Memory


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, about, at the peak of a step: when a layer is computed again for its gradients, or where logits are.
    inputs: what goes into each layer; free_bytes: None where nobody can tell."""

    weights: int
    adapter: int
    inputs: int
    one_layer: int
    logits: int
    masks: int
    free_bytes: int | None

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.inputs + max(self.one_layer, self.logits) + self.masks

    def __str__(self) -> str:
        parts = {"weights": self.weights, "adapter and optimizer": self.adapter, "inputs of layers": self.inputs}
        parts |= {"logits": self.logits} if self.logits > self.one_layer else {"one layer": self.one_layer}
        parts |= {"masks": self.masks}
        told = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size >= 1 << 20)
        free = "" if self.free_bytes is None else f"; {format_bytes(self.free_bytes)} are free"
        return f"needs about {format_bytes(self.total)} of memory ({told}){free}"


def plan_memory(
    model: Any, rows: Sequence[tuple[int, int]], schedule: Schedule, device: str, *, dense: bool, teacher: bool
) -> MemoryPlan:
    """What training with gradient checkpointing takes. rows: tokens, and tokens whose logits are computed, of each.
    dense: masks are; teacher: logits of its are there beside the model's own."""
    config = model.config
    parameters = list(model.parameters())
    item = max(parameter.element_size() for parameter in parameters if not parameter.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad)
    adapter = 16 * n_trained(model)  # values, gradients, two moments in float32
    longest, most = max(n for n, _ in rows), max(n for _, n in rows)
    wide = (
        getattr(config, "moe_intermediate_size", 0) * getattr(config, "num_experts_per_tok", 0)
        or config.intermediate_size
    )
    n_head, _, head_dim = heads(config)
    one_layer = longest * (8 * max(config.hidden_size, n_head * head_dim) + 4 * wide) * (item + 4)
    inputs = longest * config.hidden_size * config.num_hidden_layers * item
    modes = len(set(schedule.layer_modes))
    masks = longest * longest * (modes + n_head * item) if dense else 0
    logits = most * config.vocab_size * 4 * (8 if teacher else 4)
    return MemoryPlan(weights, adapter, inputs, one_layer, logits, masks, _free_bytes(device, loaded=weights))


def _free_bytes(device: str, *, loaded: int) -> int | None:
    """Free now, and what the model has taken already."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0]) + loaded
    from swaa_local.engine.memory import most_host_bytes

    most = most_host_bytes()
    return None if most is None else most + loaded
