"""OPSDC: on-policy self-distillation for reasoning compression, in one file.

Paper: arXiv 2603.05433 (version 2 calls the method CRISP). A reasoning model talks too much. With
"be concise" in its prompt the same model talks less: this is the teacher. The student samples
completions of the plain prompt and learns, at every token, the teacher's next-token distribution.
No answers, no rewards, no length budgets.

    x, c, y         problem, conciseness instruction, rollout (a completion sampled by the student)
    pi_theta        student: the model with the prompt x
    pi_theta_bar    teacher: a frozen copy of the model with the prompt (x, c)
    q_t, p_t        their next-token distributions at position t of the same y, over the vocabulary
    B, M, k         batch size, refresh interval, step

Algorithm 1
    theta_bar <- theta
    for k = 1, 2, ...:
        if k mod M == 0, theta_bar <- theta                                              Eq. (2)
        sample a batch of B problems
        one rollout y_i of each from the student
        student and teacher logits on the same y_i
        L_i = sum_t KL(q_t || p_t), normalized by |y_i| in practice                      Eq. (1)
        one step on (1/B) sum_i L_i

Where they differ           the paper               its code                          here
    1. each L_i             divided by |y_i|        token mean of micro-batches of 2  the paper's
    2. refresh              before step k           after step k                      the paper's
    3. rollouts over 8,192  cut, and trained on     left out, if over 10,240          the paper's
    4. closing reminder     once in each prompt     twice in the teacher's            the paper's
    5. trained token ids    not said                text tokenized again              as sampled
    6. MATH-500's problems  not said                4 are trained on                  left out

    python opsdc.py @toy/args                 # a planted toy: CPU, no download, minutes
    torchrun --nproc-per-node 8 opsdc.py      # the paper's setting: Qwen3-8B, eight GPUs
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before training: no traceback

import datasets
import fsspec
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp as fsdp
import transformers
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.hf_argparser import HfArg, HfArgumentParser

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda"), "bfloat16") if CUDA else (torch.device("cpu"), "float32")
QUIET = os.environ.get("RANK", "0") > "0" or None  # for bars: None shows them on a terminal
Model, Tokenizer = transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
Ids, Chat = list[int], list[dict[str, str]]  # token ids; turns with role and content
Triple = tuple[Ids, Ids, Ids]  # the student's prompt, the teacher's, the completion y


# ---- Configuration: the paper's hyperparameter table; the command line is made from it -----------


@dataclass(frozen=True)
class Config:
    """Options of a run, with the paper's values as defaults."""

    model: str = HfArg(default="Qwen/Qwen3-8B", help="hub id or local directory")
    data: str = HfArg(default="YouJiacheng/DAPO-Math-17k-dedup", help="id:config:split, or a file")
    output_dir: str = HfArg(default="runs/opsdc", help="for metrics.jsonl and the trained model")
    instruction: str = HfArg(default="v1", help="c: v1, v2, percent:50, none or a text of your own")
    prompt: str = HfArg(default="paper", help="paper, plain, boxed or a text with {problem}")
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"  # KL(student || teacher)
    teacher: str = HfArg(default="", help="a model of this vocabulary; needs --refresh_every 0")
    refresh_every: int = HfArg(default=50, help="M, in steps; 0 freezes the teacher")
    refresh_share: float = HfArg(default=1.0, help="the student's share in a refresh; 1: a copy")
    steps: int = HfArg(default=100, help="the paper converges near 100, in an epoch of about 425")
    batch_size: int = HfArg(default=32, help="B, problems a step, one rollout each")
    micro_batch_size: int = HfArg(default=1, help="rollouts a backward pass; more is faster")
    rollout_batch_size: int = HfArg(default=32, help="rollouts generated at once; for memory")
    max_prompt_tokens: int = HfArg(default=1024, help="problems with longer prompts are left out")
    max_new_tokens: int = HfArg(default=8192, help="of a rollout; cut ones are trained on too")
    temperature: float = HfArg(default=1.0, help="of the rollout; the loss is always at 1")
    top_p: float = HfArg(default=1.0, help="of the rollout; 1 is the whole distribution")
    learning_rate: float = HfArg(default=1e-6, help="of AdamW, constant")
    weight_decay: float = HfArg(default=0.01, help="of AdamW, decoupled")
    max_grad_norm: float = HfArg(default=1.0, help="global L2 norm; larger gradients are clipped")
    save_every: int = HfArg(default=50, help="steps between checkpoints; 0 saves only the end")
    seed: int = HfArg(default=0, help="of data order and sampling")
    dtype: Literal["float32", "bfloat16"] = HfArg(default=DTYPE, help="of passes and rollouts")
    offload: bool = HfArg(default=False, help="keep fp32 weights and AdamW in host memory")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in output_dir")


# ---- Prompts: the paper's, verbatim --------------------------------------------------------------

