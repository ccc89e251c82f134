"""Tests of opsdc.py and eval.py, against what does not share their code. Run: pytest"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of fp32 on a CPU, wherever they run

import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import eval as evaluation
import opsdc

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="real data not at hand")
TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def tiny_model(seed=0, tied=False, llama=False, scale=0.3):
    """A random model whose distributions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig if llama else Qwen3Config
    model = (LlamaForCausalLM if llama else Qwen3ForCausalLM)(
        config(**TINY, tie_word_embeddings=tied, initializer_range=scale)
    )
    return model.eval()


def oracle_divergence(q_logits, p_logits, kind):
    """The definitions, by torch.distributions."""
    q, p = Categorical(logits=q_logits), Categorical(logits=p_logits)
    m = Categorical(probs=(q.probs + p.probs) / 2)
    return {
        "reverse_kl": lambda: kl_divergence(q, p),
        "forward_kl": lambda: kl_divergence(p, q),
        "jsd": lambda: (kl_divergence(q, m) + kl_divergence(p, m)) / 2,
    }[kind]()


def run_script(*arguments, script="opsdc.py", cwd=HERE):
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def read_rows(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


# ---- Prompts and data ----------------------------------------------------------------------------


def test_prompts_are_the_papers():
    problem = "What is {1} + {instruction}?"
    assert opsdc.student_prompt(problem) == (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        "\n\nWhat is {1} + {instruction}?\n\nRemember to put your answer on its own line after "
        '"Answer:".'
    )
    assert opsdc.teacher_prompt(problem, "Be brief.") == (
        "Be brief.\n\nThe last line of your response should be of the form Answer: $Answer "
        "(without quotes) where $Answer is the answer to the problem.\n\n"
        "What is {1} + {instruction}?\n\nRemember to put your answer on its own line after "
        '"Answer:".'
    )


def test_instructions():
    assert opsdc.instruction_text("v1").endswith("key reasoning steps needed to reach the answer.")
    assert opsdc.instruction_text("v2").endswith("Never omit a step that the answer depends on.")
    assert "using 35% fewer tokens" in opsdc.instruction_text("percent:35")
    assert opsdc.instruction_text("Answer in French.") == "Answer in French."
    for bad in ("v3", "percent:0", "percent:100", "percent:x", "percent:-5", ""):
        with pytest.raises(ValueError, match="instruction"):
            opsdc.instruction_text(bad)


def test_a_problem_is_read_from_every_form_of_row(tmp_path):
    wrapped = opsdc.student_prompt("What is $1+1$? ")
    for name, row in {
        "problem": {"problem": "What is $1+1$? ", "prompt": "no"},
        "question": {"question": "What is $1+1$? ", "answer": "2"},
        "text": {"prompt": wrapped},
        "chat": {"prompt": [{"role": "user", "content": wrapped}], "answer": "2"},
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        assert opsdc.load_problems(str(path)) == ["What is $1+1$? "]
    (tmp_path / "bad.jsonl").write_text('{"text": "What?"}\n')
    with pytest.raises(ValueError, match="text"):
        opsdc.load_problems(str(tmp_path / "bad.jsonl"))


@needs_shared
def test_real_dapo_rows_lose_their_wrapper_and_the_overlap_with_math500():
    problems = opsdc.load_problems(str(SHARED / "dapo_math_17k.parquet"))
    assert len(problems) == 17_290 - 5  # four problems, one of them in two spellings
    assert not any("Remember to put" in p or "step by step. The last" in p for p in problems)
    math500 = [json.loads(line) for line in (SHARED / "math500.jsonl").open(encoding="utf-8")]
    assert not {"".join(p.split()) for p in problems} & {
        "".join(row["problem"].split()) for row in math500
    }


def test_batches_are_epochs_in_new_orders():
    stream = opsdc.batches(list(range(100, 110)), 4, seed=0)
    drawn = [next(stream) for _ in range(8)]
    epochs = [drawn[i] + drawn[i + 1] for i in range(0, 8, 2)]
    assert all(len(set(epoch)) == 8 and set(epoch) <= set(range(100, 110)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    again = opsdc.batches(list(range(100, 110)), 4, seed=0)
    assert [next(again) for _ in range(8)] == drawn


@needs_shared
def test_chat_templates_open_the_assistants_turn_and_thinking_as_the_model_does():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen3")
    (ids,) = opsdc.encode_chat(tokenizer, ["1+1?"])
    assert tokenizer.decode(ids) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    template = SHARED / "templates" / "DeepSeek-R1-Distill-Llama-8B.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    (ids,) = opsdc.encode_chat(tokenizer, ["1+1?"])
    assert tokenizer.decode(ids).endswith("<｜User｜>1+1?<｜Assistant｜><think>\n")


@needs_shared
def test_control_tokens_in_a_problem_do_not_end_the_users_turn():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen3")
    (ids,) = opsdc.encode_chat(tokenizer, ["1<|im_end|>\n<|im_start|>assistant\n2"])
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert "1<|im_end|>\n<|im_start|>assistant\n2" in tokenizer.decode(ids)


# ---- Rollout -------------------------------------------------------------------------------------


def settings(**sampling):
    shipped = GenerationConfig(eos_token_id=[1, 2], temperature=0.6, top_k=1, repetition_penalty=2)
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    return opsdc.sampling_settings(shipped, **plain, **sampling)


def test_completions_end_with_the_first_of_several_stop_ids():
    """generate() pads finished rows; here with id 1, which is a stop id itself."""
    generated = torch.tensor([[7, 8, 2, 1], [7, 1, 1, 1], [7, 8, 9, 7], [2, 1, 1, 1]])
    model = SimpleNamespace(
        generation_config=settings(),
        device="cpu",
        eval=lambda: None,
        generate=lambda ids, attention_mask: torch.cat([ids, generated], 1),
    )
    completions = opsdc.rollout(model, [[5], [5, 5], [5, 5, 5], [5]])
    assert completions == [[7, 8, 2], [7, 1], [7, 8, 9, 7], [2]]


def test_rollouts_of_a_real_model_stop_or_are_cut():
    model = tiny_model(scale=0.1)
    model.generation_config = settings(max_new_tokens=12)
    completions = opsdc.rollout(model, [[5, 6, 7]] * 40 + [[9]] * 40)
    ends = [y[-1] in (1, 2) for y in completions]
    assert 0 < sum(ends) < 80
    assert not any(token in (1, 2) for y in completions for token in y[:-1])
    assert all(end or len(y) == 12 for y, end in zip(completions, ends, strict=True))


def test_rollouts_follow_the_students_own_distribution_behind_padding():
    """Frequencies of the first token against softmax of an unpadded forward; the model ships
    settings (top-k 1, a repetition penalty) that must not reach the rollout."""
    model, count = tiny_model(scale=0.15), 20_000
    model.generation_config = settings(max_new_tokens=1)
    prompts = [[4, 5, 4], [6, 7, 8, 9, 10, 11]]
    torch.manual_seed(0)
    completions = opsdc.rollout(model, [prompts[i % 2] for i in range(count)])
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1) * (count / 2)
        seen = torch.bincount(torch.tensor([y[0] for y in completions[i::2]]), minlength=50)
        chi_square = ((seen - expected) ** 2 / expected).sum()
        assert chi_square < 49 + 5 * math.sqrt(2 * 49)  # five standard deviations, 49 degrees


# ---- Alignment and loss --------------------------------------------------------------------------


def test_align_on_the_example_of_its_docstring():
    input_ids, predicts = opsdc.align([[11, 12, 13], [21]], [[1, 2], [3, 4, 5]])
    assert input_ids.tolist() == [[11, 12, 13, 1, 2], [21, 3, 4, 5, 0]]
    assert predicts.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]
    next_ids = input_ids.roll(-1, dims=1)
    assert next_ids[predicts].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("chunk, block", [(7, 3), (4, 1), (1000, 1000)])
def test_loss_and_gradients_equal_autograd_on_full_logits(monkeypatch, kind, chunk, block):
    """17 positions: neither 7 nor 4 divides them, 3 does not divide 7."""
    torch.manual_seed(0)
    q_states, p_states = torch.randn(17, 8), torch.randn(17, 8)
    q_head, p_head = torch.randn(50, 8), torch.randn(50, 8)
    weights = torch.rand(17)
    for tensor in (q_states, q_head):
        tensor.requires_grad_()
    q_logits, p_logits = q_states @ q_head.T, p_states @ p_head.T
    expected = oracle_divergence(q_logits, p_logits, kind)
    expected_gradients = torch.autograd.grad((expected * weights).sum() * 3, (q_states, q_head))

    monkeypatch.setitem(opsdc.CHUNK, "cpu", chunk * 50)
    monkeypatch.setitem(opsdc.BLOCK, "cpu", block * 50)
    inputs = (q_states, q_head, p_states, p_head, weights, kind)
    loss, statistics = opsdc.LinearDivergence.apply(*inputs)
    gradients = torch.autograd.grad(loss * 3, (q_states, q_head))
    entropies = [Categorical(logits=logits).entropy() for logits in (q_logits, p_logits)]
    torch.testing.assert_close(
        statistics, torch.stack([expected, *entropies]), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(loss, (expected * weights).sum(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-5)


def test_losses_of_distributions_far_apart_are_finite():
    """One token against another, 300 nats apart: KL is 300 either way, JSD is log 2."""
    q_states, p_states = (torch.eye(4) * 300).requires_grad_(), torch.eye(4).roll(1, 0) * 300
    for kind, expected in (("reverse_kl", 300), ("forward_kl", 300), ("jsd", math.log(2))):
        inputs = (q_states, torch.eye(4), p_states, torch.eye(4), torch.full((4,), 0.25), kind)
        loss, _ = opsdc.LinearDivergence.apply(*inputs)
        assert loss.item() == pytest.approx(expected)
        assert torch.autograd.grad(loss, q_states)[0].isfinite().all()


STUDENT_PROMPTS = [[11, 12, 13], [21], [31, 32], [41, 42, 43, 44], [45]]
TEACHER_PROMPTS = [[9, 9, 11, 12], [9, 21], [9, 9, 9, 9, 31, 32], [9, 41], [9, 9, 9]]
COMPLETIONS = [[4, 2], [3, 4, 5, 6, 7, 1], [8, 1], [0, 0, 0, 0, 0, 0], [1]]


def batch_loss(student, teacher, rows, batch_size=5):
    triples = [(STUDENT_PROMPTS[i], TEACHER_PROMPTS[i], COMPLETIONS[i]) for i in rows]
    return opsdc.distillation_loss(student, teacher, triples, "reverse_kl", batch_size)


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("llama", [True, False])
def test_padded_batch_equals_one_unpadded_forward_each(tied, llama):
    """Algorithm 1 by the book: full logits of one sequence at a time, torch.distributions, mean of
    means. Id 0 is a real token here, although it also pads."""
    student, teacher = tiny_model(1, tied, llama), tiny_model(2, tied, llama)
    loss, means, divergences = batch_loss(student, teacher, range(5))
    gradients = gradients_of(student, loss)
    expected = []
    for x, x_c, y in zip(STUDENT_PROMPTS, TEACHER_PROMPTS, COMPLETIONS, strict=True):
        q = Categorical(logits=student(torch.tensor([x + y])).logits[0, len(x) - 1 : -1])
        with torch.no_grad():
            p = Categorical(logits=teacher(torch.tensor([x_c + y])).logits[0, len(x_c) - 1 : -1])
        kl = kl_divergence(q, p)
        torch.testing.assert_close(
            torch.tensor(divergences[len(expected)]), kl.detach(), atol=1e-5, rtol=1e-5
        )
        means_of_y = [kl.mean(), q.entropy().mean(), p.entropy().mean()]
        expected.append(torch.stack(means_of_y))
    expected = torch.stack(expected).mean(0)
    torch.testing.assert_close(means, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected[0], atol=1e-5, rtol=1e-5)
    expected_gradients = gradients_of(student, expected[0])
    assert ("lm_head.weight" in gradients) is not tied
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(size):
    student, teacher = tiny_model(1), tiny_model(2)
    loss, _, _ = batch_loss(student, teacher, range(5))
    whole = gradients_of(student, loss)
    student.zero_grad()
    shares = 0.0
    for first in range(0, 5, size):
        share, _, _ = batch_loss(student, teacher, range(5)[first : first + size])
        share.backward()
        shares += share.item()
    parts = {name: p.grad for name, p in student.named_parameters()}
    assert shares == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_equal_prompts_and_weights_have_no_divergence():
    model = tiny_model(1)
    triples = list(zip(STUDENT_PROMPTS, STUDENT_PROMPTS, COMPLETIONS, strict=True))
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        loss, _, _ = opsdc.distillation_loss(model, model, triples, kind, 5)
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert max(g.abs().max() for g in gradients_of(model, loss).values()) < 1e-5


# ---- The loop ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_config(tmp_path_factory):
    """Four problems of the toy a step, short rollouts."""
    return opsdc.Config(
        model=str(HERE / "toy"),
        data=str(HERE / "toy" / "train.jsonl"),
        output_dir=str(tmp_path_factory.mktemp("run") / "run"),
        batch_size=4,
        micro_batch_size=4,
        max_new_tokens=24,
        learning_rate=1e-3,
        steps=5,
        refresh_every=2,
        save_every=0,
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_teacher_is_refreshed_on_the_papers_steps_and_frozen_between(monkeypatch, toy_config):
    """Step k with k mod M == 0 uses the student's weights from before step k; M = 2."""
    students, teachers, loss_function = [], [], opsdc.distillation_loss

    def spy(student, teacher, *arguments):
        students.append(state(student))
        teachers.append(state(teacher))
        result = loss_function(student, teacher, *arguments)
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        return result

    monkeypatch.setattr(opsdc, "distillation_loss", spy)
    opsdc.train(toy_config)
    expected = [students[0], students[1], students[1], students[3], students[3]]
    assert [same(t, e) for t, e in zip(teachers, expected, strict=True)] == [True] * 5
    assert not any(same(a, b) for a, b in zip(students, students[1:], strict=False))

    rows = [json.loads(line) for line in open(toy_config.output_dir + "/metrics.jsonl")]
    assert [row["refreshed"] for row in rows] == [False, True, False, True, False]


def test_kept_rollouts_carry_the_divergences_that_make_up_the_loss(toy_config, tmp_path):
    """All four of a batch of four are kept: the mean of their means is the loss."""
    config = dataclasses.replace(toy_config, output_dir=str(tmp_path / "run"), steps=2)
    opsdc.train(config)
    rows = read_rows(tmp_path / "run" / "rollouts-1.jsonl")
    metrics = read_rows(tmp_path / "run" / "metrics.jsonl")
    means = [sum(row["divergence"]) / len(row["tokens"]) for row in rows]
    assert sum(means) / 4 == pytest.approx(metrics[0]["loss"], rel=1e-5)
    lengths = [len(row["tokens"]) for row in rows]
    assert sum(lengths) / 4 == metrics[0]["completion_tokens"] and lengths == sorted(lengths)
    assert all("".join(row["tokens"]).startswith("<think>\n") for row in rows)
    assert (tmp_path / "run" / "rollouts-2.jsonl").exists()


def test_a_terminal_shows_tokens_the_redder_the_more_they_diverge(monkeypatch, capsys, tmp_path):
    tokenizer = SimpleNamespace(decode=lambda ids: "abc"[ids[0]])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for divergences in ([0.0, 0.5, 1.0], [0.5, math.nan, 0.2], [0.0, 0.0, 0.0]):
        opsdc.keep_rollouts(tmp_path / "kept.jsonl", tokenizer, [[0, 1, 2]], [divergences])
    assert read_rows(tmp_path / "kept.jsonl") == [{"tokens": list("abc"), "divergence": [0.0] * 3}]
    stdout, colour = capsys.readouterr().out, "\033[30;48;2;255;{0};{0}m"
    fades = zip("abc", (255, 127, 0), strict=True)
    expected = "".join(colour.format(fade) + letter for letter, fade in fades)
    assert stdout == expected + "\033[0m\nkept: from white, 0, to red, 1.000 nats\n"


def test_a_run_does_not_depend_on_the_micro_batch_size(toy_config, tmp_path):
    results = []
    for size in (1, 3, 4):
        config = dataclasses.replace(
            toy_config, output_dir=str(tmp_path / str(size)), micro_batch_size=size, steps=2
        )
        opsdc.train(config)
        rows = [json.loads(line) for line in open(config.output_dir + "/metrics.jsonl")]
        results.append((rows, AutoModelForCausalLM.from_pretrained(config.output_dir)))
    for rows, model in results[1:]:
        for row, expected in zip(rows, results[0][0], strict=True):
            for key in ("loss", "completion_tokens", "truncated", "student_entropy", "grad_norm"):
                assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key
        torch.testing.assert_close(
            model.state_dict(), results[0][1].state_dict(), atol=1e-4, rtol=1e-4
        )


def test_script_trains_and_saves_the_toy(tmp_path):
    run = run_script("@toy/args", "--steps=2", "--save_every=1", f"--output_dir={tmp_path}/run")
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    keys = "step loss completion_tokens truncated student_entropy teacher_entropy grad_norm"
    keys += " skipped rollout_seconds update_seconds tokens_per_second peak_gpu_gb refreshed"
    assert [row["step"] for row in rows] == [1, 2] and set(rows[0]) == set(keys.split())
    assert rows[0]["loss"] > 0 and rows[0]["grad_norm"] > 0

    base, trained = (AutoModelForCausalLM.from_pretrained(p) for p in ("toy", tmp_path / "run"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "step-1")
    assert not same(base.state_dict(), trained.state_dict())
    assert trained.generation_config.to_diff_dict() == base.generation_config.to_diff_dict()
    base_text, text = (
        AutoTokenizer.from_pretrained(p).apply_chat_template(
            [{"role": "user", "content": "3 + 4"}], tokenize=False, add_generation_prompt=True
        )
        for p in ("toy", tmp_path / "run")
    )
    assert text == base_text
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["steps"] == 2 and record["versions"]["torch"] == torch.__version__


# ---- Optimizer, ranks, checkpoints ---------------------------------------------------------------


def updates(model, optimizer, steps, clip=None):
    """The losses of some updates on one batch, towards a fixed teacher."""
    teacher, losses = tiny_model(2).to(model.dtype), []
    for _ in range(steps):
        loss, _, _ = batch_loss(model, teacher, range(5))
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if clip:
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_fp32_updates_are_adamws_own():
    ours, plain = tiny_model(1), tiny_model(1)
    config = opsdc.Config(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.01)
    losses = updates(ours, opsdc.MasterAdamW(ours, config), 5)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1)
    assert losses == pytest.approx(updates(plain, adamw, 5, clip=0.01), abs=1e-6)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), atol=1e-6, rtol=1e-5)


def test_bf16_with_masters_follows_fp32_where_bf16_alone_stands_still():
    """200 updates at the paper's learning rate, from the same weights; movement of all weights."""
    start = tiny_model(1).to(torch.bfloat16)
    fp32, pure = tiny_model(1), tiny_model(1).to(torch.bfloat16)
    fp32.load_state_dict(start.state_dict())
    options = {"lr": 1e-6, "weight_decay": 0.01}
    fp32_losses = updates(fp32, torch.optim.AdamW(fp32.parameters(), **options), 200, clip=1.0)
    updates(pure, torch.optim.AdamW(pure.parameters(), **options), 200, clip=1.0)
    mixed = tiny_model(1).to(torch.bfloat16)
    optimizer = opsdc.MasterAdamW(mixed, opsdc.Config(learning_rate=1e-6))
    mixed_losses = updates(mixed, optimizer, 200)

    def flat(tensors):
        return torch.cat([tensor.detach().float().flatten() for tensor in tensors])

    origin = flat(start.parameters())
    moved = flat(fp32.parameters()) - origin
    masters = flat(optimizer.masters[weight] for weight in mixed.parameters()) - origin
    alone = flat(pure.parameters()) - origin
    shares = [(movement != 0).float().mean().item() for movement in (moved, masters, alone)]
    assert shares[1] == pytest.approx(shares[0], abs=0.01) and shares[2] < 0.05
    assert shares[0] > 0.9  # the rest is embeddings of ids that the batch does not have
    assert torch.cosine_similarity(masters, moved, dim=0) > 0.95
    assert masters.norm() / moved.norm() == pytest.approx(1, abs=0.05)
    assert mixed_losses == pytest.approx(fp32_losses, rel=0.02)
    rounded = [torch.equal(w, optimizer.masters[w].bfloat16()) for w in mixed.parameters()]
    assert all(rounded)


SMALL_RUN = ("@toy/args", "--batch_size=8", "--micro_batch_size=3", "--max_new_tokens=40")
SMALL_RUN += ("--refresh_every=3", "--learning_rate=1e-3", "--rollout_batch_size=4")


def outcome(output_dir):
    """Metrics without the times, and the weights."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").open()]
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return rows, AutoModelForCausalLM.from_pretrained(output_dir).state_dict()


def test_two_ranks_equal_one_process(tmp_path):
    """The same batch of 8, greedy by a tiny top_p: samples would differ between the ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    results = []
    for name, start in (("one", []), ("two", launcher)):
        command = [sys.executable, *start, "opsdc.py", *SMALL_RUN, "--steps=4", "--top_p=1e-6"]
        command += [f"--output_dir={tmp_path / name}"]
        run = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        results.append(outcome(tmp_path / name))
    (rows, weights), (expected_rows, expected_weights) = results
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-5)


EIGHT_STEPS = (*SMALL_RUN, "--steps=8", "--save_every=2")


def steps_done(output_dir):
    log = output_dir / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run = run_script(*EIGHT_STEPS, f"--output_dir={output_dir}")
    assert run.returncode == 0, run.stderr
    return outcome(output_dir)


def test_a_killed_run_resumes_bit_for_bit(undisturbed, tmp_path):
    """SIGKILL after a random step, after another, and during a save; then a damaged checkpoint."""
    options = EIGHT_STEPS
    killed, random_ = tmp_path / "killed", random.Random(0)
    command = [sys.executable, "opsdc.py", *options, f"--output_dir={killed}", "--resume"]

    wanted = random_.randint(1, 3)
    for moment in (
        lambda: steps_done(killed) >= wanted,
        lambda: steps_done(killed) == 4 and (killed / "unfinished").exists(),
        lambda: steps_done(killed) >= 5,
    ):
        process = subprocess.Popen(command, cwd=HERE, stdout=-3, stderr=-3)
        while process.poll() is None and not moment():
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -9
    newest = max(killed.glob("step-*"), key=lambda path: int(path.name[5:]))
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    resume = (f"--output_dir={killed}", "--resume")
    other = run_script(*options, *resume, "--temperature=0.9")
    assert other.returncode == 2 and "made with --temperature 1.0" in other.stderr
    run = run_script(*options, *resume)
    assert run.returncode == 0 and f"passed over: {newest} can't be read" in run.stderr
    (rows, weights), (expected_rows, expected_weights) = outcome(killed), undisturbed
    assert rows == expected_rows and same(weights, expected_weights)


def test_an_interrupted_run_saves_its_step_and_goes_on_bit_for_bit(undisturbed, tmp_path):
    output_dir, done = tmp_path / "run", 0
    command = [sys.executable, "opsdc.py", *EIGHT_STEPS, f"--output_dir={output_dir}", "--resume"]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(command, cwd=HERE, stdout=-3, stderr=-1, text=True)
        wanted = done + 2
        while process.poll() is None and steps_done(output_dir) < wanted:
            time.sleep(0.001)
        process.send_signal(number)
        _, stderr = process.communicate()
        done = steps_done(output_dir)
        assert process.returncode == 130 and wanted <= done < 8, stderr
        said = f"opsdc.py: interrupted; step {done} is saved, --resume goes on"
        assert stderr.splitlines()[-1] == said
        assert (output_dir / f"step-{done}" / "run.json").exists()
    run = run_script(*EIGHT_STEPS, f"--output_dir={output_dir}", "--resume")
    assert run.returncode == 0, run.stderr
    assert outcome(output_dir)[0] == undisturbed[0]
    assert same(outcome(output_dir)[1], undisturbed[1])


def test_a_second_interruption_ends_a_run_at_once(tmp_path):
    output_dir = tmp_path / "run"
    long_steps = ("--temperature=99", "--max_new_tokens=900", "--batch_size=32")
    command = [sys.executable, "opsdc.py", *SMALL_RUN, *long_steps, f"--output_dir={output_dir}"]
    process = subprocess.Popen(command, cwd=HERE, stdout=-3, stderr=-1, text=True)
    while process.poll() is None and not (output_dir / "metrics.jsonl").exists():
        time.sleep(0.001)
    for pause in (0.5, 0.1, 1.1):  # the second, within a second, is the first passed on
        time.sleep(pause)
        assert process.poll() is None and steps_done(output_dir) == 0
        process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130 and "Traceback" not in stderr
    assert "interrupted; --resume goes on from the newest checkpoint" in stderr.splitlines()[-1]
    assert steps_done(output_dir) == 0 and not list(output_dir.glob("step-*"))


def files(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def two_ranks(output_dir):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, "opsdc.py", *SMALL_RUN, "--steps=9999"]
    command += ["--save_every=0", f"--output_dir={output_dir}"]
    process = subprocess.Popen(command, cwd=HERE, stdout=-3, stderr=-1, text=True)
    while process.poll() is None and steps_done(output_dir) < 2:
        time.sleep(0.01)
    return process


def test_ranks_that_are_interrupted_save_the_same_step(tmp_path):
    process = two_ranks(tmp_path / "run")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)  # a hang, not slowness
    (saved,) = (tmp_path / "run").glob("step-*")
    assert saved.name == f"step-{steps_done(tmp_path / 'run')}"
    assert {"optimizer-0-of-2.pt", "optimizer-1-of-2.pt", "run.json"} <= files(saved)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_rank_that_dies_ends_the_job(tmp_path):
    process = two_ranks(tmp_path / "run")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)  # a hang, not slowness
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in stderr


