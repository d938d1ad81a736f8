"""The command that makes files with a schedule: its options, its plan and its last words."""

from __future__ import annotations

from pathlib import Path

import click

from swaa_local.cli.click_types import LORA, PATH
from swaa_local.cli.schedule_options import schedule_options
from swaa_local.model_file.adapter import Adapter
from swaa_local.schedule.choice import ScheduleOptions
from swaa_local.schedule.presets import PRESETS


@click.command("convert", short_help="Make a GGUF with a schedule from a GGUF, a checkpoint or a hub id.")
@click.argument("source")
@click.option("-o", "--output", type=PATH, help="The GGUF to write.  [required]")
@click.option(
    "--outtype",
    "out_type",
    metavar="TYPE",
    help="Weight type: f32, f16, bf16, q8_0, q4_k_m, ... by llama-quantize's names.",
)
@schedule_options
@click.option("--lora", type=LORA, help="A LoRA adapter in GGUF, to be merged into a checkpoint's weights.")
@click.option("--pre-tokenizer", metavar="NAME", help="Of a BPE tokenizer that upstream's converter does not know.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--allow-requantize", is_flag=True, help="Quantize what is already quantized; loses quality.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
@click.option("-v", "--verbose", is_flag=True, help="Show the log of upstream's converter.")
@click.option("--in-place", is_flag=True, hidden=True)
def convert_command(
    source: str,
    output: Path | None,
    out_type: str | None,
    schedule: ScheduleOptions,
    lora: Adapter | None,
    pre_tokenizer: str | None,
    force: bool,
    allow_requantize: bool,
    dry_run: bool,
    verbose: bool,
    in_place: bool,
) -> None:
    """Make a GGUF with a schedule.

    SOURCE is a GGUF file, the directory of a Hugging Face checkpoint, or a hub id: org/name, org/name:file.gguf,
    org/name:Q4_K_M, each with an optional @revision behind the name.

    From a GGUF all tensors are copied byte for byte; of a model in several files, name the first, and it becomes one.
    From a checkpoint upstream's converter makes the GGUF, in the 16-bit type that the checkpoint has unless --outtype
    says otherwise; that needs PyTorch and transformers: pip install 'swaa-local[convert]'. Other types go through
    llama.cpp's quantizer. The output appears when it is complete; nothing is overwritten without --force.

    \b
    swaa-local convert model.gguf -o model-swaa.gguf --preset qwen3-4b
    swaa-local convert model.gguf -o out.gguf --window 2048 --sinks 100 --full-layers 1::2 --fa-decode
    swaa-local convert ./my-finetune -o out.gguf --outtype q4_k_m --preset quality --pre-tokenizer qwen2
    swaa-local convert ./checkpoint -o out.gguf --outtype q4_k_m --preset quality --lora adapter.gguf
    swaa-local convert org/name:Q4_K_M -o out.gguf --preset quality --dry-run
    swaa-local convert model-swaa.gguf -o plain.gguf --no-swaa

    Presets (--list-presets shows what is known about them; for an unlisted model, calibrate or quality):

    \b
    {presets}
    """
    if in_place:
        raise click.UsageError("convert never rewrites its source; name another file with -o, and remove the old one")
    if output is None:
        raise click.UsageError("name the GGUF to write: -o OUT.gguf")
    from swaa_local.convert.plan import describe_plan, make_plan
    from swaa_local.convert.request import Request
    from swaa_local.convert.run import convert
    from swaa_local.report.terminal import TerminalReporter
    from swaa_local.text.units import format_bytes

    request = Request(
        source=source,
        output=output,
        schedule=schedule.config if schedule.given else False if schedule.no_swaa else None,
        out_type=out_type,
        pre_tokenizer=pre_tokenizer,
        lora=lora,
        force=force,
        allow_requantize=allow_requantize,
        verbose=verbose,
    )
    if dry_run:
        click.echo(describe_plan(make_plan(request)))
        return
    reporter = TerminalReporter()
    outcome = convert(request, reporter)
    reporter.note(f"wrote {output} ({format_bytes(output.stat().st_size)}); swaa-local inspect {output} shows it")
    if outcome.schedule is not None:
        known = f"; --list-presets says what is known of {schedule.preset.name}" if schedule.preset is not None else ""
        reporter.note(f"a window costs accuracy: measure with swaa-local eval {output} before you rely on it{known}")


convert_command.help = (convert_command.help or "").format(presets="\n    ".join(PRESETS))
