"""OPSDC: on-policy self-distillation for reasoning compression, in one file.

Paper: arXiv 2603.05433 (version 2 calls the method CRISP). A reasoning model talks too much; told
to be concise, it talks less and stays right. So the model that was told becomes the teacher of the
model that was not: the student writes, and at every token is pulled towards what the teacher would
have written there. No answers, no rewards, no length budgets.

Notation
    x, c, y         problem, conciseness instruction, rollout (the completion the student samples)
    pi_theta        student: the model behind the plain prompt x
    pi_theta_bar    teacher: a frozen copy of the same model, behind the prompt (x, c)
    q_t, p_t        their next-token distributions at position t of the same y, over the vocabulary
    B, M, k         batch size, refresh interval, step

Algorithm 1
    theta_bar <- theta
    for k = 1, 2, ...:
        if k mod M == 0: theta_bar <- theta                                              Eq. (2)
        sample a batch of B problems x_i
        sample one rollout y_i ~ pi_theta(. | x_i) of each
        q_t = pi_theta(. | x_i, y_i,<t), p_t = pi_theta_bar(. | x_i, c, y_i,<t) at every t
        L_i = 1/|y_i| sum_t KL(q_t || p_t), the sum being                                Eq. (1)
        one optimizer step on 1/B sum_i L_i

Choices, where the paper and its code disagree, and departures from both
    1. Normalisation: Eq. (1) sums over t, the code averages the tokens of micro-batches of two.
       Here, as in Algorithm 1, the mean of each completion, then of the batch.
    2. Refresh: before step k, as in the paper; the code refreshes after it, one step later.
    3. Rollouts are cut at 8,192 tokens and trained on as they are, as in the paper. The released
       configuration samples up to 30,000 and drops pairs over 10,240.
    4. The reminder that ends DAPO-Math prompts stands once in each prompt; the code repeats it in
       the teacher's. The instructions have the paper's colons; the code has dashes.
    5. The sampled ids are trained on; the code decodes and encodes again, which can change them.
    6. Problems that are also in MATH-500 are left out; neither paper nor code mentions them.

The method reads down to `train`. Below it stands what that calls on: AdamW on fp32 masters, ranks,
checkpoints, reading, checks.

    python opsdc.py @toy/args                 # a planted toy: CPU, no download, minutes
    python opsdc.py --model Qwen/Qwen3-8B     # the paper's setting
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import datasets
import torch
import torch.distributed as dist
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.hf_argparser import HfArg, HfArgumentParser

# torchrun says which of how many processes this is; without it there is one.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32  # of weights and activations

Ids = list[int]  # of tokens
Model, Tokenizer = transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase


# ---- Configuration: the paper's hyperparameter table; the command line is made from it -----------


@dataclass(frozen=True)
class Config:
    """All that a run depends on. Raises ValueError for a value that makes no sense."""

    model: str = HfArg(default="Qwen/Qwen3-8B", help="hub id or local directory")
    data: str = HfArg(
        default="YouJiacheng/DAPO-Math-17k-dedup",
        help="hub id or .jsonl / .json / .parquet file with a column problem, question or prompt",
    )
    output_dir: str = HfArg(default="runs/opsdc", help="gets metrics.jsonl and the trained model")
    instruction: str = HfArg(default="v1", help="c: v1, v2, percent:50 or a text of your own")
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = HfArg(
        default="reverse_kl", help="reverse_kl is KL(student || teacher)"
    )
    refresh_every: int = HfArg(default=50, help="M, in steps; 0 freezes the teacher")
    steps: int = HfArg(default=100, help="the paper converges near 100, in an epoch of about 425")
    batch_size: int = HfArg(default=32, help="B, problems a step, one rollout each")
    micro_batch_size: int = HfArg(default=1, help="rollouts a backward pass: memory only")
    rollout_batch_size: int = HfArg(default=32, help="rollouts generated at once: memory")
    max_prompt_tokens: int = HfArg(default=1024, help="longer teacher prompts are left out")
    max_new_tokens: int = HfArg(default=8192, help="of a rollout; cut ones are trained on too")
    temperature: float = HfArg(default=1.0, help="of the rollout; the loss is always at 1")
    top_p: float = HfArg(default=1.0, help="of the rollout; 1 is the whole distribution")
    learning_rate: float = HfArg(default=1e-6, help="AdamW's, constant")
    weight_decay: float = HfArg(default=0.01, help="AdamW's, decoupled")
    max_grad_norm: float = HfArg(default=1.0, help="global L2 norm that gradients are clipped to")
    save_every: int = HfArg(default=50, help="steps between checkpoints; 0 saves only the end")
    seed: int = HfArg(default=0, help="of data order and sampling")
    offload: bool = HfArg(default=False, help="keep AdamW's state in host memory")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in output_dir")

    def __post_init__(self) -> None:
        for names, valid, wish in (
            ("steps batch_size micro_batch_size rollout_batch_size", lambda v: v > 0, "at least 1"),
            ("max_prompt_tokens max_new_tokens", lambda v: v > 0, "at least 1"),
            ("refresh_every weight_decay save_every", lambda v: v >= 0, "0 or more"),
            ("temperature max_grad_norm", lambda v: v > 0, "more than 0"),
            ("top_p learning_rate", lambda v: 0 < v <= 1, "more than 0 and at most 1"),
            ("seed", lambda v: 0 <= v < 2**32, "from 0 to 2**32 - 1"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if not (valid(value) and math.isfinite(value)):
                    raise ValueError(f"--{name} is {value}, but must be {wish}")
        instruction_text(self.instruction)


# ---- Prompts: the paper's, verbatim --------------------------------------------------------------

TASK = "Solve the following math problem step by step."  # in its place the teacher has c
PROMPT = (
    "{opening}The last line of your response should be of the form Answer: $Answer (without "
    "quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
INSTRUCTIONS = {
    "v1": "Solve the following math problem concisely and correctly. Be direct: avoid unnecessary "
    "elaboration, redundant steps, or restating the problem. Focus only on the key reasoning steps "
    "needed to reach the answer.",
    "v2": "Solve the following math problem concisely and correctly. Prioritize a correct final "
    "answer above brevity. For straightforward problems, be direct: avoid unnecessary elaboration, "
    "redundant steps, or restating the problem. For difficult or multi-step problems, do NOT "
    "over-compress: keep every reasoning step needed for correctness, including case analysis, "
    "edge cases, and a brief check of the final answer. Never omit a step that the answer depends "
    "on.",
    "percent": "Solve the following math problem correctly using {percent}% fewer tokens than you "
    "normally would. Be more concise: cut unnecessary elaboration, redundant steps, and verbose "
    "explanations while preserving correctness.",
}


def instruction_text(instruction: str) -> str:
    """The text c of `v1`, `v2` or `percent:P`; any other text of several words is c itself.

    Raises ValueError for a P that is no whole number from 1 to 99, and for any other single word.
    """
    name, _, percent = instruction.partition(":")
    if name == "percent" and percent.isdecimal() and 0 < int(percent) < 100:
        return INSTRUCTIONS["percent"].format(percent=int(percent))
    if instruction in ("v1", "v2"):
        return INSTRUCTIONS[instruction]
    if len(instruction.split()) < 2:
        raise ValueError(f"--instruction is {instruction!r}, not v1, v2, percent:1..99 or a text")
    return instruction


def student_prompt(problem: str) -> str:
    """x in the paper's words: DAPO-Math's prompt."""
    return PROMPT.format(opening=f"{TASK} ", problem=problem)


def teacher_prompt(problem: str, instruction: str) -> str:
    """(x, c) in the paper's words: the text c in the place of the first sentence."""
    return PROMPT.format(opening=f"{instruction}\n\n", problem=problem)


