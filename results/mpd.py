"""Mixed-Policy Distillation (arXiv 2605.08776) on top of opsdc.py, as we read its abstract.

The student samples a rollout. The teacher, or without --teacher the student, reads the student's
chat, the rollout and a request to rewrite it concisely. The loss of opsdc.py is taken on the
rewrite. We had only the abstract. These are our reading: the request, which rewrites count, the
direction of the KL (reverse), the teacher's prompt in the loss (x and c; x, if c is none).

    python results/mpd.py @toy/rewrite      # the flags are those of opsdc.py

A rewriting --teacher is whole on every GPU and also reads the rollout: its KV cache is twice as
large, so lower --rollout_batch_size. metrics.jsonl is about what is trained on; rewrites.jsonl has
the mean length of the student's own rollouts and the share of them that were replaced, by step.
"""

import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import opsdc  # noqa: E402

REQUEST = "Rewrite it as concisely as you can, in the same form. "
REQUEST += "Keep every step that the answer needs."


def rewriting_chat(chat: opsdc.Chat, solution: str) -> opsdc.Chat:
    """The chat, its last text followed by a solution and by the request to rewrite it."""
    *turns, last = chat
    text = f"{last['content']}\n\nHere is a solution:\n\n{solution}\n\n{REQUEST}"
    return [*turns, {**last, "content": text}]


def rewrite(rewriter, tokenizer, chats: list, rollouts: list, batch_size: int) -> list[opsdc.Ids]:
    """Rewrites rollouts by a model; thinking is off if the template can switch it. A rollout stays
    if its rewrite is empty, no shorter (as one cut at the limit), or of another form: one of the
    two without thinking, or with ids that are no tokens."""
    decode, completions = partial(tokenizer.batch_decode, skip_special_tokens=True), []
    texts = decode(rollouts)
    asking = [rewriting_chat(chat, text) for chat, text in zip(chats, texts, strict=True)]
    switch = "off" if "enable_thinking" in str(tokenizer.chat_template) else "template"
    prompts = opsdc.encode_chats(tokenizer, asking, switch)
    rewrites = opsdc.rollout(rewriter, prompts, batch_size)
    for old, was, new, text in zip(rollouts, texts, rewrites, decode(rewrites), strict=True):
        same_form = ("</think>" in text) == ("</think>" in was)
        shorter = text.strip() and len(new) < len(old)
        good = shorter and same_form and max(new) < len(tokenizer)
        completions.append(new if good else old)
    return completions


def mixed_policy(config: opsdc.Config) -> Callable[[opsdc.Model, list, int], list[opsdc.Ids]]:
    """Completions for opsdc.train: the student's rollouts, rewritten where that shortens them.
    Raises BadInput if prompt, rollout, request and rewrite are too long for the rewriter."""
    opsdc.check_options(config)
    tokenizer, name = opsdc.load_tokenizer(config.model), config.teacher or config.model
    chats = {tuple(x): chat for x, _, chat in opsdc.load_prompts(config, tokenizer)}
    with opsdc.blame(name):
        sizes = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
    need = max(map(len, chats)) + 2 * config.max_new_tokens + 128  # 128 for the request
    room = getattr(sizes, "max_position_embeddings", None) or need
    fault = f"{name} has {room} positions, prompt + rollout + request + rewrite {need}"
    opsdc.require(need <= room, fault)
    teacher = opsdc.load_model(name, config.dtype, opsdc.DEVICE) if config.teacher else None
    output_dir = Path(config.output_dir).expanduser()
    saved = [int(file.parent.name[5:]) for file in output_dir.glob("step-*/.metadata")]
    steps = itertools.count(max(saved, default=0) + 1)  # --resume goes on after the newest

    def complete(sampler: opsdc.Model, prompts: list, batch_size: int) -> list[opsdc.Ids]:
        rewriter, asked = teacher or sampler, [chats[tuple(prompt)] for prompt in prompts]
        rewriter.generation_config = sampler.generation_config
        rollouts = opsdc.rollout(sampler, prompts, batch_size)
        completions = rewrite(rewriter, tokenizer, asked, rollouts, batch_size)
        rows = [[len(y), z is not y] for y, z in zip(rollouts, completions, strict=True)]
        means = torch.tensor(rows, dtype=torch.float64).mean(0).to(opsdc.DEVICE)
        dist.all_reduce(means)
        tokens, rewritten = (means / dist.get_world_size()).tolist()
        if dist.get_rank() == 0:
            row = {"step": next(steps), "rollout_tokens": tokens, "rewritten": rewritten}
            with open(output_dir / "rewrites.jsonl", "a+b") as log:  # drops redone steps
                log.seek(0)
                log.truncate(sum(map(len, log.readlines()[: row["step"] - 1])))
                log.write(json.dumps(row).encode() + b"\n")
        return completions

    return complete


def main() -> None:
    opsdc.main(lambda config: opsdc.train(config, mixed_policy(config)))


if __name__ == "__main__":
    opsdc.__doc__ = __doc__  # --help begins with its first line
    main()
