"""The paper's findings on the toy: runs of opsdc.py and eval.py, their tables and figures.

    pip install matplotlib
    python results/study.py             # fills in toy.md; study.json and three pictures
    python results/study.py --quick     # one seed, a third of steps and problems: runs/study-quick

Each number comes from a run of `python opsdc.py @toy/args ...` (MPD: of results/mpd.py) and one of
`python eval.py`, with three seeds of data order and sampling. A run is one process on one thread;
as many run side by side as there are cores. Started again, the study goes on where it was stopped.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import matplotlib.ticker
import pandas as pd
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MAIN = "trained v1"  # @toy/args: v1, reverse KL, M = 15, temperature 1, limit 256
# Tables: name; a model and its prompt, or the flags that follow @toy/args; the paper's figures
# (Qwen3-8B on MATH-500).
LARGER = "--teacher=toy/teacher --refresh_every=0"
TABLES = {
    "Main result": [
        ("base", "toy student", "95.7%, 4,884 tokens"),
        ("prompt v1", "toy v1", "95.6%, -38.9%"),
        ("prompt v2", "toy v2", "94.2%, -21.5%"),
        (MAIN, "", "95.7%, -56.9%"),
        ("trained v2", "--instruction=v2", "95.7%, -31.6%"),
    ],
    "Teacher refresh (trained v1: M = 15)": [
        ("M = 1", "--refresh_every=1", "collapses: 60.8%, longer"),
        ("M = 5", "--refresh_every=5", "(M = 10: -64%, AIME 2024 falls to 49.6%)"),
        (MAIN, "", ""),
        ("M = 50", "--refresh_every=50", "stable, as 30"),
        ("frozen", "--refresh_every=0", "least: -18%, accurate"),
        ("average", "--refresh_share=0.1 --refresh_every=1", "not in the paper"),
    ],
    "Divergence (trained v1: reverse KL)": [
        (MAIN, "", "95.7%, 3,339 tokens (v2)"),
        ("JSD", "--divergence=jsd", "94.8%, 3,281 tokens (v2)"),
        ("forward KL", "--divergence=forward_kl", "collapses: 5.7%, runs to the limit"),
    ],
    "Limit of the rollouts (trained v1: 256 tokens; the base model's mean is 67)": [
        ("limit 17", "--max_new_tokens=17", "(1K: -29.8%)"),
        (MAIN, "", "(8K: best; 30K: no better)"),
    ],
    "A larger teacher (not in the paper; MPD's abstract: up to -27.1%, more accurate)": [
        ("the teacher", "toy/teacher student", ""),
        ("the teacher, prompt v1", "toy/teacher v1", ""),
        ("distilled", f"{LARGER} --instruction=none", ""),
        ("distilled v1", LARGER, ""),
        ("MPD", f"{LARGER} --instruction=none", ""),  # as "distilled", but by results/mpd.py
        ("MPD v1", LARGER, ""),
    ],
}
OPTIONS = {name: options for rows in TABLES.values() for name, options, _ in rows}
ASKED = {name: tuple(o.split()) for name, o in OPTIONS.items() if o.startswith("toy")}  # untrained
PERCENT = ["reduced, %", "accuracy, %", "cut, %"]
COLUMNS = ["tokens", *PERCENT]


class Study:
    """Where the runs are, and how long."""

    def __init__(self, quick: bool, jobs: int) -> None:
        self.directory = Path("runs/study-quick" if quick else "runs/study")  # in ROOT
        self.output = ROOT / self.directory if quick else HERE
        self.seeds, self.thin, self.jobs = range(1 if quick else 3), 3 if quick else 1, jobs
        self.steps, last, every = (20, 40, 20) if quick else (60, 240, 30)
        self.points = range(every, last + 1, every)  # steps of the long run that are evaluated
        self.flags = {"long": f"--steps={last} --save_every={every}"}
        self.flags |= {n: f"--steps={self.steps} {OPTIONS[n]}" for n in OPTIONS if n not in ASKED}

    def path(self, name: str, seed: int) -> str:
        if name.startswith("step "):  # a checkpoint of the long run
            last = name == f"step {self.points[-1]}"
            return self.path("long", seed) + ("" if last else f"/{name.replace(' ', '-')}")
        return f"{self.directory}/{name.replace(' ', '-').replace('=', '')}-{seed}"

    def run(self, script: str, arguments: list[str], output_dir: str, finished: str) -> None:
        """Runs a program unless it has finished before. Raises SystemExit if it fails."""
        if (ROOT / output_dir / finished).exists():
            return
        command = [sys.executable, script, *arguments, f"--output_dir={output_dir}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "60"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")

    def train(self, seed: int, name: str) -> None:
        script = "results/mpd.py" if name.startswith("MPD") else "opsdc.py"
        arguments = ["@toy/args", f"--seed={seed}", "--resume", *self.flags[name].split()]
        self.run(script, arguments, self.path(name, seed), "config.json")

    def evaluate(self, seed: int) -> pd.DataFrame:
        """A row for each candidate and level: seed, name, level, and the columns of the tables."""
        names = [*OPTIONS, *(f"step {step}" for step in self.points)]
        candidates = [ASKED.get(name, (self.path(name, seed), "student")) for name in names]
        models, prompts = zip(*candidates, strict=True)
        arguments = [*models, "--prompt", *prompts, f"--data={self.directory}/test.jsonl"]
        arguments += f"--samples=1 --max_new_tokens=256 --batch_size=300 --seed={seed}".split()
        output_dir = f"{self.directory}/eval-{seed}"
        self.run("eval.py", arguments, output_dir, "summary.json")
        rows = pd.DataFrame(json.loads((ROOT / output_dir / "summary.json").read_text()))
        name_of = dict(zip(candidates, names, strict=True))
        found = rows[["level", "tokens"]].assign(seed=seed)
        found["name"] = [name_of[pair] for pair in zip(rows.model, rows.prompt, strict=True)]
        found[PERCENT] = 100 * rows[["reduction", "final", "cut"]]
        return found

    def in_parallel(self, function: Callable, items: list[tuple], unit: str) -> list:
        with ThreadPoolExecutor(self.jobs) as pool:
            done = pool.map(lambda item: function(*item), items)
            return list(tqdm(done, total=len(items), desc=unit))

    def metrics(self, name: str, seed: int) -> pd.DataFrame:
        return pd.read_json(ROOT / self.path(name, seed) / "metrics.jsonl", lines=True)


# ---- Tables --------------------------------------------------------------------------------------


def markdown(heading: str, table: pd.DataFrame) -> str:
    rows = [["", *table.columns], ["---"] * (1 + len(table.columns))]
    rows += [[name, *cells] for name, cells in zip(table.index, table.values, strict=True)]
    return f"### {heading}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def tables(found: pd.DataFrame, study: Study) -> list[str]:
    """Mean and standard deviation over the seeds."""
    groups, lines = found[found.level == "all"].groupby("name")[COLUMNS], []
    texts = groups.mean().map("{:.1f}".format) + groups.std().map(" ± {:.1f}".format)
    long_run = [(f"step {step}", "", "") for step in study.points]
    for heading, rows in (TABLES | {"A long run, M = 15": long_run}).items():
        names, _, paper = zip(*rows, strict=True)
        lines.append(markdown(heading, texts.loc[list(names)].assign(**{"the paper": paper})))
    levels = found[found.level != "all"].pivot_table(PERCENT[:2], "name", "level")
    levels.columns = [f"level {level}: {column}" for column, level in levels.columns]
    levels = levels.loc[["base", "prompt v1", "prompt v2", MAIN, "trained v2"]]
    return [*lines, markdown("Main result by level", levels.map("{:.1f}".format))]


# ---- Pictures: opaque and light, to read on a page of either colour ------------------------------

INK, RED, BLUE, GREY = "#222222", "#c1272d", "#1f5fa8", "#8a8a8a"
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
plt.rcParams |= {"figure.dpi": 160, "savefig.bbox": "tight", "figure.constrained_layout.use": True}


def tinted(model: str, chat: list, response: str, c: str, style: str) -> tuple[list, list]:
    """The tokens of a response, and the KL at each in nats: its teacher is the model told c."""
    import opsdc

    tokenizer = opsdc.load_tokenizer(model)
    scorer = opsdc.Scorer(opsdc.load_model(model, "float32"))
    pair = opsdc.prompt_pair(chat, c, style)
    completion = tokenizer(response + tokenizer.eos_token).input_ids
    triple = (*opsdc.encode_chats(tokenizer, [*pair], "template"), completion)
    _, (statistics,) = opsdc.distillation_loss(scorer, scorer, [triple], "reverse_kl", 1)
    tokens = [tokenizer.decode([token]) for token in completion[:-1]]
    return tokens, statistics["loss"].tolist()[:-1]


def draw_tokens(columns: list[tuple[list[str], list[float]]], width: int, file: Path) -> None:
    """Texts side by side, in lines of at most width characters: tokens, tinted by their nats."""
    most, boxes = max(max(nats) for _, nats in columns), []  # boxes: left end, line, text, nats
    for column, texts in enumerate(columns):
        left = column * (width + 3)
        x, y = left, 0
        for token, nats in zip(*texts, strict=True):
            for part in token.splitlines(keepends=True):
                text = part.rstrip("\n")
                if x + len(text) > left + width:
                    x, y, text = left, y + 1, text.lstrip()
                boxes.append((x, y, text, nats))
                x, y = (left, y + 1) if part.endswith("\n") else (x + len(text), y)
    height = max(y for _, y, _, _ in boxes) + 1
    figure, axes = plt.subplots(figsize=(8.2, 0.2 * height + 0.75))
    axes.set(xlim=(-0.5, len(columns) * (width + 3) - 3), ylim=(height, -0.7))
    axes.axis("off")
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("", ["white", "#ff5a4a"])
    for x, y, text, nats in boxes:
        axes.add_patch(plt.Rectangle((x, y - 0.42), len(text), 0.84, color=shades(nats / most)))
        for i, letter in enumerate(text):
            axes.text(x + i + 0.5, y, letter, ha="center", va="center", family="monospace")
    scale = matplotlib.cm.ScalarMappable(plt.Normalize(0, most), shades)
    bar = figure.colorbar(scale, ax=axes, orientation="horizontal", shrink=0.5, aspect=40)
    bar.set_label("KL(student || teacher) where the token was sampled, nats", color=INK)
    figure.savefig(file, facecolor="white")


def draw_curves(study: Study, file: Path) -> None:
    """Length, loss and entropy by step; dotted: the refreshes with M = 15."""
    panels = {"completion_tokens": "tokens per rollout", "loss": "loss (KL), nats per token"}
    panels |= {"student_entropy": "student entropy, nats"}
    colors = {MAIN: BLUE, "frozen": GREY, "M = 1": RED}
    figure, all_axes = plt.subplots(1, 3, figsize=(8.2, 2.6))
    for axes, (column, label) in zip(all_axes, panels.items(), strict=True):
        for name, color in colors.items():
            for seed in study.seeds:
                rows = study.metrics(name, seed)
                legend = name.replace(MAIN, "M = 15") if seed == 0 else None
                axes.plot(rows.step, rows[column], color=color, linewidth=1.2, label=legend)
        rows = study.metrics(MAIN, 0)
        for step in rows.step[rows.refreshed]:
            axes.axvline(step, color=BLUE, linewidth=0.7, linestyle=":")
        axes.set(xlabel="step", ylabel=label, yscale="linear" if "entropy" in column else "log")
    all_axes[0].set_yticks([30, 50, 100, 200], labels=["30", "50", "100", "200"])
    all_axes[0].yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    all_axes[0].legend(frameon=False, loc="upper left")
    figure.savefig(file, facecolor="white")


def draw_trade(found: pd.DataFrame, study: Study, file: Path) -> None:
    """Compression and accuracy of the long run by its steps: each seed, and the mean."""
    figure, axes = plt.subplots(figsize=(5.5, 4))
    steps, found = [f"step {n}" for n in study.points], found[found.level == "all"]
    means = found.groupby("name")[PERCENT[:2]].mean()
    for _, one in found.set_index("name").groupby("seed"):
        axes.plot(*one.loc[steps, PERCENT[:2]].values.T, color=BLUE, alpha=0.35, linewidth=1)
    axes.plot(*means.loc[steps].values.T, "o-", color=BLUE, markersize=4)
    for name in steps[1::2]:  # all would overlap
        axes.annotate(name, means.loc[name], (3, 3), textcoords="offset points", size=6)
    axes.axhline(means.loc["base", "accuracy, %"], color=GREY, linewidth=0.8, linestyle="--")
    axes.set(xlabel="fewer tokens than the base model, %")
    axes.set(ylabel="accuracy, % (dashed: the base model)")
    figure.savefig(file, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller study")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    study = Study(**vars(parser.parse_args()))
    runs = [(seed, name) for name in study.flags for seed in study.seeds]
    study.in_parallel(study.train, runs, "training runs")
    problems = (ROOT / "toy/test.jsonl").read_text().splitlines(keepends=True)[:: study.thin]
    (ROOT / study.directory / "test.jsonl").write_text("".join(problems))
    evaluated = study.in_parallel(study.evaluate, [(s,) for s in study.seeds], "evaluations")
    found = pd.concat(evaluated, ignore_index=True)
    found.to_json(study.output / "study.json", orient="records", indent=1)
    # two of the base's answers, of about its mean length
    samples = pd.read_json(ROOT / study.directory / "eval-0/samples-0.jsonl", lines=True)
    base = samples[(samples.model == "toy") & (samples.prompt == "student")]
    columns = []
    for _, row in base.loc[(base.tokens - base.tokens.mean()).abs().nsmallest(2).index].iterrows():
        chat = [{"role": "user", "content": json.loads(problems[row["id"]])["problem"]}]
        columns.append(tinted(str(ROOT / "toy"), chat, row.response, "v1", "paper"))
    draw_tokens(columns, 45, study.output / "rollout.png")
    draw_curves(study, study.output / "curves.png")
    draw_trade(found, study, study.output / "trade.png")
    before, _, rest = (HERE / "toy.md").read_text().partition(BEGIN)
    filled = "\n".join([f"{before}{BEGIN}\n", *tables(found, study), END + rest.partition(END)[2]])
    (study.output / "toy.md").write_text(filled)
    print(f"written: {study.output}/toy.md, study.json, rollout.png, curves.png, trade.png")


BEGIN, END = "<!-- study.py writes from here -->", "<!-- to here -->"

if __name__ == "__main__":
    main()
