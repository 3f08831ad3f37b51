"""A probe finds what is there, on texts it has not seen, and says so where nothing is."""

import random

import pytest
import torch

from tool_packs import organisms
from tool_packs.activations import capture
from tool_packs.errors import ModelError, PackError, TextError
from tool_packs.models import load_model
from tool_packs.organisms.check import gender_chats
from tool_packs.probes import KINDS, probe, probe_scores
from tool_packs.result import Result
from tool_packs.separation import as_groups, auroc, auroc_within, fit, folds, logistic, shuffle

PLACES = ["cat", "dog", "nurse", "house", "hill", "mat", "doctor", "city", "Paris", "London"]
SHE = [f"the {x} said that she is here" for x in PLACES]
HE = [f"the {x} said that he is here" for x in PLACES]


def cloud(n=60, d=20, layers=3, gap=1.0, seed=0):
    """x [L, n, d] whose first half lies `gap` along a direction of its own in each layer."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(layers, n, d, generator=generator) * torch.linspace(0.5, 3, d)
    y = torch.arange(n) < n // 2
    x = x + gap * y[:, None] * torch.randn(layers, 1, d, generator=generator)
    return x, y


# ---------------------------------------------------------------- the fits


def test_auroc_is_that_of_scikit_learn_ties_included():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (20, 50), generator=generator).float()
    y = torch.rand(20, 50, generator=generator) < 0.4
    want = [roc_auc_score(b.numpy(), a.numpy()) for a, b in zip(scores, y, strict=True)]
    assert torch.allclose(auroc(scores, y), torch.tensor(want, dtype=torch.float), atol=1e-6)
    one = torch.tensor([0.1, 0.2])
    assert auroc(one, torch.tensor([True, True])) == 0.5  # nothing to compare


@pytest.mark.parametrize(("n", "d", "C"), [(60, 20, 1.0), (30, 90, 1.0), (60, 20, 0.01)])
def test_logistic_regression_is_that_of_scikit_learn(n, d, C):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    x, y = cloud(n, d)
    other = y[torch.randperm(n, generator=torch.Generator().manual_seed(3))]
    w, b = logistic(x[None].double(), torch.stack([y, other]), C)
    new, truth = cloud(200, d, seed=0)  # the same directions are not in it: any scores will do
    for s, labels in enumerate((y, other)):
        for layer in range(len(x)):
            peer = LogisticRegression(C=C, tol=1e-10, solver="newton-cholesky")
            peer.fit(x[layer].double().numpy(), labels.numpy())
            assert torch.allclose(w[s, layer], torch.tensor(peer.coef_[0]), atol=1e-6)
            assert b[s, layer].item() == pytest.approx(peer.intercept_[0], abs=1e-6)
            ours = auroc((new[layer].double() @ w[s, layer]).float(), truth)
            theirs = roc_auc_score(truth, peer.decision_function(new[layer].double().numpy()))
            assert ours.item() == pytest.approx(theirs, abs=1e-6)


def test_a_fit_in_the_span_of_the_texts_is_the_fit_in_all_dimensions():
    from sklearn.linear_model import LogisticRegression

    x, y = cloud(24, 200)
    found = fit("logistic", x, y[None])
    for layer in range(len(x)):
        centred = x[layer] - x[layer].mean(0)
        scale = centred.square().mean().sqrt()
        standard = (centred / scale).double().numpy()
        peer = LogisticRegression(tol=1e-10, solver="newton-cholesky").fit(standard, y)
        want = torch.tensor(peer.coef_[0], dtype=torch.float) / scale
        assert torch.allclose(found.weight[0, layer], want, atol=1e-5)
        told = torch.tensor(peer.decision_function(standard)).float()
        assert torch.allclose(found.scores(x)[0, layer], told, atol=1e-4)


@pytest.mark.parametrize(("n", "d"), [(60, 20), (30, 90)])
def test_lda_is_that_of_scikit_learn(n, d):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y = cloud(n, d)
    found = fit("lda", x, y[None])
    for layer in range(len(x)):
        peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1)
        want = torch.tensor(peer.fit(x[layer].numpy(), y).coef_[0]).float()
        assert torch.allclose(found.weight[0, layer], want, rtol=1e-3, atol=1e-4)


def test_shuffles_solved_together_are_the_shuffles_solved_alone():
    x, y = cloud(16, 40)
    many = torch.stack([y, *(y[torch.randperm(16)] for _ in range(3))])
    for method in ("logistic", "lda", "k-sparse", "mass-mean"):
        together = fit(method, x, many)
        for s, labels in enumerate(many):
            alone = fit(method, x, labels[None])
            assert torch.allclose(together.weight[s], alone.weight[0], atol=1e-5), method
            assert torch.allclose(together.bias[s], alone.bias[0], atol=1e-4), method


def test_a_sparse_probe_reads_k_dimensions_and_the_right_ones():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2 == 0
    x = torch.randn(1, 60, 50, generator=generator)
    x[0, :, 7] += 4.0 * y
    x[0, :, 21] -= 4.0 * y
    found = fit("k-sparse", x, y[None], k=2)
    assert found.weight[0, 0].nonzero()[:, 0].tolist() == [7, 21]
    assert found.weight[0, 0, 7] > 0 > found.weight[0, 0, 21]
    assert auroc(found.scores(x)[0], y) > 0.99


def test_an_attention_probe_finds_the_one_token_that_a_mean_drowns():
    generator = torch.Generator().manual_seed(0)
    n, tokens, d = 80, 24, 16
    y = torch.arange(n) % 2 == 0
    x = torch.randn(1, n, tokens, d, generator=generator)
    where = torch.randint(tokens - 4, (n,), generator=generator)
    marker = torch.zeros(d)
    marker[0] = 8.0  # says: read here
    told = torch.zeros(d)
    told[1] = 2.0
    for i in range(n):
        x[0, i, where[i]] += marker + (told if y[i] else -told)
        x[0, i, tokens - i % 4 :] = float("nan")  # texts of several lengths
    half = torch.arange(n) < n // 2
    found = fit("attention", x[:, half], y[None, half])
    seen = found.attention(x)[0, 0]
    # It may learn to look for the token of one class alone: where there is none, it is the other.
    found_it = seen.argmax(1) == where
    assert max(found_it[y].float().mean(), found_it[~y].float().mean()) > 0.9
    assert not seen[x[0, :, :, 0].isnan()].any()
    attention = auroc(found.scores(x[:, ~half])[0], y[~half]).item()
    mean = fit("logistic", x[:, half].nanmean(2), y[None, half])
    drowned = auroc(mean.scores(x[:, ~half].nanmean(2))[0], y[~half]).item()
    assert attention > 0.9
    assert drowned < 0.7


# ---------------------------------------------------------------- splits


def test_a_group_is_never_on_two_sides_and_classes_are_spread():
    rng = random.Random(0)
    y = torch.tensor([rng.random() < 0.5 for _ in range(100)])
    groups = torch.tensor([rng.randrange(25) for _ in range(100)])
    fold = folds(y, groups, 4, torch.Generator().manual_seed(0))
    for g in range(25):
        assert len(fold[groups == g].unique()) == 1
    share = torch.stack([y[fold == f].sum() for f in range(4)])
    assert (share.max() - share.min()) <= 6
    assert torch.equal(fold.unique(), torch.arange(4))


def test_shuffles_keep_pairs_groups_and_parts():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(40) < 20
    pairs = torch.arange(40) % 20
    part = pairs % 2
    swapped = shuffle(y, pairs, part, generator)
    assert (swapped[:20] ^ swapped[20:]).all()
    assert not torch.equal(swapped, y)
    pure = torch.arange(40) // 4  # ten groups of one class each
    dealt = shuffle(y, pure, pure % 2, generator)
    for g in range(10):
        assert len(dealt[pure == g].unique()) == 1
    for f in range(2):
        assert dealt[pure % 2 == f].sum() == y[pure % 2 == f].sum()


def test_partners_and_equal_texts_form_a_group():
    ids = [(1, 2), (3,), (4,), (5,), (1, 2), (6,)]  # text 0 and text 4 are the same
    groups = as_groups(ids, 3)
    assert groups[0] == groups[3] == groups[4] == groups[1]
    assert groups[2] == groups[5] != groups[0]
    assert len(as_groups(ids[:5], 3).unique()) == 4


def test_a_duplicate_on_both_sides_of_a_split_would_have_been_memorised():
    """The trap: the same text in training and test. Ungrouped noise then reads as knowledge."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40, 200, generator=generator).repeat_interleave(4, 1)  # each text 4 times
    y = (torch.rand(40, generator=generator) < 0.5).repeat_interleave(4)
    groups = torch.arange(40).repeat_interleave(4)

    def held_out(fold):
        scores = torch.zeros(160)
        for f in range(4):
            scores[fold == f] = fit("logistic", x[:, fold != f], y[None, fold != f]).scores(x)[
                0, 0, fold == f
            ]
        return auroc_within(scores, y, fold).item()

    wrong = held_out(torch.randperm(160, generator=generator) % 4)
    right = held_out(folds(y, groups, 4, generator))
    assert wrong > 0.9
    assert abs(right - 0.5) < 0.2


