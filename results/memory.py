"""GB per GPU that opsdc.py takes for Qwen3's sizes: arithmetic, not a measurement.

    python results/memory.py

N parameters: the bf16 weights of student and teacher are 4 N bytes. The fp32 master, gradient and
two moments of AdamW are 16 N bytes, shared out over the GPUs, or in host memory with --offload. On
top of these stands the larger of
  - the rollout: its KV cache at 1,024 prompt and 8,192 new tokens, for --rollout_batch_size rows;
  - the update, at --micro_batch_size 1 and as many tokens: the checkpointed layer inputs, one
    layer's activations and their gradients, the largest tensor's gradient in bf16 and fp32, and
    the logits' chunks and blocks (opsdc.CHUNK, opsdc.BLOCK).
A setting fits if it leaves 8% of the GPU free, for CUDA's context and fragmentation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import opsdc  # noqa: E402

VOCABULARY, HEAD_DIM, KV_HEADS, TOKENS, BATCH = 151_936, 128, 8, 1024 + 8192, 32
SHAPES = {  # hidden, intermediate, layers, heads, tied embeddings
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}
SETTINGS = [  # model, GPUs, GB each
    *(("0.6B", 1, 16), ("1.7B", 1, 16), ("4B", 1, 24), ("8B", 1, 80), ("8B", 1, 141)),
    *(("8B", 8, 80), ("8B", 8, 141), ("14B", 8, 80), ("14B", 8, 141), ("32B", 8, 80)),
    ("32B", 8, 141),
]


def parameters(size: str) -> int:
    hidden, intermediate, layers, heads, tied = SHAPES[size]
    attention = 2 * hidden * heads * HEAD_DIM + 2 * hidden * KV_HEADS * HEAD_DIM + 2 * HEAD_DIM
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    return layers * layer + hidden + VOCABULARY * hidden * (1 if tied else 2)


def gigabytes(size: str, gpus: int, offload: bool, rows: int) -> dict[str, float]:
    """GB per GPU: weights, optimizer, rollout, update and their peak."""
    hidden, intermediate, layers, heads, _ = SHAPES[size]
    layer_activations = 2 * TOKENS * (3 * intermediate + 6 * hidden + 2 * heads * HEAD_DIM)
    logits = 4 * (2 * opsdc.CHUNK["cuda"] + 6 * opsdc.BLOCK["cuda"]) + 2 * opsdc.CHUNK["cuda"]
    parts = {
        "weights": 4 * parameters(size),
        "optimizer": 0 if offload else 16 * parameters(size) / gpus,
        "rollout": rows * TOKENS * layers * KV_HEADS * HEAD_DIM * 2 * 2,
        "update": 2 * TOKENS * layers * hidden
        + 2 * layer_activations
        + (2 + 4) * VOCABULARY * hidden
        + logits,
    }
    parts["peak"] = parts["weights"] + parts["optimizer"] + max(parts["rollout"], parts["update"])
    return {name: size_in_bytes / 1e9 for name, size_in_bytes in parts.items()}


def main() -> None:
    print("| Qwen3 | GPUs | AdamW on | rows | weights | AdamW | rollout | update | peak | fits |")
    print("| --- |" + " --- |" * 9)
    for size, gpus, memory in SETTINGS:
        choices = [(o, rows) for o in (False, True) for rows in (32, 16, 8, 4, 2, 1)]
        choices = [(o, rows) for o, rows in choices if rows <= BATCH // gpus]
        fitting = [c for c in choices if gigabytes(size, gpus, *c)["peak"] < 0.92 * memory]
        offload, rows = fitting[0] if fitting else (True, 1)
        figures = " | ".join(f"{x:.1f}" for x in gigabytes(size, gpus, offload, rows).values())
        where = "host" if offload else "GPU"
        host = "" if not offload else f", {16 * parameters(size) / 1e9:.0f} GB in hosts"
        print(
            f"| {size} | {gpus} x {memory} GB | {where} | {rows} | {figures} "
            f"| {'yes' if fitting else 'no'}{host} |"
        )


if __name__ == "__main__":
    main()
