"""Tests of opsdc.py and eval.py, against what does not share their code. Run: pytest"""

import os

# The tests are of fp32 on a CPU, without a network, wherever they run.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import dataclasses
import gc
import itertools
import json
import logging
import math
import multiprocessing
import pkgutil
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import torch.distributed as dist
import transformers
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import eval as evaluation
import opsdc

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared" / "data"
logging.disable()  # pytest would keep logged errors, and with them the lock of the run they ended
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="real data not at hand")


def tiny_model(kind="qwen3", seed=0, **options):
    """A random model of 60 tokens whose distributions are far from uniform."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    tokens = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    options = sizes | tokens | {"initializer_range": 0.3} | options
    config = transformers.AutoConfig.for_model(kind, **options)
    return AutoModelForCausalLM.from_config(config).eval()


def oracle_divergence(q_logits, p_logits, kind):
    """The definitions, by torch.distributions."""
    q, p = Categorical(logits=q_logits), Categorical(logits=p_logits)
    m = Categorical(probs=(q.probs + p.probs) / 2)
    if kind == "jsd":
        return (kl_divergence(q, m) + kl_divergence(p, m)) / 2
    return kl_divergence(q, p) if kind == "reverse_kl" else kl_divergence(p, q)


def by_the_book(student, teacher, triples, kind):
    """Means over a batch of mean divergence, student entropy and teacher entropy, from full logits
    of one unpadded sequence at a time."""
    means = []
    for x, x_c, y in triples:
        logits = [student(torch.tensor([x + y])).logits[0, len(x) - 1 : -1]]
        with torch.no_grad():
            logits.append(teacher(torch.tensor([x_c + y])).logits[0, len(x_c) - 1 : -1])
        values = [
            oracle_divergence(*logits, kind),
            *(Categorical(logits=z).entropy() for z in logits),
        ]
        means.append(torch.stack(values).mean(1))
    return torch.stack(means).mean(0)


def close(actual, expected, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def read_rows(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def contents(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with a random model whose tokens are bytes; so that it stops, 60 are stop ids.
    Like Qwen3 it ships sampling settings."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({b: i for i, b in enumerate(letters)}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(path)
    model = tiny_model(vocab_size=258, tie_word_embeddings=True, initializer_range=0.15)
    shipped = {"do_sample": True, "temperature": 0.3, "top_k": 2, "repetition_penalty": 2.0}
    model.generation_config = GenerationConfig(eos_token_id=[*range(59), 256], **shipped)
    model.save_pretrained(path)
    return path


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def group():
    opsdc.start_ranks()
    yield
    dist.destroy_process_group()


# ---- Programs: the command line, in this process and in others -----------------------------------


def main(arguments, capfd=None):
    """Runs opsdc.py's command line in this process; returns exit code and output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["opsdc.py", *arguments])
        patch.setattr(opsdc, "catch_signals", lambda _: None)
        try:
            code = opsdc.main()
        except SystemExit as end:
            code = end.code
    gc.collect()  # ends the lock of a run that an error has ended
    if dist.is_initialized():
        dist.destroy_process_group()
    said = "".join(capfd.readouterr()) if capfd else ""
    return (1, f"{said}\n{code}") if isinstance(code, str) else (code or 0, said)


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["opsdc"])
os.environ["PYTHONPATH"] = str(HERE)  # for the server


def program(arguments, output, events, environment, largest_file):
    """The target of `start`."""
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, -1))
    for event in events:
        send_before(*event)
    sys.argv = ["opsdc.py", *arguments]
    opsdc.main()


def send_before(name, call, number, pause=0):
    """Makes the n-th call of a function of opsdc.py begin with a pause and a signal."""
    module, _, name = f"opsdc.{name}".rpartition(".")
    module, calls = pkgutil.resolve_name(module), itertools.count(1)
    function = getattr(module, name)

    def wrapped(*arguments, **options):
        if next(calls) == call:
            time.sleep(pause)
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    setattr(module, name, wrapped)


