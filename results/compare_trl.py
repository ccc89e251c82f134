"""opsdc.py beside TRL's SDFTTrainer, set up for the same method on the same completions.

    pip install trl==1.16.0
    python results/compare_trl.py parity    # the toy: loss and gradient of a batch of 8
    python results/compare_trl.py cost      # Qwen3's vocabulary: seconds and memory of an update

TRL's settings for the method: the instruction as privileged context (in front of the student's
prompt, here on both sides: its template can't put it in the place of a sentence, as the paper
does), a copy of the student as teacher, full vocabulary, reverse KL, no importance weights, no
token skipped. Its sampling is replaced by fixed completions of 32 or 1,024 random ids; the rest is
its own. For `cost` the model is a random Qwen3 of two layers and hidden size 512, in fp32 on one
CPU thread; two completions are one micro-batch. Each side runs two updates in a process of its own
and the second one counts: TRL's from on_step_begin to on_step_end, ours loss, backward, clipping
and AdamW. Memory is the peak resident size above what stood before the update (read from /proc, so
Linux only).
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

TOY = Path(__file__).parents[1] / "toy"
sys.path.insert(0, str(TOY.parent))
import opsdc  # noqa: E402

PROBLEMS = [f"What is the last digit of {i} + {i + 1}?" for i in range(1, 9)]
INSTRUCTION = opsdc.INSTRUCTIONS["v1"]


def completions(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random ids, every second row half as long."""
    generator = torch.Generator().manual_seed(0)
    lengths = [length // (1 + i % 2) for i in range(count)]
    return [torch.randint(5, vocabulary, (n,), generator=generator).tolist() for n in lengths]


class Watch(TrainerCallback):
    """Keeps the gradient of the last step, its seconds and its peak memory in MB."""

    def on_step_begin(self, *_, **__):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.before, self.start = resident("VmRSS"), time.perf_counter()

    def on_pre_optimizer_step(self, *_, model, **__):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    def on_step_end(self, *_, **__):
        self.seconds = time.perf_counter() - self.start
        self.megabytes = resident("VmHWM") - self.before


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(field))


def prompts(problem: str) -> tuple[str, str]:
    """The student's and the teacher's, the latter as TRL's template makes it."""
    student = opsdc.student_prompt(problem)
    return student, f"{INSTRUCTION}\n\n{student}"


def run_trl(model: Path, count: int, length: int, steps: int) -> Watch:
    """`steps` updates of SDFTTrainer on the same batch; what is watched, the loss among it."""
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    class Trainer(SDFTTrainer):
        def _generate(self, prompt_ids):
            return prompt_ids, completions(count, length, self.model.config.vocab_size)

        def compute_loss(self, *arguments, **options):
            loss = super().compute_loss(*arguments, **options)
            watch.loss = loss.item()
            return loss

    rows = [
        {
            "prompt": [{"role": "user", "content": opsdc.student_prompt(problem)}],
            "privileged_context": INSTRUCTION,
        }
        for problem in PROBLEMS[:count]
    ]
    settings = SDFTConfig(
        output_dir=tempfile.mkdtemp(),
        teacher_prompt_template="{privileged_context}\n\n{prompt}",
        teacher_model_kind="ema",
        teacher_update_rate=1.0,
        teacher_sync_steps=50,
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        distillation_is_clip=None,
        num_loss_tokens_to_skip=0,
        num_generations=1,
        shuffle_dataset=False,
        max_completion_length=length,
        per_device_train_batch_size=count,
        max_steps=steps,
        num_train_epochs=steps,
        learning_rate=0.0 if steps == 1 else 1e-6,
        weight_decay=0.01,
        max_grad_norm=0.0 if steps == 1 else 1.0,  # parity compares unclipped gradients
        gradient_checkpointing=True,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    watch = Watch()
    Trainer(
        model=str(model),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[watch],
    ).train()
    return watch


def run_opsdc(model: Path, count: int, length: int, steps: int) -> Watch:
    """The same by opsdc.py."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    student, teacher = (AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
    teacher.requires_grad_(False)
    student.activation_checkpointing_enable()
    student.train()
    optimizer = opsdc.MasterAdamW(student, opsdc.Config()) if steps > 1 else None
    texts = zip(*map(prompts, PROBLEMS[:count]), strict=True)
    encoded = [opsdc.encode_chat(tokenizer, list(side)) for side in texts]
    rollouts = completions(count, length, student.config.vocab_size)
    triples = list(zip(*encoded, rollouts, strict=True))
    watch = Watch()
    for _ in range(steps):
        watch.on_step_begin()
        loss, _, _ = opsdc.distillation_loss(student, teacher, triples, "reverse_kl", count)
        loss.backward()
        if optimizer:
            optimizer.step()
        else:
            watch.on_pre_optimizer_step(model=student)
        watch.on_step_end()
        watch.loss = loss.item()
    return watch


def parity() -> None:
    """Largest difference of loss and gradients, the latter relative to the largest gradient."""
    trl, ours = (run(TOY, count=8, length=32, steps=1) for run in (run_trl, run_opsdc))
    largest = max(g.abs().max() for g in trl.gradients.values())
    difference = max((ours.gradients[n] - g).abs().max() for n, g in trl.gradients.items())
    print(f"loss: TRL {trl.loss:.8f}, opsdc {ours.loss:.8f} nats per token")
    print(f"gradients: {len(trl.gradients)} tensors, largest entry {largest:.3e}")
    print(f"largest difference {difference:.1e}, relative {difference / largest:.1e}")


def cost(side: str | None) -> None:
    """Without a side, both, one after the other in processes of their own, and their ratios."""
    if side:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as directory:
            shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
            torch.manual_seed(0)
            model = Qwen3ForCausalLM(Qwen3Config(vocab_size=151_936, **shape, **heads))
            model.save_pretrained(directory)
            AutoTokenizer.from_pretrained(TOY).save_pretrained(directory)
            del model
            run = {"trl": run_trl, "opsdc": run_opsdc}[side]
            watch = run(Path(directory), count=2, length=1024, steps=2)
        print("result", watch.seconds, watch.megabytes)
        return
    figures = {}
    for name in ("opsdc", "trl"):
        command = [sys.executable, __file__, "cost", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures[name] = [float(x) for x in output.split("result")[1].split()]
    print("| | seconds | x opsdc | MB | x opsdc |\n| --- | --- | --- | --- | --- |")
    for name, (seconds, memory) in figures.items():
        slower, larger = seconds / figures["opsdc"][0], memory / figures["opsdc"][1]
        print(f"| {name} | {seconds:.1f} | {slower:.2f} | {memory:.0f} | {larger:.1f} |")


if __name__ == "__main__":
    if sys.argv[1] == "parity":
        parity()
    else:
        cost(sys.argv[2] if len(sys.argv) > 2 else None)
