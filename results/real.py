"""A real model on sums: the data, and what README.md shows of a run and its evaluation.

python results/real.py data       # runs/real/train.jsonl and test.jsonl
pip install matplotlib            # then train and evaluate: the commands are in README.md
python results/real.py show       # real.png, real_curves.png, real/pairs.md, real/*.json*
"""

import json
import random
import shutil
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]
RUNS = Path("runs/real")  # train.jsonl, test.jsonl; trained/ by opsdc.py; eval/ by eval.py


def write_data() -> None:
    """Sums of two, three and four numbers of two digits, in turn; no test problem is trained on."""
    numbers, seen, rows = random.Random(0), set(), []
    while len(rows) < 1200:
        terms = [numbers.randint(10, 99) for _ in range(2 + len(rows) % 3)]
        if (key := tuple(sorted(terms))) in seen:
            continue
        seen.add(key)
        problem = f"What is {' + '.join(map(str, terms))}?"
        rows.append({"problem": problem, "answer": str(sum(terms)), "level": len(terms)})
    RUNS.mkdir(parents=True, exist_ok=True)
    for name, part in {"train": rows[:1000], "test": rows[1000:]}.items():
        lines = [json.dumps(row) + "\n" for row in part]
        (RUNS / f"{name}.jsonl").write_text("".join(lines))


def read_samples() -> tuple[pd.DataFrame, list[str]]:
    """Rows by problem, columns by candidate; the candidates, in the order of the table."""
    settings = json.loads((RUNS / "eval/settings.json").read_text())
    rows = [pd.read_json(file, lines=True) for file in sorted((RUNS / "eval").glob("samples-*"))]
    rows = pd.concat(rows)
    rows["name"] = rows.model + " " + rows.prompt
    table = rows.pivot(index="id", columns="name", values=["response", "final", "tokens"])
    return table, [" ".join(pair) for pair in settings["candidates"]]


def main() -> None:
    if sys.argv[1:] == ["data"]:
        write_data()
        return
    from study import BLUE, draw_tokens, plt

    import opsdc

    table, (base, *_, trained) = read_samples()
    problems = [json.loads(line) for line in (RUNS / "test.jsonl").read_text().splitlines()]
    pick = {name: table.xs(name, axis=1, level=1) for name in (base, trained)}
    before, after = pick[base], pick[trained]

    # The first test problem that both get right: the base's tokens tinted by the KL at each
    first = before.index[before.final.astype(bool) & after.final.astype(bool)][0]
    config = json.loads((RUNS / "trained/run.json").read_text())["config"]
    tokenizer = opsdc.load_tokenizer(config["model"])
    scorer = opsdc.Scorer(opsdc.load_model(config["model"], "float32"))
    pair = opsdc.prompt_pair(
        opsdc.read_chat(problems[first]), config["instruction"], config["prompt"]
    )
    encode = tokenizer(before.response[first] + tokenizer.eos_token).input_ids
    triple = (*opsdc.encode_chats(tokenizer, [*pair]), encode)
    _, (statistics,) = opsdc.distillation_loss(scorer, scorer, [triple], config["divergence"], 1)
    tokens = [tokenizer.decode([token]) for token in encode[:-1]]
    columns = [(tokens, statistics["loss"].tolist()[:-1])]
    answer = [tokenizer.decode([token]) for token in tokenizer(after.response[first]).input_ids]
    draw_tokens([*columns, (answer, [0.0] * len(answer))], 46, HERE / "real.png")

    metrics = pd.read_json(RUNS / "trained/metrics.jsonl", lines=True)
    figure, all_axes = plt.subplots(1, 3, figsize=(8.2, 2.4))
    labels = {"completion_tokens": "tokens per rollout", "loss": "loss (KL), nats per token"}
    labels |= {"student_entropy": "student entropy, nats"}
    for axes, (column, label) in zip(all_axes, labels.items(), strict=True):
        axes.plot(metrics.step, metrics[column], color=BLUE, linewidth=1.2)
        for step in metrics.step[metrics.refreshed]:
            axes.axvline(step, color=BLUE, linewidth=0.7, linestyle=":")
        axes.set(xlabel="step", ylabel=label)
    figure.savefig(HERE / "real_curves.png", facecolor="white")

    # Five pairs: every 25th test problem; then all that the base had right and the trained lost
    lost = before.index[before.final.astype(bool) & ~after.final.astype(bool)]
    text = ["# Whole responses of the base and of the trained model", ""]
    for title, ids in {"Every 25th test problem": before.index[::25][:5], "Lost": lost}.items():
        text += [f"## {title}", ""]
        for i in ids:
            text += [f"**{problems[i]['problem']}** ({problems[i]['answer']})", ""]
            for name, side in {"base": before, "trained": after}.items():
                verdict = "right" if side.final[i] else "wrong"
                text += [f"{name}, {side.tokens[i]} tokens, {verdict}:", ""]
                text += ["````", side.response[i].strip(), "````", ""]
    (HERE / "real").mkdir(exist_ok=True)
    (HERE / "real/pairs.md").write_text("\n".join(text))
    shutil.copy(RUNS / "trained/metrics.jsonl", HERE / "real/sums.jsonl")
    shutil.copy(RUNS / "eval/summary.json", HERE / "real/sums.json")


if __name__ == "__main__":
    main()
