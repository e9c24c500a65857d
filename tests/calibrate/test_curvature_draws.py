"""Several draws of labels for each sequence: more samples of the same Fisher matrix."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from convex_caldera.calibrate.curvature import Curvature, sequence_curvature
from convex_caldera.calibrate.curvature_guided import guided_curvature

VOCABULARY, WIDTH, LENGTH = 5, 3, 6


class Unigram(nn.Module):
    """Logits W x_t of each token's own embedding, whose Fisher matrix is known."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, inputs_embeds: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.head(inputs_embeds))


def tokens() -> Tensor:
    return torch.arange(2 * LENGTH).remainder(VOCABULARY).view(2, LENGTH)


def exact_input(model: Unigram) -> Tensor:
    """H = sum_t E |p_t - e_y|^2 x_t x_t^T / (2 T m), sequences averaged: |.|^2 is 1 - |p_t|^2."""
    x = model.embedding(tokens()).flatten(0, 1).detach().double()
    p = model.head(x.float()).detach().double().softmax(-1)
    spread = 1 - p.square().sum(-1, keepdim=True)
    return (spread * x).T @ x / (len(tokens()) * 2 * LENGTH * VOCABULARY)


def miss(draws: int) -> float:
    """Mean squared error of the input side over seeds."""
    model = Unigram()
    exact = exact_input(model)
    found = [
        sequence_curvature(model, tokens(), ["head"], seed=seed, draws=draws)["head"].input
        for seed in range(40)
    ]
    return float(torch.stack([(H - exact).square().sum() for H in found]).mean())


def test_draws_are_samples_of_the_exact_curvature_and_halve_the_error_by_two() -> None:
    one, two, many = miss(1), miss(2), miss(32)
    assert 0.35 * one < two < 0.7 * one  # a half, up to forty seeds
    assert many < one / 16


@pytest.mark.parametrize("collect", [sequence_curvature, guided_curvature])
def test_every_draw_counts_as_a_sequence(collect) -> None:
    model = Unigram()
    for draws in (1, 3):
        found = collect(model, tokens(), ["head"], seed=1, draws=draws)["head"]
        assert found.sequences == draws * len(tokens())
        assert found.energy == pytest.approx(float(exact_input(model).diagonal().mean()), rel=0.5)


def test_the_output_side_keeps_its_mean() -> None:
    found: Curvature = sequence_curvature(Unigram(), tokens(), ["head"], seed=2, draws=4)["head"]
    assert float(found.output.diagonal().mean()) == pytest.approx(1.0)
