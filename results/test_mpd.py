"""Tests of mpd.py, by the means of test_opsdc.py. Run: pytest"""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import test_opsdc  # before all that imports torch: it has settings for then
from results import mpd
from test_opsdc import (
    KILL,
    OPTIONS,
    PROBLEMS,
    SAMPLING,
    SILENT,
    TOKENIZER,
    TOY,
    TURN,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    by_the_book,
    call,
    close,
    outcome,
    read_rows,
    record,
    start,
    tiny_model,
    user,
)

tiny, small_run = test_opsdc.tiny, test_opsdc.small_run  # fixtures


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """Another, larger model with the tiny one's tokenizer and other stop ids."""
    path = shutil.copytree(tiny, tmp_path_factory.mktemp("models") / "other")
    model = tiny_model(vocab_size=821, seed=1, hidden_size=48, initializer_range=0.15)
    model.generation_config = GenerationConfig(eos_token_id=[*range(100, 300)])
    model.save_pretrained(path)
    return path


def test_the_loss_is_taken_on_what_the_teacher_makes_of_the_rollouts(tiny, other, tmp_path):
    """The teacher reads problem, rollout and request; the logs are by the book."""
    flags = {"teacher": other, "refresh_every": 0, "refresh_share": 1, "steps": 1, "batch_size": 8}
    flags |= {"model": tiny, "data": tiny / "data.jsonl", "output_dir": tmp_path / "run", "seed": 2}
    sampled, rewritten = record(OPTIONS | flags, mpd)
    student, teacher = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny, other))
    close([sampled.weights, rewritten.weights], [dict(m.state_dict()) for m in (student, teacher)])
    assert rewritten.settings.items() >= SAMPLING.items()
    saved = GenerationConfig.from_pretrained(tmp_path / "run").to_diff_dict()
    for settings in (saved, sampled.settings, rewritten.settings):  # learns to stop as the teacher
        assert sorted(settings["eos_token_id"]) == [*range(300)]
    opening, closing = TURN.split("{}")
    texts = TOKENIZER.batch_decode(sampled.prompts)
    problems = [p for text in texts for p in PROBLEMS if text == TURN.format(p) + SILENT]
    solutions = TOKENIZER.batch_decode(sampled.completions, skip_special_tokens=True)
    for prompt, *parts in zip(rewritten.prompts, problems, solutions, strict=True):
        text = TOKENIZER.decode(prompt)
        assert text.startswith(opening + "\n\nHere is a solution:\n\n".join(parts) + "\n\n")
        assert "concisely" in text and "every step" in text and text.endswith(closing + SILENT)
    pairs = list(zip(sampled.completions, rewritten.completions, strict=True))
    trained = [min(pair, key=len) for pair in pairs]  # the first, if both are as long
    assert trained not in (sampled.completions, rewritten.completions)
    starts = "", "Answer in a word.\n\n"
    sides = [[TOKENIZER.encode(TURN.format(c + p) + SILENT) for p in problems] for c in starts]
    means = by_the_book(student, teacher, list(zip(*sides, trained, strict=True)), "jsd")
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    close(row["loss"], means[0].item())
    assert row["completion_tokens"] == sum(map(len, trained)) / 8
    (row,) = read_rows(tmp_path / "run" / "rewrites.jsonl")
    assert row["rollout_tokens"] == sum(map(len, sampled.completions)) / 8
    assert row["rewritten"] == sum(len(new) < len(old) for old, new in pairs) / 8


def test_a_rewrite_that_is_empty_no_shorter_or_of_another_form_leaves_the_rollout(monkeypatch):
    tokenizer, end = AutoTokenizer.from_pretrained(TOY), 2
    space, thought = (TOKENIZER(text)["input_ids"][0] for text in (" ", "</think>"))
    tokenizer.chat_template = TOKENIZER.chat_template
    old, prompts = [[7, 8, 9, end]] * 6 + [[thought, 8, 9, end]] * 2 + [[7, 8, 9]], []
    new = [[7, end], [end], [space, end], old[0], [7] * 5, [7, 8, 9], [thought, 8, end], [8, end]]
    new.append([len(tokenizer), 7])  # a row of the head that stands for no token
    monkeypatch.setattr(mpd.opsdc, "rollout", lambda _, asked, __: prompts.extend(asked) or new)
    found = mpd.rewrite(None, tokenizer, [user("?")] * 9, old, 32)
    assert found == [new[0], *old[1:5], *new[5:7], *old[7:]]
    assert all(tokenizer.decode(prompt).endswith(SILENT) for prompt in prompts)  # not to think


REWRITING = "--teacher={other} --refresh_every=0", "--refresh_share=0.3 --refresh_every=1"


@pytest.mark.parametrize("flags", REWRITING)  # a teacher's rewrites; the student's own
def test_mixed_policy_holds_on_two_ranks_and_after_a_kill(flags, other, small_run, tmp_path):
    """With the larger teacher of the first this is opsdc.py's test of --teacher, too."""
    run = [*small_run, *flags.format(other=other).split(), "--steps=4", "--top_p=1e-6"]  # greedy
    whole, killed, two = (tmp_path / name for name in ("whole", "killed", "two"))
    start(mpd, *run, f"--output_dir={whole}")
    resume = [*run, f"--output_dir={killed}", "--resume"]
    start(mpd, *resume, accidents=[("opsdc.clip_gradients", 4, KILL)], code=-9)
    start(mpd, *resume)
    close(outcome(killed), outcome(whole), atol=0, rtol=0)
    start(mpd, *run, f"--output_dir={two}", ranks=2)
    close(outcome(two), outcome(whole), atol=1e-4)  # a tenth of one update by AdamW
    log, *others = (read_rows(path / "rewrites.jsonl") for path in (whole, killed, two))
    assert [row["step"] for row in log] == [1, 2, 3, 4] and others == [log, log]


def test_a_rewriter_without_room_for_rollout_and_rewrite_is_refused(small_run, tmp_path):
    flags = "--max_new_tokens=16330", f"--output_dir={tmp_path}/run"
    assert "has 32768 positions" in call(mpd, *small_run, *flags, code=2)
    assert not (tmp_path / "run").exists()
