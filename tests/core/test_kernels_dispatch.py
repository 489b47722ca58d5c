"""Which path scores are taken by, what is said about it, and how the libraries are built."""

import importlib
import logging
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ep_core import kernels
from ep_core.entropy import cosine_gram, matrix_entropy
from ep_core.errors import EntropyPruneError
from ep_core.kernels import build, cpu, cuda, reference
from ep_core.kernels.interface import Kernels, Unavailable
from ep_core.kernels.reference import greedy_renyi2 as greedy_renyi2_torch
from ep_core.selectors import greedy_renyi2

Q = torch.randn(20, 8, 16, generator=torch.Generator().manual_seed(0))
MARK = torch.full((20,), 7.0)


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    """No memory of which path was found before, no setting of the one who runs the tests."""
    monkeypatch.setattr(kernels, "_found", {})
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    cpu.load.cache_clear()
    cpu.open_library.cache_clear()
    yield
    cpu.load.cache_clear()
    cpu.open_library.cache_clear()


@pytest.fixture
def marked(monkeypatch):
    """Kernels whose answers are recognised."""
    found = Kernels("marks", lambda q, normalize: MARK, lambda gram, k: torch.arange(k) + 3)
    monkeypatch.setitem(kernels._found, "cpu", found)


@pytest.mark.parametrize("normalize", ["rows", "none", "trace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fast_scores_are_the_kernels(marked, dtype, normalize):
    assert matrix_entropy(Q.to(dtype), normalize) is MARK


def test_the_greedy_set_is_the_kernels(marked):
    assert greedy_renyi2(Q.flatten(1), 4).tolist() == [3, 4, 5, 6]


def test_a_set_whose_sums_are_not_exact_is_torchs(marked, monkeypatch):
    monkeypatch.setattr(reference, "greedy_renyi2", lambda gram, k: "torch's")
    assert kernels.greedy_renyi2(torch.empty(2**13, 1), 2).tolist() == [3, 4]
    assert kernels.greedy_renyi2(torch.empty(2**13 + 1, 1), 2) == "torch's"


@pytest.mark.parametrize(
    ("q", "options"),
    [
        (Q, {"dtype": torch.float64}),
        (Q, {"compat": "released"}),
        (Q.double(), {}),
        (Q[:, :, :1].expand(20, 8, 257), {}),
        (Q[:, :1].expand(20, 65, 16), {}),
    ],
    ids=["reference", "released", "float64 queries", "wide heads", "many heads"],
)
def test_everything_else_is_torchs(marked, q, options):
    assert matrix_entropy(q, **options) is not MARK


def test_the_largest_sizes_are_the_kernels(marked):
    assert matrix_entropy(Q[:, :1, :1].expand(20, 64, 256)) is MARK


def test_without_a_library_torch_scores_and_one_line_says_so(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(build, "library", lambda variant: tmp_path / "absent.so")
    with caplog.at_level(logging.DEBUG):
        scores = matrix_entropy(Q)
        greedy_renyi2(Q.flatten(1), 4)
        matrix_entropy(Q, "none")
    torch.testing.assert_close(scores, matrix_entropy(Q, dtype=torch.float64), atol=1e-5, rtol=0)
    (line,) = caplog.messages
    assert line.startswith("cpu: torch instead of fused kernels"), line
    assert "install a C++ compiler" in line, line
    assert "install a C++ compiler" in kernels.describe("cpu")


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    if not build.library("baseline").exists():
        pytest.skip("no compiled library")
    monkeypatch.setattr(build, "digest", lambda: "others")
    with pytest.raises(Unavailable, match="was built from other sources; install"):
        cpu.load()


def test_what_is_no_library_is_a_reason_and_no_crash(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(build, "library", lambda variant: broken)
    assert kernels.describe("cpu").startswith("torch (")
    assert matrix_entropy(Q).shape == (20,)


def test_the_switch_turns_kernels_off_silently(monkeypatch, caplog):
    monkeypatch.setenv(kernels.SWITCH, "off")
    with caplog.at_level(logging.DEBUG):
        matrix_entropy(Q)
    assert not caplog.messages
    for device in ("cpu", "cuda"):
        assert kernels.describe(device) == "torch (ENTROPYPRUNE_KERNELS=off)"


def test_an_unknown_setting_of_the_switch_is_an_error(monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "fast")
    with pytest.raises(EntropyPruneError, match="ENTROPYPRUNE_KERNELS=fast: allowed is 'off'"):
        matrix_entropy(Q)


def test_without_a_cuda_device_doctor_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.describe("cuda") == "torch (no CUDA device)"


class Fake:
    """Kernels of a GPU that are right but where a test says otherwise."""

    def __init__(self):
        self.scored = []
        self.picked = []
        self.fault = lambda x: None

    def score(self, q, normalize):
        self.scored.append(tuple(q.shape))
        self.fault(q)
        return matrix_entropy(q, normalize, dtype=torch.float64)

    def pick(self, gram, k):
        self.picked.append(len(gram))
        wrong = self.fault(gram)
        return torch.arange(k) if wrong else greedy_renyi2_torch(gram, k)


@pytest.fixture
def fake(monkeypatch):
    """They are found by `cuda.load`, and asked for tensors on the CPU."""
    importlib.import_module("torch._dynamo")  # it looks into Triton, which must not be ours yet
    fake = Fake()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="0.0"))
    for name, functions in {
        "triton_scorer": SimpleNamespace(matrix_entropy=fake.score),
        "triton_greedy": SimpleNamespace(greedy_renyi2=fake.pick),
    }.items():
        monkeypatch.setitem(sys.modules, f"ep_core.kernels.{name}", functions)
        monkeypatch.setattr(kernels, name, functions, raising=False)
    monkeypatch.setitem(kernels._found, "cpu", cuda.load())
    return fake


def states(n):
    return torch.randn(n, 24, generator=torch.Generator().manual_seed(n))


def test_a_set_that_is_wrong_at_one_size_only_is_noticed_there(fake, caplog):
    fake.fault = lambda gram: len(gram) > 512
    greedy_renyi2(states(16), 4)
    assert fake.picked == [9, 16], "checked, then used"
    expected = greedy_renyi2_torch(cosine_gram(states(576)), 64)
    assert expected.tolist() != list(range(64))
    for _ in range(2):
        assert torch.equal(greedy_renyi2(states(576), 64), expected)
    assert fake.picked == [9, 16, 513], "checked once, not used"
    greedy_renyi2(states(16), 4)
    assert fake.picked[3:] == [16], "used on"
    (line,) = caplog.messages
    assert line == (
        "cpu: torch instead of a fused kernel for a greedy set of at most 1024 tokens: "
        "ArithmeticError: other picks than torch's"
    )


@pytest.mark.parametrize("normalize", ["rows", "none", "trace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [2, 8, 64])
def test_a_scorer_that_is_off_by_more_than_the_documented_bound_is_not_used(
    heads, dtype, normalize
):
    size = cuda.ScorerSize(Q.device, heads, 16, dtype, normalize)

    def off_by(error):
        def score(q, how):
            scores = matrix_entropy(q, how, dtype=torch.float64).double()
            x = q[1].double() - q[1].double().mean(dim=0)
            trace = x.square().sum() / heads
            unit = max(scores[1].abs(), trace / math.log(heads)) if how == "none" else 1
            scores[1] += error * unit
            return scores

        return score

    for error in (9e-6, -9e-6):
        size.check(off_by(error))  # docs/kernels.md: within 1e-5
    for error in (1.2e-5, -1.2e-5):
        with pytest.raises(ArithmeticError):
            size.check(off_by(error))


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 64, 576, 577, 1024, 1025])
def test_a_set_is_checked_in_its_own_block(fake, n):
    greedy_renyi2(states(n), 1)
    tried, used = fake.picked
    assert used == n
    assert max(16, 1 << (tried - 1).bit_length()) == max(16, 1 << (n - 1).bit_length())


def test_a_scorer_that_cannot_be_compiled_at_a_size_leaves_that_size_to_torch(fake, caplog):
    def fault(q):
        if q.shape[1] != 32:
            raise RuntimeError("out of resource: shared memory,\nRequired: 1, Hardware limit: 0")

    fake.fault = fault
    for heads in (28, 32, 28, 32):
        q = torch.randn(5, heads, 16, generator=torch.Generator().manual_seed(heads))
        expected = matrix_entropy(q, dtype=torch.float64)
        torch.testing.assert_close(matrix_entropy(q), expected, atol=1e-5, rtol=0)
    assert fake.scored == [(4, 28, 16), (4, 32, 16), (5, 32, 16), (5, 32, 16)]
    (line,) = caplog.messages
    assert line == (
        "cpu: torch instead of a fused kernel for 28 heads of width 16 in float32, 'rows': "
        "RuntimeError: out of resource: shared memory, Required: 1, Hardware limit: 0"
    )


def test_each_dtype_and_normalisation_is_checked_once(fake):
    for _ in range(2):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for normalize in ("rows", "none", "trace"):
                matrix_entropy(Q.to(dtype), normalize)
    assert fake.scored.count((4, 8, 16)) == 9
    assert fake.scored.count(tuple(Q.shape)) == 18


def test_a_checked_kernel_that_fails_at_other_strides_is_not_used_again(fake, caplog):
    def fault(q):
        if q.stride(2) != 1:
            raise RuntimeError("no registers")

    fake.fault = fault
    matrix_entropy(Q)
    used = len(fake.scored)
    strided = Q.mT.contiguous().mT
    for _ in range(2):
        torch.testing.assert_close(matrix_entropy(strided), matrix_entropy(Q), atol=1e-5, rtol=0)
    assert len(fake.scored) == used + 1
    (line,) = caplog.messages
    assert "no registers" in line


def test_doctor_tries_usual_sizes(fake, monkeypatch, caplog):
    found = cuda.load()
    on_cpu = replace(found, failures=lambda: cuda.failures(fake.score, fake.pick, Q.device))
    monkeypatch.setattr(cuda, "load", lambda: on_cpu)
    checked = "Triton 0.0, each size checked at its first use"
    assert kernels.describe("cuda").startswith(f"{checked} (bfloat16, float16 and float32")
    fake.fault = lambda x: x.ndim == 2
    assert kernels.describe("cuda") == (
        "torch in part (a greedy set of at most 1024 tokens: ArithmeticError: other "
        f"picks than torch's), else {checked}"
    )
    assert not caplog.messages


def test_importing_the_package_loads_no_kernel():
    code = (
        "import sys, ep_core, ep_core.selectors\n"
        "late = {f'ep_core.kernels.{m}' for m in ('cpu', 'cuda', 'triton_scorer')} | {'triton'}\n"
        "assert not late & set(sys.modules)\n"
        "import torch; assert not hasattr(torch.ops.entropyprune, 'matrix_entropy')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_no_library_holds_instructions_of_a_larger_set(variant):
    library, objdump = build.library(variant), shutil.which("objdump")
    if objdump is None or not library.exists():
        pytest.skip("needs objdump and the compiled library")
    foreign = {"baseline": ("%ymm", "%zmm"), "AVX2": ("%zmm", "%k1"), "AVX-512": ()}[variant]
    code = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    ).stdout
    found = [line for line in code.splitlines() if any(name in line for name in foreign)]
    assert not found, f"{len(found)} instructions such as {found[:1]}"


def test_without_a_compiler_nothing_is_built(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        build.compile_all(tmp_path / "lib")


def test_a_compiler_that_fails_says_what_it_said(monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match="out of luck"):
        build.compile_all(tmp_path / "lib")


def test_a_compiler_without_an_instruction_set_builds_the_others(monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *avx512*) exit 1;; esac\n'
        'while [ "$1" != -o ]; do shift; done\ntouch "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    made = build.compile_all(tmp_path / "lib")
    assert [path.name for path in made] == [
        "libentropyprune-baseline.so",
        "libentropyprune-avx2.so",
    ]


def test_the_digest_follows_every_source(monkeypatch, tmp_path):
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    before = build.digest()
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build.digest() == before
    for path in sources.iterdir():
        with path.open("a") as file:
            file.write("\n")
        assert build.digest() != before, f"{path.name} does not count"
        before = build.digest()
