"""Responses by vLLM for `eval.py --responses`, at the paper's settings. Not run: no GPU at hand.

pip install vllm
python results/with_vllm.py Qwen/Qwen3-8B responses.jsonl
python eval.py --responses responses.jsonl --benchmarks math500
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))
from eval import Settings, load_benchmarks  # noqa: E402
from opsdc import student_prompt  # noqa: E402


def main() -> None:
    model, file = sys.argv[1:]
    llm = LLM(model)
    sampling = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, max_tokens=30_000, n=8)
    problems = load_benchmarks(Settings(benchmarks=["math500"]))["math500"]
    chats = [[{"role": "user", "content": student_prompt(row["problem"])}] for row in problems]
    outputs = llm.chat(chats, sampling)
    with open(file, "w", encoding="utf-8") as rows:
        for problem, output in zip(problems, outputs, strict=True):
            prompt = llm.get_tokenizer().decode(output.prompt_token_ids)
            for response in output.outputs:
                row = {
                    "id": problem["id"],
                    "response": response.text,
                    "tokens": len(response.token_ids),
                    "finished": response.finish_reason == "stop",
                    "thinking_opened": prompt.rstrip().endswith("<think>"),
                }
                rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
