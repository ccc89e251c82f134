"""Accuracy and tokens on MATH-500 and AIME, by the paper's grader and by a careful one.

    python eval.py Qwen/Qwen3-8B runs/opsdc       # the baseline first, then what it is compared to
    python eval.py Qwen/Qwen3-8B Qwen/Qwen3-8B --prompt student v1    # the concise-prompt baseline
    python eval.py @toy/eval                      # the toy: base, concise prompt, trained

Each response gets four verdicts, all by math-verify:
    dual           the paper's (version 2): right if either of the next two is
    answer-only    its first path: the last `Answer: X` in the response
    boxed-only     its second path: the whole response
    final          what a careful person accepts: the answer stated last, after the thinking

Every sample is a row of a samples-RANK.jsonl in --output_dir, written batch by batch. Started again
with the same arguments, the evaluation goes on where it stopped. `torchrun --nproc-per-node 8
eval.py ...` splits the batches over GPUs; any number of ranks may go on. A batch has its own seed
and always the same problems, so that one whose rows were lost is sampled as it was.
"""

import contextlib
import hashlib
import json
import logging
import math
import multiprocessing
import os
import queue
import re
import resource
import signal
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from opsdc import (
    RANK,
    RANKS,
    check_length,
    check_texts,
    claim_gpu,
    encode_chat,
    instruction_text,
    json_rows,
    load_model,
    load_rows,
    load_tokenizer,
    reading,
    rollout,
    sampling_settings,
    student_prompt,
    teacher_prompt,
    wait,
    write_whole,
)

BENCHMARKS = {  # hub id, split
    "math500": ("HuggingFaceH4/MATH-500", "test"),
    "aime24": ("HuggingFaceH4/aime_2024", "train"),
    "aime25": ("math-ai/aime25", "test"),
}
GRADERS = ("final", "dual", "answer_only", "boxed_only")  # in the order of the report

# The paper, version 2: accuracy in % by the dual grader / mean tokens; 8 samples, 30,000 tokens.
PAPER = {
    ("Qwen3-8B", "base"): "95.7/4884 76.2/14229 70.4/16492",
    ("Qwen3-8B", "prompt v1"): "95.6/2983 74.2/11352 62.1/14194",
    ("Qwen3-8B", "prompt v2"): "94.2/3833 74.6/12837 63.7/15622",
    ("Qwen3-8B", "trained v1"): "95.7/2107 72.9/9549 58.8/11804",
    ("Qwen3-8B", "trained v2"): "95.7/3339 75.0/11799 65.8/13605",
    ("Qwen3-14B", "base"): "93.0/4139 75.0/13222 69.2/15622",
    ("Qwen3-14B", "trained v1"): "96.3/1808 73.8/8261 62.9/10611",
    ("Qwen3-14B", "trained v2"): "95.2/2701 75.0/10615 67.1/12990",
    ("DeepSeek-R1-Distill-Llama-8B", "base"): "71.3/3313 33.3/11042 25.0/11983",
    ("DeepSeek-R1-Distill-Llama-8B", "trained v1"): "82.1/2267 39.2/10351 27.1/11131",
}
# Version 1 of the paper: accuracy in % by its strict `Answer:` line grader.
PAPER_V1 = {
    ("Qwen3-14B", "base"): {"math500": 70.0, "aime24": 65.8},
    ("Qwen3-14B", "trained v1"): {"math500": 86.1, "aime24": 76.3},
    ("Qwen3-8B", "trained v1"): {"math500": 86.6},
}
# Version 2, MATH-500, by path: answer-only and boxed-only.
PAPER_PATHS = {("Qwen3-14B", "base"): (57.7, 54.5), ("Qwen3-14B", "trained v2"): (92.8, 10.0)}