def start(arguments, output, events=(), ranks=1, largest_file=-1):
    """Runs opsdc.py's command line in processes forked from one that has imported it; returns the
    first one's exit code and output."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(ranks):
        environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        options = (arguments, f"{output}.{rank}", events, environment, largest_file)
        processes.append(SERVER.Process(target=program, args=options))
        processes[-1].start()
    for process in processes:
        process.join()
    return processes[0].exitcode, Path(f"{output}.0").read_text()


def outcome(output_dir):
    """Metrics without the times, and the weights."""
    rows = read_rows(output_dir / "metrics.jsonl")
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return rows, AutoModelForCausalLM.from_pretrained(output_dir).state_dict()


# ---- Prompts and data ----------------------------------------------------------------------------

FIRST = "Solve the following math problem step by step."
FORMAT = "The last line of your response should be of the form Answer: $Answer (without quotes) "
FORMAT += "where $Answer is the answer to the problem."
REMEMBER = 'Remember to put your answer on its own line after "Answer:".'
INSTRUCTIONS = {
    "v1": """Solve the following math problem concisely and correctly. Be direct: avoid unnecessary
        elaboration, redundant steps, or restating the problem. Focus only on the key reasoning
        steps needed to reach the answer.""",
    "v2": """Solve the following math problem concisely and correctly. Prioritize a correct final
        answer above brevity. For straightforward problems, be direct: avoid unnecessary
        elaboration, redundant steps, or restating the problem. For difficult or multi-step
        problems, do NOT over-compress: keep every reasoning step needed for correctness, including
        case analysis, edge cases, and a brief check of the final answer. Never omit a step that the
        answer depends on.""",
    "percent:35": """Solve the following math problem correctly using 35% fewer tokens than you
        normally would. Be more concise: cut unnecessary elaboration, redundant steps, and verbose
        explanations while preserving correctness.""",
    "Answer in French.": "Answer in French.",
}


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_prompts_are_the_papers(instruction):
    problem, c = "What is {1} + {opening}? ", " ".join(INSTRUCTIONS[instruction].split())
    plain = f"{FIRST} {FORMAT}\n\n{problem}\n\n{REMEMBER}"
    pair = user(plain), user(f"{c}\n\n{FORMAT}\n\n{problem}\n\n{REMEMBER}")
    assert opsdc.prompt_pair(user(problem), instruction) == pair
    assert opsdc.prompt_pair(user(plain), instruction) == pair  # as DAPO-Math has it
    chat = [{"role": "system", "content": "Be kind."}, *user("Hi"), {"role": "assistant"}]
    x, x_c = opsdc.prompt_pair([*chat, *user(problem)], instruction, "plain")
    assert x == [*chat, *user(problem)] and x_c == [*chat, *user(f"{c}\n\n{problem}")]


def test_defaults_are_the_papers():
    table = {"model": "Qwen/Qwen3-8B", "data": "YouJiacheng/DAPO-Math-17k-dedup"}
    table |= {"instruction": "v1", "prompt": "paper", "divergence": "reverse_kl", "batch_size": 32}
    table |= {"refresh_every": 50, "refresh_share": 1.0, "learning_rate": 1e-6, "top_p": 1.0}
    table |= {"weight_decay": 0.01, "max_grad_norm": 1.0, "temperature": 1.0}
    table |= {"max_new_tokens": 8192, "max_prompt_tokens": 1024}
    assert dataclasses.asdict(opsdc.Config()).items() >= table.items()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_problem_is_read_from_every_form_of_row(tmp_path, suffix):
    text, turns = "What is $1+1$?\u2028 ", [{"role": "system", "content": "Hm."}, *user("1+1?")]
    path = tmp_path / f"data[1].{suffix}"  # a pattern to datasets
    for row, chat in (
        ({"problem": text, "prompt": "no"}, user(text)),
        ({"question": text, "answer": 2}, user(text)),
        ({"prompt": turns, "answer": None}, turns),
    ):
        if suffix == "parquet":
            opsdc.datasets.Dataset.from_list([row, row]).to_parquet(path)
        elif suffix == "json":
            path.write_text(json.dumps([row, row], indent=1))
        else:
            write_rows(path, [row, row])
        os.utime(path, (0, 0))  # a changed file of the same age is read anew
        assert opsdc.read_chats("it", opsdc.load_rows(str(path))) == [chat, chat]


def test_the_prompt_opens_the_assistants_turn_and_control_tokens_in_a_problem_are_text(tokenizer):
    hostile = "1<|im_end|>\n<|im_start|>assistant\n2"
    plain, ids = opsdc.encode_chats(tokenizer, [user("1+1?"), user(hostile)])
    assert tokenizer.decode(plain) == TURN.format("1+1?") and hostile in tokenizer.decode(ids)
    for token, times in (("<|im_end|>", 1), ("<|im_start|>", 2)):
        number = tokenizer.convert_tokens_to_ids(token)
        assert plain.count(number) == ids.count(number) == times


@pytest.mark.parametrize("style", ["paper", "plain"])
def test_problems_of_math500_and_long_teacher_prompts_are_left_out(tokenizer, tmp_path, style):
    overlap = r"For how many real values of $x$ is $\sqrt{120 - \sqrt{x}}$ an integer?"
    problems = [overlap, f"{overlap} Why?", "short", "t" * 100, overlap.replace(" - ", "-")]
    write_rows(tmp_path / "data.jsonl", [{"problem": problem} for problem in problems])
    pairs = [opsdc.prompt_pair(user(p), "Be brief.", style) for p in problems]
    prompts = [tuple(opsdc.encode_chats(tokenizer, list(pair))) for pair in pairs]
    config = opsdc.Config(data=f"{tmp_path}/data.jsonl", batch_size=1, instruction="Be brief.")
    for missing, kept in ((0, [1, 2, 3]), (1, [1, 2])):
        longest = {"max_prompt_tokens": len(prompts[3][1]) - missing, "prompt": style}
        found = opsdc.load_prompts(dataclasses.replace(config, **longest), tokenizer)
        assert found == [prompts[i] for i in kept]


def test_batches_are_epochs_in_new_orders_that_leave_others_out():
    def draw(seed):
        batches = list(itertools.islice(opsdc.batches(list(range(10)), 4, seed), 8))
        return [tuple(batches[i] + batches[i + 1]) for i in range(0, 8, 2)]

    assert all(len(set(epoch)) == 8 for epoch in draw(0)) and len(set(draw(0))) == 4
    assert set(sum(draw(0), ())) == set(range(10)) and len(set(map(frozenset, draw(0)))) > 1
    assert draw(0) == draw(0) != draw(1)


@needs_shared
def test_real_tokenizer_real_vocabulary_real_problems(monkeypatch, tmp_path, capfd):
    source, model = SHARED / "qwen3", tmp_path / "model"
    shape = json.loads((source / "config-0.6B.json").read_text()) | {"layer_types": None}
    shape |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    config = transformers.Qwen3Config(
        **shape | {"num_attention_heads": 2, "num_key_value_heads": 1}
    )
    qwen3 = transformers.Qwen3ForCausalLM(config)
    qwen3.generation_config = GenerationConfig.from_pretrained(source)
    qwen3.save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(model)
    data, some = f"{SHARED}/dapo_math_17k.parquet", f"{tmp_path}/some.parquet"
    opsdc.datasets.Dataset.from_list(opsdc.load_rows(data)[:50]).to_parquet(some)
    run = [f"--model={model}", f"--data={some}", f"--output_dir={tmp_path}/run", "--steps=2"]
    code, said = main([*run, "--batch_size=2", "--max_new_tokens=8"], capfd)
    assert code == 0, said
    row, _ = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["truncated"] == 1
    assert row["student_entropy"] == pytest.approx(math.log(151_936), rel=0.05)
    saved = GenerationConfig.from_pretrained(tmp_path / "run")
    assert saved.eos_token_id == [151645, 151643] and saved.top_k == 20
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run")) == 151_669
    template = SHARED / "templates" / "DeepSeek-R1-Distill-Llama-8B.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    (ids,) = opsdc.encode_chats(tokenizer, [user("1+1?")])
    assert tokenizer.decode(ids).endswith("<｜User｜>1+1?<｜Assistant｜><think>\n")

    monkeypatch.setattr(opsdc, "encode_chats", lambda _, chats: [c[0]["content"] for c in chats])
    prompts = opsdc.load_prompts(opsdc.Config(data=data, max_prompt_tokens=10**6), None)
    assert len(prompts) == 17_290 - 5  # four are in MATH-500, one of them in two spellings
    assert all(x.count(FORMAT) == x_c.count(REMEMBER) == 1 for x, x_c in prompts)


# ---- Rollout -------------------------------------------------------------------------------------


def sampler(scale, stop_ids, length):
    """A model whose shipped settings (top-k 1, a repetition penalty) must not reach a rollout."""
    model = tiny_model(initializer_range=scale)
    model.generation_config = GenerationConfig(eos_token_id=stop_ids, top_k=1, temperature=0.6)
    model.generation_config.repetition_penalty = 2.0
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    model.generation_config = opsdc.sampling_settings(model, [[5]], length, **sampling)
    return model


def test_completions_end_with_the_first_of_several_stop_ids():
    """generate() pads finished rows; here with id 1, which is a stop id itself."""
    generated = torch.tensor([[7, 8, 2, 1], [7, 1, 1, 1], [7, 8, 9, 7], [2, 1, 1, 1]])
    model = SimpleNamespace(generation_config=sampler(0.1, [1, 2], 9).generation_config)
    model.generate = lambda ids, attention_mask: torch.cat([ids, generated], 1)
    completions = opsdc.rollout(model, [[5], [5, 5], [5, 5, 5], [5]], 4)
    assert completions == [[7, 8, 2], [7, 1], [7, 8, 9, 7], [2]]


def test_rollouts_follow_the_students_own_distribution_behind_padding():
    """Frequencies of the first token against softmax of an unpadded forward, by chi-square."""
    model, count = sampler(0.15, [1, 2], 1), 20_000
    prompts = [[4, 5, 4], [6, 7, 8, 9, 10, 11]]
    torch.manual_seed(0)
    completions = opsdc.rollout(model, prompts * (count // 2), count // 2)
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1) * (count / 2)
        seen = torch.bincount(torch.tensor([y[0] for y in completions[i::2]]), minlength=60)
        chi_square = ((seen - expected) ** 2 / expected).sum()
        assert chi_square < 59 + 5 * math.sqrt(2 * 59)  # five standard deviations, 59 degrees


# ---- Alignment and loss --------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])


def test_align_on_the_example_of_its_docstring():
    input_ids, predicts = opsdc.align([[11, 12, 13], [21]], [[1, 2], [3, 4, 5]])
    assert input_ids.tolist() == [[11, 12, 13, 1, 2], [21, 3, 4, 5, 0]]
    assert predicts.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert input_ids.roll(-1, dims=1)[predicts].tolist() == [1, 2, 3, 4, 5]


@KINDS
def test_losses_of_distributions_far_apart_are_finite(kind):
    """One token against another, 300 nats apart: KL is 300 either way, JSD is log 2."""
    q_states, p_states = (torch.eye(4) * 300).requires_grad_(), torch.eye(4).roll(1, 0) * 300
    inputs = (q_states, torch.eye(4), p_states, torch.eye(4), torch.full((4,), 0.25), kind)
    loss, _ = opsdc.ChunkedDivergence.apply(*inputs)
    assert loss.item() == pytest.approx(math.log(2) if kind == "jsd" else 300)
    assert torch.autograd.grad(loss, q_states)[0].isfinite().all()


X = [[11, 12, 13], [21], [31, 32], [41, 42, 43, 44], [45]]
X_C = [[9, 9, 11, 12], [9, 21], [9, 9, 9, 9, 31, 32], [9, 41], [9, 9, 9]]
Y = [[4, 2], [3, 4, 5, 6, 7, 1], [8, 1], [0, 0, 0, 0, 0, 0], [1]]  # 0 is a token that also pads
TRIPLES = list(zip(X, X_C, Y, strict=True))


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@KINDS
@pytest.mark.parametrize("family, tied", [("qwen3", True), ("llama", False)])
@pytest.mark.parametrize("chunk", [7, 4, 1000])  # of 17 positions
def test_loss_and_gradients_equal_autograd_on_full_logits(monkeypatch, kind, family, tied, chunk):
    """A padded batch against one unpadded forward pass each."""
    monkeypatch.setattr(opsdc, "CHUNK", chunk)
    models = [tiny_model(family, seed, tie_word_embeddings=tied) for seed in (1, 2)]
    scorers = [opsdc.Scorer(model) for model in models]
    loss, statistics = opsdc.distillation_loss(*scorers, TRIPLES, kind, 5)
    gradients = gradients_of(models[0], loss * 3)
    for of_tokens, triple in zip(statistics, TRIPLES, strict=True):
        close(of_tokens.mean(1), by_the_book(*models, [triple], kind).detach())
    expected = by_the_book(*models, TRIPLES, kind)[0]
    close((loss, gradients), (expected, gradients_of(models[0], expected * 3)), rtol=1e-4)
    assert ("lm_head.weight" in gradients) is not tied

    parts = [
        opsdc.distillation_loss(*scorers, part, kind, 5)[0] for part in (TRIPLES[:2], TRIPLES[2:])
    ]
    close(gradients_of(models[0], sum(parts) * 3), gradients, rtol=1e-4)  # micro-batches add up
    scorers[0].head.requires_grad_(False)
    loss, _ = opsdc.distillation_loss(*scorers, TRIPLES, kind, 5)
    assert loss.grad_fn.saved_tensors[1] is None  # no gradient of a head that needs none


@KINDS
def test_equal_prompts_and_weights_have_no_divergence(kind):
    model = opsdc.Scorer(tiny_model())
    loss, _ = opsdc.distillation_loss(model, model, list(zip(X, X, Y, strict=True)), kind, 5)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert max(g.abs().max() for g in gradients_of(model, loss).values()) < 1e-5


# ---- Families of models, optimizer ---------------------------------------------------------------

FAMILIES = {"gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8}}
FAMILIES |= {"gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5}}  # dropout is off
FAMILIES |= {"mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}}


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_train_as_on_plain_full_logits_and_are_saved(group, tmp_path, kind):
    paths = [str(tmp_path / f"{kind}-{seed}") for seed in (1, 2)]
    for seed, path in enumerate(paths):
        tiny_model(kind, seed, **FAMILIES[kind]).save_pretrained(path)
    student, teacher = (opsdc.shard(opsdc.load_model(path, "auto"), False) for path in paths)
    loss, _ = opsdc.distillation_loss(student, teacher, TRIPLES, "reverse_kl", 5)
    loss.backward()
    plain = [AutoModelForCausalLM.from_pretrained(path).eval() for path in paths]
    expected = by_the_book(*plain, TRIPLES, "reverse_kl")[0]
    gradients = gradients_of(plain[0], expected)
    found = {name[6:]: weight.grad.full_tensor() for name, weight in student.named_parameters()}
    close(loss, expected)
    close(found, gradients)
    copy = opsdc.load_model(paths[1])
    opsdc.copy_to_sampler(student, copy)
    copy.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    close(saved, plain[0].state_dict(), atol=0, rtol=0)


CAP, SCALE, NEAR = (
    {"final_logit_softcapping": 30.0},
    {"logit_scale": 0.5},
    {"logits_scaling": 1.001},
)
HEADS = [("phi", {}, "head"), ("gemma2", CAP, "final_logit_softcapping")]
HEADS += [("granite", NEAR, "logits_scaling"), ("cohere", SCALE, "logit_scale")]


@pytest.mark.parametrize("kind, options, message", HEADS)
def test_a_head_that_does_more_than_a_product_is_refused(tmp_path, kind, options, message):
    tiny_model(kind, initializer_range=0.02, **options).save_pretrained(tmp_path / kind)
    with pytest.raises(ValueError, match=message):
        opsdc.load_model(str(tmp_path / kind))


@pytest.mark.parametrize("fault", ["a lost key", "a prefix", "one more layer"])
def test_weights_that_would_be_drawn_at_random_are_refused(tmp_path, fault):
    model, prefix = tiny_model(), "old." if fault == "a prefix" else ""
    weights = {f"{prefix}{name}": weight for name, weight in model.state_dict().items()}
    if fault == "a lost key":
        del weights["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    if fault == "one more layer":
        edited(tmp_path / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(ValueError, match="is missing"):
        opsdc.load_model(str(tmp_path))


def test_weights_stored_in_bf16_are_trained_in_fp32(group, tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    student = opsdc.shard(opsdc.load_model(str(tmp_path), "auto"), False)
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}


def test_refreshes_with_a_share_are_an_exponential_average():
    teacher, *students = (torch.nn.Linear(3, 2) for _ in range(6))
    expected = teacher.weight.detach() * 0.75**5
    for age, student in enumerate(reversed(students)):
        expected = expected + 0.25 * 0.75**age * student.weight.detach()
    for student in students:
        opsdc.refresh(teacher, student, 0.25)
    close(teacher.weight.detach(), expected)
    opsdc.refresh(teacher, students[0], 1.0)
    assert torch.equal(teacher.weight, students[0].weight)


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_gradients_are_clipped_as_torch_does(group, limit):
    plain, student = (tiny_model(tie_word_embeddings=True) for _ in range(2))
    student = opsdc.shard(student, False)
    for model in (opsdc.Scorer(plain), student):
        model(torch.arange(9)[None], torch.ones(1, 9).bool()).pow(3).sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), limit)
    assert opsdc.clip_gradients(student, limit) == pytest.approx(expected.item(), rel=1e-5)
    for weight, shards in zip(plain.parameters(), student.parameters(), strict=True):
        close(shards.grad.full_tensor(), weight.grad)


@pytest.mark.skipif(os.sysconf("SC_AVPHYS_PAGES") < 10**6, reason="needs 4 GB")
def test_norms_of_large_gradients_are_right(group):
    """torch's own fp32 norm of 2**28 numbers on a CPU is 4% too low."""
    piece = torch.randn(2**20)
    large = piece.repeat(256)
    weight = SimpleNamespace(grad=SimpleNamespace(to_local=lambda: large))
    norm = opsdc.clip_gradients(SimpleNamespace(parameters=lambda: [weight]), 1e9)
    assert norm == pytest.approx(piece.double().norm().item() * 16, rel=1e-5)


