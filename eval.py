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
another sentence around it, a list for a point, an open box or thinking block, and decimals rounded
to five places or fewer: 3.333333 is right for 10/3, 3.33333 is not.

All models are asked alike: as run.json says, in the directory of a trained model or the one above,
else in the paper's style. A step-N copied elsewhere has no run.json: give --prompt_style then.

Samples are rows of samples-RANK.jsonl in --output_dir, written batch by batch. The same command
continues an interrupted evaluation, also on another number of ranks (`torchrun --nproc-per-node 8
eval.py ...`): a batch has its own seed and problems, so a lost one is sampled again, identically.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import resource
import signal
from collections import Counter
from collections.abc import Iterable
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
        help="an instruction for the model: v1, v2, percent:50 or a text, or student, which is "
        "none; one, or one per model (opsdc.py's --prompt is --prompt_style here)",
    )
    prompt_style: str = HfArg(default="", help="as of opsdc.py --prompt; else as in training")
    thinking: Literal["as trained", "template", "on", "off"] = HfArg(
        default="as trained", help="as of opsdc.py"
    )
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
        least = {"samples": 1, "max_new_tokens": 1, "batch_size": 1, "limit": 0, "top_k": 0}
        for name, low in (least | {"seed": 0}).items():
            if not low <= (value := getattr(self, name)) < 2**32:
                raise BadInput(f"--{name} is {value}, but must be from {low} to 2**32 - 1")
        require(0 < self.temperature < math.inf, "--temperature must be more than 0")
        require(0 < self.top_p <= 1, "--top_p must be more than 0 and at most 1")


def digest(text: str) -> str:
    """The first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_answer(row: dict) -> str:
    """The gold answer, from the first of ANSWERS that the row has: a text or a number, alone or in
    a list, behind GSM8K's ####. Raises BadInput where it is none, or a sentence."""
    columns = row | {ANSWERS[-1]: (row.get("reward_model") or {}).get("ground_truth")}
    answer = next((columns[name] for name in ANSWERS if columns.get(name) is not None), None)
    require(answer is not None, f"its columns are {[*row]}, without {', '.join(ANSWERS)}")
    if isinstance(answer, str) and re.fullmatch(r'\["[^"]*"\]', answer.strip()):
        answer = json.loads(answer)
    answer = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    good = isinstance(answer, str | int | float) and answer == answer  # NaN is not
    text = str(answer).rpartition("####")[2].strip()
    require(good and text, f"answer is {answer!r}, no text or number")
    sentence = re.search(r"\b(?:is|are)\b", re.sub(r"\{.*\}", "", text))
    require(not sentence, f"answer is {text!r}, a sentence: leave the answer alone in it")
    return text


def load_problems(source: str, limit: int) -> list[dict]:
    """The problems of a benchmark: dicts with benchmark, id, chat, answer, level (None if unknown),
    rows (how many have this id) and same (equal where chat and answer are). Raises BadInput for a
    source that can't be read and for a bad row."""
    problems = {}
    for i, row in enumerate(opsdc.load_rows(BENCHMARKS.get(source, source))):
        with blame(f"{source}, row {i + 1}"):
            chat, answer, level = opsdc.read_chat(row), read_answer(row), row.get("level")
            good = level is None or (isinstance(level, str | int | float) and level == level)
            require(good, f"level is {level!r}, no text or number")  # NaN is none
            number = row.get("id", i)
            problem = {"id": str(row.get("unique_id", number)), "answer": answer, "level": level}
            problem |= {"benchmark": Path(source).stem, "chat": chat, "rows": 0}
            problem["same"] = digest(json.dumps([chat, answer]))
            json.dumps(problem, ensure_ascii=False).encode()  # raises for a lone surrogate
            first = problems.setdefault(problem["id"], problem)
            first["rows"] += 1
            require(first["same"] == problem["same"], "another problem has the same id")
    require(problems, f"{source} has no rows")
    kinds = {isinstance(p["level"], str) for p in problems.values() if p["level"] is not None}
    require(len(kinds) < 2, f"{source} has numbers and texts as levels, which have no order")
    distinct = list(dict.fromkeys(problem["same"] for problem in problems.values()))
    kept = set(distinct[: limit or None])
    return [problem for problem in problems.values() if problem["same"] in kept]


