"""The stored cases of level 1, and the script that makes them.

    python -m ep_conformance.selection_cases     writes cases/selection.*

Each case is a prompt's tensor, its spans, tokens kept of each, and the kept indices by the
oracle's literal selection. The choice is robust: noise of 1e-5 of the tensor's scale does not
move it (exact ties aside), so that kernels may differ in rounding but not in rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ep_conformance.oracle import keep_best, keep_set, token_score

FOLDER = Path(__file__).parent / "cases"
SCORES = ("released", "rows", "trace")
NOISE = 1e-5


@dataclass(frozen=True)
class SelectionCase:
    """One level-1 case.

    Attributes:
        name: says what it is about.
        method: the selector.
        tensor: name of the stored tensor: `[T, H, D]` queries, or `[T, d]` for set-entropy.
        spans: `[start, stop)` of each picture among the T tokens.
        keep: tokens kept of each.
        kept: the expected indices of each, relative to its start.
    """

    name: str
    method: str
    tensor: str
    spans: tuple[tuple[int, int], ...]
    keep: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]


@cache
def stored_tensors() -> dict[str, torch.Tensor]:
    """The stored tensors by name."""
    return load_file(FOLDER / "selection.safetensors")


def stored_cases() -> list[SelectionCase]:
    """The stored cases in order."""
    return [
        SelectionCase(
            case["name"],
            case["method"],
            case["tensor"],
            tuple(map(tuple, case["spans"])),
            tuple(case["keep"]),
            tuple(map(tuple, case["kept"])),
        )
        for case in json.loads((FOLDER / "selection.json").read_text())
    ]


@dataclass(frozen=True)
class Recipe:
    """How a tensor and its cases are made.

    Attributes:
        name: of the tensor; cases append their method.
        methods, spans, keep: as in the cases.
        candidates: tensors to try in turn until one is fit.
        ties: exact ties are meant, so noise may move the choice.
        close: the choice must be so close that a TF32 matrix product moves it.
    """

    name: str
    methods: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    keep: tuple[int, ...]
    candidates: Iterator[torch.Tensor]
    ties: bool = False
    close: bool = False

    def is_fit(self, tensor: torch.Tensor, case: SelectionCase) -> bool:
        """Is this candidate's choice as robust, and as close, as it should be?"""
        if self.close:
            coarse = expected(tf32_rounded(tensor), case.method, case.spans, case.keep)
            return coarse != case.kept and _is_robust(tensor, case, NOISE / 100)
        return self.ties or _is_robust(tensor, case, NOISE)


def make() -> tuple[dict[str, torch.Tensor], list[SelectionCase]]:
    """All tensors and cases, from fixed seeds."""
    tensors: dict[str, torch.Tensor] = {}
    cases: list[SelectionCase] = []
    for recipe in _recipes():
        for tensor in recipe.candidates:
            made = []
            for method in recipe.methods:
                kept = expected(tensor, method, recipe.spans, recipe.keep)
                name = f"{recipe.name}-{method}"
                made.append(
                    SelectionCase(name, method, recipe.name, recipe.spans, recipe.keep, kept)
                )
            if all(recipe.is_fit(tensor, case) for case in made):
                tensors[recipe.name] = tensor
                cases += made
                break
        else:
            raise RuntimeError(f"no seed gives a fit case {recipe.name!r}")
    return tensors, cases


