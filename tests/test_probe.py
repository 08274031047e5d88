"""The verification of packs before training: what it compares, finds, refuses and leaves alone."""

import math

import pytest
import torch
from architectures import CONFIGS, ROLE, log_probs_alone, stock_log_probs, write_model

from opencharacter.config.placement import Training
from opencharacter.errors import UserError
from opencharacter.training import adapters, architectures, packing, probe, trainer


@pytest.fixture
def load(tmp_path):
    """Return a function that loads a tiny random model of an architecture."""

    def load(name, dtype=torch.float32):
        write_model(name, tmp_path / name)
        return adapters.load(tmp_path / name, ROLE, on_gpu=False).to(dtype)

    return load


def pack_of(model):
    return packing.pack([[tokens] for tokens in probe.sequences(model.config)])


def test_an_architecture_that_is_known_to_leak_is_never_packed(load, monkeypatch):
    for limit in ("MAX_DIFFERENCE", "MAX_MEAN_DIFFERENCE", "MAX_MEAN_LEAK"):
        monkeypatch.setattr(probe, limit, float("inf"))
    model = load("lfm2", torch.bfloat16)
    assert model.config._attn_implementation == packing.ATTENTION  # it could be packed
    assert not probe.prepare(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_for_leaks_separates_attention_from_convolutions(load, dtype):
    for name, leaks in (("llama", False), ("gemma2", False), ("lfm2", True), ("bamba", True)):
        model = load(name, dtype).eval()
        with torch.no_grad():
            problem = probe.leak(model, pack_of(model))
        assert (problem is not None) == leaks, (name, problem)


def ignore_boundaries(monkeypatch, name):
    """Let an attention on a CPU treat a pack as one sequence."""
    whole = packing.sequence_by_sequence

    def across(query, key, value, cu_seqlens, *options):
        return whole(query, key, value, [0, cu_seqlens[-1]], *options)

    monkeypatch.setattr(packing, name, across)
    monkeypatch.setattr(packing, "fits_padding", lambda _: name == "padded")


@pytest.mark.parametrize("name", ["padded", "sequence_by_sequence"])
def test_an_attention_that_ignores_the_boundaries_of_sequences_is_not_used(load, monkeypatch, name):
    ignore_boundaries(monkeypatch, name)
    model = load("llama")
    assert not probe.prepare(model)
    assert (log_probs_alone(model) - packing.log_probs(model, pack_of(model))).abs().max() < 1e-4


def test_rounding_of_a_large_model_in_16_bits_is_not_taken_for_a_wrong_attention(load, monkeypatch):
    monkeypatch.setattr(probe, "MAX_MEAN_DIFFERENCE", 0.0)  # as if it rounded more than that
    assert probe.prepare(load("llama", torch.bfloat16))

    ignore_boundaries(monkeypatch, "sequence_by_sequence")
    assert not probe.prepare(load("llama", torch.bfloat16))


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_the_soft_cap_of_recurrent_gemma_holds_in_the_fused_head(load, tmp_path, monkeypatch, cap):
    changed = CONFIGS["recurrent_gemma"] | {"logits_soft_cap": cap}
    monkeypatch.setitem(CONFIGS, "recurrent_gemma", changed)
    model = load("recurrent_gemma").eval()
    probe.set_attention(model, "sdpa")
    probe.process_one_by_one(model, fused_head=True)
    with torch.no_grad():
        fused = packing.log_probs(model, pack_of(model))
    assert (fused - stock_log_probs(tmp_path / "recurrent_gemma")).abs().max() < 1e-4
    assert -fused.min() < math.log(300) + 2 * cap  # 300 tokens, whose logits are within +-cap


@pytest.mark.parametrize("fused_head", [True, False])
def test_sequences_one_by_one_equal_the_pack_with_either_head(load, fused_head):
    model = load("llama").eval()
    batch = pack_of(model)
    with torch.no_grad():
        packed = packing.log_probs(model, batch)
        probe.process_one_by_one(model, fused_head)
        model.set_attn_implementation("sdpa")
        alone = packing.log_probs(model, batch)
    assert (packed - alone).abs().max() < 1e-4


def test_without_boundaries_a_changed_model_computes_what_it_did(load):
    model = load("llama").eval()
    model.set_attn_implementation("sdpa")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        probe.process_one_by_one(model, fused_head=True)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_full_gpu_is_not_taken_for_a_wrong_attention(load, monkeypatch):
    def fail(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = load("llama")
    monkeypatch.setattr(packing, "log_probs", fail)
    with pytest.raises(torch.OutOfMemoryError):
        probe.prepare(model)


@pytest.mark.parametrize(("window", "longest"), [(None, 31), (8, 31), (40, 48), (8192, 31)])
def test_a_sequence_is_longer_than_the_sliding_window_if_that_is_small(window, longest):
    from transformers import MistralConfig

    sequences = probe.sequences(MistralConfig(vocab_size=300, sliding_window=window))
    assert max(len(tokens.ids) for tokens in sequences) == longest
    assert all(100 <= i < 300 for tokens in sequences for i in tokens.ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_that_are_no_numbers_are_wrong(dtype):
    values = torch.zeros(4)
    assert probe.difference(values, values, dtype) is None
    assert "nan nats" in str(probe.difference(values * float("nan"), values, dtype))


def test_the_attention_of_a_model_is_restored_after_an_error(load):
    model = load("llama")
    with pytest.raises(ZeroDivisionError):
        probe.with_attention(model, "sdpa", lambda: 1 / 0)
    assert model.config._attn_implementation == packing.ATTENTION


def test_flash_attention_is_used_only_for_what_it_computes():
    def fits(key_size, value_size, softcap=None, s_aux=None):
        query, value = torch.empty(1, 4, 9, key_size), torch.empty(1, 4, 9, value_size)
        return packing.fits_flash(query, value, softcap, s_aux)

    assert fits(128, 128)
    assert fits(256, 256)
    assert not fits(512, 512)
    assert not fits(192, 128)  # multi-head latent attention
    assert not fits(64, 64, softcap=50.0)
    assert not fits(64, 64, s_aux=torch.zeros(4))


def test_training_reports_how_packs_are_processed(load):
    assert trainer.verify_packing(load("llama"), Training())
    assert not trainer.verify_packing(load("lfm2"), Training())
    with pytest.raises(UserError, match="set strategy: ddp"):
        trainer.verify_packing(load("lfm2"), Training(strategy="fsdp"))


@pytest.mark.parametrize("packed", [True, False])
def test_the_manifest_and_the_log_say_how_packs_were_processed(capsys, packed):
    assert architectures.report_packing("a/dpo", {"packed": float(packed)}) == {"packed": packed}
    assert ("one sequence per forward pass" in capsys.readouterr().out) == (not packed)
    assert architectures.report_packing("a/dpo", {"step": 3.0}) == {}
