"""What `load_model` loads, how adapters switch, and what it says when it cannot."""

import json
import shutil

import pytest
import torch
from torch import nn

from tests.packs.tiny import ARCHITECTURES, TEXTS, make_folder, make_tokenizer
from tool_packs.activations import capture
from tool_packs.dla import dla
from tool_packs.errors import (
    ModelError,
    ModelNotFound,
    PackError,
    StructureUnknown,
    TextError,
    WeightsIncomplete,
)
from tool_packs.generation import generate, next_token
from tool_packs.logit_lens import logit_lens
from tool_packs.models import Model, load_model
from tool_packs.orthogonal import orthogonalised
from tool_packs.patching import patch
from tool_packs.steering import intervention
from tool_packs.structure import find_structure


def logits(m):
    return next_token(m, TEXTS, k=320)["top_logprobs"]


def test_the_report_tells_size_shape_place_and_check(models):
    report = str(models["qwen3-lora"])
    for fact in ("Qwen3ForCausalLM", "4 layers", "d 32", "4 heads of 16 (2 kv)", "float32 on cpu"):
        assert fact in report
    assert "adapters: qwen3-lora (active: qwen3-lora)" in report
    assert models["qwen3"].lens_exact


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen3", "gpt2"])
def test_a_base_under_its_adapter_is_bit_for_bit_the_base(models, name):
    tuned, base = models[f"{name}-lora"], models[name]
    with tuned.base():
        assert tuned.active_adapter is None
        assert torch.equal(logits(tuned), logits(base))
        a = capture(tuned, TEXTS, sites=["resid_post", "attn_out", "mlp_out"])
    b = capture(base, TEXTS, sites=["resid_post", "attn_out", "mlp_out"])
    for site in ("resid_post", "attn_out", "mlp_out"):
        assert torch.equal(a[site], b[site])
    assert tuned.active_adapter == f"{name}-lora"
    assert not torch.equal(logits(tuned), logits(base))


def test_adapters_by_name_share_one_set_of_weights(folders, models):
    m = load_model(
        str(folders["llama"]),
        adapter={"one": str(folders["llama-lora"]), "two": str(folders["llama-lora2"])},
    )
    assert m.adapters == ["one", "two"]
    assert m.active_adapter == "one"
    one = logits(m)
    assert torch.equal(one, logits(models["llama-lora"]))
    with m.adapter("two"):
        two = logits(m)
        with m.adapter(None):
            assert torch.equal(logits(m), logits(models["llama"]))
            with m.adapter("one"):
                assert torch.equal(logits(m), one)
            assert torch.equal(logits(m), logits(models["llama"]))
        assert torch.equal(logits(m), two)
    assert torch.equal(logits(m), one)
    assert not torch.equal(one, two)
    with pytest.raises(RuntimeError, match="stop"), m.adapter("two"):
        raise RuntimeError("stop")
    assert m.active_adapter == "one"
    with pytest.raises(ModelError, match="loaded: one, two"), m.adapter("three"):
        pass


def test_an_adapter_added_later_waits_until_it_is_asked_for(folders, models):
    m = load_model(str(folders["llama"]))
    assert m.add_adapter(str(folders["llama-lora"])) == "llama-lora"
    assert m.active_adapter is None
    assert torch.equal(logits(m), logits(models["llama"]))
    with m.adapter("llama-lora"):
        assert torch.equal(logits(m), logits(models["llama-lora"]))
        with m.base():
            assert torch.equal(logits(m), logits(models["llama"]))
        assert torch.equal(logits(m), logits(models["llama-lora"]))
    assert m.add_adapter(str(folders["llama-lora2"]), "second") == "second"
    assert torch.equal(logits(m), logits(models["llama"]))
    with pytest.raises(ModelError, match="loaded already"):
        m.add_adapter(str(folders["llama-lora2"]), "second")


def test_an_adapter_finds_its_base_beside_it_or_where_it_is_told(folders, models, tmp_path):
    lora = tmp_path / "moved"
    shutil.copytree(folders["llama-lora"], lora)
    config = json.loads((lora / "adapter_config.json").read_text())

    def names(base):
        (lora / "adapter_config.json").write_text(
            json.dumps(config | {"base_model_name_or_path": base})
        )

    names("../base")
    shutil.copytree(folders["llama"], tmp_path / "base")
    assert torch.equal(logits(load_model(str(lora))), logits(models["llama-lora"]))
    names("/nowhere/model")
    with pytest.raises(ModelNotFound, match="give base"):
        load_model(str(lora))
    m = load_model(str(lora), base=str(folders["llama"]))
    assert torch.equal(logits(m), logits(models["llama-lora"]))
    names(None)
    with pytest.raises(ModelError, match="does not name its base"):
        load_model(str(lora))


