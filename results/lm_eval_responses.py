"""Rows for `eval.py --responses`: lm_eval_responses.py MODEL < samples_TASK_*.jsonl of lm_eval."""

import json
import sys

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])  # lm_eval keeps no count of tokens
for row in {row["doc_id"]: row for row in map(json.loads, sys.stdin)}.values():  # one per filter
    doc, (prompt, options) = row["doc"], row["arguments"]["gen_args_0"].values()
    sample = {"id": doc.get("unique_id", doc.get("id", row["doc_id"]))}
    for text in row["resps"][0]:
        sample["tokens"] = 1 + len(tokenizer.encode(text, add_special_tokens=False))  # and a stop
        sample["finished"] = sample["tokens"] <= options["max_gen_toks"]
        print(json.dumps(sample | {"response": "<think>" * prompt.endswith("<think>\n") + text}))
