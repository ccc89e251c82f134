"""Time and memory of opsdc.py's parts on the device that is there; each subcommand prints a table.

    python results/bench.py loss       # beside its four matrix products, plain autograd and TRL
    python results/bench.py update     # beside TRL's SDFTTrainer: seconds and memory
    python results/bench.py parity     # beside TRL's SDFTTrainer: loss and gradient, on the toy
    python results/bench.py memory     # GB of Qwen3's sizes: arithmetic, no measurement
    python results/bench.py rollout --config config.json    # tokens a second, by engine and rows
    python results/bench.py step --config config.json       # three steps, --offload or not

The weights of `--config`'s model are drawn at random. README.md says what the tables show.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers as hf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import opsdc  # noqa: E402

TOY = str(ROOT / "toy")
Arguments = argparse.Namespace
TRL = importlib.util.find_spec("trl") is not None
if TRL:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer, loss_utils


class Meter(hf.TrainerCallback):
    """Processor seconds (on a GPU: seconds) and peak MB above the start; the last gradients."""

    def on_step_begin(self, *_, **__) -> None:
        if opsdc.CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.start = self.now_and_megabytes("VmRSS")

    def on_pre_optimizer_step(self, *_, model: torch.nn.Module, **__) -> None:
        self.gradients = {name: weight.grad for name, weight in model.named_parameters()}

    def on_step_end(self, *_, **__) -> None:
        end = self.now_and_megabytes("VmHWM")
        self.figures = [after - before for after, before in zip(end, self.start, strict=True)]

    def now_and_megabytes(self, field: str) -> tuple[float, float]:
        if opsdc.CUDA:
            torch.cuda.synchronize()
            return time.perf_counter(), torch.cuda.max_memory_allocated() / 1e6
        lines = Path("/proc/self/status").read_text().splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith(field))
        return time.process_time(), kilobytes / 1e3


def row(*cells: Any, header: bool = False) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)
    if header:
        row(*["---"] * len(cells))


def compare(variants: list[str], rounds: int) -> None:
    """Runs each variant in processes of its own, in turn; prints medians beside the first one's."""
    results: dict[str, list] = {name: [] for name in variants}
    for name in variants * rounds:
        command = [sys.executable, *sys.argv, "--only", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[name].append(json.loads(output.splitlines()[-1]))
    row("", "seconds", f"x {variants[0]}", "MB", f"x {variants[0]}", header=True)
    medians = {n: [statistics.median(x) for x in zip(*r, strict=True)] for n, r in results.items()}
    seconds, memory = medians[variants[0]]
    for name, (s, mb) in medians.items():
        row(name, f"{s:.2f}", f"{s / seconds:.2f}", f"{mb:,.0f}", f"{mb / memory:.2f}")


# ---- Loss ----------------------------------------------------------------------------------------


def loss_and_gradient(name: str, q, q_head, p, p_head, weights) -> None:
    """`products`: only the matrix products that nobody can avoid."""
    if name == "opsdc":
        opsdc.ChunkedDivergence.apply(q, q_head, p, p_head, weights, "reverse_kl")[0].backward()
    elif name == "plain":
        q_logps, p_logps = (
            (x @ h.T).float().log_softmax(-1) for x, h in ((q, q_head), (p, p_head))
        )
        (opsdc.divergence(q_logps, p_logps, "reverse_kl") @ weights).backward()
    elif name == "trl":
        loss = loss_utils.compute_full_logit_self_distillation_loss
        (loss(q @ q_head.T, p @ p_head.T, distillation_alpha=1.0) @ weights).backward()
    else:
        grad_states, grad_head = torch.empty_like(q), torch.zeros_like(q_head, dtype=torch.float32)
        with torch.no_grad():
            for part in torch.arange(len(q), device=q.device).split(128):
                logits, _ = opsdc.project(q[part], q_head), opsdc.project(p[part], p_head)
                grad_states[part] = logits.to(q_head.dtype) @ q_head
                grad_head.addmm_(logits.T, q[part].float())


def bench_loss(arguments: Arguments) -> None:
    """Forward and backward from final states and heads, in opsdc.py's compute dtype."""
    if not arguments.only:
        return compare(["products", "opsdc", "plain", *["trl"] * TRL], arguments.rounds)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = {"device": opsdc.DEVICE, "dtype": opsdc.DTYPE}
    p_head = torch.empty(arguments.vocabulary, arguments.hidden, **options).normal_(std=0.02)
    q_head = p_head.clone().requires_grad_()
    q = torch.randn(arguments.tokens, arguments.hidden, **options)
    p, q = q + 0.05 * torch.randn_like(q), q.requires_grad_()
    weights, meter = torch.full_like(q[:, 0].detach().float(), 1 / arguments.tokens), Meter()
    for _ in range(2 if opsdc.CUDA else 1):  # a GPU's first call loads its kernels
        q.grad = q_head.grad = None
        meter.on_step_begin()
        loss_and_gradient(arguments.only, q, q_head, p, p_head, weights)
        meter.on_step_end()
    print(meter.figures)


# ---- Update, beside TRL --------------------------------------------------------------------------


def fixed_completions(count: int, length: int, vocabulary: int) -> list[opsdc.Ids]:
    """Random ids; every second completion is half as long."""
    ids = torch.randint(5, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    return [y[: length // (1 + i % 2)].tolist() for i, y in enumerate(ids)]


def update_trl(model: str, chats: list[opsdc.Chat], length: int, steps: int) -> Meter:
    """`steps` updates by SDFTTrainer, set up for the method, with fixed completions."""

    class Trainer(SDFTTrainer):
        def _generate(self, prompt_ids):
            rollouts = fixed_completions(len(prompt_ids), length, self.model.config.vocab_size)
            return prompt_ids, rollouts

        def compute_loss(self, *arguments, **options):
            loss = super().compute_loss(*arguments, **options)
            meter.loss = loss.item()
            return loss

    meter, count = Meter(), len(chats)
    method = {"teacher_model_kind": "ema", "teacher_update_rate": 1.0, "teacher_sync_steps": 50}
    method |= {"distillation_mode": "full_logits", "distillation_alpha": 1.0, "max_steps": steps}
    method |= {"distillation_is_clip": None, "num_loss_tokens_to_skip": 0, "num_generations": 1}
    method |= {"teacher_prompt_template": "{privileged_context}\n\n{prompt}", "weight_decay": 0.01}
    method |= {"max_completion_length": length, "per_device_train_batch_size": count}
    method |= {"shuffle_dataset": False, "num_train_epochs": steps, "max_grad_norm": 1.0}
    method |= {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "save_strategy": "no"}
    method |= {"use_cpu": not opsdc.CUDA, "bf16": opsdc.CUDA, "report_to": "none"}
    rows = {"prompt": chats, "privileged_context": [opsdc.INSTRUCTIONS["v1"]] * count}
    Trainer(
        model=model,
        args=SDFTConfig(output_dir=tempfile.mkdtemp(), gradient_checkpointing=True, **method),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=hf.AutoTokenizer.from_pretrained(model),
        callbacks=[meter],
    ).train()
    return meter


def update_opsdc(model: str, chats: list[opsdc.Chat], length: int, steps: int) -> Meter:
    """The same by opsdc.py: loss, backward, clipping, AdamW."""
    opsdc.start_ranks()
    student = opsdc.shard(opsdc.load_model(model, "auto", "cpu"), offload=False)
    teacher = opsdc.load_model(model, "auto", "cpu").requires_grad_(False)
    teacher = opsdc.shard(teacher, offload=False)
    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
    pairs = zip(*(opsdc.prompt_pair(chat, "v1", "plain") for chat in chats), strict=True)
    prompts = [opsdc.encode_chats(tokenizer, list(side)) for side in pairs]
    rollouts = fixed_completions(len(chats), length, student.model.config.vocab_size)
    triples, meter = list(zip(*prompts, rollouts, strict=True)), Meter()
    for _ in range(steps):
        meter.on_step_begin()
        loss, *_ = opsdc.distillation_loss(student, teacher, triples, "reverse_kl", len(chats))
        loss.backward()
        opsdc.clip_gradients(student, 1.0)
        meter.on_pre_optimizer_step(model=student.model)
        optimizer.step()
        optimizer.zero_grad()
        meter.on_step_end()
    meter.loss = loss.item()
    return meter


CHATS = [[{"role": "user", "content": f"What is the last digit of {i} + {i}?"}] for i in range(8)]


def bench_update(arguments: Arguments) -> None:
    """The second update on two completions, by a random model of four layers."""
    if not arguments.only:
        return compare(["opsdc", *["trl"] * TRL], arguments.rounds)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as model:
        shape = {"hidden_size": arguments.hidden, "intermediate_size": 2 * arguments.hidden}
        shape |= {"vocab_size": arguments.vocabulary}
        save_random_model(model, TOY, **shape)
        update = update_trl if arguments.only == "trl" else update_opsdc
        meter = update(model, CHATS[:2], arguments.tokens, 2)
    print("\n" + json.dumps(meter.figures))


def bench_parity(_: Arguments) -> None:
    """Loss and clipped gradients of a batch of eight, on the toy."""
    theirs, ours = (update(TOY, CHATS, 32, 1) for update in (update_trl, update_opsdc))
    largest = max(gradient.abs().max() for gradient in theirs.gradients.values())
    difference = max(
        (ours.gradients[name].full_tensor() - gradient).abs().max()
        for name, gradient in theirs.gradients.items()
    )
    print(f"loss: TRL {theirs.loss:.8f}, opsdc {ours.loss:.8f} nats per token")
    print(f"gradients: {len(theirs.gradients)} tensors, largest entry {largest:.3e}")
    print(f"largest difference {difference:.1e}, relative {difference / largest:.1e}")


# ---- Memory: arithmetic; README.md has it in words -----------------------------------------------

VOCABULARY, TOKENS, BATCH = 151_936, 1024 + 8192, 32
SIZES = {  # of Qwen3: billions of parameters, hidden, intermediate, layers, heads, tied embeddings
    "0.6B": (0.596, 1024, 3072, 28, 16, True),
    "8B": (8.191, 4096, 12288, 36, 32, False),
    "14B": (14.768, 5120, 17408, 40, 40, False),
    "32B": (32.762, 5120, 25600, 64, 64, False),
}
SETTINGS = [("0.6B", 1, 16), ("8B", 1, 80), ("8B", 1, 141)]  # size, GPUs, GB each
SETTINGS += [(size, 8, memory) for size in ("8B", "14B", "32B") for memory in (80, 141)]


def estimate(size: str, gpus: int, offload: bool, micro: int, rows: int) -> list[float]:
    """GB for each column of the table."""
    billions, hidden, intermediate, layers, heads, tied = SIZES[size]
    n, head = billions * 1e9, VOCABULARY * hidden
    ends = head if tied else 2 * head  # embedding and head
    layer = (n - ends) / layers
    activations = 2 * micro * TOKENS * (3 * intermediate + 6 * hidden + 2 * heads * 128)
    phases = [  # of the update, one after the other
        4 * head + 9 * 4 * opsdc.CHUNK * VOCABULARY,  # loss: the head's gradient, a chunk's logits
        (4 + 4 + 2) * head,  # this gradient, scaled and rounded
        2 * head + 2 * activations + 2 * (2 + 4) * layer,  # a layer's backward pass
        (2 + 4 + 4 / gpus) * ends,  # gradients of embedding and head: bf16, fp32, the shard
    ]
    gathered = 2 * 2 * ends + 3 * 2 * layer
    held = 2 * n + (0 if offload else 20 * n / gpus)
    rollout = rows * TOKENS * layers * 8 * 128 * 2 * 2
    update = gathered + 2 * micro * TOKENS * layers * hidden + max(phases)
    times = BATCH // gpus // micro  # micro-batches
    host = max(20 * n, 2 * n * gpus + 4 * n) if offload else 2 * n * gpus
    between = (times * (3 * 2 + 4) + 4) * n * (gpus - 1) / gpus
    pcie = (times * (3 * 4 + 4) + 4) * n / gpus if offload else 0
    figures = held, rollout, update, held + max(rollout, update), host, between, pcie
    return [figure / 1e9 for figure in figures]


def bench_memory(_: Arguments) -> None:
    """The flags that fit, in the order: no --offload, large micro-batches, many rollout rows."""
    columns = "held", "rollout", "update", "peak", "host", "between GPUs", "over PCIe"
    row("Qwen3", "GPUs", *columns, "fits with", header=True)
    for size, gpus, memory in SETTINGS:
        rows = [rows for rows in (32, 16, 8, 4, 2, 1) if rows <= BATCH // gpus]
        choices = [(o, m, r) for o in (False, True) for m in (4, 2, 1) for r in rows]
        fitting = [c for c in choices if estimate(size, gpus, *c)[3] < 0.92 * memory]
        best = fitting[0] if fitting else choices[-1]
        flags = f"{'--offload ' * best[0]}--micro_batch_size {best[1]} "
        flags += f"--rollout_batch_size {best[2]}"
        figures = [f"{value:,.0f}" for value in estimate(size, gpus, *best)]
        row(size, f"{gpus} x {memory} GB", *figures, f"`{flags}`" if fitting else "nothing")


# ---- Rollout and step: a model's shape with random weights ---------------------------------------


def random_model(config: str, **options: Any) -> opsdc.Model:
    torch.manual_seed(0)
    shape = hf.AutoConfig.from_pretrained(config, **options)
    with opsdc.DEVICE:
        return hf.AutoModelForCausalLM.from_config(shape, dtype=opsdc.DTYPE)


def save_random_model(directory: str, config: str, **options: Any) -> None:
    """With the toy's tokenizer and stop ids."""
    random_model(config, **options).save_pretrained(directory)
    hf.AutoTokenizer.from_pretrained(TOY).save_pretrained(directory)
    hf.GenerationConfig.from_pretrained(TOY).save_pretrained(directory)


def bench_rollout(arguments: Arguments) -> None:
    """Tokens a second of each engine; all completions have --new_tokens tokens."""
    model, new = random_model(arguments.config).eval(), arguments.new_tokens
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    settings = hf.GenerationConfig(**sampling, max_new_tokens=new, min_new_tokens=new)
    model.generation_config = settings

    def generate(ids: torch.Tensor, **options: Any) -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    def generate_batch(ids: torch.Tensor, flash: bool) -> None:
        blocks = len(ids) * (2 + (arguments.prompt_tokens + new) // 256)
        batching = hf.ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=ids.numel())
        batching.auto_switch_to_flash = flash
        results = model.generate_batch(ids.tolist(), settings, batching).values()
        assert all(len(result.generated_tokens) == new for result in results)

    engines = {
        "generate": partial(generate),
        "generate, static cache": partial(generate, cache_implementation="static"),
        "generate_batch": partial(generate_batch, flash=False),
        "generate_batch, flash kernels": partial(generate_batch, flash=True),
    }
    if not (opsdc.CUDA and importlib.util.find_spec("kernels")):
        del engines["generate_batch, flash kernels"]
    row("tokens a second", *(f"{rows} rows" for rows in arguments.rows), header=True)
    for name, engine in engines.items():
        speeds = []
        for rows in arguments.rows:
            size = rows, arguments.prompt_tokens
            ids = torch.randint(5, model.config.vocab_size, size, device=opsdc.DEVICE)
            engine(ids)  # the first call compiles
            start = time.perf_counter()
            engine(ids)
            speeds.append(f"{rows * new / (time.perf_counter() - start):,.0f}")
        row(name, *speeds)


def bench_step(arguments: Arguments) -> None:
    """The last of three steps of opsdc.py on the toy's problems, with and without --offload."""
    flags = f"--data {TOY}/train.jsonl --steps 3 --save_every 0 {arguments.flags}".split()
    launch = f"{sys.executable} -m torch.distributed.run --nproc_per_node {arguments.gpus}".split()
    keys = "completion_tokens", "rollout_seconds", "update_seconds", "peak_gpu_gb"
    row("weights", *keys, "host_gb, each process", header=True)
    with tempfile.TemporaryDirectory() as directory:
        save_random_model(f"{directory}/model", arguments.config)
        for offload in ([], ["--offload"]):
            run = f"{directory}/run{len(offload)}"
            command = [*launch, str(ROOT / "opsdc.py"), "--model", f"{directory}/model", *flags]
            subprocess.run([*command, "--output_dir", run, *offload], check=True, stdout=2)
            last = json.loads(Path(run, "metrics.jsonl").read_text().splitlines()[-1])
            host = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
            figures = [f"{value:.1f}" for value in (*(last[key] for key in keys), host)]
            row(*offload or ["on the device"], *figures)


def main() -> None:
    functions = bench_loss, bench_update, bench_parity, bench_memory, bench_rollout, bench_step
    commands = {function.__name__[6:]: function for function in functions}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=commands)
    options = {"tokens": 1024, "hidden": 1024, "vocabulary": VOCABULARY, "rounds": 3, "only": ""}
    options |= {"config": "config.json", "prompt_tokens": 256, "new_tokens": 512}
    for name, default in (options | {"gpus": 1, "flags": ""}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    commands[arguments.command](arguments)


if __name__ == "__main__":
    main()