def encode_chat(tokenizer: Tokenizer, prompts: list[str]) -> list[Ids]:
    """Each prompt as a user turn and the opening of the assistant's, by the model's own template.

    Thinking is left to the model: Qwen3 opens <think> itself, DeepSeek-R1-Distill in its template.
    Control tokens that stand in a problem's text (<|im_end|>, say) are encoded as plain text.
    """
    return tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        sanitize_control_tokens=True,
        return_dict=False,
    )


# ---- Data: problems, never answers ---------------------------------------------------------------

# The four problems that DAPO-Math shares with MATH-500: hashes of their text without white space.
IN_MATH500 = {"3361691622c4f773", "4384ad9cb9175c9f", "69c249395bcf1d7d", "f680069cf8b5a5ad"}


def load_problems(source: str) -> list[str]:
    """Problems of a hub dataset or a file, without the wrapper that DAPO-Math has around them.

    Reads the column `problem`, `question` or `prompt`: texts, or chats whose last message is read.
    Raises ValueError if there is none, or a row without text in it.
    """
    rows = load_rows(source)
    column = next((c for c in ("problem", "question", "prompt") if c in rows.column_names), None)
    if column is None:
        wanted = "problem, question or prompt"
        raise ValueError(f"{source} has columns {rows.column_names}, none of them {wanted}")
    with reading(source):
        texts = [c[-1]["content"] if c and isinstance(c, list) else c for c in rows[column]]
    check_texts(source, column, texts)
    prefix, suffix = student_prompt("\0").split("\0")
    problems = [text.removeprefix(prefix).removesuffix(suffix) for text in texts]
    hashes = [hashlib.sha256("".join(x.split()).encode()).hexdigest()[:16] for x in problems]
    return [x for x, digest in zip(problems, hashes, strict=True) if digest not in IN_MATH500]


def load_prompts(config: Config, tokenizer: Tokenizer) -> list[tuple[Ids, Ids]]:
    """Of each problem the student's prompt and the teacher's, less those that are too long.

    Raises ValueError if too few are left for a batch.
    """
    problems, instruction = load_problems(config.data), instruction_text(config.instruction)
    student_prompts = encode_chat(tokenizer, [student_prompt(x) for x in problems])
    teacher_prompts = encode_chat(tokenizer, [teacher_prompt(x, instruction) for x in problems])
    pairs = zip(student_prompts, teacher_prompts, strict=True)
    prompts = [pair for pair in pairs if len(pair[1]) <= config.max_prompt_tokens]
    if len(prompts) < config.batch_size:
        found = f"{len(prompts)} problems of {config.data} are within --max_prompt_tokens"
        raise ValueError(f"{found}, too few for --batch_size {config.batch_size}")
    if RANK == 0:
        too_long = len(problems) - len(prompts)
        print(f"{len(prompts)} problems, {too_long} with too long prompts left out")
    return prompts


