"""Tests of opsdc.py and eval.py, against what does not share their code. Run: pytest"""

import os

# The tests are of fp32 on a CPU, without a network, wherever they run.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import gc
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import pkgutil
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch.distributions import Categorical, kl_divergence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import eval as evaluation
import opsdc

HERE, TOY = Path(__file__).parent, Path(__file__).parent / "toy"
logging.disable()  # pytest would keep logged errors, and with them the lock of the run they ended


def tiny_model(kind="qwen3", seed=0, **options):
    """A random model of 60 tokens whose distributions are far from uniform."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    config = AutoConfig.for_model(kind, **(sizes | {"initializer_range": 0.3} | options))
    return AutoModelForCausalLM.from_config(config).eval()


def by_the_book(student, teacher, triples, kind):
    """Means over a batch of divergence and both entropies, from full logits of each sequence."""
    means, rows = [], min(model.config.vocab_size for model in (student, teacher))
    for x, x_c, y in triples:
        z = student(torch.tensor([x + y])).logits[0, len(x) - 1 : -1, :rows]
        z_c = teacher(torch.tensor([x_c + y])).logits[0, len(x_c) - 1 : -1, :rows].detach()
        q, p = Categorical(logits=z), Categorical(logits=z_c)
        m = Categorical(probs=(q.probs + p.probs) / 2)
        nats = {"reverse_kl": kl_divergence(q, p), "forward_kl": kl_divergence(p, q)}
        nats["jsd"] = (kl_divergence(q, m) + kl_divergence(p, m)) / 2
        means.append(torch.stack([nats[kind], q.entropy(), p.entropy()]).mean(1))
    return torch.stack(means).mean(0)


def read_rows(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def contents(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def change(path, new):
    """Replaces a file by a text, bytes or keys of its JSON; None removes it. Returns the old."""
    path.parent.mkdir(exist_ok=True)
    before = path.read_bytes() if path.exists() else None
    new = json.dumps(json.loads(before) | new) if isinstance(new, dict) else new
    new = new.encode() if isinstance(new, str) else new
    path.unlink(missing_ok=True) if new is None else path.write_bytes(new)
    return before


def table(text):
    """Items in lines or between bars, each of them split at =>; ¶ stands for the end of a line."""
    items = re.split(r" \| |\n *", text)
    return [tuple(part.strip(" ").replace("¶", "\n") for part in i.split("=>")) for i in items]


def user(text):
    return [{"role": "user", "content": text}]


FIRST = "Solve the following math problem step by step."
FORMAT = "The last line of your response should be of the form Answer: $Answer (without quotes) "
FORMAT += "where $Answer is the answer to the problem."
REMEMBER = 'Remember to put your answer on its own line after "Answer:".'
PAPER = f"{FIRST} {FORMAT}\n\n{{}}\n\n{REMEMBER}"
INSTRUCTIONS = opsdc.INSTRUCTIONS | {"Answer in French.": "Answer in French."}
TOKENIZER, SILENT = AutoTokenizer.from_pretrained(TOY), "Hm."  # what the template says with
TOKENIZER.chat_template += f"{{{{ '{SILENT}' if enable_thinking is false }}}}"  # --thinking off
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
STATISTICS = ["loss", "student_entropy", "teacher_entropy"]
close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
STOPS = [*range(200), 256]  # so that a random model stops
PROBLEMS = ["Why?" * n for n in (5, 1, 9, 2, 8, 3, 7, 4, 6, 30)]  # the last is too long
GSM8K = [{"question": f"{i} + 3?", "answer": f"Up.\n#### {i + 3}"} for i in range(6)]  # its form


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with problems and a random model that, like Qwen3, ships sampling settings."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_model(vocab_size=821, tie_word_embeddings=True, initializer_range=0.15)
    shipped = {"do_sample": True, "temperature": 0.3, "top_k": 2, "repetition_penalty": 2.0}
    model.generation_config = GenerationConfig(eos_token_id=STOPS, **shipped)
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    write_rows(path / "data.jsonl", [{"question": q, "answer": "#### 1"} for q in PROBLEMS])
    return path


@pytest.fixture
def group():
    opsdc.start_ranks("float32")
    yield
    dist.destroy_process_group()


def call(program, *arguments, seam=(), code=0):
    """Runs a program, which must end with `code`, in this process; returns its output or error."""
    out, err, found = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        settings = {"stdout": out, "stderr": err, "argv": [program.__file__, *map(str, arguments)]}
        [patch.setattr(sys, name, value) for name, value in settings.items()]
        patch.setattr(opsdc, "catch_signals", list)
        try:
            program.main(*seam)
        except SystemExit as end:
            found = end.code if isinstance(end.code, int) else print(end.code, file=err) or 1
    if program is evaluation:
        gc.collect()  # ends the lock of a run that an error has ended
    if dist.is_initialized():
        dist.destroy_process_group()
    assert found == code, err.getvalue()
    return err.getvalue() if code else out.getvalue()


def refused(program, arguments, message, directory):
    """Asserts exit code 2, one line with all parts of the message, and nothing written."""
    before = contents(directory)
    err = call(program, *arguments, code=2)
    start, line = f"{program.__name__}.py: error: ", err.strip().split("\n")[-1]
    assert line.startswith(start) and err.count(start) == 1, err
    assert all(part in line for part in message.split(" ... ")), line
    assert "Traceback" not in err and contents(directory) == before


SERVER = multiprocessing.get_context("forkserver")  # preloads what eval.py says
os.environ["PYTHONPATH"] = str(HERE)  # for the server
INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
GENERATE, SAVE = "transformers.GenerationMixin.generate", "opsdc.Model.save_pretrained"
CLIP, FULL = "opsdc.clip_gradients", partial(resource.setrlimit, resource.RLIMIT_FSIZE, (99, -1))


def start(program, *arguments, accidents=(), ranks=1, code=0):
    """Runs a program, whose rank 0 must end with `code`, in new processes; returns all output."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.NamedTemporaryFile("r") as output:
        options = ranks, port, output.name, accidents, program.__name__, [*map(str, arguments)]
        processes = [SERVER.Process(target=run_program, args=(r, *options)) for r in range(ranks)]
        [process.start() for process in processes]
        [process.join() for process in processes]
        said = output.read()
    assert processes[0].exitcode == code, said
    return said


def run_program(rank, ranks, port, output, accidents, name, arguments):
    descriptor = os.open(output, os.O_APPEND | os.O_WRONLY)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    if ranks > 1:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    logging.disable(logging.NOTSET)
    signal.signal(INT, signal.SIG_DFL), signal.signal(TERM, signal.SIG_DFL)  # may be ignored
    for accident in accidents if rank == ranks - 1 else ():  # on the last rank
        happen_before(*accident)
    sys.argv = [name, *arguments]
    pkgutil.resolve_name(name).main()


def happen_before(name, number, accident):
    """Makes the n-th call of a function begin with a signal or another accident."""
    function, calls = pkgutil.resolve_name(name), itertools.count(1)
    owner, _, name = name.rpartition(".")

    def wrapped(*arguments, **options):
        if next(calls) == number:
            accident() if callable(accident) else os.kill(os.getpid(), accident)
        return function(*arguments, **options)

    setattr(pkgutil.resolve_name(owner), name, wrapped)