@pytest.fixture(scope="module")
def small_qwen3(tmp_path_factory):
    """Qwen3 with its own vocabulary, template and generation settings; small and random."""
    source, path = SHARED / "qwen3", tmp_path_factory.mktemp("qwen3")
    shape = json.loads((source / "config-0.6B.json").read_text())
    shape |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(**shape))
    model.generation_config = GenerationConfig.from_pretrained(source)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(source).save_pretrained(path)
    return path


@needs_shared
def test_real_tokenizer_real_vocabulary_real_problems(small_qwen3, tmp_path):
    data = SHARED / "dapo_math_17k.parquet"
    run = run_script(
        *(f"--model={small_qwen3}", f"--data={data}", f"--output_dir={tmp_path}/run"),
        *("--steps=2", "--batch_size=2", "--max_new_tokens=8"),
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["truncated"] for row in rows] == [1.0, 1.0]
    assert rows[0]["student_entropy"] == pytest.approx(math.log(151_936), rel=0.05)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert saved.generation_config.eos_token_id == [151645, 151643]
    assert saved.generation_config.top_k == 20
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run")) == 151_669


# ---- Faults --------------------------------------------------------------------------------------

# Forks one process for each line of JSON on stdin, with opsdc.py and eval.py imported already: each
# runs the script's command line with its own exit code and output, without 4 s of imports.
LAUNCHER = """
import json, os, resource, sys, traceback
import eval, opsdc
for line in sys.stdin:
    task = json.loads(line)
    if (child := os.fork()) == 0:
        output = os.open(task["output"], os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1), os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest_file"],) * 2)
        sys.argv, code = task["command"], 0
        try:
            {"opsdc.py": opsdc, "eval.py": eval}[sys.argv[0]].main()
        except SystemExit as end:
            if isinstance(code := end.code, str):
                print(end.code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
TRAIN = "opsdc.py --model=toy --data=toy/train.jsonl --steps=1 --batch_size=2 --max_new_tokens=4 "
TRAIN += "--output_dir={out} "
EVAL = "eval.py --data=toy/test.jsonl --limit=2 --samples=1 --max_new_tokens=4 --output_dir={out} "
# Arguments after the good ones, of a flag the last one counts; what the last line of output says.
# Exit code 2 and no output directory, unless RUNNING says otherwise.
FAULTS = [
    # models
    (TRAIN + "--model={tmp}/nowhere", "nowhere can't be read"),
    (TRAIN + "--model=Nobody/Nothing", "Nobody/Nothing can't be read: We couldn't connect"),
    (TRAIN + "--model={tmp}/empty", "empty can't be read: Unrecognized model"),
    (TRAIN + "--model={tmp}/no-tokenizer", "1 tokens in its tokenizer, 821 in its model"),
    (TRAIN + "--model={tmp}/small-vocabulary", "821 tokens in its tokenizer, 40 in its model"),
    (TRAIN + "--model={tmp}/no-template", "tokenizer.chat_template is not set"),
    (TRAIN + "--model={tmp}/no-stop", "names no eos_token_id"),
    (TRAIN + "--model={tmp}/no-weights", "no file named model.safetensors"),
    (TRAIN + "--model={tmp}/cut-weights", "cut-weights can't be read: Error while deserializing"),
    (TRAIN + "--model={tmp}/other-shape", "other-shape can't be read"),
    (TRAIN + "--model={tmp}/bad-config", "is not a valid JSON file"),
    (TRAIN + "--model={tmp}/unknown-kind", "model type `nobody`"),
    (TRAIN + "--model={tmp}/own-code", "contains custom code"),
    (TRAIN + "--model={tmp}/bert", "is no causal model"),
    (TRAIN + "--model={tmp}/t5", "T5Config"),
    (TRAIN + "--max_new_tokens=1000", "toy has 1024 positions"),
    # data
    (TRAIN + "--data={tmp}/nowhere.jsonl", "nowhere.jsonl can't be read: [Errno 2] No such file"),
    (TRAIN + "--data=Nobody/nothing", "Nobody/nothing can't be read"),
    (TRAIN + "--data={tmp}/no-rows.jsonl", "it has no rows"),
    (TRAIN + "--data={tmp}/malformed.jsonl", "malformed.jsonl can't be read: row 3 is no JSON"),
    (TRAIN + "--data={tmp}/list.jsonl", "row 1 is no JSON object"),
    (TRAIN + "--data={tmp}/no.parquet", "Parquet magic bytes not found"),
    (TRAIN + "--data={tmp}/columns.jsonl", "has columns ['text', 'id']"),
    (TRAIN + "--data={tmp}/blank.jsonl", "row 2: the problem is ' ', not a text"),
    (TRAIN + "--data={tmp}/number.jsonl", "row 1: the problem is 7, not a text"),
    (TRAIN + "--data={tmp}/no-turns.jsonl", "row 1: the prompt is [], not a text"),
    (TRAIN + "--data={tmp}/no-chat.jsonl", "no-chat.jsonl can't be read: string indices"),
    (
        TRAIN + "--max_prompt_tokens=3",
        "0 problems of toy/train.jsonl are within --max_prompt_tokens",
    ),
    (TRAIN + "--batch_size=3201", "too few for --batch_size 3201"),
    # values
    (TRAIN + "--steps=many", "invalid int value: 'many'"),
    (TRAIN + "--steps=0", "--steps is 0, but must be at least 1"),
    (TRAIN + "--micro_batch_size=-1", "--micro_batch_size is -1"),
    (TRAIN + "--learning_rate=1e9", "--learning_rate is 1000000000.0"),
    (TRAIN + "--learning_rate=nan", "--learning_rate is nan"),
    (TRAIN + "--top_p=1.5", "--top_p is 1.5"),
    (TRAIN + "--temperature=0", "--temperature is 0.0"),
    (TRAIN + "--seed=99999999999", "--seed is 99999999999"),
    (TRAIN + "--divergence=kl", "invalid choice: 'kl'"),
    (TRAIN + "--instruction=v3", "--instruction is 'v3'"),
    (TRAIN + "--instruction=percent:100", "--instruction is 'percent:100'"),
    (TRAIN + "--rate=1", "unrecognized arguments: --rate=1"),
    (TRAIN + "@nowhere", "No such file or directory: 'nowhere'"),
    # places
    (TRAIN + "--output_dir={tmp}/columns.jsonl/run", "columns.jsonl/run can't be written"),
    (TRAIN + "--steps=99999999 --save_every=1", "GB are free: raise --save_every"),
    # evaluation
    (EVAL, "name the models to evaluate"),
    (EVAL + "toy {tmp}/nowhere", "nowhere can't be read"),
    (EVAL + "toy {tmp}/no-template", "tokenizer.chat_template is not set"),
    (EVAL + "toy {tmp}/no-weights", "no file named model.safetensors"),
    (EVAL + "toy {tmp}/no-stop", "names no eos_token_id"),
    (EVAL + "toy toy", "is named twice"),
    (EVAL + "toy --prompt v3", "--instruction is 'v3'"),
    (EVAL + "toy --prompt v1 v2", "--prompt names 2 prompts for 1 models"),
    (EVAL + "toy --max_new_tokens=1020", "toy has 1024 positions"),
    (EVAL + "toy --temperature=0", "--temperature must be more than 0"),
    (EVAL + "toy --samples=0", "--samples is 0"),
    (EVAL + "toy --data={tmp}/malformed.jsonl", "row 3 is no JSON object"),
    (EVAL + "toy --data={tmp}/columns.jsonl", "not problem and answer"),
    (EVAL + "toy --data={tmp}/no-answer.jsonl", "row 2: the answer is '', not a text"),
    (EVAL + "toy --data={tmp}/same-id.jsonl", "gives several problems the same id"),
    (EVAL + "toy --output_dir={tmp}/columns.jsonl", "File exists"),
    ("eval.py toy --output_dir={out} --benchmarks=gsm8k", "no benchmark 'gsm8k'"),
    (EVAL + "--responses {tmp}/nowhere.jsonl", "nowhere.jsonl can't be read: [Errno 2]"),
    (EVAL + "--responses {tmp}/malformed.jsonl", "row 3 is no JSON object"),
    (EVAL + "--responses {tmp}/no-text.jsonl", "row 1 has no good response, tokens"),
    (EVAL + "--responses {tmp}/too-few.jsonl", "has not 1 (--samples) responses to 1"),
    (EVAL + "--responses {tmp}/others.jsonl", "answers problems that test does not have: ['7']"),
]


RESPONSE = '{"id": %d, "response": "Answer: 2", "tokens": 3, "finished": true}\n'


def edited(path, **changes):
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """The models and files that FAULTS names."""
    tmp = tmp_path_factory.mktemp("faults")
    (tmp / "empty").mkdir()
    names = "no-tokenizer small-vocabulary no-template no-stop no-weights cut-weights other-shape"
    for name in f"{names} bad-config unknown-kind own-code bert t5 broken".split():
        shutil.copytree(HERE / "toy", tmp / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp / "no-tokenizer" / file).unlink()
    edited(tmp / "small-vocabulary" / "config.json", vocab_size=40)
    (tmp / "no-template" / "chat_template.jinja").unlink()
    edited(tmp / "no-stop" / "generation_config.json", eos_token_id=None)
    (tmp / "no-weights" / "model.safetensors").unlink()
    weights = HERE / "toy" / "model.safetensors"
    (tmp / "cut-weights" / "model.safetensors").write_bytes(weights.read_bytes()[:9999])
    edited(tmp / "other-shape" / "config.json", hidden_size=64)
    (tmp / "bad-config" / "config.json").write_text("{")
    edited(tmp / "unknown-kind" / "config.json", model_type="nobody")
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edited(tmp / "own-code" / "config.json", model_type="nobody", auto_map=auto_map)
    (tmp / "own-code" / "own.py").write_text(f"open({str(tmp / 'was-run')!r}, 'w')\n")
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=821, hidden_size=16, **small)).save_pretrained(tmp / "bert")
    small = {"num_layers": 1, "num_heads": 2, "d_ff": 16, "d_kv": 8}
    T5ForConditionalGeneration(T5Config(vocab_size=821, d_model=16, **small)).save_pretrained(
        tmp / "t5"
    )
    broken = AutoModelForCausalLM.from_pretrained(tmp / "broken")
    broken.model.layers[0].mlp.up_proj.weight.data[:] = math.nan
    broken.save_pretrained(tmp / "broken")
    for name, rows in {
        "no-rows.jsonl": "",
        "malformed.jsonl": '{"problem": "a", "answer": 1}\n' * 2 + '{"problem": "b\n',
        "list.jsonl": "[1, 2]\n",
        "no.parquet": "problem\n",
        "columns.jsonl": '{"text": "a", "id": 1}\n',
        "blank.jsonl": '{"problem": "a"}\n{"problem": " "}\n',
        "number.jsonl": '{"problem": 7}\n',
        "no-chat.jsonl": '{"prompt": ["a"]}\n',
        "no-turns.jsonl": '{"prompt": []}\n',
        "no-answer.jsonl": '{"problem": "a", "answer": 1}\n{"problem": "b", "answer": null}\n',
        "same-id.jsonl": '{"id": 1, "problem": "a", "answer": 1}\n' * 2,
        "too-few.jsonl": RESPONSE % 0,
        "others.jsonl": RESPONSE % 0 + RESPONSE % 1 + RESPONSE % 7,
        "no-text.jsonl": '{"id": 0, "response": null, "tokens": "3", "finished": true}\n',
    }.items():
        (tmp / name).write_text(rows)
    return tmp


@pytest.fixture(scope="module")
def launch(faulty):
    """Runs a command line; returns exit code and lines of output."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER],
        **{"cwd": HERE, "env": environment, "stdin": -1, "stdout": -1, "text": True},
    )
    numbers = itertools.count()

    def run(command, largest_file=-1):
        output = faulty / f"output-{next(numbers)}"
        task = {"command": command.split(), "output": str(output), "largest_file": largest_file}
        launcher.stdin.write(json.dumps(task) + "\n")
        launcher.stdin.flush()
        code = int(launcher.stdout.readline())
        return code, output.read_text().replace("\r", "\n").splitlines()

    yield run
    launcher.kill()


