#!/usr/bin/env python3
"""Write prompts and answers for `swaa-local tune --data`, from the tasks of `swaa-local eval`.

    scripts/tune_data.py model.gguf -o train.jsonl --task niah_multikey_1-synth,vt --length 4096,8192 -n 200
    swaa-local tune model.gguf -o a.gguf --data train.jsonl --window 1024 --sinks 64 --fa-decode --tail 128

A prompt with its answer takes at most the length, in tokens of the model (its vocabulary alone is loaded). The seed is
by default another one than eval's, so that no question is trained on that is asked later; take other tasks there, too.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from swaa_local.errors import SWAAError
from swaa_local.files.output_file import check_output, write_output
from swaa_local.generation.answer import Answerer
from swaa_local.llama import Llama
from swaa_local.tasks import Question, make_tasks
from swaa_local.tasks.essay import read_essay


def answer_of(question: Question) -> str:
    """The prefix that eval puts into the model's mouth, and all that was asked for."""
    said = ", ".join(question.references)
    return f"{question.answer_prefix} {said}.".lstrip() if question.answer_prefix else said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the GGUF whose tokens are counted")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--task", required=True, help="names, separated by commas (swaa-local eval --list-tasks)")
    parser.add_argument("--length", default="8192", help="tokens, separated by commas")
    parser.add_argument("-n", "--samples", type=int, default=100, help="of each task and length")
    parser.add_argument("--haystack", type=Path, help="the text of the essay tasks")
    parser.add_argument("--seed", default="tune")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    try:
        check_output(args.output, force=args.force)
        tasks = make_tasks(args.task.split(","), args.haystack and read_essay(args.haystack))
        with closing(Llama(str(args.model), vocab_only=True, n_ctx=512)) as llm:
            answerer = Answerer(llm)
            rows = []
            for length in map(int, args.length.split(",")):
                for task in tasks:
                    for index in range(args.samples):
                        rng = random.Random(f"{args.seed}/{task.name}/{length}/{index}")
                        question = task.make(rng, length, index, answerer.count)
                        rows.append({"prompt": question.prompt, "answer": answer_of(question)})
        random.Random(str(args.seed)).shuffle(rows)
        write_output(args.output, "".join(json.dumps(row) + "\n" for row in rows).encode(), force=args.force)
    except SWAAError as error:
        print(f"tune_data.py: error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {len(rows)} prompts to {args.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