# ---- Grading -------------------------------------------------------------------------------------

THINKING = {  # how models mark its beginning and its end
    "<think>": "</think>",
    "<thought>": "</thought>",
    "[THINK]": "[/THINK]",  # Magistral
    "◁think▷": "◁/think▷",  # Kimi
    "<seed:think>": "</seed:think>",
    "<|channel>thought": "<channel|>",  # Gemma 4
    "<|channel|>analysis": "<|channel|>final<|message|>",  # gpt-oss
}
forkserver.set_forkserver_preload(["opsdc", "math_verify", "pandas", "pebble"])  # of workers
WORKER_MEMORY = 2 << 30  # bytes, beside what a worker starts with


def paper_answer(response: str) -> str:
    """The last `Answer: X`, boxed, as the paper's first path reads it; "" where there is none."""
    found = re.findall(r"answer\s*:\s*([^\n]+)", response, re.I)
    stated = found[-1].strip().rstrip(".,;:?\"' \t") if found else ""
    return rf"\boxed{{{stated}}}" if stated else ""


def after_thinking(response: str) -> str:
    """The response after its thinking, "" while that is open. A second closing mark at the very end
    closes nothing."""
    for opening, closing in THINKING.items():
        if response.count(closing) > 1:
            response = response.rstrip().removesuffix(closing)
        response = response.rpartition(closing)[2]
        if opening in response:
            return ""
    return response


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
    r"(?i)[^a-z\s.,;:()*=]|\b(?!cm|mm|km|kg|ft)[a-z]{1,2}\b|\b(?:halves|percent\w*|squared|cubed|"
    rf"(?:{NUMBER_WORD}|half|third|quarter|\w+th)s?|times|plus|minus|over|root|factorial|mod\w*|"
    r"base|and|for|when|where|unless|with\w*|more|less|least|most|than|not|are)\b"
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
        answer = re.sub(r"^[^\d$\\]*\b(?:is|are|it's)\b:? ", "", END.split(answer)[0])
        answer = plain(answer.rstrip("*_`\"' \t.,;:?"))
        answer = re.sub(r"^(?:\\?\$)?(-?\d[\d,]*(?:\.\d+)?)(?=[\s*])", r"$\1$", answer)
        parts = re.split(r"(?<!\\)(?:\$+|\\[()\[\]])", answer)  # words, formula, words, ...
        alone = len(parts) == 3 and not CHANGES.search(f"{parts[0]} {parts[2]}")
        answer = parts[1] if alone else " ".join(parts)  # "$1$ and $2$" is a list
    return rf"\boxed{{{plain(answer)}}}" if answer.count("{") == answer.count("}") else ""


def plain(answer: str) -> str:
    """LaTeX for √, pi and SYMBOLS; 1234 for 1 234; a time of day as a text; no full stop."""
    answer = re.sub(r"√(\d+|\w|\([^()]*\))", r"\\sqrt{\1}", answer.rstrip(". \n"))
    answer = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", "π", answer)
    answer = re.sub(r"(?<=\d)(?:\\,|~|\\?\s)(?=\d{3}(?!\d))", "", answer.translate(SYMBOLS))
    time = r"(?i)(?:\\text\{\s*)?(\d?\d:\d\d)[\s~}]*(?:\\text\{\s*)?([ap])\.?m\b\.?\s*\}?"
    return re.sub(time, r"\\text{\1 \2.m.}", answer)


