"""Neuronpedia over its public HTTP API: a feature's page, search in explanations, activations.

Needs the network, and for some calls a key in the environment variable NEURONPEDIA_API_KEY. It is
read when a call is made, sent in a header over https (or to this machine) alone, and kept nowhere.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import torch

from tool_packs.errors import ServiceError, TextError
from tool_packs.result import Result, provenance

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["activations", "feature", "search"]

URL = "https://www.neuronpedia.org"
KEY = "NEURONPEDIA_API_KEY"
LARGEST = 64 * 2**20  # bytes of an answer
AROUND = 12  # tokens shown on each side of an example's largest
LOOPBACK = ("127.0.0.1", "::1", "localhost")

Ask = Callable[[str, dict[str, Any] | None], Any]


def feature(
    m: Model,
    name: str,
    *,
    examples: int = 5,
    url: str = URL,
    timeout: float = 20.0,
    ask: Ask | None = None,
) -> Result:
    """What does Neuronpedia's page say about this feature?

    Args:
        name: "MODEL/SOURCE/INDEX", as "gemma-2-2b/20-gemmascope-res-16k/10956", or the page's
            address.
        examples: texts listed, those with the largest activations.
        url: of the service, or of your own copy of it.
        timeout: seconds of silence after which a request is given up.
        ask: sends a request in place of HTTP: (path, body or None) -> decoded JSON. For a cache, a
            proxy, or work without the network.

    Returns:
        Result: peak [example]; top_logits and bottom_logits [word]; frequency [] (share of tokens,
        nan where the page does not tell). Rows: text (the largest token in «» with its neighbours),
        token, peak. Labels: explanations, promotes, suppresses.

    Raises:
        ServiceError: no network, no such feature, too many requests, a timeout, an answer that is
            not what the API promises.
        TextError: a name that is none.

    Use when:
        An SAE that you loaded is on Neuronpedia and you want to know what others call a feature.

    Not when:
        You need hundreds: Neuronpedia has exports, and asks not to be called for each.

    Cost:
        one request; no forward pass. `m` is only compared with the page's model.

    Controls:
        None: an explanation is a guess of another model from the top examples. Check it on texts of
        your own with `activations` or `sae.features`.

    Paper:
        neuronpedia.org (Lin 2023); arXiv 2408.05147 for Gemma Scope

    Example:
        from tool_packs import neuronpedia
        page = {"explanations": [{"description": "cats"}], "activations": [
            {"tokens": [" the", " cat", " sat"], "values": [0, 7.5, 0.5]}]}
        r = neuronpedia.feature(m, "gpt2-small/6-res-jb/650", ask=lambda path, body: page)
        r.labels["explanations"], r["text"]  # without ask= the page comes from neuronpedia.org
    """
    started = time.perf_counter()
    if examples < 1:
        raise TextError(f"examples={examples}: give at least 1")
    model, source, index = _parts(name)
    path = "/api/feature/" + "/".join(quote(x, safe="") for x in (model, source, index))
    page = _call(path, None, f"feature {model}/{source}/{index}", url, timeout, ask)
    if not isinstance(page, Mapping):
        raise ServiceError(f"the page of {name} is a {type(page).__name__}, not a feature")
    rows = []
    for text in _list(page, "activations"):
        tokens, values = _tokens(text)
        at = max(range(len(values)), key=values.__getitem__)
        rows.append({"text": _marked(tokens, at), "token": tokens[at], "peak": values[at]})
    rows = sorted(rows, key=lambda row: -row["peak"])[:examples]
    explanations = [str(e.get("description", "")) for e in _list(page, "explanations")]
    frequency = page.get("frac_nonzero")
    words = {
        side: list(zip(_list(page, f"{side}_str"), _list(page, f"{side}_values"), strict=False))
        for side in ("pos", "neg")
    }
    promotes, suppresses = ([str(w) for w, _ in words[side]] for side in ("pos", "neg"))
    lines = [f"explanation: {e!r}" for e in explanations[:3]] or ["no explanation on the page"]
    lines.append(f"promotes {promotes[:6]}, suppresses {suppresses[:6]}")
    lines += [f"{row['peak']:.3g}: {row['text']!r}" for row in rows[:4]]
    lines += _other_model(m, model)
    return Result(
        title=f"feature {model}/{source}/{index} on Neuronpedia",
        tensors={
            "peak": torch.tensor([row["peak"] for row in rows], dtype=torch.float32),
            "top_logits": torch.tensor([float(v) for _, v in words["pos"]]),
            "bottom_logits": torch.tensor([float(v) for _, v in words["neg"]]),
            "frequency": torch.tensor(float("nan") if frequency is None else float(frequency)),
        },
        dims={
            "peak": ("example",),
            "top_logits": ("promoted",),
            "bottom_logits": ("suppressed",),
            "frequency": (),
        },
        labels={
            "explanations": explanations,
            "promoted": promotes,
            "suppressed": suppresses,
            "promotes": promotes,
            "suppresses": suppresses,
        },
        rows=rows,
        lines=lines,
        provenance=provenance(
            m, "neuronpedia.feature", started, url=url, feature=f"{model}/{source}/{index}"
        ),
    )


def search(
    m: Model,
    query: str,
    *,
    model: str | None = None,
    sources: Sequence[str] = (),
    n: int = 20,
    url: str = URL,
    timeout: float = 20.0,
    ask: Ask | None = None,
) -> Result:
    """Which features have an explanation that is close to these words?

    Args:
        query: at least three characters.
        model: Neuronpedia's name of the model; None: the last part of this model's name.
        sources: of these SAEs alone, as ["20-gemmascope-res-16k"]; none: of all of the model's.
        n: features listed; the service gives about 20 a request.
        url: as in `feature`.
        timeout: as in `feature`.
        ask: as in `feature`.

    Returns:
        Result: similarity [result], the cosine of query and explanation (nan where it is not told).
        Rows: feature ("MODEL/SOURCE/INDEX", as the other calls take it), explanation, similarity.

    Raises:
        ServiceError: as `feature`.
        TextError: a query of fewer than three characters.

    Use when:
        You have a concept and look for features of it, to steer with or to read.

    Not when:
        No SAE of your model is there. Then train one: `sae.train`.

    Cost:
        a request for about 20 results; no forward pass.

    Controls:
        None: explanations are guesses, and a near one is no proof; look at `activations` of texts
        with the concept and without it.

    Paper:
        neuronpedia.org (Lin 2023)

    Example:
        from tool_packs import neuronpedia
        hit = {"modelId": "gpt2-small", "layer": "6-res-jb", "index": "650", "description": "cats"}
        r = neuronpedia.search(m, "cats", model="gpt2-small", ask=lambda p, b: {"results": [hit]})
        r["feature"], r["explanation"]  # without ask= neuronpedia.org is searched
    """
    started = time.perf_counter()
    if len(query.strip()) < 3:
        raise TextError(f"query {query!r}: Neuronpedia searches for three characters or more")
    if n < 1:
        raise TextError(f"n={n}: give at least 1")
    model = m.name.rstrip("/").split("/")[-1].lower() if model is None else model
    body: dict[str, Any] = {"modelId": model, "query": query}
    if sources:
        body["layers"] = list(sources)
    path = "/api/explanation/search" + ("" if sources else "-model")
    hits: list[Any] = []
    while len(hits) < n:
        asked = body | ({"offset": len(hits)} if hits else {})
        answer = _call(path, asked, f"model {model!r} or source of it", url, timeout, ask)
        new = _list(answer, "results", must=True)
        hits += new
        if not new or not answer.get("hasMore"):
            break
    rows = []
    for hit in hits[:n]:
        if not isinstance(hit, Mapping) or not {"modelId", "layer", "index"} <= hit.keys():
            raise ServiceError(f"a search result without modelId, layer and index: {hit!r:.80}")
        cosine = hit.get("cosine_similarity")
        rows.append(
            {
                "feature": f"{hit['modelId']}/{hit['layer']}/{hit['index']}",
                "explanation": str(hit.get("description", "")),
                "similarity": None if cosine is None else round(float(cosine), 4),
            }
        )
    nan = float("nan")
    similarity = [nan if row["similarity"] is None else row["similarity"] for row in rows]
    lines = [f"{row['feature']}: {row['explanation']!r} ({row['similarity']})" for row in rows[:8]]
    return Result(
        title=f"{len(rows)} features of {model} on Neuronpedia near {query!r}",
        tensors={"similarity": torch.tensor(similarity, dtype=torch.float32)},
        dims={"similarity": ("result",)},
        rows=rows,
        lines=lines or ["nothing was found"],
        provenance=provenance(
            m, "neuronpedia.search", started, url=url, query=query, model=model, sources=sources
        ),
    )


def activations(
    m: Model,
    name: str,
    text: str,
    *,
    control: str | None = None,
    seed: int = 0,
    url: str = URL,
    timeout: float = 60.0,
    ask: Ask | None = None,
) -> Result:
    """On which tokens of this text does a feature of Neuronpedia fire?

    The model runs at Neuronpedia, not here.

    Args:
        name: as in `feature`.
        text: what is read.
        control: a text without the concept; None: the words of `text` in another order.
        seed: of that order.
        url: as in `feature`.
        timeout: as in `feature`.
        ask: as in `feature`.

    Returns:
        Result: activation [token] and activation_control [control token]. Rows: text ("text" or
        "control"), token, activation, position; those that fire. Labels: token, control token.

    Raises:
        ServiceError: as `feature`.
        TextError: an empty text, or a name that is none.

    Use when:
        An explanation is to be checked on a text of your own, and the model is too big for here.

    Not when:
        The model and its SAE are loaded: `sae.features` reads thousands of texts.

    Cost:
        two requests, each a forward pass elsewhere.

    Controls:
        the same words in another order (what still fires then fires on words, not on what is said),
        or a text of your choice.

    Paper:
        neuronpedia.org (Lin 2023)

    Example:
        from tool_packs import neuronpedia
        def ask(path, body):  # without ask= neuronpedia.org runs the model
            words = body["customText"].split()
            return {"tokens": words, "values": [7.5 * (w == "cat") for w in words]}
        r = neuronpedia.activations(m, "gpt2-small/6-res-jb/650", "the cat sat", ask=ask)
        r["token"], r["activation"]
    """
    started = time.perf_counter()
    model, source, index = _parts(name)
    if not text.strip():
        raise TextError("the text is empty: give one to read")
    if control is None:
        words = text.split()
        random.Random(seed).shuffle(words)
        control, what = " ".join(words), "its words in another order"
    else:
        what = f"{control[:40]!r}"
    got = {}
    for key, read in (("text", text), ("control", control)):
        body = {
            "feature": {"modelId": model, "source": source, "index": index},
            "customText": read,
        }
        answer = _call("/api/activation/new", body, f"feature {name}", url, timeout, ask)
        got[key] = _tokens(answer)
    rows = [
        {"text": key, "token": token, "activation": round(value, 4), "position": i}
        for key, (tokens, values) in got.items()
        for i, (token, value) in enumerate(zip(tokens, values, strict=True))
        if value > 0
    ]
    peaks = {key: max(values) for key, (_, values) in got.items()}
    tokens, values = got["text"]
    at = values.index(peaks["text"])
    lines = [
        f"peak {peaks['text']:.3g} on {tokens[at]!r}: {_marked(tokens, at)!r}; control, {what}: "
        f"peak {peaks['control']:.3g}",
        f"fires on {sum(v > 0 for v in values)} of {len(values)} tokens; control: "
        f"{sum(v > 0 for v in got['control'][1])} of {len(got['control'][1])}",
        *_other_model(m, model),
    ]
    return Result(
        title=f"feature {model}/{source}/{index} of Neuronpedia on {text[:40]!r}",
        tensors={
            "activation": torch.tensor(values, dtype=torch.float32),
            "activation_control": torch.tensor(got["control"][1], dtype=torch.float32),
        },
        dims={"activation": ("token",), "activation_control": ("control token",)},
        labels={"token": tokens, "control token": got["control"][0]},
        rows=rows,
        lines=lines,
        provenance=provenance(
            m, "neuronpedia.activations", started, seed=seed, url=url, feature=name, text=text
        ),
    )


# What comes back


def _parts(name: str) -> tuple[str, str, str]:
    """Model, source and index of a feature's name or address."""
    path = urlsplit(name).path if "://" in name else name
    match = re.fullmatch(r"/?([\w.-]+)/([\w.-]+)/(\d+)/?", path)
    if match is None:
        raise TextError(
            f"{name!r} names no feature: give MODEL/SOURCE/INDEX, as in "
            "'gemma-2-2b/20-gemmascope-res-16k/10956'"
        )
    return match[1], match[2], match[3]