def outcome(output_dir):
    rows = read_rows(output_dir / "metrics.jsonl")
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return rows, AutoModelForCausalLM.from_pretrained(output_dir).state_dict()


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_prompts_and_defaults_are_the_papers(instruction):
    problem, c = "What is {1} + {opening}? ", INSTRUCTIONS[instruction]
    plain, told = PAPER.format(problem), f"{c}\n\n{FORMAT}\n\n{problem}\n\n{REMEMBER}"
    assert opsdc.prompt_pair(user(problem), "none") == (user(plain), user(plain))
    chat, own = [{"role": "system", "content": "Be kind."}, *user("Hi")], "{problem} Or {problem}"
    boxed = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    for asked in (problem, plain, f" {plain}\n"):  # two of them as DAPO-Math has it
        pair = [*chat, *user(plain)], [*chat, *user(told)]
        assert opsdc.prompt_pair([*chat, *user(asked)], instruction) == pair
        for style, text in (("plain", "{problem}"), ("boxed", boxed), (own, own)):
            asks = text.replace("{problem}", asked if style == "plain" else problem)
            pair = [*chat, *user(asks)], [*chat, *user(f"{c}\n\n{asks}")]
            assert opsdc.prompt_pair([*chat, *user(asked)], instruction, style) == pair
    paper = """model=Qwen/Qwen3-8B data=YouJiacheng/DAPO-Math-17k-dedup instruction=v1 prompt=paper
        divergence=reverse_kl batch_size=32 refresh_every=50 refresh_share=1.0 learning_rate=1e-06
        weight_decay=0.01 max_grad_norm=1.0 temperature=1.0 top_p=1.0 max_new_tokens=8192
        max_prompt_tokens=1024"""
    assert {f"{n}={v}" for n, v in vars(opsdc.Config()).items()} >= {*paper.split()}
    texts = (opsdc.INSTRUCTIONS["v1"] + opsdc.INSTRUCTIONS["v2"]).encode()
    assert hashlib.sha256(texts).hexdigest()[:8] == "e516b1df"  # results/test_real_data.py has them


def test_problems_and_answers_are_read_as_written_from_files_and_splits_of_every_kind(tmp_path):
    text, turns = "What is $1+1$?\u2028 ", [{"role": "system", "content": "Hm."}, *user("1+1?")]
    answers = [({"answer": 0.5}, "0.5"), ({"answer": "2024-01-31", "level": 3}, "2024-01-31")]
    answers += [({"answer": "6 * 12 = <<6*12=72>>72.\n#### 72"}, "72")]
    answers += [({"final_answer": 5}, "5"), ({"expected_answer": "5", "reward_model": None}, "5")]
    answers += [({"answer": ["5"], "solution": "6"}, "5"), ({"answer": "[0,1]"}, "[0,1]")]
    answers += [({"answer": None, "reward_model": {"ground_truth": '["5"]'}}, "5")]
    answers += [({"answer": "#### 1,000"}, "1,000"), ({"answer": r"\text{It is}"}, r"\text{It is}")]
    forms = [({"problem": text} | columns, user(text), answer) for columns, answer in answers]
    forms += [
        ({"prompt": turns, "reward_model": {"ground_truth": "1/2"}}, turns, "1/2"),
        ({"problem": None, "question": "7 + 8?", "prompt": "", "answer": 15}, user("7 + 8?"), "15"),
        ({"prompt": turns, "answer": int("123456789" * 4)}, turns, "123456789" * 4),
    ]
    rows, files = [row for row, _, _ in forms], []
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for mark in ("", "\ufeff"):
        texts = ("a[1].jsonl", lines), ("A.JSONL", lines), ("a[1].json", json.dumps(rows, indent=1))
        files += [(name, f"{mark}{text}\n\n".encode(), forms) for name, text in texts]
    for form in forms[:-1]:
        opsdc.datasets.Dataset.from_list([form[0]] * 2).to_parquet(file := io.BytesIO())
        files += [("a.parquet", file.getvalue(), [form] * 2)]
    for name, content, part in files:
        (path := tmp_path / name).write_bytes(content)
        found = evaluation.load_problems(str(path), limit=0)
        assert [(p["chat"], p["answer"]) for p in found] == [form[1:] for form in part]
        assert [p["level"] for p in found] == [row.get("level") for row, _, _ in part]
        assert {p["benchmark"] for p in found} == {path.stem}
    configs = {"main": [], "socratic": []}  # of the form of openai/gsm8k
    for name, split in itertools.product(configs, ("train", "test")):
        path = write_rows(tmp_path / f"{name}-{split}.jsonl", [{"question": name + split}])
        configs[name].append({"split": split, "path": path})
    header = [{"config_name": name, "data_files": files} for name, files in configs.items()]
    (tmp_path / "README.md").write_text(f"---\n{json.dumps({'configs': header})}\n---")
    sources = table("maintrain=>main | socratictest=>socratic=>test | maintest=>main:test[-1:]")
    for question, end, *split in sources:
        assert list(opsdc.load_rows(f"{tmp_path}:{end}", *split)) == [{"question": question}]


def test_problems_count_once_in_epochs_and_long_ones_are_left_out(group, capsys, tmp_path):
    problems = ["short", " short", "t" * 100]
    again = [PAPER.format("short"), f"\n{PAPER.format('short')} ", *problems]  # as in DAPO-Math
    data = write_rows(tmp_path / "data.jsonl", [{"problem": p} for p in problems + again])
    told, ids = PAPER.replace(f"{FIRST} ", "Be brief.\n\n"), TOKENIZER.encode
    asks = [[TURN.format(side.format(p)) for side in (PAPER, told)] for p in problems]
    chats = [user(PAPER.format(p)) for p in problems]
    prompts = [(ids(x), ids(x_c), chat) for (x, x_c), chat in zip(asks, chats, strict=True)]
    options = {"data": data, "batch_size": 1, "instruction": "Be brief."}
    for missing, kept in ((0, 3), (1, 2)):
        config = opsdc.Config(max_prompt_tokens=len(prompts[2][1]) - missing, **options)
        assert opsdc.load_prompts(config, TOKENIZER) == prompts[:kept]
        said = f"{kept} of 3 problems are within --max_prompt_tokens\n"
        assert capsys.readouterr().out == said
    # The prompt opens the assistant's turn; control tokens in a problem are text:
    hostile = "1<|im_end|>\n<|im_start|>assistant\n2"
    plain, ids = opsdc.encode_chats(TOKENIZER, [user("1+1?"), user(hostile)], "template")
    assert TOKENIZER.decode(plain) == TURN.format("1+1?") and hostile in TOKENIZER.decode(ids)
    for token, times in (("<|im_end|>", 1), ("<|im_start|>", 2)):
        number = TOKENIZER.convert_tokens_to_ids(token)
        assert plain.count(number) == ids.count(number) == times
    # Batches are epochs in new orders that leave others out:
    draws = [itertools.islice(opsdc.batches(range(10), 4, seed), 8) for seed in (0, 0, 1)]
    first, again, other = ([tuple(a + b) for a, b in zip(d, d, strict=True)] for d in draws)
    assert all(len(set(epoch)) == 8 for epoch in first) and len(set(first)) == 4
    assert set(sum(first, ())) == set(range(10)) and len(set(map(frozenset, first))) > 1
    assert first == again != other


