"""Accuracy and tokens on MATH-500, AIME or your own problems, by the paper's grader and another.

    python eval.py Qwen/Qwen3-8B runs/opsdc       # the baseline first, then what it is compared to
    python eval.py Qwen/Qwen3-8B Qwen/Qwen3-8B --prompt student v1    # the concise-prompt baseline
    python eval.py Qwen/Qwen3-8B pb09204048/CRISP-Qwen3-8B-v1         # the authors' trained model
    python eval.py @toy/eval                      # the toy: base, concise prompt, trained

Each response gets four verdicts, all by math-verify:
    final          for a careful reader: the answer stated last, after the thinking
    answer_only    the paper's first path: the last `Answer: X` in the response
    boxed_only     the paper's second path: the whole response
    dual           the paper's (version 7): right if one of its two paths is right

`final` reads a box, `Answer: 5` or `Answer = 5`, a heading `Answer` above the answer, and at the
very end "the answer is 5" or `#### 5`. It refuses on purpose: a number that none of these states,
other sentences, a list for a point, an open box or thinking block, decimals rounded to five places
or fewer (3.333333 is right for 10/3). All models are asked alike: as run.json says, in a trained
model's directory or the one above, else in the paper's style, as a step-N copied elsewhere is.

Samples are rows of samples-RANK.jsonl in --output_dir, written batch by batch. The same command
continues an interrupted evaluation, also on another number of ranks (`torchrun --nproc-per-node 8
eval.py ...`): a batch has its own seed and problems, so a lost one is sampled again, identically.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import IO, Literal

import pandas as pd
import torch
import torch.distributed as dist
from latex2sympy2_extended.math_normalization import extract_boxed_content
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from pebble import ProcessPool
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.utils import cached_file

import opsdc
from opsdc import BadInput, Ids, Model, Tokenizer, blame, require

BENCHMARKS = {  # id:config:split on the hub
    "math500": "HuggingFaceH4/MATH-500::test",
    "aime24": "HuggingFaceH4/aime_2024::train",
    "aime25": "math-ai/aime25::test",
}
ANSWERS = "answer", "final_answer", "expected_answer", "reward_model.ground_truth"  # columns
VERDICTS = ["final", "dual", "answer_only", "boxed_only"]  # in the order of the report


@dataclass(frozen=True)
class Settings:
    """What the samples depend on, beside the models. Raises BadInput for a bad value."""

    data: list[str] = HfArg(default_factory=lambda: [*BENCHMARKS], help="or files, or hub ids")
    prompt: list[str] = HfArg(
        default_factory=lambda: ["student"],
        help="instruction: student (none), v1, v2 or a text; one, or one per model",
    )
    prompt_style: str = HfArg(default="", help="opsdc.py calls it --prompt; else as in training")
    thinking: Literal["", "template", "on", "off"] = HfArg(default="", help="as opsdc.py's")
    samples: int = HfArg(default=8, help="responses to each row of a problem")
    limit: int = HfArg(default=0, help="problems of each benchmark; 0 takes all")
    temperature: float = HfArg(default=0.6, help="of sampling")
    top_p: float = HfArg(default=0.95, help="of sampling")
    top_k: int = HfArg(default=20, help="of sampling; 0 is the whole vocabulary")
    max_new_tokens: int = HfArg(default=30_000, help="a response is cut here")
    batch_size: int = HfArg(default=8, help="responses generated at once on a GPU: memory")
    seed: int = HfArg(default=0, help="of sampling")
    dtype: Literal["float32", "bfloat16"] = HfArg(default=opsdc.Config.dtype, help="of models")

    def __post_init__(self) -> None:
        at_least_1 = "samples", "max_new_tokens", "batch_size"
        for name in (*at_least_1, "limit", "top_k", "seed"):
            value, low = getattr(self, name), int(name in at_least_1)
            require(low <= value < 2**32, f"--{name} is {value}, not from {low} to 2**32 - 1")
        require(0 < self.temperature < 1e9, "--temperature must be more than 0")
        require(0 < self.top_p <= 1, "--top_p must be more than 0 and at most 1")


def read_answer(row: dict) -> str:
    """The gold answer: the first of ANSWERS that the row has, alone in a list or not, and behind
    GSM8K's ####. Raises BadInput where it is neither a text nor a number, and for a sentence."""
    columns = row | {ANSWERS[-1]: (row.get("reward_model") or {}).get("ground_truth")}
    found = [columns[name] for name in ANSWERS if columns.get(name) is not None]
    require(found, f"its columns are {[*row]}, without {', '.join(ANSWERS)}")
    answer = json.loads(found[0]) if str(found[0]).startswith('["') else found[0]
    answer = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    text = str(answer).rpartition("####")[2].strip()
    good = isinstance(answer, str | int | float) and text not in ("", "nan")
    sentence = re.search(r"\b(?:is|are)\b", re.sub(r"\{.*\}", "", text))
    require(good and not sentence, f"answer is {answer!r}, no number, formula or name")
    return text


