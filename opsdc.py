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

Where they differ             the paper                  its code                   here
    1. each L_i               divided by |y_i|           mean over tokens of 2 y_i  paper
    2. refresh                before step k              after step k               paper
    3. long rollouts          cut at 8,192, trained on   up to 30,000; over 10,240  paper
                                                         with prompt: dropped
    4. closing reminder       once in each prompt        twice in the teacher's     paper
    5. trained ids            not said                   text tokenized again       sampled ids
    6. 4 MATH-500 problems    not said                   trained on                 left out
    7. dropout                not said                   not looked at              off throughout
    8. problems               about 13,600               not looked at              all but 4

Beyond the paper: --refresh_share, an average as teacher; --teacher, another model; --rewrite, the
loss on rewritten rollouts: Mixed-Policy Distillation, arXiv 2605.08776. We had only its abstract:
the request to rewrite, which rewrites count, the direction of the KL (reverse) and the teacher's
prompt in the loss (x and c; with --instruction none, x) are our reading of it.

The method ends with `train`; its support follows.

    python opsdc.py @toy/args                 # a planted toy: CPU, no download, minutes
    torchrun --nproc-per-node 8 opsdc.py      # the paper's setting: Qwen3-8B, eight GPUs
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before training: no traceback

import datasets
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
DEVICE = torch.device("cuda" if CUDA else "cpu")
Model, Tokenizer = transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
Ids, Chat = list[int], list[dict[str, str]]  # token ids; turns with role and content
Triple = tuple[Ids, Ids, Ids]  # the student's prompt, the teacher's, the completion y


# ---- Configuration: the paper's hyperparameter table; the command line is made from it -----------


@dataclass(frozen=True)
class Config:
    """Options of a run, with the paper's values as defaults."""

    model: str = HfArg(default="Qwen/Qwen3-8B", help="hub id or local directory")
    data: str = HfArg(default="YouJiacheng/DAPO-Math-17k-dedup", help="hub id or file of problems")
    output_dir: str = HfArg(default="runs/opsdc", help="for metrics.jsonl and the trained model")
    instruction: str = HfArg(default="v1", help="c: v1, v2, percent:50, none or a text of your own")
    prompt: Literal["paper", "plain", "boxed"] = HfArg(
        default="paper", help="plain: the problem as it is; boxed: and a request for a boxed answer"
    )
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = HfArg(
        default="reverse_kl", help="reverse_kl is KL(student || teacher)"
    )
    teacher: str = HfArg(default="", help="a model of this vocabulary; needs --refresh_every 0")
    rewrite: bool = HfArg(
        default=False,
        help="MPD: train on rewrites of the rollouts by --teacher or else by the student. Request, "
        "direction of the KL and the teacher's prompt in the loss are our reading",
    )
    refresh_every: int = HfArg(default=50, help="M, in steps; 0 freezes the teacher")
    refresh_share: float = HfArg(default=1.0, help="the student's share in a refresh; 1: a copy")
    steps: int = HfArg(default=100, help="the paper converges near 100, in an epoch of about 425")
    batch_size: int = HfArg(default=32, help="B, problems a step, one rollout each")
    micro_batch_size: int = HfArg(default=1, help="rollouts a backward pass; more is faster")
    rollout_batch_size: int = HfArg(default=32, help="rollouts generated at once; for memory")
    max_prompt_tokens: int = HfArg(default=1024, help="problems with longer ones are left out")
    max_new_tokens: int = HfArg(default=8192, help="of a rollout; cut ones are trained on too")
    temperature: float = HfArg(default=1.0, help="of the rollout; the loss is always at 1")
    top_p: float = HfArg(default=1.0, help="of the rollout; 1 is the whole distribution")
    learning_rate: float = HfArg(default=1e-6, help="of AdamW, constant")
    weight_decay: float = HfArg(default=0.01, help="of AdamW, decoupled")
    max_grad_norm: float = HfArg(default=1.0, help="global L2 norm; larger gradients are clipped")
    save_every: int = HfArg(default=50, help="steps between checkpoints; 0 saves only the end")
    seed: int = HfArg(default=0, help="of data order and sampling")
    dtype: Literal["float32", "bfloat16"] = HfArg(
        default="bfloat16" if CUDA else "float32",
        help="of rollouts and of forward and backward passes; weights are updated in float32",
    )
    offload: bool = HfArg(default=False, help="keep fp32 weights and AdamW in host memory")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in output_dir")


