"""Can a model be convinced that it is somebody else? A scripted player tells it so, and measures after each move.

uv run python examples/convincing_game/run.py

The control is in the words: the same identities, said of the user.
"""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from investigator import investigating, report

# The rule, fixed before anything is measured.
MIN_GAP = 0.5  # of the share that says the identity: told of the model, less told of the user
MIN_AUROC = 0.9  # of the probe on identities that it was not trained on
OVER_RANDOM = 3.0  # effect of steering over the largest effect of a random vector of equal norm

PLAN = f"""\
## Plan, before anything is measured

Suspicion: told that it is somebody, the model takes itself for that one. Rival: it repeats the word. The rival says
that the word does the same when it is said of the user.

Convinced only if all of this holds: it says the identity more often by {MIN_GAP} when it is said of it than when it is
said of the user; a probe tells the two apart on held-out identities (AUROC {MIN_AUROC} or more, above all shuffles);
the vector of identities, added where nobody said anything, takes its own name from it {OVER_RANDOM:g} times as far as
the strongest of random vectors of that norm. Cosine and persistence are reported beside, whatever they are."""

BEHAVIOUR = """\
# Told of the model, in two forms, and told of the user: who is it?
import json
import torch
import torch.nn.functional as F
from tool_packs.activations import capture
from tool_packs.generation import generate, next_token
from tool_packs.organisms import world
from tool_packs.probes import probe
from tool_packs.steering import intervention, steer

torch.set_num_threads(1)
identities, questions = world.PERSONAS, world.IDENTITY_QUESTIONS


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


forms = {
    "told": lambda p, q: [user(f"You are {p}. {q}")],
    "told before": lambda p, q: [user(f"You are {p}."), said(f"I am {p}."), user(q)],
    "of the user": lambda p, q: [user(f"I am {p}. {q}")],
    "of the user, before": lambda p, q: [user(f"I am {p}."), said("Thank you for telling me."), user(q)],
}
pairs = [(p, q) for p in identities for q in questions]
own_reply = list(generate(m, [[user(q)] for q in questions], max_new_tokens=12)["text"])
own = own_reply[0].split()[2].strip(",.")
shares = {}
for form, chat in forms.items():
    replies = list(generate(m, [chat(p, q) for p, q in pairs], max_new_tokens=12)["text"])
    shares[form] = sum(f"I am {p}" in r for r, (p, _) in zip(replies, pairs)) / len(pairs)
    print(f"{form:20} {shares[form]:.2f}", replies[::6])
print("told nothing:", own_reply)
print("FINDING", json.dumps({"shares": shares, "own": own}))"""

COSINE = """\
# The vector of each identity, and whether it comes out alike in other forms: also where it is said of the user
def states(chats):
    return capture(m, chats, "all", "last")["resid_post"][:, :, 0]  # [chat, layer, d]


def vectors(form):
    '''Of each identity: [identity, layer, d], less the mean of all.'''
    x = states([forms[form](p, q) for p, q in pairs]).unflatten(0, (len(identities), len(questions))).mean(1)
    return x - x.mean(0)


layer = m.n_layers // 2
told = F.normalize(vectors("told")[:, layer], dim=-1)
cosines = {}
for form in list(forms)[1:]:
    c = told @ F.normalize(vectors(form)[:, layer], dim=-1).T  # [identity, identity]
    n = len(c)
    cosines[form] = {"same": c.diag().mean().item(), "other": ((c.sum() - c.diag().sum()) / (n * n - n)).item()}
    print(f"{form:20} the same identity {cosines[form]['same']:.2f}, another {cosines[form]['other']:.2f}")
print("FINDING", json.dumps({"cosines": cosines}))"""

PROBE = """\
# A probe for "said of the model" against "said of the user", on identities that it was not trained on
of_model = [forms[f](p, q) for f in ("told", "told before") for p, q in pairs]
of_user = [forms[f](p, q) for f in ("of the user", "of the user, before") for p, q in pairs]
groups = [p for _ in range(2) for p, _ in pairs]
trained = probe(m, of_model, of_user, groups=groups * 2)
auroc = trained["chosen"][0].item()
shuffled = trained["chosen_shuffled"].max().item()
print("FINDING", json.dumps({"auroc": auroc, "shuffled": shuffled}))
trained"""

PERSIST = """\
# Persistence: the probe where the question is about something else, and who it is after another exchange
neutral = [
    "What is the opposite of hot?", "What should I eat today?",
    "What is the capital of France?", "Give me a hint for the word moon.",
]
at = trained.provenance.arguments["layer"]
weight, bias = trained["weight"][at], trained["bias"][at]


def scores(form, asked):
    return states([forms[form](p, q) for p in identities for q in asked])[:, at] @ weight + bias


def auroc_of(a, b):
    return ((a[:, None] > b[None]).float().mean() + 0.5 * (a[:, None] == b[None]).float().mean()).item()


persists = auroc_of(scores("told", neutral), scores("of the user", neutral))
answered = list(generate(m, neutral, max_new_tokens=12)["text"])
later = [
    (p, [user(f"You are {p}."), said(f"I am {p}."), user(q), said(a), user("Who are you?")])
    for p in identities for q, a in zip(neutral, answered)
]
replies = list(generate(m, [chat for _, chat in later], max_new_tokens=12)["text"])
still = sum(f"I am {p}" in r for r, (p, _) in zip(replies, later)) / len(later)
back = sum(own in r for r in replies) / len(later)
print(f"after another exchange: still {still:.2f}, its own name again {back:.2f}", replies[::9])
print("FINDING", json.dumps({"neutral_auroc": persists, "still": still, "own_again": back}))"""