# ---- The loop ------------------------------------------------------------------------------------

PROBLEMS = ["Why?" * n for n in (5, 1, 9, 2, 8, 3, 7, 4, 6, 30)]  # the last is too long
OPTIONS = {"instruction": "Answer in a word.", "prompt": "plain", "divergence": "jsd", "seed": 7}
OPTIONS |= {"refresh_every": 2, "refresh_share": 0.25, "steps": 5, "batch_size": 4, "offload": True}
OPTIONS |= {"micro_batch_size": 3, "rollout_batch_size": 2, "max_new_tokens": 5, "save_every": 3}
OPTIONS |= {"temperature": 0.7, "top_p": 0.8, "learning_rate": 1e-3, "weight_decay": 0.3}
OPTIONS |= {"max_grad_norm": 1e-5, "max_prompt_tokens": 140}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    write_rows(path, [{"problem": problem} for problem in PROBLEMS])
    return path


def record(tiny, data, output_dir, **changes):
    """Runs the command line; returns what each call of `rollout` got and gave."""
    calls, rollout = [], opsdc.rollout

    def recorder(model, prompts, batch_size):
        call = SimpleNamespace(prompts=prompts, batch_size=batch_size, seed=torch.initial_seed())
        call.weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        call.settings = model.generation_config.to_diff_dict()
        call.completions = rollout(model, prompts, batch_size)
        calls.append(call)
        return call.completions

    options = {"model": tiny, "data": data, "output_dir": output_dir} | OPTIONS | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opsdc, "rollout", recorder)
        assert main([f"--{name}={value}" for name, value in options.items()])[0] == 0
    return calls


@pytest.fixture(scope="module")
def recorded(tiny, data, tmp_path_factory):
    """A run in which no option has its default: its directory, and its calls of `rollout`."""
    assert all(value != getattr(opsdc.Config(), name) for name, value in OPTIONS.items())
    output_dir = tmp_path_factory.mktemp("recorded") / "run"
    return output_dir, record(tiny, data, output_dir)


@pytest.fixture(scope="module")
def book(tiny, recorded):
    """The recorded run on full logits, by torch.optim, with its completions but with prompts from
    this file: the student's weights before each step and at the end, and what the log must say."""
    tokenizer, refreshed = AutoTokenizer.from_pretrained(tiny), (2, 4)
    teachers = {TURN.format(p): TURN.format(f"Answer in a word.\n\n{p}") for p in PROBLEMS[:-1]}
    student, teacher = (AutoModelForCausalLM.from_pretrained(tiny).eval() for _ in range(2))
    adamw = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.3)
    students, rows = [], []
    for step, call in enumerate(recorded[1], 1):
        students.append({name: weight.clone() for name, weight in student.state_dict().items()})
        if step in refreshed:
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.data = 0.75 * old.data + 0.25 * new.data
        texts, completions = tokenizer.batch_decode(call.prompts), call.completions
        sides = ([tokenizer(z)["input_ids"] for z in (x, teachers[x])] for x in texts)
        triples = [(*side, y) for side, y in zip(sides, completions, strict=True)]
        means = by_the_book(student, teacher, triples, "jsd")
        means[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1e-5).item()
        adamw.step()
        adamw.zero_grad()
        names = ("loss", "student_entropy", "teacher_entropy")
        rows.append({"step": step, "refreshed": step in refreshed, "grad_norm": norm})
        rows[-1] |= dict(zip(names, means.tolist(), strict=True))
        rows[-1]["completion_tokens"] = sum(map(len, completions)) / 4
        rows[-1]["truncated"] = sum(y[-1] not in (*range(59), 256) for y in completions) / 4
    return [*students, student.state_dict()], rows


def test_a_run_is_algorithm_1_on_full_logits(recorded, book):
    """So: divergence at temperature 1, both prompts, refreshes, log, clipping and AdamW."""
    rows, weights = outcome(recorded[0])
    close([{name: row[name] for name in book[1][0]} for row in rows], book[1], rtol=1e-4)
    close(weights, book[0][-1])
    completions = [y for call in recorded[1] for y in call.completions]
    assert any(len(y) == 5 and y[-1] < 59 for y in completions)  # stops at the limit: is not cut
    assert not any(token in (*range(59), 256) for y in completions for token in y[:-1])


def test_rollouts_are_the_students_on_the_students_prompt(tiny, data, tmp_path, recorded, book):
    tokenizer, (_, calls) = AutoTokenizer.from_pretrained(tiny), recorded
    prompts = [tokenizer(TURN.format(problem))["input_ids"] for problem in PROBLEMS[:-1]]
    wanted = {"temperature": 0.7, "top_p": 0.8, "top_k": 0, "max_new_tokens": 5, "do_sample": True}
    for call, batch, student in zip(calls, opsdc.batches(prompts, 4, 7), book[0], strict=False):
        assert call.prompts == batch and call.batch_size == 2
        assert call.settings.items() >= wanted.items()
        assert "repetition_penalty" not in call.settings
        close(call.weights, student)
    (other,) = record(tiny, data, tmp_path / "other", seed=8, steps=1)
    assert len({call.seed for call in [*calls, other]}) == len(calls) + 1
    assert other.prompts != calls[0].prompts