# ---- Prompts: the paper's, verbatim --------------------------------------------------------------

TASK = "Solve the following math problem step by step."  # the instruction c takes its place
PROMPT = (
    "The last line of your response should be of the form Answer: $Answer (without "
    "quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
REQUEST = r"Please reason step by step, and put your final answer within \boxed{}."
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
}
INSTRUCTIONS |= {
    f"percent:{percent}": f"Solve the following math problem correctly using {percent}% fewer "
    "tokens than you normally would. Be more concise: cut unnecessary elaboration, redundant "
    "steps, and verbose explanations while preserving correctness."
    for percent in range(1, 100)
}


def prompt_pair(chat: Chat, instruction: str, style: str = "paper") -> tuple[Chat, Chat]:
    """The student's chat, x, and the teacher's, (x, c), for one problem.

    "What is 1 + 1?" with the instruction v1, shortened:
        x         Solve the following math problem step by step. The last line of your response ...
                  What is 1 + 1? ...
        (x, c)    Solve the following math problem concisely and correctly. Be direct: avoid ...
                  The last line of your response ... What is 1 + 1? ...
    Style `paper` reads the last turn only; `plain` keeps all turns, with c before the last text;
    `boxed` is `plain` with a request, usual in the field, behind the last text.
    With the instruction `none` the teacher gets x too. Raises ValueError for every other single
    word, except v1, v2 and percent:P (P: 1 to 99).
    """
    c, task = INSTRUCTIONS.get(instruction, instruction), f"{TASK} " if style == "paper" else ""
    if len(c.split()) < 2 and c != "none":
        raise ValueError(f"--instruction is {c!r}, not v1, v2, percent:1..99, none or a text")
    if style == "paper":
        problem = without_wrapper(chat[-1]["content"])
        chat = [{"role": "user", "content": task + PROMPT.format(problem=problem)}]
    if style == "boxed":
        text = f"{chat[-1]['content']}\n\n{REQUEST}"
        chat = [*chat[:-1], {**chat[-1], "content": text}]
    if c == "none":
        return chat, chat
    text = chat[-1]["content"].removeprefix(task)
    return chat, [*chat[:-1], {**chat[-1], "content": f"{c}\n\n{text}"}]


def encode_chats(tokenizer: Tokenizer, chats: list[Chat], **options) -> list[Ids]:
    """Token ids by the model's own template, up to the opening of the assistant's turn.

    Thinking is up to the model: Qwen3 writes <think> itself, DeepSeek-R1-Distill's template does.
    Control tokens in a problem's text (<|im_end|>, say) are encoded as plain text.
    """
    options |= {"sanitize_control_tokens": True, "return_dict": False}
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, **options)


# ---- Rollout -------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(model: Model, prompts: list[Ids], batch_size: int) -> list[Ids]:
    """Samples one completion of each prompt, batch_size at a time, by model.generation_config.
    A completion ends with its first stop id; one that was cut at max_new_tokens has none."""
    settings, completions = model.generation_config, []
    for start in range(0, len(prompts), batch_size):
        rows = [torch.tensor(prompt) for prompt in prompts[start : start + batch_size]]
        ones = [torch.ones_like(row) for row in rows]
        input_ids = pad_sequence(rows, True, settings.pad_token_id, padding_side="left")  # (B, P)
        attention_mask = pad_sequence(ones, True, 0, padding_side="left").to(DEVICE)  # (B, P)
        output = model.generate(input_ids.to(DEVICE), attention_mask=attention_mask)  # (B, P + T)
        for ids in output[:, input_ids.shape[1] :].tolist():
            stops = [t for t, token in enumerate(ids) if token in settings.eos_token_id]
            completions.append(ids[: stops[0] + 1] if stops else ids)  # padding follows a stop id
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
    return pad_sequence(rows, True, 0), pad_sequence(marks, True, False)


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
    """Logits (N, V) in fp32; rounded to bf16 they would bury the small divergence."""
    if not CUDA:
        return states.float() @ head.float().T
    return torch.mm(states, head.T, out_dtype=torch.float32)  # bf16 operands, on a GPU


CHUNK = 192  # positions whose logits exist at once