@pytest.mark.parametrize("command, message", FAULTS)
def test_bad_input_ends_with_one_line_and_nothing_written(
    launch, faulty, tmp_path, command, message
):
    out = tmp_path / "out"
    code, lines = launch(command.format(tmp=faulty, out=out))
    assert code == 2 and message in lines[-1], lines[-1]
    assert lines[-1].startswith(command.split()[0] + ": error: ")
    assert not any("Traceback" in line for line in lines)
    assert not out.exists() and not (faulty / "was-run").exists()


def test_updates_that_are_not_finite_are_skipped_and_the_third_ends_the_run(launch, faulty):
    out = faulty / "broken-run"
    code, lines = launch(TRAIN.format(out=out) + f"--model={faulty}/broken --steps=9")
    assert code == 1 and "three gradients in a row were not finite" in lines[-1]
    rows = read_rows(out / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [True] * 3 and math.isnan(rows[-1]["loss"])
    assert {path.name for path in out.iterdir()} == {"metrics.jsonl", "rollouts-1.jsonl", "step-3"}
    assert "step 3 is saved" in lines[-1] and (out / "step-3" / "run.json").exists()


def test_an_update_that_is_not_finite_changes_nothing_and_the_next_one_does():
    model = tiny_model(1)
    optimizer = opsdc.MasterAdamW(model, opsdc.Config(learning_rate=1e-3))
    before = state(model)
    for scale, moves in ((math.nan, False), (1.0, True)):
        loss, _, _ = batch_loss(model, tiny_model(2), range(5))
        (loss * scale).backward()
        assert math.isfinite(optimizer.step()) == moves
        assert same(state(model), before) != moves
        assert all(tensor.isfinite().all() for tensor in state(model).values())


def test_a_full_disk_while_saving_leaves_the_checkpoint_before(launch, faulty):
    """A limit on the size of a file stands in for the disk: each library then fails its own way."""
    out = faulty / "full"
    command = TRAIN.format(out=out) + "--resume --steps=4 "
    assert launch(command + "--save_every=2")[0] == 0
    (out / "run.json").unlink()  # as if it had been stopped before its end
    step_2 = [path for path in (out / "step-2").rglob("*") if path.is_file()]
    before = [path.read_bytes() for path in step_2]
    for largest in (2 * 10**6, 5 * 10**6):  # model and optimizer have 3.8 and 11.5 million bytes
        code, lines = launch(command + "--save_every=3", largest)
        assert code == 1 and "step-3 can't be written" in lines[-1] and "--resume" in lines[-1]
        assert [path.read_bytes() for path in step_2] == before
        assert not (out / "unfinished").exists() and not (out / "step-3").exists()
    assert launch(command + "--save_every=3")[0] == 0


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path):
    file = tmp_path / "run.json"
    for before in (False, True):
        with pytest.raises(UnicodeEncodeError):
            opsdc.write_whole(file, "half \ud800")  # fails when the file is open already
        assert file.exists() == before
        opsdc.write_whole(file, "whole")
    assert file.read_text() == "whole"