def load_problems(source: str, limit: int) -> list[dict]:
    """The problems of a benchmark: dicts with benchmark, id, chat, answer, level (None if unknown),
    rows (how many have this id) and same (equal where chat and answer are). Raises BadInput for a
    source that can't be read and for a bad row."""
    problems = {}
    for i, row in enumerate(opsdc.load_rows(BENCHMARKS.get(source, source))):
        with blame(f"{source}, row {i + 1}"):
            answer, number = read_answer(row), str(row.get("unique_id", row.get("id", i)))
            problem = {"benchmark": Path(source).stem, "id": number, "chat": opsdc.read_chat(row)}
            problem |= {"answer": answer, "level": row.get("level"), "rows": 0}
            problem["same"] = json.dumps([problem["chat"], answer])
            json.dumps(problem, ensure_ascii=False).encode()  # raises for a lone surrogate
            first = problems.setdefault(problem["id"], problem)
            first["rows"] += 1
            require(first["same"] == problem["same"], "another problem has the same id")
    require(problems, f"{source} has no rows")
    kept = [*dict.fromkeys(problem["same"] for problem in problems.values())][: limit or None]
    return [problem for problem in problems.values() if problem["same"] in kept]


# ---- Grading -------------------------------------------------------------------------------------

# How models mark where thinking begins and ends; the last are Magistral, Kimi, Gemma 4, gpt-oss.
THINKING = {"<think>": "</think>", "<thought>": "</thought>", "<seed:think>": "</seed:think>"}
THINKING |= {"[THINK]": "[/THINK]", "◁think▷": "◁/think▷", "<|channel>thought": "<channel|>"}
THINKING |= {"<|channel|>analysis": "<|channel|>final<|message|>"}
forkserver.set_forkserver_preload(["opsdc", "math_verify", "pandas", "pebble"])  # of workers


def paper_answer(response: str) -> str:
    """The last `Answer: X`, boxed, as the paper's first path reads it; "" where there is none."""
    found = re.findall(r"answer\s*:\s*([^\n]+)", response, re.I)
    stated = found[-1].strip().rstrip(".,;:?\"' \t") if found else ""
    return rf"\boxed{{{stated}}}" if stated else ""


def after_thinking(response: str) -> str:
    """The response after its thinking, "" while that is open. A second closing mark at the very end
    closes nothing."""
    for closing in THINKING.values():
        if response.count(closing) > 1:
            response = response.rstrip().removesuffix(closing)
        response = response.rpartition(closing)[2]
    return "" if any(opening in response for opening in THINKING) else response