def batches(items: list, batch_size: int, seed: int) -> Iterator[list]:
    """Batches without end: every epoch in a new order, less what does not fill its last batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(items), generator=generator).tolist()
        for start in range(0, len(items) - batch_size + 1, batch_size):
            yield [items[i] for i in order[start : start + batch_size]]


# ---- Rollout -------------------------------------------------------------------------------------


def sampling_settings(shipped: GenerationConfig, **sampling: float) -> GenerationConfig:
    """Settings for generate(): `sampling`, and the stop ids that the model ships with.

    They replace the shipped settings on the model: generate() takes from those what it is not told
    (Qwen3 ships top-p 0.95 and top-k 20). Raises ValueError if there are no stop ids.
    """
    if shipped.eos_token_id is None:
        raise ValueError("the model's generation_config.json names no eos_token_id to stop at")
    stop_ids = torch.tensor(shipped.eos_token_id).view(-1).tolist()  # from one id or a list
    return GenerationConfig(
        do_sample=True,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
        remove_invalid_values=True,  # lets a broken model sample; its update is then skipped
        **sampling,
    )


@torch.no_grad()
def rollout(model: Model, prompts: list[Ids]) -> list[Ids]:
    """Samples one completion of each prompt, by the model's generation_config.

    Returns the ids as sampled, up to the first stop id and with it; a completion that was cut
    at max_new_tokens has none.
    """
    rows = [torch.tensor(prompt) for prompt in prompts]
    ones = [torch.ones_like(row) for row in rows]
    settings = model.generation_config  # which generate() samples by
    input_ids = pad_sequence(rows, True, settings.pad_token_id, padding_side="left")  # (B, P)
    attention_mask = pad_sequence(ones, True, 0, padding_side="left")  # (B, P)
    model.eval()  # in training mode gradient checkpointing would switch the KV cache off
    output = model.generate(
        input_ids.to(model.device), attention_mask=attention_mask.to(model.device)
    )  # (B, P + T)
    completions = []
    for ids in output[:, input_ids.shape[1] :].tolist():
        stops = [t for t, token in enumerate(ids) if token in settings.eos_token_id]
        completions.append(ids[: stops[0] + 1] if stops else ids)  # padding is what follows a stop
    return completions


# ---- Alignment: one completion behind two prompts ------------------------------------------------


def align(prompts: list[Ids], completions: list[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins prompts and completions; marks the positions whose logits predict a completion token.

    Returns input_ids (B, L) and predicts (B, L). Logits at a position predict the next token, so
    the marks begin at a prompt's last token and end before the completion's last. All padding is
    at the end, out of a causal model's sight: no attention mask, no position ids.

        prompts        [[11, 12, 13], [21]]
        completions    [[1, 2], [3, 4, 5]]
        input_ids      [[11, 12, 13, 1, 2], [21, 3, 4, 5, 0]]
        predicts       [[ 0,  0,  1, 1, 0], [ 1, 1, 1, 0, 0]]

    `predicts` keeps five positions, which predict 1, 2, 3, 4, 5 in this order whatever the prompts:
    so the rows that it keeps of the student's states and of the teacher's belong together.
    """
    rows = [torch.tensor(x + y) for x, y in zip(prompts, completions, strict=True)]
    marks = [
        torch.tensor([False] * (len(x) - 1) + [True] * len(y) + [False])
        for x, y in zip(prompts, completions, strict=True)
    ]
    return pad_sequence(rows, True, 0), pad_sequence(marks, True, False)


def completion_states(model: Model, prompts: list[Ids], completions: list[Ids]) -> torch.Tensor:
    """Final hidden states (T, H) that predict the T tokens of all completions."""
    input_ids, predicts = (x.to(model.device) for x in align(prompts, completions))  # (B, L)
    return model.base_model(input_ids, use_cache=False)[0][predicts]  # of (B, L, H)


# ---- Loss: over the full vocabulary, never holding tokens x vocabulary ---------------------------

# fp32 logits held at once: large chunks for the matrix products, blocks that fit the CPU's cache.
CHUNK, BLOCK = {"cpu": 2**24, "cuda": 2**26}, {"cpu": 2**18, "cuda": 2**25}


