"""The real model's pictures, and whole responses beside each other, from a run and its evaluation.

    pip install matplotlib
    python results/real.py MODEL runs/real runs/real-eval openai/gsm8k:main:test

MODEL is the base model, runs/real the --output_dir of its training, runs/real-eval that of the
evaluation of both, the third the problems. Writes into results/real: rollout.png, curves.png,
pairs.md; copies metrics.jsonl and summary.json.
"""

import argparse
import json
import shutil
import sys
import textwrap
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import eval as evaluation  # noqa: E402
import opsdc  # noqa: E402

INK, RED, BLUE = "#222222", "#c1272d", "#1f5fa8"
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
plt.rcParams |= {"figure.dpi": 160, "savefig.bbox": "tight", "figure.constrained_layout.use": True}
WIDTH = 62  # characters of a column of the picture


def divergence_by_token(model: str, problem: dict, style: str, response: str) -> tuple[list, list]:
    """The tokens of a response (tokenized again) and KL(student || teacher) at each, in nats: the
    model itself, behind the student's prompt and behind v1."""
    tokenizer = opsdc.load_tokenizer(model)
    scorer = opsdc.Scorer(opsdc.load_model(model).float())
    x, x_c = opsdc.encode_chats(tokenizer, [*opsdc.prompt_pair(problem["chat"], "v1", style)])
    y = tokenizer(response, add_special_tokens=False)["input_ids"]
    with opsdc.torch.no_grad():
        _, (found,) = opsdc.distillation_loss(scorer, scorer, [(x, x_c, y)], "reverse_kl", 1)
    return [tokenizer.decode([token]) for token in y], found["loss"].tolist()


def lay_out(tokens: list[str], nats: list[float], left: int) -> list[tuple]:
    """Boxes of a column: left end, line, text, nats. Lines break before a word that is too long."""
    boxes, x, y = [], 0, 0
    for token, value in zip(tokens, nats, strict=True):
        for part in token.splitlines(keepends=True):
            text = part.rstrip("\n")
            if x + len(text) > WIDTH:
                x, y, text = 0, y + 1, text.lstrip(" ")
            boxes.append((left + x, y, text, value))
            x, y = (0, y + 1) if part.endswith("\n") else (x + len(text), y)
    return boxes


def draw_rollout(base: tuple[list, list], trained: str, file: Path) -> None:
    """The base model's response, tinted by divergence, and the trained model's beside it."""
    words = [f"{word} " for line in trained.splitlines() for word in [*line.split(" "), "\n"]]
    words = [word.replace("\n ", "\n") for word in words]
    boxes = lay_out(*base, 0) + lay_out(words, [0.0] * len(words), WIDTH + 4)
    height, most = max(y for _, y, _, _ in boxes) + 1, sorted(base[1])[-3]  # two may be darker
    figure, axes = plt.subplots(figsize=(10, 0.17 * height + 1))
    axes.set(xlim=(-0.5, 2 * WIDTH + 5), ylim=(height, -1.8))
    axes.axis("off")
    for left, title in ((0, f"base model: {len(base[0])} tokens"), (WIDTH + 4, "trained model")):
        axes.text(left, -1.2, title, weight="bold", color=INK)
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("", ["white", "#ff5a4a"])
    for x, y, text, nats in boxes:
        shade = shades(min(1.0, nats / most))
        axes.add_patch(plt.Rectangle((x, y - 0.45), len(text), 0.9, color=shade, linewidth=0))
        for i, letter in enumerate(text):
            axes.text(x + i + 0.5, y, letter, ha="center", va="center", family="monospace", size=7)
    scale = matplotlib.cm.ScalarMappable(plt.Normalize(0, most), shades)
    bar = figure.colorbar(scale, ax=axes, orientation="horizontal", shrink=0.4, aspect=50)
    bar.set_label("KL(student || teacher) where the token was sampled, nats", color=INK)
    figure.savefig(file, facecolor="white")


