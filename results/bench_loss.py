"""Time and memory of the loss at Qwen3's vocabulary: one command, one table.

    python results/bench_loss.py             # fp32 heads, as opsdc.py runs on a CPU
    python results/bench_loss.py bfloat16    # bf16 heads, as it runs on a GPU

Forward and backward of 1,024 tokens, hidden size 1,024, vocabulary 151,936, on one CPU thread:
    floor    the four matrix products that nobody can avoid (the logits of student and teacher, the
             gradients of hidden states and head), 128 positions at a time, and nothing else
    opsdc    opsdc.LinearDivergence
    plain    the definition: all logits, log_softmax, the sum; gradients by autograd
Each runs in a process of its own, three times in turn; the table has medians. Memory is the peak
resident size above what the inputs take (read from /proc, so Linux only).
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from opsdc import LinearDivergence

TOKENS, HIDDEN, VOCABULARY, ROUNDS = 1024, 1024, 151_936, 3


def floor(q_states, q_head, p_states, p_head, weights):
    grad_states, grad_head = torch.empty_like(q_states), torch.zeros_like(q_head)
    with torch.no_grad():
        for rows in torch.arange(TOKENS).split(128):
            q_logits, _ = q_states[rows] @ q_head.T, p_states[rows] @ p_head.T
            grad_states[rows] = q_logits @ q_head
            grad_head.addmm_(q_logits.T, q_states[rows])


def opsdc(q_states, q_head, p_states, p_head, weights):
    loss, _ = LinearDivergence.apply(q_states, q_head, p_states, p_head, weights, "reverse_kl")
    loss.backward()


def plain(q_states, q_head, p_states, p_head, weights):
    q_logps = (q_states @ q_head.T).float().log_softmax(-1)
    with torch.no_grad():
        p_logps = (p_states @ p_head.T).float().log_softmax(-1)
    ((q_logps.exp() * (q_logps - p_logps)).sum(-1) @ weights).backward()


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(field))


def measure(name: str, dtype: torch.dtype) -> None:
    """Runs one variant in this process; prints its seconds and megabytes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    q_head = torch.empty(VOCABULARY, HIDDEN, dtype=dtype).normal_(std=0.02).requires_grad_()
    p_head = q_head.detach().clone()
    q_states = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    p_states = q_states + 0.05 * torch.randn(TOKENS, HIDDEN, dtype=dtype)
    weights = torch.full((TOKENS,), 1 / TOKENS)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident("VmRSS"), time.perf_counter()
    globals()[name](q_states.requires_grad_(), q_head, p_states, p_head, weights)
    print(time.perf_counter() - start, resident("VmHWM") - before)


def main() -> None:
    dtype = sys.argv[1] if len(sys.argv) > 1 else "float32"
    if len(sys.argv) > 2:
        return measure(sys.argv[2], getattr(torch, dtype))
    runs = {"floor": [], "opsdc": [], "plain": []}
    for _ in range(ROUNDS):
        for name, results in runs.items():
            command = [sys.executable, __file__, dtype, name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append([float(figure) for figure in output.split()])
    medians = {
        name: [statistics.median(x) for x in zip(*r, strict=True)] for name, r in runs.items()
    }
    print(f"| {dtype} | seconds | x floor | MB | x floor |\n| --- | --- | --- | --- | --- |")
    for name, (seconds, memory) in medians.items():
        time_ratio, memory_ratio = seconds / medians["floor"][0], memory / medians["floor"][1]
        print(f"| {name} | {seconds:.1f} | {time_ratio:.2f} | {memory:.0f} | {memory_ratio:.2f} |")


if __name__ == "__main__":
    main()
