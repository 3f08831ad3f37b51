"""A copy of a model's folder that does not say which model it is.

Runs on this machine, and as a program on one that has the model on a volume: one file for any
Python from 3.9, standard library only. Names are taken out of configurations, tokenizers, templates
and the heads of weight files; what loading does not need (cards, code, training arguments, caches)
is left out. Weights are linked where they can be, so a copy costs no time and no room.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

FORMAT = "1"  # of copies: another one makes them anew
LEAST = 5  # characters of a name that is looked for by itself
LONG = 8  # characters of one that is looked for in a vocabulary as well
HEADER = 100_000_000  # bytes of the head of a safetensors file, at most
BLOCK = 1 << 22

CONFIGS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
TEXTS = ("chat_template.jinja",)
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
USUAL = (
    "model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
)
WEIGHTS = re.compile(r".*\.safetensors|(?:pytorch|adapter)_model.*\.bin")
INDEX = re.compile(r".*\.(?:safetensors|bin)\.index\.json")
# Keys whose value is a name or a place, whatever it is.
NAMING = (
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "revision",
    "auto_map",
    "auto_mapping",
    "custom_pipelines",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "special_tokens_map_file",
    "transformers_version",
)
# What loading goes by: never changed, and part of what cannot be hidden.
STRUCTURE = (
    "model_type",
    "architectures",
    "tokenizer_class",
    "peft_type",
    "task_type",
    "processor_class",
    "backend",
)


class NotHidden(Exception):
    """This folder cannot be made nameless; the sentence says why, without a name in it."""


def parts(name: str) -> list[str]:
    """Owner and repository of a hub id, which say as much as the whole; of a path nothing but the whole."""
    owner, slash, rest = name.partition("/")
    if not slash or "/" in rest or not owner or owner.startswith((".", "~")):
        return []
    return [owner, *rest.split("@")[:1]]


def spelled(names: Iterable[str]) -> list[str]:
    """The texts to look for, the longest first: whole names, their parts, the hub cache's spelling."""
    found: set[str] = set()
    for name in names:
        whole = name.strip().rstrip("/")
        found |= {whole, *parts(whole)}
        if parts(whole):
            found.add(whole.replace("/", "--"))
    kept = {name.lower() for name in found if len(name) >= LEAST}
    return sorted(kept, key=lambda name: (-len(name), name))


def pattern(spellings: Iterable[str]) -> re.Pattern[str] | None:
    """Finds them in any case, where they are not a part of a longer word."""
    each = [re.escape(spelling) for spelling in spellings]
    if not each:
        return None
    return re.compile(rf"(?<![a-z0-9])(?:{'|'.join(each)})(?![a-z0-9])", re.IGNORECASE)


