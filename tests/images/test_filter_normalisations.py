"""Normalisations of the filters on images: symmetric, and the steps of Sinkhorn, against K written out."""

from __future__ import annotations

import numpy as np
import pytest

from hf_imgproc_attn.images.filters import ImageFilter, square_window


def small_picture() -> np.ndarray:
    return np.random.default_rng(0).normal(100.0, 40.0, (8, 9))


def dense_filter(normalisation: str, iterations: int | None = None, bandwidth: float = 0.55) -> np.ndarray:
    """A ``[pixels, pixels]``, from what it makes of single pixels; the window leaves out weights of 1e-13 alone."""
    picture = small_picture()
    made = ImageFilter(
        picture,
        preset="bilateral_gaussian",
        content_bandwidth=70.0,
        position_bandwidth=bandwidth,
        window=square_window(3),
        normalisation=normalisation,
        sinkhorn_iterations=iterations,
    )
    units = np.eye(picture.size).reshape(picture.size, *picture.shape)
    return np.stack([made(unit).ravel() for unit in units], axis=1)


def kernel() -> np.ndarray:
    """K by hand."""
    picture = small_picture()
    values = picture.ravel()
    places = np.stack(np.meshgrid(*map(np.arange, picture.shape), indexing="ij"), axis=-1).reshape(-1, 2)
    distances = ((places[:, None] - places[None]) ** 2).sum(-1)
    return np.exp(-(((values[:, None] - values[None]) / 70.0) ** 2) - distances / 0.55**2)


def test_symmetric_is_the_formula_and_symmetric() -> None:
    """D^-1/2 K D^-1/2, whose rows do not sum to 1."""
    found, K = dense_filter("symmetric"), kernel()
    roots = np.sqrt(K.sum(1))
    np.testing.assert_allclose(found, K / roots[:, None] / roots[None], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found, found.T, rtol=0, atol=1e-14)
    assert np.abs(found.sum(1) - 1).max() > 1e-3


def test_sinkhorn_makes_rows_and_columns_sum_to_one() -> None:
    """Rows after any number of steps, columns in the limit, where A is symmetric; few steps by hand."""
    few, many, K = dense_filter("sinkhorn", 2), dense_filter("sinkhorn", 64, bandwidth=3.0), kernel()
    for _ in range(2):
        K = K / K.sum(0, keepdims=True)
        K = K / K.sum(1, keepdims=True)
    np.testing.assert_allclose(few, K, rtol=0, atol=1e-12)
    for matrix in (few, many):
        np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(many.sum(0), 1.0, rtol=0, atol=1e-10)
    np.testing.assert_allclose(many, many.T, rtol=0, atol=1e-10)
    assert np.abs(few.sum(0) - 1).max() > 1e-6
    assert np.abs(dense_filter("softmax", bandwidth=3.0).sum(0) - 1).max() > 1e-2


@pytest.mark.parametrize("normalisation", ["symmetric", "sinkhorn"])
def test_twicing_keeps_more_of_every_eigenvalue(normalisation: str) -> None:
    """In [x, 1] for an eigenvalue x: real and in [0, 1], as K is positive and A similar to a symmetric matrix."""
    matrix = dense_filter(normalisation)
    eigenvalues, boosted = (np.linalg.eigvals(found) for found in (matrix, 2 * matrix - matrix @ matrix))
    for found in (eigenvalues, boosted):
        assert np.abs(found.imag).max() < 1e-12
    eigenvalues, boosted = np.sort(eigenvalues.real), np.sort(boosted.real)
    assert eigenvalues.min() > 0
    assert eigenvalues.max() == pytest.approx(1.0, abs=1e-9)
    assert (boosted >= eigenvalues - 1e-9).all()
    assert boosted.max() <= 1 + 1e-9


def test_what_does_not_go_with_a_normalisation_is_refused() -> None:
    settings = {"preset": "nlm", "content_bandwidth": 9.0, "window": square_window(1)}
    lopsided = square_window(1)
    lopsided[0, 0] = False
    for changes, message in (
        ({"normalisation": "sink"}, "normalisation must be one of softmax, sinkhorn, symmetric on images, got 'sink'"),
        ({"sinkhorn_iterations": 3}, "sinkhorn_iterations has no effect with normalisation 'softmax', got 3"),
        ({"normalisation": "sinkhorn", "sinkhorn_iterations": 0}, "must be an integer from 1 to 64, got 0"),
        ({"normalisation": "symmetric", "window": lopsided}, "window must be symmetric around its centre"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageFilter(small_picture(), **{**settings, **changes})