def divergence(
    student_logps: torch.Tensor, teacher_logps: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence (N,), in nats, of log-probabilities log q and log p (N, V).

    Returns with it the gradient (N, V) with respect to the student's logits.
    With g the gradient with respect to q, the softmax makes it q (g - sum_v q g), where g is
        reverse KL, KL(q || p):                  log q - log p, a constant aside
        JSD, (KL(q || m) + KL(p || m)) / 2:      (log q - log m) / 2, with m = (q + p) / 2
        forward KL, KL(p || q):                  -p / q
    """
    q, p = student_logps.exp(), teacher_logps.exp()
    if kind == "reverse_kl":
        log_ratio = student_logps - teacher_logps
        kl = (q * log_ratio).sum(-1)  # KL(q || p), which Eq. (1) sums over t
        return kl, q * (log_ratio - kl[:, None])
    if kind == "forward_kl":
        return (p * (teacher_logps - student_logps)).sum(-1), q - p
    mixture_logps = torch.logaddexp(student_logps, teacher_logps) - math.log(2)
    log_ratio = (student_logps - mixture_logps) / 2
    student_half = (q * log_ratio).sum(-1)
    teacher_half = (p * (teacher_logps - mixture_logps)).sum(-1) / 2
    return student_half + teacher_half, q * (log_ratio - student_half[:, None])


def project(hidden: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Logits (N, V) in fp32 of hidden states (N, H), written over the first N rows of `out`.

    Student and teacher are nearly equal: logits rounded to bf16 would bury their divergence.
    """
    out = out[: len(hidden)]
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, head.T, out=out)
    if hidden.is_cuda:  # bf16 operands, fp32 sums and output
        return torch.mm(hidden, head.T, out_dtype=torch.float32, out=out)
    rounded = hidden @ head.T  # a CPU rounds the sums to bf16; the second product is what that lost
    return out.copy_(rounded).add_(torch.addmm(rounded, hidden, head.T, beta=-1))


