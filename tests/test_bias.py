"""Properties of phi that hold for every layout, checked on random ones against the formula pair by pair."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_adapters import StructuralBias, TokenLayout
from sfa_adapters.bias import TERMS, Term
from tests.support.reference import phi_by_pairs, regular_places

settings.register_profile("core", max_examples=25, derandomize=True, deadline=None, database=None)
settings.load_profile("core")

side, short = st.integers(1, 9), st.integers(1, 6)
prefixes = st.integers(0, 3)
heads = st.integers(1, 4)
seeds = st.integers(0, 10_000)
block_grids = st.tuples(st.integers(1, 5), st.integers(1, 5))


def a_bias(num_heads: int, seed: int, terms: tuple[Term, ...] = TERMS, num_blocks: int = 16) -> StructuralBias:
    torch.manual_seed(seed)
    return StructuralBias(num_heads, num_blocks, init_std=1.0, terms=terms)


@given(short, short, prefixes, heads, seeds)
def test_phi_is_the_formula(height: int, width: int, prefix: int, num_heads: int, seed: int):
    bias = a_bias(num_heads, seed)
    phi = bias(TokenLayout.regular(height, width, prefix))
    assert phi.shape == (1, num_heads, height * width + prefix, height * width + prefix)
    row, col, dist, block = (bias.get_parameter(term) for term in TERMS)
    expected = phi_by_pairs(regular_places((height, width), prefix), (height, width), row, col, dist, block)
    torch.testing.assert_close(phi[0].double(), expected, rtol=1e-5, atol=2e-6)


@given(short, short, block_grids, seeds)
def test_phi_is_the_formula_for_any_partition(height: int, width: int, block_grid: tuple[int, int], seed: int):
    block_map = torch.arange(block_grid[0] * block_grid[1]).reshape(block_grid)
    bias = a_bias(2, seed, num_blocks=block_map.numel())
    phi = bias(TokenLayout.regular(height, width, 0, block_map))
    row, col, dist, block = (bias.get_parameter(term) for term in TERMS)
    expected = phi_by_pairs(regular_places((height, width), 0), (height, width), row, col, dist, block, block_grid)
    torch.testing.assert_close(phi[0].double(), expected, rtol=1e-5, atol=2e-6)


@given(side, side, prefixes, heads, seeds)
def test_phi_is_symmetric(height: int, width: int, prefix: int, num_heads: int, seed: int):
    """The tables exactly. The matrix is a product over kinds, whose order of summing differs from (i, j) to (j, i)."""
    bias, layout = a_bias(num_heads, seed), TokenLayout.regular(height, width, prefix)
    factors, phi = bias.factors(layout), bias(layout)
    assert torch.equal(factors.row_table, factors.row_table.transpose(-1, -2))
    assert torch.equal(factors.column_table, factors.column_table.transpose(-1, -2))
    torch.testing.assert_close(phi, phi.transpose(-1, -2), rtol=1e-6, atol=2e-6)


@given(side, side, st.integers(1, 4), seeds)
def test_prefix_tokens_have_no_bias(height: int, width: int, prefix: int, seed: int):
    phi = a_bias(2, seed)(TokenLayout.regular(height, width, prefix))
    assert not phi[..., :prefix, :].any()
    assert not phi[..., :prefix].any()
    assert phi[..., prefix:, prefix:].all()  # four random terms never cancel exactly


@given(side, side, prefixes, seeds)
def test_the_line_terms_are_exactly_on_rows_and_columns(height: int, width: int, prefix: int, seed: int):
    layout = TokenLayout.regular(height, width, prefix)
    token = torch.arange(height * width)
    lines: dict[Term, torch.Tensor] = {"row": token // width, "col": token % width}
    for term, line in lines.items():
        bias = a_bias(3, seed, terms=(term,))
        phi = bias(layout)[0, :, prefix:, prefix:]
        same = line[:, None] == line
        assert torch.equal(phi, getattr(bias, term)[:, None, None] * same)


@given(side, side, seeds)
def test_distance_is_zero_on_the_diagonal_and_one_across_the_page(height: int, width: int, seed: int):
    bias = a_bias(1, seed, terms=("dist",))
    with torch.no_grad():
        bias.get_parameter("dist").fill_(-1.0)
    distance = bias(TokenLayout.regular(height, width))[0, 0]
    assert not distance.diagonal().any()
    assert distance.min() >= 0
    largest = 0.0 if height * width == 1 else 1.0
    torch.testing.assert_close(distance.max(), torch.tensor(largest), rtol=0, atol=1e-6)
    assert distance.max() <= 1 + 1e-6


@given(side, side, prefixes, seeds)
def test_permuting_tokens_permutes_phi(height: int, width: int, prefix: int, seed: int):
    layout, bias = TokenLayout.regular(height, width, prefix), a_bias(2, seed)
    order = torch.cat((torch.arange(prefix), prefix + torch.randperm(height * width)))
    expected = bias(layout)[..., order, :][..., order]
    torch.testing.assert_close(bias(layout.select(order)), expected, rtol=1e-6, atol=1e-6)


@given(side, side, prefixes, seeds)
def test_dropping_tokens_drops_rows_and_columns_of_phi(height: int, width: int, prefix: int, seed: int):
    layout, bias = TokenLayout.regular(height, width, prefix), a_bias(2, seed)
    kept = torch.cat((torch.arange(prefix), prefix + torch.arange(0, height * width, 2)))
    torch.testing.assert_close(bias(layout.select(kept)), bias(layout)[..., kept, :][..., kept], rtol=1e-6, atol=1e-6)


@given(side, side, prefixes, seeds)
def test_boxes_of_one_cell_are_the_regular_grid(height: int, width: int, prefix: int, seed: int):
    token, bias = torch.arange(height * width), a_bias(2, seed)
    boxes = TokenLayout.from_boxes(token // width, token % width, torch.ones(len(token)), (height, width), prefix)
    torch.testing.assert_close(bias(boxes), bias(TokenLayout.regular(height, width, prefix)), rtol=1e-6, atol=1e-6)


def test_a_large_box_shares_the_rows_that_it_covers():
    layout = TokenLayout.from_boxes(
        torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 2, 0]), torch.tensor([2, 1, 1, 1]), (3, 3)
    )
    bias = a_bias(1, 0, terms=("row",))
    shared = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(bias(layout)[0, 0], bias.get_parameter("row").detach() * shared)


def test_the_distance_of_boxes_is_that_of_their_centres():
    layout = TokenLayout.from_boxes(torch.tensor([0, 2]), torch.tensor([0, 3]), torch.tensor([2, 1]), (4, 4))
    bias = a_bias(1, 0, terms=("dist",))
    expected = -bias.get_parameter("dist").detach() * ((2.5 - 1.0) + (3.5 - 1.0)) / 6
    torch.testing.assert_close(bias(layout)[0, 0, 0, 1:], expected)


@given(st.lists(st.tuples(side, side), min_size=1, max_size=4), prefixes, seeds)
def test_images_of_a_batch_are_what_they_are_alone(grids: list[tuple[int, int]], prefix: int, seed: int):
    layouts, bias = [TokenLayout.regular(*grid, prefix) for grid in grids], a_bias(2, seed)
    together = bias(TokenLayout.batch(layouts))
    assert together.shape[:2] == (len(grids), 2)
    for phi, layout in zip(together, layouts, strict=True):
        n = layout.num_tokens
        torch.testing.assert_close(phi[:, :n, :n], bias(layout)[0], rtol=1e-6, atol=1e-6)
        assert (phi[..., n:] == float("-inf")).all()


@given(st.integers(1, 4), heads, seeds)
def test_prefix_only_layouts_have_no_bias(prefix: int, num_heads: int, seed: int):
    assert not a_bias(num_heads, seed)(TokenLayout.regular(0, 0, prefix)).any()


@given(prefixes, seeds)
def test_one_by_one_grid(prefix: int, seed: int):
    bias = a_bias(2, seed)
    phi = bias(TokenLayout.regular(1, 1, prefix))[0, :, -1, -1]
    row, col, block = (bias.get_parameter(term) for term in ("row", "col", "block"))
    torch.testing.assert_close(phi, row + col + block[:, 10] ** 2)  # the centre of the page lies in block 2 * 4 + 2