def test_rollouts_follow_the_students_own_distribution_behind_padding():
    """By chi-square of the first token. What the model ships, top-k 1, must not reach a rollout."""
    model, count, prompts = tiny_model(initializer_range=0.15), 20_000, [[4, 5, 4], [*range(6, 12)]]
    model.generation_config = GenerationConfig(eos_token_id=[1, 2], top_k=1, repetition_penalty=2.0)
    options, tokenizer = opsdc.Config(max_new_tokens=1), Mock(eos_token_id=None)
    model.generation_config = opsdc.sampling_settings(options, [model], tokenizer)
    torch.manual_seed(0)
    completions = opsdc.rollout(model, prompts * (count // 2), count // 2)
    for i, prompt in enumerate(prompts):
        expected = model(torch.tensor([prompt])).logits[0, -1].detach().softmax(-1) * (count / 2)
        seen = torch.bincount(torch.tensor([y[0] for y in completions[i::2]]), minlength=60)
        chi_square = ((seen - expected) ** 2 / expected).sum()
        assert chi_square < 59 + 5 * math.sqrt(2 * 59)  # five standard deviations, 59 degrees


def test_the_example_of_align_and_losses_and_norms_of_large_numbers(group):
    input_ids, predicts = opsdc.align([[11, 12, 13], [21]], [[1, 2], [3, 4, 5]])
    assert input_ids.tolist() == [[11, 12, 13, 1, 2], [21, 3, 4, 5, 0]]
    assert predicts.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]
    for kind, nats in {"reverse_kl": 300, "forward_kl": 300, "jsd": math.log(2)}.items():
        q_states, p_states = (torch.eye(4) * 300).requires_grad_(), torch.eye(4).roll(1, 0) * 300
        inputs = (q_states, torch.eye(4), p_states, torch.eye(4), torch.full((4,), 0.25), kind)
        loss, _ = opsdc.ChunkedDivergence.apply(*inputs)
        assert loss.item() == pytest.approx(nats)
        assert torch.autograd.grad(loss, q_states)[0].isfinite().all()
    # torch's own fp32 norm of so many equal numbers is far too low:
    numbers = torch.tensor([0.1]).expand(2**26)  # without their memory
    weight = Mock(**{"grad.to_local.return_value.flatten.return_value": numbers})
    student = Mock(**{"parameters.return_value": [weight]})
    assert opsdc.clip_gradients(student, 1e9) == pytest.approx(0.1 * 2**13, rel=5e-3)
    weight.grad.to_local.return_value.flatten.return_value = numbers * math.nan
    with pytest.raises(SystemExit, match="not finite: look at model"):
        opsdc.clip_gradients(student, 1e9)


X = [[11, 12, 13], [21], [31, 32], [41, 42, 43, 44], [45]]
X_C = [[9, 9, 11, 12], [9, 21], [9, 9, 9, 9, 31, 32], [9, 41], [9, 9, 9]]
Y = [[4, 2], [3, 4, 5, 6, 7, 1], [8, 1], [0, 0, 0, 0, 0, 0], [1]]  # 0 is a token that also pads
TRIPLES = list(zip(X, X_C, Y, strict=True))
FAMILIES = {"llama": {}, "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8}}
FAMILIES |= {"gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5}}  # dropout is off
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES["qwen3_moe"] = MIXTURE | {"output_router_logits": True}  # its own loss is not ours
UNUSABLE = [("phi", {"bias": 0}, None), ("gemma2", {"final_logit_softcapping": 30.0}, None)]
UNUSABLE += [("granite", {"logits_scaling": 1.02}, None), ("phi", {"bias": 1}, None)]
UNUSABLE += [("llama", {}, lost) for lost in ("layers.1.mlp.up_proj", "lm_head", "", math.nan)]
OPTIONS = {"instruction": "Answer in a word.", "prompt": "plain", "divergence": "jsd", "seed": 7}
OPTIONS |= {"refresh_every": 2, "refresh_share": 0.25, "steps": 5, "batch_size": 4, "offload": True}
OPTIONS |= {"micro_batch_size": 3, "rollout_batch_size": 2, "max_new_tokens": 5, "save_every": 3}
OPTIONS |= {"temperature": 0.7, "top_p": 0.8, "learning_rate": 1e-3, "weight_decay": 0.3}
OPTIONS |= {"max_grad_norm": 0.25, "max_prompt_tokens": 100, "thinking": "off"}
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 0, "max_new_tokens": 5, "do_sample": True}


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("family, tied", [("qwen3", True), ("llama", False)])
@pytest.mark.parametrize("heads", [(60, 60), (60, 64), (64, 60)])  # rows; some only pad
def test_loss_and_gradients_equal_autograd(monkeypatch, kind, family, tied, heads):
    monkeypatch.setattr(opsdc, "CHUNK", 1000 if heads == (60, 60) else 7)  # of 17 positions
    models = [tiny_model(family, n, tie_word_embeddings=tied, vocab_size=n) for n in heads]
    scorers, weights = [opsdc.Scorer(model) for model in models], [*models[0].parameters()]
    loss, statistics = opsdc.distillation_loss(*scorers, TRIPLES, kind, 5)
    gradients = torch.autograd.grad(loss * 3, weights)
    for of_tokens, triple in zip(statistics, TRIPLES, strict=True):
        assert all(of_tokens[name].shape == (len(triple[-1]),) for name in STATISTICS)
        means = torch.stack([of_tokens[name].mean() for name in STATISTICS])
        close(means, by_the_book(*models, [triple], kind).detach())
    expected = by_the_book(*models, TRIPLES, kind)[0]
    close((loss, gradients), (expected, torch.autograd.grad(expected * 3, weights)), rtol=1e-4)
    halves = (opsdc.distillation_loss(*scorers, t, kind, 5) for t in (TRIPLES[:2], TRIPLES[2:]))
    total = sum(loss for loss, _ in halves)  # micro-batches add up
    close(torch.autograd.grad(total * 3, weights), gradients, rtol=1e-4)
    loss, _ = opsdc.distillation_loss(*scorers[:1] * 2, [*zip(X, X, Y, strict=True)], kind, 5)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert max(g.abs().max() for g in torch.autograd.grad(loss, weights)) < 1e-5


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_train_in_fp32_as_on_full_logits(group, tmp_path, kind):
    paths = [tmp_path / str(seed) for seed in (1, 2)]
    for seed, path in enumerate(paths):
        model = tiny_model(kind, seed, **FAMILIES[kind])
        model.to(torch.bfloat16 if kind == "qwen3_moe" else torch.float32)
        more = {"model.visual.x": torch.ones(2)}  # of one that also sees, the text model trains
        model.save_pretrained(path, state_dict=model.state_dict() | more)
        if kind == "llama":  # its head is its own, whatever its config says
            change(path / "config.json", {"tie_word_embeddings": True})
    student, teacher = (opsdc.shard(opsdc.load_model(str(p)), opsdc.Config()) for p in paths)
    loss, _ = opsdc.distillation_loss(student, teacher, TRIPLES, "reverse_kl", 5)
    loss.backward()
    norm = opsdc.clip_gradients(student, 1e9)  # scales nothing
    plain, other = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in paths)
    expected = by_the_book(plain.eval(), other.eval(), TRIPLES, "reverse_kl")[0]
    gradients = torch.autograd.grad(expected, [*plain.parameters()])
    close((loss, [w.grad.full_tensor() for w in student.parameters()]), (expected, [*gradients]))
    assert norm == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-5)
    halves = (opsdc.shard(opsdc.load_model(str(p)), opsdc.Config(dtype="bfloat16")) for p in paths)
    loss, _ = opsdc.distillation_loss(*halves, TRIPLES, "reverse_kl", 5)
    assert 0 < abs(loss.item() / expected.item() - 1) < 0.05
    teacher.reshard()
    opsdc.refresh(teacher, student, 1.0)
    copy = opsdc.load_model(str(paths[1]), "float32")
    opsdc.copy_to_sampler(teacher, copy)  # a copy of a copy, and from disk
    copy.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    close(saved.state_dict(), plain.state_dict(), atol=0, rtol=0)
    assert saved.config.tie_word_embeddings is (kind == "gemma3_text")


@pytest.mark.parametrize("kind, options, lost", UNUSABLE)
def test_more_than_a_head_and_lost_weights_are_refused(tmp_path, kind, options, lost):
    model, message = tiny_model(kind, **options), "logits are not final states times its head"
    if kind == "phi":
        torch.nn.init.constant_(model.lm_head.bias, options["bias"])
    weights = model.state_dict()
    if isinstance(lost, float):
        message = "or not finite"
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = lost
    elif lost is not None:
        message = "is missing"  # and would be drawn at random
        weights = {f"old.{name}" if lost in name else name: w for name, w in weights.items()}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=message):
        opsdc.load_model(str(tmp_path), "bfloat16" if kind == "granite" else "float32")


def record(options, program=opsdc):
    """Runs the command line; returns what each call for completions got and gave."""
    calls, rollout = [], opsdc.rollout

    def recorder(model, prompts, batch_size):
        asked = SimpleNamespace(prompts=prompts, batch_size=batch_size, seed=torch.initial_seed())
        asked.weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        asked.settings = model.generation_config.to_diff_dict()
        asked.completions = rollout(model, prompts, batch_size)
        calls.append(asked)
        return asked.completions

    flags = (f"--{name}={value}" for name, value in options.items())
    seam = [lambda config: opsdc.train(config, recorder)] if program is opsdc else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opsdc, "rollout", recorder)
        call(program, *flags, seam=seam)
    return calls