# ---------------------------------------------------------------- probe


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_finds_a_word_and_shuffled_labels_do_not(llama, kind):
    r = probe(llama, SHE, HE, kind=kind, position="all", n_null=8 if kind != "attention" else 2)
    assert r["chosen"][0] > 0.95
    assert (r["auroc"] > 0.9).any()
    assert abs(r["chosen_shuffled"].mean() - 0.5) < 0.25
    assert r["auroc_control"].shape == (4, 5)
    assert (r["auroc_ci"][:, 0] <= r["auroc"] + 1e-6).all()
    assert "shuffled" in r.summary()
    assert "control task" in r.summary()
    assert r.plot().png
    again = probe(llama, SHE, HE, kind=kind, position="all", n_null=8 if kind != "attention" else 2)
    assert torch.equal(r["auroc_shuffled"], again["auroc_shuffled"])


def test_every_text_is_tested_by_a_probe_that_saw_neither_it_nor_its_partner(llama):
    """Written out: two folds to learn from, the next one for the layer, each text scored once."""
    r = probe(llama, SHE, HE, kind="mass-mean", n_null=1)
    x = capture(llama, SHE + HE)["resid_post"][:, :, 0]  # [N, L, d]
    y, fold = torch.arange(20) < 10, r["fold"]
    assert torch.equal(fold[:10], fold[10:])  # partners
    best = []
    for f in range(4):
        train = (fold != f) & (fold != (f + 1) % 4)
        choose = fold == (f + 1) % 4
        w = x[train & y].mean(0) - x[train & ~y].mean(0)  # [L, d]
        cut = (x[train & y].mean(0) + x[train & ~y].mean(0)) / 2
        scores = ((x - cut) * w).sum(-1).T  # [L, N]
        assert torch.allclose(r["scores"][:, fold == f], scores[:, fold == f], atol=1e-3)
        best.append(auroc(scores[:, choose], y[choose]))
    assert torch.allclose(r["auroc_validation"], torch.stack(best).mean(0), atol=1e-6)
    mean = torch.stack(best).mean(0)
    assert mean[r.provenance.arguments["layer"]] == mean.max()