TASK = "Solve the following math problem step by step."  # the instruction c takes its place
PROMPTS = {
    "paper": f"{TASK} The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".',
    # Not the paper's: the text as it is, and the request that Qwen and DeepSeek recommend.
    "plain": "{problem}",
    "boxed": "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
}
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
} | {
    f"percent:{percent}": f"Solve the following math problem correctly using {percent}% fewer "
    "tokens than you normally would. Be more concise: cut unnecessary elaboration, redundant "
    "steps, and verbose explanations while preserving correctness."
    for percent in range(1, 100)
}


def prompt_pair(chat: Chat, instruction: str, style: str = "paper") -> tuple[Chat, Chat]:
    """The student's chat, x, and the teacher's, (x, c), for one problem.

    "What is 1 + 1?" with the instruction v1, shortened:
        x         Solve the following ... step by step. The last line of ... What is 1 + 1? ...
        (x, c)    Solve the following ... concisely and ... The last line of ... What is 1 + 1? ...
    c is a paragraph of its own; in other styles than the paper's it comes before all of x. With the
    instruction `none` the teacher gets x too. Raises BadInput for other words and unknown styles.
    """
    template, c = PROMPTS.get(style, style), INSTRUCTIONS.get(instruction, instruction)
    fault = f"--prompt {style!r} is no style, and no text with {{problem}}"
    require("{problem}" in template, fault)
    known = len(c.split()) > 1 or c == "none"
    require(known, f"--instruction is {c!r}, not v1, v2, percent:1..99, none or a text")
    *turns, last = chat
    problem = last["content"] if style == "plain" else without_wrapper(last["content"])
    x = template.replace("{problem}", problem)
    x_c = x if c == "none" else f"{c}\n\n{x.removeprefix(f'{TASK} ') if style == 'paper' else x}"
    return [*turns, {**last, "content": x}], [*turns, {**last, "content": x_c}]


# ---- Rollout -------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(model: Model, prompts: list[Ids], batch_size: int) -> list[Ids]:
    """Samples one completion of each prompt, batch_size at a time, with the model's settings (see
    `sampling_settings`). A completion ends with its first stop id; one that was cut has none."""
    settings, completions = model.generation_config, []
    pad = partial(pad_sequence, batch_first=True, padding_side="left")  # completions start together
    bar = tqdm(unit="token", leave=False, disable=QUIET)
    bar.put, bar.end = lambda _: bar.update(), bar.refresh  # what generate() calls in a streamer
    for start in range(0, len(prompts), batch_size):
        rows = [torch.tensor(prompt) for prompt in prompts[start : start + batch_size]]
        input_ids = pad(rows, padding_value=settings.pad_token_id).to(DEVICE)  # (B, P)
        attention_mask = pad([torch.ones_like(row) for row in rows]).to(DEVICE)  # (B, P)
        bar.reset(settings.max_new_tokens + 1)  # the prompt is put, too
        output = model.generate(input_ids, attention_mask=attention_mask, streamer=bar)  # (B, P+T)
        for ids in output[:, input_ids.shape[1] :].tolist():
            stops = [t for t, token in enumerate(ids) if token in settings.eos_token_id]
            completions.append(ids[: stops[0] + 1] if stops else ids)  # padding follows a stop id
    bar.close()
    return completions


# ---- Alignment: one completion behind two prompts ------------------------------------------------


