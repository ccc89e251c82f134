"""The paper's findings on the toy: runs of opsdc.py and eval.py, their tables and figures.

    pip install matplotlib
    python results/study.py             # writes results/study.md, study.json and the figures
    python results/study.py --quick     # one seed, a third of steps and problems: runs/study-quick

Every number comes from a run of `python opsdc.py @toy/args ...` and one of `python eval.py`, three
seeds each (of data order and sampling, in training and in evaluation). Each run is one process on
one thread; as many run side by side as there are cores. Stopped and started again, the study goes
on where it was. All of it is a TOY: a planted model of one million weights (toy/make_toy.py).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import matplotlib
import matplotlib.ticker
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent
BASE = {"base": "student", "prompt v1": "v1", "prompt v2": "v2"}
BASE |= {f"prompt percent:{p}": f"percent:{p}" for p in (20, 50, 80)}
MAIN = "trained v1"  # @toy/args as they are: v1, reverse KL, M = 15, temperature 1, limit 256
# What is trained: the flags that follow @toy/args.
TRAINED = {
    MAIN: [],
    "trained v2": ["--instruction=v2"],
    **{f"M = {m}": [f"--refresh_every={m}"] for m in (1, 5, 20, 50)},
    "frozen": ["--refresh_every=0"],
    "jsd": ["--divergence=jsd"],
    "forward_kl": ["--divergence=forward_kl"],
    # The base model's mean response has 67 tokens: a quarter, half and all of it.
    **{f"at most {n} tokens": [f"--max_new_tokens={n}"] for n in (17, 34, 67)},
    **{f"temperature {t}": [f"--temperature={t}"] for t in (0.3, 0.6, 1.5)},
    **{f"percent:{p}": [f"--instruction=percent:{p}"] for p in (20, 50, 80)},
}
LONG = "long"


class Study:
    """Where the runs are, and how long."""

    def __init__(self, quick: bool, jobs: int) -> None:
        self.directory = Path("runs/study-quick" if quick else "runs/study")  # in ROOT
        self.seeds = range(1 if quick else 3)
        self.steps, self.long_steps, self.long_every = (20, 40, 20) if quick else (60, 240, 30)
        self.jobs, self.thin = jobs, 3 if quick else 1  # every third problem, or all
        self.long = [f"{LONG}-{seed}" for seed in self.seeds]

    def path(self, name: str, seed: int) -> Path:
        slug = name.replace(" ", "-").replace(":", "-").replace("=", "")
        return self.directory / f"{slug}-{seed}"

    def long_path(self, seed: int, step: int) -> Path:
        last = step == self.long_steps
        return self.path(LONG, seed) / ("" if last else f"step-{step}")

    def long_points(self) -> range:
        return range(self.long_every, self.long_steps + 1, self.long_every)

    def run(self, script: str, arguments: list[str], output_dir: Path, finished: str) -> None:
        """One process; none if it has been. Raises CalledProcessError with its output's end."""
        directory = ROOT / output_dir
        if (directory / finished).exists():
            return
        command = [sys.executable, script, *arguments, f"--output_dir={output_dir}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "60"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")

    def train(self) -> None:
        work = []
        for seed in self.seeds:
            long = [f"--steps={self.long_steps}", f"--save_every={self.long_every}"]
            work.append((LONG, seed, long))
        for seed in self.seeds:
            work += [(n, seed, [f"--steps={self.steps}", *f]) for n, f in TRAINED.items()]

        def one(item: tuple[str, int, list[str]]) -> None:
            name, seed, flags = item
            arguments = ["@toy/args", f"--seed={seed}", "--resume", *flags]
            self.run("opsdc.py", arguments, self.path(name, seed), "run.json")

        self.in_parallel(one, work, "training runs")

    def evaluate(self) -> dict[int, dict[str, dict]]:
        """For each seed the summary of each candidate."""
        found = {}
        data = self.directory / "test.jsonl"
        problems = (ROOT / "toy" / "test.jsonl").read_text().splitlines(True)
        (ROOT / data).write_text("".join(problems[:: self.thin]))

        def one(seed: int) -> None:
            trained = {name: str(self.path(name, seed)) for name in TRAINED}
            trained |= {
                f"{LONG} {step}": str(self.long_path(seed, step)) for step in self.long_points()
            }
            models = ["toy"] * len(BASE) + list(trained.values())
            prompts = [*BASE.values(), *["student"] * len(trained)]
            arguments = [*models, "--prompt", *prompts, f"--data={data}", "--samples=1"]
            arguments += ["--max_new_tokens=256", "--batch_size=300", f"--seed={seed}"]
            output_dir = self.directory / f"eval-{seed}"
            self.run("eval.py", arguments, output_dir, "summary.json")
            rows = json.loads((ROOT / output_dir / "summary.json").read_text())
            found[seed] = dict(zip([*BASE, *trained], rows, strict=True))

        self.in_parallel(one, list(self.seeds), "evaluations")
        return found

    def in_parallel(self, function, items: list, unit: str) -> None:
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = [pool.submit(function, item) for item in items]
            for done in tqdm(as_completed(waiting), total=len(items), desc=unit):
                done.result()

    def metrics(self, name: str, seed: int) -> list[dict]:
        file = ROOT / self.path(name, seed) / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]


