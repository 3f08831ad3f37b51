"""Load a language model, with or without adapters, and know its parts."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tool_packs.engine import fitting
from tool_packs.errors import ModelError, TextError
from tool_packs.loading import (
    ORGANISM,
    adapter_name,
    base_of_adapter,
    hide_names,
    load_tokenizer,
    load_weights,
    named_adapters,
    put_adapters,
    resolve_base,
    resolve_name,
    torch_dtype,
)
from tool_packs.structure import (
    apply_norm,
    describe_parts,
    device_of,
    find_structure,
    first_tensor,
    held,
    lens_is_exact,
    text_config,
    unembed,
    weight_of,
)

__all__ = ["Model", "load_model"]


class Model:
    """A loaded language model: one set of weights, its tokenizer, adapters to switch on and off.

    What a technique takes as `m`. `m.hf` is the transformers (or PEFT) model, `m.tokenizer` its
    tokenizer, `m.nnsight` the same model in nnsight.
    """

    def __init__(
        self,
        hf: nn.Module,
        tokenizer: Any,
        name: str,
        *,
        layers: str | None = None,
        norm: str | None = None,
        seconds: float = 0.0,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.hf = hf.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.template_args: dict[str, Any] = {}  # passed to the chat template, as enable_thinking
        self.batch_tokens = 16_384  # tokens of one forward pass, padding included
        self.seconds = seconds
        self.notes = notes
        self._fingerprints: dict[str | None, str] = {}
        self._nnsight: Any = None
        self.plain_cache: bool | None = None  # found out by prefix.py when it first matters
        self.core: nn.Module = hf.get_base_model() if hasattr(hf, "peft_config") else hf
        self.config = text_config(self.core)
        self._layers, self._norm = layers, norm
        self.structure = find_structure(self.core, layers=layers, norm=norm)

    # What it is made of

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, first to last."""
        return self.structure.layers

    @property
    def n_layers(self) -> int:
        return len(self.structure.layers)

    @property
    def width(self) -> int:
        """d: the width of the residual stream."""
        return self.structure.width

    @property
    def vocab_size(self) -> int:
        """Rows of the unembedding, which may be more than the tokenizer knows."""
        out = getattr(self.structure.unembedding, "out_features", None)
        return int(out or weight_of(self.structure.unembedding).shape[0])

    @property
    def device(self) -> torch.device:
        """Where the token ids go in."""
        return device_of(self.structure.embedding)

    @property
    def dtype(self) -> torch.dtype:
        return weight_of(self.structure.embedding).dtype

    @property
    def embed_scale(self) -> float:
        """What the token embedding is multiplied by before the first layer."""
        return self.structure.embed_scale

    @property
    def softcap(self) -> float | None:
        """The tanh cap of the final logits, as in Gemma 2."""
        return self.structure.softcap

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @property
    def pad_id(self) -> int:
        """What fills the left of a batch; it is masked, so any token will do."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @cached_property
    def ignores_padding(self) -> bool:
        """Whether tokens to the left that the attention mask hides change nothing: measured once.

        Some recurrent models carry them along. Their prompts go in batches of one length.
        """
        text = torch.arange(3, 8, device=self.device)[None] % self.vocab_size
        hidden = torch.full((1, 6), self.pad_id, device=self.device)
        ids = torch.cat([hidden, text], 1)
        mask = torch.cat([torch.zeros_like(hidden), torch.ones_like(text)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        run = self.structure.backbone
        with torch.no_grad(), fitting(self, *ids.shape):
            padded = first_tensor(
                run(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
            )[:, 6:].float()
            alone = first_tensor(
                run(
                    input_ids=text,
                    attention_mask=mask[:, 6:],
                    position_ids=positions[:, 6:],
                    use_cache=False,
                )
            ).float()
        return bool((padded - alone).norm() <= 0.03 * alone.norm())  # bfloat16 rounds to .01

    @property
    def eos_ids(self) -> list[int]:
        """The tokens that end an answer."""
        configured = getattr(getattr(self.core, "generation_config", None), "eos_token_id", None)
        eos = configured if configured is not None else self.tokenizer.eos_token_id
        if eos is None:
            return []
        return [eos] if isinstance(eos, int) else list(eos)

    @property
    def lens_exact(self) -> bool:
        """Whether norm and unembedding reproduced the model's own logits when it was loaded."""
        return lens_is_exact(self.structure)

    def layer_index(self, layer: int | float) -> int:
        """A layer as an int (negative from the end) or a depth in 0..1 (0.5: the middle layer).

        Raises:
            TextError: outside the model.
        """
        n = self.n_layers
        if isinstance(layer, bool) or not isinstance(layer, (int, float)):
            raise TextError(
                f"layer {layer!r}: give an int in 0..{n - 1}, a depth in 0..1, or 'all'"
            )
        if isinstance(layer, float):
            if not 0 <= layer <= 1:
                raise TextError(f"depth {layer} is outside 0..1; layers are ints in 0..{n - 1}")
            return min(int(layer * n), n - 1)
        if not -n <= layer < n:
            raise TextError(f"layer {layer}: this model has layers 0..{n - 1}")
        return layer % n

    def layer_indices(self, layers: Any) -> list[int]:
        """'all', one layer, or a list of layers, as indices in the order given."""
        if isinstance(layers, str):
            if layers == "all":
                return list(range(self.n_layers))
            raise TextError(f"layers={layers!r}: give 'all', an int, a depth in 0..1, or a list")
        if isinstance(layers, (int, float)):
            return [self.layer_index(layers)]
        return [self.layer_index(layer) for layer in layers]

    def norm(self, h: Tensor) -> Tensor:
        """The final norm on states [..., d]."""
        with fitting(self, h[..., 0].numel(), 1):
            return apply_norm(self.structure, h)

    def unembed(self, h: Tensor) -> Tensor:
        """Logits [..., V] of states [..., d] that have been through `norm`: scaled and capped."""
        with fitting(self, h[..., 0].numel(), 1):
            return unembed(self.structure, h)

    def embed(self, ids: Tensor) -> Tensor:
        """What these tokens put into the residual stream [..., d], scaled; positions not added."""
        with held(self.structure.embedding):
            rows = weight_of(self.structure.embedding)[ids.to(self.device)]
        return rows * self.embed_scale

    # Adapters

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(getattr(self.hf, "peft_config", {}))

    @property
    def active_adapter(self) -> str | None:
        """The adapter that computes now, None where the base alone does."""
        if not self.adapters or self.hf._adapters_disabled:
            return None
        return self.hf.active_adapter

    @contextlib.contextmanager
    def adapter(self, name: str | None) -> Iterator[Model]:
        """Within this, the model computes with the adapter `name`; None: the base alone.

        Nests, and an exception inside restores what was active. Raises ModelError on a name that
        is not loaded.
        """
        if name is None:
            if not self.adapters:
                yield self
                return
            with self.hf.disable_adapter():
                yield self
            return
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ModelError(
                f"no adapter {name!r} is loaded (loaded: {known}): m.add_adapter(folder)"
            )
        before, was_disabled = self.hf.active_adapter, self.hf._adapters_disabled
        try:
            if was_disabled:
                self._set_enabled(True)
            self.hf.set_adapter(name)
            yield self
        finally:
            self.hf.set_adapter(before)
            if was_disabled:
                self._set_enabled(False)

    def base(self) -> contextlib.AbstractContextManager[Model]:
        """Within this, the model computes without any adapter: bit for bit the base model."""
        return self.adapter(None)

    def _set_enabled(self, enabled: bool) -> None:
        layers = self.hf.base_model
        if enabled:
            layers.enable_adapter_layers()
        else:
            layers.disable_adapter_layers()
        self.hf._adapters_disabled = not enabled

    def add_adapter(self, folder: str, name: str | None = None) -> str:
        """Loads a further adapter; it computes within `m.adapter(name)`, and what was active stays.

        A plain model gets its first adapter this way as well, and goes on computing without it.
        Returns the name it got. Raises ModelError where the name is taken or the adapter does not
        fit.
        """
        path = resolve_name(folder)
        name = name or adapter_name(folder, path)
        if name in self.adapters:
            raise ModelError(f"an adapter {name!r} is loaded already: give another name")
        plain = not self.adapters
        before = None if plain else self.hf.active_adapter
        self.hf = put_adapters(self.hf, {name: path}).eval()
        if plain:
            self._set_enabled(False)
        else:
            self.hf.set_adapter(before)
        self.core = self.hf.get_base_model()
        # PEFT has put wrappers around modules: find the parts anew.
        with fitting(self, 1, 4):
            self.structure = find_structure(self.core, layers=self._layers, norm=self._norm)
        self._nnsight = None
        return name

    # Reports and escape hatches

    def fingerprint(self) -> str:
        """A short hash of the configuration and of values sampled from every weight in use."""
        key = self.active_adapter
        if key not in self._fingerprints:
            digest = hashlib.sha256(str(type(self.core).__name__).encode())
            for path, parameter in self.hf.named_parameters():
                if any(f".{a}." in path + "." for a in self.adapters if a != key):
                    continue
                owner, _, name = path.rpartition(".")
                module = self.hf.get_submodule(owner)
                with held(module):
                    sample = _sample(module.get_parameter(name))
                digest.update(f"{path}{tuple(parameter.shape)}".encode())
                digest.update(sample.numpy().tobytes())
            self._fingerprints[key] = digest.hexdigest()[:16]
        return self._fingerprints[key]

    @property
    def nnsight(self) -> Any:
        """The same weights as an nnsight model, made at first use: `with m.nnsight.trace(text)`."""
        if self._nnsight is None:
            from nnsight import TransformersModel

            self._nnsight = TransformersModel(
                self.hf, task="text-generation", tokenizer=self.tokenizer
            )
        return self._nnsight

    def describe(self) -> str:
        """Size, shape, precision, place and parts, as text."""
        s, c = self.structure, self.config
        total = sum(p.numel() for p in self.core.parameters())
        size = sum(p.numel() * p.element_size() for p in self.hf.parameters())
        parts = describe_parts(s)
        lines = [
            f"{self.name}: {type(self.core).__name__}, {_si(total)} parameters, "
            f"{size / 2**20:,.1f} MiB, {str(self.dtype).removeprefix('torch.')} on {self.device}, "
            f"loaded in {self.seconds:.1f} s",
            f"{self.n_layers} layers, d {self.width}, {s.heads} heads of {s.head_dim} "
            f"({s.kv_heads} kv), vocabulary {self.vocab_size:,}, "
            f"context {getattr(c, 'max_position_embeddings', '?')}",
            "adapters: " + (", ".join(self.adapters) + f" (active: {self.active_adapter})")
            if self.adapters
            else "adapters: none",
            f"layers at {parts['layers at']}, norm {parts['final norm']}, "
            f"softcap {parts['softcap']}, embedding scale {parts['embedding scale']:g}, "
            f"tied {parts['tied']}, chat template {'yes' if self.has_chat_template else 'no'}",
            f"check: norm and unembedding give the model's logits to {s.lens_error:.1e}"
            + ("" if self.lens_exact else " - NOT exact: lenses refuse this model"),
            *self.notes,
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.describe()


def _sample(weight: Tensor) -> Tensor:
    """Up to 16 values of a weight, float32 on the CPU."""
    flat = weight.detach().reshape(-1)
    picks = torch.linspace(0, max(flat.numel() - 1, 0), 16).long().to(flat.device)
    return flat[picks].float().cpu() if flat.numel() else flat.float().cpu()


def load_model(
    name: str,
    *,
    revision: str | None = None,
    adapter: str | list[str] | dict[str, str] | None = None,
    base: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    layers: str | None = None,
    norm: str | None = None,
    alias: str | None = None,
) -> Model:
    """Loads a model to investigate, and says what it is.

    `name` is a local folder, a hub id, a PEFT adapter (folder or hub id; its base is found from its
    configuration), or a shipped organism as "organism:NAME". Base and adapters share one set of
    weights: `with m.base():` computes without the adapter, `with m.adapter("x"):` with another.
    Four tokens are run to find and check the model's parts.

    Args:
        name: local folder, hub id, adapter, or "organism:NAME".
        revision: branch, tag or commit on the hub.
        adapter: adapter(s) to put on the model; a dict names them, the first is active.
        base: the base of the adapter `name`, where its configuration points nowhere useful.
        dtype: "auto" (as stored), "float32", "bfloat16", "float16", or a torch.dtype.
        device_map: "auto" spreads over the GPUs; None takes the GPU if there is one, else the CPU.
        quantization: "4bit" or "8bit" (needs bitsandbytes).
        attn_implementation: "eager", "sdpa", ...; None takes the model's default.
        trust_remote_code: runs code from the hub repository; only for sources you trust.
        layers: dotted path of the decoder layers, where they are not found.
        norm: dotted path of the final norm, where it is not found.
        alias: the name shown in place of every other, for an investigation of an unknown model.

    Returns:
        Model: the `m` of every technique; showing it prints parameters, layers, width, heads,
        vocabulary, memory, dtype, device and seconds.

    Raises:
        ModelNotFound: nothing loadable there (near names are listed).
        WeightsIncomplete: the files lack weights that would have been random.
        StructureUnknown: layers or norm not found; says what to write.
        ModelError: an option that does not fit.

    Use when:
        At the start of every investigation, once per set of weights.

    Not when:
        A second adapter on the same base: `m.add_adapter(folder)`.

    Cost:
        reading the weights, and one forward pass of 4 tokens.

    Controls:
        norm and unembedding are compared with the model's own logits; `m.lens_exact` tells.

    Paper:
        n/a

    Example:
        from tool_packs.models import load_model
        m  # the report
        m.n_layers, m.width, m.adapters
    """
    started = time.perf_counter()
    precision = torch_dtype(dtype)
    path = resolve_name(name, revision)
    adapters = named_adapters(adapter)
    if (adapter_base := base_of_adapter(path, revision)) is not None:
        if adapters:
            raise ModelError(f"{name!r} is an adapter itself: give the other one to m.add_adapter")
        if base is None and name.startswith(ORGANISM):
            from tool_packs.organisms import base_of

            base = ORGANISM + base_of(name.removeprefix(ORGANISM))
        adapters = {adapter_name(name, path): path}
        path = resolve_name(base) if base is not None else resolve_base(path, adapter_base)
        model_revision = None  # the revision given is the adapter's
    elif base is not None:
        raise ModelError(f"{name!r} is a whole model, so base={base!r} has no use: leave it out")
    else:
        model_revision = revision
    if alias is not None:
        adapters = {f"adapter_{i + 1}": folder for i, folder in enumerate(adapters.values())}
    tokenizer_sources = [*adapters.values(), path]
    hf, notes = load_weights(
        path,
        revision=model_revision,
        dtype=precision,
        device_map=device_map,
        quantization=quantization,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    if adapters:
        hf = put_adapters(hf, adapters, revision=revision if adapter_base is not None else None)
    tokenizer = load_tokenizer(tokenizer_sources, hf, model_revision, trust_remote_code)
    if alias is not None:
        hide_names(hf, tokenizer, alias)
        shown = alias
    elif Path(name).is_dir():
        shown = Path(name).resolve().name
    else:
        shown = name
    m = Model(hf, tokenizer, shown, layers=layers, norm=norm, notes=notes)
    m.seconds = time.perf_counter() - started
    return m


def _si(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)