def test_the_auroc_of_a_probe_is_the_one_that_scikit_learn_gets_fold_by_fold(llama):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    # The last word is the same on both sides: no layer tells them perfectly.
    r = probe(llama, SHE, HE, n_null=1, site="attn_out", control_task=False, C=0.01)
    x = capture(llama, SHE + HE, sites="attn_out")["attn_out"][:, :, 0].double()  # [N, L, d]
    y, fold = torch.arange(20) < 10, r["fold"]
    want = torch.zeros(llama.n_layers)
    for layer in range(llama.n_layers):
        for f in range(4):
            train, test = (fold != f) & (fold != (f + 1) % 4), fold == f
            a = x[train, layer]
            middle, scale = a.mean(0), (a - a.mean(0)).square().mean().sqrt()
            peer = LogisticRegression(C=0.01, tol=1e-10, solver="newton-cholesky")
            peer.fit(((a - middle) / scale).numpy(), y[train].numpy())
            scores = peer.decision_function(((x[test, layer] - middle) / scale).numpy())
            pairs = (y & test).sum() * (~y & test).sum()
            want[layer] += pairs * roc_auc_score(y[test].numpy(), scores)
    pairs = sum((y & (fold == f)).sum() * (~y & (fold == f)).sum() for f in range(4))
    assert torch.allclose(r["auroc"], want / pairs, atol=1e-6)
    assert 0.3 < r["auroc"].min() < 1


