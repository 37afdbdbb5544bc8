"""Content and position kernels: the factors of the similarity kernel K, as logits and as augmented features.

A kernel appears twice. ``*_logits`` is its formula, dense, the truth that everything else is tested against.
``*_columns`` are extra columns a_i, b_j with <a_i, b_j> = logits_ij (up to a constant a row, which the softmax
cancels), so that one ``scaled_dot_product_attention`` on [q ; a], [k ; b] applies content and position together.

Shapes: queries ``[batch, heads, length, head_dim]``, keys ``[batch, heads, key_length, head_dim]``, logits
``[batch, heads, length, key_length]``; ``scale`` is 2/h^2 (dimensionless), a number or a tensor ``[heads, 1, 1]``;
batch may be 1 where the rows of a batch share their positions.

Sources: bilateral filter (Tomasi, Manduchi 1998), non-local means (Buades 2005); attention as their product,
arXiv 2506.10371; untied positions after Ke, He, Liu 2021 (arXiv 2006.15595).
"""

from __future__ import annotations

import torch

HALF_DTYPES = (torch.float16, torch.bfloat16)

# Powers of two cost no precision. They keep squared norms and positions inside the range of float16.
_FLOAT16_SHIFT = 2.0**8
_FLOAT16_POSITION_SHIFT = 2.0**9


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which bandwidths, positions and dense logits are computed: at least float32."""
    return torch.float32 if dtype in HALF_DTYPES else dtype


# --------------------------------------------------------------------------------------------------------------------
# Products that keep their precision in half-precision columns
# --------------------------------------------------------------------------------------------------------------------


def _pieces(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    high = x.to(dtype)
    rest = x - high.to(x.dtype)
    middle = rest.to(dtype)
    low = (rest - middle.to(x.dtype)).to(dtype)
    return high, middle, low


def left_columns(a: torch.Tensor, dtype: torch.dtype, shift: torch.Tensor | float = _FLOAT16_SHIFT) -> torch.Tensor:
    """Columns of the query side of the product a_i * b_j.

    Args:
        a: ``[..., length]`` in at least float32.
        dtype: of the columns. In half precision a number is split into three pieces whose sum has about 24 bits, and
            the six products of pieces above rounding get a column each; else one column is exact.
        shift: a power of two that moves from b to a in float16, whose range is short.

    Returns:
        ``[..., length, 6]`` in half precision, ``[..., length, 1]`` otherwise, to be paired with
        :func:`right_columns`.
    """
    if dtype not in HALF_DTYPES:
        return a.to(dtype).unsqueeze(-1)
    high, middle, low = _pieces(inside(a * shift, dtype) if dtype == torch.float16 else a, dtype)
    return torch.stack((high, high, middle, high, middle, low), dim=-1)


def right_columns(b: torch.Tensor, dtype: torch.dtype, shift: torch.Tensor | float = _FLOAT16_SHIFT) -> torch.Tensor:
    """Columns of the key side of the product a_i * b_j; see :func:`left_columns`."""
    if dtype not in HALF_DTYPES:
        return b.to(dtype).unsqueeze(-1)
    high, middle, low = _pieces(inside(b / shift, dtype) if dtype == torch.float16 else b, dtype)
    return torch.stack((high, middle, high, low, middle, high), dim=-1)


def inside(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Clamp to the range of ``dtype``: an infinite column would make the logits NaN."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest)


# --------------------------------------------------------------------------------------------------------------------
# Content kernels
# --------------------------------------------------------------------------------------------------------------------


def dot_product_logits(query: torch.Tensor, key: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """q_i . k_j * 2/h_y^2, stock attention's content logits."""
    return torch.matmul(query, key.transpose(-1, -2)) * scale


