"""A real model on sums: its data, and what is kept and shown of runs and evaluations.

    python results/real.py data    # train.jsonl, test.jsonl and validation.jsonl in runs/sums
    pip install matplotlib         # then train and evaluate: the commands are in real.md
    python results/real.py keep runs/sums/m20 runs/sums/eval-m20   # real/m20.jsonl, .json and .png
    python results/real.py refresh    # real/refresh.png, and the tables of real.md

`keep` takes the log of a run and the summary of its evaluation, whose last model is the trained
one, and draws one rollout of the base, tinted by the KL, beside the trained model's answer.
`refresh` reads the files in results/real alone.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]
REAL = HERE / "real"
BASE, PROMPTED = "base", "told to be brief"
RUNS = {  # legend: files in results/real
    "frozen": ["frozen.json"],
    "M = 20": ["m20.json"],
    "M = 5": ["sums.json", "sums_validation.json"],
}


def write_data(directory: Path) -> None:
    """Sums of two, three and four numbers of two digits, in turn; each sum is in one file only."""
    numbers, seen, rows = random.Random(0), set(), []
    while len(rows) < 1200:
        terms = [numbers.randint(10, 99) for _ in range(2 + len(rows) % 3)]
        if (key := tuple(sorted(terms))) in seen:
            continue
        seen.add(key)
        problem = f"What is {' + '.join(map(str, terms))}?"
        rows.append({"problem": problem, "answer": str(sum(terms)), "level": len(terms)})
    directory.mkdir(parents=True, exist_ok=True)
    parts = {"train": rows[:1000], "test": rows[1000:1128], "validation": rows[1128:]}
    for name, part in parts.items():
        lines = [json.dumps(row) + "\n" for row in part]
        (directory / f"{name}.jsonl").write_text("".join(lines))


def keep(run: Path, evaluation: Path) -> None:
    """Copies log and summary into results/real under the run's name. Draws a test problem that base
    and trained model both get right, the one where both lengths are nearest to their means."""
    from study import draw_tokens, tinted

    import opsdc
    from eval import load_problems

    shutil.copy(run / "metrics.jsonl", REAL / f"{run.name}.jsonl")
    shutil.copy(evaluation / "summary.json", REAL / f"{run.name}.json")
    config = json.loads((run / "run.json").read_text())["config"]
    settings = json.loads((evaluation / "settings.json").read_text())
    problems = {p["id"]: p for p in load_problems(settings["data"][0], settings["limit"])}
    rows = pd.concat(pd.read_json(file, lines=True) for file in evaluation.glob("samples-*"))
    rows = rows.astype({"id": str})[(rows.prompt == "student") & (rows.benchmark == "test")]
    rows = rows[rows["sample"] == 0].set_index("id")
    base, *_, trained = [name for name, _ in settings["candidates"]]
    before, after = (rows[rows.model == name].loc[[*problems]] for name in (base, trained))
    far = sum((side.tokens - side.tokens.mean()).abs() for side in (before, after))
    shown = far[before.final & after.final].idxmin()
    chat, tokenizer = problems[shown]["chat"], opsdc.load_tokenizer(base)
    answer = [tokenizer.decode([token]) for token in tokenizer(after.response[shown]).input_ids]
    options = config["instruction"], config["prompt"]
    columns = [tinted(base, chat, before.response[shown], *options), (answer, [0.0] * len(answer))]
    draw_tokens(columns, 46, REAL / f"{run.name}.png")


def read_summaries(files: list[str]) -> pd.DataFrame:
    """Tokens and right answers, summed, by model (base, prompted, "10", "20", ... steps) and
    numbers in the sum, over the 128 test and 72 validation sums."""
    rows = pd.concat(pd.read_json(REAL / file) for file in files)
    rows = rows[rows["level"] != "all"].astype({"level": int})
    last_step = {"m20.json": 40, "frozen.json": 40}.get(files[0], 20)
    step = rows.model.str.extract(r"step-(\d+)$")[0]
    trained = rows.model.str.contains("/trained|/frozen|/m20")
    step = step.where(step.notna(), pd.Series(str(last_step), rows.index)).where(trained, BASE)
    rows["name"] = step.where(rows.prompt == "student", PROMPTED)
    rows["right"] = rows.final * rows.problems
    rows["tokens"] = rows.tokens * rows.problems
    sums = rows.groupby(["name", "level"])[["tokens", "right", "problems"]].sum().reset_index()
    whole = sums.groupby("name").problems.transform("sum") == 200  # evaluated on all of them
    return sums[whole]


def means(rows: pd.DataFrame) -> tuple[float, float, tuple[float, float]]:
    """Mean tokens, % right, and the 95% interval of eval.py around it."""
    from eval import interval

    count, right = int(rows.problems.sum()), round(rows.right.sum())
    low, high = interval(pd.Series([1.0] * right + [0.0] * (count - right)))
    return rows.tokens.sum() / count, 100 * right / count, (100 * low, 100 * high)


def refresh() -> None:
    """Draws refresh.png and prints two tables."""
    from study import BLUE, GREY, RED, plt

    runs = {name: read_summaries(files) for name, files in RUNS.items()}
    figure, axes = plt.subplots(figsize=(7.4, 4.2))
    places = {("frozen", "10"): (-14, -14), ("frozen", "30"): (5, 6), ("M = 20", "30"): (-14, -10)}
    for (name, rows), color in zip(runs.items(), (GREY, BLUE, RED), strict=True):
        steps = sorted((n for n in rows.name.unique() if n.isdigit()), key=int)
        points = [means(rows[rows.name == step]) for step in steps]
        tokens, right = [p[0] for p in points], [p[1] for p in points]
        axes.plot(tokens, right, color=color, marker="o", markersize=4, label=name)
        for x, y, step in zip(tokens, right, steps, strict=True):
            place = places.get((name, step), (4, 5) if name == "M = 20" else (4, -13))
            axes.annotate(step, (x, y), place, textcoords="offset points", color=color)
        low, high = points[-1][2]
        axes.plot([tokens[-1]] * 2, [low, high], color=color, linewidth=0.8)
    marks = {BASE: ("*", "base"), PROMPTED: ("P", "base, told to be brief")}
    for name, (marker, label) in marks.items():
        x, y, (low, high) = means(runs["frozen"][runs["frozen"].name == name])
        axes.plot([x], [y], color="black", marker=marker, markersize=9, linestyle="", label=label)
        axes.plot([x] * 2, [low, high], color="black", linewidth=0.8)
    axes.set(xlabel="tokens per answer (fewer: left)", ylabel="right, %")
    axes.set_title("200 sums; numbers: steps of training; bars: 95%", fontsize=10)
    axes.legend()
    figure.savefig(REAL / "refresh.png", facecolor="white", dpi=150)

    shown = {BASE: ("frozen", BASE), PROMPTED: ("frozen", PROMPTED)}
    for name, rows in runs.items():
        steps = sorted((n for n in rows.name.unique() if n.isdigit()), key=int)
        shown |= {f"{name}, {step} steps": (name, step) for step in steps}
    print("| | tokens | right, % | 2 numbers | 3 numbers | 4 numbers |\n|" + " --- |" * 6)
    for label, (run, name) in shown.items():
        rows = runs[run][runs[run].name == name]
        x, y, (low, high) = means(rows)
        cells = [f"{x:.1f}", f"{y:.1f} ({low:.1f}-{high:.1f})"]
        for level in (2, 3, 4):
            part = rows[rows.level == level]
            count, right = int(part.problems.sum()), round(part.right.sum())
            cells.append(f"{part.tokens.sum() / count:.0f} tokens, {right} of {count}")
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["data"]:
            write_data(Path("runs/sums"))
        case ["keep", run, evaluation]:
            keep(Path(run), Path(evaluation))
        case ["refresh"]:
            refresh()
        case _:
            sys.exit(__doc__)