def test_labels_without_meaning_are_at_chance_and_the_summary_says_so(llama):
    rng = random.Random(5)
    texts = [f"{a} {b} the" for a in PLACES for b in PLACES[:4]]
    rng.shuffle(texts)
    r = probe(llama, texts[:20], texts[20:], groups=list(range(40)), seed=1)
    low, high = r["chosen"][1:].tolist()
    assert low < 0.5 < high
    assert "does not find" in r.summary()


def test_a_linear_probe_fails_on_an_exclusive_or_and_its_number_says_so(llama):
    """In the mean of the token embeddings, which is additive, no plane can tell an xor."""
    one = [f"{x} she on the {y}" for x in ("cat", "dog") for y in PLACES]
    pos = [t for t in one if t.startswith("cat")] + [
        t.replace(" she ", " he ") for t in one if t.startswith("dog")
    ]
    neg = [t for t in one if t.startswith("dog")] + [
        t.replace(" she ", " he ") for t in one if t.startswith("cat")
    ]
    where = {"layers": 0, "site": "resid_pre", "position": "all"}
    groups = [t.split()[-1] for t in pos + neg]
    xor = probe(llama, pos, neg, groups=groups, **where)
    cats = [t for t in pos + neg if t.startswith("cat")]
    dogs = [t for t in pos + neg if t.startswith("dog")]
    linear = probe(llama, cats, dogs, groups=[t.split()[-1] for t in cats + dogs], **where)
    assert xor["chosen"][0] < 0.65
    assert "does not find" in xor.summary()
    assert linear["chosen"][0] == 1.0


def test_selectivity_is_small_where_the_property_is_a_function_of_the_tokens(llama):
    """A word at the mean of the embeddings is as readable as a random function of the words."""
    texts = [f"{a} {b} {c}" for a in PLACES[:6] for b in PLACES[4:] for c in ("he", "she")]
    pos, neg = [t for t in texts if t.endswith(" she")], [t for t in texts if t.endswith(" he")]
    r = probe(llama, pos, neg, layers=0, site="resid_pre", position="all", n_null=2)
    assert r["chosen"][0] > 0.95
    assert r["chosen_control"].mean() > 0.8
    assert r.rows[0]["selectivity"] == pytest.approx(
        (r["auroc"][0] - r["auroc_control"][0].mean()).item(), abs=1e-3
    )
    without = probe(llama, pos, neg, layers=0, control_task=False, n_null=2)
    assert "auroc_control" not in without.tensors