def align(prompts: list[Ids], completions: list[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins prompts and completions; marks the positions whose logits predict completion tokens.

    Returns input_ids (B, L) and predicts (B, L). A position predicts the next token, so the marks
    begin at a prompt's last token and end before the completion's last. All padding is at the end,
    where a causal model does not see it: no attention mask, no position ids.

        prompts        [[11, 12, 13], [21]]
        completions    [[1, 2], [3, 4, 5]]
        input_ids      [[11, 12, 13, 1, 2], [21, 3, 4, 5, 0]]
        predicts       [[ 0,  0,  1, 1, 0], [ 1, 1, 1, 0, 0]]

    The five marked positions predict 1, 2, 3, 4, 5 in this order, whatever the prompts: the marked
    rows of the student's states and of the teacher's match.
    """
    pairs = list(zip(prompts, completions, strict=True))
    rows = [torch.tensor(x + y) for x, y in pairs]
    marks = [torch.tensor([False] * (len(x) - 1) + [True] * len(y) + [False]) for x, y in pairs]
    return pad_sequence(rows, batch_first=True), pad_sequence(marks, batch_first=True)


class Scorer(torch.nn.Module):
    """A causal model that returns final hidden states; logits are these states times its head."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    @property
    def head(self) -> torch.Tensor:  # (V, H)
        return self.model.get_output_embeddings().weight

    def forward(self, input_ids: torch.Tensor, predicts: torch.Tensor) -> torch.Tensor:
        """(B, L) twice, from `align` -> the states (T, H) that predict the T completion tokens."""
        states = self.model.base_model(input_ids.to(DEVICE), use_cache=False)[0]  # (B, L, H)
        return states[predicts.to(DEVICE)]


# ---- Loss: over the full vocabulary --------------------------------------------------------------


def divergence(student_logps: torch.Tensor, teacher_logps: torch.Tensor, kind: str) -> torch.Tensor:
    """D(q, p) in nats, (N,), from log-probabilities log q and log p over the vocabulary, (N, V)."""
    if kind == "reverse_kl":  # KL(q || p), which Eq. (1) sums over t
        return (student_logps.exp() * (student_logps - teacher_logps)).sum(-1)
    if kind == "forward_kl":  # KL(p || q)
        return (teacher_logps.exp() * (teacher_logps - student_logps)).sum(-1)
    mixture_logps = torch.logaddexp(student_logps, teacher_logps) - math.log(2)  # m = (q + p) / 2
    halves = (divergence(d, mixture_logps, "reverse_kl") for d in (student_logps, teacher_logps))
    return sum(halves) / 2  # JSD


def project(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Logits (N, V) in fp32: rounded to bf16, their error would be larger than the KL."""
    if CUDA:
        return torch.mm(states, head.T, out_dtype=torch.float32)  # the operands stay in bf16
    return states.float() @ head.float().T


CHUNK = 192  # positions whose logits are in memory at once
PART = CHUNK if CUDA else 16  # positions of one elementwise pass; 16 stay in a CPU's cache


class ChunkedDivergence(torch.autograd.Function):
    """sum_t weight_t D(q_t, p_t) from states and heads, without the logits of all T positions: the
    forward pass forms those of one chunk of positions at a time, and computes the gradients too."""

    @staticmethod
    def forward(ctx, student_states, student_head, teacher_states, teacher_head, weights, kind):
        """States (T, H), heads (V, H), weights (T,) -> the loss; statistics by name, (T,) each."""
        vocabulary = min(len(student_head), len(teacher_head))  # a head may be padded with rows
        q_head, p_head = student_head[:vocabulary], teacher_head[:vocabulary]
        figures = weights.new_empty(len(weights), 3)  # one tensor: many would fragment memory
        grad_states = torch.empty_like(student_states)
        grad_head = torch.zeros_like(student_head, dtype=torch.float32)  # 2.5 GB for Qwen3-8B
        for start in range(0, len(weights), CHUNK):
            rows = slice(start, start + CHUNK)
            student_logits = project(student_states[rows], q_head)  # (N, V)
            teacher_logits = project(teacher_states[rows], p_head)  # (N, V)
            tensors = student_logits, teacher_logits, weights[rows], figures[rows]
            for z, teacher_z, weight, row in zip(*(t.split(PART) for t in tensors), strict=True):
                leaf, teacher_logps = z.detach().requires_grad_(), teacher_z.log_softmax(-1)
                with torch.enable_grad():
                    student_logps = leaf.log_softmax(-1)
                    nats = divergence(student_logps, teacher_logps, kind)
                # For the reverse KL: d D / d z_v = q_v (log q_v - log p_v - D), in place of z
                z.copy_(torch.autograd.grad(nats, leaf, weight)[0])
                entropies = [-(x.exp() * x).sum(-1) for x in (student_logps, teacher_logps)]
                row.copy_(torch.stack([nats.detach(), *entropies], -1))
            grad_states[rows] = student_logits.to(q_head.dtype) @ q_head  # overwritten by gradients
            grad_head[:vocabulary].addmm_(student_logits.T, student_states[rows].float())
        ctx.save_for_backward(grad_states, grad_head)
        names = "loss", "student_entropy", "teacher_entropy"
        statistics = dict(zip(names, figures.unbind(-1), strict=True))
        return statistics["loss"] @ weights, statistics  # Eq. (1) with weight_t = 1 / |y_i| / B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        grad_states, grad_head = ctx.saved_tensors
        grad_head = (grad_head * grad_loss).to(grad_states.dtype)
        return grad_states * grad_loss, grad_head, None, None, None, None


def distillation_loss(
    student: Scorer, teacher: Scorer, triples: list[Triple], kind: str, batch_size: int
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """What these completions add to 1/B sum_i 1/|y_i| sum_t D(q_t, p_t), in nats; B is batch_size.

    The y_i are fixed: no gradient goes through their sampling. Losses and gradients of
    micro-batches add up to the batch's. Returns also the statistics of each completion, (|y_i|,)
    each: `loss` is D at its tokens.
    """
    student_prompts, teacher_prompts, completions = zip(*triples, strict=True)
    student_states = student(*align(student_prompts, completions))  # (T, H), of q_t
    with torch.no_grad():
        teacher_states = teacher(*align(teacher_prompts, completions))  # (T, H), of p_t
    lengths = torch.tensor([len(y) for y in completions])
    weights = (1 / (lengths * batch_size)).repeat_interleave(lengths).to(DEVICE)  # (T,)
    loss, statistics = ChunkedDivergence.apply(
        student_states, student.head, teacher_states, teacher.head, weights, kind
    )
    parts = [values.split(lengths.tolist()) for values in statistics.values()]
    return loss, [dict(zip(statistics, part, strict=True)) for part in zip(*parts, strict=True)]


# ---- Training ------------------------------------------------------------------------------------


@torch.no_grad()
def refresh(teacher: Scorer, student: Scorer, share: float) -> None:
    """Eq. (2): theta_bar <- theta. A share below 1 makes theta_bar an exponential average."""
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.lerp_(new, share)  # old + share (new - old); torch makes it a copy at 1


def train(config: Config, complete: Callable[[Model, list[Ids], int], list[Ids]] = rollout) -> None:
    """Algorithm 1. `complete` turns prompts of the student into one completion each, as `rollout`
    does, with the sampler and --rollout_batch_size: the place for another engine."""
    check_options(config)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    output_dir = Path(config.output_dir).expanduser()
    tokenizer = load_tokenizer(config.model, config.teacher)
    prompts = load_prompts(config, tokenizer)  # of each problem: x and (x, c) as ids, x as a chat

    # Student and teacher have fp32 weights, a part on each rank, and compute in --dtype. The
    # sampler has the student's weights in --dtype, whole on every rank; it generates and is saved.
    student = shard(load_model(config.model), config)
    teacher = shard(load_model(config.teacher or config.model).requires_grad_(False), config)
    sampler = load_model(config.model, config.dtype, DEVICE)
    ids = [prompt for x, x_c, _ in prompts for prompt in (x, x_c)]
    sampler.generation_config = sampling_settings(config, [sampler, teacher.model], tokenizer, ids)
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(student.parameters(), **options)
    if done := open_run(config, tokenizer, prompts):  # the step to go on from, or 0
        load_checkpoint(output_dir / f"step-{done}", student, teacher, optimizer)
        copy_to_sampler(student, sampler)
    bar = tqdm(initial=done, total=config.steps, unit="step", disable=QUIET)
    signals = catch_signals()  # a list with an entry for each Ctrl-C, SIGTERM or SIGHUP
    data = enumerate(batches(prompts, config.batch_size, config.seed), 1)
    for step, batch in itertools.islice(data, done, config.steps):  # done + 1, ..., steps
        metrics = {"step": step}  # for the log

        # "if k mod M == 0, theta_bar <- theta"
        metrics["refreshed"] = config.refresh_every > 0 and step % config.refresh_every == 0
        if metrics["refreshed"]:
            refresh(teacher, student, config.refresh_share)  # Eq. (2)

        # "sample a batch of B problems": each rank takes its share, B / ranks
        student_prompts, teacher_prompts, _ = zip(*batch[rank::ranks], strict=True)

        # "one rollout y_i of each from the student"
        start = time.perf_counter()
        torch.manual_seed((config.seed * 100_000 + step) * 1_000 + rank)  # differs by step and rank
        completions = complete(sampler, student_prompts, config.rollout_batch_size)
        metrics["rollout_seconds"] = time.perf_counter() - start

        # "student and teacher logits on the same y_i", "L_i = sum_t KL(q_t || p_t)"
        start = time.perf_counter()
        triples = list(zip(student_prompts, teacher_prompts, completions, strict=True))
        triples.sort(key=lambda triple: len(triple[-1]))  # less padding
        size, statistics = config.micro_batch_size, []
        for first in range(0, len(triples), size):
            part = triples[first : first + size]
            loss, more = distillation_loss(student, teacher, part, config.divergence, len(triples))
            loss.backward()  # B / ranks triples, and FSDP2 averages over the ranks: together 1 / B
            statistics += more
        teacher.reshard()  # frees its embedding and head, as backward() has freed the student's

        # "one step on (1/B) sum_i L_i"
        metrics["grad_norm"] = clip_gradients(student, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        copy_to_sampler(student, sampler)  # so the next rollouts are on-policy
        metrics["update_seconds"] = time.perf_counter() - start

        # Log and checkpoint
        metrics |= batch_means(triples, statistics, sampler.generation_config.eos_token_id, signals)
        interrupted = metrics.pop("signals") > 0
        due = interrupted or (config.save_every > 0 and step % config.save_every == 0)
        if rank == 0:
            log_step(output_dir, metrics, bar)
        if rank == 0 and (due or step in (1, config.steps)):
            keep_rollouts(output_dir / f"rollouts-{step}.jsonl", tokenizer, triples, statistics)
        if due and step < config.steps:
            save(output_dir / f"step-{step}", tokenizer, sampler, student, teacher, optimizer)
            if interrupted:
                raise KeyboardInterrupt(f"step {step} is saved, --resume goes on")
    save(output_dir, tokenizer, sampler, student)


# ---- Support: models -----------------------------------------------------------------------------


def load_tokenizer(name: str, teacher: str = "") -> Tokenizer:
    """The model's own tokenizer. Raises BadInput if it can't be read or saved, or if a teacher's
    tokenizer has other words."""
    with reading(name), tempfile.TemporaryDirectory() as trial:
        require_exists(name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer.save_pretrained(trial)  # better now than after the last step
    same = not teacher or load_tokenizer(teacher).get_vocab() == tokenizer.get_vocab()
    require(same, f"the tokenizer of {teacher} has other words than that of {name}")
    return tokenizer


def load_model(name: str, dtype: str = "auto", device: Any = "cpu") -> Model:
    """A causal language model in evaluation mode; dtype "auto" is the stored one. Raises BadInput
    if weights are missing, or if its logits are not final hidden states times its head."""
    with reading(name):
        settings = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        require(not hasattr(settings, "quantization_config"), "its weights are quantized")
        options = {"trust_remote_code": False, "ignore_mismatched_sizes": True, "dtype": dtype}
        options |= {"output_loading_info": True}  # for messages of one line
        model, info = AutoModelForCausalLM.from_pretrained(name, **options)
        lost = sorted([*info["missing_keys"], *(weight for weight, *_ in info["mismatched_keys"])])
        require(not lost, f"of its weights {lost[:1]} is missing or has another shape")
        if getattr(model.config, "output_router_logits", False):
            model.config.output_router_logits = False  # the method has no auxiliary loss
        head, ids = model.to(device).get_output_embeddings(), torch.arange(8, device=device)[None]
        with torch.no_grad():
            logits, states = model(ids, return_dict=True).logits, model.base_model(ids)[0]
        require(logits.isfinite().all(), "its logits are not finite: its weights are broken")
        error = (logits - states @ head.weight.T).abs().max() / logits.abs().max()
        exact = error < max(5e-7, torch.finfo(states.dtype).eps)  # no scale, no cap
        exact = exact and getattr(head, "bias", None) is None
        require(exact, "its logits are not final states times its head")
    if others := sorted(info["unexpected_keys"]):  # of a vision encoder, for one
        log = transformers.utils.logging.get_logger(__name__)
        log.warning_once(f"{name}: the text model alone is trained and saved: no {others[0]} ...")
    return model


def sampling_settings(
    options: Any, models: list[Model], tokenizer: Tokenizer, prompts: list[Ids]
) -> GenerationConfig:
    """Settings for generate(): those of the options, and the stop ids of all models and the
    tokenizer. They must replace model.generation_config, which fills in what generate() is not told
    (Qwen3 ships top-p 0.95 and top-k 20). Raises BadInput if prompts or stop ids fit no model."""
    found = [model.generation_config.eos_token_id for model in models] + [tokenizer.eos_token_id]
    found = [ids if isinstance(ids, list) else [ids] for ids in found]  # one id, several or None
    stop_ids = [stop for stop in dict.fromkeys(sum(found, [])) if stop is not None]
    length = max(map(len, prompts)) + options.max_new_tokens
    for model in models:
        name, sizes = model.name_or_path, model.config.get_text_config()
        fits = stop_ids and all(prompts) and max(map(max, [*prompts, stop_ids])) < sizes.vocab_size
        require(fits, f"{name} lacks tokens of its prompts, or its stop ids {stop_ids[:3]}")
        room = getattr(sizes, "max_position_embeddings", None) or length
        require(length <= room, f"{name} has {room} positions, prompt + --max_new_tokens {length}")
    names = ("temperature", "top_p", "top_k", "max_new_tokens")
    sampling = {name: getattr(options, name, 0) for name in names}  # top_k 0: the whole vocabulary
    ends = {"eos_token_id": stop_ids, "pad_token_id": stop_ids[0]}
    return GenerationConfig(do_sample=True, **ends, **sampling)


def shard(model: Model, config: Config) -> Scorer:
    """FSDP2: fp32 weights in equal parts on all ranks; a layer is gathered in --dtype when it runs,
    and its activations are computed again in the backward pass. The optimizer works in fp32: at a
    learning rate of 1e-6, few bf16 weights would change."""
    scorer, names = Scorer(model), model._no_split_modules or ()  # classes of decoder layers
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for layer in layers:
        layer.forward = partial(recompute_in_backward, layer.forward, use_reentrant=False)
    dtype = getattr(torch, config.dtype)
    precision = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    place = fsdp.CPUOffloadPolicy(CUDA) if config.offload else fsdp.OffloadPolicy()
    for module in (*layers, scorer):
        fsdp.fully_shard(module.float(), mp_policy=precision, offload_policy=place)
    return scorer


@torch.no_grad()
def copy_to_sampler(student: Scorer, sampler: Model) -> None:
    """Gathers the student's weights one by one, rounded to the sampler's dtype."""
    for weight, shards in zip(sampler.parameters(), student.parameters(), strict=True):
        weight.copy_(shards.to(weight.device).full_tensor())


def clip_gradients(student: Scorer, max_norm: float) -> float:
    """Scales gradients to a global L2 norm of at most max_norm; returns the norm before. Raises
    SystemExit if it is not finite."""
    grads = [weight.grad.to_local() for weight in student.parameters() if weight.grad is not None]
    # Norms of pieces, because on a CPU torch's fp32 norm of 2**28 numbers is 4% too low.
    pieces = [piece for grad in grads for piece in grad.flatten().split(2**18)]
    square = torch.nn.utils.get_total_norm(pieces).to(DEVICE) ** 2
    dist.all_reduce(square)
    norm = square.sqrt().item()
    if not math.isfinite(norm):  # nothing was updated
        raise SystemExit("opsdc.py: a gradient is not finite: look at model and --learning_rate")
    for grad in grads:
        grad.mul_(min(1.0, max_norm / (norm + 1e-6)))
    return norm


# ---- Support: checkpoints and log ----------------------------------------------------------------

# What --resume may change. Another rollout_batch_size draws other samples, equally distributed.
MAY_CHANGE = {"output_dir", "steps", "save_every", "offload", "resume"}
MAY_CHANGE |= {"micro_batch_size", "rollout_batch_size"}


def open_run(config: Config, tokenizer: Tokenizer, prompts: list) -> int:
    """Writes run.json, or compares the one that is there. Returns the step of the newest complete
    checkpoint, 0 without one. Raises BadInput if output_dir is of another run."""
    chats = digest(json.dumps([[chat for *_, chat in prompts], tokenizer.chat_template]))
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    run = {"config": asdict(config), "prompts": chats, "versions": versions}
    path = Path(config.output_dir).expanduser() / "run.json"
    dist.barrier()  # all ranks have passed all checks
    with reading(path):
        if dist.get_rank() == 0 and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(run, indent=2), encoding="utf-8")
        dist.barrier()
        before = json.loads(path.read_text(encoding="utf-8"))
        options = asdict(Config()) | before["config"]  # an option that it lacks was the default
        for name in options.keys() - MAY_CHANGE:
            same = options[name] == run["config"].get(name)
            require(same, f"it is of a run with --{name} {options[name]}")
        require(before["prompts"] == chats, "it is of a run with other prompts")
        # A step-N with .metadata is complete: torch writes it last.
        steps = [int(file.parent.name[5:]) for file in path.parent.glob("step-*/.metadata")]
        done = max(steps, default=0)
        require(done <= config.steps, f"{done} steps are done, more than --steps {config.steps}")
    return done


def training_state(student: Scorer, teacher: Scorer, optimizer: Any) -> dict[str, Any]:
    """Weights and AdamW's state, as torch.distributed.checkpoint reads and writes them."""
    adamw = get_optimizer_state_dict(student, optimizer)
    return {"student": student.state_dict(), "teacher": teacher.state_dict(), "adamw": adamw}


def load_checkpoint(directory: Path, student: Scorer, teacher: Scorer, optimizer: Any) -> None:
    """Reads what `save` has written, on any number of ranks."""
    with reading(directory, "can't be used, remove it to go on from an older one"):
        dcp.FileSystemReader(directory).read_metadata()  # a broken one, without torch's traceback
        dcp.load(training_state(student, teacher, optimizer), checkpoint_id=directory)


def save(directory: Path, tokenizer: Tokenizer, sampler: Model, student: Scorer, *state) -> None:
    """Saves a Hugging Face model; with teacher and optimizer, what --resume needs, else `finished`.
    Raises OSError if it can't be written."""
    with reading(directory, "can't be saved", OSError):
        if dist.get_rank() == 0:
            sampler.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            settings = student.model.generation_config  # as shipped, but for all stop ids
            settings.eos_token_id = sampler.generation_config.eos_token_id
            # not by save_pretrained(), which refuses some of those that are shipped
            settings.to_json_file(directory / "generation_config.json")
            if state:
                (directory / "run.json").write_bytes((directory.parent / "run.json").read_bytes())
        if state:
            dcp.save(training_state(student, *state), checkpoint_id=directory)
        elif dist.get_rank() == 0:
            (directory / "finished").touch()
    dist.barrier()


def batch_means(triples: list, statistics: list, stop_ids: Ids, signals: list) -> dict[str, float]:
    """Means over the batch of each completion's mean statistics and length, and of whether it was
    cut at max_new_tokens; the number of signals on all ranks; this rank's peak of GPU memory."""
    rows = []
    for (_, _, y), of_tokens in zip(triples, statistics, strict=True):
        row = {name: values.mean().item() for name, values in of_tokens.items()}
        cut = y[-1] not in stop_ids
        rows.append(row | {"completion_tokens": len(y), "truncated": cut, "signals": len(signals)})
    means = torch.tensor([[*row.values()] for row in rows], dtype=torch.float64).mean(0).to(DEVICE)
    dist.all_reduce(means)
    metrics = dict(zip(rows[0], (means / dist.get_world_size()).tolist(), strict=True))
    return metrics | {"peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9}


def keep_rollouts(path: Path, tokenizer: Tokenizer, triples: list, statistics: list) -> None:
    """Writes at most four completions, from short to long, with the divergence at each token."""
    nth = math.ceil(len(triples) / 4)
    with open(path, "w", encoding="utf-8") as file:
        for (_, _, y), of_tokens in zip(triples[::nth], statistics[::nth], strict=True):
            row = {"tokens": [tokenizer.decode([token]) for token in y]}
            print(json.dumps(row | {"divergence": of_tokens["loss"].tolist()}), file=file)


def log_step(output_dir: Path, metrics: dict[str, Any], bar: tqdm) -> None:
    """Writes row `step` of metrics.jsonl, in place of rows of steps that are done again."""
    with open(output_dir / "metrics.jsonl", "a+b") as log:
        log.seek(0)
        log.truncate(sum(map(len, log.readlines()[: metrics["step"] - 1])))
        log.write(json.dumps(metrics).encode() + b"\n")
    line = "step {step}: loss {loss:.4f}, {completion_tokens:.1f} tokens, {truncated:.0%} cut, "
    line += "entropy {student_entropy:.2f}, {rollout_seconds:.1f} + {update_seconds:.1f} s"
    bar.write(line.format(**metrics), file=sys.stderr)
    bar.update()


def catch_signals() -> list[int]:
    """Lists Ctrl-C, SIGTERM and SIGHUP as they come; the second of a kind ends the process."""
    caught: list[int] = []

    def catch(number: int, _: Any) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, catch)
    return caught


# ---- Support: data -------------------------------------------------------------------------------


class BadInput(ValueError):
    """Something that the user can mend, in one line; the exit code is 2."""


def require(condition: Any, message: str) -> None:
    """Raises BadInput with the message if the condition is false."""
    if not condition:
        raise BadInput(message)


@contextlib.contextmanager
def reading(source: Any, fault: str = "can't be used", kind: type = BadInput) -> Iterator[None]:
    """Turns any error into one of one line that names the source."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:
        if isinstance(error, dcp.CheckpointException):
            error = next(iter(error.failures.values()))[0]  # on one of the ranks
        message = " ".join(str(error).split())[:400] or type(error).__name__  # may list choices
        raise kind(f"{source} {fault}: {message}") from error


def require_exists(name: str) -> None:
    """Raises BadInput for a path of nothing; what may be an id on the hub is not looked up."""
    hub = name[:1] not in "./~" and name.count("/") < 2
    require(hub or Path(name).exists(), "there is no such file or directory")


def load_rows(source: str, split: str = "train") -> Iterator[Any]:
    """Rows of a .jsonl, .json or .csv file (also .gz) or of a .parquet file; or of a dataset, on
    the hub or in a directory: id, id:config or id:config:split. Raises BadInput for others."""
    with reading(source):
        kind = Path(source.lower().removesuffix(".gz")).suffix
        name, config, part = [*source.split(":", 2), "", ""][:3]
        if kind == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(source).iter_batches():
                yield from batch.to_pylist()
        elif kind in (".jsonl", ".json", ".csv"):  # datasets would make dates and numbers of texts
            with fsspec.open(source, "rt", compression="infer", encoding="utf-8-sig") as file:
                text = file.read().strip()
            commas = text.replace("\n", ",\n")  # an error in .jsonl then names the line
            rows = text if text.startswith("[") else f"[{commas}]"
            yield from csv.DictReader(io.StringIO(text)) if kind == ".csv" else json.loads(rows)
        else:
            require(not Path(name).is_file(), "its name ends in none of .jsonl .json .csv .parquet")
            require_exists(name)
            yield from datasets.load_dataset(name, config or None, split=part or split)


def text_of(content: Any) -> str:
    """The text of a chat's turn, joined where it comes in parts. Raises BadInput for others."""
    match content:
        case str(text) | {"type": "text", "text": str(text)}:
            text.encode()  # raises for a lone surrogate
            return text
        case list(parts):
            return "".join(map(text_of, parts))
    raise BadInput("a turn of its chat is not made of texts")


def read_chat(row: Any) -> Chat:
    """The problem of a row as a chat: the first of its columns `problem`, `question` and `prompt`
    that is not empty. Raises BadInput for other rows."""
    columns = row if isinstance(row, dict) else {}
    cells = [columns.get(name) for name in ("problem", "question", "prompt")]
    turns = next(filter(None, cells), [])
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    good = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    turns = turns if good else []
    chat = [{"role": turn.get("role"), "content": text_of(turn.get("content"))} for turn in turns]
    good = chat and chat[-1]["role"] == "user" and all(turn["content"].strip() for turn in chat)
    wish = "a problem, question or prompt that ends with a text of the user"
    require(good, f"its columns are {list(columns)}, without {wish}")
    return chat


def without_wrapper(text: str) -> str:
    """A problem without the words that DAPO-Math puts around it."""
    before, after = PROMPTS["paper"].split("{problem}")
    return text.removeprefix(before).removesuffix(after)


def digest(text: str) -> str:
    """The first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# The problems that DAPO-Math shares with MATH-500: digests of their text without white space.
IN_MATH500 = {"3361691622c4f773", "4384ad9cb9175c9f", "69c249395bcf1d7d", "f680069cf8b5a5ad"}


def encode_chats(tokenizer: Tokenizer, chats: list[Chat], **options) -> list[Ids]:
    """Token ids by the model's own template, up to the opening of the assistant's turn. Thinking is
    up to the model: Qwen3 writes <think> itself, DeepSeek-R1-Distill's template does. Control
    tokens in a problem's text (<|im_end|>, say) are encoded as plain text."""
    options |= {"sanitize_control_tokens": True, "return_dict": False}
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, **options)


def load_prompts(config: Config, tokenizer: Tokenizer) -> list[tuple[Ids, Ids, Chat]]:
    """For each problem the student's prompt, the teacher's, and the student's as a chat: each
    problem once, without those of MATH-500 and those that are too long. Raises BadInput for a row
    that is no problem, too few problems for a batch, and equal prompts without a --teacher."""
    chats = {}
    for number, row in enumerate(tqdm(load_rows(config.data), "rows", disable=QUIET), 1):
        with reading(f"{config.data}, row {number}"):
            chat = read_chat(row)
        chats.setdefault(json.dumps(prompt_pair(chat, "none")[0]), chat)  # wrapped or not: once
    require(chats, f"{config.data} has no rows")
    kept = []
    for chat in tqdm(chats.values(), "prompts", disable=QUIET):
        if digest("".join(without_wrapper(chat[-1]["content"]).split())) in IN_MATH500:
            continue
        pair = prompt_pair(chat, config.instruction, config.prompt)
        with reading(f"a prompt for {config.model}"):
            x, x_c = encode_chats(tokenizer, [*pair])
        fault = "equal prompts for student and teacher: look at --instruction and the chat template"
        require(config.teacher or x != x_c, fault)
        if len(x_c) <= config.max_prompt_tokens:
            kept.append((x, x_c, pair[0]))
    fault = f"{config.data} has {len(kept)} problems within --max_prompt_tokens, below --batch_size"
    require(len(kept) >= config.batch_size, fault)
    return kept


def batches(items: list, batch_size: int, seed: int) -> Iterator[list]:
    """Endless batches: every epoch in a new order, without an incomplete last batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(items), generator=generator).tolist()
        for start in range(0, len(items) - batch_size + 1, batch_size):
            yield [items[i] for i in order[start : start + batch_size]]


# ---- Command line --------------------------------------------------------------------------------


def check_options(config: Config) -> None:
    """Raises BadInput for options out of range or at odds, and for an output_dir in use."""
    may_be_0 = {"refresh_every", "save_every", "weight_decay", "seed"}
    for name, value in asdict(config).items():
        most = 1 if name in {"top_p", "learning_rate", "refresh_share"} else 2**32 - 1
        allowed = isinstance(value, str | bool) or 0 < value <= most
        least = "at least" if name in may_be_0 else "more than"
        fault = f"--{name} is {value}, but must be {least} 0 and at most {most}"
        require(allowed or (value == 0 and name in may_be_0), fault)
    prompt_pair([{"role": "user", "content": "1+1?"}], config.instruction, config.prompt)
    frozen, itself = config.refresh_every == 0, config.teacher == config.model
    require(frozen or not config.teacher, "--teacher is not refreshed: it needs --refresh_every 0")
    fault = "--teacher is --model and gets its prompts: there is nothing to learn"
    require(not itself or config.instruction != "none", fault)
    require(config.refresh_share == 1 or not frozen, "--refresh_share needs --refresh_every")
    fault = f"--batch_size {config.batch_size} is no multiple of the processes"
    require(config.batch_size % dist.get_world_size() == 0, fault)
    output_dir = Path(config.output_dir).expanduser()
    names = {path.name for path in output_dir.glob("*")}
    unfinished = config.resume and "run.json" in names and "finished" not in names
    fault = f"--output_dir {output_dir} is not empty: choose another, or --resume an unfinished run"
    require(not (names or output_dir.is_file()) or unfinished, fault)


def start_ranks(dtype: str) -> None:
    """Joins torchrun's process group, or makes a group of one process; claims this rank's GPU.
    Raises BadInput if the GPU lacks the dtype or the environment is incomplete."""
    transformers.utils.logging.disable_progress_bar()  # those of loading and saving
    transformers.utils.logging.set_verbosity_error()  # no table of weights that are left out
    if CUDA:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        able = dtype == "float32" or torch.cuda.is_bf16_supported(including_emulation=False)
        require(able, "this GPU has no bf16: choose --dtype float32")
        precision = "high" if dtype == "bfloat16" else "highest"
        torch.set_float32_matmul_precision(precision)  # high: TF32 for the gradient of the head
    launched = {"RANK", "WORLD_SIZE"} & os.environ.keys()
    alone = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    with reading("the environment of torchrun"):
        dist.init_process_group(timeout=timedelta(days=1), **alone)  # rollouts may take hours


def main(run: Callable[[Config], None] = train) -> None:
    """A flag for each field of Config; @file reads flags from a file, one a line.
    Exit code 2: bad input, no step was done. 1: ended by an error. 130: interrupted."""
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0], fromfile_prefix_chars="@")
    try:
        with reading("the command line"):
            config = Config(**vars(parser.parse_args()))
        start_ranks(config.dtype)
        run(config)
    except BadInput as error:
        parser.exit(2, f"opsdc.py: error: {error}\n")
    except KeyboardInterrupt as interrupt:
        parser.exit(130, f"opsdc.py: interrupted: {interrupt}\n")
    except OSError as error:  # on a full disk
        parser.exit(1, f"opsdc.py: {error}; --resume goes on from the newest step-N, if any\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