@dataclass(frozen=True)
class Settings:
    """What the samples depend on, beside the models."""

    benchmarks: list[str] = HfArg(
        default_factory=lambda: list(BENCHMARKS), help="of math500, aime24, aime25, from the hub"
    )
    data: list[str] = HfArg(
        default_factory=list, help="instead: files of rows with problem, answer and maybe level"
    )
    prompt: list[str] = HfArg(
        default_factory=lambda: ["student"],
        help="student, or the teacher's with v1, v2, percent:50 or a text; one, or one per model",
    )
    samples: int = HfArg(default=8, help="responses to each problem")
    limit: int = HfArg(default=0, help="problems of each benchmark; 0 takes all")
    temperature: float = HfArg(default=0.6, help="of sampling")
    top_p: float = HfArg(default=0.95, help="of sampling")
    top_k: int = HfArg(default=20, help="of sampling; 0 is the whole vocabulary")
    max_new_tokens: int = HfArg(default=30_000, help="a response is cut here")
    batch_size: int = HfArg(default=8, help="responses generated at once on a GPU: memory")
    seed: int = HfArg(default=0, help="of sampling")

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("limit", "top_k", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be 0 or more")
        if not (0 < self.temperature < math.inf and 0 < self.top_p <= 1):
            raise ValueError("--temperature must be more than 0, --top_p more than 0 and at most 1")


# ---- Problems ------------------------------------------------------------------------------------


def load_benchmarks(settings: Settings) -> dict[str, list[dict]]:
    """The problems of each benchmark: dicts with id, problem, answer, level (None where unknown).

    Raises ValueError for an unknown benchmark, and for a row without a problem and an answer.
    """
    sources = {Path(file).stem: file for file in settings.data} or {
        name: BENCHMARKS.get(name) for name in settings.benchmarks
    }
    if len(sources) < len(settings.data):
        raise ValueError("--data has two files of the same name, which tells benchmarks apart")
    loaded = {}
    for name, source in sources.items():
        if source is None:
            raise ValueError(f"no benchmark {name!r}: {', '.join(BENCHMARKS)}, or a file by --data")
        rows = load_rows(*source) if isinstance(source, tuple) else load_rows(source)
        if not {"problem", "answer"} <= set(rows.column_names):
            raise ValueError(f"{source} has columns {rows.column_names}, not problem and answer")
        answers = ["" if answer is None else str(answer) for answer in rows["answer"]]
        check_texts(name, "problem", rows["problem"])
        check_texts(name, "answer", answers)
        loaded[name] = [
            {
                "id": str(row.get("unique_id", row.get("id", i))),
                "problem": row["problem"],
                "answer": answer,
                "level": row.get("level"),
            }
            for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
        ][: settings.limit or None]
        if len({row["id"] for row in loaded[name]}) < len(loaded[name]):
            raise ValueError(f"{source} gives several problems the same id")
    return loaded


# ---- Grading ------------------------------------------------------------------------------------

LONGEST_ANSWER = 1000  # characters: nobody accepts a longer final answer
WORKER_MEMORY = 2 << 30  # bytes, beside what a worker starts with: libraries hold some per core

PAPER_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.I)
# A line "Answer: X", with markdown or "the final" before it; inside a line only with a capital,
# as "we check our answer: ..." states nothing.
ANSWER = re.compile(
    r"(?:^[ \t>#*_-]*(?:(?i:the|my|final)[ \t]+)*(?i:answers?)|\bA(?:nswers?|NSWERS?))[*_ \t]*:",
    re.M,
)
BOX = re.compile(r"\\boxed\s*\{(?!\s*\})")
DISPLAY = re.compile(r"\$\$.+?\$\$|\\\[.+?\\\]", re.S)
# Formulas between dollars or brackets; "$1$, $2$ and $3$" counts as one.
FORMULA = r"(?:(?<!\\)\$\$?(?:\\\$|[^$])+\$\$?|\\\(.+?\\\)|\\\[.+?\\\])"
FORMULAS = re.compile(rf"{FORMULA}(?:(?:[\s,;]|and|or)*{FORMULA})*", re.S)
UNIT = re.compile(r"(?<=\d)\s*(?:[€£¥]|(?:[cdkm]m|in|ft)\^?[23²³]|m[²³])$")  # not in math-verify


def paper_answer(response: str) -> str:
    """What the paper's first path reads: the last `Answer: X`; "" where there is none."""
    found = PAPER_ANSWER.findall(response)
    return found[-1].strip().rstrip(".,;:?\"' \t") if found else ""