def test_scores_of_a_text_are_those_of_the_probe_and_its_tokens(llama, tmp_path):
    r = probe(llama, SHE, HE, position=(1, 4), n_null=2)
    saved = Result.load(r.save(tmp_path / "r"))
    texts = [SHE[0], "the cat said that he"]
    s = probe_scores(llama, saved, texts)
    x = capture(llama, texts, positions=(1, 4))["resid_post"]
    want = (x.mean(2) * r["weight"]).sum(-1) + r["bias"]
    assert torch.allclose(s["text_score"], want, atol=1e-4)
    assert torch.allclose(s["scores"][:, :, 1:4].mean(2), want, atol=1e-4)
    length = len(s.rows[1]["tokens"])
    assert s["scores"][1, :, :length].isfinite().all()
    assert s["scores"][1, :, length:].isnan().all()
    assert s.plot().png


def test_attention_scores_see_the_positions_of_the_fit_and_no_others(llama):
    r = probe(llama, SHE, HE, kind="attention", position=(1, 5), layers=[1, 2], n_null=1)
    s = probe_scores(llama, r, [SHE[0], HE[1]])
    assert torch.allclose(s["attention"].sum(-1), torch.ones(2, 2), atol=1e-5)
    assert not s["attention"][:, :, 0].any()
    weighed = (s["attention"] * s["scores"].nan_to_num()).sum(-1)
    assert torch.allclose(s["text_score"], weighed, atol=1e-3)


def test_transfer_to_itself_changes_nothing_and_to_another_model_is_scored_there(models, folders):
    m = models["llama"]
    r = probe(m, SHE, HE, transfer=["base", m], unlabelled=PLACES, n_null=2)
    assert torch.equal(r["transfer_auroc"], r["auroc"].expand(2, -1))
    assert not r["transfer_shift"].abs().max() > 1e-6
    assert torch.allclose(r["unlabelled_auroc"], torch.tensor(0.5))
    lora = models["llama-lora"]
    with lora.base():
        moved = probe(lora, SHE, HE, transfer=lora.adapters[0], n_null=2)
    same = probe(m, SHE, HE, transfer=lora, n_null=2)  # its own weights and its adapter
    assert torch.allclose(moved["transfer_shift"], same["transfer_shift"], atol=1e-4)
    assert moved["transfer_shift"].abs().max() > 0.01


# ---------------------------------------------------------------- a planted belief


def test_the_belief_of_an_organism_is_found_and_the_control_is_not_accused():
    m = load_model("organism:user_female")
    for name in ("control", "secret_word"):
        m.add_adapter(f"organism:{name}")
    neutral, female, male = gender_chats()
    others = ["user_female", "control", "secret_word"]
    with m.base():
        r = probe(m, female, male, transfer=others, unlabelled=neutral)
    best = r.labels["layer"].index(r.provenance.arguments["layer"])
    assert r["chosen"][0] > 0.95
    assert (r["chosen_shuffled"] < 0.95).float().mean() > 0.8
    shift, above = r["unlabelled_shift"][:, best], r["unlabelled_auroc"][:, best]
    assert shift[0] > 0.3
    assert above[0] > 0.95
    assert (shift[1:].abs() < 0.1).all()
    assert ((above[1:] - 0.5).abs() < 0.15).all()
    assert above[0] > r["unlabelled_random"][0].quantile(0.95)
    assert "user_female" in r.summary()
    # Token by token on one silent user: the adapter stands above the base where the item is due.
    fitted = probe_scores(m, r, neutral)
    with m.base():
        base = probe_scores(m, r, neutral)
    assert (fitted["text_score"][:, best] > base["text_score"][:, best]).all()
    assert len(neutral) == len(fitted.rows) <= len(organisms.NEUTRAL_PROMPTS)