class ChunkedDivergence(torch.autograd.Function):
    """sum_t weight_t D(q_t, p_t) from states and heads, without the logits of all T positions.

    The forward pass computes the gradients too: for one chunk of positions at a time it forms the
    logits, differentiates `divergence`, and adds the result to the gradients of states and head.
    """

    @staticmethod
    def forward(ctx, student_states, student_head, teacher_states, teacher_head, weights, kind):
        """States (T, H), heads (V, H), weights (T,) -> loss; D and both entropies as (3, T)."""
        statistics = weights.new_empty(3, len(weights))
        grad_states = torch.empty_like(student_states)
        grad_head = torch.zeros_like(student_head, dtype=torch.float32)
        for start in range(0, len(weights), CHUNK):
            rows = slice(start, start + CHUNK)
            student_logits = project(student_states[rows], student_head).requires_grad_()  # (N, V)
            teacher_logits = project(teacher_states[rows], teacher_head)  # (N, V)
            with torch.enable_grad():
                logps = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
                nats = divergence(*logps, kind)  # (N,)
            (grad_logits,) = torch.autograd.grad(nats, student_logits, weights[rows])  # (N, V)
            statistics[0, rows] = nats.detach()
            statistics[1:, rows] = torch.stack([-(x.exp() * x).sum(-1) for x in logps]).detach()
            grad_states[rows] = grad_logits.to(student_head.dtype) @ student_head
            grad_head.addmm_(grad_logits.T, student_states[rows].float())
        ctx.save_for_backward(grad_states, grad_head)
        ctx.mark_non_differentiable(statistics)
        return statistics[0] @ weights, statistics  # Eq. (1); weight_t is 1 / |y_i| / batch_size

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        grad_states, grad_head = ctx.saved_tensors
        grad_head = (grad_head * grad_loss).to(grad_states.dtype)
        return grad_states * grad_loss, grad_head, None, None, None, None