def final_answer(response: str, thinking_opened: bool = False) -> str:
    """The answer stated last after the thinking, as text for math-verify; "" where there is none.

    `thinking_opened`: the prompt already ends in an open <think>, as some chat templates make it.
    """
    _, closed, text = response.rpartition("</think>")
    if "<think>" in text or (thinking_opened and not closed):
        return ""  # it was still thinking when it ended
    marks, boxes = list(ANSWER.finditer(text)), list(BOX.finditer(text))
    if boxes and (not marks or boxes[-1].start() > marks[-1].start()):
        return last_box(text, boxes[-1])
    rest = text[marks[-1].end() :].lstrip(" \t\r\n*_") if marks else ""
    display = DISPLAY.match(rest[:LONGEST_ANSWER])
    answer = display[0] if display else rest.split("\n", 1)[0]
    if len(answer) > LONGEST_ANSWER:
        return ""
    if not display:  # its first sentence, and of "the answer is 5" the 5
        answer = re.split(r"\.\s", answer)[0]
        answer = re.sub(r"^.*\b(?:is|are)\b:?\s+(?=.*[\d$\\])", "", answer)
    answer = UNIT.sub("", answer.lstrip("*_`\"' \t").rstrip("*_`\"' \t.,;:?"))
    answer = re.sub(r"√(\d+|\w|\([^()]*\))", r"\\sqrt{\1}", answer.replace("°", r"^\circ"))
    # One formula in a sentence is the answer; of several, math-verify would take the last.
    alone = len(FORMULAS.findall(answer)) == 1
    return answer if alone or not answer else rf"\boxed{{{answer}}}"


def last_box(text: str, last: re.Match[str]) -> str:
    """The last box, from the first on its line: math-verify joins `\\boxed{1} and \\boxed{2}`."""
    depth = 1
    for end in range(last.end(), min(last.end() + LONGEST_ANSWER, len(text))):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            first = BOX.search(text, text.rfind("\n", 0, last.start()) + 1) or last
            start = first.start() if end - first.start() < LONGEST_ANSWER else last.start()
            return text[start : end + 1]
    return ""  # cut off inside the box, or too long


def same_answer(gold: str, text: str, paper: bool) -> bool:
    """math-verify's verdict. Only the paper's settings also pick a plain number out of the text.

    Each gold answer is LaTeX and goes into a box, as the paper does it. math-verify's own time
    limits are off: they work in main threads only and cannot stop a computation in C.
    """
    latex = LatexExtractionConfig()
    right = parse(rf"\boxed{{{gold}}}", [latex], parsing_timeout=None)
    settings = [ExprExtractionConfig(), latex] if paper else [latex]
    return verify(right, parse(text, settings, parsing_timeout=None), timeout_seconds=None)


def serve_comparisons(pipe: Connection, limit: float) -> None:
    """Answer what comes down the pipe; the kernel ends this process if one comparison is too long.

    Nothing handles the two signals, so they end it inside C code too. Processor time counts, so
    that a busy machine changes no verdict; ten times as much on the clock, if something just waits.
    """
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the evaluation, the pipe's owner
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        pages = Path("/proc/self/statm")  # of Linux
        held = int(pages.read_text().split()[5]) * resource.getpagesize() if pages.exists() else 0
        limits = held + WORKER_MEMORY, resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # the evaluation has ended
        while True:
            task = pipe.recv()
            signal.setitimer(signal.ITIMER_PROF, limit)
            signal.setitimer(signal.ITIMER_REAL, 10 * limit)
            try:
                verdict = same_answer(*task)
            except Exception:
                verdict = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(verdict)