class LinearDivergence(torch.autograd.Function):
    """sum_t weight_t D(q_t, p_t), from hidden states and heads, as a function of the student's.

    Logits exist for a chunk of positions at a time. Their gradient is known in closed form, so it
    goes into the gradients of hidden states and head while the chunk is there, in the forward pass.
    """

    @staticmethod
    def forward(ctx, student_states, student_head, teacher_states, teacher_head, weights, kind):
        """States (T, H), heads (V, H), weights (T,) -> loss, and (3, T) of D, H(q_t) and H(p_t)."""
        device, (vocabulary, _) = student_states.device.type, student_head.shape
        chunk, block = max(1, CHUNK[device] // vocabulary), max(1, BLOCK[device] // vocabulary)
        q_logits, p_logits = weights.new_empty(2, min(chunk, len(weights)), vocabulary)
        statistics = weights.new_empty(3, len(weights))
        grad_states = torch.empty_like(student_states)
        grad_head = torch.zeros_like(student_head, dtype=torch.float32)  # adds up over the chunks
        for start in range(0, len(weights), chunk):
            rows = slice(start, start + chunk)
            q_chunk = project(student_states[rows], student_head, q_logits)  # (chunk, V)
            p_chunk = project(teacher_states[rows], teacher_head, p_logits)  # (chunk, V)
            for q_block, p_block, weight, statistic in zip(
                q_chunk.split(block),  # (block, V)
                p_chunk.split(block),
                weights[rows].split(block),
                statistics[:, rows].split(block, dim=1),
                strict=True,
            ):
                student_logps, teacher_logps = q_block.log_softmax(-1), p_block.log_softmax(-1)
                statistic[0], gradient = divergence(student_logps, teacher_logps, kind)
                statistic[1] = -(student_logps.exp() * student_logps).sum(-1)
                statistic[2] = -(teacher_logps.exp() * teacher_logps).sum(-1)
                torch.mul(gradient, weight[:, None], out=q_block)
            grad_logits = q_chunk  # block by block they were written over the logits
            torch.mm(grad_logits.to(student_head.dtype), student_head, out=grad_states[rows])
            grad_head.addmm_(grad_logits.T, student_states[rows].float())
        ctx.save_for_backward(grad_states, grad_head.to(student_head.dtype))
        ctx.mark_non_differentiable(statistics)
        return statistics[0] @ weights, statistics  # Eq. (1), with the weights of Algorithm 1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        grad_states, grad_head = ctx.saved_tensors  # scaled in place: there is one backward
        return grad_states.mul_(grad_loss), grad_head.mul_(grad_loss), None, None, None, None


def distillation_loss(
    student: Model, teacher: Model, triples: list[tuple[Ids, Ids, Ids]], kind: str, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, list[list[float]]]:
    """What these completions add to 1/B sum_i 1/|y_i| sum_t D(q_t, p_t), B = batch_size; in nats.

    A triple is the student's prompt, the teacher's and the completion. Micro-batches add up, loss
    and gradient, to the batch's. Returns the loss, and without gradient (3,) the same means of
    divergence (again the loss), student entropy and teacher entropy, and every completion's
    divergences token by token.
    """
    student_prompts, teacher_prompts, completions = zip(*triples, strict=True)
    student_states = completion_states(student, student_prompts, completions)  # (T, H), of q_t
    with torch.no_grad():
        teacher_states = completion_states(teacher, teacher_prompts, completions)  # of p_t
    weights = torch.tensor([1 / len(y) / batch_size for y in completions for _ in y])  # (T,)
    weights = weights.to(student.device)
    student_head, teacher_head = (m.get_output_embeddings().weight for m in (student, teacher))
    loss, statistics = LinearDivergence.apply(
        student_states, student_head, teacher_states, teacher_head, weights, kind
    )
    by_completion = statistics[0].split([len(y) for y in completions])
    return loss, statistics @ weights, [divergences.tolist() for divergences in by_completion]


# ---- Training ------------------------------------------------------------------------------------


def train(config: Config) -> None:
    """Algorithm 1. Raises ValueError for bad input, before it writes into output_dir.

    Raises KeyboardInterrupt after a signal, SystemExit if a checkpoint can't be written or three
    gradients in a row are not finite.
    """
    log = Path(config.output_dir, "metrics.jsonl")
    check_output(config)
    if config.batch_size % RANKS:
        raise ValueError(f"--batch_size {config.batch_size} can't be shared by {RANKS} processes")
    tokenizer = load_tokenizer(config.model)
    prompts = load_prompts(config, tokenizer)
    student, teacher, optimizer, done = begin(config)  # theta_bar <- theta
    check_length(student, [ids for pair in prompts for ids in pair], config.max_new_tokens)
    check_room(student, config, done)

    teacher.requires_grad_(False)  # and in evaluation mode, as it was loaded
    student.activation_checkpointing_enable()
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    student.generation_config = sampling_settings(
        student.generation_config, max_new_tokens=config.max_new_tokens, **sampling
    )
    stop_ids = student.generation_config.eos_token_id
    wait()  # all ranks have passed all checks
    if RANK == 0:
        print(f"{done} of {config.steps} steps are done")
        start_log(log, done)
    wait()  # it could be written; until here a signal ends a rank at once
    skipped, signals = 0, catch_signals()
    stream = itertools.islice(batches(prompts, config.batch_size, config.seed), done, None)
    with tqdm(initial=done, total=config.steps, unit="step", disable=RANK > 0) as bar:
        for step in range(done + 1, config.steps + 1):
            # "if k mod M == 0: theta_bar <- theta"
            refreshed = config.refresh_every > 0 and step % config.refresh_every == 0
            if refreshed:
                teacher.load_state_dict(student.state_dict())  # Eq. (2)

            # "sample a batch of B problems", of which each rank takes its share
            batch = next(stream)[RANK::RANKS]

            # "one rollout y_i of each from the student"
            start = time.perf_counter()
            seed = (config.seed * 100_000 + step) * 1_000 + RANK
            torch.manual_seed(seed)  # the same when resumed
            completions = []
            for first in range(0, len(batch), config.rollout_batch_size):
                part = batch[first : first + config.rollout_batch_size]
                completions += rollout(student, [x for x, _ in part])
            rollout_seconds = time.perf_counter() - start

            # "student and teacher logits on the same y_i; L_i = sum_t KL(q_t || p_t)"
            start = time.perf_counter()
            student.train()
            means, divergences = torch.zeros(3, device=DEVICE), []
            triples = [(x, x_c, y) for (x, x_c), y in zip(batch, completions, strict=True)]
            triples.sort(key=lambda triple: len(triple[-1]))  # less padding
            for first in range(0, len(triples), config.micro_batch_size):
                part = triples[first : first + config.micro_batch_size]
                micro_loss, micro_means, micro_divergences = distillation_loss(
                    student, teacher, part, config.divergence, config.batch_size
                )
                micro_loss.backward()  # hands the gradient to the optimizer
                means += micro_means
                divergences += micro_divergences

            # "one step on (1/B) sum_i L_i"
            grad_norm = optimizer.step()
            skipped = 0 if math.isfinite(grad_norm) else skipped + 1

            cut = [y[-1] not in stop_ids for y in completions]
            counts = [sum(map(len, completions)), sum(cut), len(signals)]
            tokens, truncated, interrupted = all_sum(torch.tensor(counts, device=DEVICE)).tolist()
            loss, student_entropy, teacher_entropy = all_sum(means).tolist()
            metrics = {
                "step": step,
                "loss": loss,
                "completion_tokens": tokens / config.batch_size,
                "truncated": truncated / config.batch_size,
                "student_entropy": student_entropy,
                "teacher_entropy": teacher_entropy,
                "grad_norm": grad_norm,
                "skipped": skipped > 0,
                "rollout_seconds": rollout_seconds,
                "update_seconds": time.perf_counter() - start,
                "tokens_per_second": tokens / rollout_seconds,
                "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9,
                "refreshed": refreshed,
            }
            bar.update()
            bar.set_postfix_str(
                f"{metrics['completion_tokens']:.0f} tokens, {metrics['truncated']:.0%} cut, "
                f"loss {loss:.4f}, entropy {student_entropy:.2f}"
            )
            last = step == config.steps  # saved below, as a model and without what --resume needs
            interrupted = interrupted and not last
            save_point = config.save_every > 0 and step % config.save_every == 0 and not last
            if RANK == 0:
                with log.open("a") as file:
                    file.write(json.dumps(metrics) + "\n")
                if step == 1 or save_point or last:
                    nth = math.ceil(len(triples) / 4)  # at most four, from short to long
                    kept = [y for _, _, y in triples[::nth]], divergences[::nth]
                    keep_rollouts(log.with_name(f"rollouts-{step}.jsonl"), tokenizer, *kept)
                if truncated == config.batch_size:
                    bar.write(f"step {step}: every rollout was cut at --max_new_tokens", sys.stderr)
            if save_point or interrupted or skipped == 3:
                checkpoint(student, teacher, tokenizer, optimizer, config, step)
            if skipped == 3:
                raise SystemExit(
                    "opsdc.py: three gradients in a row were not finite and their updates skipped: "
                    f"look at the model, or at a lower --learning_rate; step {step} is saved"
                )
            if interrupted:
                raise KeyboardInterrupt(f"step {step} is saved, --resume goes on")
    if RANK == 0:
        with saving(log.parent, config):
            save(student, teacher, tokenizer, config, log.parent)


# ---- Optimizer: fp32 behind bf16 weights, shared out over the ranks ------------------------------


class MasterAdamW:
    """AdamW on fp32 masters of a model's weights: at 1e-6, next to no bf16 weight would move.

    Every rank holds all weights. Each weight has one owner, which keeps its master, gradient and
    moments, on its GPU or (--offload) in host memory. Backward hands every gradient to its owner,
    summed over the ranks, as soon as it is ready: there they add up in fp32.
    """

    def __init__(self, model: Model, config: Config) -> None:
        self.owner, self.masters = {}, {}
        owned = [0] * RANKS  # numbers
        for weight in sorted(model.parameters(), key=torch.numel, reverse=True):
            self.owner[weight] = owner = owned.index(min(owned))
            owned[owner] += weight.numel()
            weight.register_post_accumulate_grad_hook(self.take_gradient)
            if owner == RANK:
                place = "cpu" if config.offload else weight.device
                self.masters[weight] = weight.detach().to(place, torch.float32, copy=True)
                self.masters[weight].grad = torch.zeros_like(self.masters[weight])
        self.max_norm = config.max_grad_norm
        options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
        self.adamw = torch.optim.AdamW(self.masters.values(), **options)

    def take_gradient(self, weight: torch.Tensor) -> None:
        """Adds the gradient that backward has just finished to its owner's, and frees it."""
        gradient, weight.grad = weight.grad, None
        if RANKS > 1:
            gradient = gradient.float()
            dist.reduce(gradient, self.owner[weight])
        if weight in self.masters:
            master = self.masters[weight]
            master.grad += gradient.to(master.device)

    @torch.no_grad()
    def step(self) -> float:
        """Clips, updates the masters, rounds them into the weights.

        Returns the gradient's norm before clipping; nothing is updated if that is not finite.
        """
        masters = list(self.masters.values())
        norm = torch.nn.utils.get_total_norm([master.grad for master in masters])
        norm = all_sum(norm.to(DEVICE) ** 2).sqrt()
        if norm.isfinite():
            torch.nn.utils.clip_grads_with_norm_(masters, self.max_norm, norm)
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=False)
        for weight, owner in self.owner.items():
            if owner == RANK:
                weight.copy_(self.masters[weight])
            if RANKS > 1:
                dist.broadcast(weight, owner)
        return norm.item()

    def state_dict(self) -> dict:
        """This rank's masters and moments."""
        return {"masters": list(self.masters.values()), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for master, saved in zip(self.masters.values(), state["masters"], strict=True):
            master.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])


