"""GLoRA: a change of weight and bias in five parts, each with a form of its own (Chavan et al. 2023, arXiv 2306.07967).

    W = W0 + W0 * A + B,   b = b0 + b0 * D + E + W0 C        (* is elementwise, as in the authors' code)

    part   lora                    vector   constant   none
    A, B   (O, r) (r, I)           (O, 1)   (1)        0
    C      (I, r) (r, 1)           (I, 1)   -          0
    D, E   -                       (O)      (1)        0

The product of `lora` is Xd Xu with Xd = 0 at the start, so the model starts as the base; Xu is Xavier-uniform (peft:
Kaiming-uniform, with `peft_compat=True`). A layer without a bias has no D, and C and E only with `add_bias=True`. On a
fused linear of which some parts are asked, one set of A to E spans their rows.

A supernet owns the widest form of every part; the narrower ones are slices of it: `lora_k` the first k columns and
rows, a vector the first column, a constant the first value. Each training forward draws one form for each part of each
layer. `graft.search_glora` looks for the best, `graft.extract_glora` makes a plain adapter of it.

Shape legend: B rows, T tokens, I in, O out, S the rows of the output that change, N and M a part's sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft import roles
from graft.errors import ConfigError, SiteError
from graft.method import Build, Delta, Drawn, Method, parameter
from graft.roles import Site
from graft.weights import is_linear, weight_OI

FORMS: dict[str, tuple[str, ...]] = {
    "a": ("lora", "vector", "constant", "none"),
    "b": ("lora", "vector", "constant", "none"),
    "c": ("lora", "vector", "none"),
    "d": ("vector", "constant", "none"),
    "e": ("vector", "constant", "none"),
}
"""The forms that each part may have; `lora_k` is one of rank k."""
Genes = tuple[str, ...]
"""The forms of A, B, C, D and E at one site."""
Choices = tuple[tuple[str, ...], ...]
"""The forms that each of the five may take at one site."""


@dataclass(frozen=True, kw_only=True)
class GLoRA(Method):
    """A scale and a sum on weight and bias (Chavan et al. 2023, arXiv 2306.07967); A and B (O, I), C (I), D and E (O).

    Args:
        rank: r of the `lora` forms.
        a, b, c, d, e: the form of each part: `lora` (a, b, c; `lora_k` for a rank k below r), `vector`, `constant` (not
            c) or `none`.
        genes: the five forms, in the order A to E, by module path, where they differ from those above. In a supernet:
            the path that acts outside of training (by default the widest form of each part).
        supernet: own the widest form of each part and draw one of `choices` for each in every training forward.
        choices: for a supernet the forms of a part, by its letter; all where it is not named.
        add_bias: let C and E act on layers without a bias. The adapter adds them; it can then not be merged there.
        targets: roles, module names, or a regex as one string.
        exclude: roles or module names to leave out.

    Raises:
        ConfigError: a form that its part does not have, a rank below 1, choices without a supernet.
        SiteError: a target is no linear, genes for what is no target or has no bias, a form of C, D or E other than the
            default where no target has a bias, or no part is left that acts.
    """

    rank: int = 4
    a: str = "lora"
    b: str = "lora"
    c: str = "lora"
    d: str = "vector"
    e: str = "vector"
    genes: Mapping[str, Genes] = field(default_factory=dict)
    supernet: bool = False
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    add_bias: bool = False
    targets: tuple[str, ...] | str = ("attention.query", "attention.value")
    exclude: tuple[str, ...] | str = ()

    name: ClassVar[str] = "glora"
    place: ClassVar[str] = "linear"
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "GLORA"
    paper: ClassVar[str] = "Chavan et al. 2023, arXiv 2306.07967"
    trains: ClassVar[str] = "2 r (I + O) per linear; with a bias r (I + 1) + 2 O more"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"GLoRA: rank must be an integer of at least 1, not {self.rank!r}")
        for part in FORMS:
            object.__setattr__(self, part, self._form(part, getattr(self, part), part))
        for name in ("genes", "choices"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(each, list | tuple) for each in value.values()):
                raise ConfigError(f"GLoRA: {name} gives a list of forms for each name, not {value!r}")
        self._set("genes", {path: self._five(path, words) for path, words in self.genes.items()})
        self._set("choices", {part: self._several(part, words) for part, words in self.choices.items()})
        if self.choices and not self.supernet:
            raise ConfigError("GLoRA: choices are what a supernet draws from; set supernet=True, or a to e instead")
        if self.supernet and self._fixed() != tuple(getattr(GLoRA, part) for part in FORMS):
            raise ConfigError("GLoRA: a to e are the fixed forms; say what a supernet draws from in choices")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _fixed(self) -> Genes:
        return self.a, self.b, self.c, self.d, self.e

    def _form(self, part: str, word: object, where: str) -> str:
        """The word itself, if it is a form of the part; `lora_r` of the full rank is `lora`."""
        if isinstance(word, str) and word in FORMS[part]:
            return word
        digits = word.removeprefix("lora_") if isinstance(word, str) and word.startswith("lora_") else ""
        if "lora" in FORMS[part] and digits.isdecimal() and 1 <= int(digits) <= self.rank:
            return "lora" if int(digits) == self.rank else f"lora_{int(digits)}"
        ranks = f", or lora_k with k up to the rank {self.rank}" if "lora" in FORMS[part] else ""
        raise ConfigError(f"GLoRA: {where}: {part} is one of {', '.join(FORMS[part])}{ranks}; not {word!r}")

    def _five(self, path: str, words: tuple[str, ...]) -> Genes:
        if len(words) != len(FORMS):
            raise ConfigError(f"GLoRA: genes: {path} needs the forms of A, B, C, D and E, not {list(words)}")
        return tuple(self._form(part, word, f"genes: {path}") for part, word in zip(FORMS, words, strict=True))

    def _several(self, part: str, words: tuple[str, ...]) -> tuple[str, ...]:
        if part not in FORMS or not words:
            raise ConfigError(f"GLoRA: choices: give at least one form for {', '.join(FORMS)}; {part!r}: {list(words)}")
        return tuple(dict.fromkeys(self._form(part, word, "choices") for word in words))

    def choices_at(self, site: Site) -> Choices:
        """The forms that each part may take at a site; `none` alone for what needs a bias that is not there."""
        if self.supernet:
            wanted: Choices = tuple(self.choices.get(part, FORMS[part]) for part in FORMS)
        else:
            wanted = tuple((word,) for word in self.genes.get(site.path, self._fixed()))
        biased = _bias(site) is not None
        able = (True, True, biased or self.add_bias, biased, biased or self.add_bias)
        return tuple(words if can else ("none",) for words, can in zip(wanted, able, strict=True))

    def genes_at(self, site: Site) -> Genes:
        """The set path at a site.

        Raises:
            SiteError: `genes` says what the site cannot have.
        """
        choices = self.choices_at(site)
        genes = self.genes.get(site.path)
        if genes is None:
            return tuple(max(words, key=_width) for words in choices)
        for part, word, words in zip(FORMS, genes, choices, strict=True):
            if word not in words:
                bare = _bias(site) is None and part in "cde"
                why = "it has no bias" + ("" if part == "d" else "; set add_bias=True") if bare else "see choices"
                raise SiteError(f"genes: {site.path}: {part} cannot be {word!r} there, only {', '.join(words)} ({why})")
        return genes

    def sites(self, build: Build) -> list[Site]:
        found = super().sites(build)
        for site in found:
            if not is_linear(site.module):
                raise SiteError(f"{site.path}: GLoRA acts on linears, not {type(site.module).__name__}; exclude it")
        unknown = set(self.genes) - {site.path for site in found}
        if unknown:
            raise SiteError(f"genes: {min(unknown)!r} is none of the {len(found)} targets; give whole paths")
        if not build.peft_compat:  # peft leaves them out
            self._refuse_bare(found)
        if not _acts({site.path: self.genes_at(site) for site in found}):
            raise SiteError("GLoRA: no part would act at any target: all are none, or need a bias that no target has")
        return found

    def _refuse_bare(self, sites: list[Site]) -> None:
        """Refuse a form of C, D or E that somebody asked for and no target can have."""
        choices = [self.choices_at(site) for site in sites if self.supernet or site.path not in self.genes]
        for i, part in enumerate(FORMS):
            asked = self.choices.get(part, ("none",)) if self.supernet else (getattr(self, part),)
            usual = not self.supernet and asked == (getattr(GLoRA, part),)
            if usual or asked == ("none",) or not choices or any(words[i] != ("none",) for words in choices):
                continue
            name = f"choices: {part}" if self.supernet else part
            remedy = f"leave {part} out" + ("" if part == "d" else ", or set add_bias=True")
            raise SiteError(f"GLoRA: {name} cannot be {', '.join(asked)}: no target has a bias; {remedy}")

    def shared(self, sites: list[Site], build: Build) -> nn.Module | None:
        return Paths({site.path: self.choices_at(site) for site in sites}) if self.supernet else None

    def delta(self, site: Site, build: Build) -> Delta | None:
        genes = self.genes_at(site)
        if not self.supernet and set(genes) == {"none"}:
            return None
        parts = () if build.peft_compat else roles.parts_asked(site, self.targets)
        rows = [roles.part_rows(site, part, build.model.config) for part in parts]
        return GLoRADelta(site, self, genes, torch.cat(rows) if rows else None, build.peft_compat)


class Paths(Drawn):
    """The path of a supernet's training forward: one form for each part of each site, uniform over all that act."""

    def __init__(self, choices: dict[str, Choices]) -> None:
        super().__init__()
        self.choices = choices
        self.drawn: dict[str, Genes] | None = None

    def draw(self) -> None:
        sizes = torch.tensor([len(words) for choices in self.choices.values() for words in choices], device="cpu")
        while True:
            picks = iter((torch.randint(2**62, sizes.shape, device="cpu") % sizes).tolist())
            self.drawn = {
                path: tuple(words[next(picks)] for words in choices) for path, choices in self.choices.items()
            }
            # Where nothing acts there is nothing to train, so such a path is drawn again.
            if _acts(self.drawn) or not _acts(self.choices):
                return


