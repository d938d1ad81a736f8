#!/usr/bin/env python3
"""Measure two builds of llama.cpp against each other on the CPU: the patched one and upstream's own.

    scripts/compare_builds.py model.gguf --stock DIR                                    # prefill and decode
    scripts/compare_builds.py model.gguf --stock DIR -p 0 -d 16384,32768 -ctk f16,q8_0  # decode in long contexts
    scripts/compare_builds.py model.gguf --stock DIR -t 1 --cpu-time -r 9               # on a machine that is busy

DIR is the folder of a build's libllama and libggml*. Each build runs in a process of its own; both stay, and they are
measured in turn, so that what slows the machine down hits both. Options are llama-bench's where it has them. The model
has no schedule: with one, `swaa-local bench` compares it with full attention.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build_figures import Comparison, Series, as_json, markdown
from engine_build import N_REAL, Build, Cache, start
from swaa_local.errors import SWAAError
from swaa_local.model_file.header import GGUFFile
from swaa_local.model_file.model_info import ModelInfo, model_info_of
from swaa_local.model_file.schedule_keys import schedule_of
from swaa_local.schedule.cost import KV_TYPES, kv_bytes
from swaa_local.text.units import format_bytes

STOCK, PATCHED = "stock", "patched"
# What is copied, for the bandwidth of memory: at least this, and at least so many times what the CPU caches.
COPY_BYTES = 256 << 20
COPY_CACHES = 8
N_COPIES = 2
# llama.cpp pads contexts to this.
N_CTX_STEP = 256
# Threads of the build that was measured before may still spin for a moment.
PAUSE_S = 0.01


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="a model without a schedule")
    parser.add_argument("--stock", type=Path, required=True, metavar="DIR", help="libraries of upstream's build")
    parser.add_argument("--patched", type=Path, metavar="DIR", help="of the patched build [the installed engine's]")
    parser.add_argument("-p", type=numbers(0), default=[512], metavar="N,..", help="prompts to read; 0: none [512]")
    parser.add_argument("-n", type=number(0), default=16, metavar="N", help="tokens to decode; 0: none [16]")
    parser.add_argument(
        "-d", type=numbers(0), default=[0, 2048], metavar="N,..", help="tokens that are in the cache before [0,2048]"
    )
    parser.add_argument("-ctk", type=kv_types, default=["f16"], metavar="TYPE,..", help="KV cache types to try [f16]")
    parser.add_argument("-ctv", type=kv_types, metavar="TYPE,..", help="of V, one for each of -ctk [the same]")
    parser.add_argument(
        "-fa", type=switches, default=[True, False], metavar="1,0", help="flash attention on, off or both [both]"
    )
    parser.add_argument("-t", type=number(1), metavar="N", help="threads [half the CPUs]")
    parser.add_argument("-ub", type=number(1), default=512, metavar="N", help="n_ubatch [512]")
    parser.add_argument("-r", type=number(1), default=5, metavar="N", help="repetitions, after a warm-up [5]")
    parser.add_argument("--cpu-time", action="store_true", help="measure the CPU time of one thread, not the clock's")
    parser.add_argument("-o", choices=("md", "json"), default="md", help="what to print [md]; JSON has every sample")
    options = parser.parse_args(arguments)
    options.t = options.t or max(1, (os.cpu_count() or 1) // 2)
    if options.cpu_time and options.t != 1:
        parser.error(f"CPU time says how long one thread worked, and there are {options.t}; add -t 1")
    options.ctv = options.ctv or options.ctk
    if len(options.ctv) != len(options.ctk):
        parser.error(f"-ctk has {len(options.ctk)} types and -ctv has {len(options.ctv)}; give one of V for each of K")
    if options.n == 0 and not any(options.p):
        parser.error("nothing to measure: -p and -n are 0")
    for type_v in options.ctv:
        if quantized(type_v) and True not in options.fa:
            parser.error(f"llama.cpp has no V cache of {type_v} without flash attention; leave out -fa 0 or add 1")
    return options


def number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is not at least {least}")
        return value

    return parse


def numbers(least: int) -> Callable[[str], list[int]]:
    one = number(least)
    return lambda text: list(dict.fromkeys(one(part) for part in text.split(",")))


def kv_types(text: str) -> list[str]:
    types = text.lower().split(",")
    for name in types:
        if name not in KV_TYPES:
            raise argparse.ArgumentTypeError(f"unknown type {name!r}; known are {', '.join(KV_TYPES)}")
    return types


def switches(text: str) -> list[bool]:
    known = {"1": True, "0": False, "on": True, "off": False}
    try:
        return list(dict.fromkeys(known[part] for part in text.split(",")))
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"{error} is neither 1 nor 0") from None


def quantized(kv_type: str) -> bool:
    """These have blocks of elements; as V they need flash attention."""
    return KV_TYPES[kv_type][0] > 1


class Copy:
    """Copies between two buffers that no CPU cache holds, by as many threads as decode."""

    def __init__(self, n_threads: int, cpu_time: bool) -> None:
        self.n_bytes = max(COPY_BYTES, COPY_CACHES * cpu_cache_bytes())
        self._from, self._to = np.ones(self.n_bytes, np.uint8), np.zeros(self.n_bytes, np.uint8)
        self._clock = time.process_time if cpu_time else time.perf_counter
        self._parts = np.linspace(0, self.n_bytes, n_threads + 1).astype(int).tolist()
        self._pool = ThreadPoolExecutor(n_threads)

    def bytes_per_s(self) -> float:
        """Bytes copied a second; memory reads as many and writes as many."""
        started = self._clock()
        for _ in range(N_COPIES):
            list(self._pool.map(self._copy, self._parts, self._parts[1:]))
        return N_COPIES * self.n_bytes / (self._clock() - started)

    def close(self) -> None:
        self._pool.shutdown()

    def _copy(self, begin: int, end: int) -> None:
        ctypes.memmove(self._to.ctypes.data + begin, self._from.ctypes.data + begin, end - begin)


def cpu_cache_bytes() -> int:
    """The largest cache of the first CPU; 0 where the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    texts = [path.read_text().strip() for path in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=0)