# ---- Tables --------------------------------------------------------------------------------------

Found = dict[int, dict[str, dict]]  # seed -> candidate -> row of eval.py's summary.json
COLUMNS = {  # heading: how to read it from that row, and decimals
    "tokens": (lambda row: row["tokens"], 1),
    "reduced, %": (lambda row: 100 * row["reduction"], 1),
    "accuracy, %": (lambda row: 100 * row["accuracy"]["final"], 1),
    "cut, %": (lambda row: 100 * row["truncated"], 1),
}


def mean(found: Found, name: str, column: str) -> float:
    return statistics.fmean(COLUMNS[column][0](rows[name]) for rows in found.values())


def spread(values: list[float], decimals: int = 1) -> str:
    """Mean and standard deviation over the seeds."""
    text = f"{statistics.fmean(values):.{decimals}f}"
    return text + (f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else "")


def table(found: Found, rows: dict[str, str], paper: dict[str, str]) -> list[str]:
    """`rows` gives each candidate its label; `paper` is the last column, by label."""
    lines = [f"| | {' | '.join(COLUMNS)} | the paper |", "| --- |" + " --- |" * (len(COLUMNS) + 1)]
    for name, label in rows.items():
        cells = [
            spread([read(one[name]) for one in found.values()], decimals)
            for read, decimals in COLUMNS.values()
        ]
        lines.append(f"| {label} | {' | '.join(cells)} | {paper.get(label, '')} |")
    return lines