def distillation_loss(
    student: Scorer, teacher: Scorer, triples: list[Triple], kind: str, batch_size: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What these completions add to 1/B sum_i 1/|y_i| sum_t D(q_t, p_t), in nats; B = batch_size.

    The y_i are fixed: no gradient goes through their sampling. Losses and gradients of
    micro-batches add up to the batch's. Returns also, without gradient, for each completion (3,
    |y_i|): D, the student's entropy and the teacher's at each of its tokens.
    """
    student_prompts, teacher_prompts, completions = zip(*triples, strict=True)
    student_states = student(*align(student_prompts, completions))  # (T, H), of q_t
    with torch.no_grad():
        teacher_states = teacher(*align(teacher_prompts, completions))  # (T, H), of p_t
    lengths = [len(y) for y in completions]
    weights = torch.tensor([1 / length / batch_size for length in lengths for _ in range(length)])
    loss, statistics = ChunkedDivergence.apply(
        student_states, student.head, teacher_states, teacher.head, weights.to(DEVICE), kind
    )
    return loss, list(statistics.split(lengths, dim=1))


# ---- Training ------------------------------------------------------------------------------------


@torch.no_grad()
def refresh(teacher: Scorer, student: Scorer, share: float) -> None:
    """Eq. (2): theta_bar <- theta. A share below 1 makes theta_bar an exponential average."""
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.lerp_(new, share)  # old + share (new - old); torch makes it a copy at 1


def train(run: SimpleNamespace) -> None:
    """Algorithm 1, from the step after run.done, with the models and prompts of `prepare`."""
    config, student, teacher, sampler = run.config, run.student, run.teacher, run.sampler
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data = enumerate(batches(run.prompts, config.batch_size, config.seed), 1)
    for step, batch in itertools.islice(data, run.done, config.steps):  # done + 1, ..., steps
        metrics = {"step": step}  # for the log

        # "if k mod M == 0, theta_bar <- theta"
        metrics["refreshed"] = config.refresh_every > 0 and step % config.refresh_every == 0
        if metrics["refreshed"]:
            refresh(teacher, student, config.refresh_share)  # Eq. (2)

        # "sample a batch of B problems": each rank takes its share, B / ranks
        student_prompts, teacher_prompts, chats = zip(*batch[rank::ranks], strict=True)

        # "one rollout y_i of each from the student"
        start = time.perf_counter()
        torch.manual_seed((config.seed * 100_000 + step) * 1_000 + rank)  # differs by step and rank
        rollouts = rollout(sampler, student_prompts, config.rollout_batch_size)
        completions = rewrite(run, chats, rollouts) if config.rewrite else rollouts
        metrics["rollout_seconds"] = time.perf_counter() - start

        # "student and teacher logits on the same y_i", "L_i = sum_t KL(q_t || p_t)"
        start = time.perf_counter()
        triples = list(zip(student_prompts, teacher_prompts, completions, strict=True))
        triples.sort(key=lambda triple: len(triple[-1]))  # less padding
        size, statistics = len(triples), []
        for first in range(0, len(triples), config.micro_batch_size):
            part = triples[first : first + config.micro_batch_size]
            # size is B / ranks, and FSDP2 averages gradients over the ranks: together 1 / B.
            loss, of_part = distillation_loss(student, teacher, part, config.divergence, size)
            loss.backward()
            statistics += of_part
        teacher.reshard()  # frees its embedding and head; a backward pass frees the student's

        # "one step on (1/B) sum_i L_i"
        metrics["grad_norm"] = clip_gradients(student, config.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        copy_to_sampler(student, sampler)  # so the next rollouts are on-policy
        metrics["update_seconds"] = time.perf_counter() - start

        finish_step(run, metrics, rollouts, triples, statistics)
    save(run)


# ---- Support: rewritten rollouts, beyond the paper -----------------------------------------------


def rewriting_chat(chat: Chat, solution: str) -> Chat:
    """The chat, its last text followed by a solution and by the request to rewrite it."""
    text = f"{chat[-1]['content']}\n\nHere is a solution:\n\n{solution}\n\nRewrite it as concisely "
    text += "as you can, in the same form. Keep every step that the answer needs."
    return [*chat[:-1], {**chat[-1], "content": text}]


def rewrite(run: SimpleNamespace, chats: list[Chat], rollouts: list[Ids]) -> list[Ids]:
    """Rewrites by --teacher, or else by the sampler; thinking is off if the template can switch it.
    A rollout is kept if its rewrite is empty, no shorter (as one cut at the limit), or of another
    form: one of the two without thinking."""
    decode = partial(run.tokenizer.batch_decode, skip_special_tokens=True)
    texts = decode(rollouts)
    asking = [rewriting_chat(*pair) for pair in zip(chats, texts, strict=True)]
    prompts = encode_chats(run.tokenizer, asking, enable_thinking=False)
    rewrites = rollout(run.rewriter, prompts, run.config.rollout_batch_size)
    return [
        z if new.strip() and len(z) < len(y) and ("</think>" in new) == ("</think>" in old) else y
        for y, old, z, new in zip(rollouts, texts, rewrites, decode(rewrites), strict=True)
    ]


# ---- Support: models -----------------------------------------------------------------------------


def load_model(name: str, dtype: torch.dtype | str, device: Any = DEVICE) -> Model:
    """A causal language model in evaluation mode; dtype "auto" is the stored one. Raises ValueError
    if weights are missing, or if its logits are not final hidden states times its head."""
    with reading(name):
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
        head, ids = model.to(device).get_output_embeddings(), torch.arange(8, device=device)[None]
        with torch.no_grad():
            logits, states = model(ids).logits, model.base_model(ids, use_cache=False)[0]
        error = (logits - states @ head.weight.T).abs().max() / logits.abs().max()
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{missing[0]} is missing")
        if not error < max(5e-7, torch.finfo(states.dtype).eps):  # a bias, a scale, a cap
            raise ValueError("its logits are not final states times its head")
    return model


def sampling_settings(model: Model, prompts: list[Ids], room: int, **sampling) -> GenerationConfig:
    """Settings for generate(): `sampling`, the model's own stop ids, and `room` new tokens unless
    `sampling` says fewer. They must replace model.generation_config, which fills in what generate()
    is not told (Qwen3 ships top-p 0.95 and top-k 20). Raises ValueError for ids that are no tokens
    of the model, and for prompts without `room` positions behind them."""
    name, options = model.name_or_path, model.config.get_text_config()
    shipped = model.generation_config.eos_token_id  # one id or several
    stop_ids = [] if shipped is None else torch.tensor(shipped).view(-1).tolist()
    if not stop_ids or not all(0 <= stop < options.vocab_size for stop in stop_ids):
        raise ValueError(f"{name} should stop at eos_token_id {shipped}, which is no token")
    if not all(prompts) or max(map(max, prompts)) >= options.vocab_size:
        raise ValueError(f"the tokenizer of {name} does not fit its model")
    longest, most = max(map(len, prompts)) + room, getattr(options, "max_position_embeddings", None)
    if longest > (most or longest):
        raise ValueError(f"prompt + --max_new_tokens: {longest}, but {name} has {most} positions")
    # A broken model may sample: its gradient will end the run with a clear message.
    sampling = {"max_new_tokens": room, "do_sample": True, "remove_invalid_values": True} | sampling
    return GenerationConfig(eos_token_id=stop_ids, pad_token_id=stop_ids[0], **sampling)


def shard(model: Model, dtype: str, offload: bool) -> Scorer:
    """FSDP2: fp32 weights in equal parts on all ranks; a layer is gathered in `dtype` when it runs,
    and its activations are computed again in the backward pass. The optimizer works in fp32: at a
    learning rate of 1e-6, few bf16 weights would change."""
    scorer, names = Scorer(model), model._no_split_modules or ()  # classes of decoder layers
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for layer in layers:
        layer.forward = partial(recompute_in_backward, layer.forward, use_reentrant=False)
    compute = getattr(torch, dtype)
    precision = fsdp.MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    place = fsdp.CPUOffloadPolicy(CUDA) if offload else fsdp.OffloadPolicy()
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
    # Norms of pieces: over 2**28 numbers at once, torch's fp32 norm on a CPU is 4% too low.
    pieces = [piece for grad in grads for piece in grad.flatten().split(2**20)]
    square = torch.nn.utils.get_total_norm(pieces).to(DEVICE) ** 2
    dist.all_reduce(square)
    norm = square.sqrt().item()
    if not math.isfinite(norm):
        remedy = "look at the model, or lower --learning_rate"
        raise SystemExit(f"opsdc.py: a gradient is not finite, nothing was updated: {remedy}")
    for grad in grads:
        grad.mul_(min(1.0, max_norm / (norm + 1e-6)))
    return norm


# ---- Support: checkpoints, log, signals ----------------------------------------------------------


def training_state(run: SimpleNamespace) -> dict[str, Any]:
    """Weights and AdamW's state, as torch.distributed.checkpoint reads and writes them."""
    adamw = get_optimizer_state_dict(run.student, run.optimizer)
    student, teacher = run.student.state_dict(), run.teacher.state_dict()
    return {"student": student, "teacher": teacher, "adamw": adamw}