class Part(nn.Module):
    """One of A to E in a form: Xd (N, k) and Xu (k, M), or X: (N, 1), (N) or (1); nothing for `none`.

    Args:
        form: what it owns; `lora` has the rank.
        shape: (N, M), or (N) for D and E.
    """

    def __init__(self, form: str, rank: int, shape: tuple[int, ...], *, like: Tensor, peft_compat: bool) -> None:
        super().__init__()
        width = _rank(form, rank)
        if width:
            self.Xd, self.Xu = parameter(shape[0], width, like=like), parameter(width, shape[1], like=like)
            if peft_compat:
                nn.init.kaiming_uniform_(self.Xu, a=math.sqrt(5))
            else:
                nn.init.xavier_uniform_(self.Xu)
        elif form == "vector":
            self.X = parameter(shape[0], *(1,) * (len(shape) - 1), like=like)
        elif form == "constant":
            self.X = parameter(1, like=like)

    def factors(self, form: str) -> tuple[Tensor, ...]:
        """The slices that make a form: () for none, (Xd (N, k), Xu (k, M)), or (X,) with X (N, 1), (N) or (1)."""
        if form == "none":
            return ()
        first = self.Xd if hasattr(self, "Xd") else self.X
        if form.startswith("lora"):
            width = _rank(form, first.shape[1])
            return first[:, :width], self.Xu[:width]
        if form == "constant":
            return (first.flatten()[:1],)
        return (first if first.dim() == 1 else first[:, :1],)


