"""fastlm.swap: other classes, the same parameters and results, and back again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastlm


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.rnn = nn.GRU(16, 16, 2, batch_first=True, bidirectional=True, bias=False)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.shared = self.encoder.self_attn
        self.head = nn.Linear(32, 11)
        self.loss = nn.CrossEntropyLoss(torch.rand(11), ignore_index=3, label_smoothing=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.encoder(self.rnn(self.embed(tokens))[0]))
        return self.loss(logits.flatten(0, 1), tokens.flatten())


NAMES = ["rnn", "shared", "loss", "encoder.self_attn"]


@pytest.mark.parametrize("training", [True, False])
def test_swap_and_undo(training: bool) -> None:
    model = Model().train(training)
    tokens = torch.randint(11, (3, 7))
    parameters = dict(model.named_parameters())
    want = torch.autograd.grad(model(tokens), list(parameters.values()))
    before, loss = list(model.modules()), model(tokens)
    keys = list(model.state_dict())
    with fastlm.swap(model) as swapped:
        assert swapped is model and isinstance(model.rnn, fastlm.nn.GRU)
        assert isinstance(model.loss, fastlm.nn.CrossEntropyLoss)
        assert isinstance(model.encoder.self_attn, fastlm.nn.MultiheadAttention)
        assert model.shared is model.encoder.self_attn
        assert all(p is parameters[n] for n, p in model.named_parameters())
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(model(tokens), loss)
        got = torch.autograd.grad(model(tokens), list(parameters.values()))
        torch.testing.assert_close(got, want)
        model.train(not training)
        with torch.no_grad():
            model.rnn.weight_hh_l0.add_(0.5)
        changed = model(tokens)
    assert list(model.modules()) == before and model.rnn.training is not training
    torch.testing.assert_close(model(tokens), changed)
    assert not torch.equal(changed, loss)


def test_kinds_and_the_root() -> None:
    model = Model()
    found = fastlm.swap(model, kinds=(nn.GRU,))
    assert found.names == ["rnn"] and type(model.loss) is nn.CrossEntropyLoss
    found.undo()
    assert sorted(fastlm.swap(model).names) == sorted(NAMES)
    assert fastlm.swap(model).names == []
    gru = nn.GRU(4, 5)
    found = fastlm.swap(gru)
    assert isinstance(found.model, fastlm.nn.GRU) and found.model.weight_ih_l0 is gru.weight_ih_l0
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(found.model(x), gru(x))
    assert found.undo() is gru
    with pytest.raises(ValueError, match="kinds must be among GRU, MultiheadAttention"):
        fastlm.swap(model, kinds=(nn.LSTM,))


def test_subclasses_stay_and_hooks_go_along() -> None:
    class Own(nn.GRU):
        pass

    model = nn.Sequential(Own(4, 4), nn.GRU(4, 4))
    seen: list[int] = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    assert fastlm.swap(model).names == ["1"] and type(model[0]) is Own
    model[1](torch.randn(2, 3, 4))
    assert seen == [1]


def test_undo_after_conversions_and_a_load() -> None:
    """Each of them makes new lists of weights, and an assigned state_dict new parameters."""
    model = nn.Sequential(nn.GRU(4, 5))
    state = nn.Sequential(nn.GRU(4, 5)).double().state_dict()
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    with fastlm.swap(model):
        model.double()
        model.load_state_dict(state, assign=True)
        model[0].batch_first = True
        want = model(x)
    assert type(model[0]) is nn.GRU and model[0].batch_first
    torch.testing.assert_close(model(x), want)
    assert model[0].weight_hh_l0.data_ptr() == state["0.weight_hh_l0"].data_ptr()


def test_what_is_bound_to_the_old_module_does_not_run() -> None:
    patched, compiled = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    patched.forward = lambda *_: torch.zeros(())  # type: ignore[method-assign]
    compiled.compile(backend="eager")
    model = nn.ModuleList([patched, compiled])
    found = fastlm.swap(model)
    assert found.names == ["1"] and model[0] is patched
    assert model[1]._compiled_call_impl is None
    found.undo()
    assert model[1] is compiled and compiled._compiled_call_impl is not None
