"""The mixing operation against the naive expression, and its random draws against closed forms."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manifold_mixup import Partner, interpolate
from manifold_mixup.errors import BatchMismatch, PairingError
from manifold_mixup.interpolation import Plan, apply_traced
from manifold_mixup.pairing import draw_lam, draw_partner


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive(h: Tensor, partner: Partner, lam: float | Tensor) -> Tensor:
    weight = lam.reshape(-1, *[1] * (h.dim() - 1)) if isinstance(lam, Tensor) and lam.dim() else lam
    return weight * h[: partner.rows_out] + (1 - weight) * h[partner.indices]


def partner_of(kind: str, n: int, seed: int) -> Partner:
    if kind == "with repeats":
        index = torch.randint(max(n, 1), (n,), generator=generator(seed))
        return draw_partner(lambda y, g: index, n, generator())
    return draw_partner(kind, n, generator(seed), matching=False)


KINDS = ["random", "halves", "two-batches", "with repeats"]


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(0, 9),
    tail=st.lists(st.integers(0, 4), max_size=3),
    per_example=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_values_and_gradients_of_every_size_equal_the_naive_expression(kind, n, tail, per_example, seed):
    n += kind == "two-batches" and n % 2
    partner = partner_of(kind, n, seed)
    torch.manual_seed(seed)
    h = torch.randn(n, *tail, dtype=torch.float64, requires_grad=True)
    lam = torch.rand(partner.rows_out, dtype=torch.float64) if per_example else float(torch.rand(()))
    out, expected = interpolate(h, partner, lam), naive(h, partner, lam)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(out)
    (mine,), (reference,) = (torch.autograd.grad(o, h, grad) for o in (out, expected))
    torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


# Forward-mode differentiation makes torch script some of its own decompositions.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_example", [False, True])
def test_derivatives_of_second_order(kind, per_example):
    partner = partner_of(kind, 4, 2)
    lam = torch.rand(partner.rows_out, dtype=torch.float64) if per_example else 0.3
    h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: interpolate(t, partner, lam), h, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda t: interpolate(t, partner, lam), h)


def test_gradient_penalty_through_mixing_equals_the_naive_one():
    partner = partner_of("random", 5, 3)
    h = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    penalties = []
    for mix in (interpolate, naive):
        (slope,) = torch.autograd.grad(mix(h, partner, 0.3).pow(3).sum(), h, create_graph=True)
        penalties.append(torch.autograd.grad(slope.pow(2).sum(), h)[0])
    torch.testing.assert_close(*penalties)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("size", [(4, 3, 5, 5), (4, 16, 16, 16)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtype_and_memory_format_are_kept(dtype, kind, per_example, size, channels_last):
    partner = partner_of(kind, 4, 4)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    h = torch.randn(size, dtype=dtype).to(memory_format=layout).requires_grad_()
    lam = torch.rand(partner.rows_out) if per_example else 0.3
    out = interpolate(h, partner, lam)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.to(wide), naive(h.to(wide), partner, lam), rtol=2 * eps, atol=4 * eps)
    (grad,) = torch.autograd.grad(out, h, torch.ones_like(out))
    assert grad.dtype == dtype
    assert grad.shape == h.shape


def test_lam_per_example_is_not_rounded_to_half_precision():
    h = torch.zeros(2, 4, dtype=torch.bfloat16)
    h[0] = 1020.0
    out = interpolate(h, [1, 0], torch.tensor([0.5057, 0.5]))
    assert out[0, 0].item() == 516.0  # of 515.8; bfloat16 has steps of 4 here
    assert round(float(torch.tensor(0.5057).bfloat16()) * 1020 / 4) * 4 == 512  # what a rounded λ would give


def test_lam_that_requires_grad_gets_its_gradient():
    h = torch.randn(4, 3, dtype=torch.float64)
    lam = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: interpolate(h, [2, 0, 3, 1], w), lam)


def test_another_dimension_can_hold_the_batch():
    h = torch.randn(3, 5, 2)
    expected = 0.3 * h + 0.7 * h[:, [4, 3, 2, 1, 0]]
    torch.testing.assert_close(interpolate(h, [4, 3, 2, 1, 0], 0.3, dim=1), expected)


def test_the_operand_is_never_written_to():
    for kind in KINDS:
        h = torch.randn(4, 3)
        before = h.clone()
        interpolate(h, partner_of(kind, 4, 0), 0.3)
        assert torch.equal(h, before)


@pytest.mark.parametrize("per_example", [False, True])
def test_autograd_keeps_no_activation(per_example):
    saved = []
    h = torch.randn(4, 100, requires_grad=True)
    lam = torch.rand(4) if per_example else 0.3
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        interpolate(h, [1, 0, 3, 2], lam)
    assert all(not t.is_floating_point() or t.numel() <= 4 for t in saved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_example", [False, True])
def test_the_form_for_the_compiler_is_the_same_map(kind, per_example):
    partner = partner_of(kind, 6, 5)
    h = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    lam = torch.rand(partner.rows_out if per_example else (), dtype=torch.float64)
    inverse = partner.turned.indices.clone() if partner.kind in ("shift", "permutation") else None
    out = apply_traced(h, partner.kind, partner.indices, inverse, lam)
    expected = interpolate(h, partner, lam)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(out)
    (a,), (b,) = (torch.autograd.grad(o, h, grad) for o in (out, expected))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_transpose_is_the_transpose():
    for kind in KINDS:
        partner = partner_of(kind, 6, 6)
        plan = Plan.mix(partner, torch.rand(partner.rows_out, dtype=torch.float64))
        forward = plan.run(torch.eye(6, dtype=torch.float64))
        backward = plan.transpose().run(torch.eye(partner.rows_out, dtype=torch.float64))
        torch.testing.assert_close(forward.T, backward)


BAD = [
    (torch.zeros(3, 2, dtype=torch.int64), [0, 1, 2], 0.5, TypeError, "int64"),
    (torch.zeros(3, 2), [0, 1], 0.5, PairingError, "3 partner indices"),
    (torch.zeros(3, 2), [0, 1, 3], 0.5, PairingError, r"\[0, 3\)"),
    (torch.zeros(3, 2), [0.0, 1.0, 2.0], 0.5, PairingError, "integers"),
    (torch.zeros(3, 2), [0, 1, 2], 1.5, ValueError, "1.5"),
    (torch.zeros(3, 2), [0, 1, 2], float("nan"), ValueError, "nan"),
    (torch.zeros(3, 2), [0, 1, 2], torch.tensor([0.5, 0.5]), BatchMismatch, "3"),
    (torch.zeros(3, 2), Partner("shift", 4, shift=2), 0.5, BatchMismatch, "4 rows"),
]


@pytest.mark.parametrize(("h", "partner", "lam", "error", "text"), BAD)
def test_bad_input_is_named(h, partner, lam, error, text):
    with pytest.raises(error, match=text):
        interpolate(h, partner, lam)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_lam_follows_the_beta_law(alpha):
    lam = draw_lam(alpha, generator(), 10_000)
    variance = 1 / (4 * (2 * alpha + 1))
    # Standard errors of mean and variance over 10,000 draws; 4 of them.
    assert abs(lam.mean().item() - 0.5) < 4 * (variance / 10_000) ** 0.5
    kurtosis = scipy.stats.beta(alpha, alpha).stats("k").item() + 3
    assert abs(lam.var().item() - variance) < 4 * variance * ((kurtosis - 1) / 10_000) ** 0.5
    assert scipy.stats.kstest(lam.numpy(), scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_small_alpha_gives_zeros_and_ones_and_never_nan():
    lam = draw_lam(1e-4, generator(), 2_000)
    assert not lam.isnan().any()
    assert ((lam < 1e-6) | (lam > 1 - 1e-6)).double().mean() > 0.99
    assert 0.45 < lam.mean() < 0.55


def test_alpha_zero_is_no_mixing():
    assert torch.equal(draw_lam(0.0, generator(), 3), torch.ones(3, dtype=torch.float64))


def test_permutations_are_uniform():
    counts: dict[tuple[int, ...], int] = {}
    g = generator()
    for _ in range(2_400):
        key = tuple(draw_partner("random", 4, g).indices.tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 24
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("n", [0, 1, 2, 3, 6, 7])
def test_matchings_are_mutual_and_leave_one_alone_where_odd(n):
    for pairing in ("random", "halves"):
        partner = draw_partner(pairing, n, generator(), matching=True)
        assert partner.is_matching
        assert int((partner.indices == torch.arange(n)).sum()) == n % 2


def test_matchings_are_uniform():
    g = generator()
    counts = [0, 0, 0, 0]
    for _ in range(3_000):
        counts[int(draw_partner("random", 4, g, matching=True).indices[0])] += 1
    assert counts[0] == 0
    assert scipy.stats.chisquare(counts[1:]).pvalue > 1e-3


def test_halves_pairs_i_with_i_plus_half():
    assert draw_partner("halves", 6, generator()).indices.tolist() == [3, 4, 5, 0, 1, 2]
    assert draw_partner("halves", 5, generator()).indices.tolist() == [2, 3, 4, 0, 1]


def test_pairings_that_do_not_fit_are_refused():
    with pytest.raises(BatchMismatch, match="5 rows"):
        draw_partner("two-batches", 5, generator())
    with pytest.raises(PairingError, match="'sorted'"):
        draw_partner("sorted", 5, generator())
    with pytest.raises(PairingError, match="mutual"):
        draw_partner(lambda y, g: [1, 2, 0], 3, generator(), matching=True)
    with pytest.raises(PairingError, match="per='batch'"):
        draw_partner("two-batches", 4, generator(), matching=True)


def test_a_callable_pairing_sees_the_targets_and_the_generator():
    y = torch.tensor([2, 0, 1])
    partner = draw_partner(lambda labels, g: torch.argsort(labels), 3, generator(), y)
    assert partner.indices.tolist() == [1, 2, 0]


def test_function_transforms_see_the_same_derivative():
    h, partner = torch.randn(5, 3, dtype=torch.float64), torch.tensor([2, 0, 1, 4, 3])

    def loss(h):
        return (interpolate(h, partner, 0.3) ** 3).sum()

    expected = torch.autograd.functional.jacobian(loss, h)
    torch.testing.assert_close(torch.func.grad(loss)(h), expected)
    direction = torch.randn_like(h)
    torch.testing.assert_close(torch.func.jvp(loss, (h,), (direction,))[1], (expected * direction).sum())