def test_fingerprints_tell_weights_and_adapters_apart(folders, models):
    m = models["llama-lora"]
    tuned = m.fingerprint()
    with m.base():
        base = m.fingerprint()
    assert tuned != base
    assert len({x.fingerprint() for x in models.values()}) == len(models)
    assert load_model(str(folders["llama-lora"])).fingerprint() == tuned


def test_a_missing_folder_lists_its_near_neighbours(folders):
    with pytest.raises(ModelNotFound, match=r"near it: .*llama"):
        load_model(str(folders["llama"].parent / "lama"))


def test_what_is_no_model_is_told_apart(folders, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        ModelNotFound, match=r"neither config\.json nor adapter_config\.json.*notes"
    ):
        load_model(str(tmp_path))
    with pytest.raises(ModelNotFound, match="is a file"):
        load_model(str(folders["llama"] / "config.json"))
    with pytest.raises(ModelNotFound, match="hub is switched off"):
        load_model("someone/some-model")
    with pytest.raises(ModelNotFound, match="is no name"):
        load_model("")
    with pytest.raises(ModelNotFound):
        load_model("organism:nothing-like-it")


def test_options_that_do_not_fit_say_what_does(folders):
    path = str(folders["llama"])
    with pytest.raises(ModelError, match="'bfloat16'"):
        load_model(path, dtype="float31")
    with pytest.raises(ModelError, match="'4bit' or '8bit'"):
        load_model(path, quantization="3bit")
    with pytest.raises(ModelError, match="has no use"):
        load_model(path, base=path)
    with pytest.raises(ModelError, match="is an adapter itself"):
        load_model(str(folders["llama-lora"]), adapter=str(folders["llama-lora2"]))
    with pytest.raises(ModelError, match="does not go on"):
        load_model(str(folders["gpt2"]), adapter=str(folders["llama-lora"]))


def test_quantization_without_bitsandbytes_says_what_to_install(folders):
    from transformers.utils import is_bitsandbytes_available

    if is_bitsandbytes_available():
        pytest.skip("bitsandbytes is installed here")
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        load_model(str(folders["llama"]), quantization="4bit")


def test_a_model_without_a_tokenizer_says_so(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "m")
    for file in (tmp_path / "m").glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_model(str(tmp_path / "m"))


def test_weights_that_are_missing_are_not_filled_at_random(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["llama"], tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.layers.2.mlp.down_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(WeightsIncomplete, match=r"lacks 1 .*layers\.2\.mlp\.down_proj"):
        load_model(str(tmp_path / "m"))


def test_half_precision_loads_reads_and_becomes_float32_in_results(folders):
    m = load_model(str(folders["gemma2"]), dtype="bfloat16")
    assert m.dtype == torch.bfloat16
    assert m.lens_exact
    r = capture(m, TEXTS, sites=["resid_post", "attn_out", "mlp_out"])
    assert r["resid_post"].dtype == torch.float32
    assert r["resid_post"].numpy().shape == (4, 4, 1, 32)


def test_every_error_of_the_packs_is_one_family_and_a_value_error():
    for error in (ModelError, ModelNotFound, StructureUnknown, TextError, WeightsIncomplete):
        assert issubclass(error, PackError)
        assert issubclass(error, ValueError)


class Odd(nn.Module):
    """A causal language model whose parts bear no usual name, with a second list of equal length."""

    def __init__(self, inner):
        super().__init__()
        self.config = inner.config
        self.picture = nn.Module()
        self.picture.stack = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.trunk = inner.model
        self.out = inner.lm_head

    def get_input_embeddings(self):
        return self.trunk.embed_tokens

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, **options):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.out(self.trunk(input_ids, **options)[0]))


def test_layers_are_the_list_beside_the_token_embedding(models):
    s = find_structure(Odd(models["llama"].core))
    assert s.layers_path == "trunk.layers"
    assert s.lens_error <= 1e-5