def read_model(path: Path) -> tuple[ModelInfo, int]:
    """Its facts, and the bytes of weights that one token reads: without the embeddings of other tokens (unless they are
    the output's matrix as well) and the experts that are not used. Raises `SWAAError` if it has a schedule."""
    with GGUFFile.open(path) as file:
        if schedule_of(file) is not None:
            raise SWAAError(
                f"{path} has a schedule, which upstream's build does not run; compare with `swaa-local bench`"
            )
        info = model_info_of(file)
        if info.n_split > 1:
            raise SWAAError(f"{path} is one of {info.n_split} files; merge them first (llama-gguf-split --merge)")
        n_experts = file.get(f"{info.architecture}.expert_count", 0) or 1
        used = (file.get(f"{info.architecture}.expert_used_count", 0) or 1) / n_experts
        untied = any(tensor.name == "output.weight" for tensor in file.tensors)
        total = 0.0
        for tensor in file.tensors:
            if tensor.n_bytes is None:
                raise SWAAError(f"{path}: the size of {tensor.name} is not known (type {tensor.type})")
            if not (untied and tensor.name == "token_embd.weight"):
                total += tensor.n_bytes * (used if "_exps." in tensor.name else 1)
        return info, round(total)


@contextmanager
def measuring(options: argparse.Namespace) -> Iterator[tuple[Comparison, Iterator[None]]]:
    """The comparison, still without samples, and an iterator that adds the series of one depth at each step."""
    info, weight_bytes = read_model(options.model)
    with ExitStack() as stack:
        builds = [stack.enter_context(start(*build)) for build in ((STOCK, options.stock), (PATCHED, options.patched))]
        stock, patched = (build.load(options.model, options.t, options.cpu_time) for build in builds)
        copy = stack.enter_context(closing(Copy(options.t, options.cpu_time)))
        comparison = Comparison(
            model=str(options.model),
            stock=stock,
            patched=patched,
            n_threads=options.t,
            n_ubatch=options.ub,
            cpu_time=options.cpu_time,
            weight_bytes=weight_bytes,
            copy_bytes=copy.n_bytes,
        )

        def steps() -> Iterator[None]:
            for type_k, type_v in zip(options.ctk, options.ctv, strict=True):
                for depth in options.d:
                    comparison.series += measure_depth(options, builds, copy, info, type_k, type_v, depth)
                    yield

        yield comparison, steps()


