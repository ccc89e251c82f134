"""Time and memory of opsdc.py's parts; each subcommand prints a table. All but `memory` measure on
the device that is there.

python results/bench.py loss       # beside its four matrix products, plain autograd and TRL
python results/bench.py update     # beside TRL's SDFTTrainer: seconds and memory
python results/bench.py parity     # beside TRL's SDFTTrainer: loss and gradient, on the toy
python results/bench.py memory     # GB and FLOPs of an update of Qwen3's sizes: simulated
python results/bench.py rollout --config config.json    # tokens a second, by engine and rows
python results/bench.py step --config config.json       # three steps, --offload or not
"""

import argparse
import importlib.util
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import torch
import transformers as hf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import opsdc  # noqa: E402
from results.simulate import BATCH, GPU, PROMPT_TOKENS, TOKENS, simulate  # noqa: E402

TOY = str(ROOT / "toy")
CHATS = [[{"role": "user", "content": f"What is the last digit of {i} + {i}?"}] for i in range(8)]
TRL = importlib.util.find_spec("trl") is not None
if TRL:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer, loss_utils

VOCABULARY = 151_936
SIZES = {  # of Qwen3: hidden, intermediate, layers, heads
    "0.6B": (1024, 3072, 28, 16),
    "8B": (4096, 12288, 36, 32),
    "14B": (5120, 17408, 40, 40),
    "32B": (5120, 25600, 64, 64),
}


def row(*cells: object, header: bool = False) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)
    if header:
        row(*["---"] * len(cells))


def random_model(config: str, **shape: int) -> opsdc.Model:
    """The shape is that of a config.json; the weights are drawn at random."""
    torch.manual_seed(0)
    options = hf.AutoConfig.from_pretrained(config, **shape)
    with opsdc.DEVICE:
        return hf.AutoModelForCausalLM.from_config(options, dtype=opsdc.DTYPE)


class Meter(hf.TrainerCallback):
    """Processor seconds (on a GPU: seconds) and peak MB above the start; the last gradients."""

    def on_step_begin(self, *_, **__) -> None:
        if opsdc.CUDA:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.start = self.read()

    def on_pre_optimizer_step(self, *_, model: torch.nn.Module, **__) -> None:
        self.gradients = [weight.grad for weight in model.parameters()]

    def on_step_end(self, *_, **__) -> None:
        self.figures = [end - start for end, start in zip(self.read(), self.start, strict=True)]

    def read(self) -> tuple[float, float]:
        if opsdc.CUDA:
            torch.cuda.synchronize()
            return time.perf_counter(), torch.cuda.max_memory_allocated() / 1e6
        status = Path("/proc/self/status").read_text()
        return time.process_time(), int(status.split("VmHWM:")[1].split()[0]) / 1e3


def compare(measure, names: list[str], arguments: argparse.Namespace) -> None:
    """Measures each in processes of its own, in turn; prints medians beside the first one's."""
    names, found = [name for name in names if TRL or name != "trl"], []
    for name in names * arguments.rounds:
        spawn = torch.multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,)) as process:
            found.append(process.submit(measure, name, arguments).result())
    medians = torch.tensor(found).view(arguments.rounds, len(names), 2).quantile(0.5, dim=0)
    row("", "seconds", f"x {names[0]}", "MB", f"x {names[0]}", header=True)
    for name, (s, mb), (x, y) in zip(names, medians, medians / medians[0], strict=True):
        row(name, f"{s:.2f}", f"{x:.2f}", f"{mb:,.0f}", f"{y:.2f}")


def measure_loss(name: str, arguments: argparse.Namespace) -> list[float]:
    """Forward and backward from final states and heads, in opsdc.py's compute dtype."""
    options = {"device": opsdc.DEVICE, "dtype": getattr(torch, opsdc.DTYPE)}
    p_head = torch.empty(arguments.vocabulary, arguments.hidden, **options).normal_(std=0.02)
    q_head = p_head.clone().requires_grad_()
    q = torch.randn(arguments.tokens, arguments.hidden, **options)
    p, q = q + 0.05 * torch.randn_like(q), q.requires_grad_()
    weights, meter = torch.full((len(q),), 1 / len(q), device=opsdc.DEVICE), Meter()
    for _ in range(2 if opsdc.CUDA else 1):  # a GPU's first call loads its kernels
        q.grad = q_head.grad = None
        meter.on_step_begin()
        if name == "products":  # only what nobody can avoid
            grad_states, grad_head = torch.empty_like(q), torch.zeros_like(q_head).float()
            with torch.no_grad():
                for part in torch.arange(len(q), device=q.device).split(128):
                    logits, _ = opsdc.project(q[part], q_head), opsdc.project(p[part], p_head)
                    grad_states[part] = logits.to(q_head.dtype) @ q_head
                    grad_head.addmm_(logits.T, q[part].float())
        elif name == "opsdc":
            opsdc.ChunkedDivergence.apply(q, q_head, p, p_head, weights, "reverse_kl")[0].backward()
        elif name == "plain":
            q_logps = (q @ q_head.T).float().log_softmax(-1)
            p_logps = (p @ p_head.T).float().log_softmax(-1)
            (opsdc.divergence(q_logps, p_logps, "reverse_kl") @ weights).backward()
        else:
            loss = loss_utils.compute_full_logit_self_distillation_loss
            (loss(q @ q_head.T, p @ p_head.T, distillation_alpha=1.0) @ weights).backward()
        meter.on_step_end()
    return meter.figures