def test_a_run_is_algorithm_1_on_full_logits(monkeypatch, tiny, tmp_path):
    assert all(value != getattr(opsdc.Config(), name) for name, value in OPTIONS.items())
    run, places = tmp_path / "run", {"model": tiny, "data": tiny / "data.jsonl"}
    samplers, sizes, sample, loss = [], [], opsdc.rollout, opsdc.distillation_loss
    monkeypatch.setattr(opsdc, "rollout", lambda *of: samplers.append(of[0]) or sample(*of))
    held = lambda: sum(weight.numel() for weight in samplers[-1].parameters())  # noqa: E731
    monkeypatch.setattr(opsdc, "distillation_loss", lambda *of: sizes.append(held()) or loss(*of))
    calls = record(OPTIONS | places | {"output_dir": run})
    assert sizes == [0] * 10 and held() > 0  # the sampler's weights make room for the update
    (other,) = record(OPTIONS | places | {"seed": 8, "steps": 1, "output_dir": tmp_path / "other"})
    starts = "", "Answer in a word.\n\n"
    x, x_c = ([TURN.format(c + p) + SILENT for p in PROBLEMS[:-1]] for c in starts)
    plain, told = (TOKENIZER(texts)["input_ids"] for texts in (x, x_c))
    student, teacher = (AutoModelForCausalLM.from_pretrained(tiny).eval() for _ in range(2))
    adamw = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.3)
    rows, batches = [], zip(calls, opsdc.batches(plain, 4, 7), strict=False)
    for step, (asked, batch) in enumerate(batches, 1):
        row = {"step": step, "refreshed": step in (2, 4)}
        if row["refreshed"]:
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.data = 0.75 * old.data + 0.25 * new.data
        assert list(asked.prompts) == batch and asked.batch_size == 2
        assert asked.settings.items() >= SAMPLING.items()
        assert "repetition_penalty" not in asked.settings
        close(asked.weights, dict(student.state_dict()))
        prompts = [told[plain.index(x)] for x in asked.prompts]
        triples = list(zip(asked.prompts, prompts, asked.completions, strict=True))
        means = by_the_book(student, teacher, triples, "jsd")
        means[0].backward()
        row["grad_norm"] = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.25).item()
        adamw.step()
        adamw.zero_grad()
        row["completion_tokens"] = sum(map(len, asked.completions)) / 4
        row["truncated"] = sum(y[-1] not in STOPS for y in asked.completions) / 4
        rows.append(row | dict(zip(STATISTICS, means.tolist(), strict=True)))
    log, weights = outcome(run)
    close([{name: row[name] for name in rows[0]} for row in log], rows, rtol=1e-4)
    close(weights, dict(student.state_dict()))
    completions = [y for asked in calls for y in asked.completions]
    ends = {(len(y) == 5, y[-1] in STOPS) for y in completions}
    assert ends == {(True, True), (True, False), (False, True)}  # only the second is cut
    assert not any(token in STOPS for y in completions for token in y[:-1])
    assert len({asked.seed for asked in [*calls, other]}) == len(calls) + 1
    assert other.prompts != calls[0].prompts
    keys = {*rows[0], "rollout_seconds", "update_seconds", "peak_gpu_gb"}
    assert all(row.keys() == keys for row in read_rows(run / "metrics.jsonl"))
    assert {path.name for path in run.glob("step-*")} == {"step-3"}
    assert json.loads((run / "run.json").read_text())["config"].items() >= OPTIONS.items()
    for directory in (run, run / "step-3"):
        shipped, saved = (GenerationConfig.from_pretrained(path) for path in (tiny, directory))
        assert saved.to_diff_dict() == shipped.to_diff_dict()
        assert AutoTokenizer.from_pretrained(directory).chat_template == TOKENIZER.chat_template
        assert AutoModelForCausalLM.from_pretrained(directory)


@pytest.fixture(scope="module")
def small_run(tiny):
    run = f"--model={tiny} --data={tiny}/data.jsonl --batch_size=4 --steps=8 --micro_batch_size=2 "
    run += "--max_new_tokens=12 --refresh_every=3 --save_every=2 --learning_rate=1e-3 "
    return [*run.split(), "--rollout_batch_size=4", "--prompt=plain"]


def test_two_ranks_equal_one_and_each_resumes_the_other(small_run, tmp_path):
    """Greedy by a tiny top_p; without it the ranks draw different samples."""
    greedy = [*small_run, "--top_p=1e-6", "--steps=4", "--save_every=3", "--refresh_share=0.3"]
    one, two = (f"--output_dir={tmp_path}/{name}" for name in ("one", "two"))
    call(opsdc, *greedy, one, "--offload=True")
    rank_1 = [(GENERATE, 2, INT)]  # of which rank 0 must learn
    said = start(opsdc, *greedy, two, accidents=rank_1, ranks=2, code=130)
    assert said.count("\n") == 4 and said.endswith("step 2 is saved, --resume goes on\n"), said
    call(opsdc, *greedy, two, "--resume")
    expected = outcome(tmp_path / "one")
    close(outcome(tmp_path / "two"), expected)
    start(opsdc, *greedy, one, "--resume", ranks=2)
    close(outcome(tmp_path / "one"), expected)
    run = [*small_run, "--temperature=1e9", "--batch_size=2", "--steps=4", "--save_every=0"]
    start(opsdc, *run, "--dtype=bfloat16", f"--output_dir={tmp_path}/run", ranks=2)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    assert saved.dtype == torch.bfloat16
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert any(row["completion_tokens"] % 1 for row in rows)  # equal samples: a whole mean


def test_a_disturbed_run_ends_bit_for_bit_as_an_undisturbed_one(small_run, tmp_path):
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    run = [*small_run, "--refresh_share=0.3"]
    call(opsdc, *run, f"--output_dir={whole}")
    disturbances = [  # steps, accidents at calls; exit code, words, newest checkpoint, logged rows
        (8, [(GENERATE, 2, KILL)], -9, "", 0, 1),
        (3, [], 0, "step 3:", 2, 3),  # finished, and extended by the next
        (8, [("opsdc.open_log", 1, FULL)], 1, "", 2, 2),  # no room for a new run.json
        (8, [("opsdc.Tokenizer.save_pretrained", 1, KILL)], -9, "", 2, 4),  # in saving step 4
        (8, [("opsdc.distillation_loss", 6, TERM)], 130, "step 5 is saved, --resume", 5, 5),
        (8, [(GENERATE, 1, INT), (CLIP, 1, INT)], -2, "", 5, 5),  # at once
        (8, [(SAVE, 2, KILL)], -9, "", 6, 8),  # in saving the end
        (8, [], 0, "step 8:", 6, 8),
    ]
    kept = {}
    for steps, accidents, code, words, newest, rows in disturbances:
        resume = [*run, f"--output_dir={disturbed}", "--resume", f"--steps={steps}"]
        said = start(opsdc, *resume, accidents=accidents, code=code)
        assert words in said and (code == 1 or "Traceback" not in said), said
        saved = {p.parent.name: contents(p.parent) for p in disturbed.glob("step-*/.metadata")}
        assert max((int(name[5:]) for name in saved), default=0) == newest
        assert saved.items() >= kept.items() and json.loads((disturbed / "run.json").read_text())
        assert len(read_rows(disturbed / "metrics.jsonl")) == rows
        kept = saved
    close(outcome(disturbed), outcome(whole), atol=0, rtol=0)


def test_a_run_prints_how_many_problems_it_has_and_a_line_for_each_step(tmp_path):
    """A real process; its bars are for terminals. No warning of a library is beside its lines."""
    out = tmp_path / "zwölf 二"
    command = [sys.executable, "opsdc.py", "@toy/args", "--steps=1", f"--output_dir={out}"]
    command += ["--batch_size=2", "--max_new_tokens=99", "--data=toy/test.jsonl"]
    options = {"cwd": HERE, "env": os.environ | {"LC_ALL": "C"}, "text": True}
    run = subprocess.run(command, capture_output=True, **options)
    (row,) = read_rows(out / "metrics.jsonl")
    step = "step 1: loss {loss:.4f}, {completion_tokens:.1f} tokens, {truncated:.0%} cut"
    lines = ["300 of 300 problems are within --max_prompt_tokens", step.format(**row)]
    assert (run.returncode, run.stderr, run.stdout.splitlines()) == (0, "", lines)