def measure_depth(
    options: argparse.Namespace, builds: list[Build], copy: Copy, info: ModelInfo, type_k: str, type_v: str, depth: int
) -> list[Series]:
    """Every test in each setting, in contexts that are there at the same time."""
    tests = [(f"pp{n}", n) for n in options.p if n] + [(f"tg{n}", n) for n in (options.n,) if n]
    n_ctx = depth + max(N_REAL, *(n for _, n in tests))
    n_ctx += -n_ctx % N_CTX_STEP
    caches = [
        Cache(on, type_k, type_v, depth, n_ctx, min(options.ub, n_ctx))
        for on in options.fa
        if on or not quantized(type_v)
    ]
    widths = zip(info.n_embd_k, info.n_embd_v, strict=True)
    cache_bytes = sum(kv_bytes(n_ctx, n_k, n_v, type_k, type_v) for n_k, n_v in widths)
    needed = cache_bytes * (len(builds) * len(caches) + 1)  # one is filled from a state of the same size
    free = builds[0].free_bytes()
    if free is not None and needed > free:
        raise SWAAError(
            f"{len(builds) * len(caches)} caches of {n_ctx} tokens and filling them take {format_bytes(needed)}, and "
            f"{format_bytes(free)} of memory are free; measure less at once: a smaller -d, or only one setting of -fa"
        )
    kv_type = type_k if type_k == type_v else f"{type_k}/{type_v}"
    what = f"KV cache {kv_type}, {depth} tokens"
    series = [(cache, Series(test, n, depth, kv_type, cache.flash_attn)) for cache in caches for test, n in tests]
    for repetition in range(options.r + 1):
        note(f"{what}: " + (f"repetition {repetition} of {options.r}" if repetition else "warm-up"))
        # Contexts of their own in each repetition: where memory happens to be is part of the spread.
        for cache in caches:
            token_bytes = [build.open(cache) for build in builds]
            if token_bytes[0] != token_bytes[1]:
                raise SWAAError(
                    f"a token takes {token_bytes[0]} bytes of the stock cache, {token_bytes[1]} of the other"
                )
            for _, one in series:
                if one.flash_attn == cache.flash_attn:
                    one.kv_bytes = depth * token_bytes[0]
        rate = copy.bytes_per_s()
        for cache, one in series:
            seconds = {}
            for build in builds[:: -1 if repetition % 2 else 1]:
                time.sleep(PAUSE_S)
                seconds[build.name] = (build.decode if one.decodes else build.prefill)(cache, one.n)
            if repetition:
                one.stock_s.append(seconds[STOCK])
                one.patched_s.append(seconds[PATCHED])
                one.copy_bytes_per_s.append(rate)
        for cache in caches:
            for build in builds:
                build.close(cache)
    return [one for _, one in series]


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    options = parse_arguments()
    code = 0
    try:
        with measuring(options) as (comparison, steps):
            try:
                for _ in steps:
                    pass
            except KeyboardInterrupt:
                note("stopped" + ("; these depths were complete" if comparison.series else ""))
                code = 130
    except SWAAError as error:
        sys.exit(f"compare_builds.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if comparison.series:
        print(as_json(comparison) if options.o == "json" else markdown(comparison))
    sys.exit(code)


if __name__ == "__main__":
    main()