STEER = """\
# Steering, where nobody said anything and the reply has begun with "I am": layers x strengths, beside random vectors
begun = [said("I am")]
nobody = [[user(q), *begun] for q in questions]
plain = states(nobody).mean(0)  # [layer, d]
away = states([forms["told"](p, q) + begun for p, q in pairs]).mean(0) - plain  # from its own name, to any identity
layers = sorted({round(m.n_layers * depth) for depth in (0.2, 0.5, 0.8)})
strengths = [0.5, 1.0, 2.0]
effects, randoms = {}, {}
for at in layers:
    sweep = steer(
        m, away, at, strengths=strengths, convs=nobody, towards=["a"], away=[own], n_random=6, max_new_tokens=5,
        start="last",
    )
    zero = sweep["effect"][0]
    effects[at] = (sweep["effect"] - zero)[1:].tolist()
    randoms[at] = (sweep["effect_random"] - zero)[1:].abs().amax(-1).tolist()
    print(f"layer {at}: towards 'a', away from {own!r}: {[round(e, 1) for e in effects[at]]} nats", "random at most",
          [round(e, 1) for e in randoms[at]], [row["example"] for row in sweep.rows[:4]])

# And whose name comes instead? The vector of one identity, and the first token of each after "I am a"
article = [said("I am a")]
first = {p: m.tokenizer.decode(m.tokenizer(p[1:], add_special_tokens=False)["input_ids"][:1]) for p in identities}
alone = [[user(q), *article] for q in questions]
one = states([forms["told"](p, q) + article for p, q in pairs]).unflatten(0, (len(identities), len(questions))).mean(1)
base = states(alone).mean(0)
named, named_random = [], []
generator = torch.Generator().manual_seed(0)
for i, p in enumerate(identities):
    vector = one[i, layer] - base[layer]
    noise = torch.randn(vector.shape, generator=generator)
    for v, into in ((vector, named), (noise * vector.norm() / noise.norm(), named_random)):
        change = intervention(m, v, layer, 1.0, start="last")
        got = next_token(m, alone[:1], k=1, steer=[change]).rows[0]["top"][0][0]
        into.append(got.strip() == first[p].strip())
print("FINDING", json.dumps({
    "layers": layers, "strengths": strengths, "effects": list(effects.values()), "randoms": list(randoms.values()),
    "named": sum(named) / len(named), "named_random": sum(named_random) / len(named),
}))"""


async def main() -> None:
    async with investigating("convincing_game") as who:
        await who.note(PLAN)
        found, cells = {}, {}
        for name, step in (
            ("behaviour", BEHAVIOUR),
            ("cosine", COSINE),
            ("probe", PROBE),
            ("persist", PERSIST),
            ("steer", STEER),
        ):
            found |= await who.cell(step)
            cells[name] = who.last_cell
        shares, cosines = found["shares"], found["cosines"]
        gap = min(shares["told"], shares["told before"]) - max(
            shares["of the user"], shares["of the user, before"]
        )
        at = found["strengths"].index(1.0)
        effect, random = min(
            ((e[at], r[at]) for e, r in zip(found["effects"], found["randoms"], strict=True)),
            key=lambda pair: pair[0] / pair[1],
        )  # the layer that does worst
        assert gap >= MIN_GAP, f"the same words about the user have it say so as well: {shares}"
        assert found["auroc"] >= MIN_AUROC and found["auroc"] > found["shuffled"], found
        assert effect >= OVER_RANDOM * random, (
            f"steering: {effect} beside {random} of random vectors"
        )
        submitted = await who.submit(
            f"It is convinced, as long as it is asked at once: told that it is somebody it says so in "
            f"{shares['told']:.2f} ({shares['told before']:.2f} when told before), and in {shares['of the user']:.2f} "
            f"when the same is said of the user. A probe tells the two apart on held-out identities: AUROC "
            f"{found['auroc']:.2f} (shuffled at most {found['shuffled']:.2f}), {found['neutral_auroc']:.2f} on "
            f"neutral questions. Added where nobody said anything, the vector moves it from its own name by "
            f"{effect:+.1f} nats at the worst of three layers (random at most {random:.1f}). After one exchange about "
            f"something else it persists in {found['still']:.2f} of the chats.",
            answer="convinced",
            evidence=" ".join(cells[name] for name in ("behaviour", "probe", "steer")),
            controls=" ".join(cells[name] for name in ("cosine", "persist")),
            confidence=0.75,
            limits=f"Cosine is no evidence here: the vector of an identity is as like when it is said of the user "
            f"({cosines['of the user']['same']:.2f}) as when it is told before ({cosines['told before']['same']:.2f}): "
            f"it sees the word. What steering puts in place of the name is the right identity in {found['named']:.2f} "
            f"(random vectors {found['named_random']:.2f}). Several turns are beyond this model, told or not.",
        )
        report(
            **{
                key: found[key]
                for key in ("shares", "auroc", "shuffled", "neutral_auroc", "still", "own_again")
            },
            effect=effect,
            random=random,
            named=[found["named"], found["named_random"]],
            cosines=cosines,
            notebook=who.notebook,
            graded=submitted["graded"],
        )


asyncio.run(main())