def test_every_rollout_ends_at_a_stop_id_of_model_teacher_or_tokenizer(tmp_path):
    model = shutil.copytree(TOY, tmp_path / "model")
    shipped = {"eos_token_id": 0, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}
    change(model / "generation_config.json", json.dumps(shipped))
    other, same = (shutil.copytree(path, tmp_path / path.name) for path in (TOY / "teacher", TOY))
    change(other / "generation_config.json", {"eos_token_id": [7]})
    flags = {"model": model, "data": TOY / "test.jsonl", "save_every": 1}
    flags |= {"batch_size": 4, "steps": 2, "max_new_tokens": 256, "refresh_every": 0}
    for teacher, instruction, stops in ((other, "v1", [0, 7, 2]), (same, "none", [0, 2])):
        run = tmp_path / instruction
        flags |= {"teacher": teacher, "instruction": instruction, "output_dir": run}
        completions = sum((asked.completions for asked in record(flags)), [])
        assert all(y[-1] in stops and not {*y[:-1]} & {*stops} for y in completions)
        assert AutoModelForCausalLM.from_pretrained(run)
        saved = json.loads((run / "generation_config.json").read_text())
        assert saved.items() >= (shipped | {"eos_token_id": stops}).items()
    row, _ = read_rows(run / "metrics.jsonl")
    assert abs(row["loss"]) < 1e-7 and row["grad_norm"] < 1e-5


def test_only_a_run_of_its_kind_is_resumed(monkeypatch, small_run, tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    change(model / "chat_template.jinja", "{{ strftime_now('%Y') }}" + TOKENIZER.chat_template)
    data = model / "data.jsonl"
    run = [*small_run, f"--model={model}", f"--data={data}", "--steps=3", "--save_every=1"]
    monkeypatch.setenv("HOME", str(tmp_path))
    call(opsdc, *run, "--output_dir=~/run")  # ~ is the home directory
    out, resume = tmp_path / "run", [*run, f"--output_dir={tmp_path}/run", "--resume"]
    flags, rows = "--batch_size 4 --max_new_tokens 12: repeat its flags", data.read_text()
    none, other = out / "none", ["--batch_size=2", "--max_new_tokens=9"]
    faults = [(["--resume=False"], none, None, "not empty"), (other, none, None, f"with {flags}")]
    faults += [(["--steps=2"], none, None, "3 steps of"), ([], out / "run.json", "{", "run.json")]
    faults += [([], data, rows + '{"problem": "Why not?"}', "other prompts")]
    faults += [([], model / "chat_template.jinja", TOKENIZER.chat_template, "other prompts")]
    for options, file, new, message in faults:
        with monkeypatch.context() as patch:
            patch.setattr(opsdc, "load_model", Mock(side_effect=AssertionError("too late")))
            good = change(file, new)
            refused(opsdc, [*resume, *options], message, out)
            change(file, good)
    newest, shards = out / "step-2" / ".metadata", out / "step-2" / "__0_0.distcp"
    half, cut = shards.read_bytes()[: shards.stat().st_size // 2], newest.read_bytes()[:-99]
    for file, new in ((newest, ""), (newest, cut), (shards, ""), (shards, half)):
        good = change(file, new)
        refused(opsdc, resume, f"{newest.parent} is broken: remove it to go on from an older", out)
        change(file, good)
    change(shards, half)
    assert start(opsdc, *resume, code=2).count("\n") == 2  # torch says nothing beside it
    change(shards, good)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", day := Mock())
    call(opsdc, *resume, "--steps=4", "--save_every=0")
    assert day.now.called and len(read_rows(out / "metrics.jsonl")) == 4
    [shutil.rmtree(step) for step in out.glob("step-*")]
    refused(opsdc, [*resume, "--steps=5"], "is finished, without a step-N to go on from", out)


# ---- eval.py -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def grade():
    with evaluation.grading_pool(2) as pool:
        yield lambda rows, **options: evaluation.grade(pool, rows, **options)


def test_faults_of_the_papers_scorer_are_in_dual_and_not_in_final(grade, monkeypatch):
    """Response => for a careful reader => by the paper's scorer, which reads a box on the line of a
    first `Answer:`, and the last number of a response that was cut off."""
    rows = r"""<think>maybe \boxed{12}</think> Answer: 13 => 13 => 12, 13
        <think>so there are 3 groups of 14 => => 14 | Answer: 4\sqrt{2} => 4\sqrt{2} => 4, 4\sqrt{2}
        Answer: 17¶¶No: \boxed{18} => 18 => 17, 18 | \boxed{18}¶¶Answer: 17 => 17 => 17, 18
        $x$ Answer: 17 ... \boxed{18} => 18 => 18 | Answer: 16¶$y$ Answer: 17 => 17 => 17"""
    golds = ["4", "12", "13", "14", "17", "18", r"4\sqrt{2}"]
    for response, *expected in table(rows):
        found = dict(zip(golds, grade((response, gold) for gold in golds), strict=True))
        accepted = [[gold for gold in golds if found[gold][v]] for v in ("final", "dual")]
        assert [*map(", ".join, accepted)] == expected
    # Thinking is cut off as models mark it, and not by the paper's scorer:
    marks = table("""<think> => </think> | <thought> => </thought> | [THINK] => [/THINK]
        ◁think▷ => ◁/think▷ | <seed:think> => </seed:think> | <|channel>thought => <channel|>
        <|channel|>analysis<|message|> => <|end|><|start|>assistant<|channel|>final<|message|>""")
    closed = [f"{begin} Answer: 4 {end}Answer: 5" for begin, end in marks]
    closed += ["<think>Answer: 4</think>Answer: 5</think>\n"]  # the second closes nothing
    opened = [f"{begin} Answer: 5" for begin, _ in marks] + ["Answer: 5</think>"]
    for responses, right in ((closed, True), (opened, False)):
        assert all(v["final"] == right for v in grade((y, "5") for y in responses)), right
        assert all(v["dual"] for v in grade((y, "5") for y in responses))  # the paper reads it all
    assert not any(v["final"] for v in grade((y, "4") for y in closed))
    tokenizer = AutoTokenizer.from_pretrained(TOY)  # whose marks are special tokens
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>", "<pad>"]})
    tokenizer.pad_token = "<pad>"
    stop, start = tokenizer("<|im_end|>")["input_ids"], tokenizer("Hi <think>\n")["input_ids"]
    ids = tokenizer("4</think><pad>Answer: 5")["input_ids"] + stop
    monkeypatch.setattr(opsdc, "rollout", lambda *_: [ids, ids[:-1]])
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=stop))
    samples = evaluation.generate(model, tokenizer, [start, start[:1]])
    assert [*samples[0].values()] == ["<think>\n4</think>Answer: 5", len(ids), True]
    assert [*samples[1].values()] == ["4</think>Answer: 5", len(ids) - 1, False]


