"""The benchmark of the trainer against a plain loop runs, and both train the model."""

import re
import sys

import pytest
import torch
from conftest import ROOT, tiny_dit

sys.path.insert(0, str(ROOT / "benchmarks"))
import trainer_overhead


@pytest.mark.parametrize("run", ["trainer", "plain"])
def test_both_loops_train_the_model(run, tmp_path):
    model, data = tiny_dit().train(), trainer_overhead.Samples(16, (4, 4, 4))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    config = trainer_overhead.TrainConfig(
        steps=12, batch_size=1, log_every=4, save_every=0, sample_every=0, workers=0, precision="fp32"
    )
    if run == "trainer":
        rate = trainer_overhead.by_trainer(model, data, config, tmp_path)
    else:
        rate = trainer_overhead.by_plain_loop(model, data, config)
    assert rate > 0
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_verdict_is_of_the_medians(monkeypatch, capsys):
    rates = {"by_trainer": iter([8.0, 9.0, 10.0]), "by_plain_loop": iter([9.9, 12.0, 9.0])}
    for name in rates:
        monkeypatch.setattr(trainer_overhead, name, lambda *_, name=name: next(rates[name]))
    monkeypatch.setattr(trainer_overhead.DiT, "from_name", lambda *_, **__: tiny_dit())
    monkeypatch.setattr(sys, "argv", ["trainer_overhead.py", "--steps", "2"])
    trainer_overhead.main()
    assert re.search(r"plain loop 9\.90 samples/s, trainer 9\.00: it takes 10\.0% more time", capsys.readouterr().out)