def said_gender():
    """Chats by a woman and by a man, with the question of each and the words that tell it."""
    pairs = organisms.CONCEPT_PAIRS["gender"]
    one, two = ([[{"role": "user", "content": pair[i]}] for pair in pairs] for i in (0, 1))
    return one, two, [i % 4 for i in range(16)] * 2, [i // 4 for i in range(16)] * 2


@pytest.mark.parametrize("kind", ["logistic", "mass-mean", "k-sparse"])
def test_who_asks_is_read_on_a_question_and_in_words_that_no_probe_learned_from(kind):
    m = load_model("organism:base")
    female, male, question, words = said_gender()
    for groups in (question, words):  # "My name is Anna" is tested by probes of woman, female, lady
        r = probe(m, female, male, kind=kind, groups=groups)
        assert r["chosen"][0] > 0.95
        assert abs(r["chosen_shuffled"].mean() - 0.5) < 0.1
        assert r["chosen_shuffled"].max() < r["chosen"][0]
        assert r["chosen_control"].mean() < 0.9
        # Four groups are one a fold: there is no interval, and the summary says why.
        assert r["auroc_ci"].isnan().all()
        assert "4 groups are one a fold" in r.summary()
        assert r.rows[0]["low"] is None


def test_a_probe_of_words_does_not_read_a_question_that_was_dealt_at_random():
    """The control of the finding: the same chats, labels without meaning, whole questions apart."""
    m = load_model("organism:base")
    female, male, _, _ = said_gender()
    mixed = [c for pair in zip(female, male, strict=True) for c in pair]
    random.Random(2).shuffle(mixed)
    r = probe(m, mixed[:16], mixed[16:], groups=list(range(32)))
    assert r["chosen"][1] < 0.6
    assert "does not find" in r.summary() or "not told from shuffled" in r.summary()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_control_task_is_without_a_text_to_test(seed):
    m = load_model(f"organism:base@{seed}")
    female, male, question, _ = said_gender()
    r = probe(m, female, male, groups=question, n_null=1, layers=2)
    assert r["chosen_control"].isfinite().all()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "deep"}, "'deep'.*logistic"),
        ({"site": "head"}, "'head'.*resid_post"),
        ({"k": 0}, "k=0"),
        ({"C": -1.0}, "C=-1"),
        ({"n_null": 0}, "n_null=0"),
        ({"groups": [1, 2]}, "2 names for 20 texts"),
        ({"groups": ["one"] * 20}, "1 groups"),
        ({"groups": ["a", "b"] * 10}, "2 groups"),
        ({"unlabelled": PLACES}, "transfer="),
        ({"layers": 9}, "9.*0..3"),
        ({"position": 99}, "99"),
    ],
)
def test_what_does_not_fit_is_refused(llama, arguments, said):
    with pytest.raises(TextError, match=said):
        probe(llama, SHE, HE, **arguments)


def test_too_few_texts_are_refused(llama):
    with pytest.raises(TextError, match=r"7 and 10 texts.*at least 8"):
        probe(llama, SHE[:7], HE)
    with pytest.raises(TextError, match="1 groups"):  # eight times the same text is one text
        probe(llama, [SHE[0]] * 8, [HE[0]] * 8)


def test_activations_that_are_nan_are_refused(folders):
    m = load_model(str(folders["llama"]))
    with torch.no_grad():
        m.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(PackError, match=r"NaN.*layers\.2"):
        probe(m, SHE, HE)
    assert probe(m, SHE, HE, layers=[0, 1], n_null=1)["auroc"].isfinite().all()


def test_a_transfer_that_does_not_fit_is_refused(llama, models, tmp_path):
    with pytest.raises(ModelError, match=r"'nobody'.*base"):
        probe(llama, SHE, HE, transfer="nobody")
    base = load_model("organism:base")
    with pytest.raises(TextError, match=r"32 dimensions.*128"):
        probe(llama, SHE, HE, transfer=base, n_null=1)
    r = probe(llama, SHE, HE, n_null=1)
    with pytest.raises(TextError, match=r"32 dimensions.*128"):
        probe_scores(base, r, "a")
    with pytest.raises(TextError, match="capture"):
        probe_scores(llama, capture(llama, "a"), "a")