LONGEST_ANSWER = 1000  # characters
SYMBOLS = str.maketrans({"°": r"^\circ", "π": r"\pi ", "∞": r"\infty ", "−": "-", "²": "^2"})
# Inside of a sentence only a capital counts, because "we check our answer: ..." states nothing.
OPENING = r"(?:^|[.!?] )[ \t>#*_-]*(?:(?:so|thus|hence|therefore|the|my|final|correct),? )*"
NAME = rf"(?:(?i:{OPENING}answers?)|\bAnswers?|\bANSWERS?|答案)"
SHORT = r"(?=\**[-\d$\\({\[√π])(?!\d+[.)] )"  # a number or a formula, but no item of a list
STATED = re.compile(
    rf"(?m){NAME}(?: is| are|是)?[*_ \t]*[:\uff1a](?!\s*\n\d+[.)] )"  # Answer: 5
    rf"|{NAME}[*_ \t]*(?:\n\s*{SHORT}|(?=\$\$|\\\[))"  # a heading above the answer, a display
    rf"|{NAME} (?:is|are) {SHORT}(?=(?:[^\n.?]|\.\S){{1,200}}\Z)"  # the last sentence
    r"|\bAnswers?[*_ \t]*=|<answer>|^####[ \t]*(?=[-+$\\\d.,/% ]{1,50}\Z)"  # the last is GSM8K's
)
END = re.compile(r"\n|\.\s|。|</answer>|[\s,;]+\(?(?:since|because)\b")  # a reason may follow
NUMBER_WORD = r"dozen|hundred|thousand|\w+illion"
CHANGES = re.compile(  # beside a number: "5 squared", "5 x", "not 5"; "5 apples" is 5
    r"(?i)[^a-z\s.,;:()*=%]|\b(?!cm|mm|km|kg|ft|is|we|of|in|it|he|by)[a-z]{1,2}\b|\b(?:percent\w*|"
    rf"(?:{NUMBER_WORD}|half|third|quarter|(?:four|fif|six|seven|eigh|nin|ten)th)s?|halves|squared|"
    r"cubed|times|plus|minus|over|root|factorial|mod\w*|base|and|for|(?-i:when)|where|unless|"
    r"without|more|less|least|most|than|not|are)\b"
)


def final_answer(response: str) -> str:
    """The answer stated last after the thinking, in a box for math-verify; else an empty box."""
    text = re.sub(r"\\(?:boxed|fbox)\s*\{\s*\}", "", after_thinking(response)).rstrip("*_. \t\r\n")
    stated = max((match.end() for match in STATED.finditer(text)), default=-1)
    box = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    answer = text[stated:].lstrip("*_`\"' \t\r\n")[:LONGEST_ANSWER] if stated >= 0 else ""
    if box > stated:  # it may stand in a sentence with others, all of them the answer
        sentence = re.split(r"\n|[.!?]\s", text[max(0, box - LONGEST_ANSWER) : box])[-1]
        answer = extract_boxed_content(sentence + text[box : box + LONGEST_ANSWER], "last")
    elif display := re.match(r"(?s)(?:\$\$|\\\[)(.+?)(?:\$\$|\\\])", answer):
        answer = display[1]
    else:
        answer = re.sub(r"^.*\b(?:is|are|it's)\b:? (?=.*[\d$\\])", "", END.split(answer)[0])
        answer = plain(answer.rstrip("*_`\"' \t.,;:?"))
        answer = re.sub(r"^(?:\\?\$)?(-?\d[\d,]*(?:\.\d+)?)(?=[\s*])", r"$\1$", answer)
        parts = re.split(r"(?<!\\)(?:\$+|\\[()\[\]])", answer)  # words, formula, words, ...
        alone = len(parts) == 3 and not CHANGES.search(f"{parts[0]} {parts[2]}")
        answer = parts[1] if alone else " ".join(parts)  # "$1$ and $2$" is a list
    return rf"\boxed{{{plain(answer)}}}" if answer.count("{") == answer.count("}") else ""


def plain(answer: str) -> str:
    """LaTeX for √, pi and SYMBOLS; 1234 for 1 234 and 5 for 5€; a time of day as a text."""
    answer = re.sub(r"√(\d+|\w|\([^()]*\))", r"\\sqrt{\1}", answer.rstrip(". \n"))
    answer = re.sub(r"(?<=\d)(?:(?:\\,|~|\\?\s)(?=\d{3}(?!\d))|\s*(?:€|[ck]?m[²³])$)", "", answer)
    answer = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", "π", answer).translate(SYMBOLS)
    time = r"(?i)(?:\\text\{\s*)?(\d?\d:\d\d)[\s~}]*(?:\\text\{\s*)?([ap])\.?m\b\.?\s*\}?"
    return re.sub(time, r"\\text{\1 \2.m.}", answer)


