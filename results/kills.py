"""Fifty SIGKILLs over one run on the toy: does it end as one that nobody disturbed?

    python results/kills.py train    # opsdc.py, with a checkpoint after every step
    python results/kills.py eval     # eval.py, 600 samples in batches of 4

One kill in five falls at random into the first four seconds of a process (imports, loading), the
others into the second after its work has begun: into a rollout, an update, a save, a row of a file.
After each kill: opsdc.py has lost at most the step in progress, eval.py no sample of a finished
batch, and holds none twice. At the end all files are the same as those of the undisturbed run, the
times in metrics.jsonl aside. Five to seven minutes each.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KILLS = 50
SCRIPTS = {
    "train": "opsdc.py @toy/args --steps=100 --save_every=1 --batch_size=8 --max_new_tokens=40 "
    "--refresh_every=7 --resume",
    "eval": "eval.py toy --data=toy/test.jsonl --samples=2 --batch_size=4 --max_new_tokens=96",
}


def start(command: list[str], log: Path) -> subprocess.Popen:
    with log.open("w") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def begun(process: subprocess.Popen, log: Path) -> bool:
    """Waits for the progress bar of the work (`step` or `sample`); False if it ended before."""
    while process.poll() is None:
        text = log.read_text(errors="replace")
        if "?step/s" in text or "sample/s" in text:
            return True
        time.sleep(0.005)
    return False


def training_state(directory: Path) -> tuple[int, int]:
    """Steps that a resumed run will not do again, and steps logged."""
    newest = max((int(d.name[5:]) for d in directory.glob("step-*")), default=0)
    for old in directory.glob("step-*"):
        if int(old.name[5:]) < newest - 1:  # only to spare the disk
            shutil.rmtree(old)
    log = directory / "metrics.jsonl"
    return newest, log.read_text().count("\n") if log.exists() else 0


def evaluation_state(directory: Path) -> tuple[int, int]:
    """Samples held, and different ones among them."""
    keys = [
        (row["id"], row["sample"])
        for file in directory.glob("samples-*.jsonl")
        for line in file.open(encoding="utf-8")
        if line.endswith("\n")
        for row in [json.loads(line)]
    ]
    return len(keys), len(set(keys))


def outcome(directory: Path) -> dict[str, object]:
    """Contents of all files of a finished run, without checkpoints and times."""
    found = {}
    for file in sorted(path for path in directory.iterdir() if path.is_file()):
        content: object = file.read_bytes()
        if file.name == "metrics.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            content = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
        if file.name.startswith("samples-"):
            content = sorted(file.read_text(encoding="utf-8").splitlines())
        if file.name == "run.json":
            content = json.loads(file.read_text())
            content["config"].pop("output_dir")
        found[file.name] = content
    return found


def main() -> None:
    if sys.argv[1:] not in (["train"], ["eval"]):
        raise SystemExit(__doc__)
    state_of = training_state if sys.argv[1] == "train" else evaluation_state
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed, log = (Path(temporary, name) for name in ("whole", "killed", "log"))
        command = [sys.executable, *SCRIPTS[sys.argv[1]].split()]
        subprocess.run(
            [*command, f"--output_dir={whole}"], cwd=ROOT, check=True, capture_output=True
        )
        training_state(whole)
        kept, early = 0, 0
        for kill in range(1, KILLS + 1):
            process = start([*command, f"--output_dir={killed}"], log)
            if rng.random() < 0.2:
                early += 1
                time.sleep(rng.uniform(0, 4))
            elif begun(process, log):
                time.sleep(rng.uniform(0, 1))
            if process.poll() is not None:
                raise SystemExit(f"ended by itself before kill {kill}:\n{log.read_text()[-2000:]}")
            process.kill()
            process.wait()
            before, (kept, seen) = kept, state_of(killed)
            if kept < before or (seen - kept > 1 if sys.argv[1] == "train" else seen != kept):
                raise SystemExit(f"kill {kill}: {before} kept before it, {kept} and {seen} after")
            print(f"kill {kill}: {kept} done", flush=True)
        subprocess.run(
            [*command, f"--output_dir={killed}"], cwd=ROOT, check=True, capture_output=True
        )
        state_of(killed)
        expected, found = outcome(whole), outcome(killed)
        differ = [n for n in sorted(expected | found) if expected.get(n) != found.get(n)]
        if differ:
            raise SystemExit(f"these files differ: {', '.join(differ)}")
        print(f"{KILLS} kills ({early} while loading): {len(found)} files the same, bit for bit")


if __name__ == "__main__":
    main()