def _list(answer: Any, key: str, *, must: bool = False) -> list[Any]:
    value = answer.get(key) if isinstance(answer, Mapping) else None
    if value is None and not must:
        return []
    if not isinstance(value, list):
        raise ServiceError(f"Neuronpedia's answer has no list {key!r}: it is {answer!r:.120}")
    return value


def _tokens(answer: Any) -> tuple[list[str], list[float]]:
    tokens, values = (_list(answer, key, must=True) for key in ("tokens", "values"))
    numbers = all(isinstance(v, (int, float)) for v in values)
    if not tokens or len(tokens) != len(values) or not numbers:
        raise ServiceError(
            f"Neuronpedia gave {len(tokens)} tokens and {len(values)} values: they do not match"
        )
    return [str(t) for t in tokens], [float(v) for v in values]


def _marked(tokens: Sequence[str], at: int) -> str:
    left, right = tokens[max(0, at - AROUND) : at], tokens[at + 1 : at + 1 + AROUND]
    return "".join([*left, "«", tokens[at], "»", *right])


def _other_model(m: Model, model: str) -> list[str]:
    mine = m.name.rstrip("/").split("/")[-1]
    if mine.lower() == model.lower():
        return []
    return [f"the page is of {model}, the model here is {mine}: numbers of the one need not hold"]


