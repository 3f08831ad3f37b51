"""What a sparse autoencoder computes: encode, decode, and the folder it is kept in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.activations import collect
from tool_packs.errors import ModelError, TextError
from tool_packs.prompts import Prompt
from tool_packs.result import Result

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["SAE"]

ACTIVATIONS = ("topk", "jumprelu", "relu")
NORMALIZE = ("none", "layer_norm", "constant_norm_rescale")
# Hook names of TransformerLens, which published SAEs are named by, for each of our sites.
HOOKS = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "head": "attn.hook_z",
}
CELLS = 2**25  # numbers in the dense activations of one chunk of tokens


@dataclass(eq=False)
class SAE:
    """A sparse autoencoder of one site of one layer: x ~ f @ W_dec + b_dec, f sparse and >= 0.

    f is the k largest of (x - b_dec) @ W_enc + b_enc ("topk"), those above their threshold
    ("jumprelu"; a trained BatchTopK is one), or the positive ones ("relu"). `subtract` says whether
    b_dec is taken off before encoding. `result` holds what training measured, `peak` [feature] the
    largest activation that training saw. States at positions before `first` are not the SAE's
    business: those of the first token are of another size than all others.
    """

    W_enc: Tensor  # [d, F]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, d]
    b_dec: Tensor  # [d]
    activation: str
    layer: int
    site: str = "resid_post"
    k: int | None = None
    threshold: Tensor | None = None  # [F]
    subtract: bool = True
    normalize: str = "none"
    rescale: bool = False  # features compete, and are told, in units of their decoder's norm
    first: int = 1
    name: str = ""
    peak: Tensor | None = field(default=None, repr=False)
    result: Result | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        d, count = self.W_enc.shape
        shapes = {"b_enc": (count,), "W_dec": (count, d), "b_dec": (d,), "threshold": (count,)}
        for part, shape in shapes.items():
            tensor = getattr(self, part)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ModelError(
                    f"{part} has shape {tuple(tensor.shape)}; with W_enc "
                    f"{tuple(self.W_enc.shape)} it is {shape}"
                )
        for part in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
            tensor = getattr(self, part)
            if tensor is not None and (bad := int((~tensor.isfinite()).sum())):
                raise ModelError(f"{part} holds {bad} values that are NaN or infinite: not an SAE")
        if self.activation not in ACTIVATIONS:
            raise ModelError(f"activation {self.activation!r}: {', '.join(ACTIVATIONS)}")
        if self.normalize not in NORMALIZE:
            raise ModelError(f"normalize {self.normalize!r}: {', '.join(NORMALIZE)}")
        if self.activation == "topk" and not 1 <= (self.k or 0) <= count:
            raise ModelError(f"k={self.k}: a TopK SAE of {count} features needs 1..{count}")
        if self.activation == "jumprelu" and self.threshold is None:
            raise ModelError("a JumpReLU SAE needs a threshold for each feature")

    @property
    def width(self) -> int:
        """d: the width of what is encoded."""
        return self.W_enc.shape[0]

    @property
    def n_features(self) -> int:
        return self.W_enc.shape[1]

    def to(self, device: torch.device | str) -> SAE:
        """The same SAE with its weights on `device`; this one is changed and returned."""
        for f in fields(self):
            if isinstance(tensor := getattr(self, f.name), Tensor) and f.name != "peak":
                setattr(self, f.name, tensor.to(device))
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Activations [..., F] of states x [..., d], in float32."""
        x = self._fitting(x)
        z, _ = self._normalized(x)
        if self.subtract:
            z = z - self.b_dec
        pre = z @ self.W_enc + self.b_enc
        if self.rescale:
            pre = pre * self.W_dec.norm(dim=-1)
        if self.activation == "topk":
            top = pre.topk(self.k, dim=-1)
            return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
        if self.activation == "jumprelu":
            return pre.relu() * (pre > self.threshold)
        return pre.relu()

    def decode(self, f: Tensor, x: Tensor | None = None) -> Tensor:
        """States [..., d] of activations f [..., F].

        An SAE with `normalize` undoes it as it was done to x, which must be given then.
        """
        if f.shape[-1] != self.n_features:
            raise TextError(
                f"activations of shape {tuple(f.shape)}: this SAE has {self.n_features} features"
            )
        f = f.to(self.W_dec.device, torch.float32)
        if self.rescale:
            f = f / self.W_dec.norm(dim=-1)
        out = f @ self.W_dec + self.b_dec
        if self.normalize == "none":
            return out
        if x is None:
            raise TextError(
                f"this SAE normalises its input ({self.normalize}): give decode(f, x) the states "
                "that f came from"
            )
        _, (shift, scale) = self._normalized(self._fitting(x))
        return out * scale + shift

    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x), x) [..., d], a chunk of tokens at a time."""
        flat = self._fitting(x).reshape(-1, self.width)
        parts = [self.decode(self.encode(part), part) for part in flat.split(self._rows())]
        return torch.cat(parts).reshape(x.shape) if parts else flat.reshape(x.shape)

    def entries(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The activations above 0 of x [T, d], sparse: token, feature and value, each [entry]."""
        token, feature, value = [], [], []
        start = 0
        for part in x.split(self._rows()):
            f = self.encode(part)
            t, j = f.nonzero(as_tuple=True)
            token.append(t.cpu() + start)
            feature.append(j.cpu())
            value.append(f[t, j].cpu())
            start += len(part)
        return torch.cat(token), torch.cat(feature), torch.cat(value)

    def save(self, folder: str | Path) -> Path:
        """Writes cfg.json and sae_weights.safetensors, which sae-lens reads as well as `load`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}
        if self.activation == "jumprelu":
            parts["threshold"] = self.threshold
        weights = {name: t.detach().cpu().contiguous().clone() for name, t in parts.items()}
        save_file(weights, folder / "sae_weights.safetensors")
        if self.peak is not None:
            save_file({"peak": self.peak.contiguous().clone()}, folder / "peak.safetensors")
        hook = f"blocks.{self.layer}.{HOOKS[self.site]}"
        config: dict[str, Any] = {
            "architecture": "standard" if self.activation == "relu" else self.activation,
            "d_in": self.width,
            "d_sae": self.n_features,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": self.subtract,
            "normalize_activations": self.normalize,
            "reshape_activations": "hook_z" if self.site == "head" else "none",
            "hook_name": hook,
            "model_name": self.name,
            "metadata": {"hook_name": hook, "model_name": self.name, "first": self.first},
        }
        if self.activation == "topk":
            config |= {"k": self.k, "rescale_acts_by_decoder_norm": self.rescale}
        (folder / "cfg.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        if self.result is not None:
            self.result.save(folder / "training")
        return folder

    def describe(self) -> str:
        kind = f"TopK, k {self.k}" if self.activation == "topk" else self.activation
        return (
            f"SAE of {self.site} {self.layer}: {self.n_features} features, d {self.width}, {kind}"
        )

    def __repr__(self) -> str:
        return self.describe()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        if self.result is None:
            return {"text/plain": self.describe()}
        return self.result._repr_mimebundle_(include, exclude)

    def _rows(self) -> int:
        return max(1, CELLS // self.n_features)

    def _fitting(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.width:
            raise TextError(
                f"states of shape {tuple(x.shape)}: this SAE encodes [..., {self.width}]"
            )
        return x.to(self.W_enc.device, torch.float32)

    def _normalized(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x as the encoder wants it, and (shift, scale) that take it back."""
        if self.normalize == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            scale = x.std(-1, keepdim=True)  # unbiased, as in sae-lens
            return (x - shift) / (scale + 1e-5), (shift, scale)
        if self.normalize == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.width**0.5
            return x / scale, (torch.zeros_like(scale), scale)
        return x, (torch.zeros(()), torch.ones(()))