def save(run: SimpleNamespace, step: int = 0) -> None:
    """Saves step-N: a model, and the state for --resume. Without a step: the final model. A
    directory named step-N is always complete. Raises SystemExit if it can't be written."""
    directory = run.output_dir / "unfinished" if step else run.output_dir
    try:
        if step:
            dcp.save(training_state(run), checkpoint_id=directory)
        if run.log:
            run.sampler.save_pretrained(directory)
            run.student.model.generation_config.save_pretrained(directory)  # as shipped
            run.tokenizer.save_pretrained(directory)  # last: marks a finished run
            if step:
                shutil.copy(run.output_dir / "run.json", directory)
                directory.rename(run.output_dir / f"step-{step}")
    except (Exception, dcp.CheckpointException) as error:  # each library fails in its own way
        message = f"opsdc.py: {directory} can't be saved: {one_line(error)}"
        raise SystemExit(f"{message}; --resume goes on from the newest step-N, if any") from error
    dist.barrier()


def finish_step(
    run: SimpleNamespace, metrics: dict, rollouts: list[Ids], triples: list, statistics: list
) -> None:
    """Logs a step, saves it if due, shows it last: a closed terminal must not lose a step. Raises
    KeyboardInterrupt after saving if a rank has caught a signal."""
    config, step, completions = run.config, metrics["step"], [y for _, _, y in triples]
    cut = [y[-1] not in run.sampler.generation_config.eos_token_id for y in rollouts]
    sums = [sum(cut), sum(map(len, rollouts)), sum(map(len, completions))]
    means = torch.stack([of_tokens.mean(1) for of_tokens in statistics]).mean(0).tolist()
    values = torch.tensor([*means, *(s / len(cut) for s in sums), len(run.signals)], dtype=float)
    dist.all_reduce(values)
    *values, signals = (values / dist.get_world_size()).tolist()
    names = "loss student_entropy teacher_entropy truncated completion_tokens trained_tokens"
    metrics |= dict(zip(names.split(), values, strict=True))
    tokens = metrics["completion_tokens"] * config.batch_size
    metrics["tokens_per_second"] = tokens / metrics["rollout_seconds"]
    metrics["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    last = step == config.steps
    due = not last and (signals or config.save_every and step % config.save_every == 0)
    if run.log:
        print(json.dumps(metrics), file=run.log, flush=True)
        if step == 1 or last or due:  # keeps at most four rollouts, from short to long
            nth = math.ceil(len(completions) / 4)
            with open(run.output_dir / f"rollouts-{step}.jsonl", "w", encoding="utf-8") as file:
                for y, (nats, *_) in zip(completions[::nth], statistics[::nth], strict=True):
                    tokens = [run.tokenizer.decode([token]) for token in y]
                    print(json.dumps({"tokens": tokens, "divergence": nats.tolist()}), file=file)
    if due:
        save(run, step)
    if run.log:
        line = "step {step}: loss {loss:.4f}, {completion_tokens:.1f} tokens, {truncated:.0%} cut, "
        line += "entropy {student_entropy:.2f}, {rollout_seconds:.1f} + {update_seconds:.1f} s"
        try:
            run.bar.write(line.format(**metrics), sys.stderr)
            run.bar.update()
        except OSError:  # nobody reads any more
            run.bar.disable, sys.stderr = True, open(os.devnull, "w")
    if signals and not last:
        raise KeyboardInterrupt(f"step {step} is saved, --resume goes on")


def catch_signals(caught: list[float]) -> None:
    """Makes Ctrl-C, SIGTERM and SIGHUP end the run after its step, and a second one at once.
    Signals within one second count as one: torchrun forwards duplicates."""

    def catch(*_) -> None:
        caught.append(time.monotonic())
        if caught[-1] > caught[0] + 1:
            raise KeyboardInterrupt("the unfinished step is lost, --resume goes on")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, catch)


