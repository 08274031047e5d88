"""Students of many architectures: right log-probabilities, mergeable adapters, refusals."""

import json
import re

import pytest
import torch
from architectures import CONFIGS, ROLE, examine, page, write_model
from samples import ECHO_ROLE

from opencharacter.config.placement import Training
from opencharacter.config.roles import Role
from opencharacter.errors import UserError
from opencharacter.training import adapters, architectures, packing, probe
from opencharacter.training.packing import Tokens

TRAINABLE = sorted(CONFIGS.keys() - architectures.REFUSED.keys())
LIMIT = 1e-3
"""Largest difference of a log-probability in float32, in nats."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))


def student(path) -> Role:
    return Role(model=str(path), name="tiny", self_name="Tiny")


@pytest.mark.parametrize("name", TRAINABLE)
def test_an_architecture_has_the_log_probabilities_of_its_own_model_and_adapters_merge(
    name, tmp_path
):
    result = examine(name, tmp_path)
    assert result.nats < LIMIT
    assert result.merge < LIMIT
    assert result.mode == result.expected_mode
    assert result.skeleton == pytest.approx(result.adapted)
    assert (result.adapted < architectures.NEARLY_ALL) == (
        result.architecture in architectures.PARTLY_ADAPTED
    )


def test_the_matrix_measures_every_architecture_of_the_table():
    assert CONFIGS.keys() >= architectures.KNOWN
    assert not architectures.PACKED & architectures.SEQUENTIAL
    assert len(architectures.PACKED) >= 40


@pytest.mark.parametrize("name", sorted(architectures.REFUSED))
def test_an_architecture_that_cannot_be_trained_is_refused_before_the_run(name, tmp_path):
    write_model(name, tmp_path)
    with pytest.raises(UserError, match=rf"\({name}\): .*choose a student of another arch"):
        architectures.check_student(student(tmp_path), Training())
    (note,) = architectures.student_notes(student(tmp_path))
    assert "cannot be trained" in note


def test_a_model_that_is_no_causal_language_model_is_refused_before_the_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 8}))
    with pytest.raises(UserError, match=r"\(t5\): transformers cannot create it"):
        architectures.check_student(student(tmp_path), Training())


def test_a_plan_says_what_training_an_architecture_means(tmp_path):
    def notes(name: str) -> str:
        path = tmp_path / name
        write_model(name, path)
        architectures.check_student(student(path), Training())
        return "\n".join(architectures.student_notes(student(path)))

    assert notes("llama") == ""
    assert "packing is not supported for lfm2" in notes("lfm2")
    assert re.search(r"adapters: on 11% .*the experts of mixtral are fused", notes("mixtral"))
    assert architectures.student_notes(Role(**ECHO_ROLE)) == []


def test_an_unknown_architecture_is_allowed_and_verified_when_it_is_loaded(tmp_path, monkeypatch):
    write_model("llama", tmp_path)
    monkeypatch.setattr(architectures, "KNOWN", frozenset())
    architectures.check_student(student(tmp_path), Training())
    (note,) = architectures.student_notes(student(tmp_path))
    assert "llama is not among the tested architectures" in note


def test_sequences_one_by_one_do_not_work_with_fsdp(tmp_path):
    write_model("lfm2", tmp_path)
    with pytest.raises(UserError, match="set strategy: ddp"):
        architectures.check_student(student(tmp_path), Training(strategy="fsdp"))


@pytest.mark.parametrize("name", ["llama", "lfm2", "bloom"])
def test_gradients_are_those_of_sequences_that_are_processed_alone(name, tmp_path):
    write_model(name, tmp_path)

    def gradients(split: bool) -> torch.Tensor:
        model = adapters.load(tmp_path, ROLE, on_gpu=False)
        probe.prepare(model)
        model.train()
        examples = [[tokens] for tokens in probe.sequences(model.config)]
        for group in [[example] for example in examples] if split else [examples]:
            packing.log_probs(model, packing.pack(group)).sum().backward()
        parameters = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(parameters)

    together, alone = gradients(split=False), gradients(split=True)
    assert (together - alone).norm() < 1e-4 * alone.norm()


def test_an_unknown_architecture_that_leaks_between_sequences_is_found_in_16_bits(
    tmp_path, monkeypatch
):
    write_model("lfm2", tmp_path)
    for name in ("KNOWN", "SEQUENTIAL"):
        monkeypatch.setattr(architectures, name, frozenset())
    monkeypatch.setattr(probe, "MAX_MEAN_DIFFERENCE", float("inf"))
    model = adapters.load(tmp_path, ROLE, on_gpu=False).to(torch.bfloat16)
    assert not probe.prepare(model)


def test_an_empty_pack_works_one_by_one(tmp_path):
    write_model("lfm2", tmp_path)
    model = adapters.load(tmp_path, ROLE, on_gpu=False)
    assert not probe.prepare(model)
    assert packing.log_probs(model, packing.pack([])).shape == (0,)


def test_a_model_that_is_wrong_either_way_is_refused_by_name(tmp_path, monkeypatch):
    write_model("llama", tmp_path)
    model = adapters.load(tmp_path, ROLE, on_gpu=False)
    monkeypatch.setattr(packing, "log_probs", lambda model, batch: torch.zeros(60))
    with pytest.raises(UserError, match=r"llama: training would be wrong: .* nats; choose"):
        probe.prepare(model)


def test_preparing_a_model_leaves_its_mode_and_attention_unchanged(tmp_path):
    write_model("llama", tmp_path)
    model = adapters.load(tmp_path, ROLE, on_gpu=False).train()
    assert probe.prepare(model)
    assert model.training
    assert model.config._attn_implementation == packing.ATTENTION


def test_attention_refuses_keywords_that_it_does_not_know():
    query = torch.randn(1, 2, 5, 8)
    boundaries = {"cu_seq_lens_q": torch.tensor([0, 5]), "max_length_q": 5}
    packing.attention(None, query, query, query, None, dropout=0.0, unknown=None, **boundaries)
    with pytest.raises(NotImplementedError, match="NoneType uses unknown, which"):
        packing.attention(None, query, query, query, None, unknown=3, **boundaries)
    with pytest.raises(NotImplementedError, match="uses is_causal"):
        packing.attention(None, query, query, query, None, is_causal=False, **boundaries)
    with pytest.raises(NotImplementedError, match="received no cu_seq_lens_q"):
        packing.attention(None, query, query, query, None)


def test_soft_capped_scores_and_sinks_match_their_definitions():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 8) for _ in range(3))
    sinks = torch.randn(2)
    output = packing.sequence_by_sequence(query, key, value, [0, 6], 0.5, None, 2.0, sinks)
    scores = 2 * torch.tanh(query @ key.transpose(2, 3) * 0.5 / 2)
    weights = scores.exp().tril()
    weights = weights / (weights.sum(-1, keepdim=True) + sinks.exp().reshape(1, 2, 1, 1))
    assert torch.allclose(output, weights @ value, atol=1e-6)


def test_training_adds_no_noise(tmp_path):
    write_model("opt", tmp_path)
    model = adapters.load(tmp_path, ROLE, on_gpu=False).train()
    batch = packing.pack([[Tokens(list(range(3, 40)), list(range(1, 37)))]])
    assert torch.equal(packing.log_probs(model, batch), packing.log_probs(model, batch))


@pytest.mark.slow
def test_the_page_of_the_documentation_is_generated_from_the_matrix(tmp_path):
    from architectures import PAGE

    assert PAGE.read_text(encoding="utf-8") == page()