def contradicts(gold: str, text: str) -> bool:
    """Whether number words differ, or bases or brackets that both name; or a point is a list."""
    kinds = NUMBER_WORD, r"\d_\{?(\w+)", r"(\\\{|(?<!\\)\()[^()]*,"
    words, *others = [[{*re.findall(kind, side, re.I)} for side in (gold, text)] for kind in kinds]
    listed = "(" in others[-1][0] and "," in text and not re.search(r"(?<!\\)[(\[]|[\\{]\{|=", text)
    return words[0] != words[1] or listed or any(a and b and a.isdisjoint(b) for a, b in others)


def compare(read: Callable, response: str, gold: str, limit: float) -> bool | None:
    """A verdict of math-verify on what `read` finds, in a grading process; None if it raises an
    error. After `limit` seconds of processor time the kernel ends the process, which math-verify's
    own limits can't do inside C code. Only the paper's paths also read numbers without LaTeX."""
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        text, latex, final = read(response), LatexExtractionConfig(), read is final_answer
        kinds, gold = ([latex], plain(gold)) if final else ([ExprExtractionConfig(), latex], gold)
        if not text.strip() or (final and contradicts(gold, text)):
            return False
        right = parse(rf"\boxed{{{gold}}}", [latex], parsing_timeout=None)
        return verify(right, parse(text, kinds, parsing_timeout=None), timeout_seconds=None)
    except Exception:
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def start_worker() -> None:
    """Prepares a grading process: 2 GB more memory at most, the slow first use of math-verify."""
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(OSError, ValueError):  # no /proc, or a lower limit stands already
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + (2 << 30), resource.RLIM_INFINITY))
    compare(str, r"\boxed{\frac{1}{2}}", "1", limit=60)


def grading_pool(workers: int) -> ProcessPool:
    """Grading processes, forked from a clean server: a fork of this process would break CUDA."""
    return ProcessPool(workers, initializer=start_worker, context=get_context("forkserver"))


def grade(pool: ProcessPool, rows: Iterable[tuple], limit: float = 5.0) -> list[dict[str, int]]:
    """The verdicts of each (response, gold), and `errors`: how many comparisons were ended. Each of
    the three has a third of `limit` seconds of processor time, and ten times as much on the clock.
    One that is ended counts as wrong and spoils no other."""
    readers = {"final": final_answer, "answer_only": paper_answer, "boxed_only": str}
    share, jobs = limit / len(readers), []
    for row in rows:
        tasks = {name: (read, *row, share) for name, read in readers.items()}
        jobs += [{n: pool.schedule(compare, task, timeout=10 * share) for n, task in tasks.items()}]
    graded = []
    for job in jobs:
        found = {name: None if job[name].exception() else job[name].result() for name in readers}
        found["dual"] = found["answer_only"] or found["boxed_only"]
        errors = [found[name] for name in readers].count(None)
        graded.append({name: bool(found[name]) for name in VERDICTS} | {"errors": errors})
    return graded


# ---- Samples -------------------------------------------------------------------------------------

Problems = dict[tuple[str, str], dict]  # by benchmark and id
KEY = ("model", "prompt", "benchmark", "id", "sample")  # tells a sample from all others


def as_trained(models: list[str], option: str, otherwise: str) -> str:
    """An option of opsdc.py as the run.json of trained models says, in their directory or, for a
    step-N, in the one above; else `otherwise`. Raises BadInput if they differ."""
    places = [place for name in models for place in (Path(name), Path(name).parent)]
    runs = [run for place in places if (run := place / "run.json").exists()]
    with blame(" and ".join(map(str, runs))):
        configs = [json.loads(run.read_text(encoding="utf-8"))["config"] for run in runs]
        found = {config.get(option, otherwise) for config in configs} or {otherwise}
        require(len(found) == 1, f"they differ in --{option}: choose one for all, see --help")
    return found.pop()


def identify(name: str) -> dict[str, str]:
    """What tells a model from others: a hub id's commit, or sizes and times of a directory's files.
    Raises BadInput for what is no model."""
    with blame(name):
        found = {f"snapshot of {name}": Path(cached_file(name, "config.json")).parent.name}
    kinds = "*config.json", "*token*", "*.jinja", "*.safetensors"
    for path in sorted(path for kind in kinds for path in Path(name).glob(kind)):
        found[str(path)] = f"{path.stat().st_size} bytes of {path.stat().st_mtime_ns}"
    return found