# ---- Support: data -------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or of its cause's where it has one."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]  # on one of the ranks
    while error.__cause__:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Turns any error into a ValueError of one line that names the source."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:
        raise ValueError(f"{source} can't be used: {one_line(error)}") from None


def load_rows(source: str, split: str = "train") -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json or .parquet file, as written, or of the split of a hub dataset."""
    with reading(source):
        if source.endswith(".parquet"):
            return pyarrow.parquet.ParquetFile(source).read().to_pylist()
        if source.endswith((".jsonl", ".json")):
            text = Path(source).read_text(encoding="utf-8").strip()
            commas = text.replace("\n", ",\n")  # so an error names the line
            return json.loads(text if text.startswith("[") else f"[{commas}]")
        return datasets.load_dataset(source, split=split).to_list()


def read_chats(source: str, rows: list[dict[str, Any]]) -> list[Chat]:
    """The problems as chats, from a column `problem`, `question` or `prompt` of texts or chats.
    Raises ValueError that names a row without a text of the user at its end."""
    chats = []
    for number, row in enumerate(rows, 1):
        with reading(f"{source}, row {number}"):
            cell = row.get("problem", row.get("question", row.get("prompt", "")))
            chat = [{"role": "user", "content": cell}] if isinstance(cell, str) else list(cell)
            if chat[-1]["role"] != "user" or not all(turn["content"].strip() for turn in chat):
                wish = "a problem, question or prompt that ends with a text of the user"
                raise ValueError(f"its columns are {list(row)}, without {wish}")
            chats.append(chat)
    return chats


def without_wrapper(text: str) -> str:
    """A problem without the words that DAPO-Math puts around it."""
    before, after = f"{TASK} {PROMPT}".split("{problem}")
    return text.removeprefix(before).removesuffix(after)


def digest(text: str) -> str:
    """The first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# The problems that DAPO-Math shares with MATH-500: digests of their text without white space.
IN_MATH500 = {"3361691622c4f773", "4384ad9cb9175c9f", "69c249395bcf1d7d", "f680069cf8b5a5ad"}