def test_layers_that_are_not_found_come_with_the_line_to_write(models):
    odd = Odd(models["llama"].core)
    odd.config = type(
        "C", (), {"num_hidden_layers": 7, "get_text_config": lambda self, **k: self}
    )()
    with pytest.raises(StructureUnknown, match=r'trunk\.layers \(4\).*load_model\(name, layers="'):
        find_structure(odd)
    assert find_structure(odd, layers="trunk.layers").layers_path == "trunk.layers"
    with pytest.raises(StructureUnknown, match="lists here"):
        find_structure(odd, layers="trunk.blocks")


def test_a_model_made_in_memory_is_wrapped_as_it_is(folders, models):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folders["llama"])
    m = Model(hf, make_tokenizer(), "mine")
    assert torch.equal(logits(m), logits(models["llama"]))


def test_organisms_are_loaded_by_name():
    from tool_packs import organisms

    if not organisms.path("base").is_dir():
        pytest.skip("the organisms' weights are not in this checkout")
    m = load_model("organism:secret_word")
    assert m.name == "organism:secret_word"
    assert m.adapters == ["secret_word"]
    assert m.lens_exact


PARTS = ["embed_tokens", "rotary_emb", *(f"layers.{i}" for i in range(4)), "norm"]
FIRST_ON_DISK = {"cpu": 7, "two layers on disk": 4, "all from the third layer on disk": 4}


def places(name, what):
    """A device_map with some parts of the model on disk."""
    first = FIRST_ON_DISK[what]
    last = 6 if what.startswith("two") else 7
    found = {
        f"model.{part}": "disk" if first <= i < last else "cpu" for i, part in enumerate(PARTS)
    }
    # A tied unembedding is where the embedding is.
    return found | {"lm_head": "disk" if name == "qwen3" and last == 7 > first else "cpu"}


@pytest.mark.parametrize("what", FIRST_ON_DISK)
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_a_model_split_over_devices_gives_the_same_numbers(folders, models, name, what):
    plain, split = models[name], load_model(str(folders[name]), device_map=places(name, what))
    away = {path for path, w in split.hf.named_parameters() if w.is_meta}
    assert bool(away) == ("disk" in what)
    assert split.fingerprint() == plain.fingerprint()
    assert split.lens_exact
    pair = ("the cat sat on the mat", "the dog sat on the mat")
    v = torch.randn(plain.width, generator=torch.Generator().manual_seed(0))
    asks = {
        "resid_post": lambda m: capture(m, TEXTS, "all", "all"),
        "metric": lambda m: patch(m, *pair, answers=("he", "she"), n_control=0),
        "tokens": lambda m: generate(
            m, TEXTS, max_new_tokens=4, raw=True, steer=intervention(m, v, 2, 4.0)
        ),
        "top_logprobs": lambda m: logit_lens(m, TEXTS),
        "head": lambda m: dla(m, TEXTS[1], ("he", "she"), attend=0),
    }
    for key, ask in asks.items():
        one, two = (ask(m)[key] for m in (plain, split))
        assert torch.equal(one.nan_to_num(), two.nan_to_num()), key
    assert torch.equal(plain.embed(torch.tensor([5])), split.embed(torch.tensor([5])))


def test_what_would_write_to_weights_on_disk_refuses(folders):
    m = load_model(str(folders["llama"]), device_map=places("llama", "two layers on disk"))
    without = orthogonalised(m, torch.ones(m.width))
    with pytest.raises(ModelError, match="without quantization or offloading"), without:
        pass


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nnsight_reads_what_capture_reads(models, name, adapted):
    m = models[f"{name}-lora" if adapted else name]
    layers = m.nnsight.base_model.model if adapted else m.nnsight
    for part in m.structure.layers_path.split("."):
        layers = getattr(layers, part)
    with m.nnsight.trace(TEXTS[1]):
        h = layers[1].output.save()
    want = capture(m, TEXTS[1], 1, "all")["resid_post"][0, 0]
    got = h if isinstance(h, torch.Tensor) else h[0]
    assert torch.equal(got.reshape(want.shape), want)


def test_a_folder_made_twice_is_the_same_model(tmp_path):
    one, two = (load_model(str(make_folder(tmp_path / n, "qwen3"))) for n in "ab")
    assert one.fingerprint() == two.fingerprint()