# Over the network


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would carry the key along to wherever it points."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _call(
    path: str, body: dict[str, Any] | None, what: str, url: str, timeout: float, ask: Ask | None
) -> Any:
    """The decoded answer to one request; `what` is named where the service does not have it."""
    if ask is not None:
        return ask(path, body)
    at = urlsplit(url)
    host = at.hostname
    if at.scheme not in ("http", "https") or not host or at.username or at.password:
        raise TextError(f"url={url!r:.80} is no address of a service, as {URL!r} is")
    near = host in LOOPBACK
    if at.scheme == "http" and not near:
        raise TextError(f"url={url!r}: use https, as a key would be sent in the clear")
    key = os.environ.get(KEY, "")
    headers = {"Accept": "application/json", "User-Agent": "seer-mcp"}
    if key:
        headers["x-api-key"] = key
    data = None
    if body is not None:
        data = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
    request = urllib.request.Request(url.rstrip("/") + path, data, headers)
    proxies = [urllib.request.ProxyHandler({})] if near else []
    opener = urllib.request.build_opener(_Stay, *proxies)
    try:
        with opener.open(request, timeout=timeout) as response:
            raw = response.read(LARGEST + 1)
            if len(raw) <= LARGEST and response.length:  # read(n) does not notice by itself
                raise http.client.IncompleteRead(raw, response.length)
    except urllib.error.HTTPError as error:
        with error:
            raise ServiceError(_refused(error, what, host, key)) from None
    except TimeoutError:
        raise ServiceError(_silent(host, timeout)) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise ServiceError(_silent(host, timeout)) from None
        raise ServiceError(
            f"{host} cannot be reached ({error.reason}): is there a network here? With ask= a "
            "request goes another way"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise ServiceError(
            f"the connection to {host} broke off ({type(error).__name__}): try again"
        ) from None
    if len(raw) > LARGEST:
        raise ServiceError(f"{host} gave more than {LARGEST >> 20} MiB for {what}")
    try:
        return json.loads(raw)
    except ValueError:
        raise ServiceError(
            f"{host} gave no JSON for {what}: {_clean(raw, key)!r}; is url= its address?"
        ) from None


def _silent(host: str, timeout: float) -> str:
    return f"{host} did not answer within {timeout:g} s: try again, or give a longer timeout="


def _refused(error: urllib.error.HTTPError, what: str, host: str, key: str) -> str:
    """One sentence for an HTTP status."""
    code = error.code
    if code == 404:
        return f"{host} has no {what} (404): look its name up at {URL}"
    if code == 429:
        wait = error.headers.get("Retry-After")
        unit = " s" if wait and wait.strip().isdigit() else ""
        when = f"try again after {wait.strip()}{unit}" if wait else "wait, up to an hour"
        return f"{host} has had too many requests (429): {when}"
    if code in (401, 403):
        state = "that it was given" if key else f"and none is set: put one in {KEY}"
        return f"{host} wants a key ({code}) {'and does not take the one ' if key else ''}{state}"
    if 300 <= code < 400:
        return f"{host} sends requests elsewhere ({code}), and a key does not go along: give url="
    try:
        said = _clean(error.read(2000), key)
    except (OSError, http.client.HTTPException):
        said = "nothing more"
    kind = "failed" if code >= 500 else "did not take the request"
    return f"{host} {kind} ({code}) for {what}: {said!r}"


def _clean(raw: bytes, key: str) -> str:
    """The beginning of an answer on one line, without the key should it be repeated there."""
    text = raw[:2000].decode("utf-8", "replace")
    text = text.replace(key, "[key]") if key else text
    return " ".join(text.split())[:160]