class Grader:
    """Grades in `workers` processes, each comparison within `limit` seconds of processor time.

    A comparison that takes longer, or ends its process, is wrong and counted; a new one follows.
    """

    def __init__(self, workers: int = 1, limit: float = 5.0) -> None:
        # Forked from a clean server that did the slow imports: a fork of ours would break CUDA.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["opsdc", "math_verify"])
        self.limit = limit
        self.threads = ThreadPoolExecutor(workers)
        self.idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        for _ in range(workers):
            self.idle.put(self.start())

    def start(self) -> Connection:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(
            target=serve_comparisons, args=(theirs, self.limit), daemon=True
        )
        process.start()
        theirs.close()
        ours.recv()  # "ready"; raises if no such process can start at all
        return ours

    def compare(self, gold: str, text: str, paper: bool) -> bool | None:
        """`same_answer` in an idle process; None where it was ended."""
        if not text.strip():
            return False
        worker = self.idle.get()
        try:
            worker.send((gold, text, paper))
            return worker.recv()
        except (EOFError, OSError):
            worker.close()
            worker = self.start()
            return None
        finally:
            self.idle.put(worker)

    def grade(self, response: str, gold: str, thinking_opened: bool = False) -> dict[str, int]:
        """The four verdicts, and `errors`: how many comparisons were ended."""
        stated = paper_answer(response)
        found = {
            "answer_only": self.compare(gold, rf"\boxed{{{stated}}}" if stated else "", True),
            "boxed_only": self.compare(gold, response, True),
            "final": self.compare(gold, final_answer(response, thinking_opened), False),
        }
        verdicts = {name: bool(verdict) for name, verdict in found.items()}
        dual = verdicts["answer_only"] or verdicts["boxed_only"]
        return {"dual": dual, **verdicts, "errors": list(found.values()).count(None)}

    def grade_all(self, rows: Iterable[tuple]) -> list[dict[str, int]]:
        """`grade` of each row of arguments, in order, the processes working side by side."""
        return list(self.threads.map(lambda row: self.grade(*row), rows))


# ---- Samples -------------------------------------------------------------------------------------


def ask(problem: dict, prompt: str) -> str:
    """The user's turn: of a `prompt` that is "student", or the name or text of an instruction."""
    if prompt == "student":
        return student_prompt(problem["problem"])
    return teacher_prompt(problem["problem"], instruction_text(prompt))


def check(model_name: str, prompt: str, benchmarks: dict[str, list], settings: Settings) -> None:
    """Opens a model before anything is sampled. Raises ValueError if it can't be evaluated."""
    problems = [problem for part in benchmarks.values() for problem in part]
    prompts = encode_chat(load_tokenizer(model_name), [ask(row, prompt) for row in problems])
    model = load_model(model_name)
    check_length(model, prompts, settings.max_new_tokens)
    sampling_settings(model.generation_config)  # raises where nothing says when to stop


def generate(
    model_name: str, prompt: str, benchmarks: dict[str, list[dict]], settings: Settings, done: set
) -> Iterator[list[dict]]:
    """Yields this rank's batches of samples that are not done, ungraded.

    A batch has the same problems and the same seed whenever it is sampled.
    """
    tokenizer, model = load_tokenizer(model_name), load_model(model_name)
    model.generation_config = sampling_settings(
        model.generation_config,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_new_tokens=settings.max_new_tokens,
    )
    for benchmark, problems in benchmarks.items():
        work = [(problem, sample) for problem in problems for sample in range(settings.samples)]
        batches = [
            work[i : i + settings.batch_size] for i in range(0, len(work), settings.batch_size)
        ]
        for number in range(RANK, len(batches), RANKS):
            rows = [
                {"model": model_name, "prompt": prompt, "benchmark": benchmark, "id": problem["id"]}
                | {"sample": sample}
                for problem, sample in batches[number]
            ]
            if all(key(row) in done for row in rows):
                continue
            prompts = encode_chat(
                tokenizer, [ask(problem, prompt) for problem, _ in batches[number]]
            )
            torch.manual_seed(settings.seed * 1_000_000 + number)
            for row, ids, completion in zip(rows, prompts, rollout(model, prompts), strict=True):
                row["response"] = tokenizer.decode(completion, skip_special_tokens=True)
                row["tokens"] = len(completion)
                row["finished"] = completion[-1] in model.generation_config.eos_token_id
                row["thinking_opened"] = tokenizer.decode(ids).rstrip().endswith("<think>")
            yield [row for row in rows if key(row) not in done]


def key(row: dict) -> tuple:
    """What makes a sample the one it is."""
    return row["model"], row["prompt"], row["benchmark"], row["id"], row["sample"]