def prepare(candidate: tuple[str, str], problems: Problems, settings: Settings) -> tuple:
    """A model's tokenizer, its prompt for each problem as ids, its GenerationConfig: all without
    its weights, so that bad input is refused before any model samples. Raises BadInput."""
    (name, prompt), style = candidate, settings.prompt_style
    asked, instruction = (0, "v1") if prompt == "student" else (1, prompt)
    chats = [opsdc.prompt_pair(p["chat"], instruction, style)[asked] for p in problems.values()]
    tokenizer = opsdc.load_tokenizer(name)
    with blame(name):
        prompts = opsdc.encode_chats(tokenizer, chats, settings.thinking)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):  # no weights
            model = AutoModelForCausalLM.from_config(config)
        with contextlib.suppress(OSError):  # not every model has this file
            model.generation_config = GenerationConfig.from_pretrained(name)
    opsdc.require_room([model], max(map(len, prompts)) + settings.max_new_tokens)
    generation = opsdc.sampling_settings(settings, [model], tokenizer, settings.top_k)
    return tokenizer, dict(zip(problems, prompts, strict=True)), generation


def generate(model: Model, tokenizer: Tokenizer, prompts: list[Ids]) -> list[dict]:
    """Samples one response to each prompt, all at once, ungraded. Special tokens stay in it, as
    some mark thinking, but for stop ids and padding; so does a mark at the end of the prompt."""
    stop_ids, samples = model.generation_config.eos_token_id, []
    completions = opsdc.rollout(model, prompts, len(prompts))
    for prompt, completion in zip(prompts, completions, strict=True):
        opened = [mark for mark in THINKING if tokenizer.decode(prompt).rstrip().endswith(mark)]
        kept = [token for token in completion if token not in (*stop_ids, tokenizer.pad_token_id)]
        sample = {"response": "\n".join([*opened, tokenizer.decode(kept)])}
        sample |= {"tokens": len(completion), "finished": completion[-1] in stop_ids}
        samples.append(sample)
    return samples


def read_responses(file: str, problems: Problems, samples: int) -> dict[tuple, dict]:
    """Samples by key that another engine wrote to a .jsonl file. A row has the id of a problem,
    response (with the mark of thinking where the prompt ended so), tokens (their number), finished
    (false where it was cut). Raises BadInput for other rows, and for missing or further samples."""
    (benchmark, _), *_ = problems
    counts, written = Counter(), {}
    fields = {"response": str, "tokens": int, "finished": bool}
    for number, row in enumerate(opsdc.load_rows(file), 1):
        with blame(f"{file}, row {number}"):
            for name, kind in fields.items():
                require(type(row.get(name)) is kind, f"its {name} is no {kind.__name__}")
        place = benchmark, str(row.get("id"))
        written[file, "as written", *place, counts[place]] = {name: row[name] for name in fields}
        counts[place] += 1
    wished = {place: samples * problem["rows"] for place, problem in problems.items()}
    require(counts == wished, f"{file} must have --samples {samples} of each problem, no others")
    return written