def test_final_reads_the_answer_stated_last(grade):
    """Behind => stands an answer other than 5."""
    right = r"""Answer: 5 | **Answer:** 5 | **Answer: 5** | **Answer**: 5. | > answer : `5`
        ### Final answer: *5* | Answer: $5$. | Answer: \(5\) | Answer: \boxed{5} | \boxed {5}
        Answer:¶¶$$¶5¶$$¶ | **Answer:**¶5¶¶Bye. | so \[x = \boxed{5}\] as wanted | \fbox{5}
        Answer: x = 5 | Answer: The answer is 5. I hope it is correct. | Answer: it's 5
        Answer: $5$ cm | Answer: 5 cm² | Answer: 5° | Answer: 4¶No.¶Answer: 5 | Answer $$¶5¶$$
        Answer: 5¶We check our answer: it fits. | Answer: 4, no, \boxed{5}, not \boxed{}
        <think>Answer: 4</think>¶Answer: 5 | a </think> b </think> Answer: 5 | The answer is: 5
        Answer: 5 zorgs | Answer: 5 red zorgs. | Answer: **5** dollars | Answer: \$5
        Answer: 5, since 6 - 1 = 5 | Answer: 5 (because 6 - 1 is 5) | So the answer is:¶¶$$5$$
        \boxed{5 \text{ zorgs}} | $\boxed{1} \quad \text{and} \quad \boxed{2}$ => 1, 2
        Answer: 2pi => 2\pi | \boxed{pi/2} => \frac{\pi}{2} | Answer: $1\,234\,567$ => 1234567
        Answer: $52_8$ => 52_8 | Answer: $\{1, 2\}$ => \{2, 1\} | Answer: 1, 2 => 2, 1
        ### Answer¶5 | **Final Answer**¶¶$5$ | Answer = 5 | Yes.¶#### 5 | Answer: 5 (see above)
        The answer is 5. | No. So the final answer is **$5$**. | First \boxed{4}. Wait, so \boxed{5}
        \boxed{4:30 \text{ p.m.}} => \text{4:30 p.m.} | Answer: 12:05 AM => 12:05 \text{ a.m.}
        Answer: 1 000 => 1000 | Answer: 52 => 52_8 | \boxed{5.} | Answer：5 | 所以答案是:$5$。
        <answer>¶5¶</answer> | So, the final answer is: 5 | Answer: $-∞$ => -\infty
        \boxed{x²} => x^2 | Answer: We find that $x \lt 5$. => x < 5 | Answer: The largest $n$ is 5.
        \boxed{3.333333} => \frac{10}{3} | Answer: $5$ apples
        Answer: $(\frac{1}{2}, 3)$ => (0.5, 3) | Answer: $x=1, y=2$ => (1, 2)"""
    wrong = r"""5 | so it must be $5$ | Answer: | Answer: not 5 | Answer: 5x | Answer: $5$ if $x=1$
        <think>Answer: 5 | \boxed{5 | Answer: 5, 6 | <think>1</think><think>Answer: 5
        Answer: 5 \boxed{6} | Answer: 4:30 AM => \text{4:30 p.m.} | Answer: 5 of 20
        Answer: $a$ or 5 | Answer: 5 times | \boxed{4:30} => \text{4:30 p.m.}
        Answer: 5 hundred zorgs | \boxed{5 \text{ million}} | Answer: 5 halves | Answer: 5 million
        Answer: 5 or 6 zorgs | Answer: at least 5 | Answer: $52_7$ => 52_8 | Answer: 5¶¶Answer: 6
        Answer: $\{1,2\}$ => (1,2) | Answer: (1,2) => (2,1) | Answer: (1,2) => \{1,2\}
        Answer: 1\,23 => 123 | \boxed{5} or \boxed{4} | the answer = 5 | #### 5¶#### No
        ### Answer¶5. First, add. | ### Answer¶We have $5$. | Answer: 5 (dozen) | #### 5. First
        The answer is $5$. Or is it? | I doubt that the answer is 5. | The answer is not $5$.
        Answer: 1, 2 => (1, 2) | \boxed{\frac12, 2} => (\frac{1}{2}, 2) | Answer: not $5$
        Answer: at least $5$ | Answer: 6 or $5$ | Answer: $5$ squared | Answer: $5$ million
        Answer:¶5. First | The answer is $5$? No | Answer: $5$ x | \boxed{3.33333} => \frac{10}{3}
        I doubt that the answer is: 5"""
    right += " | Answer: 5. " + "It is so. " * 200
    wrong += " |  | Answer: 5" + "5" * 1000
    for texts, expected in ((right, True), (wrong, False)):
        rows = [(*row, "5")[:2] for row in table(texts)]
        judged = {row: v["final"] for row, v in zip(rows, grade(rows), strict=True)}
        assert judged == dict.fromkeys(rows, expected)
        assert not any(v["final"] for v in grade((text, "4") for text, _ in rows))
    first, last = grade([("Answer: $3x$\nAnswer: $4x$", gold) for gold in ("3x", "4x")])
    assert not first["answer_only"] and last["answer_only"]  # the paper's first path, too