class GLoRADelta(Delta):
    """The five parts of one linear, `glora_A` to `glora_E`; `genes` is the path that acts outside of training.

    Its change is one of the base's own weight and bias, whatever other adapters act.
    """

    from_base = True

    def __init__(self, site: Site, method: GLoRA, genes: Genes, rows: Tensor | None, peft_compat: bool) -> None:
        super().__init__()
        self.site = site
        self.rows = rows
        self.genes = genes
        self.choices = method.choices_at(site)
        size = site.out_features if rows is None else len(rows)
        shapes = ((size, site.in_features), (size, site.in_features), (site.in_features, 1), (size,), (size,))
        like: Tensor = site.module.weight  # type: ignore[assignment]
        for part, words, shape in zip(FORMS, self.choices, shapes, strict=True):
            widest = max(words, key=_width)
            own = Part(widest, method.rank, shape, like=like, peft_compat=peft_compat)
            self.add_module(f"glora_{part.upper()}", own)

    @property
    def parts(self) -> list[Part]:
        """A to E."""
        return list(self.children())  # type: ignore[arg-type]

    def costs(self) -> list[dict[str, int]]:
        """For each part, how many values each of its forms trains."""
        return [
            {form: sum(t.numel() for t in part.factors(form)) for form in words}
            for part, words in zip(self.parts, self.choices, strict=True)
        ]

    def acting(self) -> Genes:
        """The path of this forward: the drawn one while it trains, else the set one."""
        drawn = getattr(self.shared, "drawn", None)
        trains = self.training and any(p.requires_grad for p in self.parameters())
        return drawn[self.site.path] if trains and drawn is not None else self.genes

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        x = x_BTI
        A, B, C, D, E = (
            tuple(t.to(x.dtype) for t in part.factors(form))
            for part, form in zip(self.parts, self.acting(), strict=True)
        )
        bias_S = self._rows_of(_bias(self.site))
        weight_SI = self._rows_of(weight_OI(self.site.module)) if len(A) == 2 or C else None
        terms: list[Tensor] = []
        if len(A) == 2 and weight_SI is not None:
            terms.append(F.linear(x, weight_SI.to(x.dtype) * (A[0] @ A[1])))
        elif A:  # a factor for each row needs no weight: it scales what the weight gave
            y_BTS = y_BTO if self.rows is None else y_BTO.index_select(-1, self.rows.to(y_BTO.device))
            terms.append(A[0].view(-1) * (y_BTS if bias_S is None else y_BTS - bias_S.to(y_BTS.dtype)))
        if len(B) == 2:
            terms.append(F.linear(F.linear(x, B[1]), B[0]))
        elif B:  # every input counts alike
            terms.append(B[0].view(-1) * x.sum(-1, keepdim=True))
        if C and weight_SI is not None:
            terms.append(F.linear(_product(C).view(1, -1), weight_SI.to(x.dtype)))
        if D and bias_S is not None:
            terms.append(D[0] * bias_S.to(x.dtype))
        terms.extend(E)
        if not terms:
            return y_BTO
        change = sum(terms[1:], terms[0]).to(y_BTO.dtype)
        if self.rows is None:
            return y_BTO + change
        wide = change.expand(*y_BTO.shape[:-1], len(self.rows))
        return y_BTO.index_add(-1, self.rows.to(y_BTO.device), wide)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B, C, D, E = (
            _product(tuple(t.float() for t in part.factors(form)))
            for part, form in zip(self.parts, self.genes, strict=True)
        )
        rows = slice(None) if self.rows is None else self.rows.to(weight_OI.device)
        own_SI = weight_OI[rows]
        new_OI = weight_OI.clone()
        new_OI[rows] = own_SI * (1 + A) + B
        if self.genes[2:] == ("none",) * 3:
            return new_OI, bias_O
        base_O = weight_OI.new_zeros(weight_OI.shape[0]) if bias_O is None else bias_O
        new_O = base_O.clone()
        new_O[rows] = base_O[rows] * (1 + D) + E
        if self.genes[2] != "none":
            new_O[rows] += (own_SI @ C).squeeze(-1)
        return new_OI, new_O

    def _rows_of(self, tensor: Tensor | None) -> Tensor | None:
        """The rows that this delta changes, of a weight (O, I) or bias (O) of the base."""
        if tensor is None or self.rows is None:
            return tensor
        return tensor.index_select(0, self.rows.to(tensor.device))


def _product(factors: tuple[Tensor, ...]) -> Tensor:
    """What a part's factors make; a zero of shape () for none."""
    if not factors:
        return torch.zeros(())
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


def _bias(site: Site) -> Tensor | None:
    return getattr(site.module, "bias", None)


def _acts(forms: Mapping[str, tuple[object, ...]]) -> bool:
    """Whether some part at some site has another form than none, or may have one."""
    return any(form not in ("none", ("none",)) for each in forms.values() for form in each)


def _rank(form: str, rank: int) -> int:
    """The rank of a form; 0 where it has none."""
    if not form.startswith("lora"):
        return 0
    return rank if form == "lora" else int(form.removeprefix("lora_"))


def _width(form: str) -> float:
    """Orders forms: each is a slice of every wider one."""
    known = {"none": 0.0, "constant": 1.0, "vector": 2.0, "lora": math.inf}
    return known[form] if form in known else 2.0 + _rank(form, 0)