def open_records(output_dir: Path, identity: dict) -> tuple[IO[bytes], dict[tuple, dict]]:
    """This rank's file of samples, locked, to append to; and the samples on disk by key. Raises
    BadInput if output_dir can't be written, is in use, or is of another evaluation."""
    with blame(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        records = open(output_dir / f"samples-{dist.get_rank()}.jsonl", "a+b")
    try:
        fcntl.flock(records, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"{output_dir} is in use by another evaluation") from None
    dist.barrier()  # every rank has its lock
    file = output_dir / "settings.json"
    with blame(file):
        held = json.loads(file.read_text(encoding="utf-8")) if file.exists() else identity
    other = ", ".join(n for n in held | identity if held.get(n) != identity.get(n))
    require(not other, f"{output_dir} holds an evaluation with another {other}: choose another")
    done = read_samples(output_dir)
    require(file.exists() or not done, f"{output_dir} has samples but no settings.json")
    dist.barrier()  # every rank has read
    if dist.get_rank() == 0 and not file.exists():  # a full disk loses no old one
        file.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    records.seek(0)
    records.truncate(records.read().rfind(b"\n") + 1)  # without a row that a kill cut short
    return records, done


def read_samples(output_dir: Path) -> dict[tuple, dict]:
    """All samples in output_dir, each key once; of a file that ends within a row, the rest."""
    samples = {}
    for file in sorted(output_dir.glob("samples-*.jsonl")):
        with blame(file), file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
            samples |= {tuple(row[name] for name in KEY): row for row in rows}
    return samples


def interval(means: pd.Series) -> list[float]:
    """A 95% interval around problems' mean, by "plus four": mean and 1.96 standard errors after two
    right and two wrong are added. It holds for few problems and near 0 and 1, too."""
    draws = pd.Series([*means, 1, 1, 0, 0])
    half = 1.96 * draws.sem()
    return [max(0.0, draws.mean() - half), min(1.0, draws.mean() + half)]


def summarize(rows: list[dict]) -> pd.DataFrame:
    """Means by benchmark, level ("all", then each) and candidate, in the order of the rows.
    Samples of one problem are alike, in several rows too, so only the problems' means count as
    independent draws. Reductions are against the tokens of the first candidate."""
    table = pd.DataFrame([row | {"level": str(row["level"])} for row in rows])
    levels = table[table["level"] != "None"].sort_values("level", kind="stable")
    table = pd.concat([table.assign(level="all"), levels], ignore_index=True)
    table["cut"] = ~table["finished"]
    group, values = ["benchmark", "level", "model", "prompt"], [*VERDICTS, "tokens", "cut"]
    problems = table.groupby([*group, "same"], sort=False)[values].mean().groupby(group, sort=False)
    summary = problems.mean()
    base = summary.groupby(["benchmark", "level"])["tokens"].transform("first")
    summary["reduction"] = 1 - summary["tokens"] / base
    summary["problems"] = problems.size()
    summary["errors"] = table.groupby(group)["errors"].sum()
    return summary.join(problems[VERDICTS].agg(interval).add_suffix("_interval"))


def report(summary: pd.DataFrame) -> str:
    """The summary as a Markdown table, accuracies in %."""
    table = pd.DataFrame(index=summary.index)
    for name in VERDICTS:
        cells = zip(summary[name], summary[f"{name}_interval"], strict=True)
        table[name] = [f"{100 * x:.1f} ({100 * a:.1f}-{100 * b:.1f})" for x, (a, b) in cells]
    table["tokens"] = summary["tokens"].map("{:,.1f}".format)
    table[["reduced", "cut"]] = summary[["reduction", "cut"]].map("{:.1%}".format)
    table = table.sort_index(level="benchmark", sort_remaining=False, kind="stable").reset_index()
    lines = [table.columns, ["---"] * table.shape[1], *table.to_numpy()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---- Command line --------------------------------------------------------------------------------


def evaluate(models: list[str], responses: list[str], output_dir: Path, settings: Settings) -> None:
    """Samples and grades what output_dir lacks, prints the table, writes summary.json. Raises
    BadInput before it writes anything, but for broken weights of a later model at its turn."""
    prompts = settings.prompt * len(models) if len(settings.prompt) == 1 else settings.prompt
    require(bool(models) != bool(responses), "name models to evaluate, or files of --responses")
    require(len(prompts) == len(models), f"{len(prompts)} --prompt for {len(models)} models")
    require(models or len(settings.data) == 1, "--responses needs one benchmark, chosen by --data")
    candidates = [*zip(models, prompts, strict=True), *((file, "as written") for file in responses)]
    require(len({*candidates}) == len(candidates), "a model is named twice with the same prompt")
    names = {Path(source).stem for source in settings.data}
    require(len(names) == len(settings.data), "--data has two files of the same name")
    style = settings.prompt_style or as_trained(models, "prompt", "paper")
    thinking = settings.thinking or as_trained(models, "thinking", "template")
    settings = replace(settings, prompt_style=style, thinking=thinking)
    rows = [row for source in settings.data for row in load_problems(source, settings.limit)]
    problems = {(row["benchmark"], row["id"]): row for row in rows}
    sources = [read_responses(file, problems, settings.samples) for file in responses]
    written = {key: sample for source in sources for key, sample in source.items()}
    asked = [row | {"level": None} for row in rows]  # a repaired level changes no sample
    identity = {"candidates": [*map(list, candidates)], **asdict(settings)}
    asked = json.dumps([asked, *written.values()]).encode()
    identity["problems and responses"] = hashlib.sha256(asked).hexdigest()
    prepared = {one: prepare(one, problems, settings) for one in candidates[: len(models)]}
    identity |= {key: value for name in models for key, value in identify(name).items()}
    fresh = models and not (output_dir / "settings.json").exists()  # broken weights write nothing
    model = opsdc.load_model(models[0], settings.dtype, opsdc.DEVICE) if fresh else None
    records, done = open_records(output_dir, identity)
    rank, ranks, size = dist.get_rank(), dist.get_world_size(), settings.batch_size
    places = [(*p, i) for p in problems for i in range(settings.samples * problems[p]["rows"])]
    bar = tqdm(total=len(candidates) * len(places), initial=len(done), disable=rank > 0)
    with records, bar, grading_pool(max(1, min(8, os.cpu_count() // ranks))) as pool:
        for candidate in sorted(candidates, key=lambda one: (models + responses).index(one[0])):
            for start in range(rank * size, len(places), ranks * size):
                batch = [(*candidate, *place) for place in places[start : start + size]]
                if done.keys() >= {*batch}:
                    continue
                if responses:
                    samples = [written[key] for key in batch]
                else:
                    if model is None or model.name_or_path != candidate[0]:
                        model = None  # each model is loaded once, and never are two in memory
                        model = opsdc.load_model(candidate[0], settings.dtype, opsdc.DEVICE)
                    tokenizer, encoded, model.generation_config = prepared[candidate]
                    torch.manual_seed(settings.seed * 1_000_000 + start // size)
                    samples = generate(model, tokenizer, [encoded[key[2:4]] for key in batch])
                golds = [problems[key[2:4]]["answer"] for key in batch]
                texts = [sample["response"] for sample in samples]
                verdicts = grade(pool, zip(texts, golds, strict=True))
                for key, sample, verdict in zip(batch, samples, verdicts, strict=True):
                    row = dict(zip(KEY, key, strict=True)) | sample | verdict
                    if key not in done:
                        records.write(json.dumps(row).encode() + b"\n")
                records.flush()
                bar.update(len(batch) * ranks)
    dist.barrier()
    if rank == 0:
        samples = read_samples(output_dir)
        keys = [(*candidate, *place) for candidate in candidates for place in places]
        summary = summarize([problems[key[2:4]] | samples[key] for key in keys])
        text = summary.reset_index().to_json(orient="records", indent=2, double_precision=15)
        (output_dir / "summary.json").write_text(text + "\n", encoding="utf-8")
        print(f"Accuracy in % with 95% intervals, {settings}\n\n{report(summary)}")


def main() -> None:
    """Command line: a flag for each field of Settings; @file reads flags from a file."""
    cli = HfArgumentParser(Settings, description=__doc__.split("\n")[0], fromfile_prefix_chars="@")
    cli.add_argument("models", nargs="*", help="hub ids or directories, the baseline first")
    cli.add_argument("--responses", nargs="+", default=[], help="files to grade, see README")
    cli.add_argument("--output_dir", default="runs/eval", help="samples-*.jsonl, summary.json")
    try:
        with blame("the command line"):
            arguments = vars(cli.parse_args())
        models, responses = arguments.pop("models"), arguments.pop("responses")
        output_dir, settings = Path(arguments.pop("output_dir")), Settings(**arguments)
        opsdc.start_ranks(settings.dtype)
        evaluate(models, responses, output_dir, settings)
    except BadInput as error:
        cli.exit(2, f"eval.py: error: {error}\n")
    except KeyboardInterrupt:
        cli.exit(130, "eval.py: interrupted; the same command goes on where it stopped\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