def contradicts(gold: str, text: str) -> bool:
    """Whether number words differ, or bases or brackets that both name; or a point is a list."""
    kinds = NUMBER_WORD, r"\d_\{?(?:\\\w+\{)?(\w+)", r"(\\\{|(?<!\\)\()[^()]*,"
    words, *others = [[{*re.findall(kind, side, re.I)} for side in (gold, text)] for kind in kinds]
    listed = "," in text and not re.search(r"(?<!\\)[(\[]|\\\{|=", text)
    differ = any(a and b and a.isdisjoint(b) for a, b in others)
    return words[0] != words[1] or differ or (listed and "(" in others[-1][0])


def compare(verdict: str, response: str, gold: str, limit: float) -> bool | None:
    """One verdict of math-verify, in a grading process; None if it raises an error. After `limit`
    seconds of processor time the kernel ends the process, which math-verify's own limits can't do
    inside C code. Gold answers are LaTeX; only the paper's paths also read plain numbers."""
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        text, latex = READ[verdict](response), LatexExtractionConfig()
        kinds = [latex] if verdict == "final" else [ExprExtractionConfig(), latex]
        gold = plain(gold) if verdict == "final" else gold
        if not text.strip() or (verdict == "final" and contradicts(gold, text)):
            return False
        right = parse(rf"\boxed{{{gold}}}", [latex], parsing_timeout=None)
        return verify(right, parse(text, kinds, parsing_timeout=None), timeout_seconds=None)
    except Exception:
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


READ = {"final": final_answer, "answer_only": paper_answer, "boxed_only": str}


def start_worker() -> None:
    """Prepares a grading process: limits its memory, does the slow first use of math-verify."""
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(OSError, ValueError):  # no /proc, or a lower limit stands already
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + WORKER_MEMORY, resource.RLIM_INFINITY))
    compare("boxed_only", r"\boxed{\frac{1}{2}}", "1", limit=60)


def grading_pool(workers: int) -> ProcessPool:
    """Grading processes, forked from a clean server: a fork of this process would break CUDA."""
    return ProcessPool(workers, initializer=start_worker, context=get_context("forkserver"))


def grade(pool: ProcessPool, rows: Iterable[tuple], limit: float = 5.0) -> list[dict[str, int]]:
    """The verdicts of each (response, gold), and `errors`: how many comparisons were ended. Each of
    the three has a third of `limit` seconds of processor time, and ten times as much on the clock.
    One that is ended counts as wrong and spoils no other."""
    share = limit / len(READ)
    jobs = [
        {name: pool.schedule(compare, (name, *row, share), timeout=10 * share) for name in READ}
        for row in rows
    ]
    graded = []
    for job in jobs:
        found = {name: None if job[name].exception() else job[name].result() for name in READ}
        found["dual"] = found["answer_only"] or found["boxed_only"]
        errors = [found[name] for name in READ].count(None)
        graded.append({name: bool(found[name]) for name in VERDICTS} | {"errors": errors})
    return graded


# ---- Samples -------------------------------------------------------------------------------------

Candidate = tuple[str, str]  # model and prompt, or file and "as written"
Problems = dict[tuple[str, str], dict]  # by benchmark and id
Prepared = tuple[Tokenizer, dict[tuple, Ids], GenerationConfig]
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


def prepare(candidate: Candidate, problems: Problems, settings: Settings) -> Prepared:
    """A model's tokenizer, its prompt for each problem, and its settings for sampling: without its
    weights, so that bad input is refused before any model samples. Raises BadInput."""
    (name, prompt), style = candidate, settings.prompt_style
    asked, instruction = (0, "v1") if prompt == "student" else (1, prompt)
    chats = [opsdc.prompt_pair(p["chat"], instruction, style)[asked] for p in problems.values()]
    other = [*chats[0][:-1], {"role": "user", "content": chats[0][-1]["content"] + " Why?"}]
    tokenizer = opsdc.load_tokenizer(name)
    with blame(name):
        probe, *prompts = opsdc.encode_chats(tokenizer, [other, *chats], settings.thinking)
        require(probe != prompts[0], "its chat template leaves the problem out")
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):  # no weights
            model = AutoModelForCausalLM.from_config(config)
        with contextlib.suppress(OSError):  # not every model has this file
            model.generation_config = GenerationConfig.from_pretrained(name)
    generation = opsdc.sampling_settings(settings, [model], tokenizer, max(map(len, prompts)))
    return tokenizer, dict(zip(problems, prompts, strict=True)), generation