def test_a_full_disk_during_an_evaluation_loses_no_sample_that_was_written(launch, faulty):
    out, whole = faulty / "full-evaluation", faulty / "whole-evaluation"
    command = EVAL + "toy --limit=8 --batch_size=2"
    assert launch(command.format(out=whole))[0] == 0
    code, lines = launch(command.format(out=out), largest_file=1200)
    assert code == 2 and "File too large" in lines[-1]
    written = (out / "samples-0.jsonl").read_text().rpartition("\n")[0].splitlines()
    assert 0 < len(written) < 8
    assert launch(command.format(out=out))[0] == 0
    assert (out / "samples-0.jsonl").read_text() == (whole / "samples-0.jsonl").read_text()
    assert (out / "samples-0.jsonl").read_text().splitlines()[: len(written)] == written


def test_a_run_that_writes_to_a_taken_place_changes_nothing(launch, faulty):
    out = faulty / "taken"
    command = TRAIN.format(out=out)
    assert launch(command)[0] == 0
    before = {name: (out / name).read_bytes() for name in files(out)}
    for more, message in (("", "holds a run"), ("--resume", "holds a finished run")):
        code, lines = launch(command + more)
        assert code == 2 and message in lines[-1]
        assert {name: (out / name).read_bytes() for name in files(out)} == before


