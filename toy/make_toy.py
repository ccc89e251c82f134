"""Makes the toy: a tiny Qwen3-architecture model on which opsdc.py visibly works on a laptop CPU.

The two styles of reasoning, verbose and concise, were PLANTED here: the model is trained from
random weights on traces that this script writes. The toy shows the method's mechanics; it is no
evidence about Qwen3 or any other model.

Problems ask for the last digit of a sum of 2 to 6 digits; the number of summands is the level.
Behind the student's prompt a trace narrates, restates, re-checks and starts over. Behind the
instruction v1 it does all of this less often; v2 lies between and keeps a check on harder problems.
Much of what is superfluous does not grow with the sum, so short sums carry more of it. Every line
of numbers slips with the same probability in every style (its first digit is one too high) and the
next builds on it: accuracy can differ between styles only because length does.

toy/teacher, for --teacher, is the toy with two more layers, trained on: in the same styles, its
lines slip half as often, and asked to rewrite an answer it copies the lines that the answer follows
from, as they stand.

    python toy/make_toy.py          # rewrites toy/ from a seed; half an hour on 2 busy cores

The files of arguments beside it (args, distill, rewrite, eval) are written by hand.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from opsdc import Chat, Ids, encode_chats, prompt_pair  # noqa: E402
from results.mpd import rewriting_chat  # noqa: E402

Digits = tuple[int, ...]  # the summands of a problem

LEVELS = range(2, 7)
HARD = 4  # from this level on, v2 keeps a check
TEST_PER_LEVEL = 60
TRAIN_PROBLEMS = 3200

# Of a line of numbers. Evaluation at temperature 0.6 thins it to 0.06, and top-p 0.95 would cut off
# anything below 0.05, which is 0.146 here.
SLIP = 0.16

TEACHER_SLIP = 0.08  # thinned to 0.02, which evaluation's top-p cuts off

BATCH_SIZE = 32
TOY_LAYERS, STEPS, LEARNING_RATE = 4, 3000, 3e-3
TEACHER_LAYERS, TEACHER_STEPS, TEACHER_LEARNING_RATE = 6, 1000, 2e-3

# ------------------------------------------------------------------------------------------------
# Problems and traces
# ------------------------------------------------------------------------------------------------

NARRATIONS = (
    "Okay, let me think about this.",
    "Let me read the problem again.",
    "I only need the last digit.",
    "Let me go through it step by step.",
)
CHECKS = ("Wait, let me double-check.", "Hmm, is that right?", "Let me verify that once more.")
CLOSINGS = (
    "That looks right.",
    "Yes, that makes sense.",
    "I am fairly confident.",
    "So that is it.",
)
RESTART = "Wait, let me start over."
RESTATED_SUM, STEP, RESTATED_STEP = "The sum is ", "= ", "That is "


@dataclass(frozen=True)
class Style:
    """How likely a trace is to do each superfluous thing, and then to do it again."""

    narrate: float
    restate_sum: float
    restate_step: float
    check: float
    close: float
    restart: float
    keeps_check: bool = False  # on hard problems


STYLES = {
    "student": Style(0.80, 0.60, 0.30, 0.65, 0.75, 0.20),
    "v1": Style(0.69, 0.43, 0.22, 0.51, 0.61, 0.14),
    "v2": Style(0.72, 0.46, 0.23, 0.53, 0.63, 0.15, keeps_check=True),
}


def repeats(probability: float, rng: random.Random) -> int:
    """How often in a row something of this probability happens."""
    count = 0
    while rng.random() < probability:
        count += 1
    return count


def problem_text(digits: Sequence[int]) -> str:
    return f"What is the last digit of {' + '.join(map(str, digits))}?"


def answer_text(digits: Digits, style: Style, rng: random.Random, slip: float = SLIP) -> str:
    """An answer in a style: thoughts and lines that rewrite what is left of the sum; the digit."""
    lines = rng.choices(NARRATIONS, k=repeats(style.narrate, rng))

    def write(opening: str, numbers: list[int]) -> list[int]:
        """Adds a line of numbers and returns what it says, slip included; the next builds on it."""
        slipped = rng.random() < slip
        numbers = [(numbers[0] + slipped) % 10, *numbers[1:]]
        lines.append(opening + " + ".join(map(str, numbers)))
        return numbers

    for attempt in range(1 + repeats(style.restart, rng)):
        left = digits
        if attempt:
            lines.append(RESTART)
        if attempt or rng.random() < style.restate_sum:
            left = write(RESTATED_SUM, left)
        while len(left) > 1:
            left = write(STEP, [left[0] + left[1], *left[2:]])
            for _ in range(repeats(style.restate_step, rng) if len(left) > 1 else 0):
                left = write(RESTATED_STEP, left)
    kept = style.keeps_check and len(digits) >= HARD
    for _ in range(max(repeats(style.check, rng), kept)):
        lines.append(rng.choice(CHECKS))
        left = write(RESTATED_STEP, left)
    lines += rng.choices(CLOSINGS, k=repeats(style.close, rng))
    return "\n".join(["<think>", *lines, "</think>\n", f"Answer: {left[0]}"])


def rewritten(answer: str, level: int) -> str:
    """The lines that an answer follows from, slips included: of its last attempt, for each number
    of summands below the level, the last line."""
    attempt, result = answer.split(RESTART)[-1].split("</think>")
    last = {line.count("+"): line for line in attempt.splitlines() if line[-1:].isdigit()}
    steps = [re.sub(r"^\D*", STEP, last[plus]) for plus in reversed(range(level - 1))]
    return "\n".join(["<think>", *steps, "</think>"]) + result


def draw_digits(rng: random.Random, level: int, apart_from: Collection[Digits]) -> Digits:
    """The summands of a random problem that is not one of the others."""
    while (digits := tuple(rng.randrange(10) for _ in range(level))) in apart_from:
        pass
    return digits


# ------------------------------------------------------------------------------------------------
# Tokenizer and model
# ------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges cross spaces, so that a phrase is one token, but not digits and
    newlines: a digit is always a token of its own. It has its own chat template, in ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]|\n+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # more than the few phrases fill
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> Qwen3ForCausalLM:
    """Random weights, 105,000 and 213,000 a layer. It ships with Qwen3's own sampling settings."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.08,  # about 1 / sqrt(hidden_size)
            **ids,
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.95, top_k=20, **ids
    )
    return model