def levels(found: Found, names: list[str]) -> list[str]:
    """Reduction and accuracy by level."""
    keys = list(next(iter(found.values()))[names[0]]["levels"])
    lines = [f"| reduced, %; accuracy, % | {' | '.join(f'level {key}' for key in keys)} |"]
    lines.append("| --- |" + " --- |" * len(keys))
    for name in names:
        cells = []
        for key in keys:
            parts = [one[name]["levels"][key] for one in found.values()]
            reduced = statistics.fmean(100 * part["reduction"] for part in parts)
            cells.append(f"{reduced:.1f}; {100 * statistics.fmean(p['final'] for p in parts):.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def says(holds: bool | None, claim: str, here: str) -> str:
    """The paper's claim, the verdict that follows from the numbers here, and these."""
    verdict = {True: "Same", False: "Different", None: "Not shown at this size"}[holds]
    return f"- The paper: {claim}. **{verdict}** here: {here}."


def report(found: Found, study: Study) -> list[str]:
    """The sections of study.md, in the order of the paper; every verdict is computed here."""

    def reduced(name: str) -> float:
        return mean(found, name, "reduced, %")

    def accuracy(name: str) -> float:
        return mean(found, name, "accuracy, %")

    def both(name: str) -> str:
        return f"{reduced(name):.1f}% at {accuracy(name):.1f}"

    def collapsed(name: str) -> bool:
        return accuracy(name) < accuracy("base") - 5

    def level(name: str, key: str, what: str) -> float:
        return 100 * statistics.fmean(rows[name]["levels"][key][what] for rows in found.values())

    lines = ["## Main result", ""]
    main_rows = {name: name for name in [*list(BASE)[:3], MAIN, "trained v2"]}
    lines += table(
        found,
        main_rows,
        {
            "base": "95.7, 4,884 tokens",
            "prompt v1": "95.6, 2,983 (-38.9%)",
            "prompt v2": "94.2, 3,833 (-21.5%)",
            MAIN: "95.7, 2,107 (-56.9%)",
            "trained v2": "95.7, 3,339 (-31.6%)",
        },
    )
    lines += ["", *levels(found, list(main_rows)), ""]
    v1, v2 = (level(name, "6", "final") for name in (MAIN, "trained v2"))
    easy, hard = (level(MAIN, key, "reduction") for key in "26")
    lines += [
        says(
            reduced(MAIN) > reduced("prompt v1") and accuracy(MAIN) > accuracy("base") - 1,
            "training takes more tokens away than the instruction itself, at no loss of accuracy",
            f"{both(MAIN)} after {both('prompt v1')}, base {accuracy('base'):.1f}",
        ),
        says(
            reduced(MAIN) > reduced("trained v2"),
            "v1 compresses more than v2",
            f"{both(MAIN)} against {both('trained v2')}",
        ),
        says(v2 > v1, "v2 keeps more accuracy on hard problems", f"level 6 {v2:.1f}, v1 {v1:.1f}"),
        says(
            easy > hard,
            "easy problems are compressed more than hard ones (MATH-500 56.9%, AIME 2024 32.9%)",
            f"level 2 {easy:.1f}%, level 6 {hard:.1f}%; the toy was planted so",
        ),
    ]

    lines += ["", "## Teacher refresh, M", ""]
    refresh = {"M = 1": "1", "M = 5": "5", MAIN: "15", "M = 20": "20", "M = 50": "50"}
    refresh |= {"frozen": "frozen"}
    paper = {
        "1": "collapses: 60.8, longer",
        "50": "stable, as 30",
        "frozen": "least: -18%, accurate",
    }
    lines += table(found, refresh, paper | {"5": "(10: most, -64%, AIME 2024 falls to 49.6)"})
    stable = [name for name in refresh if accuracy(name) > accuracy("frozen") - 5]
    lines += [
        "",
        says(collapsed("M = 1"), "M = 1 collapses", both("M = 1")),
        says(
            reduced("M = 5") > reduced(MAIN) and accuracy("M = 5") < accuracy(MAIN),
            "a small M compresses more and loses accuracy",
            f"M = 5 {both('M = 5')}, M = 15 {both(MAIN)}",
        ),
        says(
            reduced("frozen") == min(map(reduced, stable)) and not collapsed("frozen"),
            "a frozen teacher keeps accuracy and compresses least",
            f"{both('frozen')}, of those as accurate the least; the instruction alone "
            f"{both('prompt v1')}",
        ),
    ]

    lines += ["", "## Divergence", ""]
    kinds = {MAIN: "reverse KL", "jsd": "JSD", "forward_kl": "forward KL"}
    paper = {"reverse KL": "95.7, 3,339 tokens", "JSD": "94.8, 3,281"}
    lines += table(found, kinds, paper | {"forward KL": "collapses: 5.7, runs to the limit"})
    lines += [
        "",
        says(
            abs(reduced("jsd") - reduced(MAIN)) < 5,
            "JSD compresses as reverse KL does",
            f"{both('jsd')} against {both(MAIN)}",
        ),
        says(collapsed("forward_kl"), "forward KL collapses within 100 steps", both("forward_kl")),
    ]

    lines += ["", "## Length of the rollouts", ""]
    cut = {f"at most {n} tokens": f"{n}" for n in (17, 34, 67)} | {MAIN: "256"}
    paper = {"17": "(1K: -29.8%)", "67": "(8K: best)", "256": "(30K: no better)"}
    lines += table(found, cut, paper)
    quarter, whole = reduced("at most 17 tokens"), reduced(MAIN)
    lines += [
        "",
        says(
            0.2 * whole < quarter < whole - 2,
            "short rollouts already compress, but less",
            f"{quarter:.1f}% with a quarter of the base model's mean length, else {whole:.1f}%",
        ),
    ]

    lines += ["", "## Temperature of the rollouts", ""]
    heat = {f"temperature {t}": f"{t}" for t in (0.3, 0.6)} | {MAIN: "1.0"}
    heat |= {"temperature 1.5": "1.5"}
    lines += table(found, heat, dict.fromkeys(heat.values(), "nearly flat"))
    extremes = [reduced(name) for name in heat]
    lines += [
        "",
        says(
            max(extremes) - min(extremes) < 5,
            "nearly flat",
            f"from {min(extremes):.1f}% to {max(extremes):.1f}%",
        ),
    ]

    lines += ["", "## Explicit targets", ""]
    asked = {f"prompt percent:{p}": f"prompt, {p}% fewer" for p in (20, 50, 80)}
    asked |= {f"percent:{p}": f"trained, {p}% fewer" for p in (20, 50, 80)}
    paper = dict.fromkeys(asked.values(), "compress more, lose accuracy")
    lines += table(found, asked, {k: v for k, v in paper.items() if k.startswith("trained")})
    lines += [
        "",
        says(
            None,
            "explicit targets compress more and lose accuracy",
            "the toy was taught v1 and v2 and has never seen this instruction, so the table shows "
            "what an unknown text does to it, and nothing about targets",
        ),
    ]

    lines += ["", "## Entropy and length along the run", "", "![curves](curves.png)", ""]
    ends = [
        statistics.fmean(row["student_entropy"] for seed in study.seeds for row in part(seed))
        for part in (
            lambda seed: study.metrics(MAIN, seed)[:5],
            lambda seed: study.metrics(MAIN, seed)[-5:],
        )
    ]
    lines.append(
        says(
            abs(ends[1] / ends[0] - 1) < 0.2,
            "the student's entropy stays stable",
            f"{ends[0]:.3f} nats per token in the first five steps, {ends[1]:.3f} in the last five",
        )
    )

    lines += ["", "## How far one can go", "", "![accuracy and compression](trade.png)", ""]
    steps = {f"{LONG} {step}": f"step {step}" for step in study.long_points()}
    lines += table(found, steps, {})
    best = max(steps, key=accuracy)
    shortest = max(steps, key=reduced)
    beyond = [name for name in steps if reduced(name) > reduced(best)]
    falls = [name for name in beyond if accuracy(name) < accuracy(best) - 2]
    lines += [
        "",
        says(
            bool(falls),
            "about 2x is the sweet spot; compressed further, accuracy falls",
            f"most accurate at {both(best)} ({steps[best]}), compressed most at "
            f"{both(shortest)} ({steps[shortest]})",
        ),
    ]
    return lines


# ---- Figures: opaque and light, to read on a page of either colour -------------------------------

INK, RED, BLUE, GREY = "#222222", "#c1272d", "#1f5fa8", "#8a8a8a"
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
plt.rcParams |= {"figure.dpi": 160, "savefig.bbox": "tight", "figure.constrained_layout.use": True}


def draw_rollout(study: Study, file: Path) -> None:
    """The two shortest rollouts that a run's first step kept, tinted by divergence."""
    lines = (ROOT / study.path(MAIN, 0) / "rollouts-1.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][:2]
    most = max(max(row["divergence"]) for row in rows)
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("", ["white", "#ff5a4a"])
    boxes = []  # left end, line, text, nats
    for column, row in enumerate(rows):
        x, y = 48 * column, 0
        for token, nats in zip(row["tokens"], row["divergence"], strict=True):
            for part in token.splitlines(keepends=True):  # of the toy, none needs to be wrapped
                if text := part.rstrip("\n"):
                    boxes.append((x, y, text, nats))
                x, y = (48 * column, y + 1) if part.endswith("\n") else (x + len(text), y)
    height = max(y for _, y, _, _ in boxes) + 1
    figure, axes = plt.subplots(figsize=(8.2, 0.2 * height + 0.75))
    axes.set(xlim=(-0.5, 90), ylim=(height, -0.7))
    axes.axis("off")
    for x, y, text, nats in boxes:
        axes.add_patch(plt.Rectangle((x, y - 0.42), len(text), 0.84, color=shades(nats / most)))
        for i, character in enumerate(text):
            place = {"ha": "center", "va": "center", "family": "monospace", "size": 9.5}
            axes.text(x + i + 0.5, y, character, color=INK, **place)
    scale = matplotlib.cm.ScalarMappable(plt.Normalize(0, most), shades)
    bar = figure.colorbar(scale, ax=axes, orientation="horizontal", shrink=0.5, aspect=40)
    bar.set_label("KL(student || teacher) where the token was sampled, nats", color=INK)
    figure.savefig(file, facecolor="white")
    plt.close(figure)


def draw_curves(study: Study, file: Path) -> None:
    """Length, loss and entropy by step; dotted, the refreshes with M = 15."""
    panels = {
        "completion_tokens": "tokens per rollout",
        "loss": "loss (KL), nats per token",
        "student_entropy": "student entropy, nats",
    }
    shown = {MAIN: (BLUE, "M = 15"), "frozen": (GREY, "frozen teacher"), "M = 1": (RED, "M = 1")}
    figure, all_axes = plt.subplots(1, 3, figsize=(8.2, 2.6))
    for axes, (key, label) in zip(all_axes, panels.items(), strict=True):
        for name, (color, legend) in shown.items():
            for seed in study.seeds:
                rows = study.metrics(name, seed)
                axes.plot(
                    [row["step"] for row in rows],
                    [row[key] for row in rows],
                    color=color,
                    linewidth=1.2,
                    alpha=0.8,
                    label=legend if seed == 0 else None,
                )
        for row in study.metrics(MAIN, 0):
            if row["refreshed"]:
                axes.axvline(row["step"], color=BLUE, linewidth=0.7, linestyle=":")
        axes.set(xlabel="step", ylabel=label)
    for axes in all_axes[:2]:
        axes.set_yscale("log")
    all_axes[0].set_yticks([30, 50, 100, 200], labels=["30", "50", "100", "200"], minor=False)
    all_axes[0].yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    all_axes[0].legend(frameon=False, loc="upper left")
    figure.savefig(file, facecolor="white")
    plt.close(figure)


def draw_trade(found: Found, study: Study, file: Path) -> None:
    """Compression and accuracy of all that was trained, and of one long run by its steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 4.6), width_ratios=[1.25, 1])
    names = [*list(BASE)[1:3], *TRAINED]
    for place, name in enumerate(names):
        color = GREY if name in BASE else RED if name == MAIN else BLUE
        x = mean(found, name, "reduced, %")
        left.barh(place, x, color=color, height=0.7)
        text = f"{mean(found, name, 'accuracy, %'):.0f}"
        left.annotate(text, (max(x, 0), place), (3, 0), textcoords="offset points", va="center")
    left.set_yticks(range(len(names)), labels=names)
    left.invert_yaxis()
    left.set_xlabel("fewer tokens than the base model, %; beside it accuracy, %")
    left.set_title(f"{study.steps} steps, mean of the seeds", size=9)
    points = list(study.long_points())
    for rows in found.values():
        xy = [
            (100 * r["reduction"], 100 * r["accuracy"]["final"])
            for r in (rows[f"{LONG} {step}"] for step in points)
        ]
        right.plot(*zip(*xy, strict=True), color=BLUE, alpha=0.35, linewidth=1)
    xs = [mean(found, f"{LONG} {step}", "reduced, %") for step in points]
    ys = [mean(found, f"{LONG} {step}", "accuracy, %") for step in points]
    right.plot(xs, ys, "o-", color=BLUE, markersize=4)
    for step, x, y in list(zip(points, xs, ys, strict=True))[1::2]:  # all would overlap
        right.annotate(
            f"step {step}", (x, y), (3, 3), textcoords="offset points", size=6, color=INK
        )
    right.axhline(mean(found, "base", "accuracy, %"), color=GREY, linewidth=0.8, linestyle="--")
    right.set_xlabel("fewer tokens than the base model, %")
    right.set_ylabel("accuracy, % (dashed: the base model)")
    right.set_title("a long run with M = 15: each seed, and the mean", size=9)
    figure.savefig(file, facecolor="white")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="one seed, a third of steps and problems"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    arguments = parser.parse_args()
    study = Study(arguments.quick, arguments.jobs)
    study.train()
    found = study.evaluate()
    directory = ROOT / study.directory if arguments.quick else HERE
    (directory / "study.json").write_text(json.dumps(found, indent=1) + "\n")
    draw_rollout(study, directory / "rollout.png")
    draw_curves(study, directory / "curves.png")
    draw_trade(found, study, directory / "trade.png")
    head = [
        "# The study: the paper's findings on the toy",
        "",
        "**These are toy results**: a planted model of one million weights that adds digits. They "
        "show what the method's mechanics do and are no evidence about Qwen3.",
        "",
        f"Written by `python results/study.py{' --quick' * arguments.quick}`: {len(study.seeds)} "
        f"seed(s), {study.steps} steps, otherwise `@toy/args` (v1, reverse KL, M = 15, temperature "
        f"1.0); {300 // study.thin} held-out problems, one sample each and seed. Mean ± standard "
        "deviation over the seeds; accuracy by the grader `final`; `cut`: responses that reached "
        "the limit of 256 tokens. The paper's figures are Qwen3-8B's on MATH-500: accuracy by its "
        "dual grader, mean tokens; its ablations use v2. `38.9% at 76.0` is short for tokens "
        "reduced by 38.9%, accuracy 76.0%. "
        "Same and Different are computed from the table above them.",
        "",
    ]
    (directory / "study.md").write_text("\n".join(head + report(found, study)) + "\n")
    print(f"written: {directory}/study.md, study.json, rollout.png, curves.png, trade.png")


if __name__ == "__main__":
    main()
