"""A real model: the data of the sums, and what is shown of a run and its evaluation.

python results/real.py data          # train.jsonl, test.jsonl and validation.jsonl in runs/sums
pip install matplotlib               # then train and evaluate: the commands are in README.md
python results/real.py show runs/sums runs/sums/trained/step-12 # writes real/sums.png and so on:
                                     # the base beside the model named last; the run's curves, log
"""

import json
import random
import shutil
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]


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


def read_samples(directory: Path, models: list[str]) -> tuple[dict, list[pd.DataFrame]]:
    """The problems by id, and each model's responses to them, asked as a student."""
    from eval import load_problems

    settings = json.loads((directory / "settings.json").read_text())
    problems = {p["id"]: p for p in load_problems(settings["data"][0], settings["limit"])}
    rows = pd.concat(pd.read_json(file, lines=True) for file in directory.glob("samples-*"))
    rows = rows.astype({"id": str})[rows.prompt == "student"].set_index("id")
    return problems, [rows[rows.model == model].loc[[*problems]] for model in models]


def show(directory: Path, trained: str) -> None:
    """Reads directory/trained, by opsdc.py, and directory/eval, by eval.py; writes files of the
    directory's name into results/real. `trained`: a model of the evaluation."""
    from study import BLUE, draw_tokens, plt

    import opsdc

    out = HERE / "real"
    config = json.loads((directory / "trained/run.json").read_text())["config"]
    problems, (before, after) = read_samples(directory / "eval", [config["model"], trained])

    # The first test problem that both get right: the base's tokens tinted by the KL at each
    first = before.index[before.final & after.final][0]
    tokenizer = opsdc.load_tokenizer(config["model"])
    scorer = opsdc.Scorer(opsdc.load_model(config["model"], "float32"))
    pair = opsdc.prompt_pair(problems[first]["chat"], config["instruction"], config["prompt"])
    encode = tokenizer(before.response[first] + tokenizer.eos_token).input_ids
    triple = (*opsdc.encode_chats(tokenizer, [*pair]), encode)
    _, (statistics,) = opsdc.distillation_loss(scorer, scorer, [triple], config["divergence"], 1)
    tokens = [tokenizer.decode([token]) for token in encode[:-1]]
    columns = [(tokens, statistics["loss"].tolist()[:-1])]
    answer = [tokenizer.decode([token]) for token in tokenizer(after.response[first]).input_ids]
    draw_tokens([*columns, (answer, [0.0] * len(answer))], 46, out / f"{directory.name}.png")

    metrics = pd.read_json(directory / "trained/metrics.jsonl", lines=True)
    figure, all_axes = plt.subplots(1, 3, figsize=(8.2, 2.4))
    labels = {"completion_tokens": "tokens per rollout", "loss": "loss (KL), nats per token"}
    labels |= {"student_entropy": "student entropy, nats"}
    for axes, (column, label) in zip(all_axes, labels.items(), strict=True):
        axes.plot(metrics.step, metrics[column], color=BLUE, linewidth=1.2)
        for step in metrics.step[metrics.refreshed]:
            axes.axvline(step, color=BLUE, linewidth=0.7, linestyle=":")
        axes.set(xlabel="step", ylabel=label)
    figure.savefig(out / f"{directory.name}_curves.png", facecolor="white")

    # Five pairs: every 25th test problem; then all that the base had right and the trained lost
    lost = before.index[before.final & ~after.final]
    text = ["# Whole responses of the base and of the trained model", ""]
    for title, ids in {"Every 25th test problem": before.index[::25][:5], "Lost": lost}.items():
        text += [f"## {title}", ""]
        for i in ids:
            problem = problems[i]
            text += [f"**{problem['chat'][-1]['content']}** ({problem['answer']})", ""]
            for name, side in {"base": before, "trained": after}.items():
                verdict = "right" if side.final[i] else "wrong"
                text += [f"{name}, {side.tokens[i]} tokens, {verdict}:", ""]
                text += ["````", side.response[i].strip(), "````", ""]
    (out / f"{directory.name}.md").write_text("\n".join(text))
    shutil.copy(directory / "trained/metrics.jsonl", out / f"{directory.name}.jsonl")
    shutil.copy(directory / "eval/summary.json", out / f"{directory.name}.json")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["data"]:
            write_data(Path("runs/sums"))
        case ["show", directory, trained]:
            show(Path(directory), trained)
        case _:
            sys.exit(__doc__)