# ---- Ranks and their GPUs ------------------------------------------------------------------------


def claim_gpu() -> None:
    """Makes this rank's GPU, if there are any, the current one. Raises ValueError if it can't."""
    if CUDA:
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError("this GPU has no bf16, which everything here is in on a GPU")
        if DEVICE.index >= torch.cuda.device_count():
            raise ValueError(f"rank {RANK} has no GPU: start {torch.cuda.device_count()} a node")
        torch.cuda.set_device(DEVICE)
        torch.set_float32_matmul_precision("high")  # TF32, for the gradient of the head


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' tensors, in place, on all of them."""
    if RANKS > 1:
        dist.all_reduce(tensor)
    return tensor


def wait() -> None:
    """Returns when all ranks have called it."""
    if RANKS > 1:
        dist.barrier()


# ---- Checkpoints ---------------------------------------------------------------------------------

OPTIMIZER_FILE = f"optimizer-{RANK}-of-{RANKS}.pt"


def write_whole(file: Path, text: str) -> None:
    """Writes or replaces a file; a kill or a full disk leaves no half of one."""
    unfinished = file.with_name(f"{file.name}.unfinished-{RANK}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def save(student: Model, teacher: Model, tokenizer: Tokenizer, config: Config, to: Path) -> None:
    """Writes an ordinary Hugging Face model directory, and run.json: configuration and versions."""
    student.save_pretrained(to)
    tokenizer.save_pretrained(to)
    teacher.generation_config.save_pretrained(to)  # as shipped; the student's is the rollout's
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    run = {"config": asdict(config), "versions": versions | {"python": platform.python_version()}}
    write_whole(to / "run.json", json.dumps(run, indent=2) + "\n")


@contextlib.contextmanager
def saving(to: Path, config: Config) -> Iterator[Path]:
    """Gives a directory for what is unfinished. Raises SystemExit if `to` can't be written."""
    unfinished = Path(config.output_dir, "unfinished")
    try:
        yield unfinished
    except Exception as error:  # of a full disk, mostly, for which each library has its own
        shutil.rmtree(unfinished, ignore_errors=True)
        message = f"{to} can't be written ({error}); what was saved before is untouched"
        raise SystemExit(f"opsdc.py: {message}: make room and go on with --resume") from error


def checkpoint(
    student: Model,
    teacher: Model,
    tokenizer: Tokenizer,
    optimizer: MasterAdamW,
    config: Config,
    step: int,
) -> None:
    """Saves all that --resume needs in step-N. What has this name is complete."""
    finished = Path(config.output_dir, f"step-{step}")
    with saving(finished, config) as unfinished:
        if RANK == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            save(student, teacher, tokenizer, config, unfinished)
            teacher.save_pretrained(unfinished / "teacher")
        wait()  # the directory is there
        torch.save(optimizer.state_dict(), unfinished / OPTIMIZER_FILE)
        wait()  # all have written
        if RANK == 0:
            shutil.rmtree(finished, ignore_errors=True)  # a damaged one
            unfinished.rename(finished)
        wait()  # no rank ends before


# When resuming: how long, how fast, in how much memory and where. The rest decides what is learned.
MAY_CHANGE = {"output_dir", "steps", "save_every", "offload", "resume", "micro_batch_size"}
MAY_CHANGE |= {"rollout_batch_size"}  # though other samples of the same distribution are drawn


def begin(config: Config) -> tuple[Model, Model, MasterAdamW, int]:
    """Student, teacher, optimizer, and how many steps they have done.

    That is none, or with --resume what the newest checkpoint holds that can be read. Raises
    ValueError if none of them can, or if it is of a run with another configuration.
    """
    found = Path(config.output_dir).glob("step-*") if config.resume else []
    steps = [int(d.name[5:]) for d in found if d.name[5:].isdecimal()]
    for step in sorted(steps, reverse=True):
        directory = Path(config.output_dir, f"step-{step}")
        readable, student, teacher, saved = 0, None, None, None  # frees what was passed over
        try:
            with reading(directory):
                before = json.loads((directory / "run.json").read_text())["config"]
                file = directory / OPTIMIZER_FILE
                saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            student, teacher = load_model(directory), load_model(directory / "teacher")
            readable = 1
        except ValueError as error:  # the checkpoint before may be whole
            print(f"passed over: {error}", file=sys.stderr)
        if all_sum(torch.tensor(readable, device=DEVICE)) < RANKS:
            continue
        for name in before.keys() - MAY_CHANGE:
            if before[name] != getattr(config, name):
                raise ValueError(f"{directory} was made with --{name} {before[name]}")
        optimizer = MasterAdamW(student, config)
        optimizer.load_state_dict(saved)
        return student, teacher, optimizer, step
    if steps:
        raise ValueError(f"{config.output_dir} has no checkpoint for {RANKS} rank(s) to go on from")
    student, teacher = load_model(config.model), load_model(config.model)  # theta_bar <- theta
    ids, head = torch.arange(8, device=DEVICE)[None], student.get_output_embeddings().weight
    with torch.no_grad():
        logits, product = student(ids).logits, student.base_model(ids)[0] @ head.T
    if (logits - product).abs().max() > 0.02 * logits.abs().max():
        raise ValueError(f"{config.model} is no causal model whose logits are states times head")
    return student, teacher, MasterAdamW(student, config), 0


# ---- Reading: models and rows, or one line that says what is wrong -------------------------------


@contextlib.contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Turns whatever a library raises over a bad source into a ValueError of one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__  # itself it says only that it happened
        line = str(error).partition("\n")[0]
        raise ValueError(f"{source} can't be read: {line}") from error


def load_tokenizer(name: str) -> Tokenizer:
    """A model's tokenizer. Raises ValueError unless it fits the model and has a chat template."""
    with reading(name):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        vocabulary = config.get_text_config().vocab_size
        if len(tokenizer) > vocabulary or not all(encode_chat(tokenizer, ["1 + 1"])):
            raise ValueError(f"{len(tokenizer)} tokens in its tokenizer, {vocabulary} in its model")
    return tokenizer


def load_model(name: str | Path) -> Model:
    """A causal language model, in DTYPE on DEVICE. Raises ValueError if it can't be read."""
    with reading(name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPE, trust_remote_code=False)
    return model.to(DEVICE)


def json_rows(file: str) -> list[dict]:
    """The rows of a .jsonl file. Raises ValueError that names the first that is no JSON object."""
    rows = []
    for number, line in enumerate(open(file, encoding="utf-8"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no JSON object")
        rows += [row] if row else []
    if not rows:
        raise ValueError("it has no rows")
    return rows


def check_texts(source: str, column: str, cells: list) -> None:
    """Raises ValueError that names the first row without a text."""
    for number, cell in enumerate(cells, 1):
        if not (isinstance(cell, str) and cell.strip()):
            raise ValueError(f"{source}, row {number}: the {column} is {cell!r}, not a text")


def load_rows(source: str, split: str = "train") -> datasets.Dataset:
    """Rows of a .jsonl, .json or .parquet file, or of the split of a hub dataset.

    Raises ValueError if there are none to be read.
    """
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    with reading(source):
        if source.endswith(".jsonl"):
            json_rows(source)  # raises with the number of a bad row, which datasets counts from 0
        if kind := kinds.get(Path(source).suffix):
            return datasets.load_dataset(kind, data_files=source, split="train")
        return datasets.load_dataset(source, split=split)


# ---- Checks, log, interruption -------------------------------------------------------------------


def check_length(model: Model, prompts: list[Ids], max_new_tokens: int) -> None:
    """Raises ValueError if a prompt and its completion can exceed the positions that model has."""
    longest = max(map(len, prompts)) + max_new_tokens
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    if longest > positions:
        room = f"{model.name_or_path} has {positions} positions"
        raise ValueError(f"prompt + --max_new_tokens is {longest}, but {room}")


def existing(directory: str) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    path = Path(directory).absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def check_output(config: Config) -> None:
    """Raises ValueError if output_dir holds another run or can't be written."""
    output_dir, parent = Path(config.output_dir), existing(config.output_dir)
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"--output_dir {output_dir} can't be written: look at {parent}")
    if (output_dir / "metrics.jsonl").exists() and not config.resume:
        raise ValueError(f"{output_dir} holds a run: --resume it or choose another --output_dir")
    if (output_dir / "run.json").exists():  # the last file that a run writes
        raise ValueError(f"{output_dir} holds a finished run: choose another --output_dir")


def check_room(model: Model, config: Config, done: int) -> None:
    """Raises ValueError if the disk lacks the room for all that this run will save."""
    numbers, every = sum(weight.numel() for weight in model.parameters()), config.save_every
    checkpoints = max(0, (config.steps - 1) // every - done // every) if every else 0
    models = 1 + 2 * checkpoints  # a checkpoint has student and teacher, and AdamW's fp32 thrice
    need = numbers * (models * DTYPE.itemsize + checkpoints * 3 * torch.float32.itemsize)
    if need > (free := shutil.disk_usage(existing(config.output_dir)).free):
        sizes = f"the run will save {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        raise ValueError(f"--output_dir: {sizes}: raise --save_every or choose another")


def start_log(log: Path, done: int) -> None:
    """Leaves in metrics.jsonl the rows of the steps that are done and no more."""
    log.parent.mkdir(parents=True, exist_ok=True)
    write_whole(log, "".join(log.read_text().splitlines(True)[:done]) if done else "")


def keep_rollouts(
    file: Path, tokenizer: Tokenizer, completions: list[Ids], divergences: list[list[float]]
) -> None:
    """Keeps rollouts with the divergence of every token, in nats: where the teacher disagrees.

    Prints the first one on a terminal, its tokens from white to red where the divergence is most.
    """
    rows = [
        {"tokens": [tokenizer.decode([token]) for token in y], "divergence": divergence}
        for y, divergence in zip(completions, divergences, strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if sys.stdout.isatty() and 0 < sum(divergences[0]) < math.inf:
        most = max(divergences[0])
        fades = [255 - round(255 * max(nats, 0) / most) for nats in divergences[0]]
        tinted = zip(rows[0]["tokens"], fades, strict=True)
        text = "".join(f"\033[30;48;2;255;{fade};{fade}m{token}" for token, fade in tinted)
        tqdm.write(f"{text}\033[0m\n{file.stem}: from white, 0, to red, {most:.3f} nats")


def catch_signals() -> list[float]:
    """The list that will hold the times of Ctrl-C and SIGTERM; each after the first raises.

    Within a second they are the same: torchrun passes on what each rank may have got by itself.
    """
    caught = []

    def catch(*_) -> None:
        if caught and time.monotonic() < caught[-1] + 1:
            return
        caught.append(time.monotonic())
        if len(caught) > 1:
            raise KeyboardInterrupt("--resume goes on from the newest checkpoint, if there is one")

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return caught


# ---- Command line --------------------------------------------------------------------------------


def main() -> None:
    """Command line: a flag for each field of Config; @file reads flags from a file, one a line."""
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0], fromfile_prefix_chars="@")
    arguments = parser.parse_args()
    try:
        config = Config(**vars(arguments))
        claim_gpu()
        if RANKS > 1:
            limit = timedelta(days=1)  # one rank's rollouts may take much longer than another's
            engine, device = ("nccl", DEVICE) if CUDA else ("gloo", None)
            dist.init_process_group(engine, timeout=limit, device_id=device)
        train(config)
    except (ValueError, OSError) as error:
        message = str(error).partition("\n")[0]
        parser.exit(2, f"opsdc.py: error: {message}\n")
    except KeyboardInterrupt as interrupt:
        parser.exit(130, f"opsdc.py: interrupted; {str(interrupt) or 'nothing was written'}\n")
    except torch.OutOfMemoryError:
        remedy = "lower --rollout_batch_size if in a rollout, else --micro_batch_size, or --offload"
        parser.exit(1, f"opsdc.py: out of GPU memory: {remedy}; go on with --resume\n")
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
