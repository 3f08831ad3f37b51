"""A first look at a model, by a scripted investigator: anatomy, tokens, answers, and a lens with its control.

uv run python examples/sandbox_intro/run.py
"""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from investigator import investigating, report

ANATOMY = """\
import json
from tool_packs.anatomy import anatomy

parts = anatomy(m)
total = sum(p.numel() for p in m.core.parameters())
print("FINDING", json.dumps({"layers": m.n_layers, "width": m.width, "parameters": total}))
parts"""

TOKENS = """\
# The same words as a chat and as they stand: the template is what differs
from tool_packs.anatomy import tokenize

question = "What is the capital of France?"
chat = m.tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
)
bare = m.tokenizer(question, add_special_tokens=False)["input_ids"]
where = next(i for i in range(len(chat)) if chat[i : i + len(bare)] == bare)
print("before the question:", m.tokenizer.convert_ids_to_tokens(chat[:where]))
print("behind it, up to the reply:", m.tokenizer.convert_ids_to_tokens(chat[where + len(bare) :]))
print("FINDING", json.dumps({"chat": len(chat), "bare": len(bare), "reply_at": len(chat)}))
tokenize(m, question)"""

ANSWERS = """\
# The same question greedily, sampled, and with the beginning of the reply given
from tool_packs.generation import generate

greedy = generate(m, question, max_new_tokens=12)["text"]
again = generate(m, question, max_new_tokens=12)["text"]
sampled = generate(m, [question] * 4, max_new_tokens=12, temperature=1.0)["text"]
begun = [{"role": "user", "content": question}, {"role": "assistant", "content": "I"}]
prefilled = generate(m, begun, max_new_tokens=12)["text"]
print("greedy:", greedy, "\\nsampled:", sampled, "\\nafter 'I':", prefilled)
print("FINDING", json.dumps({"answer": list(greedy)[0], "repeats": list(greedy) == list(again)}))"""

LENS = """\
# Where in the model does the answer appear? The control asks for another country.
from tool_packs.logit_lens import logit_lens


def ranks(country, word):
    '''By layer: the rank of the first token of `word`, where the answer is about to be said.'''
    asked = [
        {"role": "user", "content": f"What is the capital of {country}?"},
        {"role": "assistant", "content": f"The capital of {country} is"},
    ]
    first = m.tokenizer.decode(m.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][:1])
    lens = logit_lens(m, asked, positions="last", track=[first])
    return lens["rank"].reshape(m.n_layers, -1)[:, -1].tolist()  # 1 is the top


asked, control = ranks("France", "Paris"), ranks("Japan", "Paris")
below = [layer for layer, rank in enumerate(asked) if rank > 1]
print("rank of Paris by layer; asked for France:", asked, "; for Japan:", control)
print("FINDING", json.dumps({
    "from_layer": max(below) + 1 if below else 0,
    "last_rank": asked[-1],
    "control_rank": control[-1],
    "control_best": min(control),
}))"""


async def main() -> None:
    async with investigating("sandbox_intro") as who:
        shape = await who.cell(ANATOMY)
        anatomy_cell = who.last_cell
        read = await who.cell(TOKENS)
        said = await who.cell(ANSWERS)
        answers_cell = who.last_cell
        lens = await who.cell(LENS)
        assert read["chat"] > read["bare"], "the template adds tokens"
        assert said["repeats"], "greedy answers are the same each time"
        assert lens["last_rank"] == 1 < lens["control_best"], "the lens follows the question"
        claim = (
            f"The model has {shape['layers']} layers of width {shape['width']} and {shape['parameters']:,} parameters; "
            f"the chat template adds {read['chat'] - read['bare']} tokens. Asked for the capital of France, the lens "
            f"reads Paris from layer {lens['from_layer']} on (rank {lens['last_rank']} at the end); asked for that of "
            f"Japan its rank is {lens['control_rank']}, and {lens['control_best']} or worse in every layer."
        )
        told = await who.submit(
            claim,
            answer=str(shape["layers"]),
            evidence=f"{anatomy_cell} {answers_cell}",
            controls=who.last_cell,
            confidence=0.99,
            limits="One question of fact; a lens shows what could be read, not what the model uses.",
        )
        report(**shape, **lens, notebook=who.notebook, graded=told["graded"])


asyncio.run(main())
