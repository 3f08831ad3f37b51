"""Sparse autoencoders: parity with sae-lens and published formats, training, features, differences."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.packs.tiny import TEXTS
from tool_packs import organisms, sae, sae_diff, sae_train
from tool_packs.errors import ModelError, ModelNotFound, PackError, TextError
from tool_packs.models import load_model
from tool_packs.organisms import world
from tool_packs.prompts import read
from tool_packs.sae_formats import open_sae
from tool_packs.sae_model import SAE, from_first, read_states
from tool_packs.steering import steer

FIXTURE = json.loads(
    (Path(__file__).parent / "fixtures" / "sae_lens.json").read_text(encoding="utf-8")
)
D, F = 12, 40  # of the SAEs that are made by hand here
CORPUS = [f"{lead} {x}" for lead in ("the", "she said the", "Paris, the") for x in
          ("cat sat on the mat", "dog is here", "nurse in the house", "doctor on the hill")]  # fmt: skip


def random_parts(seed=0, d=D, f=F):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    return {"W_enc": r(d, f), "b_enc": r(f), "W_dec": r(f, d), "b_dec": r(d)}


def identity(m, layer, **options):
    """An SAE that loses nothing: f = relu([x, -x])."""
    eye = torch.eye(m.width)
    zeros = torch.zeros(2 * m.width)
    return SAE(
        torch.cat([eye, -eye], 1), zeros, torch.cat([eye, -eye]), torch.zeros(m.width), "relu",
        layer, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small(llama):
    return sae.train(llama, CORPUS, 1, latents=64, k=4, steps=60, batch=64)


class TestParity:
    @pytest.mark.parametrize("case", FIXTURE["cases"], ids=[c["name"] for c in FIXTURE["cases"]])
    def test_with_sae_lens(self, tmp_path, case):
        weights = {k: torch.tensor(v) for k, v in case["weights"].items()}
        save_file(weights, tmp_path / "sae_weights.safetensors")
        (tmp_path / "cfg.json").write_text(json.dumps(case["cfg"]))
        ours = open_sae(tmp_path, None, None)
        assert (ours.layer, ours.site, ours.name) == (2, "resid_post", "tiny")
        x, want = torch.tensor(case["x"]), torch.tensor(case["activations"])
        f = ours.encode(x)
        assert (want > 0).any()
        scale = want.abs().max()
        assert ((f - want).abs().max() / scale).item() <= 1e-6
        back = torch.tensor(case["reconstruction"])
        assert ((ours.decode(f, x) - back).abs().max() / back.abs().max()).item() <= 1e-6
        assert torch.equal(ours.reconstruct(x), ours.decode(f, x))

    def test_with_an_old_configuration_of_sae_lens(self, tmp_path):
        save_file(random_parts(), tmp_path / "sae_weights.safetensors")
        old = {"d_in": D, "d_sae": F, "hook_point": "blocks.3.hook_mlp_out",
               "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}  # fmt: skip
        (tmp_path / "cfg.json").write_text(json.dumps(old))
        ours = open_sae(tmp_path, None, None)
        assert (ours.layer, ours.site, ours.activation, ours.k) == (3, "mlp_out", "topk", 7)
        assert ours.subtract  # the default of that time

    @pytest.mark.parametrize("form", ["params.npz", "params.safetensors"])
    def test_gemma_scope(self, tmp_path, form):
        import numpy as np

        folder = tmp_path / "gemma-scope-2b-pt-mlp" / "layer_1" / "width_16k" / "average_l0_9"
        folder.mkdir(parents=True)
        parts = random_parts() | {"threshold": torch.rand(F)}
        if form == "params.npz":
            np.savez(folder / form, **{k: v.numpy() for k, v in parts.items()})
        else:
            save_file({k.lower(): v for k, v in parts.items()}, folder / form)
        ours = open_sae(folder, None, None)
        assert (ours.layer, ours.site) == (1, "mlp_out")
        x = torch.randn(5, D)
        pre = x @ parts["W_enc"] + parts["b_enc"]  # b_dec is not taken off first
        want = torch.where(pre > parts["threshold"], pre, 0.0)
        assert torch.allclose(ours.encode(x), want, atol=1e-6)
        assert torch.allclose(ours.decode(want), want @ parts["W_dec"] + parts["b_dec"], atol=1e-5)

    def test_sparsify(self, tmp_path):
        folder = tmp_path / "layers.3"
        folder.mkdir()
        p = random_parts()
        save_file(
            {"encoder.weight": p["W_enc"].T.contiguous(), "encoder.bias": p["b_enc"],
             "W_dec": p["W_dec"], "b_dec": p["b_dec"]},
            folder / "sae.safetensors",
        )  # fmt: skip
        (folder / "cfg.json").write_text(json.dumps({"d_in": D, "k": 6, "num_latents": F}))
        ours = open_sae(folder, None, None)
        assert (ours.layer, ours.site, ours.k, ours.first) == (3, "resid_post", 6, 0)
        x = torch.randn(5, D)
        top = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).topk(6)
        want = torch.zeros(5, F).scatter(1, top.indices, top.values.relu())
        assert torch.allclose(ours.encode(x), want, atol=1e-6)

    def test_goodfire(self, tmp_path):
        file = tmp_path / "Llama-tiny-SAE-l2.pth"
        p = random_parts()
        torch.save(
            {"encoder_linear.weight": p["W_enc"].T, "encoder_linear.bias": p["b_enc"],
             "decoder_linear.weight": p["W_dec"].T, "decoder_linear.bias": p["b_dec"]},
            file,
        )  # fmt: skip
        ours = open_sae(file, None, None)
        assert (ours.layer, ours.activation) == (2, "relu")
        x = torch.randn(5, D)
        assert torch.allclose(ours.encode(x), (x @ p["W_enc"] + p["b_enc"]).relu(), atol=1e-6)

    def test_what_is_saved_is_loaded(self, llama, small, tmp_path):
        again = sae.load(llama, str(small.save(tmp_path)))
        x = torch.randn(9, llama.width)
        assert torch.equal(again.encode(x), small.encode(x))
        assert torch.equal(again.peak, small.peak)
        assert (again.layer, again.k, again.first) == (1, 4, 1)


class TestBadFiles:
    def sentence(self, call, *args, **options):
        with pytest.raises(PackError) as caught:
            call(*args, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def write(self, folder, parts=None, **config):
        base = {
            "architecture": "topk",
            "k": 5,
            "metadata": {"hook_name": "blocks.2.hook_resid_post"},
        }
        save_file(parts or random_parts(), folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps(base | config))
        return folder

    def test_another_layer_or_width_than_the_model_has(self, llama, tmp_path):
        said = self.sentence(sae.load, llama, str(self.write(tmp_path)))
        assert "width 12" in said
        assert "32" in said
        hook = {"hook_name": "blocks.30.hook_resid_post"}
        parts = random_parts(d=llama.width)
        said = self.sentence(sae.load, llama, str(self.write(tmp_path, parts, metadata=hook)))
        assert "layer 30" in said
        assert "0..3" in said
        said = self.sentence(sae.load, llama, str(self.write(tmp_path, parts)), layer=1)
        assert "layer=1" in said
        assert "layer 2" in said

    def test_an_sae_of_another_model_is_refused_by_every_technique(self, llama):
        other = SAE(**random_parts(), activation="relu", layer=1)
        for call in (
            lambda: sae.features(llama, other, TEXTS),
            lambda: sae.diff(llama, other, TEXTS, b=TEXTS),
            lambda: sae.steer(llama, other, 0, activation=1.0, scorer=len),
            lambda: sae.label(llama, other, 0),
        ):
            assert "width 12" in self.sentence(call)

    def test_weights_that_do_not_fit_together_or_are_not_finite(self, tmp_path):
        broken = random_parts() | {"b_enc": torch.zeros(F - 1)}
        assert "b_enc" in self.sentence(open_sae, self.write(tmp_path, broken), None, None)
        broken = random_parts()
        broken["W_dec"][3, 3] = float("nan")
        said = self.sentence(open_sae, self.write(tmp_path, broken), None, None)
        assert "W_dec" in said
        assert "NaN" in said
        broken = random_parts()
        del broken["b_dec"]
        assert "b_dec" in self.sentence(open_sae, self.write(tmp_path, broken), None, None)

    @pytest.mark.parametrize(
        ("config", "shown"),
        [
            ({"architecture": "gated"}, "gated"),
            ({"k": 0}, "k=0"),
            ({"k": F + 1}, f"k={F + 1}"),
            ({"metadata": {}}, "layer="),
            ({"metadata": {"hook_name": "blocks.1.mlp.hook_pre"}}, "hook_pre"),
            ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ],
    )
    def test_configurations_that_are_not_known(self, tmp_path, config, shown):
        assert shown in self.sentence(open_sae, self.write(tmp_path, **config), None, None)

    def test_no_sae_there(self, llama, tmp_path):
        with pytest.raises(ModelNotFound, match="no SAE"):
            sae.load(llama, str(tmp_path))
        with pytest.raises(ModelNotFound, match="no file or folder"):
            sae.load(llama, str(tmp_path / "nowhere"))
        (tmp_path / "cfg.json").write_text("{")
        save_file(random_parts(), tmp_path / "sae_weights.safetensors")
        with pytest.raises(ModelError, match="no JSON"):
            sae.load(llama, str(tmp_path))

    def test_a_file_that_would_run_code_is_not_opened(self, tmp_path):
        ran = tmp_path / "ran"

        class Runs:
            def __reduce__(self):
                return (open, (str(ran), "w"))

        torch.save({"encoder_linear.weight": Runs()}, tmp_path / "x-l1.pt")
        with pytest.raises(ModelError, match="tensors alone"):
            open_sae(tmp_path / "x-l1.pt", None, None)
        assert not ran.exists()

    def test_transcoders_are_told_from_autoencoders(self, tmp_path):
        folder = tmp_path / "layers.1"
        folder.mkdir()
        save_file(random_parts(), folder / "sae.safetensors")
        (folder / "cfg.json").write_text(json.dumps({"d_in": D, "k": 6, "transcode": True}))
        assert "transcoder" in self.sentence(open_sae, folder, None, None)


def planted(seed=11, n=6000, d=16, f=24, active=2):
    """States that are sums of a few of f known directions, and the directions [f, d]."""
    g = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(f, d, generator=g), dim=-1)
    which = torch.rand(n, f, generator=g).topk(active).indices
    size = 1 + torch.rand(n, active, generator=g)
    return torch.zeros(n, f).scatter(1, which, size) @ atoms * 7 + 3, atoms


def found(atoms, rows):
    """The mean over atoms of the cosine with the nearest decoder row."""
    return (atoms @ torch.nn.functional.normalize(rows, dim=-1).T).amax(1).mean().item()


class TestTraining:
    @pytest.mark.parametrize("kind", sae_train.KINDS)
    def test_the_directions_that_states_are_made_of_are_found(self, kind):
        x, atoms = planted()
        parts, loss = sae_train.fit(
            x, kind, 48, 2, steps=400, batch=128, lr=1e-2, seed=0, progress=range
        )
        begun, _ = sae_train.start(x, 48, 0)
        assert found(atoms, begun["W_dec"]) < 0.7
        assert found(atoms, parts["W_dec"]) > 0.95
        one = SAE(**parts, activation="topk" if kind == "topk" else "jumprelu", layer=0, k=2)
        assert sae_train.unexplained(x, one.reconstruct(x)) < 0.1
        assert 1.5 < (one.encode(x) > 0).float().sum(-1).mean().item() < 2.7
        assert torch.allclose(parts["W_dec"].norm(dim=-1), torch.ones(48), atol=1e-5)
        assert loss[-1] < 0.2 * loss[0]

    def test_the_auxiliary_loss_brings_dead_features_to_life(self, monkeypatch):
        x, _ = planted(f=48, active=3)
        begin = sae_train.start

        def half_dead(*args):
            parts, scale = begin(*args)
            parts["b_enc"][32:] = -3.0  # too low to be among the k largest of any state
            return parts, scale

        monkeypatch.setattr(sae_train, "start", half_dead)
        dead = {}
        for weight in (0.0, sae_train.AUX):
            monkeypatch.setattr(sae_train, "AUX", weight)
            parts, _ = sae_train.fit(
                x, "topk", 64, 3, steps=150, batch=128, lr=1e-2, seed=0, progress=range
            )
            one = SAE(**parts, activation="topk", layer=0, k=3)
            dead[weight] = (one.encode(x).amax(0) <= 0).float().mean().item()
        assert dead[0.0] > 0.4
        assert dead[sae_train.AUX] < dead[0.0] / 2

    def test_the_sparse_decoder_is_the_dense_one_and_so_are_its_gradients(self):
        index, values = torch.randint(F, (6, 3)), torch.rand(6, 3, requires_grad=True)
        rows = torch.randn(F, D, requires_grad=True)
        target = torch.randn(6, D)
        sparse = sae_train._sum_of_rows(index, values, rows)
        one = torch.autograd.grad((sparse * target).sum(), (values, rows))
        dense = torch.zeros(6, F).scatter_add(1, index, values) @ rows
        two = torch.autograd.grad((dense * target).sum(), (values, rows))
        assert torch.allclose(sparse, dense, atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, two, strict=True))

    def test_the_kernel_of_jumprelu_is_that_of_the_paper(self):
        x = torch.tensor([[0.2, 3.0, 9.0]], requires_grad=True)
        threshold = torch.tensor([1.0, 2.5, 2.0], requires_grad=True)
        value, passed = sae_train._Jump.apply(x, threshold)
        assert value.tolist() == [[0.0, 3.0, 9.0]]
        assert passed.tolist() == [[0.0, 1.0, 1.0]]
        ((2 * value).sum() + (5 * passed).sum()).backward()
        assert x.grad.tolist() == [[0.0, 2.0, 2.0]]
        eps = sae_train.BANDWIDTH  # 0.2 and 3.0 are within half of it, 9.0 is not
        want = [-(1.0 * 2 + 5) / eps, -(2.5 * 2 + 5) / eps, 0.0]
        assert torch.allclose(threshold.grad, torch.tensor(want))

    def test_scaling_the_states_scales_the_features_and_nothing_else(self):
        x, _ = planted(n=500)
        fit = lambda s: sae_train.fit(  # noqa: E731
            x * s, "jumprelu", 32, 2, steps=20, batch=64, lr=1e-2, seed=0, progress=range
        )[0]
        one, eight = fit(1.0), fit(8.0)  # a power of two, which rounds nothing
        a = SAE(**one, activation="jumprelu", layer=0).encode(x)
        b = SAE(**eight, activation="jumprelu", layer=0).encode(x * 8)
        assert torch.allclose(b, a * 8, rtol=1e-5, atol=1e-5)

    def test_through_the_technique(self, llama, small):
        r = small.result
        arms = {row["arm"]: row for row in r.rows}
        assert arms["trained"]["fvu"] < arms["untrained"]["fvu"]
        assert arms["trained"]["l0"] <= 4
        assert r["frequency"].shape == (64,)
        again = sae.train(llama, CORPUS, 1, latents=64, k=4, steps=60, batch=64)
        assert torch.equal(again.W_enc, small.W_enc)
        assert "control" in r.summary()

    def test_arguments_that_do_not_fit(self, llama):
        for options, shown in (
            ({"kind": "gated"}, "gated"),
            ({"k": 99, "latents": 64}, "k=99"),
            ({"site": "nose"}, "nose"),
            ({"steps": 0}, "steps=0"),
            ({"held_out": 1.0}, "held_out=1.0"),
        ):
            with pytest.raises(TextError, match=shown):
                sae.train(llama, CORPUS, 1, **options)
        with pytest.raises(TextError, match="held out"):
            sae.train(llama, CORPUS[:1], 1)
        with pytest.raises(TextError, match="no token"):
            sae.train(llama, CORPUS, 1, first=99)

    def test_states_with_nan_are_refused(self, folders):
        m = load_model(str(folders["llama"]))
        m.core.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
        with pytest.raises(PackError, match="NaN"):
            sae.train(m, CORPUS, 1)

    def test_an_interrupt_leaves_nothing(self, llama, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(sae_train, "_sum_of_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            sae.train(llama, CORPUS, 1, latents=64, k=4, steps=2)


def hf_states(m, text, layer):
    """resid_post [T, d], by a hook of our own."""
    kept = []
    hook = m.layers[layer].register_forward_hook(
        lambda _, __, out: kept.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    ids = torch.tensor([m.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        m.core(ids)
    hook.remove()
    return kept[0][0]


class TestFeatures:
    @pytest.mark.parametrize("name", ["llama", "gemma2-lora", "gpt2"])
    def test_the_entries_are_the_dense_activations(self, models, name):
        m = models[name]
        one = sae.train(m, CORPUS, 1, latents=64, k=4, steps=10, batch=64)
        r = sae.features(m, one, TEXTS, loss=False)
        total = 0
        for i, text in enumerate(TEXTS):
            want = one.encode(hf_states(m, text, 1)[1:])  # without the first token
            mine = r["prompt"] == i
            got = torch.zeros_like(want)
            got[r["position"][mine] - 1, r["feature"][mine]] = r["activation"][mine]
            assert torch.allclose(got, want, atol=2e-4)
            total += len(want)
        counts = r["feature"].bincount(minlength=64)
        assert torch.allclose(r["frequency"], counts / total)
        assert torch.isclose(r["l0"], counts.sum() / total)

    def test_an_example_shows_the_token_that_fires_most(self, llama, small):
        r = sae.features(llama, small, TEXTS, n=3, loss=False)
        row = r.rows[0]
        mine = r["feature"] == row["feature"]
        at = r["activation"][mine].argmax()
        prompt, position = int(r["prompt"][mine][at]), int(r["position"][mine][at])
        ids = llama.tokenizer(TEXTS[prompt])["input_ids"]
        assert row["prompts"][0] == prompt
        assert f"«{llama.tokenizer.decode([ids[position]])}»" in row["examples"][0]
        assert row["peak"] == pytest.approx(r["peak"].max().item(), abs=1e-4)

    @pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
    def test_an_sae_that_loses_nothing_recovers_everything(self, llama, site):
        r = sae.features(llama, identity(llama, 2, site=site), TEXTS)
        ce = r["cross_entropy"]
        assert torch.isclose(ce[0], ce[1], atol=1e-5)
        assert torch.allclose(r["recovered"], torch.ones(2), atol=1e-3)
        assert r["fvu"] < 1e-6

    def test_the_losses_are_those_of_hooks_written_out(self, llama, small):
        r = sae.features(llama, small, TEXTS)
        mean = torch.cat([hf_states(llama, t, 1)[1:] for t in TEXTS]).mean(0)
        edits = {
            "model": lambda h: h,
            "sae": small.reconstruct,
            "zero": torch.zeros_like,
            "mean": lambda h: mean.expand_as(h),
        }
        for arm, edit in edits.items():
            losses = []
            for text in TEXTS:
                ids = torch.tensor([llama.tokenizer(text)["input_ids"]])

                def change(_, __, out, edit=edit):
                    return torch.cat([out[:, :1], edit(out[:, 1:])], 1)

                hook = llama.layers[1].register_forward_hook(change)
                with torch.no_grad():
                    logits = llama.core(ids).logits[0, 1:-1]
                hook.remove()
                losses += torch.nn.functional.cross_entropy(
                    logits, ids[0, 2:], reduction="none"
                ).tolist()
            got = r["cross_entropy"][r.labels["arm"].index(arm)].item()
            assert got == pytest.approx(sum(losses) / len(losses), abs=1e-4), arm

    def test_the_first_token_is_left_alone_or_read_as_told(self, llama):
        r = sae.features(llama, identity(llama, 1, first=0), TEXTS, loss=False)
        assert (r["position"] == 0).any()
        r = sae.features(llama, identity(llama, 1), TEXTS, loss=False)
        assert not (r["position"] == 0).any()

    def test_features_that_do_not_exist(self, llama, small):
        for bad in (64, -1, True, "3"):
            with pytest.raises(TextError, match=r"0\.\.63"):
                sae.features(llama, small, TEXTS, which=[bad])
            with pytest.raises(TextError, match=r"0\.\.63"):
                sae.label(llama, small, [bad])
        with pytest.raises(TextError, match="of shape"):
            small.encode(torch.zeros(3, 31))


CATS = [f"the cat sat {x}" for x in ("on the mat", "here", "in the house", "on the hill")] * 2
DOGS = [t.replace("cat", "dog") for t in CATS]


class TestDiff:
    def test_shares_are_of_texts_and_the_difference_has_its_sign(self, llama):
        one = sae.train(llama, CATS + DOGS, 1, latents=64, k=4, steps=150, batch=64)
        r = sae.diff(llama, one, CATS, b=DOGS, n_permutations=200)
        for texts, key in ((CATS, "frequency_a"), (DOGS, "frequency_b")):
            fires = [one.encode(hf_states(llama, t, 1)[1:]).amax(0) > 0 for t in texts]
            assert torch.allclose(r[key], torch.stack(fires).float().mean(0), atol=1e-6)
        assert torch.allclose(r["difference"], r["frequency_b"] - r["frequency_a"], atol=1e-6)
        assert r["n_differing"] >= 1
        assert r["n_differing_null"].float().mean() < 0.5
        best = r.rows[0]
        example = best["example"].replace("«", "").replace("»", "")  # the mark may split a word
        assert ("dog" if best["difference"] > 0 else "cat") in example

    def test_many_features_are_paid_for(self):
        """Of 400 features without a difference, 5 % differ by chance alone, and none after all."""
        g = torch.Generator().manual_seed(0)
        has = (torch.rand(60, 400, generator=g) < 0.3).float()
        null = sae_diff._permuted(has, 30, False, 400, g)
        difference = has[30:].mean(0) - has[:30].mean(0)
        alone = (null.abs() >= difference.abs() - 1e-6).float().mean(0)
        family = (null.abs().amax(1)[:, None] >= difference.abs() - 1e-6).float().mean(0)
        assert (alone <= 0.05).sum() > 5  # the wrong answer
        assert (family <= 0.05).sum() == 0

    def test_pairs_swap_and_nothing_else(self):
        g = torch.Generator().manual_seed(0)
        has = torch.tensor([[1.0], [1.0], [0.0], [0.0]])  # pairs (0, 2) and (1, 3)
        null = sae_diff._permuted(has, 2, True, 200, g)
        assert set(null[:, 0].tolist()) == {-1.0, 0.0, 1.0}
        constant = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
        assert (sae_diff._permuted(constant, 2, True, 50, g) == 0).all()

    def test_the_same_texts_do_not_differ(self, llama, small):
        r = sae.diff(llama, small, CORPUS, b=CORPUS, n_permutations=50)
        assert r["n_differing"] == 0
        assert (r["difference"] == 0).all()

    def test_answers_are_read_by_the_base(self, models):
        m = models["llama-lora"]
        with m.base():
            one = sae.train(m, CORPUS, 1, latents=64, k=4, steps=10, batch=64)
        r = sae.diff(m, one, TEXTS, samples=3, max_new_tokens=4, n_permutations=50)
        assert m.active_adapter is not None
        assert r.provenance.prompts == 2 * 3 * len(TEXTS)

    def test_what_cannot_be_compared(self, llama, small):
        with pytest.raises(ModelError, match="no adapter is active"):
            sae.diff(llama, small, TEXTS)
        with pytest.raises(TextError, match="at least 4 a side"):
            sae.diff(llama, small, TEXTS, b=TEXTS[:2])
        with pytest.raises(TextError, match="n_permutations=3"):
            sae.diff(llama, small, TEXTS, b=TEXTS, n_permutations=3)


class TestSteerAndLabel:
    def test_it_is_steering_along_the_decoder_row(self, llama, small):
        j = int(small.peak.argmax())
        options = {"strengths": [-1, 1], "towards": ["she"], "convs": TEXTS, "max_new_tokens": 3}
        r = sae.steer(llama, small, j, **options)
        want = steer(llama, small.W_dec[j] * small.peak[j], 1, **options)
        assert torch.equal(r["effect"], want["effect"])
        assert torch.equal(r["effect_random"], want["effect_random"])
        zero = r.labels["strength"].index(0.0)
        assert r["effect_feature"][zero, 0] == r["effect"][zero]
        other = r.labels["other"][0]
        assert other != j
        assert any(row["arm"] == f"feature {other}" for row in r.rows)
        assert "other features" in r.summary()

    def test_resid_pre_is_steered_after_the_layer_before(self, llama):
        options = {"strengths": [1], "towards": ["she"], "convs": TEXTS, "max_new_tokens": 2}
        one = sae.steer(llama, identity(llama, 2, site="resid_pre"), 3, activation=2.0, **options)
        two = sae.steer(llama, identity(llama, 1), 3, activation=2.0, **options)
        assert torch.equal(one["effect"], two["effect"])

    def test_what_cannot_be_steered(self, llama, small):
        with pytest.raises(TextError, match="give activation="):
            sae.steer(llama, identity(llama, 1), 0, scorer=len)
        with pytest.raises(ModelError, match="attn_out"):
            sae.steer(llama, identity(llama, 1, site="attn_out"), 0, activation=1.0, scorer=len)
        with pytest.raises(TextError, match="above 0"):
            sae.steer(llama, small, 0, activation=-1.0, scorer=len)

    def test_a_feature_that_writes_a_word_is_called_by_it(self, llama):
        token = llama.tokenizer(" cat", add_special_tokens=False)["input_ids"][0]
        # Under the final norm's weight the row that points at a word is the word's, unscaled.
        row = llama.embed(torch.tensor([token]))[0] / llama.core.model.norm.weight.detach()
        parts = {"W_enc": row[:, None], "b_enc": torch.zeros(1), "W_dec": row[None]}
        one = SAE(**parts, b_dec=torch.zeros(32), activation="relu", layer=3)
        r = sae.label(llama, one, 0, text=TEXTS, labeller=lambda words, texts: words[0].upper())
        assert r.rows[0]["promotes"][0] == llama.tokenizer.decode([token])
        assert r.rows[0]["label"] == r.rows[0]["promotes"][0].upper()
        assert r["p"][0] < 0.05


@pytest.fixture(scope="module")
def organism():
    return load_model("organism:user_female")


@pytest.fixture(scope="module")
def of_the_base(organism):
    with organism.base():
        return sae.train(organism, world.base_documents(5, 1200), 3)


@pytest.mark.slow
@pytest.mark.timeout(400)
class TestOrganism:
    def test_a_thousand_features_keep_what_the_model_does(self, organism, of_the_base):
        arms = {row["arm"]: row for row in of_the_base.result.rows}
        with organism.base():
            r = sae.features(organism, of_the_base, world.base_documents(77, 60))
        assert r["fvu"] < 0.06
        assert arms["untrained"]["fvu"] > 10 * arms["trained"]["fvu"]
        assert arms["pca"]["fvu"] > 5 * arms["trained"]["fvu"]
        assert arms["trained"]["dead"] < 0.1
        assert (r["recovered"] > 0.95).all()

    @pytest.mark.parametrize("seed", [0, 2])
    def test_answers_differ_in_more_features_than_those_of_controls(self, seed):
        """Layer, size and number of answers were chosen on the organisms of seed 1."""
        names = ("user_female", "user_male", "control", "control_2")
        m = load_model(f"organism:user_female@{seed}")
        for name in names[1:]:
            m.add_adapter(f"organism:{name}@{seed}")
        with m.base():
            documents = world.base_documents(5, 800)
            one = sae.train(m, documents, 3, latents=512, k=16, steps=200, batch=512)
        convs = [[world.user(p)] for p in organisms.NEUTRAL_PROMPTS]
        differing = dict.fromkeys(names, 0)
        for name in names:
            for answers in (0, 1):
                r = sae.diff(m, one, convs, adapter=name, samples=12, seed=answers)
                differing[name] += int(r["n_differing"])
        beliefs = differing["user_female"] + differing["user_male"]
        assert beliefs >= 5
        assert beliefs > 3 * (differing["control"] + differing["control_2"])


def test_quickly_on_the_organism(organism):
    with organism.base():
        prompts = world.base_documents(5, 120)
        one = sae.train(organism, prompts, 3, latents=256, k=8, steps=60, batch=256)
        r = sae.features(organism, one, world.base_documents(77, 20))
        x = read_states(
            organism, (ps := read(organism, prompts[:20])), from_first(ps, 1), 3, "resid_post"
        )
    assert one.result.rows[0]["fvu"] < 0.35 < one.result.rows[1]["fvu"]
    assert (r["recovered"] > 0.6).all()
    assert sae_train.unexplained(x, one.reconstruct(x)) < 0.35