class Staging:
    """One model of a folder `source`, copied to `target`; `alias` stands where names stood."""

    def __init__(self, source: str, target: str, names: Iterable[str], alias: str) -> None:
        self.source, self.target, self.alias = source, target, alias
        spellings = self.spellings = spelled(names)
        self.any = pattern(spellings)
        self.long = pattern(s for s in spellings if len(s) >= LONG)
        self.replaced = 0
        """Places in files at which a name stood."""
        self.left_out: list[str] = []

    def make(self) -> dict[str, Any]:
        """Copy; what came of it. Raises NotHidden, and leaves no copy then."""
        part = self.target + ".part"
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        try:
            files = self._copy(part)
            shutil.rmtree(self.target, ignore_errors=True)
            os.replace(part, self.target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return {
            "alias": self.alias,
            "format": FORMAT,
            "files": files,
            "replaced": self.replaced,
            "left_out": len(self.left_out),
        }

    def _copy(self, part: str) -> dict[str, str]:
        added = self._added_tokens()
        names = sorted(os.listdir(self.source))
        shards = self._shards([name for name in names if WEIGHTS.fullmatch(name)])
        files: dict[str, str] = {}
        for name in names:
            here = os.path.join(self.source, name)
            if not os.path.isfile(here):
                self.left_out.append(name)
            elif name in shards:
                there = os.path.join(part, shards[name])
                self._weights(here, there)
                files[shards[name]] = digest(there)
            elif name in CONFIGS or name in TEXTS or name in VOCABULARIES or INDEX.fullmatch(name):
                there = os.path.join(part, neutral_index(name))
                self._text(name, here, there, added, shards)
                files[os.path.basename(there)] = digest(there)
            else:
                self.left_out.append(name)
        return files

    def _shards(self, names: list[str]) -> dict[str, str]:
        """What weight files are called in the copy: as transformers and PEFT expect it."""
        shards: dict[str, str] = {}
        for kind in USUAL:
            stem, _, end = kind.rpartition(".")
            usual = re.compile(rf"{re.escape(stem)}(?:-\d+-of-\d+)?\.{end}")
            shards.update({name: name for name in names if usual.fullmatch(name)})
        others = [name for name in names if name not in shards]
        for number, name in enumerate(others, 1):  # an index names them
            end = name.rpartition(".")[2]
            shards[name] = f"model-{number:05d}-of-{len(others):05d}.{end}"
        return shards

    # -- texts --------------------------------------------------------------------------------

    def clean(self, text: str, which: re.Pattern[str] | None = None) -> str:
        which = which or self.any
        if which is None:
            return text
        text, count = which.subn(self.alias, text)
        self.replaced += count
        return text

    def _mentioned(self, path: str) -> bool:
        """Whether any of the names stands in a file, perhaps within a word."""
        with open(path, "rb") as file:
            text = file.read().decode("utf-8", "replace").lower()
        return any(spelling in text for spelling in self.spellings)

    def _added_tokens(self) -> set[str]:
        """Tokens with a name in them that are not part of the vocabulary of ordinary text."""
        found: set[str] = set()
        path = os.path.join(self.source, "tokenizer.json")
        if os.path.isfile(path) and self._mentioned(path):
            tokenizer = read_json(path)
            found.update(
                str(token.get("content", "")) for token in tokenizer.get("added_tokens", ())
            )
        return {token for token in found if self.any and self.any.search(token)}

    def _text(
        self, name: str, here: str, there: str, added: set[str], shards: dict[str, str]
    ) -> None:
        if name in VOCABULARIES and not self._mentioned(here):
            shutil.copyfile(here, there)  # these are large: the quick look is all that they get
            return
        if INDEX.fullmatch(name):
            index = read_json(here)
            held = {k: shards.get(os.path.basename(v), v) for k, v in index["weight_map"].items()}
            size = index.get("metadata", {}).get("total_size", 0)
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": held})
            write(there, text)
        elif name == "tokenizer.json":
            self._tokenizer(here, there, added)
        elif name in CONFIGS:
            write(there, json.dumps(self.value(read_json(here)), indent=2, ensure_ascii=False))
        elif name in TEXTS:
            with open(here, encoding="utf-8") as file:
                write(there, self.clean(file.read()))
        else:
            with open(here, "rb") as file:
                data = file.read()
            write_bytes(there, self._same_length(data, binary=name.endswith(".model")))
        self._verify(name, there, self.long if name in VOCABULARIES else self.any)

    def value(self, value: Any, key: str = "") -> Any:
        """JSON without names: keys that only name something go, all other texts are cleaned."""
        if key in STRUCTURE:
            return value
        if isinstance(value, dict):
            held = {
                self.clean(str(k)): self.value(v, str(k))
                for k, v in value.items()
                if k not in NAMING
            }
            if "base_model_name_or_path" in held:
                held["base_model_name_or_path"] = base_alias(self.alias)
            return held
        if isinstance(value, list):
            return [self.value(each) for each in value]
        return self.clean(value) if isinstance(value, str) else value

    def _tokenizer(self, here: str, there: str, added: set[str]) -> None:
        """Names go from everything but ordinary tokens, which the text of the world is made of."""
        tokenizer = read_json(here)
        model = tokenizer.pop("model", {})
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict) and added:
            model["vocab"] = {self.clean(t) if t in added else t: i for t, i in vocabulary.items()}
        elif isinstance(vocabulary, list) and added:
            model["vocab"] = [
                [self.clean(p[0]), *p[1:]] if p[0] in added else p for p in vocabulary
            ]
        cleaned = {key: self.value(value) for key, value in tokenizer.items()}
        # With nothing to take out, byte for byte the same: some loaders are particular about spacing.
        if added or cleaned != tokenizer:
            write(there, json.dumps({**cleaned, "model": model}, ensure_ascii=False))
        else:
            shutil.copyfile(here, there)

    def _same_length(self, data: bytes, binary: bool) -> bytes:
        """A vocabulary file: only whole names go, and every other byte stays where it is."""
        if self.long is None:
            return data
        if not binary:
            text = self.clean(data.decode("utf-8", "surrogateescape"), self.long)
            return text.encode("utf-8", "surrogateescape")
        text, count = self.long.subn(lambda m: "x" * len(m.group()), data.decode("latin-1"))
        self.replaced += count
        return text.encode("latin-1")

    # -- weights ------------------------------------------------------------------------------

    def _weights(self, here: str, there: str) -> None:
        if not here.endswith(".safetensors"):
            self._no_name_in(here)
            link_or_copy(here, there)
            return
        size, header = head_of(here)
        kept = header.get("__metadata__")
        told = {"format": kept["format"]} if isinstance(kept, dict) and "format" in kept else None
        tensors = {key: value for key, value in header.items() if key != "__metadata__"}
        if self.any and self.any.search("\n".join(tensors)):
            raise NotHidden("its weights have a name in the names of their tensors")
        if kept is None or kept == told:
            link_or_copy(here, there)
            return
        self.replaced += len(kept) - len(told or {})
        new = json.dumps(
            {**({"__metadata__": told} if told else {}), **tensors}, separators=(",", ":")
        )
        shutil.copyfile(here, there)
        data = new.encode()
        if len(data) > size:
            raise NotHidden("the head of its weights could not be written anew")
        with open(there, "r+b") as file:
            file.seek(8)
            file.write(data.ljust(size))

    def _no_name_in(self, path: str) -> None:
        """A pickle can hold anything, and cannot be rewritten without being run."""
        if self.long is None:
            return
        before = ""
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                text = before + block.decode("latin-1")
                if self.long.search(text):
                    raise NotHidden("a pickle of weights (*.bin) holds its name; use safetensors")
                before = text[-200:]

    def _verify(self, name: str, path: str, which: re.Pattern[str] | None) -> None:
        if which is None:
            return
        with open(path, "rb") as file:
            data = file.read()
        kept = data.decode("utf-8", "replace")
        for key in STRUCTURE if name in CONFIGS else ():
            kept = re.sub(rf'"{key}": (?:"[^"]*"|\[[^\]]*\])', "", kept)
        if which.search(kept):
            raise NotHidden(f"a name is left in {name if name in KNOWN else 'a file'} of its copy")