def generate(model: Model, tokenizer: Tokenizer, prompts: list[Ids]) -> list[dict]:
    """Samples one response to each prompt, all at once, ungraded. Special tokens stay in it, as
    some mark thinking, but for stop ids and padding; so does a mark at the end of the prompt."""
    stop_ids, samples = model.generation_config.eos_token_id, []
    completions = opsdc.rollout(model, prompts, len(prompts))
    for prompt, completion in zip(prompts, completions, strict=True):
        begin = tokenizer.decode(prompt).rstrip()
        opened = [mark for mark in THINKING if begin.endswith(mark)]  # as some templates do
        kept = [token for token in completion if token not in (*stop_ids, tokenizer.pad_token_id)]
        sample = {"response": "\n".join([*opened, tokenizer.decode(kept)])}
        sample |= {"tokens": len(completion), "finished": completion[-1] in stop_ids}
        samples.append(sample)
    return samples


def read_responses(file: str, problems: Problems, samples: int) -> dict[tuple, dict]:
    """Samples by key that another engine wrote to a .jsonl file. A row has the id of a problem,
    response (with <think> where the prompt ended so), tokens (their number), finished (false where
    it was cut); rows of one id are its samples. Raises BadInput for other rows, and for problems
    without all samples."""
    (benchmark, _), *_ = problems
    counts, written = Counter(), {}
    fields = {"response": str, "tokens": int, "finished": bool}
    for number, row in enumerate(opsdc.load_rows(file), 1):
        with blame(f"{file}, row {number}"):
            for name, kind in fields.items():
                if type(row.get(name)) is not kind or name == "tokens" and not 0 < row[name] <= 1e9:
                    raise ValueError(f"it has no good {name}")
            row["response"].encode()  # raises for a lone surrogate
        place = benchmark, str(row.get("id"))
        written[file, "as written", *place, counts[place]] = {name: row[name] for name in fields}
        counts[place] += 1
    wished = {place: samples * problem["rows"] for place, problem in problems.items()}
    if wrong := counts.items() ^ wished.items():
        wish = f"must have {samples} (--samples) responses to each problem and no others"
        raise BadInput(f"{file} {wish}: look at id {min(wrong)[0][1]}")
    return written


def open_records(output_dir: Path, identity: dict) -> tuple[IO[bytes], dict[tuple, dict]]:
    """This rank's file of samples, locked, to append to; and the samples on disk by key. Raises
    BadInput if output_dir can't be written, is in use, or holds an evaluation with another identity
    or with none."""
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
    for name in held | identity:
        if held.get(name) != identity.get(name):
            other = f"with {name} {held.get(name)}, not {identity.get(name)}"
            raise BadInput(f"{output_dir} holds an evaluation {other}: choose another")
    done = read_samples(output_dir)
    require(file.exists() or not done, f"{output_dir} has samples but no settings.json")
    dist.barrier()  # every rank has read
    if dist.get_rank() == 0:
        whole = file.with_suffix(".unfinished")  # a kill leaves no half of settings.json
        whole.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        whole.replace(file)
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
    """Both ends of a 95% interval around the mean of problems' means, by "plus four": mean and 1.96
    standard errors after two right and two wrong problems are added, which holds for few problems
    and near 0 and 1, where the plain standard error can be 0."""
    draws = pd.Series([*means, 1, 1, 0, 0])
    half = 1.96 * draws.sem()
    return [max(0.0, draws.mean() - half), min(1.0, draws.mean() + half)]