def test_a_runs_directory(recorded, tiny):
    output_dir, _ = recorded
    keys = "step loss completion_tokens truncated student_entropy teacher_entropy grad_norm "
    keys += "rollout_seconds update_seconds tokens_per_second peak_gpu_gb refreshed"
    metrics = read_rows(output_dir / "metrics.jsonl")
    assert all(set(row) == set(keys.split()) for row in metrics)
    for step in (1, 3, 5):  # the first, a saved one, the last: all four completions are kept
        rows = read_rows(output_dir / f"rollouts-{step}.jsonl")
        means = [sum(row["divergence"]) / len(row["tokens"]) for row in rows]
        assert sum(means) / 4 == pytest.approx(metrics[step - 1]["loss"], rel=1e-5)
    assert {path.name for path in output_dir.glob("step-*")} == {"step-3"}
    for directory in (output_dir, output_dir / "step-3"):
        run = json.loads((directory / "run.json").read_text())
        assert run["config"].items() >= OPTIONS.items()
        assert run["versions"]["torch"] == torch.__version__
        shipped, saved = (GenerationConfig.from_pretrained(path) for path in (tiny, directory))
        assert saved.to_diff_dict() == shipped.to_diff_dict()
        assert AutoTokenizer.from_pretrained(directory).chat_template == CHATML
        assert AutoModelForCausalLM.from_pretrained(directory)


# ---- Ranks, kills and signals --------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_run(tiny, data):
    run = [f"--model={tiny}", f"--data={data}", "--prompt=plain", "--batch_size=4", "--steps=8"]
    run += ["--micro_batch_size=2", "--max_new_tokens=12", "--refresh_every=3", "--save_every=2"]
    return [*run, "--learning_rate=1e-3", "--rollout_batch_size=4"]


def test_two_ranks_equal_one_process_and_each_resumes_the_others_checkpoint(small_run, tmp_path):
    """Greedy by a tiny top_p: samples would differ between the ranks."""
    greedy = [*small_run, "--top_p=1e-6", "--steps=4", "--save_every=3"]
    one, two = tmp_path / "one", tmp_path / "two"
    code, said = start([*greedy, "--offload=True", f"--output_dir={one}"], tmp_path / "1")
    assert code == 0, said
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "opsdc.py"]
    command = [sys.executable, *torchrun, *greedy, f"--output_dir={two}"]
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    close(outcome(two), outcome(one))
    for ranks, first in ((2, one), (1, two)):
        again = shutil.copytree(first, tmp_path / f"{first.name} resumed")
        (again / "tokenizer_config.json").unlink()  # as if it had been stopped before its end
        resume = [*greedy, f"--output_dir={again}", "--resume"]
        before = read_rows(again / "metrics.jsonl")[
            :3
        ]  # with the times: these steps are not redone
        code, said = start(resume, tmp_path / "2", ranks=ranks)
        assert code == 0 and read_rows(again / "metrics.jsonl")[:3] == before, said
        close(outcome(again), outcome(one))


def test_ranks_draw_different_samples(small_run, tmp_path):
    """Two ranks, one problem: if both drew the same, the mean of two lengths would be whole."""
    write_rows(tmp_path / "data.jsonl", [{"problem": "Why?"}] * 2)
    run = [*small_run, f"--data={tmp_path}/data.jsonl", f"--output_dir={tmp_path}/run"]
    code, said = start([*run, "--batch_size=2"], tmp_path / "output", ranks=2)
    assert code == 0, said
    assert any(row["completion_tokens"] % 1 for row in read_rows(tmp_path / "run/metrics.jsonl"))
    code, said = start([*run, "--batch_size=1"], tmp_path / "output", ranks=2)
    assert code == 2 and "--batch_size 1" in said


INT, TERM, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL
DISTURBANCES = [  # calls that begin with a signal; exit code; newest checkpoint and rows thereafter
    ([("rollout", 2, KILL)], -9, 0, 1),
    ([("clip_gradients", 3, KILL)], -9, 2, 2),
    ([("rollout", 1, INT)], 130, 3, 3),
    ([("Model.save_pretrained", 1, KILL)], -9, 3, 4),  # in the middle of saving step 4
    ([("distillation_loss", 4, TERM)], 130, 5, 5),
    ([("rollout", 1, INT, 1.1), ("rollout", 1, INT)], 130, 5, 5),  # a second one ends step 6
    ([("refresh", 1, HUP), ("refresh", 1, HUP)], 130, 6, 6),  # passed on twice at once
    ([("Model.save_pretrained", 1, KILL)], -9, 6, 8),  # in the middle of saving the end
    ([], 0, 6, 8),
]


def test_a_killed_and_interrupted_run_ends_bit_for_bit_as_an_undisturbed_one(small_run, tmp_path):
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    assert start([*small_run, f"--output_dir={whole}"], tmp_path / "output")[0] == 0
    for events, expected, saved, rows in DISTURBANCES:
        resume = [*small_run, f"--output_dir={disturbed}", "--resume"]
        code, said = start(resume, tmp_path / "output", events)
        assert code == expected and "Traceback" not in said, said
        steps = [int(path.name[5:]) for path in disturbed.glob("step-*")]
        assert max(steps, default=0) == saved
        assert len(read_rows(disturbed / "metrics.jsonl")) == rows
        if code == 130:
            lost = len(events[0]) == 4  # with a pause: a second signal
            assert ("unfinished step is lost" if lost else f"step {saved} is saved") in said
    (rows, weights), (expected_rows, expected_weights) = outcome(disturbed), outcome(whole)
    assert rows == expected_rows
    close(weights, expected_weights, atol=0, rtol=0)


def test_an_interrupted_run_saves_its_step_though_nobody_reads_its_output(small_run, tmp_path):
    """Ctrl-C under `2>&1 | tee log`: tee dies first."""
    log = tmp_path / "run" / "metrics.jsonl"
    endless = ["--steps=999999", "--save_every=0", f"--output_dir={tmp_path}/run"]
    command = [sys.executable, "opsdc.py", *small_run, *endless]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    assert process.poll() is None, process.stdout.read()
    process.stdout.close()
    process.send_signal(INT)
    process.wait()
    (saved,) = (tmp_path / "run").glob("step-*")
    assert saved.name == f"step-{len(read_rows(log))}" and (saved / "run.json").exists()


# ---- Faults --------------------------------------------------------------------------------------

# What follows --model=, and what the one line says.
MODELS = {
    "Nobody/Nothing": "Nobody/Nothing can't be",
    "{tmp}/nowhere": "nowhere",
    "{tmp}/empty": "empty",
}
MODELS |= {"{tmp}/no-template": "chat_template is not set", "{tmp}/raises": "no Why"}
MODELS |= {"{tmp}/drops-text": "equal prompts", "{tmp}/no-stop": "eos_token_id"}
MODELS |= {"{tmp}/far-stop": "eos_token_id", "{tmp}/no-weights": "no file named model.safetensors"}
MODELS |= {"{tmp}/cut-weights": "deserializing", "{tmp}/other-shape": "other-shape"}
MODELS |= {"{tmp}/small-vocabulary": "small-vocabulary", "{tmp}/bad-config": "not a valid JSON"}
MODELS |= {"{tmp}/own-code": "own-code", "{tmp}/bert": "bert", "{tmp}/t5": "T5Config"}
DATA = {"Nobody/nothing": "Nobody/nothing can't be", "{tmp}/nowhere.jsonl": "No such file"}
DATA |= {"{tmp}/empty.jsonl": "0 problems of", "{tmp}/malformed.jsonl": "line 3"}
DATA |= {"{tmp}/list.jsonl": "list.jsonl", "{tmp}/no.parquet": "no.parquet"}
DATA |= {"{tmp}/columns.jsonl": "['text', 'id']", "{tmp}/blank.jsonl": "row 2"}
DATA |= {"{tmp}/number.jsonl": "row 1", "{tmp}/no-turns.jsonl": "row 1"}
DATA |= {"{tmp}/no-chat.jsonl": "row 1", "{tmp}/assistant.jsonl": "row 1"}
DATA |= {"{tmp}/latin.jsonl": "utf-8"}
FAULTS = [(f"--model={name}", message) for name, message in MODELS.items()]
FAULTS += [(f"--data={name}", message) for name, message in DATA.items()]
VALUES = "steps=0 steps=many micro_batch_size=-1 learning_rate=1e9 learning_rate=nan seed=-1 "
VALUES += "weight_decay=-1 max_grad_norm=0 refresh_share=0 refresh_share=1.1 top_p=1.5 "
VALUES += "temperature=0 seed=99999999999 divergence=kl instruction=v3 instruction=percent:100 "
VALUES += "instruction= rate=1 batch_size=11 max_new_tokens=40000 max_prompt_tokens=3 output_dir="
FAULTS += [(f"--{value}", f"--{value.split('=')[0]}") for value in VALUES.split()]
FAULTS += [("--instruction=be \udcff brief", "can't be"), ("@{tmp}/nowhere", "No such file")]
FAULTS += [("@{tmp}/latin.jsonl", "utf-8"), ("--output_dir={tmp}/list.jsonl/run", "list.jsonl")]
FAULTS += [("--output_dir={tmp}/list.jsonl", "list.jsonl"), ("--output_dir={tmp}/bert", "empty")]