def test_rollouts_of_nothing_but_cut_or_empty_completions_are_trained_on(launch, faulty):
    out = faulty / "cut"
    code, lines = launch(TRAIN.format(out=out) + "--max_new_tokens=1")
    assert code == 0 and any("every rollout was cut" in line for line in lines)
    (row,) = read_rows(out / "metrics.jsonl")
    assert row["completion_tokens"] == row["truncated"] == 1 and math.isfinite(row["loss"])


@pytest.mark.parametrize(
    "script, command, remedy",
    [
        (opsdc, TRAIN, "lower --rollout_batch_size if in a rollout"),
        (evaluation, EVAL + "toy", "lower --batch_size"),
    ],
)
def test_out_of_memory_names_the_setting_to_lower(
    monkeypatch, capsys, tmp_path, script, command, remedy
):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(GenerationMixin, "generate", fail)
    monkeypatch.setattr(sys, "argv", command.format(out=tmp_path / "run").split())
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 1 and remedy in capsys.readouterr().err


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch, toy_config, tmp_path):
    monkeypatch.setattr(opsdc, "RANKS", 3)
    config = dataclasses.replace(toy_config, output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="--batch_size 4 can't be shared by 3 processes"):
        opsdc.train(config)
    assert not (tmp_path / "run").exists()