def summarize(rows: list[dict]) -> pd.DataFrame:
    """Means by benchmark, level ("all", then each) and candidate, in the order of the rows.
    NAME_interval is a 95% interval. Samples of one problem are alike, in several rows too, so only
    the problems' means count as independent draws. Reductions are against the tokens of the first
    candidate."""
    levels = {row["level"] for row in rows} - {None}
    levels = sorted(levels, key=lambda level: (isinstance(level, str), level))
    parts = {"all": rows} | {str(one): [r for r in rows if r["level"] == one] for one in levels}
    table = pd.concat([pd.DataFrame(part).assign(level=name) for name, part in parts.items()])
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
    if bool(models) == bool(responses):
        raise BadInput("name the models to evaluate, or files of --responses to grade")
    if len(prompts) != len(models):
        raise BadInput(f"--prompt names {len(prompts)} prompts for {len(models)} models")
    if responses and len(settings.data) > 1:
        raise BadInput("--responses needs one benchmark: choose it with --data")
    candidates = [*zip(models, prompts, strict=True), *((file, "as written") for file in responses)]
    if len(set(candidates)) < len(candidates):
        raise BadInput("the same model with the same prompt is named twice")
    if len({Path(source).stem for source in settings.data}) < len(settings.data):
        raise BadInput("--data has two files of the same name, which tells benchmarks apart")
    if not settings.prompt_style:
        settings = replace(settings, prompt_style=as_trained(models, "prompt", "paper"))
    if settings.thinking == "as trained":
        settings = replace(settings, thinking=as_trained(models, "thinking", "template"))
    rows = [row for source in settings.data for row in load_problems(source, settings.limit)]
    problems = {(row["benchmark"], row["id"]): row for row in rows}
    written = {}
    for file in responses:
        written |= read_responses(file, problems, settings.samples)
    asked = [row | {"level": None} for row in rows]  # a repaired level changes no sample
    identity = {"candidates": [*map(list, candidates)], **asdict(settings)}
    identity["problems and responses"] = digest(json.dumps([asked, *written.values()]))
    prepared = {one: prepare(one, problems, settings) for one in candidates[: len(models)]}
    identity |= {key: value for name in models for key, value in identify(name).items()}

    early = models and not (output_dir / "settings.json").exists()  # if broken, nothing is written
    model = opsdc.load_model(models[0], settings.dtype, opsdc.DEVICE) if early else None
    records, done = open_records(output_dir, identity)
    rank, ranks, size = dist.get_rank(), dist.get_world_size(), settings.batch_size
    places = [(*p, i) for p in problems for i in range(settings.samples * problems[p]["rows"])]
    total = len(candidates) * len(places) // ranks
    bar = tqdm(total=total, initial=len(done) // ranks, disable=rank > 0)
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
                bar.update(len(batch))
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
    parser = HfArgumentParser(
        Settings, description=__doc__.split("\n")[0], fromfile_prefix_chars="@"
    )
    parser.add_argument("models", nargs="*", help="hub ids or directories, the baseline first")
    parser.add_argument("--responses", nargs="+", default=[], help="files to grade, see README")
    parser.add_argument("--output_dir", default="runs/eval", help="samples-*.jsonl, summary.json")
    try:
        with blame("the command line"):
            arguments = vars(parser.parse_args())
        models, responses = arguments.pop("models"), arguments.pop("responses")
        output_dir, settings = Path(arguments.pop("output_dir")), Settings(**arguments)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the server of grading processes
        forkserver.ensure_running()  # it imports its libraries while models are opened
        signal.signal(signal.SIGINT, signal.default_int_handler)
        opsdc.start_ranks(settings.dtype)
        evaluate(models, responses, output_dir, settings)
    except BadInput as error:
        parser.exit(2, f"eval.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "eval.py: interrupted; the same command goes on where it stopped\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