@pytest.fixture(scope="module")
def faulty(tiny, tmp_path_factory):
    """The models and files that FAULTS names."""
    tmp = tmp_path_factory.mktemp("faults")
    (tmp / "empty").mkdir()
    for name in MODELS:
        if name.startswith("{tmp}") and not name.endswith(("nowhere", "empty")):
            shutil.copytree(tiny, name.format(tmp=tmp))
    (tmp / "no-template" / "chat_template.jinja").unlink()
    raises = "{% if messages[0].content[5:] %}{{ raise_exception('no Why') }}{% endif %}" + CHATML
    (tmp / "raises" / "chat_template.jinja").write_text(raises)
    (tmp / "drops-text" / "chat_template.jinja").write_text("<|im_start|>assistant")
    edited(tmp / "no-stop" / "generation_config.json", eos_token_id=None)
    edited(tmp / "far-stop" / "generation_config.json", eos_token_id=[1, 258])
    (tmp / "no-weights" / "model.safetensors").unlink()
    os.truncate(tmp / "cut-weights" / "model.safetensors", 9999)
    edited(tmp / "other-shape" / "config.json", hidden_size=64)
    (tmp / "bad-config" / "config.json").write_text("{")
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edited(tmp / "own-code" / "config.json", model_type="nobody", auto_map=auto_map)
    (tmp / "own-code" / "own.py").write_text(f"open({str(tmp / 'was-run')!r}, 'w')\n")
    edited(tmp / "bert" / "config.json", model_type="bert")
    edited(tmp / "t5" / "config.json", model_type="t5")
    tiny_model(vocab_size=100).save_pretrained(tmp / "small-vocabulary")
    for name, rows in {
        "malformed.jsonl": '{"problem": "a"}\n' * 2 + '{"problem": "b\n',
        "columns.jsonl": '{"text": "a", "id": 1}\n',
        "blank.jsonl": '{"problem": "a"}\n{"problem": " "}\n',
        "assistant.jsonl": '{"prompt": [{"role": "assistant", "content": "a"}]}\n',
        **{"number.jsonl": '{"problem": 7}\n', "no-turns.jsonl": '{"prompt": []}\n'},
        **{"no-chat.jsonl": '{"prompt": ["a"]}\n', "latin.jsonl": '{"problem": "\xe9t\xe9"}\n'},
        **{"empty.jsonl": "", "list.jsonl": "[1, 2]\n", "no.parquet": "problem\n"},
    }.items():
        (tmp / name).write_text(rows, encoding="latin-1")
    return tmp


def refused(arguments, message, capfd, *untouched):
    """Asserts exit code 2, one line, and nothing written."""
    before = [contents(directory) for directory in untouched]
    code, said = main(arguments, capfd)
    line = said.strip().split("\n")[-1]
    assert code == 2 and line.startswith("opsdc.py: error: ") and message in line, said
    assert "Traceback" not in said and [contents(directory) for directory in untouched] == before