KNOWN = {*CONFIGS, *TEXTS, *VOCABULARIES}


def base_alias(alias: str) -> str:
    """What an adapter's base is called: `model_1` and its parts have the base `model_1_base`."""
    return "_".join(alias.split("_")[:2]) + "_base"


def neutral_index(name: str) -> str:
    """Indexes are called as their shards are."""
    if not INDEX.fullmatch(name):
        return name
    kind = name.split(".")[-3]
    return f"{'pytorch_model' if kind == 'bin' else 'model'}.{kind}.index.json"


def names_in(folder: str) -> list[str]:
    """Names of models that the configurations of a folder tell."""
    found: list[str] = []
    for name in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            config = read_json(path)
            for key in ("_name_or_path", "name_or_path", "base_model_name_or_path"):
                value = config.get(key)
                if isinstance(value, str) and ("/" in value or ":" in value):
                    found.append(value)
    return found


def head_of(path: str) -> tuple[int, dict[str, Any]]:
    """The length of the head of a safetensors file, and what it says. Raises NotHidden."""
    with open(path, "rb") as file:
        first = file.read(8)
        size = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= size <= HEADER:
            raise NotHidden("a file of its weights is no safetensors file")
        try:
            header = json.loads(file.read(size))
        except ValueError:
            raise NotHidden("a file of its weights is no safetensors file") from None
    if not isinstance(header, dict):
        raise NotHidden("a file of its weights is no safetensors file")
    return size, header


def digest(path: str) -> str:
    """Of a whole file; of weights only size and head, as reading all of them would take minutes."""
    total = hashlib.sha256()
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if WEIGHTS.fullmatch(os.path.basename(path)):
            head = file.read(8)
            length = (
                struct.unpack("<Q", head)[0] if len(head) == 8 and path.endswith("s") else BLOCK
            )
            total.update(head + file.read(min(length, HEADER)))
        else:
            for block in iter(lambda: file.read(BLOCK), b""):
                total.update(block)
    return f"{size}:{total.hexdigest()[:32]}"


def read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise NotHidden(f"{os.path.basename(path)} is no JSON object")
    return value


def write(path: str, text: str) -> None:
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_bytes(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def link_or_copy(here: str, there: str) -> None:
    try:
        os.link(os.path.realpath(here), there)
    except OSError:  # another disk, or one without links
        shutil.copyfile(here, there)


def main(read: Callable[[], str] = lambda: sys.argv[1]) -> None:
    """{"source", "target", "names", "alias", "sync"} as its argument; {"done"} or {"failed"} on stdout.

    Names that the source tells of itself are taken out as well. A file beside the target holds what
    came of it; it is written last. `sync`: a folder whose files must be on their disk then.
    """
    asked = json.loads(read())
    try:
        source, target = asked["source"], asked["target"]
        told = names_in(source)
        made = Staging(source, target, [*asked["names"], *told], asked["alias"]).make()
        write(f"{target}.json", json.dumps({**made, "names": told}))
        if asked.get("sync"):
            subprocess.run(["sync", asked["sync"]], check=True)
        answer = {"done": target}
    except NotHidden as error:
        answer = {"failed": "not_hidden", "error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