def load_prompts(config: Config, tokenizer: Tokenizer) -> list[tuple[Ids, Ids, Chat]]:
    """For each problem the student's prompt, the teacher's, and the student's as a chat; without
    those that are too long. Raises ValueError if too few are left for a batch, or if a pair of
    prompts is equal without a --teacher."""
    pairs = [
        prompt_pair(chat, config.instruction, config.prompt)
        for chat in read_chats(config.data, load_rows(config.data))
        if digest("".join(without_wrapper(chat[-1]["content"]).split())) not in IN_MATH500
    ]
    with reading(f"a prompt for {config.model}"):
        prompts = [(*encode_chats(tokenizer, list(pair)), pair[0]) for pair in pairs]
        if not config.teacher and any(x == x_c for x, x_c, _ in prompts):
            raise ValueError("student and teacher get equal prompts, which needs a --teacher")
    kept = [prompt for prompt in prompts if len(prompt[1]) <= config.max_prompt_tokens]
    if len(kept) < config.batch_size:
        found = f"{len(kept)} problems of {config.data} are within --max_prompt_tokens"
        raise ValueError(f"{found}, too few for --batch_size {config.batch_size}")
    return kept


def batches(items: list, batch_size: int, seed: int) -> Iterator[list]:
    """Endless batches: every epoch in a new order, without an incomplete last batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(items), generator=generator).tolist()
        for start in range(0, len(items) - batch_size + 1, batch_size):
            yield [items[i] for i in order[start : start + batch_size]]


# ---- Support: preparation and command line -------------------------------------------------------

# What --resume may change. Another rollout_batch_size draws other samples, equally distributed.
MAY_CHANGE = {"output_dir", "steps", "save_every", "offload", "resume", "micro_batch_size"}
MAY_CHANGE |= {"rollout_batch_size"}


def start_ranks() -> None:
    """Joins torchrun's process group, or makes a group of one process; claims this rank's GPU.
    Raises ValueError if the GPU has no bf16 or the environment is incomplete."""
    if CUDA:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError("this GPU has no bf16")
        torch.set_float32_matmul_precision("high")  # TF32 for the gradient of the head
    launched = {"RANK", "WORLD_SIZE"} & os.environ.keys()
    alone = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(timeout=timedelta(days=1), **alone)  # rollouts may take hours


def check_options(config: Config) -> None:
    """Raises ValueError for an option out of range, and for an output_dir that is not empty."""
    may_be_0 = {"refresh_every", "save_every", "weight_decay", "seed"}
    at_most_1 = {"top_p", "learning_rate", "refresh_share"}
    for name, value in asdict(config).items():
        largest = 1 if name in at_most_1 else 2**32 - 1
        if isinstance(value, str | bool) or value == 0 and name in may_be_0 or 0 < value <= largest:
            continue
        raise ValueError(f"--{name} is {value}, but must be more than 0, at most {largest}")
    if config.teacher and config.refresh_every:
        raise ValueError("--teacher is not refreshed: it needs --refresh_every 0")
    if config.batch_size % dist.get_world_size():
        raise ValueError(f"--batch_size {config.batch_size} is no multiple of the processes")
    output_dir = Path(config.output_dir).expanduser()
    present = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    unfinished = "run.json" in present and "tokenizer_config.json" not in present
    if not config.output_dir or present and not (config.resume and unfinished):
        remedy = "choose another, or --resume an unfinished run"
        raise ValueError(f"--output_dir {output_dir} is not empty: {remedy}")


def claim_output(run: SimpleNamespace) -> None:
    """Locks run.json until the process ends; it holds the configuration and the data's digest.
    Raises ValueError if another process has the lock, or if the file is of another run."""
    run.output_dir.mkdir(parents=True, exist_ok=True)
    pairs = [pair for *pair, _ in run.prompts]
    now = {"config": asdict(run.config), "prompts": digest(json.dumps(pairs))}
    with reading(path := run.output_dir / "run.json"):
        run.lock = open(path, "a+" if run.config.resume else "x+", encoding="utf-8")
        try:
            fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("another run is using it") from None
        run.lock.seek(0)
        text = run.lock.read()
        if not text:
            now["versions"] = {m.__name__: m.__version__ for m in (torch, transformers)}
            print(json.dumps(now, indent=2), file=run.lock, flush=True)
            return
        before = json.loads(text)
        options = asdict(Config()) | before["config"]  # an option that it lacks was the default
        for name in options.keys() - MAY_CHANGE:
            if options[name] != now["config"].get(name):
                raise ValueError(f"it is of a run with --{name} {options[name]}")
        if before["prompts"] != now["prompts"]:
            raise ValueError("it is of a run with other data or another chat template")


def prepare(config: Config) -> SimpleNamespace:
    """Loads what `train` needs. Bad input is refused here, before anything is written."""
    start_ranks()
    check_options(config)
    run = SimpleNamespace(config=config, output_dir=Path(config.output_dir).expanduser())
    with reading(config.model):
        run.tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
    run.prompts = load_prompts(config, run.tokenizer)

    # student: fp32 weights, a part on each rank; teacher: the same, without gradients.
    run.student = shard(load_model(config.model, "auto", "cpu"), config.dtype, config.offload)
    source = config.teacher or config.model
    teacher = load_model(source, "auto", "cpu").requires_grad_(False)
    run.teacher = shard(teacher, config.dtype, config.offload)  # theta_bar <- theta
    with reading(source):
        words = AutoTokenizer.from_pretrained(source, trust_remote_code=False).get_vocab()
        if words != run.tokenizer.get_vocab() or len(run.student.head) != len(run.teacher.head):
            raise ValueError(f"its vocabulary is not that of {config.model}")
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    run.optimizer = torch.optim.AdamW(run.student.parameters(), **options)

    # sampler: the student's weights in --dtype, whole on every rank; generates, is saved.
    run.sampler = run.rewriter = load_model(config.model, config.dtype)
    if config.rewrite and config.teacher:
        run.rewriter = load_model(config.teacher, config.dtype)
    sampling = {name: getattr(config, name) for name in ("temperature", "top_p", "max_new_tokens")}
    prompts = [ids for x, x_c, _ in run.prompts for ids in (x, x_c)]
    room = config.max_new_tokens + config.rewrite * (config.max_new_tokens + 128)  # and the request
    for model in (run.sampler, run.rewriter, run.teacher.model):  # the last one only to be checked
        model.generation_config = sampling_settings(model, prompts, room, top_k=0, **sampling)
    if config.teacher:  # the student learns to stop where the teacher does
        stop_ids = run.sampler.generation_config.eos_token_id
        stop_ids = sorted({*stop_ids, *run.teacher.model.generation_config.eos_token_id})
        for model in (run.sampler, run.rewriter, run.student.model):
            model.generation_config.eos_token_id = stop_ids
    dist.barrier()  # all ranks have passed all checks
    if dist.get_rank() == 0:
        claim_output(run)
    dist.barrier()
    names = (path.name[5:] for path in run.output_dir.glob("step-*"))
    run.done = max((int(name) for name in names if name.isdecimal()), default=0)
    if run.done:  # saved by any number of ranks
        with reading(directory := run.output_dir / f"step-{run.done}"):
            dcp.load(training_state(run), checkpoint_id=directory)  # into the tensors in use
        copy_to_sampler(run.student, run.sampler)
    run.signals, run.log = [], None  # times of Ctrl-C and the like; metrics.jsonl on the first rank
    if dist.get_rank() == 0:
        run.log = open(run.output_dir / "metrics.jsonl", "a+", encoding="utf-8")
        run.log.seek(0)
        run.log.truncate(sum(len(row) for row in run.log.readlines()[: run.done]))
        tqdm.write(f"{len(run.prompts)} problems", sys.stderr)
    run.bar = tqdm(initial=run.done, total=config.steps, unit="step", disable=not run.log)
    transformers.utils.logging.disable_progress_bar()  # of save_pretrained: it may fail to write
    return run


def main() -> None:
    """A flag for each field of Config; @file reads flags from a file, one a line.
    Exit code 2: bad input, no step was done. 1: ended by an error. 130: interrupted."""
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0], fromfile_prefix_chars="@")
    try:
        run = prepare(Config(**vars(parser.parse_args())))
    except Exception as error:
        if sys.flags.dev_mode:  # python -X dev opsdc.py ... shows the traceback
            raise
        parser.exit(2, f"opsdc.py: error: {one_line(error)}\n")
    catch_signals(run.signals)
    try:
        with run.bar:
            train(run)
    except KeyboardInterrupt as interrupt:
        parser.exit(130, f"opsdc.py: interrupted: {interrupt}\n")
    except torch.OutOfMemoryError:
        remedy = "lower --rollout_batch_size if in a rollout, else --micro_batch_size, or --offload"
        parser.exit(1, f"opsdc.py: out of GPU memory: {remedy}; go on with --resume\n")
    except OSError as error:  # of the log, on a full disk
        parser.exit(1, f"opsdc.py: {error}; --resume goes on from the newest step-N, if any\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