def check_fits(m: Model, sae: SAE) -> None:
    """Raises ModelError where this SAE is of another layer or width than this model has."""
    if not 0 <= sae.layer < m.n_layers:
        raise ModelError(
            f"the SAE was made for {sae.site} of layer {sae.layer}; "
            f"this model has layers 0..{m.n_layers - 1}"
        )
    s = m.structure
    width = s.heads * s.head_dim if sae.site == "head" else m.width
    if sae.width != width:
        raise ModelError(
            f"the SAE encodes states of width {sae.width}; {sae.site} of this model has {width}"
        )


def after_layer(sae: SAE, purpose: str) -> int:
    """The layer after which the stream that this SAE reads can be changed."""
    if sae.site == "resid_post" or (sae.site == "mlp_out" and purpose == "steering"):
        return sae.layer  # what is added to mlp_out is added to the stream after the layer
    if sae.site == "resid_pre" and sae.layer > 0:
        return sae.layer - 1
    raise ModelError(
        f"{purpose} at {sae.site} of layer {sae.layer}: the stream is changed after a layer only, "
        "so use an SAE of resid_post"
    )


def states_of(
    m: Model, sae: SAE, prompts: Sequence[Prompt], where: Sequence[Sequence[int]]
) -> Tensor:
    """What the SAE encodes [T, d]: the positions `where` of each prompt, one prompt after another."""
    return read_states(m, prompts, where, sae.layer, sae.site)


def read_states(
    m: Model,
    prompts: Sequence[Prompt],
    where: Sequence[Sequence[int]],
    layer: int,
    site: str,
) -> Tensor:
    """States [T, d] at these positions of the prompts; refuses those that hold NaN."""
    if not any(where):
        raise TextError(
            f"the {len(prompts)} texts have no token to read: each is shorter than the positions "
            "asked for (an SAE leaves the first token out unless first=0)"
        )
    parts = []
    for chunk in _chunks(where):
        chosen = [where[i] for i in chunk]
        got = collect(m, [prompts[i] for i in chunk], [layer], chosen, (site,))[site]
        got = got[:, 0].flatten(2)  # [N, P, d]
        parts += [got[row, : len(w)] for row, w in enumerate(chosen)]
    states = torch.cat(parts)
    if bad := int((~states.isfinite().all(-1)).sum()):
        raise TextError(
            f"{bad} of {len(states)} states at {site} of layer {layer} hold NaN or infinity: "
            "is the model in half precision?"
        )
    return states


def _chunks(where: Sequence[Sequence[int]], tokens: int = 65_536) -> Iterator[list[int]]:
    """Prompts in their order, so many at a time that padding stays small."""
    chunk: list[int] = []
    for i in range(len(where)):
        longest = max(len(where[j]) for j in [*chunk, i])
        if chunk and longest * (len(chunk) + 1) > tokens:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def from_first(prompts: Sequence[Prompt], first: int) -> list[list[int]]:
    """All positions of each prompt from `first` on."""
    return [list(range(first, len(p))) for p in prompts]
