"""nn.GRU, nn.EmbeddingGRU and the decoder: what people do to modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import fastlm
from fastlm import dispatch

BACKENDS = dispatch.ready("embedding_gru")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 3, "bias": False, "batch_first": True},
    ],
)
def test_module_is_nn_gru(options: dict) -> None:
    theirs = torch.nn.GRU(7, 5, **options)
    mine = fastlm.nn.GRU(7, 5, **options)
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    hx_shape = (theirs.num_layers * (2 if theirs.bidirectional else 1), 3, 5)
    x = torch.randn(3, 3, 7, requires_grad=True)
    hx = torch.randn(hx_shape, requires_grad=True)
    leaves = [x, hx]
    results = []
    for module in (mine, theirs):
        out, h_n = module(x, hx)
        grads = torch.autograd.grad(out.square().sum() + h_n.sum(), [*leaves, *module.parameters()])
        results.append((out, h_n, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    single, _ = mine(x[0].detach())
    torch.testing.assert_close(single, theirs(x[0].detach())[0])


def test_module_habits() -> None:
    """What people do to modules: copy, pickle, functional_call, parametrize, packed input."""
    torch.manual_seed(1)
    mine = fastlm.nn.GRU(7, 5)
    torch.manual_seed(1)
    theirs = torch.nn.GRU(7, 5)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)  # the same initialisation from the same seed
    x = torch.randn(4, 3, 7)
    want = mine(x)[0]
    assert torch.equal(copy.deepcopy(mine)(x)[0], want)
    assert torch.equal(pickle.loads(pickle.dumps(mine))(x)[0], want)
    buffer = io.BytesIO()
    torch.save(mine.state_dict(), buffer)
    doubled = {k: 2 * v for k, v in mine.state_dict().items()}
    other = torch.func.functional_call(mine, doubled, (x,))[0]
    theirs.load_state_dict(doubled)
    torch.testing.assert_close(other, theirs(x)[0])
    torch.nn.utils.parametrizations.weight_norm(mine, "weight_hh_l0")
    torch.testing.assert_close(mine(x)[0], want)
    theirs.load_state_dict({k: v / 2 for k, v in doubled.items()})
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [2, 4, 1], enforce_sorted=False)
    torch.testing.assert_close(mine(packed)[0].data, theirs(packed)[0].data)
    torch.testing.assert_close(mine(packed)[1], theirs(packed)[1])


def test_embedding_gru_module() -> None:
    model = fastlm.nn.EmbeddingGRU(9, 4, 6, num_layers=2, padding_idx=0)
    embedding = torch.nn.Embedding(9, 4, padding_idx=0)
    gru = torch.nn.GRU(4, 6, 2, batch_first=True)
    embedding.load_state_dict(model.embedding.state_dict())
    gru.load_state_dict(model.gru.state_dict())
    x, h0 = torch.randint(0, 9, (3, 5)), torch.randn(2, 3, 6)
    for a, b in zip(model(x, h0), gru(embedding(x), h0), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(model(x[0], h0[:, 0])[1], gru(embedding(x[0]), h0[:, 0])[1])
    out, _ = model(x)
    out.sum().backward()
    gru(embedding(x))[0].sum().backward()
    torch.testing.assert_close(model.embedding.weight.grad, embedding.weight.grad)


@pytest.mark.parametrize("backend", (None, *BACKENDS))
@pytest.mark.parametrize("bias", (True, False))
def test_decoder_is_the_forward(backend: str | None, bias: bool) -> None:
    model = fastlm.nn.EmbeddingGRU(9, 4, 21, num_layers=2, bias=bias).eval()
    x = torch.randint(0, 9, (3, 5))
    with torch.no_grad(), fastlm.use_backend(backend):
        want, want_h = model(x)
        decoder = model.decoder()
        h = decoder.start(3)
        outputs = []
        for t in range(5):
            output, h = decoder.step(x[:, t], h)
            outputs.append(output)
    torch.testing.assert_close(torch.stack(outputs, 1), want)
    torch.testing.assert_close(h, want_h)
    with pytest.raises(IndexError, match=r"tokens must be in \[0, 9\), got 9 at \[0\]"):
        decoder.step(torch.tensor([9]), h[:, :1])


def test_max_norm() -> None:
    model = fastlm.nn.EmbeddingGRU(9, 4, 6, max_norm=0.5)
    x = torch.randint(0, 9, (3, 5))
    model(x)
    assert model.embedding.weight[x.unique()].norm(dim=-1).max() <= 0.5 + 1e-5
