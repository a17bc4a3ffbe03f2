"""The layers of the quickstart's student: which of the teacher's layers can go, and what that costs before training.

    python benchmarks/layers.py
    python benchmarks/layers.py --prompts 12 --smallest 28

The teacher answers training prompts greedily. Then one layer after the other is left out: at each size the layer
without which KL(teacher‖copy) over these answers is smallest, of the fifteen that cost least by themselves. The first
and the last layer stay. Beside that, two choices by rule of thumb.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from measure import Job
from results import add_output_options, table, write_json
from steps.workload import QUICKSTART, quickstart_pair
from torch import Tensor, nn

from distillkit.divergences import kl
from distillkit.models import Student

CANDIDATES = 15
EVERY_SECOND = (14, 16, 18, 20, 22, 24)


class Copies:
    """A model of which layers are left out, and the divergence of such copies from it.

    Args:
        model: A Llama-like model.
        rows: Token ids of each prompt, and of the answer to it.
    """

    def __init__(self, model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> None:
        self.model, self.rows, self.layers = model, rows, list(model.model.layers)
        self.all_layers = list(range(len(self.layers)))
        self.expected = [logits.log_softmax(-1) for logits in self.logits(self.all_layers)]

    @torch.no_grad()
    def logits(self, layers: Sequence[int]) -> list[Tensor]:
        """`[N, V]` logits at the positions that predict an answer's tokens, for each row."""
        self.model.model.layers = nn.ModuleList(self.layers[index] for index in layers)
        self.model.config.num_hidden_layers = len(layers)
        results = []
        for prompt, answer in self.rows:
            ids = torch.tensor([prompt + answer])
            states = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
            results.append(self.model.lm_head(states).float())
        return results

    def divergence(self, layers: Sequence[int]) -> float:
        """KL(teacher‖copy), nats per token of the answers."""
        pairs = zip(self.expected, self.logits(layers), strict=True)
        values = torch.cat([kl(logp, logits.log_softmax(-1)) for logp, logits in pairs])
        return values.mean().item()


def main() -> None:
    """The table and the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=36, help="training prompts that are answered")
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--smallest", type=int, default=22, help="layers of the smallest copy")
    add_output_options(parser, "layers.json")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    student = Student(quickstart_pair()[0], dtype="bfloat16")
    model: Any = student.load_base().eval()
    copies = Copies(model, answered(model, student.tokenizer(), options.prompts, options.tokens))
    layers = copies.all_layers
    inner = layers[1:-1]
    cost = {index: copies.divergence([other for other in layers if other != index]) for index in inner}
    candidates = sorted(inner, key=cost.__getitem__)[:CANDIDATES]
    rows: list[Job] = []
    while len(layers) > options.smallest:
        trials = [[other for other in layers if other != index] for index in layers if index in candidates]
        divergence, layers = min((copies.divergence(trial), trial) for trial in trials)
        rows.append(described("greedy", layers, copies.all_layers, divergence))
        print(rows[-1], file=sys.stderr)
    for name, chosen in {
        "every second of the upper half": [index for index in copies.all_layers if index not in EVERY_SECOND],
        "12 of 30, the first and last": [0, 1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 29],
    }.items():
        rows.append(described(name, chosen, copies.all_layers, copies.divergence(chosen)))
    write_json(options.json, rows, vars(options))
    lines = [[row["choice"], str(row["layers"]), str(row["without"]), f"{row['kl']:.3f}"] for row in rows]
    print(table(["choice", "layers", "without", "KL, nats per token"], lines, options.markdown))


def described(choice: str, layers: Sequence[int], all_layers: Sequence[int], divergence: float) -> Job:
    """A row of the table."""
    without = [index for index in all_layers if index not in layers]
    return {"choice": choice, "layers": len(layers), "without": without, "kl": divergence}


@torch.no_grad()
def answered(model: Any, tokenizer: Any, count: int, limit: int) -> list[tuple[list[int], list[int]]]:
    """Token ids of the quickstart's first training prompts, and of the teacher's greedy answers."""
    data = yaml.safe_load(QUICKSTART.read_text())["data"]
    lines = Path(data["train"].replace("${config_dir}", str(QUICKSTART.parent))).read_text().splitlines()
    rows = []
    for line in lines[:count]:
        messages = [{"role": "system", "content": data["system"]}]
        messages.append({"role": "user", "content": json.loads(line)["prompt"]})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=limit, do_sample=False)[0].tolist()
        rows.append((prompt, ids[len(prompt) :]))
    return rows


if __name__ == "__main__":
    main()