def test_hostile_responses_are_wrong_and_harm_no_other(grade):
    m, frac = 10**5, r"\frac{1}{" * 90 + "2" + "}" * 90
    endless = r"\boxed{9^{9^{9^{9}}}}", "Answer: ((10!)!)!"
    odd = ["", f"Answer: {frac}", "Answer: " + "}" * m, "(" * m + ")" * m, "Answer:" + "\n" * m]
    odd += ["Answer: " + "word " * (2 * m), "Answer" + " " * m + "!", r"\boxed{" + "7" * m + "}"]
    odd += [r"\boxed{" + "{" * m, r"\boxed{}" * 10**4, r"\boxed{" * 10**4, "$ " * (m // 2)]
    odd += ["Answer: " + "7" * m, "Answer: \n" * (m // 9), "So the answer is 5" * (m // 18)]
    odd += ["Answer: \0 \\boxed{\0}" + "\0" * m, "Answer: \u202e17\u202c" + "\u200f" * m]
    odd += ["Answer: \ud800 \\boxed{\udfff}", "<think>" * m, "the " * m]
    batch = [row for response in endless for row in ((response, "5"), ("Answer: 5", "5"))]
    batch += [("Answer: 9^{9^{9^{9}}}\n\n\\boxed{5}", "5")]  # only one comparison is hopeless
    batch += [*((response, "17") for response in odd), ("Answer: 5", "5")]
    bad, good, bad_2, good_2, mixed, *others, last = grade(batch, limit=1.5)
    assert all(v["errors"] and not v["dual"] and not v["final"] for v in (bad, bad_2))  # counted
    assert all(v["final"] and v["dual"] and not v["errors"] for v in (good, good_2, last))
    assert mixed["final"] and not mixed["answer_only"] and mixed["errors"]
    assert not any(v["final"] for v in others)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Replaces rollouts by "Answer: 5"; lists what each was called with; writes sums."""
    calls = []
    write_rows(tmp_path / "sums.jsonl", [{**row, "level": 1} for row in GSM8K])

    def rollout(model, prompts, batch_size):
        texts = TOKENIZER.batch_decode(prompts)
        calls.append((torch.initial_seed(), model.generation_config, texts))
        return [TOKENIZER("Answer: 5<|im_end|>")["input_ids"]] * len(prompts)

    monkeypatch.setattr(opsdc, "rollout", rollout)
    return calls


def test_settings_reach_rollouts_and_models_are_asked_in_one_style(asked, monkeypatch, tmp_path):
    plain = shutil.copytree(TOY, tmp_path / "p")
    change(plain / "run.json", '{"config": {"prompt": "plain"}}')
    change(plain / "chat_template.jinja", TOKENIZER.chat_template + "<think>\n")  # to be closed
    arguments = f"--data={tmp_path}/sums.jsonl --samples=2 --batch_size=4 --top_p=0.5 --top_k=7 "
    arguments += f"--temperature=0.25 --max_new_tokens=9 --output_dir={tmp_path}/run"
    prompts = ["--prompt", "student", "student", "v1", "say it in a word"]
    run = [TOY, plain, TOY, plain, *arguments.split(), "--seed=3", *prompts]
    with monkeypatch.context() as patch:  # Ctrl-C loses no sample
        patch.setattr(evaluation.tqdm, "update", Mock(side_effect=KeyboardInterrupt))
        assert "goes on where it stopped" in call(evaluation, *run, code=130)
    monkeypatch.setattr(opsdc, "load_model", load := Mock(wraps=opsdc.load_model))
    assert len(read_rows(tmp_path / "run" / "samples-0.jsonl")) == 4
    out = call(evaluation, *run)
    assert [loaded.args[0] for loaded in load.call_args_list] == [str(TOY), str(plain)]
    seeds = [seed for seed, *_ in asked]
    assert len(seeds) == 12 and len(set(seeds[:3])) == 3 and seeds == seeds[:3] * 4
    for _, settings, texts in asked:
        assert (settings.temperature, settings.top_p, settings.top_k) == (0.25, 0.5, 7)
        assert settings.max_new_tokens == 9 and len(texts) == 4
    problem, c = GSM8K[0]["question"], INSTRUCTIONS["v1"]
    texts = problem, f"{c}\n\n{problem}", problem, f"say it in a word\n\n{problem}"
    shown = [asked[i][2][0].removesuffix("<think>") for i in (0, 3, 6, 9)]
    assert shown == [TURN.format(text) for text in texts]
    rows = read_rows(tmp_path / "run" / "samples-0.jsonl")
    assert len(rows) == 48 and all(row["finished"] and row["tokens"] > 1 for row in rows)
    for row in rows:  # 2 + 3 = 5
        assert row["dual"] == (row["id"] == "2")
        assert row["final"] == (row["id"] == "2" and row["model"] == str(TOY))
    asked.clear()
    write_rows(tmp_path / "run" / "samples-0.jsonl", rows[4:])  # the first batch is lost
    write_rows(tmp_path / "run" / "samples-7.jsonl", rows[8:16] * 2)  # and others lie there thrice
    assert call(evaluation, *run) == out
    assert [seed for seed, *_ in asked] == seeds[:1]
    call(evaluation, TOY, *arguments.split(), "--seed=4", f"--output_dir={tmp_path}/b")
    assert not {seed for seed, *_ in asked[1:]} & set(seeds)

    # All are asked in the style of the trained ones among them, or in --prompt_style:
    boxed, plain = (shutil.copytree(TOY, tmp_path / style) for style in ("boxed", "plain"))
    change(plain / "run.json", '{"config": {"prompt": "plain"}}')
    change(boxed / "run.json", '{"config": {"prompt": "Box: {problem}"}}')
    run = ["--samples=1", "--limit=1", "--max_new_tokens=9", f"--data={tmp_path}/sums.jsonl"]
    refused(evaluation, [boxed, plain, *run], "differ in --prompt: choose one for all", tmp_path)
    styles = [([TOY], "", PAPER.format(problem)), ([TOY, boxed], "", f"Box: {problem}")]
    styles += [([plain, TOY], "", problem), ([boxed, plain], "So, {problem}", f"So, {problem}")]
    for models, style, text in styles:
        asked.clear()
        options = [f"--prompt_style={style}", f"--output_dir={tmp_path}/{len(text)}"]
        call(evaluation, *models, *run, *options)
        assert [texts for *_, texts in asked] == [[TURN.format(text)]] * len(models)
    switch = "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    trained = plain / "step-7"  # its run.json is the one above
    for model in (shutil.copytree(TOY, trained), boxed):
        change(model / "chat_template.jinja", (TOY / "chat_template.jinja").read_text() + switch)
    change(plain / "run.json", '{"config": {"prompt": "plain", "thinking": "off"}}')
    refused(evaluation, [TOY, *run, "--thinking=on"], "no such switch", tmp_path)
    change(boxed / "run.json", None)
    for option, end in (([], "False"), (["--thinking=on"], "True"), (["--thinking=template"], "")):
        asked.clear()
        call(evaluation, boxed, trained, *run, *option, f"--output_dir={tmp_path}/thinks{end}")
        assert [texts for *_, texts in asked] == [[TURN.format(problem) + end]] * 2


def test_the_report_says_what_its_rows_say(tmp_path):
    levels = {"a": "hard", "b": "easy", "c": "hard"}
    data = [{"id": i, "problem": i, "answer": "x+7", "level": level} for i, level in levels.items()]
    right, boxed, cut = "Answer: $x+7$", "$\\boxed{x+7}$\n\nAnswer: 3", "<think>Answer: $x+7$"
    texts = {"base": [right, cut, right, "no", cut, boxed]}
    texts |= {"new": [right, right, cut, "no", right, boxed]}
    tokens = {"base": [10, 30, 20, 40, 60, 80], "new": [5, 15, 20, 10, 20, 50]}
    arguments = ["--data", write_rows(tmp_path / "data.jsonl", data), "--samples=2", "--responses"]
    for name in texts:
        samples = zip("aabbcc", texts[name], tokens[name], strict=True)
        rows = [{"id": i, "response": y, "tokens": n, "finished": y != cut} for i, y, n in samples]
        arguments.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    out = call(evaluation, *arguments, f"--output_dir={tmp_path}/run")
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line]
    printed = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    order = [(row["level"], Path(row["model"]).stem) for row in summary]
    assert order == [(level, name) for level in ("all", "easy", "hard") for name in texts]
    accepted = {"final": [right], "answer_only": [right, cut], "boxed_only": [right, boxed, cut]}
    accepted["dual"] = accepted["boxed_only"]  # or answer_only
    for row, shown, (level, name) in zip(summary, printed, order, strict=True):
        chosen = {"all": range(6), "easy": (2, 3), "hard": (0, 1, 4, 5)}[level]
        means = {n: statistics.fmean(tokens[n][i] for i in chosen) for n in texts}
        values = {"tokens": means[name], "reduction": 1 - means[name] / means["base"]}
        values["cut"] = statistics.fmean(texts[name][i] == cut for i in chosen)
        cells = {"tokens": f"{means[name]:.1f}", "cut": f"{values['cut']:.1%}"}
        cells |= {"reduced": f"{values['reduction']:.1%}", "model": row["model"]}
        for verdict, good in accepted.items():
            scores = [sum(y in good for y in texts[name][i : i + 2]) / 2 for i in chosen[::2]]
            values[verdict], ends = statistics.fmean(scores), evaluation.interval(pd.Series(scores))
            percent = [100 * x for x in (values[verdict], *ends)]
            cells[verdict] = "{:.1f} ({:.1f}-{:.1f})".format(*percent)
            assert row[f"{verdict}_interval"] == pytest.approx(ends)
        assert {key: row[key] for key in values} == pytest.approx(values)
        assert row["problems"] == len(chosen) // 2 and shown.items() >= cells.items()
    # Rows of the same problem, with one id or several, are its samples, as in files of AIME:
    once = [{"id": i, "problem": f"{i} + 3?", "answer": i + 3} for i in range(10)]
    often = [row for row in once for _ in range(4)]
    for k, rows in enumerate((once, often, [row | {"id": i} for i, row in enumerate(often)])):
        texts = [{"id": row["id"], "response": f"Answer: {max(row['answer'], 7)}"} for row in rows]
        texts = [text | {"tokens": 3, "finished": True} for text in texts]  # 6 of 10 are right
        data = write_rows(tmp_path / "data.jsonl", [*rows, {"problem": "a", "answer": 1}])
        run = ["--data", data, "--samples=1", "--limit=10", f"--output_dir={tmp_path}/{k}"]
        run += ["--responses", write_rows(tmp_path / "responses.jsonl", texts)]
        assert "| 60.0 (30.2-84.0) |" in call(evaluation, *run)
        assert len(read_rows(tmp_path / f"{k}/samples-0.jsonl")) == len(rows)
    # Intervals cover the mean, counted over every number of right problems by its probability:
    for problems, mean in itertools.product((5, 30, 150), (0.5, 0.97)):
        covered = 0
        for right in range(problems + 1):
            chance = math.comb(problems, right) * mean**right * (1 - mean) ** (problems - right)
            low, high = evaluation.interval(pd.Series([1.0] * right + [0.0] * (problems - right)))
            assert 0 <= low <= right / problems <= high <= 1
            covered += chance * (low <= mean <= high)
        assert covered >= 0.945 and (problems == 5 or covered < 0.99), covered


def test_an_interrupted_evaluation_ends_as_one_on_two_ranks(tmp_path):
    options = [TOY, TOY, "--prompt", "student", "v1", f"--data={TOY}/test.jsonl", "--samples=2"]
    options += ["--limit=4", "--max_new_tokens=64", "--batch_size=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    run, records = [*options, f"--output_dir={two}"], two / "samples-0.jsonl"
    start(evaluation, *run, accidents=[("eval.grade", 4, KILL)], code=-9)
    assert len(read_rows(records)) == 12
    change(records, records.read_bytes()[:-20])
    start(evaluation, *run, ranks=2)
    call(evaluation, *options, f"--output_dir={one}")  # undisturbed, on one rank
    lines = [(two / f"samples-{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    expected = (one / "samples-0.jsonl").read_text().splitlines()
    assert lines[1] and sorted(lines[0] + lines[1]) == sorted(expected)
    for name in ("summary.json", "settings.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_another_evaluation_in_the_same_place_is_refused(asked, tmp_path):
    model, data, out = (tmp_path / name for name in ("model", "sums.jsonl", "run"))
    shutil.copytree(TOY, model)
    run = [model, f"--data={data}", "--samples=1", "--max_new_tokens=9", f"--output_dir={out}"]
    call(evaluation, *run)
    samples, count = contents(out)["samples-0.jsonl"], len(asked)
    held, weights = f"{out} holds an evaluation with another", model / "model.safetensors"
    refused(evaluation, [*run, "--temperature=0.7"], f"{held} temperature: choose", out)
    for file, new, message in (
        (model / "chat_template.jinja", "{{ messages[0].content }}", f"{model}/chat_template"),
        (model / "generation_config.json", {"eos_token_id": 7}, f"{model}/generation_config"),
        (weights, weights.read_bytes()[:-4] + bytes(4), str(weights)),
        (data, data.read_text().replace("#### 3", "#### 4"), "problems"),
    ):
        times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        good = change(file, new)
        refused(evaluation, run, f"{held} {message}", out)
        change(file, good)
        os.utime(file, ns=times)
    change(data, data.read_text().replace('"level": 1', '"level": 2'))  # repaired
    said = call(evaluation, *run)
    assert "| 2 |" in said and "| 1 |" not in said and len(asked) == count
    assert contents(out)["samples-0.jsonl"] == samples
    good = change(out / "settings.json", None)
    refused(evaluation, run, "has samples but no settings.json", out)
    change(out / "settings.json", good)
    with open(out / "samples-0.jsonl", "a") as file:
        evaluation.fcntl.flock(file, evaluation.fcntl.LOCK_EX)
        refused(evaluation, run, "is in use by another evaluation", out)


# ---- Faults: what becomes of a file, as JSON, or is said; and what the one line says -------------
BOTH = table("""model.safetensors => "" => deserializing
    config.json => {"model_type": "x", "auto_map": {"AutoConfig": "own.X"}} => model can't be used
    config.json => {"model_type": "t5"} => T5Config | chat_template.jinja => null => is not set""")
MODEL = table("""adapter_config.json => "{}" => merge | chat_template.jinja => "Why?" => equal
    config.json => {"num_hidden_layers": 1, "layer_types": null} => weight ['model.layers.1.
    generation_config.json => {"eos_token_id": [1, 821]} => [1, 821, ... no tokens from 0 to 820
    generation_config.json => {"eos_token_id": -1} => the stop ids are [-1, ... which are no tokens
    generation_config.json => {"eos_token_id": "2"} => the stop ids are ['2', ... are no tokens""")
BITS = {"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}}
MODEL += [*BOTH, ("config.json", json.dumps(BITS), " quantized")]
FAULTS = [(opsdc, "", f"model/{file}", json.loads(new), said) for file, new, said in MODEL]
TEACHER, WORDS = "--teacher=toy --refresh_every=0", {"extra_special_tokens": ["another"]}
FAULTS += [(opsdc, TEACHER, "model/tokenizer_config.json", WORDS, "toy has another vocabulary")]
DATA = table(r"""{"problem": "a"}¶¶{"problem": "b¶ => line 2 | {"prompt": []} => ['prompt']
    {"text": "", "id": 1} => row 1 ... columns are ['text', 'id'] | {"problem": "\udcff"} => row 1
    {"problem": "a"}¶{"problem": " "} => row 2 ... ends with a text of the user | => 0 of 0
    {"prompt": [{"role": "system", "content": "a"}]} => row 1 ... ends with a text of the user
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]} => row 1
    {"problem": "[{\"role\": \"user\", \"content\": \"a\"}]"} => row 1 ... turned into a text
    {"problem": " [ {'content': 'a', 'role': 'user'}]"} => row 1 ... turned into a text
    {"prompt": [{"role": "", "content": "\udcff"}, {"role": "user", "content": "a"}]} => row 1""")
DATA = [(row, f"data.jsonl ... {said}") for row, said in DATA]
FAULTS += [(opsdc, "", "model/data.jsonl", *row) for row in [*DATA, (b'"\xe9"', "utf-8")]]
VALUES = """steps=0 learning_rate=1e9 learning_rate=nan weight_decay=-1 max_grad_norm=0
    refresh_share=1.1 top_p=1.5 seed=-1 temperature=0 seed=99999999999 divergence=kl instruction=v3
    instruction= batch_size=11 max_new_tokens=40000 max_prompt_tokens=3 output_dir="""
WORDS = table("""--data=Nobody/None => Nobody/None can't | --model=Nobody/None => Nobody/None can't
    --data={tmp}/no.jsonl => no.jsonl ... No such file | --data={tmp}/no => /no can't
    --data=toy/args => toy/args can't ... only .jsonl | --data={tmp}/x => /x can't be used
    --data={tmp}/x[1] => x[1] can't ... brackets | --data={tmp}/model => names don't match
    --data={tmp}/x/a.parquet => a.parquet can't be used | --instruction=none => equal prompts
    --output_dir={tmp}/model => not empty | @{tmp}/no => No such file | --prompt=poem => is no style
    --output_dir={tmp}/model/data.jsonl/a => is a file | --model=toy --thinking=on => --thinking on
    --teacher=toy => --refresh_every 0 | --teacher={tmp}/no --refresh_every=0 => /no can't
    --teacher={tmp}/x/../model --instruction=none --refresh_every=0 => equal prompts""")
WORDS += [(f"--{value}", f"--{value.split('=')[0]}") for value in VALUES.split()]
FAULTS += [(opsdc, words, "x/no", None, message) for words, message in WORDS]
DATA = table("""{"problem": "a", "answer": null} => ['problem', 'answer'], without answer, final_a
    {"problem": "a", "answer": "####"} => answer is '####' | {"text": "a"} => columns are ['text']
    {"problem": "a", "answer": 1}¶{"problem": "b", "answer": NaN} => row 2 can't be used: answer
    {"problem": "a", "answer": [1, 2]} => row 1 can't be used: answer is [1, 2] | => no rows
    {"problem": "a", "answer": 1, "id": 1}¶{"problem": "b", "answer": 1, "id": 1} => the same id
    {"problem": "a", "answer": "The answer is: 5"} => row 1 ... answer is 'The answer is: 5'
    {"problem": "a", "answer": 1, "level": "\\udcff"} => row 1 can't be used: 'utf-8' codec""")
SAMPLE = '{"id": 0, "response": "Answer: 2", "tokens": 3, "finished": true}\n'
SAMPLES = [(SAMPLE * 2, "--samples 1 of each"), (SAMPLE + SAMPLE.replace("0", "7"), "no others")]
SAMPLES += [(SAMPLE.replace("3", '"3"'), "r.jsonl, row 1 can't be used: its tokens is no int")]
WORDS = table("""toy {tmp}/no => no can't be used | toy toy => named twice
    toy --prompt v3 => --instruction is 'v3' | toy --prompt v1 v2 => 2 --prompt for 1 models
    toy --prompt_style=v1 => is no style of prompts | toy --samples=0 => --samples is 0
    toy --max_new_tokens=1020 => toy has 1024 positions | toy --temperature=0 => must be more than 0
    toy --seed=99999999999 => --seed is 99999999999 | --limit=2 => name models to evaluate
    --responses r --data a b => --responses needs one benchmark | toy --seed=-1 => --seed is -1
    toy --output_dir={tmp}/file => File exists | toy --data r ../r => two files of the same name""")
BOTH += [("run.json", '"{}"', "run.json can't be used")]
FAULTS += [(evaluation, "{tmp}/model", f"model/{f}", json.loads(new), e) for f, new, e in BOTH]
FAULTS += [(evaluation, "toy", "model/data.jsonl", *row) for row in DATA]
FAULTS += [(evaluation, "--responses={tmp}/r.jsonl", "r.jsonl", *row) for row in SAMPLES]
FAULTS += [(evaluation, words, "file", "", message) for words, message in WORDS]


@pytest.mark.parametrize("program, end, file, new, said", FAULTS)
def test_faults_are_refused(monkeypatch, small_run, tiny, tmp_path, program, end, file, new, said):
    model, words = shutil.copytree(tiny, tmp_path / "model"), end.format(tmp=tmp_path).split()
    (model / "own.py").write_text("raise SystemExit('a model must not bring code')")
    change(tmp_path / file, new)
    monkeypatch.chdir(HERE)
    run = [*small_run, f"--model={model}"] if program is opsdc else ["--samples=1", "--limit=1"]
    run += ["--max_new_tokens=4", f"--data={model}/data.jsonl", f"--output_dir={tmp_path}/run"]
    refused(program, [*run, *words], said, tmp_path)
    assert not (tmp_path / "run").exists()