def read_responses(file: str, benchmarks: dict[str, list[dict]], settings: Settings) -> list[dict]:
    """Samples that another engine wrote to a .jsonl file, as `generate` gives them.

    A row has the id of a problem, response, tokens (their count), finished (false where it was cut)
    and maybe thinking_opened (true where the prompt ended with <think>); rows of one id are its
    samples. Raises ValueError for rows that are not so, and for problems without all samples.
    """
    (benchmark, problems), *others = benchmarks.items()
    if others:
        raise ValueError("--responses needs one benchmark: choose it with --benchmarks or --data")
    counts, rows = Counter(), []
    fields = {"id": (str, int), "response": str, "tokens": int, "finished": bool}
    with reading(file):
        written = json_rows(file)
    for number, row in enumerate(written, 1):
        bad = [name for name, kind in fields.items() if not isinstance(row.get(name), kind)]
        if bad:
            raise ValueError(f"{file}, row {number} has no good {', '.join(bad)}")
        row["id"] = str(row["id"])
        place = {"model": file, "prompt": "as written", "benchmark": benchmark}
        rows.append({"thinking_opened": False} | row | place | {"sample": counts[row["id"]]})
        counts[row["id"]] += 1
    for problem in problems:
        if counts.pop(problem["id"], 0) != settings.samples:
            raise ValueError(
                f"{file} has not {settings.samples} (--samples) responses to {problem['id']}"
            )
    if counts:
        raise ValueError(
            f"{file} answers problems that {benchmark} does not have: {list(counts)[:3]}"
        )
    return rows


# ---- Records on disk -----------------------------------------------------------------------------


def recorded(output_dir: Path) -> list[dict]:
    """All samples in output_dir; of a file that ends within a row, only the rows before it."""
    return [
        json.loads(line)
        for file in sorted(output_dir.glob("samples-*.jsonl"))
        for line in file.open(encoding="utf-8")
        if line.endswith("\n")
    ]


def claim(output_dir: Path, identity: dict) -> None:
    """Reserves output_dir for one evaluation. Raises ValueError if it holds another one."""
    file = output_dir / "settings.json"
    if file.exists():
        held, identity = json.loads(file.read_text()), json.loads(json.dumps(identity))
        for name in sorted(identity.keys() | held.keys()):
            if identity.get(name) != held.get(name):
                raise ValueError(
                    f"{output_dir} holds an evaluation with {name} {held.get(name)}, not "
                    f"{identity.get(name)}: choose another --output_dir"
                )
    else:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(identity, indent=2) + "\n")


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def weights_of(model: str) -> list:
    """Tells a local model's weights from others in the same place: size and time of the files."""
    files = sorted(Path(model).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime] for file in files]


# ---- Report --------------------------------------------------------------------------------------


def mean_and_interval(rows: list[dict], name: str) -> tuple[float, float | None]:
    """Mean over samples, and 1.96 standard errors of it: half of a 95% interval.

    Samples of one problem are alike, so it is the problems' means that count as independent draws;
    of a single problem there is no interval.
    """
    by_problem = defaultdict(list)
    for row in rows:
        by_problem[row["id"]].append(row[name])
    means = [statistics.fmean(values) for values in by_problem.values()]
    if len(means) < 2:
        return statistics.fmean(means), None
    return statistics.fmean(means), 1.96 * statistics.stdev(means) / math.sqrt(len(means))