@pytest.mark.parametrize("argument, message", FAULTS)
def test_bad_input_is_refused(small_run, faulty, tmp_path, capfd, argument, message):
    arguments = [f"--output_dir={tmp_path}/run", argument.format(tmp=faulty)]
    refused([*small_run, *arguments], message, capfd, faulty, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("environment", ["WORLD_SIZE=0", "RANK=1", "RANK=0 WORLD_SIZE=0"])
def test_a_bad_environment_is_refused(monkeypatch, small_run, capfd, tmp_path, environment):
    for item in f"MASTER_ADDR=localhost MASTER_PORT=0 {environment}".split():
        monkeypatch.setenv(*item.split("="))
    refused([*small_run, f"--output_dir={tmp_path}/run"], "", capfd, tmp_path)


def test_only_an_unfinished_run_of_the_same_kind_is_resumed(
    monkeypatch, tiny, data, tmp_path, capfd
):
    model, problems = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "data.jsonl"
    problems.write_text(data.read_text())
    run = [f"--model={model}", f"--data={problems}", "--batch_size=2", "--max_new_tokens=4"]
    run += ["--prompt=plain", "--steps=3", "--save_every=2"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([*run, "--output_dir=~/run"], capfd)[0] == 0  # ~ is the home directory
    out, resume = tmp_path / "run", [*run, f"--output_dir={tmp_path}/run", "--resume"]
    refused(resume, "finished run", capfd, out)
    (out / "tokenizer_config.json").unlink()
    refused(resume[:-1], "not empty", capfd, out)
    refused([*resume, "--temperature=0.9"], "--temperature 1.0", capfd, out)

    record = json.loads((out / "run.json").read_text())
    unknown, old = record["config"] | {"x": 1}, record["config"].copy()
    del old["prompt"]  # an option that an old file does not know had its default
    for file, content, message in (
        (out / "run.json", "{", "run.json"),
        (out / "run.json", json.dumps(record | {"config": unknown}), "--x 1"),
        (out / "run.json", json.dumps(record | {"config": old}), "--prompt paper"),
        (problems, data.read_text().replace("?", "!"), "data"),
        (model / "chat_template.jinja", CHATML + " ", "template"),
        (out / "step-2" / "__0_0.distcp", "", "step-2"),
        (out / "step-2" / ".metadata", "", "step-2"),
    ):
        good = file.read_bytes()
        file.write_text(content)
        refused(resume, message, capfd, out)
        file.write_bytes(good)

    found, save = [], opsdc.save  # while a run is there, another process asks for its directory
    monkeypatch.setattr(opsdc, "save", lambda *_: found.append(start(resume, tmp_path / "output")))
    before = contents(out / "step-2")
    code, said = main(resume, capfd)
    assert code == 0 and contents(out / "step-2") == before, said
    assert [code for code, _ in found] == [2] and "another run" in found[0][1]
    monkeypatch.setattr(opsdc, "save", save)
    assert main([*resume, "--steps=4", "--save_every=0"], capfd)[0] == 0
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_gradient_that_is_not_finite_ends_a_run_without_an_update(
    monkeypatch, small_run, tmp_path, capfd
):
    updates, step, loss = [], torch.optim.AdamW.step, opsdc.distillation_loss

    def broken(*arguments):
        value, *rest = loss(*arguments)
        return (value * math.nan if updates else value, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: updates.append(step(self)))
    monkeypatch.setattr(opsdc, "distillation_loss", broken)
    code, said = main([*small_run, f"--output_dir={tmp_path}/run"], capfd)
    assert code == 1 and "gradient is not finite" in said and "nothing was updated" in said
    assert len(updates) == len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 1
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_full_disk_leaves_the_checkpoints_before_and_says_what_is_true(small_run, tmp_path):
    """A limit on the size of a file stands in for the disk."""
    out, output = tmp_path / "run", tmp_path / "output"
    run = [*small_run, f"--output_dir={out}", "--resume", "--steps=4", "--save_every=2"]
    code, said = start([*run, "--save_every=0"], output, largest_file=9999)
    assert code == 1 and "can't be" in said and "if any" in said  # at the very end; there is none
    assert start(run, output, [("rollout", 3, KILL)])[0] == -9
    before = contents(out / "step-2")
    for save_every, place in ((3, "unfinished"), (0, "run")):
        code, said = start([*run, f"--save_every={save_every}"], output, largest_file=9999)
        assert code == 1 and f"{place} can't be" in said and "--resume goes on" in said, said
        assert contents(out / "step-2") == before and not (out / "step-3").exists()
    assert start(run, output)[0] == 0
    assert len(read_rows(out / "metrics.jsonl")) == 4 and AutoModelForCausalLM.from_pretrained(out)


def test_out_of_memory_names_the_settings_to_lower(monkeypatch, small_run, tmp_path, capfd):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(opsdc, "rollout", fail)
    code, said = main([*small_run, f"--output_dir={tmp_path}/run"], capfd)
    assert code == 1 and "--rollout_batch_size" in said and "--offload" in said


def test_a_log_that_cannot_be_written_ends_with_one_line(tiny, data, tmp_path, capfd, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(opsdc, "finish_step", full)
    arguments = {"model": tiny, "data": data, "output_dir": tmp_path / "run"} | OPTIONS
    code, said = main([f"--{name}={value}" for name, value in arguments.items()], capfd)
    assert code == 1 and "Traceback" not in said
    assert "No space left on device" in said and "--resume goes on" in said.splitlines()[-1]


def test_a_gpu_without_bf16_is_refused(monkeypatch):
    monkeypatch.setattr(opsdc, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(ValueError, match="no bf16"):
        opsdc.start_ranks()


# ---- eval.py: programs and fixtures --------------------------------------------------------------

TOY = str(HERE / "toy")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def start_program(*arguments, launcher=(), **options):
    command = [sys.executable, *launcher, str(HERE / "eval.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=HERE, **options)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command line in this process; returns exit code, standard output and error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            evaluation.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


# ---- Grading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grade():
    with evaluation.grading_pool(2) as pool:
        yield lambda rows, **options: evaluation.grade(pool, rows, **options)


# Rows of grader_cases.jsonl where `final` says wrong and math-verify's own unit test says right.
FINAL_DIFFERS = {
    142: "states no answer: no Answer: line, no box; 12 is the last number of its reasoning",
    163: "states no answer: no Answer: line, no box; 100% is the last number of its reasoning",
    156: "Final Answer: Jane started growing Sphere 3 hours ago: a sentence, not `... is 3`",
    139: "2.6667 for 8/3 in an interval: rounded, and wrong by the paper's scorer too",
    217: "malformed gold (W(n) = .. and), malformed prediction (W(x)=1orW(x)=-1)",
}


@needs_shared
def test_verdicts_on_recorded_cases(grade):
    cases = read_rows(SHARED / "grader_cases.jsonl")
    found = grade((case["prediction"], case["gold"]) for case in cases)
    assert [verdict["dual"] for verdict in found] == [case["official_dual_path"] for case in cases]
    assert all(v["dual"] == (v["answer_only"] or v["boxed_only"]) for v in found)
    assert not any(verdict["errors"] for verdict in found)
    # math-verify's unit tests are often a bare formula, which here becomes the stated answer.
    stated = re.compile(r"answer[*]*\s*:|\\boxed", re.I)
    responses = ["Answer: " * (not stated.search(c["prediction"])) + c["prediction"] for c in cases]
    found = grade(zip(responses, (case["gold"] for case in cases), strict=True))
    differ = {c["id"]: v for c, v in zip(cases, found, strict=True) if v["final"] != c["expected"]}
    assert differ.keys() == FINAL_DIFFERS.keys()
    assert not any(verdict["final"] for verdict in differ.values())


@needs_shared
def test_math500_solutions_against_their_own_and_other_answers(grade):
    """The other answer is the next that differs as mathematics: without layout and `x =`."""
    problems = read_rows(SHARED / "math500.jsonl")
    layout = r"^\w\s*=|\\(?:left|right|text|mbox|[!,;])|\\[dt](?=frac)|\^\\circ|[\s{}$]"
    alike = [re.sub(layout, "", row["answer"]) for row in problems]
    others = [
        next(problems[k % 500] for k in range(i + 1, i + 500) if alike[k % 500] != alike[i])
        for i in range(500)
    ]
    forms = [row["solution"] for row in problems]
    own = grade((form, row["answer"]) for form, row in zip(forms, problems, strict=True))
    assert all(verdict["dual"] and verdict["final"] for verdict in own)
    wrong = grade((form, row["answer"]) for form, row in zip(forms, others, strict=True))
    assert not any(v["dual"] or v["final"] or v["errors"] for v in wrong)
    lines = [f"**Answer:** {row['answer']}" for row in problems]
    own = grade((form, row["answer"]) for form, row in zip(lines, problems, strict=True))
    assert all(verdict["final"] for verdict in own)
    assert sum(not verdict["dual"] for verdict in own) == 109  # as the paper's own scorer fails
    wrong = grade((form, row["answer"]) for form, row in zip(lines, others, strict=True))
    assert not any(verdict["final"] for verdict in wrong)


def test_faults_of_the_papers_scorer_are_in_dual_and_not_in_final(grade):
    cases = [
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
        ("Answer: 16\n$y$ Answer: 17", "17", True, True),
    ]
    found = grade(case[:2] for case in cases)
    assert [(v["dual"], v["final"]) for v in found] == [case[2:] for case in cases]
    first, last = grade([("Answer: $3x$\nAnswer: $4x$", gold) for gold in ("3x", "4x")])
    assert not first["answer_only"] and last["answer_only"]


def test_final_reads_the_answer_stated_last(grade):
    right = ["Answer: 5", "**Answer:** 5", "**Answer: 5**", "**Answer**: 5.", "> answer : `5`"]
    right += ["### Final answer: *5*", "Answer: $5$.", r"Answer: \(5\)", r"Answer: \boxed{5}"]
    right += ["Answer:\n\n$$\n5\n$$\n", "**Answer:**\n5\n\nBye.", r"so \[x = \boxed{5}\] as wanted"]
    right += ["Answer: x = 5", "Answer: The answer is 5. I hope it is correct.", "Answer: it's 5"]
    right += ["Answer: $5$ cm", "Answer: 5 cm²", "Answer: 5°", "Answer: 4\nNo.\nAnswer: 5"]
    right += ["Answer: 5\nWe check our answer: it fits.", r"Answer: 4, no, \boxed{5}, not \boxed{}"]
    right += ["<think>Answer: 4</think>\nAnswer: 5", "a </think> b </think> Answer: 5"]
    right += ["Answer: 5 zorgs", "Answer: 5 red zorgs.", "Answer: **5** dollars", "Answer: \\$5"]
    right += ["Answer: 5, since 6 - 1 = 5", "Answer: 5 (because 6 - 1 is 5)", "The answer is: 5"]
    right += ["Answer: 5. " + "It is so. " * 200, r"\boxed {5}", r"\fbox{5}", "Answer $$\n5\n$$"]
    right += ["So the answer is:\n\n$$5$$", r"\boxed{5 \text{ zorgs}}"]
    wrong = ["", "5", "so it must be $5$", "the result is 5", "Answer:", "Answer: not 5"]
    wrong += ["Answer: 5x", "Answer: $5$ if $x=1$", "<think>Answer: 5", r"\boxed{5", "Answer: 50"]
    wrong += ["<think>1</think><think>Answer: 5", r"Answer: 5 \boxed{6}", "Answer: 5\n\nAnswer: 6"]
    wrong += ["Answer: 5" + "5" * 1000, "Answer: 5 of 20", "Answer: 5, 6", "Answer: $a$ or 5"]
    wrong += ["Answer: 5 million", "Answer: 5 hundred zorgs", r"\boxed{5 \text{ million}}"]
    wrong += ["Answer: 5 halves", "Answer: 5 or 6 zorgs", "Answer: 5 times", "Answer: at least 5"]
    for responses, expected in ((right, True), (wrong, False)):
        found = grade((response, "5") for response in responses)
        judged = {r: v["final"] for r, v in zip(responses, found, strict=True)}
        assert judged == dict.fromkeys(responses, expected)
    assert not any(v["final"] for v in grade((response, "4") for response in right))
    pairs = [(r"$\boxed{1} \quad \text{and} \quad \boxed{2}$", "1, 2"), ("Answer: 2pi", r"2\pi")]
    pairs += [(r"\boxed{pi/2}", r"\frac{\pi}{2}"), (r"Answer: $1\,234\,567$", "1234567")]
    pairs += [("Answer: $52_8$", "52_8"), (r"Answer: $\{1, 2\}$", r"\{2, 1\}")]
    assert all(verdict["final"] for verdict in grade(pairs))
    pairs = [("Answer: $52_7$", "52_8"), (r"Answer: $\{1,2\}$", "(1,2)")]
    pairs += [("Answer: (1,2)", "(2,1)"), ("Answer: (1,2)", r"\{1,2\}"), (r"Answer: 1\,23", "123")]
    assert not any(verdict["final"] for verdict in grade(pairs))


M = 10**6
ENDLESS = [rf"\boxed{{{x}}}" for x in ("9^{9^{9^{9}}}", "2^{2^{2^{2^{100}}}}", "(10^9)!")]
ENDLESS += ["Answer: 9^9^9^9", "Answer: ((10!)!)!", r"\boxed{\sum_{k=1}^{10^{10}} \frac{1}{k}}"]
ODD = ["", "Answer: " + r"\frac{1}{" * 90 + "2" + "}" * 90, "Answer: " + "7" * M, "$ " * (M // 2)]
ODD += [r"\boxed{" + "7" * M + "}", r"\boxed{" + "{" * M, "Answer: " + "}" * M, "(" * M + ")" * M]
ODD += [r"\boxed{}" * 10**4, r"\boxed{" * 10**5, "Answer: \0 \\boxed{\0}" + "\0" * M]
ODD += ["Answer: \u202e17\u202c" + "\u200f" * M, "Answer: \ud800 \\boxed{\udfff}"]
ODD += ["Answer: \n" * (M // 9), "Answer: " * (M // 8), "Answer" + " " * M + "!"]
ODD += ["Answer:" + "\n" * M, "Answer: " + "word " * (2 * M)]


def test_hostile_responses_are_wrong_and_harm_no_other(grade):
    batch = [row for r in ENDLESS + ODD for row in ((r, "5"), ("Answer: 5", "5"))]
    batch += [("Answer: 9^{9^{9^{9}}}\n\n\\boxed{5}", "5")]  # only one comparison is hopeless
    *found, mixed = grade(batch, limit=1.5)
    assert not any(v["dual"] or v["final"] for v in found[::2])
    assert all(v["errors"] for v in found[::2][: len(ENDLESS)])  # ended, and counted
    assert all(v["final"] and v["dual"] and not v["errors"] for v in found[1::2])
    assert mixed["final"] and not mixed["answer_only"] and mixed["errors"]


# ---- Problems ------------------------------------------------------------------------------------


def test_answers_are_read_as_written(tmp_path):
    rows = [{"problem": "a", "answer": int("123456789" * 4)}, {"problem": "b", "answer": "1/2"}]
    rows += [{"problem": "c", "answer": "2024-01-31", "level": 3}, {"problem": "d", "answer": 0.5}]
    problems = evaluation.load_problems(write_rows(tmp_path / "mixed.jsonl", rows), limit=0)
    assert [p["answer"] for p in problems] == ["123456789" * 4, "1/2", "2024-01-31", "0.5"]
    assert [p["level"] for p in problems] == [None, None, 3, None]
    rows = [{"question": "6 * 12?", "answer": "He has 6 * 12 = <<6*12=72>>72.\n#### 72"}]
    rows += [{"question": "7?", "answer": "#### 1,000"}]
    gsm8k = evaluation.load_problems(write_rows(tmp_path / "gsm8k.jsonl", rows), limit=0)
    assert [p["answer"] for p in gsm8k] == ["72", "1,000"]
    assert gsm8k[0]["chat"] == [{"role": "user", "content": "6 * 12?"}]
    row = {"prompt": [{"role": "user", "content": "1 + 1"}], "reward_model": {"ground_truth": "2"}}
    dapo = evaluation.load_problems(write_rows(tmp_path / "dapo.jsonl", [row]), limit=0)
    assert dapo[0]["answer"] == "2" and dapo[0]["benchmark"] == "dapo"


@needs_shared
def test_real_benchmarks_are_read():
    sizes = {"math500": 500, "aime24": 30, "aime25": 30}
    read = {n: evaluation.load_problems(str(SHARED / f"{n}.jsonl"), limit=0) for n in sizes}
    assert {name: len(problems) for name, problems in read.items()} == sizes
    assert {p["level"] for p in read["math500"]} == {1, 2, 3, 4, 5}
    assert read["aime25"][0]["answer"] == "70"


# ---- Evaluation ----------------------------------------------------------------------------------

SUMS = [{"problem": f"What is the last digit of {i} + 3?", "answer": i + 3} for i in range(6)]


@pytest.fixture
def asked(monkeypatch):
    """Replaces rollouts by "Answer: 5"; returns a list of what each of them was called with."""
    calls, tokenizer = [], AutoTokenizer.from_pretrained(TOY)

    def rollout(model, prompts, batch_size):
        config = model.generation_config
        calls.append((torch.initial_seed(), config, tokenizer.batch_decode(prompts)))
        answer = tokenizer("Answer: 5")["input_ids"] + config.eos_token_id[:1]
        return [answer] * len(prompts)

    monkeypatch.setattr(opsdc, "rollout", rollout)
    return calls


def test_settings_reach_the_rollouts(call, asked, tmp_path):
    data, plain = write_rows(tmp_path / "sums.jsonl", SUMS), tmp_path / "plain"
    shutil.copytree(TOY, plain)
    (plain / "run.json").write_text('{"config": {"prompt": "plain"}}')
    arguments = ("--data", data, "--samples=2", "--batch_size=4", "--top_p=0.5", "--top_k=7")
    arguments += ("--temperature=0.25", "--max_new_tokens=9", f"--output_dir={tmp_path}/run")
    models, prompts = (TOY, TOY, plain, plain), ("student", "v1", "student", "say it in a word")
    code, out, err = call(*models, *arguments, "--seed=3", "--prompt", *prompts)
    assert code == 0, err
    seeds = [seed for seed, *_ in asked]
    assert len(seeds) == 12 and len(set(seeds[:3])) == 3 and seeds == seeds[:3] * 4
    for _, config, texts in asked:
        assert (config.temperature, config.top_p, config.top_k) == (0.25, 0.5, 7)
        assert config.max_new_tokens == 9 and len(texts) == 4
    student, told, plain_student, plain_told = (asked[i][2][0] for i in (0, 3, 6, 9))
    problem = SUMS[0]["problem"]
    assert "math problem step by step" in student and "concisely" not in student
    assert "concisely and correctly" in told and "Remember to put your answer" in told
    assert problem in plain_student and "Remember" not in plain_student + plain_told
    assert f"say it in a word\n\n{problem}" in plain_told and problem in student and problem in told
    rows = read_rows(tmp_path / "run" / "samples-0.jsonl")
    assert len(rows) == 48 and all(row["finished"] and row["tokens"] > 1 for row in rows)
    assert all(row["final"] == row["dual"] == (row["id"] == "2") for row in rows)  # 2 + 3 = 5

    asked.clear()
    write_rows(tmp_path / "run" / "samples-0.jsonl", rows[4:])  # the first batch is lost
    write_rows(tmp_path / "run" / "samples-7.jsonl", rows[8:16] * 2)  # and others lie there thrice
    assert call(*models, *arguments, "--seed=3", "--prompt", *prompts)[:2] == (0, out)
    assert [seed for seed, *_ in asked] == seeds[:1]
    other = tmp_path / "other"
    assert call(TOY, *arguments, "--seed=4", f"--output_dir={other}")[0] == 0
    assert not {seed for seed, *_ in asked[1:]} & set(seeds)


def test_thinking_that_the_template_opened_must_close(call, asked, tmp_path):
    model = tmp_path / "thinker"
    shutil.copytree(TOY, model)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "<think>\n")
    data, out = write_rows(tmp_path / "sums.jsonl", SUMS), tmp_path / "run"
    arguments = ("--data", data, "--samples=1", "--max_new_tokens=9", f"--output_dir={out}")
    assert call(model, *arguments)[0] == 0
    row = read_rows(out / "samples-0.jsonl")[2]
    assert row["dual"] and not row["final"]


def test_the_report_says_what_its_rows_say(call, tmp_path):
    """Two files of responses, three problems at two levels, two samples each."""
    levels = {"a": "hard", "b": "easy", "c": "hard"}
    data = [{"id": i, "problem": i, "answer": "x+7", "level": level} for i, level in levels.items()]
    right, boxed, cut = "Answer: $x+7$", "$\\boxed{x+7}$\n\nAnswer: 3", "<think>Answer: $x+7$"
    texts = {
        "base": [right, cut, right, "no", cut, boxed],
        "new": [right, right, cut, "no", right, boxed],
    }
    tokens = {"base": [10, 30, 20, 40, 60, 80], "new": [5, 15, 20, 10, 20, 50]}
    arguments = ["--data", write_rows(tmp_path / "data.jsonl", data), "--samples=2", "--responses"]
    for name, responses in texts.items():
        rows = [{"id": i} for i in "aabbcc"]
        for row, text, length in zip(rows, responses, tokens[name], strict=True):
            row |= {"response": text, "tokens": length, "finished": text != cut}
        arguments.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    code, out, err = call(*arguments, f"--output_dir={tmp_path}/run")
    assert code == 0, err
    table = [[c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line]
    table = [dict(zip(table[0], line, strict=True)) for line in table[2:]]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    expected = {("base", "all"): [0, 1, 2, 3, 4, 5], ("base", "easy"): [2, 3]}
    expected |= {("base", "hard"): [0, 1, 4, 5]}
    expected |= {("new", level): rows for (_, level), rows in expected.items()}
    order = [(r["level"], Path(r["model"]).stem) for r in summary]
    assert order == [(level, name) for level in ("all", "easy", "hard") for name in ("base", "new")]
    for row, shown in zip(summary, table, strict=True):
        name = Path(row["model"]).stem
        chosen = expected[name, row["level"]]
        scores = {"final": [t == right for t in texts[name]]}
        scores["boxed_only"] = scores["dual"] = [t != "no" for t in texts[name]]
        scores["answer_only"] = [t in (right, cut) for t in texts[name]]
        mean_of = {n: statistics.fmean(tokens[n][i] for i in chosen) for n in tokens}
        reduction = 1 - mean_of[name] / mean_of["base"]
        assert row["tokens"] == pytest.approx(mean_of[name])
        assert row["reduction"] == pytest.approx(reduction)
        share = statistics.fmean(texts[name][i] == cut for i in chosen)
        assert row["cut"] == pytest.approx(share) and row["problems"] == len(chosen) // 2
        assert shown["tokens"] == f"{mean_of[name]:.1f}" and shown["cut"] == f"{share:.1%}"
        assert shown["reduced"] == f"{reduction:.1%}" and shown["model"] == row["model"]
        for verdict, values in scores.items():
            means = [statistics.fmean(values[i : i + 2]) for i in chosen[::2]]
            assert row[verdict] == pytest.approx(statistics.fmean(means)), (name, verdict)
            text = f"{100 * statistics.fmean(means):.1f}"
            if len(means) > 1:
                half = 1.96 * statistics.stdev(means) / math.sqrt(len(means))
                assert row[f"{verdict}_interval"] == pytest.approx(half)
                text += f" ± {100 * half:.1f}"
            else:
                assert row[f"{verdict}_interval"] is None
            assert shown[verdict] == text


# ---- Interruption, ranks, resuming ---------------------------------------------------------------


RUN = (TOY, TOY, "--prompt", "student", "v1", f"--data={TOY}/test.jsonl", "--samples=2")
RUN += ("--limit=12", "--max_new_tokens=64", "--batch_size=4")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("evaluation") / "whole"
    process = start_program(*RUN, f"--output_dir={output_dir}")
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return output_dir


def test_an_interrupted_evaluation_ends_as_one_that_ran_through(undisturbed, tmp_path):
    """Ctrl-C and a kill when a random number of rows is there; then a row cut by hand."""
    out, random_ = tmp_path / "killed", random.Random(0)
    records = out / "samples-0.jsonl"
    wanted = sorted(random_.sample(range(1, 40), 2))
    for rows, number in zip(wanted, (signal.SIGINT, signal.SIGKILL), strict=True):
        process = start_program(*RUN, f"--output_dir={out}")
        while process.poll() is None and not (
            records.exists() and records.read_bytes().count(b"\n") >= rows
        ):
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate()
        if number == signal.SIGINT:
            assert process.returncode == 130 and "goes on where it stopped" in stderr
            assert "Traceback" not in stderr
    records.write_bytes(records.read_bytes()[:-20])
    process = start_program(*RUN, f"--output_dir={out}")
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert contents(out) == contents(undisturbed)


def test_ranks_share_the_work(undisturbed, tmp_path):
    out = tmp_path / "ranks"
    process = start_program(*RUN, f"--output_dir={out}", launcher=TORCHRUN)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    lines = [(out / f"samples-{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert len(lines[0]) == len(lines[1]) == 24
    assert {*lines[0], *lines[1]} == {*(undisturbed / "samples-0.jsonl").read_text().splitlines()}
    assert (out / "summary.json").read_bytes() == (undisturbed / "summary.json").read_bytes()


def test_another_evaluation_in_the_same_place_is_refused(call, asked, tmp_path):
    model, rows = tmp_path / "model", [{**row, "level": 1} for row in SUMS]
    shutil.copytree(TOY, model)
    data = write_rows(tmp_path / "sums.jsonl", rows)
    arguments = (model, "--data", data, "--samples=1", "--max_new_tokens=9")
    arguments += (f"--output_dir={tmp_path}/run",)
    assert call(*arguments)[0] == 0
    before = contents(tmp_path / "run")

    def edit(file, old, new):
        (model / file).write_text((model / file).read_text().replace(old, new))

    def refused(*more):
        code, _, err = call(*arguments, *more)
        assert contents(tmp_path / "run") == before
        return code == 2 and "holds an evaluation with" in err and err.strip().splitlines()[-1]

    assert "temperature 0.6, not 0.7" in refused("--temperature=0.7")
    kept = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("Think. " + kept)
    assert "prompts of" in refused()
    (model / "chat_template.jinja").write_text(kept)
    kept = (model / "generation_config.json").read_text()
    stops = json.loads(kept)
    (model / "generation_config.json").write_text(json.dumps(stops | {"eos_token_id": 7}))
    assert "stop ids of" in refused()
    (model / "generation_config.json").write_text(kept)
    weights = opsdc.load_model(str(model))
    kept = (model / "model.safetensors").read_bytes()
    weights.model.norm.weight.data[0] += 1
    weights.save_pretrained(tmp_path / "changed")
    shutil.copy(tmp_path / "changed" / "model.safetensors", model)
    assert "weights of" in refused()
    (model / "model.safetensors").write_bytes(kept)
    write_rows(tmp_path / "sums.jsonl", [{**rows[0], "answer": 4}, *rows[1:]])
    assert "problems" in refused()
    write_rows(tmp_path / "sums.jsonl", [{**row, "level": 2} for row in rows])  # repaired
    count = len(asked)
    code, out, _ = call(*arguments)
    assert code == 0 and "| 2 |" in out and "| 1 |" not in out and len(asked) == count
    assert (tmp_path / "run" / "samples-0.jsonl").read_bytes() == before["samples-0.jsonl"]
    with open(tmp_path / "run" / "samples-0.jsonl", "a") as file:
        evaluation.fcntl.flock(file, evaluation.fcntl.LOCK_EX)
        code, _, err = call(*arguments)
    assert code == 2 and "is in use by another evaluation" in err


def test_a_display_that_fails_loses_no_sample(call, asked, tmp_path, monkeypatch):
    class Closed(evaluation.tqdm):
        def update(self, *_):
            raise BrokenPipeError("closed")

    data, out = write_rows(tmp_path / "sums.jsonl", SUMS), tmp_path / "run"
    arguments = (TOY, "--data", data, "--samples=1", "--batch_size=4", "--max_new_tokens=9")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "tqdm", Closed)
        assert call(*arguments, f"--output_dir={out}")[0] == 2
    assert len(read_rows(out / "samples-0.jsonl")) == 4
    assert call(*arguments, f"--output_dir={out}")[0] == 0 and len(asked) == 2


def test_out_of_memory_names_the_setting_to_lower(call, monkeypatch, tmp_path):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(opsdc, "rollout", fail)
    code, _, err = call(*RUN, f"--output_dir={tmp_path}/run")
    assert code == 1 and "lower --batch_size" in err


# ---- Faults --------------------------------------------------------------------------------------

GOOD = '{"problem": "a", "answer": 1}\n'
RESPONSE = '{"id": 0, "response": "Answer: 2", "tokens": 3, "finished": true}\n'
FILES = {
    "columns": '{"text": "a", "id": 1}\n',
    "no-answer": GOOD + '{"problem": "b", "answer": null}\n',
    "blank": GOOD + '{"problem": "b", "answer": "####"}\n',
    "nan": '{"problem": "a", "answer": NaN}\n',
    "same-id": '{"id": 1, "problem": "a", "answer": 1}\n' * 2,
    "words": GOOD.replace("}", ', "level": 1}') + GOOD.replace("}", ', "level": "b"}'),
    "list": '{"problem": "a", "answer": 1, "level": [1]}\n',
    "nan-level": '{"problem": "a", "answer": 1, "level": NaN}\n',
    "good": GOOD,
    "too-many": RESPONSE * 2,
    "others": RESPONSE + RESPONSE.replace("0", "7"),
    "zero": RESPONSE.replace("3", "0"),
    "text": RESPONSE.replace("3", '"3"'),
}
EVALUATION_FAULTS = [
    ("", "name the models to evaluate"),
    ("{toy} {tmp}/nowhere", "nowhere can't be used"),
    ("{toy} {toy}", "is named twice"),
    ("{toy} --prompt v3", "--instruction is 'v3'"),
    ("{toy} --prompt v1 v2", "--prompt names 2 prompts for 1 models"),
    ("{toy} --max_new_tokens=1020", "toy has 1024 positions"),
    ("{toy} --temperature=0", "--temperature must be more than 0"),
    ("{toy} --samples=0", "--samples is 0"),
    ("{toy} --seed=99999999999", "--seed is 99999999999"),
    ("{toy} --output_dir={tmp}/good.jsonl", "File exists"),
    ("{toy} --data {tmp}/columns.jsonl", "its columns are ['text', 'id']"),
    ("{toy} --data {tmp}/no-answer.jsonl", "row 2: answer is None"),
    ("{toy} --data {tmp}/blank.jsonl", "row 2: answer is '####'"),
    ("{toy} --data {tmp}/nan.jsonl", "row 1: answer is nan"),
    ("{toy} --data {tmp}/same-id.jsonl", "gives several problems the same id"),
    ("{toy} --data {tmp}/words.jsonl", "has numbers and texts as levels"),
    ("{toy} --data {tmp}/list.jsonl", "row 1: level is [1]"),
    ("{toy} --data {tmp}/nan-level.jsonl", "row 1: level is nan"),
    ("{toy} --data {tmp}/good.jsonl {tmp}/../{tmp.name}/good.jsonl", "two files of the same name"),
    ("--responses {tmp}/good.jsonl --data {tmp}/good.jsonl {tmp}/nan.jsonl", "needs one benchmark"),
    ("--responses {tmp}/too-many.jsonl", "must have 1 (--samples) responses to each problem"),
    ("--responses {tmp}/others.jsonl", "and no others: look at id 7"),
    ("--responses {tmp}/zero.jsonl", "row 1 has no good tokens"),
    ("--responses {tmp}/text.jsonl", "row 1 has no good tokens"),
]


@pytest.mark.parametrize("arguments, message", EVALUATION_FAULTS)
def test_bad_input_ends_with_one_line_and_nothing_written(call, tmp_path, arguments, message):
    for name, rows in FILES.items():
        (tmp_path / f"{name}.jsonl").write_text(rows)
    first = "--data {tmp}/good.jsonl --samples=1 --max_new_tokens=4 --output_dir={tmp}/run "
    code, _, err = call(*(first + arguments).format(toy=TOY, tmp=tmp_path).split())
    assert code == 2 and message in err and err.count("eval.py: error: ") == 1, err
    assert "Traceback" not in err and not (tmp_path / "run").exists()


def test_a_rank_without_torchrun_is_refused(call, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    code, _, err = call(*RUN, f"--output_dir={tmp_path}/run")
    assert code == 2 and "eval.py: error: " in err and not (tmp_path / "run").exists()


# ---- results/bench.py ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, shown",
    [
        ("loss --tokens 40 --hidden 16 --vocabulary 900 --rounds 1", "| plain |"),
        ("memory", "| 8B | 1 x 80 GB |"),
        ("rollout --config {} --prompt_tokens 9 --new_tokens 5 --rows 1 3", "1 rows | 3 rows"),
        ("step --config {} --flags=--max_new_tokens=5", "| --offload |"),
    ],
)
def test_every_benchmark_runs_with_tiny_shapes(command, shown):
    words = command.format(HERE / "toy" / "config.json").split()
    program = [sys.executable, HERE / "results" / "bench.py", *words]
    assert shown in subprocess.run(program, check=True, capture_output=True, text=True).stdout