def tf32_rounded(queries: torch.Tensor) -> torch.Tensor:
    """Centred queries as a TF32 matrix product reads them: 10 bits of mantissa."""
    centred = queries.float() - queries.float().mean(dim=1, keepdim=True)
    bits = centred.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def expected(
    tensor: torch.Tensor, method: str, spans: Sequence[tuple[int, int]], keep: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """The oracle's choice for each span."""
    own = scores(tensor, method, spans)
    if own is None:
        values = tensor.double().numpy()
        return tuple(tuple(keep_set(values[a:b], k)) for (a, b), k in zip(spans, keep, strict=True))
    return tuple(tuple(keep_best(each, k)) for each, k in zip(own, keep, strict=True))


def scores(
    tensor: torch.Tensor, method: str, spans: Sequence[tuple[int, int]]
) -> list[list[float]] | None:
    """The oracle's scores of each span's tokens; a set selection has none."""
    if method == "set-entropy":
        return None
    values = tensor.double().numpy()
    return [[token_score(values[t], method) for t in range(a, b)] for a, b in spans]


def _is_robust(tensor: torch.Tensor, case: SelectionCase, scale: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        shaken = tensor.double() * (1 + scale * noise)
        if expected(shaken, case.method, case.spans, case.keep) != case.kept:
            return False
    return True


def _recipes() -> Iterator[Recipe]:
    """Every tensor of the suite."""
    one, odd = ((0, 24),), ((3, 27),)
    three = ((1, 14), (17, 41), (46, 53))  # kept in other shares than one budget over all would
    shapes = [
        (8, 32, "bfloat16"),
        (8, 128, "float16"),
        (9, 64, "float32"),
        (16, 80, "float16"),
        (28, 128, "bfloat16"),
        (32, 128, "bfloat16"),
        (32, 128, "float32"),
        (40, 256, "float16"),
    ]
    for heads, dim, dtype in shapes:
        name = f"heads{heads}x{dim}-{dtype}"
        yield Recipe(name, SCORES, odd, (8,), _queries(27, heads, dim, dtype))
    yield Recipe("three-pictures", SCORES, three, (7, 4, 2), _queries(56, 8, 32, "bfloat16"))
    yield Recipe("keep-one", SCORES, one, (1,), _queries(24, 8, 32, "bfloat16"))
    yield Recipe("keep-all", SCORES, one, (24,), _queries(24, 8, 32, "bfloat16"))
    yield Recipe("one-token-spans", SCORES, ((0, 1), (2, 3)), (1, 1), _queries(4, 8, 32, "float32"))
    yield Recipe("all-alike", SCORES, odd, (7,), _alike(_queries(27, 8, 32, "bfloat16")), ties=True)
    yield Recipe(
        "identical-patches",
        SCORES,
        one,
        (9,),
        _repeated(_queries(24, 8, 32, "bfloat16")),
        ties=True,
    )
    yield Recipe(
        "zero-tokens",
        SCORES,
        one,
        (9,),
        _zeroed(_queries(24, 8, 32, "float16")),
        ties=True,
    )
    yield Recipe(
        "non-finite", SCORES, odd, (22,), _broken(_queries(27, 8, 32, "bfloat16")), ties=True
    )
    yield Recipe("close-calls", ("rows",), ((0, 192),), (96,), _even(192, 16, 64), close=True)

    set_only = ("set-entropy",)
    for width, dtype in ((64, "bfloat16"), (256, "float32"), (96, "float16")):
        yield Recipe(f"set-{width}-{dtype}", set_only, odd, (8,), _hidden(27, width, dtype))
    yield Recipe("set-three-pictures", set_only, three, (7, 4, 2), _hidden(56, 64, "bfloat16"))
    yield Recipe("set-keep-one", set_only, one, (1,), _hidden(24, 64, "bfloat16"))
    yield Recipe("set-keep-all", set_only, one, (24,), _hidden(24, 64, "bfloat16"))
    yield Recipe(
        "set-all-alike", set_only, odd, (7,), _alike(_hidden(27, 64, "bfloat16")), ties=True
    )
    yield Recipe(
        "set-identical-patches",
        set_only,
        one,
        (9,),
        _repeated(_hidden(24, 64, "bfloat16")),
        ties=True,
    )
    yield Recipe(
        "set-zero-tokens", set_only, one, (22,), _zeroed(_hidden(24, 64, "float16")), ties=True
    )
    yield Recipe(
        "set-non-finite", set_only, odd, (22,), _broken(_hidden(27, 64, "bfloat16")), ties=True
    )


def _queries(tokens: int, heads: int, dim: int, dtype: str) -> Iterator[torch.Tensor]:
    """Heads that share a direction by a degree that varies from token to token."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        own = torch.randn(tokens, heads, dim, generator=generator)
        common = torch.randn(tokens, 1, dim, generator=generator)
        sign = torch.randn(tokens, heads, 1, generator=generator)
        degree = 2 * torch.rand(tokens, 1, 1, generator=generator)
        decay = torch.linspace(1, 0.1, dim)
        yield ((own + degree * sign * common) * decay).to(getattr(torch, dtype))


def _even(tokens: int, heads: int, dim: int) -> Iterator[torch.Tensor]:
    """Tokens of one kind, whose scores lie close together."""
    for seed in range(500):
        generator = torch.Generator().manual_seed(seed)
        yield torch.randn(tokens, heads, dim, generator=generator)


def _hidden(tokens: int, width: int, dtype: str) -> Iterator[torch.Tensor]:
    """A few directions, each token near one of them."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(1000 + seed)
        centres = torch.randn(6, width, generator=generator)
        nearest = torch.randint(6, (tokens,), generator=generator)
        own = torch.randn(tokens, width, generator=generator)
        yield (centres[nearest] + 0.5 * own).to(getattr(torch, dtype))


def _alike(tensors: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        yield tensor[:1].expand_as(tensor).contiguous()


def _repeated(tensors: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Every token four times, spread over the span: the threshold falls among equals."""
    for tensor in tensors:
        distinct = tensor[: len(tensor) // 4]
        yield distinct.repeat(4, *[1] * (tensor.ndim - 1))


def _zeroed(tensors: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        tensor[[2, 5, 11]] = 0
        yield tensor


def _broken(tensors: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Three tokens hold one bad number each; keeping 22 of 24 must take one of them."""
    for tensor in tensors:
        tensor[4].view(-1)[3] = float("nan")
        tensor[9].view(-1)[0] = float("inf")
        tensor[20].view(-1)[7] = float("-inf")
        yield tensor


def main() -> None:
    """Write the tensors and cases."""
    tensors, cases = make()
    FOLDER.mkdir(exist_ok=True)
    save_file(tensors, FOLDER / "selection.safetensors")
    text = ",\n".join(json.dumps(asdict(case)) for case in cases)
    (FOLDER / "selection.json").write_text(f"[\n{text}\n]\n")
    print(f"{len(cases)} cases over {len(tensors)} tensors")


if __name__ == "__main__":
    main()