def summarize(
    rows: list[dict],
    candidates: list[tuple[str, str]],
    benchmarks: dict[str, list[dict]],
    samples: int,
) -> list[dict]:
    """A dict for each benchmark and candidate; reductions are against the first candidate's tokens.

    Raises RuntimeError unless every problem has all its samples.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[row["benchmark"], row["model"], row["prompt"]].append(row)
    summary = []
    for benchmark, problems in benchmarks.items():
        level_of = {problem["id"]: problem["level"] for problem in problems}
        levels = sorted({level for level in level_of.values() if level is not None})
        base_tokens = {}
        for model, prompt in candidates:
            group = groups[benchmark, model, prompt]
            if len(group) != len(problems) * samples:
                raise RuntimeError(f"{benchmark}, {model}: {len(group)} samples, not all")
            parts = {level: [r for r in group if level_of[r["id"]] == level] for level in levels}
            tokens = {level: mean_and_interval(part, "tokens")[0] for level, part in parts.items()}
            tokens["all"] = mean_and_interval(group, "tokens")[0]
            base_tokens = base_tokens or tokens
            reduction = {part: 1 - tokens[part] / base_tokens[part] for part in tokens}
            scores = {grader: mean_and_interval(group, grader) for grader in GRADERS}
            summary.append(
                {
                    "model": model,
                    "prompt": prompt,
                    "benchmark": benchmark,
                    "problems": len(problems),
                    "samples": samples,
                    "accuracy": {grader: mean for grader, (mean, _) in scores.items()},
                    "interval": {grader: half for grader, (_, half) in scores.items()},
                    "tokens": tokens["all"],
                    "reduction": reduction["all"],
                    "truncated": statistics.fmean(not row["finished"] for row in group),
                    "grading_errors": sum(row["errors"] for row in group),
                    "levels": {
                        str(level): {
                            "final": mean_and_interval(part, "final")[0],
                            "tokens": tokens[level],
                            "reduction": reduction[level],
                        }
                        for level, part in parts.items()
                    },
                }
            )
    return summary


def paper_rows(model: str, prompt: str, benchmark: str) -> list[str]:
    """The paper's figures for this candidate, as rows of the table; none if it has none.

    What a model trained here started from, and with which instruction, is in its run.json.
    """
    run = Path(model) / "run.json"
    variant = "base" if prompt == "student" else f"prompt {prompt}"
    if run.exists() and prompt == "student":
        config = json.loads(run.read_text(encoding="utf-8"))["config"]
        model, variant = config["model"], f"trained {config['instruction']}"
    candidate = (model.rstrip("/").split("/")[-1], variant)
    name, rows = f"*the paper's {candidate[0]}, {variant}", []
    if candidate in PAPER and benchmark in BENCHMARKS:
        figures = dict(zip(BENCHMARKS, PAPER[candidate].split(), strict=True))[benchmark]
        dual, tokens = figures.split("/")
        answer, boxed = PAPER_PATHS.get(candidate, ("", "")) if benchmark == "math500" else ("", "")
        rows.append(f"| {name}* | v2 | | {dual} | {answer} | {boxed} | {int(tokens):,} | | |")
    if strict := PAPER_V1.get(candidate, {}).get(benchmark):
        rows.append(f"| {name}, strict grader* | v1 | | | {strict} | | | | |")
    return rows


def markdown(summary: list[dict], settings: Settings) -> str:
    """The summary as Markdown tables, for each benchmark one of accuracies and one of levels."""
    lines = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in summary):
        part = [row for row in summary if row["benchmark"] == benchmark]
        lines += [
            f"## {benchmark}: {part[0]['problems']} problems x {part[0]['samples']} samples",
            "",
            f"Accuracy in % with 95% intervals, by grader; temperature {settings.temperature}, "
            f"top-p {settings.top_p}, top-k {settings.top_k}, at most {settings.max_new_tokens:,} "
            f"new tokens, seed {settings.seed}.",
            "",
            "| model | prompt | final | dual | answer-only | boxed-only | tokens | reduced | cut |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in part:
            scores = []
            for grader in GRADERS:
                half = row["interval"][grader]
                spread = "" if half is None else f" ± {100 * half:.1f}"
                scores.append(f"{100 * row['accuracy'][grader]:.1f}{spread}")
            lines.append(
                f"| {row['model']} | {row['prompt']} | {' | '.join(scores)} | {row['tokens']:,.1f} "
                f"| {row['reduction']:.1%} | {row['truncated']:.1%} |"
            )
            lines += paper_rows(row["model"], row["prompt"], benchmark)
        if levels := list(part[0]["levels"]):
            lines += [
                "",
                "Tokens, reduction and accuracy (final) by level:",
                "",
                f"| model | prompt | {' | '.join(f'level {level}' for level in levels)} |",
                "| --- | --- |" + " --- |" * len(levels),
            ]
            for row in part:
                cells = [
                    f"{level['tokens']:,.1f}, {level['reduction']:.1%}, {100 * level['final']:.1f}"
                    for level in row["levels"].values()
                ]
                lines.append(f"| {row['model']} | {row['prompt']} | {' | '.join(cells)} |")
        if errors := sum(row["grading_errors"] for row in part):
            lines += ["", f"{errors} comparisons went over the grader's limits and count as wrong."]
        lines.append("")
    return "\n".join(lines)


# ---- Command line --------------------------------------------------------------------------------


def evaluate(models: list[str], responses: list[str], output_dir: Path, settings: Settings) -> None:
    """Samples and grades what output_dir lacks, prints the tables, writes summary.json.

    Raises ValueError or OSError for bad input, before it writes anything.
    """
    benchmarks = load_benchmarks(settings)
    if bool(models) == bool(responses):
        raise ValueError("name the models to evaluate, or files of --responses to grade")
    prompts = settings.prompt * len(models) if len(settings.prompt) == 1 else settings.prompt
    if models and len(prompts) != len(models):
        raise ValueError(f"--prompt names {len(prompts)} prompts for {len(models)} models")
    candidates = list(zip(models, prompts, strict=True)) if models else []
    candidates += [(file, "as written") for file in responses]
    if len(set(candidates)) < len(candidates):
        raise ValueError("the same model with the same prompt is named twice")
    for candidate in zip(models, prompts, strict=False):
        check(*candidate, benchmarks, settings)
    written = [row for file in responses for row in read_responses(file, benchmarks, settings)]

    if RANKS > 1:  # no time limit worth the name: a rank may have hours more to do than another
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    identity = {
        "candidates": candidates,
        "problems": digest(benchmarks),
        "written": digest(written),
    }
    identity |= asdict(settings) | {"weights": [weights_of(model) for model in models]}
    claim(output_dir, identity)
    records = output_dir / f"samples-{RANK}.jsonl"
    records.touch()
    whole = records.read_bytes().rpartition(b"\n")
    done = {key(row) for row in recorded(output_dir)}
    wait()  # all have read before any writes
    os.truncate(records, len(whole[0] + whole[1]))  # a row that a kill had cut short goes

    answers = {
        (name, problem["id"]): problem["answer"]
        for name, problems in benchmarks.items()
        for problem in problems
    }
    work = len(candidates) * len(answers) * settings.samples
    grader = Grader(workers=max(1, min(8, os.cpu_count() // RANKS)))
    start, tokens = time.perf_counter(), 0
    batches = (generate(*candidate, benchmarks, settings, done) for candidate in candidates)
    ungraded = ([row] for row in written[RANK::RANKS] if key(row) not in done)
    with tqdm(
        total=work // RANKS, initial=len(done) // RANKS, unit="sample", disable=RANK > 0
    ) as bar:
        for batch in ungraded if responses else chain(*batches):
            verdicts = grader.grade_all(
                (row["response"], answers[row["benchmark"], row["id"]], row.pop("thinking_opened"))
                for row in batch
            )
            rows = [row | verdict for row, verdict in zip(batch, verdicts, strict=True)]
            with records.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            tokens += sum(row["tokens"] for row in rows)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s")
            bar.update(len(rows))
    wait()
    if RANK == 0:
        summary = summarize(recorded(output_dir), candidates, benchmarks, settings.samples)
        write_whole(output_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(markdown(summary, settings))


def main() -> None:
    """Command line: a flag for each field of Settings; @file reads flags from a file."""
    parser = HfArgumentParser(
        Settings, description=__doc__.split("\n")[0], fromfile_prefix_chars="@"
    )
    parser.add_argument("models", nargs="*", help="hub ids or directories, the baseline first")
    parser.add_argument("--responses", nargs="+", default=[], help="files to grade, see README")
    parser.add_argument("--output_dir", default="runs/eval", help="samples-*.jsonl, summary.json")
    arguments = vars(parser.parse_args())
    models, responses = arguments.pop("models"), arguments.pop("responses")
    output_dir = Path(arguments.pop("output_dir"))
    try:
        if models:
            claim_gpu()
        evaluate(models, responses, output_dir, Settings(**arguments))
    except (ValueError, OSError) as error:
        message = str(error).partition("\n")[0]
        parser.exit(2, f"eval.py: error: {message}\n")
    except torch.OutOfMemoryError:
        lower = "lower --batch_size, on which samples depend, and choose another --output_dir"
        parser.exit(1, f"eval.py: out of GPU memory: {lower}\n")
    except KeyboardInterrupt:
        parser.exit(130, "eval.py: interrupted; the same command goes on where it stopped\n")


if __name__ == "__main__":
    main()