def gaussian_logits(query: torch.Tensor, key: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """-|q_i - k_j|^2 / h_y^2 + const_i = (2 q_i . k_j - |k_j|^2) / h_y^2: the range kernel of non-local means."""
    half_norm = key.square().sum(-1).unsqueeze(-2) / 2
    return (torch.matmul(query, key.transpose(-1, -2)) - half_norm) * scale


def row_constants(query: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """|q_i|^2 / h_y^2, ``[batch, heads, length, 1]``, which :func:`gaussian_logits` leave out: no softmax sees it."""
    return query.square().sum(-1, keepdim=True) * scale / 2


def gaussian_content_columns(
    query: torch.Tensor, key: torch.Tensor, scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns for -|k_j|^2 / h_y^2, beside the scaled query and the key.

    Returns:
        ``[batch, heads, length, c]`` and ``[batch, heads, key_length, c]`` in the query's dtype.
    """
    dtype, logits_dtype = query.dtype, working_dtype(query.dtype)
    minus_half_scale = torch.as_tensor(scale, dtype=logits_dtype, device=query.device) * -0.5
    squared = key.to(logits_dtype).square().sum(-1)
    shift: torch.Tensor | float = _FLOAT16_SHIFT
    if dtype == torch.float16 and key.shape[-2]:
        # The usual shift fits squared norms up to 2^24, float16 ends near 2^16: longer keys need a larger one. The
        # logits that such columns can represent end near 2^32.
        shift = torch.exp2((squared.detach().amax() / 2.0**15).log2().ceil()).clamp(min=_FLOAT16_SHIFT)
    left = left_columns(minus_half_scale.expand(query.shape[1], 1, 1)[..., 0], dtype, shift)
    return (
        left.expand(query.shape[0], query.shape[1], query.shape[2], left.shape[-1]),
        right_columns(squared, dtype, shift),
    )


def row_constant_columns(
    query: torch.Tensor, key: torch.Tensor, scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns for -|q_i|^2 / h_y^2, which :func:`gaussian_content_columns` lack, for weights that depend on it.

    Returns:
        ``[batch, heads, length, c]`` and ``[batch, heads, key_length, c]`` in the query's dtype.
    """
    dtype, working = query.dtype, working_dtype(query.dtype)
    minus = -row_constants(query.to(working), scale).squeeze(-1)
    ones = torch.ones_like(key[..., 0], dtype=working)
    return left_columns(minus, dtype, shift=1.0), right_columns(ones, dtype, shift=1.0)


def elliptical_logits(query: torch.Tensor, key: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """q_i^T M_i k_j * 2/h_y^2 with a diagonal M_i (Nielsen 2024), here in ``scale``: 2/h_y^2 times that diagonal.

    Args:
        query: ``[batch, heads, length, head_dim]``.
        key: ``[batch, heads, key_length, head_dim]``.
        scale: broadcastable to the query; :func:`kernel_elliptical.elliptical_metric` makes the diagonal.
    """
    return torch.matmul(query * scale, key.transpose(-1, -2))


def unit_vectors(x: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, ``[..., width]`` in their dtype, as the kernel ``cosine`` compares them; 0 stays 0."""
    rows = x.to(working_dtype(x.dtype))
    # Squares of small numbers would underflow.
    largest = rows.detach().abs().amax(-1, keepdim=True)
    rows = rows / largest.masked_fill(largest == 0.0, 1.0)
    return (rows * rows.square().sum(-1, keepdim=True).clamp(min=0.5).rsqrt()).to(x.dtype)


CONTENT_LOGITS = {"dot_product": dot_product_logits, "gaussian": gaussian_logits, "elliptical": elliptical_logits}
CONTENT_COLUMNS = {"dot_product": None, "gaussian": gaussian_content_columns, "elliptical": None}

# --------------------------------------------------------------------------------------------------------------------
# Position kernels
# --------------------------------------------------------------------------------------------------------------------


def gaussian_position_logits(
    query_positions: torch.Tensor, key_positions: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """-|p_i - p_j|^2 / h_p^2, the spatial kernel of the bilateral filter.

    Args:
        query_positions: ``[batch, length, dims]`` in index or patch units, at least float32.
        key_positions: ``[batch, key_length, dims]``.
        scale: 2/h_p^2, ``[heads, 1, 1]``.

    Returns:
        ``[batch, heads, length, key_length]``.
    """
    difference = query_positions.unsqueeze(-2) - key_positions.unsqueeze(-3)
    return difference.square().sum(-1).unsqueeze(1) * (scale * -0.5)


def gaussian_position_columns(
    query_positions: torch.Tensor, key_positions: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns for (2 p_i . p_j - |p_j|^2) / h_p^2; the row constant -|p_i|^2 / h_p^2 is dropped.

    Positions should be centred by the caller: the columns' rounding error grows with |p|^2 / h_p^2. The output is as
    accurate as plain attention in every precision, but the gradient of h_p is not in half precision, where large
    column gradients cancel: use the dense logits there.

    Returns:
        ``[batch, heads, length, c]`` and ``[batch, heads, key_length, c]``.
    """
    heads, dims = scale.shape[0], query_positions.shape[-1]
    scaled = query_positions.unsqueeze(1) * scale
    left = [left_columns(scaled[..., axis], dtype) for axis in range(dims)]
    right = [right_columns(key_positions[..., axis], dtype) for axis in range(dims)]
    left.append(left_columns((scale * -0.5).squeeze(-1).expand(scaled.shape[:-1]), dtype))
    right.append(right_columns(key_positions.square().sum(-1), dtype))
    return torch.cat(left, dim=-1), torch.cat(right, dim=-1).unsqueeze(1).expand(-1, heads, -1, -1)


def class_token_logits(
    class_bias: torch.Tensor, length: int, key_length: int, num_class_tokens: int, first_query: int = 0
) -> torch.Tensor:
    """Position logits of tokens that have no place on the grid: a scalar to them, from them and to themselves.

    Args:
        class_bias: ``[heads, 3]``: grid query to class key, class query to grid key, class to class.
        length: number of queries; the first ``num_class_tokens`` are class or register tokens, in keys likewise.
        key_length: number of keys.
        num_class_tokens: how many.
        first_query: where the queries begin among the tokens.

    Returns:
        ``[1, heads, length, key_length]``, 0 between grid tokens.
    """
    is_class_query = (torch.arange(length, device=class_bias.device) + first_query < num_class_tokens).view(-1, 1)
    is_class_key = (torch.arange(key_length, device=class_bias.device) < num_class_tokens).view(1, -1)
    to_class, from_class, within = (class_bias[:, i].view(1, -1, 1, 1) for i in range(3))
    zero = torch.zeros((), dtype=class_bias.dtype, device=class_bias.device)
    from_grid = torch.where(is_class_key, to_class, zero)
    return torch.where(is_class_query, torch.where(is_class_key, within, from_class), from_grid)


def class_token_columns(
    class_bias: torch.Tensor,
    row_constant: torch.Tensor | None,
    length: int,
    key_length: int,
    num_class_tokens: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two columns for :func:`class_token_logits`; the grid columns of class tokens must be zero beside them.

    Args:
        class_bias: ``[heads, 3]``.
        row_constant: |p_i|^2/h^2, ``[batch, heads, length]``, which the grid columns omit. It is added for class keys,
            so that both kinds of key share one reference. None: the grid columns omit nothing.
        length: number of queries, class tokens first.
        key_length: number of keys, class tokens first.
        num_class_tokens: how many.
        dtype: of the columns.
    """
    heads, device = class_bias.shape[0], class_bias.device
    is_class_query = torch.arange(length, device=device) < num_class_tokens
    is_class_key = torch.arange(key_length, device=device) < num_class_tokens
    to_class, from_class, within = (class_bias[:, i].view(1, heads, 1) for i in range(3))
    grid_to_class = to_class.expand(1, heads, length)
    if row_constant is not None:
        grid_to_class = grid_to_class + row_constant
    on_class_keys = torch.where(is_class_query, within, grid_to_class)
    on_grid_keys = torch.where(is_class_query, from_class, torch.zeros_like(from_class)).expand(
        on_class_keys.shape[0], heads, length
    )
    left = torch.stack((on_class_keys, on_grid_keys), dim=-1).to(dtype)
    right = torch.stack((is_class_key, ~is_class_key), dim=-1).to(dtype)
    return left, right.expand(1, heads, key_length, 2)


def encode_positions(positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Write integer positions into columns of ``dtype`` without loss, so that a cached key carries its position.

    Args:
        positions: ``[batch, length, dims]`` with |p| < 2^24.
        dtype: of the key. bfloat16 has 8 significant bits and float16 11, so half precision takes three columns a
            coordinate; float32 and float64 take one.

    Returns:
        ``[batch, length, dims * 3]`` or ``[batch, length, dims]``; :func:`decode_positions` is the inverse.
    """
    if dtype not in HALF_DTYPES:
        return positions.to(dtype)
    shift = _FLOAT16_POSITION_SHIFT if dtype == torch.float16 else 1.0
    return torch.cat(_pieces(positions / shift, dtype), dim=-1)


def decode_positions(columns: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`encode_positions`: ``[batch, length, dims]`` in at least float32."""
    if columns.dtype not in HALF_DTYPES:
        return columns
    shift = _FLOAT16_POSITION_SHIFT if columns.dtype == torch.float16 else 1.0
    return torch.stack(columns.float().chunk(3, dim=-1)).sum(0) * shift