def random_rollouts(count: int, length: int, vocabulary: int) -> list[opsdc.Ids]:
    """Every second one is half as long."""
    ids = torch.randint(5, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    return [y[: length // (1 + i % 2)].tolist() for i, y in enumerate(ids)]


def update_trl(model: str, rollouts: list[opsdc.Ids], steps: int) -> Meter:
    """`steps` updates on the first of CHATS by SDFTTrainer, set up for the method."""
    context, meter = opsdc.INSTRUCTIONS["v1"], Meter()
    rows = [{"prompt": chat, "privileged_context": context} for chat in CHATS[: len(rollouts)]]
    method = {"distillation_mode": "full_logits", "distillation_alpha": 1.0, "num_generations": 1}
    method |= {"teacher_prompt_template": "{privileged_context}\n\n{prompt}", "max_steps": steps}
    method |= {"learning_rate": 1e-6, "weight_decay": 0.01, "shuffle_dataset": False}
    method |= {"per_device_train_batch_size": len(rows), "bf16": opsdc.CUDA, "save_strategy": "no"}
    trainer = SDFTTrainer(model, SDFTConfig(tempfile.mkdtemp(), **method), rows, callbacks=[meter])
    trainer.remove_callback(hf.ProgressCallback)  # prints
    trainer._generate = lambda prompts: (prompts, rollouts)
    meter.loss = trainer.train().training_loss
    return meter


def update_opsdc(model: str, rollouts: list[opsdc.Ids], steps: int) -> Meter:
    """The same by opsdc.py: loss, backward, clipping, AdamW."""
    count, meter = len(rollouts), Meter()
    data = Path(tempfile.mkdtemp(), "chats.json")
    data.write_text(json.dumps([{"prompt": chat} for chat in CHATS[:count]]))
    config = opsdc.Config(model, str(data), prompt="plain", batch_size=count)
    opsdc.start_ranks(config.dtype)
    student = opsdc.shard(opsdc.load_model(model), config)
    teacher = opsdc.shard(opsdc.load_model(model).requires_grad_(False), config)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-6, weight_decay=0.01, fused=True)
    prompts = opsdc.load_prompts(config, opsdc.load_tokenizer(model))
    triples = [(x, x_c, y) for (x, x_c, _), y in zip(prompts, rollouts, strict=True)]
    for _ in range(steps):
        meter.on_step_begin()
        loss, _ = opsdc.distillation_loss(student, teacher, triples, "reverse_kl", count)
        loss.backward()
        opsdc.clip_gradients(student, 1.0)
        meter.on_pre_optimizer_step(model=student)
        optimizer.step()
        optimizer.zero_grad()
        meter.on_step_end()
    meter.loss = loss.item()
    return meter


def measure_update(name: str, arguments: argparse.Namespace) -> list[float]:
    """The second update on two completions, by a random model of four layers."""
    shape = {"hidden_size": arguments.hidden, "intermediate_size": 2 * arguments.hidden}
    update = update_trl if name == "trl" else update_opsdc
    with tempfile.TemporaryDirectory() as model:
        random_model(TOY, **shape, vocab_size=arguments.vocabulary).save_pretrained(model)
        hf.AutoTokenizer.from_pretrained(TOY).save_pretrained(model)
        return update(model, random_rollouts(2, arguments.tokens, arguments.vocabulary), 2).figures


def parity(_: argparse.Namespace) -> None:
    """Loss and clipped gradients of a batch of eight, on the toy."""
    rollouts = random_rollouts(8, 32, hf.AutoConfig.from_pretrained(TOY).vocab_size)
    theirs, ours = (update(TOY, rollouts, 1) for update in (update_trl, update_opsdc))
    pairs = zip(ours.gradients, theirs.gradients, strict=True)
    difference = max((mine.full_tensor() - their).abs().max() for mine, their in pairs)
    largest = max(gradient.abs().max() for gradient in theirs.gradients)
    print(f"loss: TRL {theirs.loss:.8f}, opsdc {ours.loss:.8f} nats per token")
    print(f"gradients: {len(theirs.gradients)} tensors, largest entry {largest:.3e}")
    print(f"largest difference {difference:.1e}, relative {difference / largest:.1e}")


def memory(arguments: argparse.Namespace) -> None:
    """GB of each GPU and of the host; what an update moves and computes; how many rollouts at once
    fit beside what is held, by arithmetic. 8% of a GPU must be to spare."""
    columns = "held", "peak", "in", "host", "between GPUs", "over PCIe", "PFLOP", "s at 40%"
    gpus = (48, 80, 141)  # GB
    row("Qwen3", "GPUs", "flags", *columns, *(f"rows, {gb} GB" for gb in gpus), header=True)
    cases = product(arguments.sizes, arguments.ranks, (False, True), arguments.micro)
    for size, ranks, offload, micro in cases:
        if size in SIZES:
            names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
            shape = dict(zip(names, SIZES[size], strict=True)) | {"num_key_value_heads": 8}
            shape = hf.Qwen3Config(**shape, tie_word_embeddings=size == "0.6B")
        else:
            shape = hf.AutoConfig.from_pretrained(size)
        ledger = simulate(shape, ranks, offload, micro)
        held, work, (peak, phase) = ledger.held, ledger.work, ledger.peaks[str(GPU)]
        host, _ = ledger.peaks.get("cpu", (0, ""))
        cache = 4 * (PROMPT_TOKENS + TOKENS) * shape.num_hidden_layers  # bf16 keys and values
        cache *= shape.num_key_value_heads * shape.head_dim
        rows = []
        for room in (0.92e9 * gb for gb in gpus):
            most = min((room - held) // cache, BATCH // ranks) if peak < room else 0
            rows.append(2 ** int(math.log2(most)) if most >= 1 else "none")
        figures = held, peak, host * ranks, work["between GPUs"], work["over PCIe"]
        held, peak, *others = (f"{figure / 1e9:,.1f}" for figure in figures)
        seconds = work["FLOP"] / 0.4 / 989e12
        cells = held, peak, phase, *others, f"{work['FLOP'] / 1e15:.1f}", f"{seconds:.0f}", *rows
        row(size, ranks, f"`{'--offload ' * offload}--micro_batch_size {micro}`", *cells)


def rollout(arguments: argparse.Namespace) -> None:
    """Tokens a second of each engine; all completions have --new_tokens tokens."""
    model, new = random_model(arguments.config).eval(), arguments.new_tokens
    settings = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "min_new_tokens": new}
    model.generation_config = hf.GenerationConfig(**settings, max_new_tokens=new)
    sizes = [(rows, arguments.prompt_tokens) for rows in arguments.rows]
    prompts = [torch.randint(5, model.config.vocab_size, s, device=opsdc.DEVICE) for s in sizes]

    def generate_batch(ids: torch.Tensor, flash: bool) -> None:
        blocks = len(ids) * (2 + (arguments.prompt_tokens + new) // 256)
        batching = hf.ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=ids.numel())
        batching.auto_switch_to_flash = flash
        results = model.generate_batch(ids.tolist(), continuous_batching_config=batching)
        assert all(len(result.generated_tokens) == new for result in results.values())

    engines = {"generate": model.generate}
    engines["generate, static cache"] = partial(model.generate, cache_implementation="static")
    engines["generate_batch"] = partial(generate_batch, flash=False)
    if opsdc.CUDA and importlib.util.find_spec("kernels"):
        engines["generate_batch, flash kernels"] = partial(generate_batch, flash=True)
    row("tokens a second", *(f"{rows} rows" for rows in arguments.rows), header=True)
    for name, engine in engines.items():
        seconds = [timeit.repeat(partial(engine, ids), number=1, repeat=2)[1] for ids in prompts]
        row(name, *(f"{n * new / s:,.0f}" for n, s in zip(arguments.rows, seconds, strict=True)))


def step(arguments: argparse.Namespace) -> None:
    """The last of three steps of opsdc.py on the toy's problems, with and without --offload."""
    keys = "completion_tokens", "rollout_seconds", "update_seconds", "peak_gpu_gb"
    row("weights", *keys, "host_gb, each process", header=True)
    with tempfile.TemporaryDirectory() as directory:
        random_model(arguments.config).save_pretrained(f"{directory}/model")
        hf.AutoTokenizer.from_pretrained(TOY).save_pretrained(f"{directory}/model")
        command = f"{sys.executable} -m torch.distributed.run --nproc_per_node {arguments.gpus} "
        command += f"{ROOT}/opsdc.py --model {directory}/model --data {TOY}/train.jsonl --steps 3 "
        command += f"--save_every 0 {arguments.flags} --output_dir {directory}/run"
        for offload in ("", "--offload"):
            subprocess.run(f"{command}{offload} {offload}".split(), check=True, stdout=2)
            *_, last = opsdc.load_rows(f"{directory}/run{offload}/metrics.jsonl")
            host = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
            row(offload or "on the device", *(f"{last[key]:.1f}" for key in keys), f"{host:.1f}")


def main() -> None:
    commands = {"parity": parity, "memory": memory, "rollout": rollout, "step": step}
    commands["loss"] = partial(compare, measure_loss, ["products", "opsdc", "plain", "trl"])
    commands["update"] = partial(compare, measure_update, ["opsdc", "trl"])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=commands)
    options = {"tokens": 1024, "hidden": 1024, "vocabulary": VOCABULARY, "rounds": 3, "gpus": 1}
    options |= {"config": "config.json", "prompt_tokens": 256, "new_tokens": 512, "flags": ""}
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    for name, default in {"rows": [1, 8, 32], "ranks": [1, 8], "micro": [1, 4]}.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="or a config.json")
    arguments = parser.parse_args()
    commands[arguments.command](arguments)


if __name__ == "__main__":
    main()