def deepened(toy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The toy with two more layers, which change nothing before they are trained."""
    model = make_model(tokenizer, TEACHER_LAYERS)
    model.load_state_dict(toy.state_dict(), strict=False)
    for layer in model.model.layers[toy.config.num_hidden_layers :]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def prompt_chat(digits: Sequence[int], style: str) -> Chat:
    """The prompt that a style of answer stands behind: the student's, or v1's or v2's teacher's."""
    problem = [{"role": "user", "content": problem_text(digits)}]
    if style == "student":
        return prompt_pair(problem, "v1")[0]
    return prompt_pair(problem, style)[1]


Examples = tuple[list[Ids], list[str]]  # prompts, and answers


def toy_examples(
    tokenizer: PreTrainedTokenizerFast,
    problems: list[tuple[Digits, str]],
    rng: random.Random,
    slip: float = SLIP,
) -> Examples:
    """Problems solved, each in its style."""
    chats = [prompt_chat(*problem) for problem in problems]
    prompts = encode_chats(tokenizer, chats, "template")
    return prompts, [answer_text(x, STYLES[style], rng, slip) for x, style in problems]


def teacher_examples(
    tokenizer: PreTrainedTokenizerFast, problems: list[tuple[Digits, str]], rng: random.Random
) -> Examples:
    """Half of the problems solved with fewer slips; the toy's answers to the others rewritten."""
    half = len(problems) // 2
    prompts, texts = toy_examples(tokenizer, problems[:half], rng, TEACHER_SLIP)
    answers = [(answer_text(x, STYLES[style], rng), x) for x, style in problems[half:]]
    chats = [rewriting_chat(prompt_chat(x, "student"), y) for y, x in answers]
    texts += [rewritten(y, len(x)) for y, x in answers]
    return prompts + encode_chats(tokenizer, chats, "template"), texts


def example_batches(
    examples: Callable[..., Examples],
    tokenizer: PreTrainedTokenizerFast,
    held_out: Collection[Digits],
    rng: random.Random,
    padded_length: Callable[[tuple[Ids, Ids]], int],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For ever: input_ids and labels (B, L) of new answers behind their prompts; labels are -100
    outside of the answers. Rows of similar padded_length share a batch."""
    while True:
        styles = rng.choices(list(STYLES), k=8 * BATCH_SIZE)
        # Long sums are the hardest to learn: a level is drawn as often as it has summands.
        levels = rng.choices(LEVELS, weights=LEVELS, k=len(styles))
        problems = [draw_digits(rng, level, held_out) for level in levels]
        pairs = list(zip(problems, styles, strict=True))
        prompts, texts = examples(tokenizer, pairs, rng)
        answers = tokenizer([text + tokenizer.eos_token for text in texts]).input_ids
        rows = sorted(zip(prompts, answers, strict=True), key=padded_length)
        chunks = [rows[first : first + BATCH_SIZE] for first in range(0, len(rows), BATCH_SIZE)]
        rng.shuffle(chunks)
        for chunk in chunks:
            inputs = [torch.tensor(prompt + answer) for prompt, answer in chunk]
            labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in chunk]
            yield pad_sequence(inputs, True, 0), pad_sequence(labels, True, -100)


def fit(model: Qwen3ForCausalLM, batches: Iterator, steps: int, learning_rate: float) -> None:
    """Trains a model by next-token prediction."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    bar = tqdm(range(steps), unit="step")
    for _, (input_ids, labels) in zip(bar, batches, strict=False):
        loss = model(input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def make_teacher(
    toy: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Collection[Digits],
    seed: int,
    output_dir: Path,
) -> None:
    """Trains and saves the toy's larger teacher; the toy itself is not changed."""
    set_seed(seed)
    model = deepened(toy, tokenizer)
    rng = random.Random(seed)
    batches = example_batches(
        teacher_examples, tokenizer, held_out, rng, lambda row: len(row[0] + row[1])
    )
    fit(model, batches, TEACHER_STEPS, TEACHER_LEARNING_RATE)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", nargs="?", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    set_seed(arguments.seed)
    rng = random.Random(arguments.seed)

    test: list[Digits] = []
    for level in LEVELS:
        for _ in range(TEST_PER_LEVEL):
            test.append(draw_digits(rng, level, set(test)))
    held_out = set(test)
    # Short sums come several times: there are only a hundred of two digits.
    train = [draw_digits(rng, rng.choice(LEVELS), held_out) for _ in range(TRAIN_PROBLEMS)]
    texts = ["user", "assistant"]
    for digits in train:
        for name, style in STYLES.items():
            texts += [prompt_chat(digits, name)[0]["content"], answer_text(digits, style, rng)]
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer, TOY_LAYERS)
    batches = example_batches(toy_examples, tokenizer, held_out, rng, lambda row: len(row[1]))
    fit(model, batches, STEPS, LEARNING_RATE)
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    write_rows(arguments.output_dir / "train.jsonl", [{"problem": problem_text(x)} for x in train])
    write_rows(
        arguments.output_dir / "test.jsonl",
        [{"problem": problem_text(x), "answer": str(sum(x) % 10), "level": len(x)} for x in test],
    )
    make_teacher(model, tokenizer, held_out, arguments.seed, arguments.output_dir / "teacher")


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