def test_a_gpu_without_bf16_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(opsdc, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(sys, "argv", ["opsdc.py"])
    with pytest.raises(SystemExit) as end:
        opsdc.main()
    assert end.value.code == 2 and "no bf16" in capsys.readouterr().err


# ---- Grading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grader():
    return evaluation.Grader(workers=2)


# Rows of grader_cases.jsonl where `final` says wrong and math-verify's own unit test says right.
FINAL_DIFFERS = {
    142: "states no answer: no Answer: line, no box; 12 is the last number of its reasoning",
    163: "states no answer: no Answer: line, no box; 100% is the last number of its reasoning",
    16: "the same, and names two numbers: not it's not 10 it's 1,000.99m²",
    34: "'Answer' without a colon is no Answer: line, and the number stands two lines below it",
    156: "Answer: Jane started growing Sphere 3 hours ago: a sentence that is not `... is 3`",
    139: "2.6667 for 8/3 in an interval: rounded, and wrong by the paper's scorer too",
    217: "malformed gold (W(n) = .. and), malformed prediction (W(x)=1orW(x)=-1)",
}


@needs_shared
def test_dual_gives_the_recorded_verdicts_of_the_papers_scorer(grader):
    cases = read_rows(SHARED / "grader_cases.jsonl")
    found = grader.grade_all((case["prediction"], case["gold"]) for case in cases)
    assert [verdict["dual"] for verdict in found] == [case["official_dual_path"] for case in cases]
    assert all(v["dual"] == (v["answer_only"] or v["boxed_only"]) for v in found)
    assert not any(verdict["errors"] for verdict in found)
    # `official_answer_line` was recorded of "Answer: {prediction}", by the dual scorer: no other
    # reading fits all of its values.
    cases = [case for case in cases if case["official_answer_line"] is not None]
    found = grader.grade_all(("Answer: " + case["prediction"], case["gold"]) for case in cases)
    assert [v["dual"] for v in found] == [case["official_answer_line"] for case in cases]


@needs_shared
def test_final_is_what_a_careful_person_expects(grader):
    """math-verify's unit tests are often a bare formula, which here becomes the stated answer."""
    cases = read_rows(SHARED / "grader_cases.jsonl")
    stated = re.compile(r"answer[*]*\s*:|\\boxed", re.I)
    responses = [
        case["prediction"] if stated.search(case["prediction"]) else "Answer: " + case["prediction"]
        for case in cases
    ]
    golds = [case["gold"] for case in cases]
    found = grader.grade_all(zip(responses, golds, strict=True))
    differ = {c["id"]: v for c, v in zip(cases, found, strict=True) if v["final"] != c["expected"]}
    assert differ.keys() == FINAL_DIFFERS.keys()
    assert not any(verdict["final"] for verdict in differ.values())


@needs_shared
def test_math500_solutions_against_their_own_and_other_answers(grader):
    """The other answer is the next that differs as mathematics: without layout and `x =`."""
    problems = read_rows(SHARED / "math500.jsonl")
    layout = r"^\w\s*=|\\(?:left|right|text|mbox|[!,;])|\\[dt](?=frac)|\^\\circ|[\s{}$]"
    plain = [re.sub(layout, "", row["answer"]) for row in problems]
    own = grader.grade_all((row["solution"], row["answer"]) for row in problems)
    assert all(verdict["dual"] and verdict["final"] for verdict in own)
    pairs = []
    for i, row in enumerate(problems):
        j = next(k % 500 for k in range(i + 1, i + 500) if plain[k % 500] != plain[i])
        pairs.append((row["solution"], problems[j]["answer"]))
    assert not any(v["dual"] or v["final"] or v["errors"] for v in grader.grade_all(pairs))


@needs_shared
def test_bold_answer_lines_fail_the_papers_scorer_for_109_of_500(grader):
    answers = [row["answer"] for row in read_rows(SHARED / "math500.jsonl")]
    found = grader.grade_all((f"**Answer:** {answer}", answer) for answer in answers)
    assert sum(not verdict["dual"] for verdict in found) == 109
    assert all(verdict["final"] for verdict in found)


@pytest.mark.parametrize(
    "response, gold, dual, final",
    [
        (r"<think>maybe \boxed{12}</think> Answer: 13", "12", True, False),
        (r"<think>maybe \boxed{12}</think> Answer: 13", "13", True, True),
        ("<think>so there are 3 groups of 14", "14", True, False),  # cut off: the last number
        (r"Answer: 4\sqrt{2}", "4", True, False),
        (r"Answer: 4\sqrt{2}", r"4\sqrt{2}", True, True),
        ("Answer: 17\n\nNo: \\boxed{18}", "17", True, False),
        ("Answer: 17\n\nNo: \\boxed{18}", "18", True, True),
        ("\\boxed{18}\n\nAnswer: 17", "17", True, True),
        ("\\boxed{18}\n\nAnswer: 17", "18", True, False),
        (r"$x$ Answer: 17 ... \boxed{18}", "17", False, False),  # on one line, path 1 has the box
        (r"$x$ Answer: 17 ... \boxed{18}", "18", True, True),
    ],
)
def test_faults_of_the_papers_scorer_are_in_dual_and_not_in_final(
    grader, response, gold, dual, final
):
    verdict = grader.grade(response, gold)
    assert (verdict["dual"], verdict["final"]) == (dual, final)


def test_final_reads_the_last_stated_answer_in_any_dress(grader):
    right = ["Answer: 5", "**Answer:** 5", "**Answer: 5**", "**Answer**: 5.", "> answer : `5`"]
    right += ["### Final answer: *5*", "Answer: $5$.", r"Answer: \(5\)", r"Answer: \boxed{5}"]
    right += ["Answer:\n\n$$\n5\n$$\n", "**Answer:**\n5\n\nBye.", r"so \[x = \boxed{5}\] as wanted"]
    right += ["Answer: x = 5", "Answer: The answer is 5. I hope it is correct.", "Answer: 5 apples"]
    right += ["Answer: $5$ cm", "Answer: 5 cm²", "Answer: 5°", "Answer: 4\nNo.\nAnswer: 5"]
    right += ["Answer: 5\nWe check our answer: it fits.", r"Answer: 4, no, \boxed{5}, not \boxed{}"]
    right += ["<think>Answer: 4</think>\nAnswer: 5", "a </think> b </think> Answer: 5"]
    wrong = ["", "5", "so it must be $5$", "the result is 5", "Answer:", "Answer: not 5"]
    wrong += ["Answer: 5x", "Answer: $5$ if $x=1$", "<think>Answer: 5", r"\boxed{5", "Answer: 50"]
    wrong += ["<think>1</think><think>Answer: 5", r"Answer: 5 \boxed{6}", "Answer: 5\n\nAnswer: 6"]
    wrong += ["Answer: 5" + "5" * 1000, "Answer: 5 of 20", "Answer: 5, 6"]
    for responses, expected in ((right, True), (wrong, False)):
        found = grader.grade_all((response, "5") for response in responses)
        judged = {r: v["final"] for r, v in zip(responses, found, strict=True)}
        assert judged == dict.fromkeys(responses, expected)
    assert not any(v["final"] for v in grader.grade_all((response, "4") for response in right))
    assert grader.grade(r"$\boxed{1} \quad \text{and} \quad \boxed{2}$", "1, 2")["final"]


def test_thinking_that_the_prompt_opened_must_close(grader):
    assert not grader.grade("Answer: 5", "5", True)["final"]
    assert grader.grade("</think>Answer: 5", "5", True)["final"]


M = 10**6
ENDLESS = [rf"\boxed{{{x}}}" for x in ("9^{9^{9^{9}}}", "2^{2^{2^{2^{100}}}}", "(10^9)!")]
ENDLESS += ["Answer: 9^9^9^9", "Answer: 9**9**9**9", "Answer: ((10!)!)!", "Answer: 7^(10^10)"]
ENDLESS += [r"\boxed{\sum_{k=1}^{10^{10}} \frac{1}{k}}"]
ODD = ["", "Answer: " + r"\frac{1}{" * 90 + "2" + "}" * 90, "Answer: " + "7" * M, "$ " * (M // 2)]
ODD += [r"\boxed{" + "7" * M + "}", r"\boxed{" + "{" * M, "Answer: " + "}" * M, "(" * M + ")" * M]
ODD += [r"\boxed{}" * 10**4, r"\boxed{" * 10**4, "Answer: \0 \\boxed{\0}" + "\0" * M]
ODD += ["Answer: \u202e17\u202c" + "\u200f" * M, "Answer: \ud800 \\boxed{\udfff}"]
ODD += [r"\boxed{" + "(" * M + "1" + ")" * M + "}", "Answer: \n" * (M // 9), "Answer: " * (M // 8)]
ODD += ["Answer" + " " * M + ":" + " " * M, "Answer:" + "\n" * M]


def test_hostile_responses_are_wrong_within_seconds_and_harm_no_other():
    grader = evaluation.Grader(limit=0.5)
    for response in ENDLESS + ODD:
        start = time.monotonic()
        verdict = grader.grade(response, "5")
        assert not (verdict["dual"] or verdict["final"]), response[:50]
        assert verdict["errors"] or response not in ENDLESS, response[:50]  # ended, and counted
        assert time.monotonic() - start < 20, response[:50]  # a hang, not slowness
        assert grader.grade("Answer: 5", "5")["dual"]
    batch = [row for r in ENDLESS + ODD for row in ((r, "5"), ("Answer: 5", "5"))]
    found = evaluation.Grader(workers=3, limit=0.5).grade_all(batch)
    assert [verdict["final"] for verdict in found] == [False, True] * len(ENDLESS + ODD)


# ---- Evaluation ----------------------------------------------------------------------------------


def evaluate_toy(output_dir, *arguments, launcher=(), **options):
    arguments = ("toy", "--data=toy/test.jsonl", "--samples=2", "--limit=24", *arguments)
    arguments += ("--max_new_tokens=128", "--batch_size=4", f"--output_dir={output_dir}")
    command = [sys.executable, *launcher, "eval.py", *arguments]
    return subprocess.Popen(command, cwd=HERE, stdout=-1, stderr=-1, text=True, **options)


def samples(output_dir):
    rows = [row for file in output_dir.glob("samples-*.jsonl") for row in read_rows(file)]
    return sorted(rows, key=lambda row: (row["prompt"], int(row["id"]), row["sample"]))


@pytest.fixture(scope="module")
def toy_evaluation(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("evaluation") / "whole"
    process = evaluate_toy(output_dir)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return output_dir, stdout


def test_an_evaluation_reports_what_its_rows_say(toy_evaluation):
    output_dir, stdout = toy_evaluation
    rows, (summary,) = samples(output_dir), json.loads((output_dir / "summary.json").read_text())
    problems = read_rows(HERE / "toy" / "test.jsonl")[:24]
    tokenizer = AutoTokenizer.from_pretrained(HERE / "toy")
    assert [(row["id"], row["sample"]) for row in rows] == [
        (str(i), sample) for i in range(24) for sample in range(2)
    ]
    for row in rows:
        ids = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        assert row["tokens"] == len(ids) + row["finished"]
        stated = re.findall(r"Answer: (\d)$", row["response"])
        assert row["final"] == (stated == [str(problems[int(row["id"])]["answer"])])
    assert summary["tokens"] == pytest.approx(sum(row["tokens"] for row in rows) / 48)
    assert summary["accuracy"]["final"] == pytest.approx(sum(row["final"] for row in rows) / 48)
    assert summary["truncated"] == pytest.approx(sum(not row["finished"] for row in rows) / 48)
    by_level = {str(problem["level"]) for problem in problems}
    assert summary["levels"].keys() == by_level and summary["reduction"] == 0
    assert f"{100 * summary['accuracy']['final']:.1f} ±" in stdout


def test_a_killed_evaluation_ends_as_one_that_ran_through(toy_evaluation, tmp_path):
    """Ctrl-C and two kills, as soon as a random number of rows is there; then a row cut by hand."""
    output_dir, random_ = tmp_path / "killed", random.Random(0)
    records = output_dir / "samples-0.jsonl"
    numbers = (signal.SIGINT, signal.SIGKILL, signal.SIGKILL)
    for wanted, number in zip(sorted(random_.sample(range(1, 48), 3)), numbers, strict=True):
        process = evaluate_toy(output_dir)
        while process.poll() is None and not (
            records.exists() and records.read_bytes().count(b"\n") >= wanted
        ):
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate()
        if number == signal.SIGINT:
            assert process.returncode == 130 and "goes on where it stopped" in stderr
            assert "Traceback" not in stderr
    records.write_bytes(records.read_bytes()[:-20])
    process = evaluate_toy(output_dir)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    whole, _ = toy_evaluation
    assert samples(output_dir) == samples(whole)
    assert (output_dir / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()


def test_ranks_share_the_work_and_other_settings_are_refused(toy_evaluation, tmp_path):
    output_dir = tmp_path / "ranks"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = evaluate_toy(output_dir, launcher=launcher)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    whole, _ = toy_evaluation
    assert samples(output_dir) == samples(whole)
    assert all(len(read_rows(output_dir / f"samples-{rank}.jsonl")) == 24 for rank in (0, 1))

    before = {file: file.read_bytes() for file in whole.iterdir()}
    process = evaluate_toy(whole, "--temperature=0.7")
    _, stderr = process.communicate()
    assert process.returncode == 2 and "temperature 0.6, not 0.7" in stderr
    assert {file: file.read_bytes() for file in whole.iterdir()} == before


def test_rows_may_differ_in_their_fields_and_kinds_of_answer(tmp_path):
    data = tmp_path / "mixed.jsonl"
    rows = [{"problem": "a", "answer": 1}, {"problem": "b", "answer": "1/2", "level": 3}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = evaluation.load_benchmarks(evaluation.Settings(data=[str(data)]))["mixed"]
    assert [(row["answer"], row["level"]) for row in loaded] == [("1", None), ("1/2", 3)]


def test_intervals_count_problems_and_not_samples():
    values = {"a": [1, 1, 0, 1], "b": [0, 0, 0, 0], "c": [1, 1, 1, 1], "d": [0, 1, 0, 0]}
    rows = [{"id": i, "final": value} for i, row in values.items() for value in row]
    mean, half = evaluation.mean_and_interval(rows, "final")
    means = torch.tensor([0.75, 0.0, 1.0, 0.25])
    assert mean == means.mean() and half == pytest.approx(1.96 * means.std().item() / 2)
    assert evaluation.mean_and_interval(rows * 5, "final") == pytest.approx((mean, half))


def test_responses_of_another_engine_are_graded(tmp_path):
    data, written = tmp_path / "sums.jsonl", tmp_path / "written.jsonl"
    data.write_text('{"problem": "1+1", "answer": 2}\n{"problem": "2+2", "answer": 4}\n')
    rows = [
        {"id": 0, "response": "</think>Answer: 2", "tokens": 5, "finished": True},
        {"id": 0, "response": "<think>so it is 2", "tokens": 9, "finished": False},
        {"id": "1", "response": "Answer: 4", "tokens": 4, "finished": True},
        {"id": "1", "response": "Answer: 5\u2028", "tokens": 4, "finished": True},
    ]

    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    written.write_text("".join(lines), encoding="utf-8")
    arguments = (f"--responses={written}", f"--data={data}", "--samples=2")
    run = run_script(*arguments, f"--output_dir={tmp_path}/graded", script="eval.py")
    assert run.returncode == 0, run.stderr
    (summary,) = json.loads((tmp_path / "graded" / "summary.json").read_text())
    assert summary["accuracy"] == {
        "dual": 0.75,
        "answer_only": 0.5,
        "boxed_only": 0.75,
        "final": 0.5,
    }
    assert summary["tokens"] == 5.5 and summary["truncated"] == 0.25


def test_the_papers_figures_stand_beside_the_same_model(tmp_path):
    (row,) = evaluation.paper_rows("Qwen/Qwen3-8B", "v1", "math500")
    assert "Qwen3-8B, prompt v1" in row and "| v2 |" in row and "95.6" in row and "2,983" in row
    run = {"config": {"model": "Qwen/Qwen3-14B", "instruction": "v1"}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    dual, strict = evaluation.paper_rows(str(tmp_path), "student", "aime24")
    assert "73.8" in dual and "8,261" in dual and "| v1 |" in strict and "76.3" in strict
    assert evaluation.paper_rows("toy", "student", "math500") == []


@needs_shared
def test_real_benchmarks_with_the_real_tokenizer(small_qwen3, tmp_path):
    files = [str(SHARED / f"{name}.jsonl") for name in ("math500", "aime24", "aime25")]
    run = run_script(
        *(small_qwen3, "--limit=2", "--samples=2", "--max_new_tokens=8", "--data", *files),
        f"--output_dir={tmp_path}/run",
        script="eval.py",
    )
    assert run.returncode == 0, run.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [row["benchmark"] for row in summary] == ["math500", "aime24", "aime25"]
    assert all(row["truncated"] == 1 and row["tokens"] == 8 for row in summary)
    assert all(row["accuracy"]["final"] == 0 for row in summary)
    full = evaluation.load_benchmarks(evaluation.Settings(data=files))
    assert {name: len(rows) for name, rows in full.items()} == {
        "math500": 500,
        "aime24": 30,
        "aime25": 30,
    }
    assert {row["level"] for row in full["math500"]} == {1, 2, 3, 4, 5}
    assert full["aime25"][0]["answer"] == "70"