def draw_curves(metrics: pd.DataFrame, file: Path) -> None:
    """Length, KL and entropy by step; dotted: refreshes; the line: a mean over five steps."""
    panels = {"completion_tokens": "tokens per rollout", "loss": "loss (KL), nats per token"}
    panels |= {"student_entropy": "student entropy, nats"}
    figure, all_axes = plt.subplots(1, 3, figsize=(8.2, 2.6))
    for axes, (column, label) in zip(all_axes, panels.items(), strict=True):
        axes.plot(metrics.step, metrics[column], ".", color=BLUE, markersize=4, alpha=0.5)
        axes.plot(metrics.step, metrics[column].rolling(5, center=True).mean(), color=BLUE)
        for step in metrics.step[metrics.refreshed]:
            axes.axvline(step, color=RED, linewidth=0.7, linestyle=":")
        axes.set(xlabel="step", ylabel=label, ylim=(0, None))
    figure.savefig(file, facecolor="white")


def quote(text: str) -> str:
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 110) or [""]]
    return "```\n" + "\n".join(lines) + "\n```\n"


def pairs(samples: pd.DataFrame, problems: dict[str, dict], base: str, trained: str) -> str:
    """Markdown: five pairs chosen by rule, and what got lost."""
    first = samples[samples["sample"] == 0]
    first = first[first.prompt == "student"].set_index(["model", "id"])
    ids = list(problems)
    blocks = ["# Whole responses\n\nThe first sample of every fifth part of the problems' list.\n"]
    lost = [
        i for i in ids if first.loc[(base, i), "final"] and not first.loc[(trained, i), "final"]
    ]
    found = [
        i for i in ids if first.loc[(trained, i), "final"] and not first.loc[(base, i), "final"]
    ]
    text = (
        f"## What got lost\n\nOf the first samples the base model has {len(lost)} right that the "
    )
    text += (
        f"trained model has wrong, and {len(found)} the other way round. The first three lost:\n"
    )
    for heading, chosen in (("", ids[:: len(ids) // 5][:5]), (text, lost[:3])):
        blocks.append(heading)
        for i in chosen:
            gold = problems[i]["answer"]
            blocks.append(
                f"### Problem {i}: {problems[i]['chat'][-1]['content']}\n\nAnswer: {gold}\n"
            )
            for name, model in (("base", base), ("trained", trained)):
                row = first.loc[(model, i)]
                verdict = "right" if row.final else "wrong"
                blocks.append(
                    f"**{name}**: {row.tokens} tokens, {verdict}\n\n{quote(row.response)}"
                )
    return "\n".join(block for block in blocks if block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "run", "evaluation", "data"):
        parser.add_argument(name)
    chosen = parser.parse_args()
    out, run, directory = HERE / "real", Path(chosen.run), Path(chosen.evaluation)
    files = sorted(directory.glob("samples-*.jsonl"))
    samples = pd.concat([pd.read_json(file, lines=True, dtype={"id": str}) for file in files])
    asked = {p["id"]: p for p in evaluation.load_problems(chosen.data, 0)}
    problems = {i: asked[i] for i in dict.fromkeys(samples.id)}
    (out / "pairs.md").write_text(pairs(samples, problems, chosen.model, chosen.run))
    # The picture: the first problem that both have right, the base model within 10% of its median.
    rows = samples[samples.prompt == "student"].set_index(["model", "id"])
    of_base, of_trained = rows.loc[chosen.model], rows.loc[chosen.run]
    typical = of_base[abs(of_base.tokens / of_base.tokens.median() - 1) < 0.1]
    number = next(i for i in typical.index if of_base.final[i] and of_trained.final[i])
    style = json.loads((run / "run.json").read_text())["config"]["prompt"]
    text = of_base.response[number]
    tinted = divergence_by_token(chosen.model, problems[number], style, text)
    draw_rollout(tinted, of_trained.response[number], out / "rollout.png")
    draw_curves(pd.read_json(run / "metrics.jsonl", lines=True), out / "curves.png")
    shutil.copy(run / "metrics.jsonl", out)
    shutil.copy(directory / "summary.json", out)
    print(f"problem {number}: {problems[number]['chat'][-1]['content']}")


if __name__ == "__main__":
    main()
