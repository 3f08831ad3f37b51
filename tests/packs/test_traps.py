"""Each known trap of working with language models, by its number, the wrong answer beside ours."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

import tool_packs
from tests.packs.tiny import TEXTS
from tool_packs.activations import capture
from tool_packs.anatomy import tokenize
from tool_packs.generation import generate, next_token
from tool_packs.logit_lens import logit_lens
from tool_packs.models import load_model
from tool_packs.orthogonal import orthogonalised
from tool_packs.prompts import read
from tool_packs.steering import intervention, steering
from tool_packs.structure import first_tensor

CHAT = [{"role": "user", "content": "Who are you?"}]


def hooks_on(m):
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.hf.modules())


def test_trap_01_every_decoded_token_is_steered_from_the_start_position_on(llama):
    steered = []

    def edit(h):
        steered.append(len(h))
        return h

    change = intervention(llama, torch.zeros(llama.width), 1, start="last", edit=edit)
    r = generate(llama, TEXTS[1], raw=True, max_new_tokens=11, steer=change)
    assert steered == [1] * 11  # the prompt's last token, and the ten that were fed back
    assert r["tokens"].shape[1] == 11

    # The wrong answer: a hook that counts positions within what it is given. After the prompt it is
    # given one token at a time, so there is nothing from the prompt's length on.
    start, wrong = len(read(llama, TEXTS[1])[0]), []

    def hook(module, args, output):
        h = first_tensor(output)
        wrong.append(h[:, start:].numel())

    handle = llama.layers[1].register_forward_hook(hook)
    try:
        llama.hf.generate(
            **llama.tokenizer(TEXTS[1], return_tensors="pt"),
            max_new_tokens=11, min_new_tokens=11, do_sample=False,
        )  # fmt: skip
    finally:
        handle.remove()
    assert wrong == [0] * 11


def test_trap_02_the_last_resid_post_is_before_the_final_norm(models):
    for m in models.values():
        r = capture(m, TEXTS[1], "all", "all")["resid_post"][0]
        with torch.no_grad():
            out = m.hf(**m.tokenizer(TEXTS[1], return_tensors="pt"), output_hidden_states=True)
        for layer in range(m.n_layers - 1):
            assert (r[layer] - out.hidden_states[layer + 1][0]).abs().max() <= 1e-5
        after_norm = out.hidden_states[-1][0]
        with torch.no_grad():
            assert (m.norm(r[-1]) - after_norm).abs().max() <= 1e-5
        assert (r[-1] - after_norm).norm() / after_norm.norm() > 0.05


def test_trap_03_there_is_one_bos_with_and_without_a_chat_template(models):
    for m in models.values():
        bos = m.tokenizer.bos_token_id
        typed = m.tokenizer.bos_token + "the cat"
        for prompt in read(m, [CHAT, "the cat", typed]):
            assert prompt.ids.count(bos) == 1
            assert prompt.ids[0] == bos
        assert read(m, typed)[0].ids == read(m, "the cat")[0].ids
        # The wrong answer: the text of a template, which has a BOS, through a tokenizer that adds one.
        text = m.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        doubled = torch.tensor([m.tokenizer(text)["input_ids"]])
        assert doubled[0].tolist() == [bos, *read(m, [CHAT])[0].ids]
        with torch.no_grad():
            h = m.hf(input_ids=doubled, output_hidden_states=True).hidden_states[2][0, 2]
        ours = capture(m, [CHAT], 1, 1)["resid_post"][0, 0, 0]  # the first token after it
        assert (h - ours).norm() / ours.norm() > 0.01


def test_trap_04_answers_of_a_mixed_batch_begin_after_their_own_prompt(models):
    for m in models.values():
        together = generate(m, TEXTS, raw=True, max_new_tokens=5)["text"]
        assert together == [generate(m, t, raw=True, max_new_tokens=5)["text"][0] for t in TEXTS]
    # The wrong answer: a padded row, cut where its attention mask has as many ones as the prompt.
    # Padding on the left moves the answer to the right, and end tokens pad it on the right.
    m = models["llama"]
    given = m.tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        out = m.hf.generate(**given, max_new_tokens=5, do_sample=False, eos_token_id=m.eos_ids)
    lengths = given["attention_mask"].sum(1)
    wrong = [m.tokenizer.decode(row[n:]) for row, n in zip(out, lengths, strict=True)]
    right = generate(m, TEXTS, raw=True, max_new_tokens=5)["text"]
    longest = int(lengths.argmax())
    for i in range(len(TEXTS)):
        assert (i == longest) == wrong[i].startswith(right[i])


def test_trap_05_a_prefill_is_continued_and_not_closed(models):
    for m in models.values():
        for prefill in ("Sure, the", "Sure ", " the\n"):
            chat = [*CHAT, {"role": "assistant", "content": prefill}]
            prompt = read(m, [chat])[0]
            assert prompt.text.endswith(prefill.lstrip())
            assert m.tokenizer.decode(prompt.ids).endswith(prefill.lstrip())
            one = generate(m, CHAT, prefill=prefill, max_new_tokens=4)
            assert one["text"] == generate(m, chat, max_new_tokens=4)["text"]
            ids = m.tokenizer(prompt.text, add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                logits = m.hf(input_ids=ids["input_ids"]).logits[0, -1]
            assert one["tokens"][0, 0] == logits.argmax()
            # The wrong answer: a template that ends the assistant's turn and opens another.
            closed = m.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
            assert closed.rstrip().endswith("<turn>assistant")
            assert f"{prefill.strip()}</turn>" in closed


def test_trap_06_every_name_that_is_documented_imports():
    root = Path(tool_packs.__file__).parents[1]
    pages = [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("examples/**/*")]
    pages += root.glob("tool_packs/*.py")
    found, absent = 0, []
    for page in pages:
        if page.suffix not in (".md", ".py", ".ipynb"):
            continue
        text = page.read_text(encoding="utf-8")
        for module, names in re.findall(r"from (tool_packs[\w.]*) import ([\w, ]+)", text):
            for name in re.findall(r"\w+", names.split(" as ")[0]):
                found += 1
                if not importable(module, name):
                    absent.append(f"{page.name}: {module}.{name}")
    assert found > 50
    assert not absent
    assert not importable("tool_packs.probes", "train_probe")  # what a wrong name would give


def importable(module, name):
    loaded = importlib.import_module(module)
    if hasattr(loaded, name):
        return True
    package = hasattr(loaded, "__path__")
    return package and importlib.util.find_spec(f"{module}.{name}") is not None


def test_trap_07_a_model_under_an_alias_bears_its_name_nowhere(folders):
    m = load_model(str(folders["llama-lora"]), alias="model A")
    texts = [
        str(m),
        str(generate(m, "the", max_new_tokens=2).provenance),
        str(m.hf.config),
        str(m.core.config.name_or_path),
        str(m.tokenizer.name_or_path) + str(m.tokenizer.init_kwargs),
        str(m.hf.peft_config),
        str(m.core.name_or_path),
    ]
    for text in texts:
        assert "llama-lora" not in text
        assert str(folders["llama"]) not in text
    assert m.adapters == ["adapter_1"]
    # The wrong answer: loaded without an alias, each of these places tells.
    known = load_model(str(folders["llama-lora"]))
    assert known.adapters == ["llama-lora"]
    for told in (
        known.core.config.name_or_path,
        known.tokenizer.name_or_path,
        known.hf.peft_config,
    ):
        assert str(folders["llama"]) in str(told) or "llama-lora" in str(told)


def test_trap_08_layers_are_found_by_shape_whatever_the_architecture_is_called(models):
    paths = {m.structure.layers_path for m in models.values()}
    assert paths == {"model.layers", "transformer.h"}
    assert all(m.n_layers == 4 for m in models.values())
    # The wrong answer: one path for all, or a count by the name that most configurations use.
    gpt2 = models["gpt2"].core
    assert not hasattr(gpt2, "model")
    assert "num_hidden_layers" not in gpt2.config.to_dict()


def test_trap_09_left_padded_gpt2_is_told_its_positions(models):
    for name in ("gpt2", "gpt2-lora"):
        m = models[name]
        together = next_token(m, TEXTS, k=3)["top_logprobs"]
        alone = torch.cat([next_token(m, t, k=3)["top_logprobs"] for t in TEXTS])
        assert (together - alone).abs().max() <= 1e-5
        # The wrong answer: positions counted from the padding on.
        given = m.tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
        mask = given["attention_mask"]
        counted = torch.arange(mask.shape[1]).expand(mask.shape)
        with torch.no_grad():
            wrong = m.hf(**given, position_ids=counted).logits[0, -1].log_softmax(-1)
        assert (wrong.topk(3).values - alone[0]).abs().max() > 0.1


def test_trap_10_the_lens_caps_the_logits_as_gemma2_does(models):
    m = models["gemma2"]
    assert m.softcap == 3.0
    r = logit_lens(m, TEXTS[1], layers=-1, positions="last", k=1)
    with torch.no_grad():
        logits = m.hf(**m.tokenizer(TEXTS[1], return_tensors="pt")).logits[0, -1]
        h = capture(m, TEXTS[1], -1)["resid_post"][0, 0, 0]
        uncapped = m.structure.unembedding(m.norm(h)).log_softmax(-1).max()
    assert abs(r["top_logprobs"][0, 0, 0, 0] - logits.log_softmax(-1).max()) <= 1e-5
    assert abs(r["top_logprobs"][0, 0, 0, 0] - uncapped) > 0.05


def test_trap_11_what_a_block_adds_includes_its_post_norms(models):
    for name, m in models.items():
        post_norm = m.structure.attn_out[0] is not m.structure.attention[0]
        assert post_norm == name.startswith("gemma")
        parts = ["resid_pre", "attn_out", "mlp_out", "resid_post"]
        r = capture(m, TEXTS[1], 2, "all", sites=parts)
        before, attn, mlp, after = (r[site][0, 0] for site in parts)
        assert (before + attn + mlp - after).abs().max() <= 1e-5 * max(1, after.abs().max())
        # The wrong answer: what the attention module puts out, before the norm that follows it.
        raw = []
        handle = m.structure.attention[2].register_forward_hook(
            lambda _, __, output, raw=raw: raw.append(first_tensor(output))
        )
        try:
            with torch.no_grad():
                m.hf(**m.tokenizer(TEXTS[1], return_tensors="pt"))
        finally:
            handle.remove()
        off = (before + raw[0][0] + mlp - after).norm() / after.norm()
        assert (off > 0.05) == post_norm


def test_trap_12_the_embedding_scale_is_measured(models):
    for name, m in models.items():
        assert m.embed_scale == pytest.approx(
            32**0.5 if name.startswith("gemma") else 1.0, abs=1e-3
        )
        if name.startswith("gpt2"):  # learned positions are added to the embedding
            continue
        ids = torch.tensor(m.tokenizer(TEXTS[1])["input_ids"])
        h = capture(m, TEXTS[1], 0, "all", sites="resid_pre")["resid_pre"][0, 0]
        assert (m.embed(ids) - h).abs().max() <= 1e-5
        # The wrong answer: the rows of the embedding matrix as they are.
        rows = m.core.get_input_embeddings().weight[ids]
        assert ((rows - h).norm() / h.norm() > 0.5) == name.startswith("gemma")


def test_trap_13_an_adapter_is_never_dropped(models):
    for name, m in models.items():
        if not name.endswith("-lora"):
            continue
        assert m.active_adapter == name
        on = next_token(m, TEXTS[1])["top_logprobs"]
        with m.base():
            off = next_token(m, TEXTS[1])["top_logprobs"]
        assert (on - off).abs().max() > 1e-3
        h = capture(m, TEXTS[1], "all")["resid_post"]
        with m.base():
            assert (capture(m, TEXTS[1], "all")["resid_post"] - h).abs().max() > 1e-3


def test_trap_14_a_layer_that_puts_out_a_tuple_reads_and_steers_alike(folders, models):
    m = load_model(str(folders["llama"]))
    for layer in m.layers:
        forward = layer.forward
        layer.forward = lambda *a, f=forward, **k: (f(*a, **k), None)

    def unpack(module, args, kwargs):  # the stack of this release expects a tensor
        return (args[0][0] if isinstance(args[0], tuple) else args[0], *args[1:]), kwargs

    for layer in [*m.layers[1:], m.structure.final_norm]:
        layer.register_forward_pre_hook(unpack, with_kwargs=True)
    v = torch.ones(m.width)
    change = intervention(m, v, 1, 2.0)
    want = capture(models["llama"], TEXTS, [0, 2], steer=change)["resid_post"]
    assert torch.equal(capture(m, TEXTS, [0, 2], steer=change)["resid_post"], want)
    # The wrong answer: `output[0]`, which of a tensor is the first text of the batch.
    seen = []
    handle = models["llama"].layers[0].register_forward_hook(lambda _, __, out: seen.append(out))
    try:
        with torch.no_grad():
            models["llama"].hf(**models["llama"].tokenizer(TEXTS[:1] * 3, return_tensors="pt"))
    finally:
        handle.remove()
    assert first_tensor(seen[0]).shape[0] == 3
    assert seen[0][0].ndim == 2


def test_trap_15_tied_weights_are_known(models):
    tied = {name: m.structure.tied for name, m in models.items() if "lora" not in name}
    assert tied == {"llama": True, "gemma2": True, "gemma3": True, "qwen3": False, "gpt2": True}
    m = models["llama"]
    v = torch.randn(m.width, generator=torch.Generator().manual_seed(0))
    unit = v / v.norm()
    h = capture(m, TEXTS[1], -1)["resid_post"][0, 0, 0]
    with torch.no_grad():
        plain = m.structure.unembedding(h)
        with orthogonalised(m, v):
            ours = m.structure.unembedding(h)
        # The wrong answer: the embedding projected in place takes the unembedding with it.
        weight = m.core.get_input_embeddings().weight
        wrong = h @ (weight - (weight @ unit)[:, None] * unit).T
    assert torch.equal(ours, plain)
    assert (wrong - plain).abs().max() > 0.1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_trap_16_no_hook_survives_an_exception_or_an_interrupt(llama, error):
    before = hooks_on(llama)

    def edit(h):
        raise error

    change = intervention(llama, torch.zeros(llama.width), 2, edit=edit)
    for call in (generate, capture, next_token, logit_lens):
        with pytest.raises(error):
            call(llama, TEXTS, steer=change)
        assert hooks_on(llama) == before
    with pytest.raises(error), steering(llama, torch.ones(llama.width), 1):
        raise error
    assert hooks_on(llama) == before

    # The wrong answer: a hook that is removed after the call, and not whatever happens in it.
    def naive():
        handles.append(llama.layers[2].register_forward_hook(lambda *_: edit(None)))
        llama.hf(**llama.tokenizer(TEXTS[1], return_tensors="pt"))
        handles.pop().remove()

    handles = []
    with pytest.raises(error):
        naive()
    assert hooks_on(llama) == before + 1
    handles.pop().remove()


def test_types_of_tokens_are_not_given_to_a_model_that_would_add_their_embedding(models):
    """A further trap: GPT-2 adds the embedding of token 0 where a tokenizer gives token_type_ids."""
    m = models["gpt2"]
    ours = next_token(m, TEXTS[1], k=1)["top_logprobs"][0, 0]
    given = m.tokenizer(TEXTS[1], return_tensors="pt", return_token_type_ids=True)
    assert "token_type_ids" in given
    with torch.no_grad():
        right = m.hf(input_ids=given["input_ids"]).logits[0, -1].log_softmax(-1).max()
        wrong = m.hf(**given).logits[0, -1].log_softmax(-1).max()
    assert abs(ours - right) <= 1e-5
    assert abs(wrong - right) > 1e-3


def test_the_template_says_what_it_adds(llama):
    r = tokenize(llama, CHAT)
    given = "".join(row["token"] for row in r.rows if not row["added"])
    assert given == "Who are you?"
    assert [row["name"] for row in r.rows][-1] == "last, assistant_start"
