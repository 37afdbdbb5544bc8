"""The delta rule: each token stores what its value has beyond what the filter already reads at its place.

    u_i = v_i - beta_i sum_{j<i} a'_ij u_j,      out = A u,      causal only

(DeltaFormer, Zhong, Xu, Ao, Shi 2025, arXiv 2505.19488.) a' are the weights of the same logits over the keys before
the query's own, so that with A' the matrix of them u = (I + diag(beta) A')^-1 V, a unit lower triangular system: at
beta = 1 the operator is A (I + A')^-1, at beta = 0 plain attention. Where twicing takes A V from V once, here each row
is corrected by rows that are corrected already.

beta_i = tanh(b + w . z_i), b and w one a head, from 0 in a new model and in a converted one. *Choices*: the layer of
flash-linear-attention leaves beta unbounded, and |beta| > 1 lets rows grow like |beta|^N; queries and keys are those
of A for both matrices (that layer compares keys with keys for a'). In layers of another model, which do not hand their
input on, w is 0.

One mask of dropout falls on A and on A'. What stands at a token that no query sees has no influence: its u is 0.

A cache keeps u as the one stream of the booster: row i of it never changes once computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .boost_gradient import ZeroLinear
from .spec_axes import LayerSpec
from .visibility import Visibility

OwnPlaces = slice | torch.Tensor
"""Where the queries' own tokens stand among the keys: a range, or numbers ``[length]`` in a cache of fixed size."""


class TokenRates(ZeroLinear):
    """w . z_i of ``delta``, which starts at zero.

    Args:
        hidden_size: width of the tokens.
        num_heads: number of heads.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[batch, length, hidden_size]`` to ``[batch, heads, length, 1]``."""
        return super().forward(hidden_states).transpose(1, 2).unsqueeze(-1)


def token_rates(spec: LayerSpec, config: Any) -> TokenRates | None:
    """The projection of a layer, or None where its booster is another one, or its input is not handed on.

    Args:
        spec: the layer's axes.
        config: the model's configuration.
    """
    if spec.boosting != "delta" or not config.sees_layer_input:
        return None
    return TokenRates(config.hidden_size, config.num_attention_heads)


def rates(shift: torch.Tensor, by_token: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """beta, ``[heads, 1, 1]`` or ``[batch, heads, length, 1]``.

    Args:
        shift: b, ``[heads]``.
        by_token: w . z_i, ``[batch, heads, length, 1]``, or None.
        dtype: of beta, at least float32.
    """
    logits = shift.to(dtype).view(-1, 1, 1)
    return torch.tanh(logits if by_token is None else logits + by_token.to(dtype))


def own_columns(x: torch.Tensor, places: OwnPlaces) -> torch.Tensor:
    """The columns of the queries' own tokens of ``[..., key_length]``; a single column stands for all."""
    if x.shape[-1] == 1:
        return x
    return x[..., places] if isinstance(places, slice) else x.index_select(-1, places)


def hidden_rows(visibility: Visibility, places: OwnPlaces) -> torch.Tensor | None:
    """Which queries' own tokens nobody sees, ``[batch or 1, heads or 1, length, 1]``, or None if there are none."""
    return None if visibility.hidden is None else own_columns(visibility.hidden, places).mT


def strictly_before(visibility: Visibility, places: OwnPlaces, device: torch.device) -> Visibility:
    """Who sees whom in A': of what a query sees, the keys before its own.

    Args:
        visibility: who sees whom in A.
        places: of the queries' own tokens.
        device: of the mask.
    """
    keys = torch.arange(visibility.key_length, device=device)
    own = keys[places] if isinstance(places, slice) else places
    before = (keys < own.unsqueeze(-1))[None, None]
    allowed = visibility.allowed(device)
    return visibility._replace(dense=before if allowed is None else before & allowed)


class DenseDelta(NamedTuple):
    """The system of some queries, dense.

    before: A' after dropout, ``[batch, heads, length, key_length]`` in at least float32.
    rate: beta, ``[heads, 1, 1]`` or ``[batch, heads, length, 1]``; None: 1.
    places: of the queries' own tokens.
    hidden: queries whose own token nobody sees, ``[batch or 1, heads or 1, length, 1]``, or None.
    """

    before: torch.Tensor
    rate: torch.Tensor | None
    places: OwnPlaces
    hidden: torch.Tensor | None = None

    def weights(self) -> torch.Tensor:
        """beta A', ``[batch, heads, length, key_length]``; 0 in rows of tokens that nobody sees."""
        weights = self.before if self.rate is None else self.before * self.rate.to(self.before.dtype)
        return weights if self.hidden is None else weights.masked_fill(self.hidden, 0.0)

    def solve(self, value: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        """u of the queries' tokens, ``[batch, heads, length, d]``.

        Args:
            value: of the queries' tokens, the same.
            known: u of the earlier keys in front, ``[batch, heads, at most key_length, d]``; what stands at the
                queries' own tokens and after them does not count. None: there are no earlier keys.
        """
        weights = self.weights()
        value = value.to(weights.dtype)
        value = value if self.hidden is None else value.masked_fill(self.hidden, 0.0)
        own = own_columns(weights, self.places)
        if known is not None:
            known = known.to(weights.dtype)
            if isinstance(self.places, slice):
                known = known[..., : self.places.start, :]
            else:  # other places of a cache of fixed size may hold anything
                is_own = torch.arange(known.shape[-2], device=known.device) >= self.places[0]
                known = known.masked_fill(is_own.unsqueeze(-1), 0.0)
            value = value - weights[..., : known.shape[-2]] @ known
        if torch.compiler.is_exporting():
            return torch.matmul(inverse_by_products(own), value)
        return torch.linalg.solve_triangular(own, value, upper=False, unitriangular=True)


MOST_DOUBLINGS = 17
"""Of blocks in an exported graph whose longest length is not known: rows that a matrix of weights can have at most."""


def inverse_by_products(system: torch.Tensor) -> torch.Tensor:
    """(I + B)^-1, B what stands below the diagonal, from the inverses of the blocks on it, of 1, 2, 4, … rows.

        [[I + P, 0], [C, I + Q]]^-1 = X - X [[0, 0], [C, 0]] X,     X the inverse without C

    As exact as a triangular solve, which is not among the operators that readers of exported graphs have to know, and
    much slower for long texts: two products of matrices of length x length each time.

    Args:
        system: square, ``[..., length, length]``.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    length = system.shape[-1]
    place = torch.arange(length, device=system.device)
    inverse = torch.eye(length, dtype=system.dtype, device=system.device).expand_as(system)
    for doublings in range(MOST_DOUBLINGS):
        if statically_known_true(length <= 2**doublings):
            break
        number = place // 2**doublings
        below = (number.unsqueeze(-1) % 2 == 1) & (number.unsqueeze(-1) - 1 == number)
        inverse = inverse - inverse @ system.masked_fill(~below, 0.0) @ inverse
    return inverse
